"""The watch of a run on several processes: how it stops while it starts, what it says when one of them hangs.

The thread `keep_watch` uses the start's store for what cannot wait for a collective: a stop during set-up, and the roll
call of a run that makes no progress.
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

from exactgpt.rendezvous import connect, wait_for

START_GRACE_S = 3     # after a signal during set-up, in which it may still end by itself
ROLL_CALL_S = 5       # in which the ranks of a hanging run say where they are
SILENT = "gives no answer: its process is gone or stopped, or the network to it is cut"
HANG_GRACE_S = 10     # between the roll call's beginning and the time-out of the collectives, which ends the run
OURS = (Path(__file__).parents[1], Path(__file__).parent)    # the folders of scripts and package
# NCCL keeps its last collectives and writes them to a file when one times out; torchfrtrace reads the files of all
# ranks. The first two names are those of torch 2.13, TORCH_NCCL_TRACE_BUFFER_SIZE and _DEBUG_INFO_TEMP_FILE older.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
FLIGHT_FILE, OLD_FLIGHT_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def record_collectives(start_name):
    """Switch NCCL's flight recorder on, but for what the user has set. To be called before the process group exists.

    Its files lie in the temporary folder of each node, for not every node need see log_dir.
    """
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    if OLD_FLIGHT_FILE not in os.environ:
        os.environ.setdefault(FLIGHT_FILE, f"{tempfile.gettempdir()}/nccl_{start_name[:8]}_rank_")


def keep_watch(runtime, meeting):
    """The watch of one process, a thread until runtime.ended; meeting: None for a process by itself.

    While the run starts: some seconds after any rank was asked to stop, end all with status 0. Their main threads may
    be inside a compilation for minutes, where no rank can be asked to agree, so the word goes round in the store.
    When there was no progress for runtime.patience_s: find out which rank hangs, and print it. The time-out of the
    collectives, HANG_GRACE_S later, ends the run.
    """
    store, asked = None, None
    if meeting:    # a connection of its own: the main thread may be waiting on the other
        store = dist.PrefixStore(meeting.name, connect(False, runtime.patience_s))
    while not runtime.ended:
        time.sleep(0.3)
        if runtime.starting and asked is None and _stop_asked(runtime, store):
            asked = time.monotonic()
        if runtime.starting and asked is not None and time.monotonic() - asked > START_GRACE_S:
            runtime.print("stopped before the first step; there was nothing to save")
            os._exit(0)
        if store is not None and time.monotonic() - runtime.last_progress > runtime.patience_s and not runtime.ended:
            runtime.hangs = True
            _tell(runtime, roll_call(runtime, store, meeting.hosts))
            return


def _stop_asked(runtime, store):
    """Whether this process or any other was asked to stop; if it was this one, the others are told."""
    with contextlib.suppress(dist.DistError):      # a store that is gone: the main thread will say so
        if runtime.stop_signal and store is not None:
            store.set("stop", runtime.stop_signal)
        return bool(runtime.stop_signal) or (store is not None and store.check(["stop"]))
    return bool(runtime.stop_signal)


def _tell(runtime, what):
    """Print what was found, once on each node."""
    if runtime.local_rank == 0:
        recorded = ""
        if runtime.device.type == "cuda":
            files = os.environ.get(FLIGHT_FILE) or os.environ.get(OLD_FLIGHT_FILE)
            recorded = f". NCCL's last collectives: {files}RANK on each node, read them with torchfrtrace"
        print(f"error on {socket.gethostname()}, rank {runtime.rank}: no progress for {runtime.patience_s:g} s: "
              f"{what}{recorded}", file=sys.stderr, flush=True)


def roll_call(runtime, store, hosts):
    """Which rank hangs, as a sentence: each rank writes where it stands, rank 0 compares.

    All begin within moments, for the last progress was a collective.
    """
    place = standing()
    if runtime.rank == 0:
        deadline, places = time.monotonic() + ROLL_CALL_S, {0: place}
        for rank in range(1, runtime.world_size):
            if wait_for(store, f"stands {rank}", deadline - time.monotonic()):
                places[rank] = store.get(f"stands {rank}").decode()
        verdict = compare(places, hosts)
        store.set("roll call", verdict)
        return verdict
    answers = queue.Queue()

    def ask():     # in a thread of its own: where the network is cut, torch's store ignores its time-outs
        with contextlib.suppress(dist.DistError):
            store.set(f"stands {runtime.rank}", place)
            if wait_for(store, "roll call", ROLL_CALL_S + 2):
                answers.put(store.get("roll call").decode())
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=ROLL_CALL_S + 2)
    except queue.Empty:
        return f"rank 0 on {hosts[0]} {SILENT}; rank {runtime.rank} on {socket.gethostname()} is at {place}"


def compare(places, hosts):
    """Which rank hangs: places {rank: where it stands} of those that answered, hosts {rank: host} of all."""
    silent = [rank for rank in hosts if rank not in places]
    parts = [f"rank {rank} on {hosts[rank]} {SILENT}" for rank in silent[:8]]
    parts += [f"{len(silent) - 8} more ranks give none"] * (len(silent) > 8)
    together = Counter(places.values())
    if not silent and len(together) == 1:
        return f"all ranks answer and are at {places[0]}: the network between them does not carry their sums"
    for place, n in reversed(together.most_common()):     # the fewest first: they are the ones to look at
        rank = next(r for r in places if places[r] == place)
        parts.append(f"{f'rank {rank} on {hosts[rank]} is' if n == 1 else f'{n} ranks are'} at {place}")
    return "; ".join(parts)


def standing():
    """Where the main thread is: its innermost line in this repository but for what all waiting goes through."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent in OURS and path.name not in ("distributed.py", "hang_watch.py", "rendezvous.py"):
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of ours"


def lost_peer(error):
    """What to say of an error of a collective whose cause lies with another process, or None for other errors."""
    text = str(error)
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"lost the connection to another process ({text.splitlines()[0][:200]}); the log of the first to end " \
               "says why"
    return None
