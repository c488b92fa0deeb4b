"""bench/train_step.py: each way's own memory, and a peer that runs out of it. Whole runs of it: test_gpu.py."""
from types import SimpleNamespace

import pytest
import torch

from bench import train_step
from bench.train_step import Peer, TrainStepConfig, leave_out_on_error, make_peer, report, take_turn

CONFIG = TrainStepConfig(steps=2, total_batch_size=1000)


@pytest.fixture
def card(monkeypatch):
    """A card whose memory the tests fill: card.take(n) bytes that stay until card.give(n)."""
    card = SimpleNamespace(now=0, peak=0)

    def take(n):
        card.now += n
        card.peak = max(card.peak, card.now)
    card.take, card.give = take, lambda n: take(-n)
    for name, function in dict(memory_allocated=lambda: card.now, max_memory_allocated=lambda: card.peak,
                               reset_peak_memory_stats=lambda: setattr(card, "peak", card.now),
                               synchronize=lambda: None, empty_cache=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, function)
    card.runtime = SimpleNamespace(device=torch.device("cuda"), is_main=True, world_size=1, dtype_name="bf16",
                                   hardware=SimpleNamespace(peak_flops=lambda: 1e15))
    return card


def way(card, weights, state, activations):
    """A maker of steps that hold so much."""
    def maker(config, runtime, data):
        card.take(weights)
        made_state = []

        def step():
            card.take(activations)
            if not made_state:
                made_state.append(card.take(state))
            card.give(activations)
        return step
    return maker


def test_a_ways_peak_is_its_own(card):
    """Its weights and optimizer's state, which stay, and what its step takes; not what the others hold meanwhile."""
    peers = [make_peer(way(card, *bytes_of), CONFIG, card.runtime, "") for bytes_of in ((100, 200, 40), (7, 14, 500))]
    for measured in (False, True):
        for peer in peers:
            take_turn(peer, CONFIG, card.runtime, measured)
    assert [peer.resident for peer in peers] == [300, 21] and [peer.peak for peer in peers] == [340, 521]
    assert all(len(peer.tokens_per_s) == 1 for peer in peers)


@pytest.mark.parametrize("when", ["made", "warm-up", "measured"])
def test_a_peer_that_runs_out_of_memory_drops_out(card, when, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def maker(config, runtime, data):
        return full() if when == "made" else lambda: (turns.append(1), full() if when in turns_of[len(turns)] else None)
    turns, turns_of = [], {1: ["warm-up"], 2: [], 3: ["measured"]}
    ours, peer = Peer(lambda: None), make_peer(maker, CONFIG, card.runtime, "")
    for measured in (False, True, True):
        for one in (ours, peer):
            with leave_out_on_error(one, card.runtime):
                take_turn(one, CONFIG, card.runtime, measured)
    assert (peer.problem, peer.step, peer.tokens_per_s) == ("out of memory", None, [])
    assert len(ours.tokens_per_s) == 2
    written = {}
    monkeypatch.setattr(train_step, "write_results", lambda name, result, table: written.update(result, table=table))
    report(CONFIG, card.runtime, dict(ours=ours, plain=peer), dict(matmul_tflops=[1.0], copy_gb_per_s=[1.0]), None)
    assert "| plain | out of memory | | | |" in capsys.readouterr().out
    assert written["dropped_out"] == {"plain": "out of memory"} and "plain" not in written["tokens_per_s"]


def test_a_peer_that_fails_otherwise_drops_out_too_and_says_why(card):
    peer = Peer(lambda: 1 / 0)
    with leave_out_on_error(peer, card.runtime):
        take_turn(peer, CONFIG, card.runtime, measured=True)
    assert (peer.problem, peer.step) == ("ZeroDivisionError: division by zero", None)


def test_where_several_take_turns_the_first_step_after_the_others_does_not_count(card):
    steps = []
    for alone, expected in ((True, 2), (False, 3)):
        take_turn(Peer(lambda: steps.append(1)), CONFIG, card.runtime, measured=True, alone=alone)
        assert len(steps) == expected
        steps.clear()
