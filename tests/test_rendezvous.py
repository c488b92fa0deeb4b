"""peers.py: processes find each other through a store full of what dead ones wrote."""
import time

import pytest
import torch.distributed as dist

from tests import forks
from tests.common import script_env

MEET = """
import os, time, torch, torch.distributed as dist
from types import SimpleNamespace
from exactgpt.config import read_ranks
from exactgpt.peers import wait_for_peers
rank, world_size, *_, address = read_ranks()
store, hosts = wait_for_peers(SimpleNamespace(rank=rank, world_size=world_size, stop_signal=""), address, 60)
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world_size)
total = torch.ones(1)
dist.all_reduce(total)
print(store.get("arrival 1").decode().split()[0], int(total), len(hosts), flush=True)     # a nonce: one for a start
time.sleep(60)                      # until it is killed
"""


@pytest.fixture
def store():
    """A store that outlives the processes that use it, like that of torchrun's agent."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def member(store, tmp_path):
    """member(rank, world_size) -> a process that finds the others through the store."""
    members = []
    (tmp_path / "meet.py").write_text(MEET)

    def start(rank, world_size=2):
        env = script_env(tmp_path, dict(RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1",
                                        MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE="True"))
        output = tmp_path / f"out{len(members)}"
        members.append(forks.start(tmp_path / "meet.py", [], env, output, tmp_path / "err"))
        members[-1].output = output
        return members[-1]
    yield start
    for process in members:
        kill(process)


def kill(process):
    process.kill()
    process.join()


def until(condition):
    """Wait until the condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def printed_words(process):
    """Return the words that a member prints once it has found the others."""
    until(lambda: process.output.exists() and process.output.read_text().endswith("\n"))
    return process.output.read_text().split()


@pytest.mark.slow
def test_new_processes_never_join_dead_ones(store, member):
    """Kill all once they are connected, then one on each side while it waits; new ones may then start in any order."""
    first = [member(0), member(1)]
    nonces = {printed_words(process)[0] for process in first}
    assert len(nonces) == 1
    for process in first:
        kill(process)
    left = member(1)                                    # finds the name of a dead rank 0, sends a nonce, and is killed
    start = dist.PrefixStore(store.get("start").decode(), store)
    until(lambda: start.check(["arrival 2"]))
    kill(left)
    old = store.get("start")
    left = member(0)                                    # names a start that nobody joins
    until(lambda: store.get("start") != old)
    kill(left)
    late = member(1)                                    # starts before its rank 0
    until(lambda: dist.PrefixStore(store.get("start").decode(), store).check(["arrival 1"]))
    second = [printed_words(member(0)), printed_words(late)]
    assert [line[1:] for line in second] == [["2", "2"], ["2", "1"]]       # rank 0 knows all hosts, the others its own
    assert second[0][0] == second[1][0] not in nonces


@pytest.mark.slow
def test_a_rank_that_is_restarted_while_others_are_awaited_is_admitted_again(store, member):
    members = [member(0, 3), member(1, 3)]
    until(lambda: store.check(["start"]))
    start = dist.PrefixStore(store.get("start").decode(), store)
    until(lambda: start.check(["arrival 1"]) and start.check([start.get("arrival 1").decode().split()[0]]))
    kill(members[1])
    members += [member(1, 3), member(2, 3)]
    alive = [members[0], *members[2:]]
    assert [printed_words(process)[1:] for process in alive] == [["3", "3"], ["3", "1"], ["3", "1"]]


@pytest.mark.slow
def test_missing_ranks_are_named(tmp_path, store):
    (tmp_path / "meet.py").write_text(
        "from types import SimpleNamespace\nfrom exactgpt import config, distributed\ndistributed.START_TIMEOUT_S = 1\n"
        "config.run_script(distributed.start(SimpleNamespace(device='cpu', dtype='fp32')).__enter__)")
    for rank, words in ((0, "meet.py: error: only 1 of 4 processes reached"), (0, "missing: ranks 1, 2, 3"),
                        (1, ", rank 1: rank 0 did not reach 127.0.0.1:")):
        store.delete_key("start")
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE="True", RANK=rank,
                   WORLD_SIZE=4)
        output = tmp_path / f"out{rank}"
        process = forks.start(tmp_path / "meet.py", [], script_env(tmp_path, env), output)
        until(lambda output=output, words=words: output.exists() and words in output.read_text())
        assert "Traceback" not in output.read_text()
        kill(process)
