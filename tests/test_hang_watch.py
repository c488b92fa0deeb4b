"""peers.py: messages about hanging and lost ranks. test_multinode.py has real processes."""
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from exactgpt import config, distributed, peers
from exactgpt.peers import describe_hang, main_thread_location, peer_failure
from tests.common import cpu_runtime

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


@pytest.mark.parametrize("places, words", [
    ({0: "train.py:9", 1: "train.py:9", 3: "train.py:9"}, "rank 2 on b without an answer (its process has died or is "
     "stopped, or the network to it is down); rank 0 on a, rank 1 on a, rank 3 on b at train.py:9"),
    ({0: "train.py:9", 1: "train.py:9", 2: "train.py:9", 3: "dataloader.py:5"},
     "rank 3 on b at dataloader.py:5; rank 0 on a, rank 1 on a, rank 2 on b at train.py:9"),
    ({0: "inference.py:7", 1: "train.py:9", 2: "train.py:9", 3: "train.py:9"},
     "rank 0 on a at inference.py:7; rank 1 on a, rank 2 on b, rank 3 on b at train.py:9"),
])
def test_the_rank_that_hangs_is_named_with_its_host_and_comes_first(places, words):
    assert describe_hang(places, HOSTS) == words


def test_the_watch_has_ended_when_the_work_is_over():
    """A thread in a request to the store, while Python ends, aborts the process: status 134 after a good run."""
    with distributed.start(SimpleNamespace(device="cpu", dtype="fp32")):
        assert "watch" in [thread.name for thread in threading.enumerate()]
    assert "watch" not in [thread.name for thread in threading.enumerate()]


def test_a_dry_run_stopped_during_set_up_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "START_GRACE_S", 0.1)
    runtime, ends = cpu_runtime(), []
    runtime.hidden, runtime.stop_signal = tmp_path / ".dry_run", "SIGTERM"
    runtime.hidden.mkdir()
    monkeypatch.setattr(os, "_exit", lambda status: (ends.append(status), runtime.ended.set()))
    peers.watch_run(runtime, peers.Store(dist.HashStore(), 0), {})
    assert ends == [0] and not (tmp_path / ".dry_run").exists()


@pytest.mark.parametrize("recovers", [True, False])
def test_a_run_that_was_only_slow_goes_on_and_one_that_torch_does_not_end_is_ended(monkeypatch, recovers):
    ends, reports = [], []
    monkeypatch.setattr(peers, "REPORT_S", 0.1)
    monkeypatch.setattr(peers, "HANG_GRACE_S", 0.2)
    monkeypatch.setattr(peers, "report_hang", lambda runtime, *_: reports.append(runtime.last_progress))
    runtime = cpu_runtime(world_size=2)
    runtime.starting, runtime.patience_s, runtime.last_progress = False, 1.0, time.monotonic() - 1.1
    monkeypatch.setattr(os, "_exit", lambda status: (ends.append(status), runtime.ended.set()))
    watch = threading.Thread(target=peers.watch_run, args=(runtime, peers.Store(dist.HashStore(), 0), {}))
    watch.start()
    begin = time.monotonic()
    while not runtime.ended.is_set() and time.monotonic() < begin + 1.5:
        if reports and recovers:
            runtime.last_progress = time.monotonic()
        time.sleep(0.05)
    runtime.ended.set()
    watch.join()
    assert len(reports) == 1 and ends == ([] if recovers else [1]) and runtime.hangs != recovers


def test_thousands_of_silent_ranks_make_a_short_message():
    hosts = {rank: f"node{rank // 8}" for rank in range(4096)}
    said = describe_hang({rank: "train.py:9" for rank in range(1000)}, hosts)
    assert "rank 1000 on node125, " in said and " and 3088 more without an answer" in said
    assert len(said) < 1500


def test_the_main_threads_location_is_its_innermost_line_in_this_repository():
    places = []

    def look():      # called by a function of the package
        thread = threading.Thread(target=lambda: places.append(main_thread_location()))
        thread.start()
        thread.join()
    config.run_script(look)
    assert re.fullmatch(r"config\.py:\d+ in run_script", places.pop())
    look()           # called from a test, not from the package
    assert places == ["no line of this repository"]


def test_errors_of_a_lost_peer_are_recognised():
    assert "lost the connection" in peer_failure(RuntimeError("[third_party/gloo/pair.cc:5] Connection closed by peer"))
    assert "lost the connection" in peer_failure(dist.DistBackendError("NCCL communicator was aborted"))
    assert peer_failure(ValueError("no such key")) is None
