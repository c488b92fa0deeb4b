"""Let the processes of a run find each other.

torchrun keeps one store (a TCPStore) for all its restarts. `wait_for_peers` gives each start its own prefix in it.
"""
import datetime
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass

import torch.distributed as dist

from exactgpt.config import RunFailed, UserError


@dataclass(frozen=True)
class Rendezvous:
    """One start of a run on several processes."""
    store: dist.Store    # shared by the processes of this start only
    name: str            # unique to this start
    hosts: dict          # {rank: host}: of all ranks on rank 0, of rank 0 alone on the others


def wait_for_peers(rank, world_size, timeout_s):
    """Wait for the processes that torchrun (or another launcher) started together; return their Rendezvous.

    The store still holds what dead processes wrote, and a new process that reads a dead peer's address from it hangs.
    TORCHELASTIC_RESTART_COUNT cannot tell the starts apart, because it may differ between nodes. So rank 0 makes up a
    name for the start, and every other rank joins only after rank 0 has answered a nonce that this rank made up: a dead
    rank 0 cannot. Raises RunFailed if processes are missing after timeout_s, UserError if the launcher set no address.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {world_size}, but {missing[0]} is not set; start the processes with torchrun, "
                        "or unset WORLD_SIZE to run a single one")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout_s
    try:
        store = connect_to_store(rank == 0 and not agent_store, timeout_s)
        return _admit_ranks(store, world_size, deadline) if rank == 0 else _join_rank_0(store, rank, deadline)
    except dist.DistError as error:
        problem = RunFailed(f"no answer from {_store_address()} ({type(error).__name__}); look at the log of rank 0's "
                            "node")
    except RunFailed as error:
        problem = error
    if rank != 0:     # usually rank 0 alone prints errors, but it may not be running
        print(f"error on {socket.gethostname()}, rank {rank}: {problem}", file=sys.stderr, flush=True)
    raise problem


def connect_to_store(is_master, timeout_s):
    """Open a new connection to the launcher's store."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_master,
                         multi_tenant=True, timeout=datetime.timedelta(seconds=timeout_s))


def _store_address():
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _admit_ranks(store, world_size, deadline):
    """Publish a name for the start and answer each rank that arrives (rank 0's side)."""
    name, arrivals, hosts = uuid.uuid4().hex, 0, {0: socket.gethostname()}
    start = dist.PrefixStore(name, store)
    store.set("start", name)
    while len(hosts) < world_size:
        arrivals += 1
        if not wait_for_key(start, f"arrival {arrivals}", deadline - time.monotonic()):
            missing = sorted(set(range(world_size)) - set(hosts))
            raise RunFailed(f"only {len(hosts)} of {world_size} processes reached {_store_address()}; missing: "
                            f"{_format_ranks(missing)}; look at the logs of their nodes")
        nonce, rank, host = start.get(f"arrival {arrivals}").decode().split(maxsplit=2)
        hosts[int(rank)] = host
        start.set(nonce, hosts[0])
    return Rendezvous(start, name, hosts)


def _join_rank_0(store, rank, deadline):
    """Send rank 0 a nonce and wait for its answer (the other ranks' side); start over if another start is published."""
    while time.monotonic() < deadline:
        if not wait_for_key(store, "start", deadline - time.monotonic()):
            break
        name, nonce = store.get("start").decode(), uuid.uuid4().hex
        start = dist.PrefixStore(name, store)
        start.set(f"arrival {start.add('arrivals', 1)}", f"{nonce} {rank} {socket.gethostname()}")
        while store.get("start").decode() == name and time.monotonic() < deadline:
            if start.check([nonce]):
                return Rendezvous(start, name, {0: start.get(nonce).decode()})
            time.sleep(0.2)     # not store.wait: it prints a warning at each time-out
    raise RunFailed(f"rank 0 did not reach {_store_address()}; look at the log of its node")


def wait_for_key(store, key, seconds):
    """Return True if the key appears in the store in time; False if it does not or the store cannot be reached."""
    try:
        store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
        return True
    except dist.DistError:
        return False


def _format_ranks(ranks):
    """Format a list of ranks: "rank 3", or "ranks 3, 4, 5 and 17 more"."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
