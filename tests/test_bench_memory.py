"""The memory that bench.memory counts: a tiny model's peak against sums by hand. In a process of its own, as the
benchmark is: it makes torch believe in a card."""
import json
import subprocess
import sys

import pytest

from tests.common import ROOT, script_env

V, T, C, LAYERS, HEADS = 4096, 128, 64, 1, 2

COUNT = f"""
import gc, json
gc.disable()      # a second less
import torch
from bench import memory
from bench.memory import Bytes, MemoryCounter, count_memory
shape = dict(n_layer={LAYERS}, n_head={HEADS}, n_embd={C}, vocab_size={V})
rows = [count_memory("tiny", shape, {T}, recompute, compiled)
        for recompute in (False, True) for compiled in (False, True)]
counter = MemoryCounter()     # what is most with few rows is not what is most with many
counter.history = [Bytes(10 * 10**9, 0), Bytes(10**9, 10**9)]
memory.count_step = lambda *step: (10**9, counter)
print(json.dumps([rows, count_memory("made up", shape, {T}, False, False), torch.cuda.is_available()]))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Rows of the benchmark's table by (recompute, compiled); that of a made-up step; whether a card is left."""
    result = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env=script_env(tmp_path_factory.mktemp("home")),
                            capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    rows, made_up, card = json.loads(result.stdout.splitlines()[-1])
    return {(r["recompute"], r["compiled"]): r for r in rows}, made_up, card


@pytest.mark.slow
def test_the_compiled_peak_is_what_the_backward_pass_needs_and_little_more(counted):
    """The bf16 logits, over which their gradient is written; of a layer the two normalised inputs in fp32, and in bf16
    both LayerNorms' outputs, queries, keys, values, attention's output and the MLP's 4 C before and after the GELU."""
    needed = 2 * V + LAYERS * (2 * 4 + 2 * 2 + 4 * 2 + 2 * 4 * 2) * C
    ends = (4 + 4 + 2) * C + LAYERS * 4 * HEADS + 64    # embeddings, the last LayerNorm, its output; attention's sums
    peak = counted[0][False, True]["mb_per_token"] * 1e6
    assert needed < peak < needed + ends


@pytest.mark.slow
def test_the_eager_peak_is_the_loss_in_fp32(counted):
    """Log-probabilities, their gradient and the logits' gradient, 4 V bytes each, beside a layer's activations."""
    peak = counted[0][False, False]["mb_per_token"] * 1e6
    assert 12 * V + 36 * LAYERS * C < peak < 14 * V + 48 * LAYERS * C + 20 * C
    assert all(counted[0][recompute, True]["mb_per_token"] < counted[0][recompute, False]["mb_per_token"]
               for recompute in (False, True))


@pytest.mark.slow
def test_recomputing_keeps_little_of_a_layer(counted):
    for compiled in (False, True):
        kept, recomputed = (counted[0][recompute, compiled]["mb_per_token"] * 1e6 for recompute in (False, True))
        assert 2 * V < recomputed < kept - 30 * LAYERS * C


@pytest.mark.slow
def test_weights_in_bf16_are_what_stays_whatever_the_rows(counted):
    """Autocast's copies of all matrices but the positions; of the layers' none where they are recomputed."""
    layers = 2 * LAYERS * 12 * C * C
    for recompute in (False, True):
        fixed = counted[0][recompute, True]["fixed_gb"] * 1e9
        assert 2 * V * C + (not recompute) * layers < fixed < 2 * (2 * V * C) + layers + 4 * T * C + 2**14


@pytest.mark.slow
def test_with_few_rows_a_compiled_step_is_its_gradients(counted):
    """All of them are there at its end, in fp32, beside those of earlier micro-batches; eager adds each at once, and is
    left with the embedding's: from the output layer, from the input, and their sum."""
    for recompute in (False, True):
        eager, compiled = (counted[0][recompute, compiled] for compiled in (False, True))
        gradients = compiled["state_gb"] / 4
        assert gradients < compiled["least_gb"] < gradients + 7 * V * C / 1e9
        assert eager["least_gb"] < (3 * 4 * V * C + 2**16) / 1e9


@pytest.mark.slow
def test_a_larger_card_holds_more_rows_and_ddp_needs_room(counted):
    for row in counted[0].values():
        rows = list(row["micro_batch"].values())
        assert rows == sorted(rows) and rows[0] < rows[-1]
    # 92% of a card less 16 GB of state, with DDP 20: the 10 GB of the first moment, then 1 GB and 1 a row.
    assert list(counted[1]["micro_batch"].values()) == [0, 0, 16, 32, 64]
    assert list(counted[1]["micro_batch_ddp"].values()) == [0, 0, 8, 32, 64]


@pytest.mark.slow
def test_the_card_is_gone_afterwards(counted):
    assert counted[2] is False
