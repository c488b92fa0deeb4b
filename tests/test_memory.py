"""The micro-batch search, with the card's memory faked."""
from types import SimpleNamespace

import pytest
import torch

import memory
from classifier import Classifier
from config import UserError
from lora import add_adapter
from model import GPT, GPTConfig
from tuning import Objective


def card(monkeypatch, rows_that_fit, kind="cuda", minimum=lambda value: value):
    """A runtime on a device on which up to so many rows fit; the tries are recorded."""
    tried = []

    def fits(module, block_size, size, runtime):
        tried.append(size)
        return size <= rows_that_fit
    monkeypatch.setattr(memory, "fits", fits)
    return SimpleNamespace(device=torch.device(kind), minimum=minimum), tried


RAW = SimpleNamespace()


def test_the_largest_divisor_that_fits_is_found_by_halving(monkeypatch):
    runtime, tried = card(monkeypatch, 20)
    assert memory.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 16
    assert tried == [64, 32, 16]                      # 64 x 1024 tokens already fill a card
    runtime, tried = card(monkeypatch, 9)
    assert memory.find_micro_batch_size(RAW, 1024, 0, 60, runtime) == 6   # 60, 30, 15, 6: each a divisor of 60


def test_the_smallest_of_the_ranks_counts(monkeypatch):
    runtime, _ = card(monkeypatch, 64, minimum=lambda value: min(value, 8))
    assert memory.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 8


def test_a_size_that_does_not_fit_names_the_next_smaller_valid_one(monkeypatch):
    runtime, _ = card(monkeypatch, 20)
    with pytest.raises(UserError, match="use --micro_batch_size 16, or 0"):
        memory.find_micro_batch_size(RAW, 1024, 32, 512, runtime)
    assert memory.find_micro_batch_size(RAW, 1024, 16, 512, runtime) == 16
    with pytest.raises(UserError, match="use --micro_batch_size 32, or 0"):
        memory.find_micro_batch_size(RAW, 1024, 48, 96, runtime)


def test_a_size_that_was_found_on_a_larger_card_is_found_anew(monkeypatch):
    runtime, tried = card(monkeypatch, 20)
    assert memory.find_micro_batch_size(RAW, 1024, 64, 512, runtime, insist=False) == 16
    assert tried == [64, 32, 16]


def test_not_even_one_row(monkeypatch):
    runtime, _ = card(monkeypatch, 0)
    with pytest.raises(UserError, match="--recompute"):
        memory.find_micro_batch_size(RAW, 1024, 0, 512, runtime)


def test_on_a_cpu_a_micro_batch_has_at_most_4096_tokens(monkeypatch):
    runtime, tried = card(monkeypatch, 0, kind="cpu")
    assert memory.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 4 and tried == []
    assert memory.find_micro_batch_size(RAW, 8192, 0, 512, runtime) == 1


def test_a_try_leaves_the_weights_bitwise_as_they_are():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runtime = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))
    assert memory.fits(model, 8, 2, runtime)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_out_of_memory_is_no_error_but_an_answer():
    class Full(torch.nn.Linear):
        config = SimpleNamespace(block_size=8)

        def forward(self, idx, targets):
            raise torch.OutOfMemoryError("CUDA out of memory")
    runtime = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))
    assert not memory.fits(Full(2, 2), 8, 2, runtime)


@pytest.mark.parametrize("kind", ["full", "lora", "balanced", "head"])
def test_a_try_of_fine_tuning_leaves_weights_and_what_is_frozen(kind):
    model = GPT(GPTConfig(block_size=1024, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    if kind in ("balanced", "head"):
        model = Classifier.from_gpt(model, ["a", "b"])
    if kind == "head":
        model.requires_grad_(False).score.requires_grad_(True)
    if kind == "lora":
        add_adapter(model, 2, 4, 0.0, "base")
    objective = Objective(model, "score" if hasattr(model, "score") else "lm_head",
                          torch.ones(2) if kind == "balanced" else None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = [not p.requires_grad for p in model.parameters()]
    runtime = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.float16))
    assert memory.fits(objective, 1024, 64, runtime)      # 65,536 targets: their sum is beyond fp16
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert frozen == [not p.requires_grad for p in model.parameters()]
