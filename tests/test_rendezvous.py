"""peers.py: processes find each other through a store full of what dead ones wrote, or give it up in time."""
import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from exactgpt import peers
from exactgpt.config import RunFailed
from tests import forks
from tests.common import script_env

MEET = """
import time, torch, torch.distributed as dist
from types import SimpleNamespace
from exactgpt.config import read_ranks
from exactgpt.peers import wait_for_peers
rank, world_size, *_, address = read_ranks()
store, hosts = wait_for_peers(SimpleNamespace(rank=rank, world_size=world_size, stop_signal=""), address, 60)
dist.init_process_group("gloo", store=dist.PrefixStore("group", store.of_torch), rank=rank, world_size=world_size)
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


def until(condition, seconds=60):
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
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
    until(lambda: start.check(["arrival 1"]))
    kill(members[1])
    members.append(member(1, 3))
    until(lambda: start.check(["arrival 2"]))
    members.append(member(2, 3))
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


# -----------------------------------------------------------------------------
# a store that does not answer

STORE = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""
JOIN = """
from types import SimpleNamespace
from exactgpt import config, distributed, peers
peers.ANSWER_S = 2
config.run_script(distributed.start(SimpleNamespace(device="cpu", dtype="fp32")).__enter__)
"""


@pytest.mark.slow
def test_a_store_that_is_silent_or_gone_ends_the_waiting_processes_within_seconds(tmp_path):
    """torchrun's: dead from the start, killed or stopped while they wait, or a stopped one that takes connections."""
    for name, code in (("store", STORE), ("join", JOIN)):
        (tmp_path / f"{name}.py").write_text(code)
    started = []

    def start(script, output, **env):
        started.append(forks.start(tmp_path / script, [], script_env(tmp_path, env), output))
        return started[-1]
    try:
        stores = {what: start("store.py", tmp_path / what) for what in ("killed", "stopped")}
        with socket.create_server(("127.0.0.1", 0)) as deaf, socket.create_server(("127.0.0.1", 0)) as closed:
            ports = dict(deaf=deaf.getsockname()[1], dead=closed.getsockname()[1])
            closed.close()
            for what in stores:
                until(lambda what=what: (tmp_path / what).exists() and (tmp_path / what).read_text().endswith("\n"))
                ports[what] = int((tmp_path / what).read_text())
            members = {(what, rank): start("join.py", tmp_path / f"{what}{rank}", MASTER_ADDR="127.0.0.1",
                                           MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True", RANK=rank,
                                           LOCAL_RANK=0, WORLD_SIZE=4)
                       for what, port in ports.items() for rank in (0, 1)}
            time.sleep(2)      # some still start, some wait for the others
            kill(stores["killed"])
            os.kill(stores["stopped"].pid, signal.SIGSTOP)
            known = re.compile(r"nothing answers at 127|this run's store has been without an answer|no answer from 127")
            for (what, rank), process in members.items():
                said = tmp_path / f"{what}{rank}"
                until(lambda said=said: known.search(said.read_text()), 20)
                process.terminate()      # as torchrun would; a rank above 0 waits for that
                process.join(20)
                assert process.exitcode == 1 and "Traceback" not in said.read_text(), (what, rank, said.read_text())
    finally:
        for process in started:
            kill(process)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_asked_to_stop_while_it_waits_does(store, monkeypatch, rank):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    waiting = SimpleNamespace(rank=rank, world_size=2, stop_signal="SIGTERM")
    with pytest.raises(RunFailed, match="stopped by SIGTERM while waiting for the other processes"):
        peers.wait_for_peers(waiting, ("127.0.0.1", store.port), 60)


def test_rank_0_may_come_late_where_no_torchrun_has_a_store(monkeypatch):
    """Under mpirun or srun, say: nothing answers yet, nor is the name known, and both may change."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(peers, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    runtime, begin = SimpleNamespace(rank=1, world_size=2, stop_signal=""), time.monotonic()
    for host in ("127.0.0.1", "no-such-host.invalid"):
        with pytest.raises(RunFailed, match=f"nothing answers at {host}:{port}, where rank 0 should be"):
            peers.wait_for_peers(runtime, (host, port), 0.7)
    assert time.monotonic() - begin > 1.4
