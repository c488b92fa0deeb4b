"""Processes: device and process group, stops that all ranks agree on, sums over ranks, seeds.

`start(config)` sets a process up, yields its Runtime, and tears it down.

What happens on SIGTERM, SIGINT or SIGUSR1: the handler notes the signal in runtime.stop_signal, and nothing else. The
next collective that counts signals tells all ranks: the all-reduce at the end of a step (finish_step in optimizer.py),
or check_for_stop, which evaluation and slow steps call. Every rank then raises StopRequested at the same place.
train.py catches it around its loop, saves, and prints the command that continues; `start` closes the process group:
status 0.
During set-up, where a rank may compile for minutes, the watch (hang_watch.py) ends all ranks with status 0 instead. A
SIGINT after any stop signal ends the process at once.
"""
import contextlib
import datetime
import gc
import hashlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from exactgpt.config import FolderLock, RunFailed, UserError
from exactgpt.device import DTYPES, Hardware, choose_device, choose_dtype, probe_hardware, set_deterministic
from exactgpt.hang_watch import HANG_GRACE_S, enable_flight_recorder, peer_failure, watch_run
from exactgpt.rendezvous import wait_for_peers

START_TIMEOUT_S = 1800   # until the first step is done: compilation and slow file systems take their time
STEADY_TIMEOUT_S = 600   # afterwards (default of --timeout): more than the longest thing rank 0 does alone, a save
BUCKET_MB = 100          # of gradients per all-reduce: large messages use a fast network better
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")     # Slurm can send SIGUSR1 ahead of the time limit (examples/)


class StopRequested(Exception):
    """Some rank was signalled to stop. Raised on all ranks after the same collective."""


@dataclass
class Runtime:
    """This process: its rank, its device, and what it knows of the other ranks."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hardware: Hardware
    dtype_name: str            # "bf16", "fp16" or "fp32"
    stop_signal: str = ""      # the stop signal that this process has received, if any
    stopping: bool = False     # all ranks know that one of them has: raise_if_stopping() raises
    slow_steps: bool = False   # steps last so long that a stop is checked for within them
    starting: bool = True      # until setup_done(): there is nothing to save yet, and compilation may take minutes
    ended: bool = False        # the work is over, the watch has nothing to watch
    hangs: bool = False        # no progress for patience_s; the watch reports why
    timeout_s: float = STEADY_TIMEOUT_S     # how long to wait for the other ranks once the first step is done
    patience_s: float = START_TIMEOUT_S     # how long to wait now
    last_progress: float = field(default_factory=time.monotonic)   # when all ranks last met in a sum

    @property
    def is_main(self):
        """True on rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def alone(self):
        """True if there is no process group, so that nothing is reduced, sent or waited for."""
        return self.world_size == 1 and not dist.is_initialized()

    @property
    def dtype(self):
        """The torch.dtype of matrix products."""
        return DTYPES[self.dtype_name]

    def autocast(self):
        """Return the context for a forward pass: matrix products in `dtype`, sums and norms in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype_name != "fp32")

    def data_parallel(self, module):
        """Wrap the module in DDP, which averages gradients over ranks; alone, return it as it is."""
        if self.alone:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB,
                                       device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def grad_scaler(self):
        """Return the GradScaler, which does nothing except in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype_name == "fp16")

    def print(self, *words):
        """Print on rank 0."""
        if self.is_main:
            print(*words, flush=True)

    def print_banner(self, lines):
        """Print {title: text} as aligned lines on rank 0."""
        self.print("\n".join(f"{title:>8}  {text}" for title, text in lines.items()))

    def sum(self, *values):
        """Return the sums over ranks of some numbers, as Python floats: one small collective."""
        if self.alone:
            return [float(v) for v in values]
        return self.read(self.reduce(*values))

    def reduce(self, *values):
        """Return the sums over ranks of n numbers as a tensor (n,) on the device, without waiting for it."""
        kind = torch.float64 if self.device.type != "mps" else torch.float32
        # full() passes the number with the kernel; as_tensor() would wait until the card has done all work so far.
        tensor = torch.stack([v.to(kind) if isinstance(v, torch.Tensor) else
                              torch.full((), v, dtype=kind, device=self.device) for v in values])
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def read(self, tensor):
        """Wait for a reduced tensor and return its numbers as Python floats."""
        numbers = tensor.tolist()
        self.last_progress = time.monotonic()
        return numbers

    def minimum(self, value):
        """Return the smallest of the ranks' numbers."""
        if self.alone:
            return float(value)
        tensor = torch.tensor(float(value), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.item()

    def check_for_stop(self):
        """Raise StopRequested on every rank if any was signalled: a small collective, which every rank must enter."""
        self.stopping = self.sum(bool(self.stop_signal))[0] > 0
        self.raise_if_stopping()

    def raise_if_stopping(self):
        """Raise StopRequested if the last collective that counted stop signals found one."""
        if self.stopping:
            raise StopRequested

    def on_all_ranks(self, action):
        """Run action() on every rank and return its value; if it raises UserError on one rank, raise it on all.

        The message then names the host and the rank. For what may differ between ranks: files, memory, packages.
        """
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        if not self.alone:
            problems = [None] * self.world_size
            where = f" (on {socket.gethostname()}, rank {self.rank})"
            dist.all_gather_object(problems, problem and problem + ("" if self.is_main else where))
            problem = next((p for p in problems if p), None)
        if problem:
            raise UserError(problem)
        return result

    def require_equal(self, what, value):
        """Raise UserError on all ranks, naming the first one that differs, unless all have rank 0's value."""
        if not self.alone:
            values = [None] * self.world_size
            dist.all_gather_object(values, (value, socket.gethostname()))
            expected, host_0 = values[0]
            for rank, (other, host) in enumerate(values):
                if other != expected:
                    raise UserError(f"rank {rank} on {host} has different {what} than rank 0 on {host_0}; make them "
                                    "equal")

    def broadcast(self, action, on_device=False):
        """Run action() on rank 0 and return its value, plain data and tensors, on every rank.

        on_device: the other ranks get the tensors on their devices, since a node's memory may not hold one copy a rank.
        If action() raises UserError, every rank raises it.
        """
        value = self.on_all_ranks(action if self.is_main else lambda: None)
        if self.alone:
            return value
        tensors = []
        box = [_take_tensors(value, tensors)]
        dist.broadcast_object_list(box, src=0)
        source = iter(tensors)
        return _put_tensors(box[0], lambda place: self._broadcast_tensor(place, source, on_device))

    def _broadcast_tensor(self, place, source, on_device):
        """Send a CPU tensor of rank 0 to every rank, by way of the device, since NCCL sends nothing else."""
        if self.is_main:
            tensor = next(source)
            dist.broadcast(tensor.to(self.device).contiguous(), src=0)
            return tensor
        tensor = torch.empty(place.shape, dtype=place.dtype, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor if on_device else tensor.cpu()

    def setup_done(self):
        """Note that set-up is over on all ranks. Raises StopRequested if a rank was signalled meanwhile."""
        self.check_for_stop()
        self.starting = False

    def first_step_done(self):
        """Shorten the time-outs to their steady length, and keep the garbage collector off what lives to the end."""
        self.patience_s = self.timeout_s
        if not self.alone:
            dist.distributed_c10d._set_pg_timeout(_collective_timeout(self), dist.group.WORLD)
        gc.collect()
        gc.freeze()   # later collections skip everything that is alive now (nanochat measured that it pays)


@dataclass(frozen=True)
class _TensorPlace:
    """Placeholder for a tensor in a tree of plain data that is sent without its tensors."""
    shape: tuple
    dtype: torch.dtype


def _take_tensors(tree, tensors):
    """Return a copy of the tree with placeholders for its tensors, which are appended to the list."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return _TensorPlace(tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {k: _take_tensors(v, tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_take_tensors(v, tensors) for v in tree)
    return tree


def _put_tensors(tree, fetch):
    """Return the tree with fetch(place) in place of each placeholder, in the order of _take_tensors."""
    if isinstance(tree, _TensorPlace):
        return fetch(tree)
    if isinstance(tree, dict):
        return {k: _put_tensors(v, fetch) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_put_tensors(v, fetch) for v in tree)
    return tree


@contextlib.contextmanager
def start(config):
    """Set this process up, from torchrun's environment if there is one, and yield its Runtime.

    A config with process_group=True gets a process group, and therefore DDP, even for a single process (bench/).
    Raises UserError for a device or dtype that this machine lacks, before there is a process group, and RunFailed if
    the processes do not find each other.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device, hardware, dtype_name = _choose_hardware(config, rank, local_rank)
    runtime = Runtime(rank, local_rank, world_size, device, hardware, dtype_name,
                      timeout_s=getattr(config, "timeout", STEADY_TIMEOUT_S))
    previous = _catch_signals(runtime)
    if getattr(config, "deterministic", False):
        set_deterministic()
    torch.set_float32_matmul_precision("high")      # fp32 matrix products in TF32, on cards that have it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = None
    if world_size > 1 or getattr(config, "process_group", False):
        meeting = wait_for_peers(rank, world_size, START_TIMEOUT_S)
        enable_flight_recorder(meeting.name)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world_size,
                                store=dist.PrefixStore("group", meeting.store), timeout=_collective_timeout(runtime),
                                device_id=device if device.type == "cuda" else None)
        runtime.last_progress = time.monotonic()    # waiting for late ranks was no hang
    threading.Thread(target=watch_run, args=(runtime, meeting), daemon=True, name="watch").start()
    try:
        yield runtime
    except SystemExit:
        raise
    except UserError as error:
        if world_size > 1 and not runtime.starting and not isinstance(error, RunFailed):
            print(f"error on {socket.gethostname()}, rank {rank}: {error}", file=sys.stderr, flush=True)
            os._exit(2)      # the others know nothing of it: torchrun sees this rank end and stops them
        raise
    except BaseException as error:
        if world_size == 1:
            raise
        # A failed rank must not wait for the others on its way out: torchrun sees it end and stops them.
        if not runtime.hangs:
            what = f": {peer_failure(error)}" if peer_failure(error) else f" failed:\n{traceback.format_exc()}"
            print(f"rank {rank} on {socket.gethostname()}{what}", file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        runtime.starting, runtime.ended = False, True
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not runtime.alone:
        gc.unfreeze()
        gc.collect()      # a DDP object that outlives the process group would abort the interpreter's exit
        try:
            dist.barrier()
        except RuntimeError as error:     # rank 0 failed in what it does alone at the end
            print(f"rank {rank} on {socket.gethostname()}: {peer_failure(error) or error}", file=sys.stderr, flush=True)
            os._exit(1)
        dist.destroy_process_group()


def _choose_hardware(config, rank, local_rank):
    """Return this process' (device, Hardware, dtype name). Raises UserError for what this machine lacks."""
    try:
        device = choose_device(config.device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        hardware = probe_hardware(device)
        return device, hardware, choose_dtype(config.dtype, hardware)
    except UserError as error:
        if rank and not local_rank:    # one rank of each further node reports; rank 0 reports for its own
            print(f"error on {socket.gethostname()}, rank {rank}: {error}", file=sys.stderr, flush=True)
        raise


def lock_folder(folder, runtime):
    """Return a context in which no other run uses the folder. Raises UserError on all ranks. Rank 0 holds the lock."""
    return runtime.on_all_ranks(lambda: FolderLock(folder, wait_s=60) if runtime.is_main else contextlib.nullcontext())


@contextlib.contextmanager
def temporary_folder(runtime, place):
    """Yield a new, empty folder, the same on all ranks, and delete it at the end.

    It lies in `place`/.dry_run, or above if `place` does not exist; what a killed process left there is deleted first.
    Raises UserError if `place` cannot be written, or if another run uses its .dry_run.
    """
    def choose():
        here = next(path for path in (Path(place).resolve(), *Path(place).resolve().parents) if path.exists())
        if not here.is_dir():
            raise UserError(f"{here} is a file, not a folder")
        return here / ".dry_run"

    def renew():
        shutil.rmtree(hidden / "run", ignore_errors=True)
        try:
            (hidden / "run").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make {hidden / 'run'}: {error.strerror}") from error
        return str(hidden / "run")
    hidden = runtime.broadcast(choose)
    with lock_folder(hidden, runtime):
        try:
            yield runtime.broadcast(renew)
        finally:
            if runtime.is_main:
                shutil.rmtree(hidden, ignore_errors=True)


def _catch_signals(runtime):
    """Note stop signals in runtime.stop_signal; a SIGINT after any of them ends the process at once.

    Returns the previous handlers, {signal: handler}.
    """
    def handler(number, frame):
        if number == signal.SIGINT and runtime.stop_signal:
            os._exit(130)
        runtime.stop_signal = signal.Signals(number).name
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers}


def _collective_timeout(runtime):
    """Return torch's time-out: a little longer than the watch's, which can then report before torch aborts."""
    return datetime.timedelta(seconds=runtime.patience_s + HANG_GRACE_S)


def seed_everything(*key):
    """Seed torch's generators with a hash of the key, for example (seed, "step", step, rank)."""
    torch.manual_seed(seed_from(*key))


def seed_from(*key):
    """Return a 63-bit seed that is a pure function of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
