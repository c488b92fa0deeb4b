"""hang_watch.py: messages about hanging and lost ranks, the flight recorder. test_multinode.py has real processes."""
import os
import re
import threading

import pytest
import torch.distributed as dist
from exactgpt.hang_watch import describe_hang, enable_flight_recorder, main_thread_location, peer_failure

from exactgpt import hang_watch
from exactgpt.config import as_user_error

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


@pytest.mark.parametrize("places, words", [
    ({0: "train.py:9", 1: "train.py:9", 3: "train.py:9"}, ["rank 2 on b does not answer", "; 3 ranks are at train.py"]),
    ({0: "train.py:9", 1: "train.py:9", 2: "train.py:9", 3: "dataloader.py:5"},
     ["rank 3 on b is at dataloader.py:5; 3 ranks are at train.py:9"]),
    ({0: "inference.py:7", 1: "train.py:9", 2: "train.py:9", 3: "train.py:9"}, ["rank 0 on a is at inference.py:7; 3"]),
    (dict.fromkeys(range(4), "train.py:9"), ["all ranks answer and are at train.py:9: the network"]),
])
def test_the_rank_that_hangs_is_named_with_its_host(places, words):
    assert all(word in describe_hang(places, HOSTS) for word in words)


def test_thousands_of_silent_ranks_make_a_short_message():
    hosts = {rank: f"node{rank // 8}" for rank in range(4096)}
    said = describe_hang({rank: "train.py:9" for rank in range(1000)}, hosts)
    assert "rank 1000 on node125 does not answer" in said and "3088 more ranks do not answer" in said
    assert len(said) < 1500


def test_the_main_threads_location_is_its_innermost_line_in_this_repository():
    places = []

    def look():      # called by a function of the package
        thread = threading.Thread(target=lambda: places.append(main_thread_location()))
        thread.start()
        thread.join()
    as_user_error(look, "")
    assert re.fullmatch(r"config\.py:\d+ in as_user_error", places.pop())
    look()           # called from a test, not from the package
    assert places == ["no line of this repository"]


def test_errors_of_a_lost_peer_are_recognised():
    assert "lost the connection" in peer_failure(RuntimeError("[third_party/gloo/pair.cc:5] Connection closed by peer"))
    assert "lost the connection" in peer_failure(dist.DistBackendError("NCCL communicator was aborted"))
    assert peer_failure(ValueError("no such key")) is None


def test_the_flight_recorder_keeps_what_the_user_set(monkeypatch):
    for name in (*hang_watch.FLIGHT_RECORDER, hang_watch.FLIGHT_FILE, hang_watch.OLD_FLIGHT_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    enable_flight_recorder("0123456789abcdef")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].endswith("/nccl_01234567_rank_")
    del os.environ["TORCH_FR_DUMP_TEMP_FILE"]
    os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = "/mine/rank_"
    enable_flight_recorder("0123456789abcdef")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
