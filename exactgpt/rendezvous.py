"""How the processes of a run meet.

torchrun keeps one store (a TCPStore) for all its restarts. `meet` gives each start a corner of it for itself.
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
        store = connect(rank == 0 and not agent_store, patience_s)
        return _invite(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    except dist.DistError as error:
        problem = RunFailed(f"nobody answers at {_address()}; look at the log of rank 0's node "
                            f"({type(error).__name__})")
    except RunFailed as error:
        problem = error
    if rank != 0:     # rank 0 speaks for all when a run ends, but it may not be there
        print(f"error on {socket.gethostname()}, rank {rank}: {problem}", file=sys.stderr, flush=True)
    raise problem


def connect(is_master, patience_s):
    """A connection of this process to the launcher's store."""
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
        if not wait_for(start, f"arrival {arrivals}", deadline - time.monotonic()):
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
        if not wait_for(store, "start", deadline - time.monotonic()):
            break
        name, word = store.get("start").decode(), uuid.uuid4().hex
        start = dist.PrefixStore(name, store)
        start.set(f"arrival {start.add('arrivals', 1)}", f"{word} {rank} {socket.gethostname()}")
        while store.get("start").decode() == name and time.monotonic() < deadline:
            if start.check([word]):
                return Meeting(start, name, {0: start.get(word).decode()})
            time.sleep(0.2)     # `wait` would print a warning each time
    raise RunFailed(f"rank 0 did not come to {_address()}; look at the log of its node")


def wait_for(store, key, seconds):
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
