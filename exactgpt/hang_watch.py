"""The processes of a run: how they meet, how they stop while they start, what they say when one of them hangs.

torchrun keeps one store (a TCPStore) for all its restarts. `meet` gives each start a corner of it for itself; the
thread `keep_watch` uses it for what cannot wait for a collective: a stop during set-up, and the roll call of a run that
makes no progress.
"""
import contextlib
import datetime
import os
import queue
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from exactgpt.config import RunFailed, UserError

START_GRACE_S = 3     # after a signal during set-up, in which it may still end by itself
ROLL_CALL_S = 5       # in which the ranks of a hanging run say where they are
SILENT = "gives no answer: its process is gone or stopped, or the network to it is cut"
HANG_GRACE_S = 10     # between the roll call's beginning and the time-out of the collectives, which ends the run
OURS = (Path(__file__).parents[1], Path(__file__).parent)
# NCCL keeps its last collectives and writes them to a file when one times out; torchfrtrace reads the files of all
# ranks. The first two names are those of torch 2.13, TORCH_NCCL_TRACE_BUFFER_SIZE and _DEBUG_INFO_TEMP_FILE older.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
FLIGHT_FILE, OLD_FLIGHT_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


@dataclass(frozen=True)
class Meeting:
    """A start of a run on several processes."""
    store: dist.Store    # what is written here is of this start alone
    name: str            # of the start: no other one has it
    hosts: dict          # {rank: host}: of all ranks on rank 0, of rank 0 on the others


def meet(rank, world_size, patience_s):
    """The Meeting of the processes that torchrun (or another launcher) started together.

    A store that outlives its processes holds what dead ones wrote: a new process that took the address of a dead peer
    from it would hang, and TORCHELASTIC_RESTART_COUNT, which could tell the starts apart, may differ from node to node.
    So rank 0 makes up a name for the start, and each other rank takes part in it only once rank 0 has answered a word
    that this rank made up: a dead rank 0 cannot.
    Raises RunFailed where some do not come within patience_s, UserError where the launcher named no place to meet.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {world_size}, but {missing[0]} is not set; start the processes with torchrun, "
                        "or unset WORLD_SIZE for a single one")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + patience_s
    try:
        store = _connect(rank == 0 and not agent_store, patience_s)
        return _invite(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    except dist.DistError as error:
        problem = RunFailed(f"nobody answers at {_address()}; look at the log of rank 0's node "
                            f"({type(error).__name__})")
    except RunFailed as error:
        problem = error
    if rank != 0:     # rank 0 speaks for all when a run ends, but it may not be there
        print(f"error on {socket.gethostname()}, rank {rank}: {problem}", file=sys.stderr, flush=True)
    raise problem


def _connect(is_master, patience_s):
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_master,
                         multi_tenant=True, timeout=datetime.timedelta(seconds=patience_s))


def _address():
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _invite(store, world_size, deadline):
    """Rank 0's part: name the start, answer each rank that comes."""
    name, arrivals, hosts = uuid.uuid4().hex, 0, {0: socket.gethostname()}
    start = dist.PrefixStore(name, store)
    store.set("start", name)
    while len(hosts) < world_size:
        arrivals += 1
        if not _wait(start, f"arrival {arrivals}", deadline - time.monotonic()):
            missing = sorted(set(range(world_size)) - set(hosts))
            raise RunFailed(f"{len(hosts)} of {world_size} processes met at {_address()}; {_ranks(missing)} did not "
                            "come: look at the logs of their nodes")
        word, rank, host = start.get(f"arrival {arrivals}").decode().split(maxsplit=2)
        hosts[int(rank)] = host
        start.set(word, hosts[0])
    return Meeting(start, name, hosts)


def _join(store, rank, deadline):
    """The part of the other ranks: make up a word, and wait for the answer; where none comes, ask again which start."""
    while time.monotonic() < deadline:
        if not _wait(store, "start", deadline - time.monotonic()):
            break
        name, word = store.get("start").decode(), uuid.uuid4().hex
        start = dist.PrefixStore(name, store)
        start.set(f"arrival {start.add('arrivals', 1)}", f"{word} {rank} {socket.gethostname()}")
        while store.get("start").decode() == name and time.monotonic() < deadline:
            if start.check([word]):
                return Meeting(start, name, {0: start.get(word).decode()})
            time.sleep(0.2)     # `wait` would print a warning each time
    raise RunFailed(f"rank 0 did not come to {_address()}; look at the log of its node")


def _wait(store, key, seconds):
    """Whether the key is in the store before the time is up, or at once; False too where the store is out of reach."""
    try:
        store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
        return True
    except dist.DistError:
        return False


def _ranks(ranks):
    """"rank 3", or "ranks 3, 4, 5 and 17 more"."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def record_collectives(start_name):
    """Switch NCCL's flight recorder on, but for what the user has set. To be called before the process group exists.

    Its files lie in the temporary folder of each node, for not every node need see log_dir.
    """
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    if OLD_FLIGHT_FILE not in os.environ:
        os.environ.setdefault(FLIGHT_FILE, f"{tempfile.gettempdir()}/nccl_{start_name[:8]}_rank_")


# -----------------------------------------------------------------------------
# the watch

def keep_watch(runtime, meeting):
    """The watch of one process, a thread until runtime.ended; meeting: None for a process by itself.

    While the run starts: some seconds after any rank was asked to stop, end all with status 0. Their main threads may
    be inside a compilation for minutes, where no rank can be asked to agree, so the word goes round in the store.
    When there was no progress for runtime.patience_s: find out which rank hangs, and print it. The time-out of the
    collectives, HANG_GRACE_S later, ends the run.
    """
    store, asked = None, None
    if meeting:    # a connection of its own: the main thread may be waiting on the other
        store = dist.PrefixStore(meeting.name, _connect(False, runtime.patience_s))
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
            if _wait(store, f"stands {rank}", deadline - time.monotonic()):
                places[rank] = store.get(f"stands {rank}").decode()
        verdict = compare(places, hosts)
        store.set("roll call", verdict)
        return verdict
    answers = queue.Queue()

    def ask():     # in a thread of its own: where the network is cut, torch's store ignores its time-outs
        with contextlib.suppress(dist.DistError):
            store.set(f"stands {runtime.rank}", place)
            if _wait(store, "roll call", ROLL_CALL_S + 2):
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
        if path.parent in OURS and path.name not in ("distributed.py", "hang_watch.py"):
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
