"""A thread in each process that ends a run if it is stopped during set-up, and finds out which rank hangs.

`watch_run` talks to the other processes through the rendezvous store, since neither task can rely on a collective.
"""
import contextlib
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from exactgpt.rendezvous import connect_to_store, wait_for_key

START_GRACE_S = 3     # after a stop signal during set-up: the run may still end by itself
REPORT_S = 5          # for the ranks of a hanging run to report where they are
HANG_GRACE_S = 10     # from the start of these reports to the time-out of the collectives, which ends the run
NO_ANSWER = "does not answer: its process has died or is stopped, or the network to it is down"
SOURCE_FOLDERS = (Path(__file__).parents[1], Path(__file__).parent)    # of the scripts and of the package
# NCCL keeps its last collectives and writes them to a file when one times out; torchfrtrace reads the files of all
# ranks. The TORCH_FR_ names are torch 2.13's; before: TORCH_NCCL_TRACE_BUFFER_SIZE, TORCH_NCCL_DEBUG_INFO_TEMP_FILE.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
FLIGHT_FILE, OLD_FLIGHT_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def enable_flight_recorder(start_name):
    """Enable NCCL's flight recorder, keeping what the user has set; call it before the process group exists.

    Its files go to the temporary folder of each node, because some nodes may not see log_dir.
    """
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    if OLD_FLIGHT_FILE not in os.environ:
        os.environ.setdefault(FLIGHT_FILE, f"{tempfile.gettempdir()}/nccl_{start_name[:8]}_rank_")


def watch_run(runtime, rendezvous):
    """Watch one process, in a thread, until runtime.ended; rendezvous is None for a single process.

    During set-up: exit every rank with status 0 a few seconds after any of them was signalled. A main thread may be
    compiling for minutes and cannot enter a collective meanwhile, so the request to stop travels through the store.
    After runtime.patience_s without progress: find the rank that hangs and print it. HANG_GRACE_S later the collectives
    time out, which ends the run.
    """
    store, stop_time = None, None
    if rendezvous:    # a second connection, because the main thread may be blocked on the first
        store = dist.PrefixStore(rendezvous.name, connect_to_store(False, runtime.patience_s))
    while not runtime.ended:
        time.sleep(0.3)
        if runtime.starting and stop_time is None and _stop_requested(runtime, store):
            stop_time = time.monotonic()
        if runtime.starting and stop_time is not None and time.monotonic() - stop_time > START_GRACE_S:
            runtime.print("stopped during set-up; there was nothing to save")
            os._exit(0)
        if store is not None and time.monotonic() - runtime.last_progress > runtime.patience_s and not runtime.ended:
            runtime.hangs = True
            _report_hang(runtime, find_hanging_rank(runtime, store, rendezvous.hosts))
            return


def _stop_requested(runtime, store):
    """Return True if any process was signalled to stop; tell the others if it was this one."""
    with contextlib.suppress(dist.DistError):      # the store is gone: the main thread will report that
        if runtime.stop_signal and store is not None:
            store.set("stop", runtime.stop_signal)
        return bool(runtime.stop_signal) or (store is not None and store.check(["stop"]))
    return bool(runtime.stop_signal)


def _report_hang(runtime, finding):
    """Print which rank hangs, once per node."""
    if runtime.local_rank == 0:
        recorded = ""
        if runtime.device.type == "cuda":
            files = os.environ.get(FLIGHT_FILE) or os.environ.get(OLD_FLIGHT_FILE)
            recorded = f". NCCL's last collectives: {files}RANK on each node; read them with torchfrtrace"
        print(f"error on {socket.gethostname()}, rank {runtime.rank}: no progress for {runtime.patience_s:g} s: "
              f"{finding}{recorded}", file=sys.stderr, flush=True)


def find_hanging_rank(runtime, store, hosts):
    """Return which rank hangs, as a sentence: each rank reports its location to rank 0, which compares them.

    All ranks call this at about the same time, because the last progress was a collective.
    """
    location = main_thread_location()
    if runtime.rank == 0:
        deadline, locations = time.monotonic() + REPORT_S, {0: location}
        for rank in range(1, runtime.world_size):
            if wait_for_key(store, f"location {rank}", deadline - time.monotonic()):
                locations[rank] = store.get(f"location {rank}").decode()
        finding = describe_hang(locations, hosts)
        store.set("finding", finding)
        return finding
    findings = queue.Queue()

    def report():     # in a thread: if the network is down, torch's store ignores its time-outs
        with contextlib.suppress(dist.DistError):
            store.set(f"location {runtime.rank}", location)
            if wait_for_key(store, "finding", REPORT_S + 2):
                findings.put(store.get("finding").decode())
    threading.Thread(target=report, daemon=True).start()
    try:
        return findings.get(timeout=REPORT_S + 2)
    except queue.Empty:
        return f"rank 0 on {hosts[0]} {NO_ANSWER}; rank {runtime.rank} on {socket.gethostname()} is at {location}"


def describe_hang(locations, hosts):
    """Return a sentence that lists silent ranks first, then locations, the rarest first.

    locations: {rank: location} of the ranks that answered; hosts: {rank: host} of all ranks.
    """
    silent = [rank for rank in hosts if rank not in locations]
    parts = [f"rank {rank} on {hosts[rank]} {NO_ANSWER}" for rank in silent[:8]]
    parts += [f"{len(silent) - 8} more ranks do not answer"] * (len(silent) > 8)
    counts = Counter(locations.values())
    if not silent and len(counts) == 1:
        return f"all ranks answer and are at {locations[0]}: the network between them is not passing data"
    for location, n in reversed(counts.most_common()):     # a rank that is not where the others wait is the suspect
        rank = next(r for r in locations if locations[r] == location)
        parts.append(f"{f'rank {rank} on {hosts[rank]} is' if n == 1 else f'{n} ranks are'} at {location}")
    return "; ".join(parts)


def main_thread_location():
    """Return the main thread's innermost line in this repository, but not in the modules where every rank waits."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent in SOURCE_FOLDERS and path.name not in ("distributed.py", "hang_watch.py", "rendezvous.py"):
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of this repository"


def peer_failure(error):
    """Return the message for a collective that failed because a peer died, else None."""
    text = str(error)
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"lost the connection to another process ({text.splitlines()[0][:200]}); see the log of the process " \
               "that ended first"
    return None
