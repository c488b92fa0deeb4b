"""hang_watch.py: what is said of a rank that hangs or is lost, and what is recorded for it. With real processes:
test_multinode.py.
"""
import os
import re
import threading

import pytest
import torch.distributed as dist

from exactgpt import hang_watch
from exactgpt.config import as_user_error
from exactgpt.hang_watch import compare, lost_peer, record_collectives, standing

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


@pytest.mark.parametrize("places, words", [
    ({0: "train.py:9", 1: "train.py:9", 3: "train.py:9"}, ["rank 2 on b gives no answer", "; 3 ranks are at train.py"]),
    ({0: "train.py:9", 1: "train.py:9", 2: "train.py:9", 3: "dataloader.py:5"},
     ["rank 3 on b is at dataloader.py:5; 3 ranks are at train.py:9"]),
    ({0: "inference.py:7", 1: "train.py:9", 2: "train.py:9", 3: "train.py:9"}, ["rank 0 on a is at inference.py:7; 3"]),
    (dict.fromkeys(range(4), "train.py:9"), ["all ranks answer and are at train.py:9: the network"]),
])
def test_the_rank_that_hangs_is_named_with_its_host(places, words):
    assert all(word in compare(places, HOSTS) for word in words)


def test_a_thousand_silent_ranks_are_one_line():
    hosts = {rank: f"node{rank // 8}" for rank in range(4096)}
    said = compare({rank: "train.py:9" for rank in range(1000)}, hosts)
    assert "rank 1000 on node125 gives no answer" in said and "3088 more ranks give none" in said and len(said) < 1500


def test_where_the_main_thread_stands_is_its_innermost_line_of_ours():
    places = []

    def look():      # called by a function of the package
        thread = threading.Thread(target=lambda: places.append(standing()))
        thread.start()
        thread.join()
    as_user_error(look, "")
    assert re.fullmatch(r"config\.py:\d+ in as_user_error", places.pop())
    look()           # by no line of ours: this is a test
    assert places == ["no line of ours"]


def test_errors_of_a_lost_peer_are_told_from_ours():
    assert "lost the connection" in lost_peer(RuntimeError("[third_party/gloo/pair.cc:5] Connection closed by peer"))
    assert "lost the connection" in lost_peer(dist.DistBackendError("NCCL communicator was aborted"))
    assert lost_peer(ValueError("no such key")) is None


def test_the_flight_recorder_is_on_but_for_what_the_user_set(monkeypatch):
    for name in (*hang_watch.FLIGHT_RECORDER, hang_watch.FLIGHT_FILE, hang_watch.OLD_FLIGHT_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    record_collectives("0123456789abcdef")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].endswith("/nccl_01234567_rank_")
    del os.environ["TORCH_FR_DUMP_TEMP_FILE"]
    os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = "/mine/rank_"
    record_collectives("0123456789abcdef")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
