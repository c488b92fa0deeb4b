"""The other processes of a run: how they find each other, and which of them hangs.

torchrun keeps one store (a TCPStore) for all its restarts; `wait_for_peers` gives each start its own prefix in it.
`watch_run`, a thread in each process, ends a run that is stopped during set-up and finds out which rank hangs. It talks
to the other processes through that store, since it cannot rely on a collective.
"""
import contextlib
import datetime
import itertools
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

import torch.distributed as dist

from exactgpt.config import RunFailed

ANSWER_S = 10         # for a store to answer: it takes milliseconds
START_GRACE_S = 3     # after a stop signal during set-up: the run may still end by itself
REPORT_S = 5          # for the ranks of a hanging run to report where they are
HANG_GRACE_S = 10     # from the start of these reports to the time-out of the collectives, which ends the run
NO_ANSWER = "without an answer (its process has died or is stopped, or the network to it is down)"
SOURCE_FOLDERS = (Path(__file__).parents[1], Path(__file__).parent)    # of the scripts and of the package


def report_error(rank, message):
    """Print an error on any rank; what all ranks know of, run_script prints on rank 0."""
    print(f"error on {socket.gethostname()}, rank {rank}: {message}", file=sys.stderr, flush=True)


# ---- rendezvous --------------------------------------------------------------

def wait_for_peers(runtime, address, timeout_s):
    """Wait for the processes that torchrun (or another launcher) started together; return (Store, hosts).

    The store is shared by this start's processes only. hosts, {rank: host}: of all ranks on rank 0, else of rank 0.
    Raises RunFailed if processes are missing after timeout_s, or if this one is asked to stop meanwhile.
    """
    # torchrun's store still holds what dead processes wrote, and a new process that reads a dead peer's address from it
    # hangs. TORCHELASTIC_RESTART_COUNT cannot tell the starts apart, because it may differ between nodes. So rank 0
    # makes up a name for the start, and every other rank joins only after rank 0 has met all and answered a nonce that
    # this rank made up: a dead rank 0 cannot.
    rank, world_size, deadline = runtime.rank, runtime.world_size, time.monotonic() + timeout_s
    at = f"{address[0]}:{address[1]}"
    try:
        store = Store(open_store(runtime, *address, timeout_s), rank)
        if rank == 0:      # publish a name for the start, answer each rank's nonce
            name, hosts, nonces, arrivals = uuid.uuid4().hex, {0: socket.gethostname()}, {}, itertools.count(1)
            start, arrival = store.below(name), f"arrival {next(arrivals)}"
            store.set("start", name)

            def all_arrived():
                nonlocal arrival
                while start.check([arrival]):
                    nonce, other, host = start.get(arrival).decode().split(maxsplit=2)
                    hosts[int(other)], nonces[int(other)] = host, nonce      # a rank that is restarted arrives again
                    arrival = f"arrival {next(arrivals)}"
                return len(hosts) == world_size
            if not wait_until(all_arrived, deadline, runtime):
                missing = sorted(set(range(world_size)) - set(hosts))
                more = f" and {len(missing) - 8} more" * (len(missing) > 8)
                raise RunFailed(f"only {world_size - len(missing)} of {world_size} processes reached {at}; missing: "
                                f"ranks {', '.join(map(str, missing[:8]))}{more}; look at their logs")
            for nonce in nonces.values():      # only now: torch would wait for the others without a limit
                start.set(nonce, hosts[0])
            return start, hosts
        nonce, name, start = uuid.uuid4().hex, "", None

        def answered():
            nonlocal name, start
            if store.check(["start"]) and name != store.get("start").decode():      # also of a rank 0 started meanwhile
                name = store.get("start").decode()
                start = store.below(name)
                start.set(f"arrival {start.add('arrivals', 1)}", f"{nonce} {rank} {socket.gethostname()}")
            return start and start.check([nonce])
        if wait_until(answered, deadline, runtime):
            return start, {0: start.get(nonce).decode()}
        raise RunFailed("not all processes came; look at rank 0's log" if start else
                        f"rank 0 did not reach {at}; look at the log of its node")
    except dist.DistError as error:
        raise RunFailed(f"no answer from {at} ({type(error).__name__}); look at rank 0's log") from error


def open_store(runtime, host, port, timeout_s):
    """Return the TCPStore at an address. Rank 0 makes it, unless torchrun has. Raises RunFailed if there is none."""
    # torchrun's store was there before this process: without an answer torchrun is dead, even if it died too early for
    # the kernel to tell this process (launch.py). Other launchers have none, and there rank 0 may come late.
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = runtime.rank == 0 and not of_torchrun

    def answers():      # torch's own attempts print thirty lines each
        with contextlib.suppress(OSError):      # refused, no route, a name that is not known yet
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            return True
    deadline = time.monotonic() + (ANSWER_S if of_torchrun else timeout_s)
    if not is_master and not wait_until(answers, deadline, runtime):
        raise RunFailed(f"nothing answers at {host}:{port}, where {'torchrun' if of_torchrun else 'rank 0'} should be; "
                        "look at its log")
    with time_limit(runtime.rank, ANSWER_S):
        return dist.TCPStore(host, port, multi_tenant=True, is_master=is_master,
                             timeout=datetime.timedelta(seconds=timeout_s))


class Store:
    """Requests to a store of torch that end this process if there is no answer: torch ignores its own time-outs."""

    def __init__(self, store, rank):
        self.of_torch, self._rank = store, rank

    def __getattr__(self, name):
        def request(*arguments):
            with time_limit(self._rank, ANSWER_S):
                return getattr(self.of_torch, name)(*arguments)
        return request

    def below(self, prefix):
        """Return the part of the store whose keys have this prefix."""
        return Store(dist.PrefixStore(prefix, self.of_torch), self._rank)

    def on_another_connection(self):
        """Return the same store on a connection of its own: a request blocks those of other threads."""
        return Store(self.clone(), self._rank)


@contextlib.contextmanager
def time_limit(rank, seconds, what="this run's store"):
    """End this process with an error if the block takes longer, since torch's own time-outs are not reliable."""
    def give_up():
        report_error(rank, f"{what} has been {NO_ANSWER} for {seconds:g} s")
        os._exit(1)
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_until(condition, deadline, runtime):
    """Return True once condition() holds, False at the deadline. Raises RunFailed if this process is asked to stop."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        if runtime.stop_signal:      # the ranks cannot agree on a stop yet; torchrun ends the others after this one
            raise RunFailed(f"stopped by {runtime.stop_signal} while waiting for the other processes")
        time.sleep(0.2)     # not store.wait: nothing interrupts it, and it prints a warning at each time-out
    return True


# ---- the watch ---------------------------------------------------------------

def wait_for_key(store, key, seconds):
    """Return True if the key appears in the store in time; False if it does not or the store cannot be reached."""
    try:
        store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
        return True
    except dist.DistError:
        return False


def watch_run(runtime, store, hosts):
    """Watch one process, in a thread, until runtime.ended is set."""
    # During set-up: exit every rank with status 0 a few seconds after any of them was signalled. A main thread may be
    # compiling for minutes and cannot enter a collective meanwhile, so the request to stop travels through the store.
    # After runtime.patience_s without progress: find the rank that hangs and print it. HANG_GRACE_S later the
    # collectives time out, which ends the run; if they do not, this does.
    stop_time, n_hangs = None, 0
    while not runtime.ended.wait(0.3):
        if runtime.starting and stop_time is None:
            with contextlib.suppress(dist.DistError):      # the store is gone: the main thread will report that
                if runtime.stop_signal:
                    stop_time = time.monotonic()
                    store.set("stop", runtime.stop_signal)
                elif store.check(["stop"]):
                    stop_time = time.monotonic()
        if runtime.starting and stop_time and time.monotonic() - stop_time > START_GRACE_S:
            runtime.print("stopped during set-up; there was nothing to save")
            runtime.delete_hidden()
            os._exit(0)
        idle_s = 0.0 if runtime.alone else time.monotonic() - runtime.last_progress
        if idle_s > runtime.patience_s and not runtime.hangs:
            runtime.hangs, n_hangs = True, n_hangs + 1
            report_hang(runtime, store.below(f"hang {n_hangs}"), hosts)
        elif idle_s > runtime.patience_s + REPORT_S + 3 * HANG_GRACE_S:
            os._exit(1)
        elif idle_s < runtime.patience_s:
            runtime.hangs = False      # it was slow


def report_hang(runtime, store, hosts):
    """Print once per node which rank hangs: each rank reports its location to rank 0, which compares them."""
    # All ranks come here at about the same time, because the last progress was a collective.
    def say(finding):
        if runtime.local_rank == 0:
            report_error(runtime.rank, f"no progress for {runtime.patience_s:g} s: {finding}")
    locations = {runtime.rank: main_thread_location()}
    if runtime.rank == 0:
        deadline = time.monotonic() + REPORT_S
        for rank in range(1, runtime.world_size):
            if wait_for_key(store, f"location {rank}", deadline - time.monotonic()):
                locations[rank] = store.get(f"location {rank}").decode()
        finding = describe_hang(locations, hosts)
        store.set("finding", finding)
        say(finding)
        return
    # Without rank 0's answer a timer speaks: if the network is down, torch's store ignores its own time-outs.
    hosts = {**hosts, runtime.rank: socket.gethostname()}
    timer = threading.Timer(REPORT_S + 3, say, [describe_hang(locations, hosts)])
    timer.start()
    with contextlib.suppress(dist.DistError):
        store.set(f"location {runtime.rank}", locations[runtime.rank])
        if wait_for_key(store, "finding", REPORT_S + 2):
            timer.cancel()
            say(store.get("finding").decode())


def describe_hang(locations, hosts):
    """Return which ranks stand where, in words: those that do not answer first, then the rarest place, the suspect."""
    # locations: {rank: location} of the ranks that answered; hosts: {rank: host} of all ranks.
    ranks_at = {}
    for rank in hosts:
        place = f"at {locations[rank]}" if rank in locations else NO_ANSWER
        ranks_at.setdefault(place, []).append(rank)
    parts = []
    for place, ranks in sorted(reversed(ranks_at.items()), key=lambda item: (item[0] != NO_ANSWER, len(item[1]))):
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:8])
        parts.append(names + f" and {len(ranks) - 8} more" * (len(ranks) > 8) + f" {place}")
    return "; ".join(parts)


def main_thread_location():
    """Return the main thread's innermost line in this repository, but not in the modules where every rank waits."""
    for frame, line in traceback.walk_stack(sys._current_frames()[threading.main_thread().ident]):
        path = Path(frame.f_code.co_filename)
        if path.parent in SOURCE_FOLDERS and path.name not in ("distributed.py", "peers.py"):
            return f"{path.name}:{line} in {frame.f_code.co_name}"
    return "no line of this repository"


def peer_failure(error):
    """Return the message for a collective that failed because a peer died, else None."""
    text = str(error)
    if isinstance(error, dist.DistError) or "gloo" in text:
        return (f"lost the connection to another process ({text.splitlines()[0][:200]}); see the log of the process "
                "that ended first")
    return None
