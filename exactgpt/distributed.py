"""The process around the loop: device and process group, a stop that all ranks agree on, sums over ranks, seeds.

`start(config)` is the one call: it sets a process up, yields its Runtime and tears it down.
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
from exactgpt.launch import die_with_launcher
from exactgpt.rendezvous import wait_for_peers

START_TIMEOUT_S = 1800   # until the first step: compilation and slow file systems
STEADY_TIMEOUT_S = 600   # after it, but for --timeout: longer than the longest thing that rank 0 does alone (a save)
BUCKET_MB = 100          # of gradients that are reduced at once: large messages use a fast network better
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopRequested(Exception):
    """Raised on all ranks at the same collective after any of them was signalled."""


@dataclass
class Runtime:
    """What one process knows about itself and its peers."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hardware: Hardware
    dtype_name: str            # "bf16", "fp16" or "fp32"
    stop_signal: str = ""      # the signal that this process received, if any
    stopping: bool = False     # some process received one, and all know it: `raise_if_stopping` ends the run
    starting: bool = True      # until the loop begins: nothing to save yet, and compilation may take minutes
    ended: bool = False        # the work is over: nothing is left to watch
    hangs: bool = False        # no progress for patience_s; the watch says why
    timeout_s: float = STEADY_TIMEOUT_S     # how long to wait for the other ranks once the run is steady
    patience_s: float = START_TIMEOUT_S     # how long now
    last_progress: float = field(default_factory=time.monotonic)   # when all ranks last met in `sum`

    @property
    def is_main(self):
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def alone(self):
        """Whether there is no process group: nothing is reduced, sent or waited for."""
        return self.world_size == 1 and not dist.is_initialized()

    @property
    def dtype(self):
        """The torch.dtype of matrix products."""
        return DTYPES[self.dtype_name]

    def autocast(self):
        """The context of a forward pass: matrix products in `dtype`, sums and norms in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype_name != "fp32")

    def data_parallel(self, module):
        """The module, wrapped where there are several processes so that its gradients are the mean over them."""
        if self.alone:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB,
                                       device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def grad_scaler(self):
        """The scaler of losses, which does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype_name == "fp16")

    def print(self, *words):
        """Print on rank 0."""
        if self.is_main:
            print(*words, flush=True)

    def print_banner(self, lines):
        """Print {title: text} as aligned lines on rank 0."""
        self.print("\n".join(f"{title:>8}  {text}" for title, text in lines.items()))

    def sum(self, *values):
        """The sums over ranks of some numbers, as Python floats: one small collective."""
        if self.alone:
            return [float(v) for v in values]
        return self.read(self.reduce(*values))

    def reduce(self, *values):
        """The sums over ranks of n numbers, as a tensor (n,) on the device: nothing waits for it but `read`."""
        kind = torch.float64 if self.device.type != "mps" else torch.float32
        # full() gives a kernel its number; as_tensor() would copy it to the card, once all before it there is done.
        tensor = torch.stack([v.to(kind) if isinstance(v, torch.Tensor) else
                              torch.full((), v, dtype=kind, device=self.device) for v in values])
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def read(self, tensor):
        """The numbers of a reduced tensor, as Python floats, once all ranks have met."""
        numbers = tensor.tolist()
        self.last_progress = time.monotonic()
        return numbers

    def minimum(self, value):
        """The smallest of the ranks' numbers."""
        if self.alone:
            return float(value)
        tensor = torch.tensor(float(value), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.item()

    def check_for_stop(self):
        """Raise StopRequested on every rank if any rank was signalled: one small collective that every rank enters."""
        self.stopping = self.sum(bool(self.stop_signal))[0] > 0
        self.raise_if_stopping()

    def raise_if_stopping(self):
        """Raise StopRequested if the ranks have agreed to stop, in the last step's all-reduce or in a check."""
        if self.stopping:
            raise StopRequested

    def on_all_ranks(self, action):
        """action() on every rank; if it raised UserError on any, UserError on all, with host and rank of the first.

        For facts that may differ between ranks: files of a node, memory of a card.
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
        """Raise UserError on all ranks, naming the first that differs, unless all have rank 0's value."""
        if not self.alone:
            values = [None] * self.world_size
            dist.all_gather_object(values, (value, socket.gethostname()))
            expected, host_0 = values[0]
            for rank, (other, host) in enumerate(values):
                if other != expected:
                    raise UserError(f"rank {rank} on {host} has other {what} than rank 0 on {host_0}; make them equal")

    def broadcast(self, action, on_device=False):
        """What action() gives on rank 0, on every rank: plain data and tensors, so that only rank 0 needs the file.

        on_device: the other ranks get the tensors on their devices and not in host memory, of which a node has one.
        Raises on every rank the UserError that action() raised.
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
        """A CPU tensor of rank 0 on every rank, through the device that the process group speaks for."""
        if self.is_main:
            tensor = next(source)
            dist.broadcast(tensor.to(self.device).contiguous(), src=0)
            return tensor
        tensor = torch.empty(place.shape, dtype=place.dtype, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor if on_device else tensor.cpu()

    def setup_done(self):
        """The set-up is over on all ranks: from here on a stop saves. Raises StopRequested if one was asked for."""
        self.check_for_stop()
        self.starting = False

    def first_step_done(self):
        """Shorten the time-outs to their steady length and take the garbage collector out of the loop's way."""
        self.patience_s = self.timeout_s
        if not self.alone:
            dist.distributed_c10d._set_pg_timeout(_collective_timeout(self), dist.group.WORLD)
        gc.collect()
        gc.freeze()   # what lives now lives to the end: later collections need not look at it (nanochat's finding)


@dataclass(frozen=True)
class _TensorPlace:
    """Stands for a tensor in a tree that is sent without its tensors."""
    shape: tuple
    dtype: torch.dtype


def _take_tensors(tree, tensors):
    """A copy of a tree of plain data with its tensors taken out into a list."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return _TensorPlace(tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {k: _take_tensors(v, tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_take_tensors(v, tensors) for v in tree)
    return tree


def _put_tensors(tree, fetch):
    """The tree with fetch(place) for each tensor that was taken out, in the same order."""
    if isinstance(tree, _TensorPlace):
        return fetch(tree)
    if isinstance(tree, dict):
        return {k: _put_tensors(v, fetch) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_put_tensors(v, fetch) for v in tree)
    return tree


@contextlib.contextmanager
def start(config):
    """Set the process up from its environment (torchrun's or none) and yield its Runtime.

    A config that has process_group=True gets a process group, and so DDP, for a single process too (bench/).
    Raises UserError for devices and dtypes that this machine lacks, before a process group exists, and RunFailed where
    the processes do not meet.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device, hardware, dtype_name = _choose_hardware(config, rank, local_rank)
    runtime = Runtime(rank, local_rank, world_size, device, hardware, dtype_name,
                      timeout_s=getattr(config, "timeout", STEADY_TIMEOUT_S))
    die_with_launcher()
    previous = _catch_signals(runtime)
    if getattr(config, "deterministic", False):
        set_deterministic()
    torch.set_float32_matmul_precision("high")  # TF32, where a card has it, for matrix products in fp32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = None
    if world_size > 1 or getattr(config, "process_group", False):
        meeting = wait_for_peers(rank, world_size, START_TIMEOUT_S)
        enable_flight_recorder(meeting.name)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world_size,
                                store=dist.PrefixStore("group", meeting.store), timeout=_collective_timeout(runtime),
                                device_id=device if device.type == "cuda" else None)
        runtime.last_progress = time.monotonic()    # the others may have come late
    threading.Thread(target=watch_run, args=(runtime, meeting), daemon=True, name="watch").start()
    try:
        yield runtime
    except SystemExit:
        raise
    except UserError as error:
        if world_size > 1 and not runtime.starting and not isinstance(error, RunFailed):
            print(f"error on {socket.gethostname()}, rank {rank}: {error}", file=sys.stderr, flush=True)
            os._exit(2)  # only this rank knows: torchrun sees it end and stops the rest
        raise
    except BaseException as error:
        if world_size == 1:
            raise
        # A dead rank must not wait for its peers on the way out: torchrun sees it end and stops the rest.
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
        gc.collect()  # a DDP object that outlives the process group aborts the interpreter's exit
        try:
            dist.barrier()
        except RuntimeError as error:     # rank 0 failed at what it does alone at the end
            print(f"rank {rank} on {socket.gethostname()}: {peer_failure(error) or error}", file=sys.stderr, flush=True)
            os._exit(1)
        dist.destroy_process_group()


def _choose_hardware(config, rank, local_rank):
    """(device, Hardware, dtype name) of this process. Raises UserError for what this machine lacks."""
    try:
        device = choose_device(config.device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        hardware = probe_hardware(device)
        return device, hardware, choose_dtype(config.dtype, hardware)
    except UserError as error:
        if rank and not local_rank:    # rank 0 speaks for its own node alone
            print(f"error on {socket.gethostname()}, rank {rank}: {error}", file=sys.stderr, flush=True)
        raise


def lock_folder(folder, runtime):
    """A context in which no other run uses the folder; rank 0 holds the lock. Raises UserError on all ranks."""
    return runtime.on_all_ranks(lambda: FolderLock(folder, wait_s=60) if runtime.is_main else contextlib.nullcontext())


@contextlib.contextmanager
def temporary_folder(runtime, place):
    """A new folder, the same on all ranks, that is gone at the end: in the hidden .dry_run of `place`, or of what is
    above it so far. What a killed process left there goes first.

    Raises UserError where `place` cannot be written to, or another run has such a folder there.
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
    """Turn the stop signals into a flag that the ranks agree on; a SIGINT after any of them ends at once.

    Returns the handlers that were there before, {signal: handler}.
    """
    def handler(number, frame):
        if number == signal.SIGINT and runtime.stop_signal:
            os._exit(130)
        runtime.stop_signal = signal.Signals(number).name
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers}


def _collective_timeout(runtime):
    """A little longer than the watch waits, which then has said why before the time-out ends the run."""
    return datetime.timedelta(seconds=runtime.patience_s + HANG_GRACE_S)


def seed_everything(*key):
    """Seed torch's generators with a hash of the key: what is random in a step depends on (seed, step, rank) alone."""
    torch.manual_seed(seed_from(*key))


def seed_from(*key):
    """A 63-bit seed, a pure function of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
