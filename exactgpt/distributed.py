"""Processes: device and process group, stops that all ranks agree on, sums over ranks, seeds.

`start(config)` sets a process up, yields its Runtime, and tears it down.

On SIGTERM, SIGINT, SIGUSR1 or SIGHUP the handler notes the signal in runtime.stop_signal, and nothing else. The next
collective that counts signals tells all ranks: the all-reduce at the end of a step (finish_step in optimizer.py), or
check_for_stop, which evaluation and slow steps call. Every rank then raises StopRequested at the same place. train.py
catches it around its loop, saves, and prints the command that continues: status 0. During set-up, where a rank may
compile for minutes, the watch (peers.py) ends all ranks instead. A SIGINT after any stop signal ends a process at once.
"""
import contextlib
import datetime
import gc
import hashlib
import os
import secrets
import shutil
import signal
import socket
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from exactgpt import launch
from exactgpt.config import RunConfig, RunFailed, UserError, file_error, read_ranks
from exactgpt.device import DTYPES, Hardware, choose_device, choose_dtype, probe_hardware, set_deterministic
from exactgpt.files import FolderLock, FolderLost
from exactgpt.peers import HANG_GRACE_S, Store, peer_failure, report_error, time_limit, wait_for_peers, watch_run

START_TIMEOUT_S = 1800   # until the first step is done: compilation and slow file systems take their time
GROUP_S = 300            # for torch to connect processes that have met already
DRY_RUN = ".dry_run_"    # what the names of dry runs' folders begin with
BUCKET_MB = 100          # of gradients per all-reduce: large messages use a fast network better


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
    ended: threading.Event = field(default_factory=threading.Event)    # the work is over: the watch ends, too
    hidden: Path | None = None     # on rank 0 of a dry run: its folder, to be deleted
    hangs: bool = False        # no progress for patience_s; the watch reports why
    timeout_s: float = RunConfig.timeout    # once the first step is done: more than rank 0 does alone, a save
    patience_s: float = START_TIMEOUT_S     # how long to wait for the other ranks now
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

    def sum(self, *values):
        """Return the sums over ranks of some numbers, as Python floats: one small collective."""
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

    def sum_array(self, array):
        """Return the sum over ranks of a NumPy array of float64, the same on every rank: a collective."""
        if self.alone:
            return array
        tensor = torch.from_numpy(array).to(self.device)
        dist.all_reduce(tensor)
        self.last_progress = time.monotonic()
        return tensor.cpu().numpy()

    def note_stop(self, number, frame):
        """Note a stop signal (this is its handler); a SIGINT after any of them ends the process at once."""
        if number == signal.SIGINT and self.stop_signal:
            os._exit(130)
        self.stop_signal = signal.Signals(number).name

    def check_for_stop(self):
        """Raise StopRequested on every rank if any was signalled: a small collective, which every rank must enter."""
        self.stopping = self.sum(bool(self.stop_signal))[0] > 0
        self.raise_if_stopping()

    def raise_if_stopping(self):
        """Raise StopRequested if the last collective that counted stop signals found one."""
        if self.stopping:
            raise StopRequested

    def on_all_ranks(self, action):
        """Run action() on every rank and return its value; if it raises UserError on one rank, raise it on all."""
        # For what may differ between ranks: files, memory, packages. The message names the host and the rank.
        result, problem = None, ""
        try:
            result = action()
        except UserError as error:
            problem = str(error) + ("" if self.is_main else f" (on {socket.gethostname()}, rank {self.rank})")
        problems = self.gather(problem)
        if any(problems):
            raise UserError(next(filter(None, problems)))
        return result

    def gather(self, value):
        """Return the list of all ranks' values, plain data, on every rank: a collective."""
        values = [value] * self.world_size
        if not self.alone:
            dist.all_gather_object(values, value)
        return values

    def require_equal(self, what, value):
        """Raise UserError on all ranks, naming the first one that differs, unless all have rank 0's value."""
        expected = self.broadcast(lambda: value)

        def compare():
            if value != expected:
                raise UserError(f"other {what} than on rank 0; make them equal")
        self.on_all_ranks(compare)

    def broadcast(self, action, on_device=False):
        """Run action() on rank 0 and return its value, plain data and tensors, on every rank.

        on_device: the other ranks get the tensors on their devices, since a node's memory may not hold one copy a rank.
        If action() raises UserError, every rank raises it.
        """
        value = self.on_all_ranks(action if self.is_main else lambda: None)
        if self.alone:
            return value
        box = [tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), value)]      # shapes and dtypes, no data
        dist.broadcast_object_list(box, src=0)

        def send(tensor):     # by way of the device, since NCCL sends nothing else
            if self.is_main:
                dist.broadcast(tensor.to(self.device).contiguous(), src=0)
                return tensor
            received = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            dist.broadcast(received, src=0)
            return received if on_device else received.cpu()
        return tree_map_only(torch.Tensor, send, value if self.is_main else box[0])

    def delete_hidden(self):
        """Delete the folder of a dry run, if there is one and it is still this run's."""
        if self.hidden:
            with contextlib.suppress(FolderLost):
                FolderLock.check(self.hidden)
                shutil.rmtree(self.hidden, ignore_errors=True)

    def setup_done(self):
        """Note that set-up is over on all ranks. Raises StopRequested if a rank was signalled meanwhile."""
        self.check_for_stop()
        self.starting = False

    def first_step_done(self):
        """Shorten the time-outs to their steady length, and keep the garbage collector off what lives to the end."""
        self.patience_s = self.timeout_s
        if not self.alone:
            timeout = datetime.timedelta(seconds=self.timeout_s + HANG_GRACE_S)
            dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)
        gc.collect()
        gc.freeze()   # later collections skip everything that is alive now (nanochat measured that it pays)


@contextlib.contextmanager
def start(config):
    """Set this process up, from torchrun's environment if there is one, and yield its Runtime.

    Raises UserError for a device or dtype that this machine lacks, before there is a process group, and RunFailed if
    the processes do not find each other.
    """
    ranks = read_ranks()
    rank, world_size, local_rank = ranks.rank, ranks.world_size, ranks.local_rank
    # bench/ wants DDP even for a single process
    grouped = world_size > 1 or getattr(config, "process_group", False)
    if getattr(config, "deterministic", False):
        set_deterministic()
    torch.set_float32_matmul_precision("high")      # fp32 matrix products in TF32, on cards that have it
    try:
        device = choose_device(config.device, local_rank, ranks.local_world_size)
        hardware = probe_hardware(device)
        runtime = Runtime(rank, local_rank, world_size, device, hardware, choose_dtype(config.dtype, hardware),
                          timeout_s=getattr(config, "timeout", RunConfig.timeout))
        previous = {number: signal.signal(number, runtime.note_stop) for number in stop_signals()}
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, hosts = Store(dist.HashStore(), rank), {}
        if world_size > 1:
            store, hosts = wait_for_peers(runtime, ranks.master, START_TIMEOUT_S)
        if grouped:
            make_process_group(runtime, store)
            store = store.on_another_connection()       # for the watch: the main thread may block on this one
    except UserError as error:
        if rank and not local_rank:    # one rank of each further node reports; rank 0 reports for its own
            report_error(rank, error)
        raise
    watch = threading.Thread(target=watch_run, args=(runtime, store, hosts), daemon=True, name="watch")
    watch.start()
    try:
        yield runtime
        if grouped:
            gc.unfreeze()
            gc.collect()      # a DDP object that outlives the process group would abort the interpreter's exit
            dist.barrier()    # fails if rank 0 failed in what it does alone at the end
    except BaseException as error:
        known_to_all = isinstance(error, (SystemExit, RunFailed)) or (isinstance(error, UserError) and runtime.starting)
        if known_to_all or world_size == 1 or launch.is_lost_output(error):     # run_script reports these
            raise
        # A failed rank must not wait for the others on its way out: torchrun sees it end and stops them.
        if not runtime.hangs:
            report_error(rank, error if isinstance(error, UserError) else
                         file_error(error) or peer_failure(error) or f"it failed:\n{traceback.format_exc()}")
        os._exit(2 if isinstance(error, UserError) else 1)
    finally:
        runtime.starting = False
        runtime.ended.set()
        watch.join()      # a thread that is inside torch while Python ends would abort the process
        for number, handler in previous.items():
            signal.signal(number, handler)
    if grouped:
        dist.destroy_process_group()


def stop_signals():
    """Return the signals that ask this process to stop."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]      # Slurm can send the last ahead of the time limit
    # A hang-up that nohup ignores stays ignored. torchrun handles it even under nohup: it passes it on to its workers,
    # and kills those that do not end within 30 s.
    return numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]


def make_process_group(runtime, store):
    """Create torch's process group of the ranks that have met in the store. Raises RunFailed if that fails."""
    on_card = runtime.device.type == "cuda"
    try:
        with time_limit(runtime.rank, GROUP_S, "another process of this run"):
            # torch's time-out is a little longer than the watch's, which can then report before torch aborts.
            dist.init_process_group("nccl" if on_card else "gloo", rank=runtime.rank, world_size=runtime.world_size,
                                    store=dist.PrefixStore("group", store.of_torch),
                                    timeout=datetime.timedelta(seconds=START_TIMEOUT_S + HANG_GRACE_S),
                                    device_id=runtime.device if on_card else None)
    except RuntimeError as error:      # NCCL's own words come last
        lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RunFailed(f"the processes cannot be connected ({'; '.join(dict.fromkeys([lines[0], lines[-1]]))})"
                        ) from error
    runtime.last_progress = time.monotonic()    # waiting for late ranks was no hang


def lock_folder(folder, runtime):
    """Return a context in which no other run uses the folder. Raises UserError on all ranks. Rank 0 holds the lock."""
    return runtime.on_all_ranks(lambda: FolderLock(folder, wait_s=60) if runtime.is_main else contextlib.nullcontext())


@contextlib.contextmanager
def temporary_folder(runtime, place):
    """Yield a new folder, the same on all ranks, empty but for its lock; delete it at the end. Raises UserError."""
    # It lies in `place`, or above if `place` does not exist, and its name is its lock's mark: one that a killed process
    # of ours left there is known by that, and goes first.
    def renew():
        above = next(path for path in (place, *place.parents) if path.exists())
        for left in above.glob(f"{DRY_RUN}*"):
            if (left / ".lock").is_file() and not left.is_symlink():
                with contextlib.suppress(UserError), FolderLock(left, wait_s=0) as lock:
                    if left.name == DRY_RUN + lock.mark:
                        shutil.rmtree(left, ignore_errors=True)
        folder = above / (DRY_RUN + secrets.token_hex(8))
        try:
            folder.mkdir()
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}") from error
        return str(folder)
    place = Path(place).resolve()
    folder = runtime.broadcast(renew)
    with lock_folder(folder, runtime) as lock:
        if runtime.is_main:
            runtime.hidden = Path(folder)
        try:
            runtime.broadcast(lambda: lock.claim(mark=Path(folder).name.removeprefix(DRY_RUN)))
            yield folder
        finally:
            runtime.delete_hidden()


def seed_everything(*key):
    """Seed torch's generators with a hash of the key, for example (seed, "step", step, rank)."""
    torch.manual_seed(seed_from(*key))


def seed_from(*key):
    """Return a 63-bit seed that is a pure function of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
