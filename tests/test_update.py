"""update.py: what an update does, and what a skipped one means. That it is skipped on all ranks: test_policies.py."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exactgpt.config import RunFailed
from exactgpt.device import Hardware
from exactgpt.distributed import Runtime
from exactgpt.optimizer import MAX_SKIPPED, Skipped, StepResult, make_optimizer, update
from model import GPT, GPTConfig

RUNTIME = Runtime(0, 0, 1, torch.device("cpu"), Hardware("cpu"), "fp32")


def trained(name):
    """A model and its optimizer after one update, gradients there for the next; always the same."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    config = SimpleNamespace(optimizer=name, max_lr=1e-2, beta1=0.9, beta2=0.95, adam_eps=1e-8, weight_decay=0.1,
                             muon_lr=0.02, muon_weight_decay=0.01)
    optimizer = make_optimizer(model, config, RUNTIME)
    x = torch.randint(64, (2, 8))
    for _ in range(2):
        optimizer.step()             # the first time without gradients: it does nothing
        model(x, x).backward()
    return model, optimizer


def updated(model, optimizer, loss=2.0, scaler=None):
    return update(model, optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False), 1.0, torch.tensor(loss),
                  RUNTIME)


def state(model, optimizer):
    """Weights and the optimizer's state, as they are now."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_is_clipping_and_the_optimizers_step(name):
    (model, optimizer), (twin, other) = trained(name), trained(name)
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    other.step()
    assert updated(model, optimizer) == StepResult(2.0, norm.item(), True, False) and norm > 1
    torch.testing.assert_close(state(model, optimizer), state(twin, other), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_skipped_update_leaves_every_bit_as_it_was(name, bad):
    model, optimizer = trained(name)
    before = state(model, optimizer)
    if bad == "gradient":
        model.transformer.ln_f.weight.grad[0] = math.inf
    result = updated(model, optimizer, math.nan if bad == "loss" else 2.0)
    assert not result.finite and not hasattr(optimizer, "found_inf")       # which would skip whoever steps next
    torch.testing.assert_close(state(model, optimizer), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    x = torch.zeros(2, 8, dtype=torch.long)
    model(x, x).backward()
    assert updated(model, optimizer).finite                 # and the next one is made
    assert any(not torch.equal(v, before[0][k]) for k, v in model.state_dict().items())


class Watch(TorchDispatchMode):
    """Records AdamW's kernel and each time that a number is read from the device or copied to it."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("_fused_adamw_", "_local_scalar_dense", "lift_fresh", "item"):
            self.seen.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def test_nothing_is_read_from_the_card_before_the_update_is_launched(monkeypatch):
    """It would idle meanwhile; AdamW's kernel itself looks whether to skip."""
    model, optimizer = trained("adamw")
    seen = []
    monkeypatch.setattr(Runtime, "read", lambda self, tensor: seen.append("read") or tensor.tolist())
    loss, scaler = torch.tensor(2.0), torch.amp.GradScaler("cpu", enabled=False)
    with Watch(seen):
        update(model, optimizer, scaler, 1.0, loss, RUNTIME)
    assert seen == ["_fused_adamw_", "_fused_adamw_", "read"]       # of matrices, of vectors


def test_the_search_for_a_loss_scale_is_no_row_of_bad_steps():
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 2.0)
    bad, good = StepResult(2.0, float("inf"), False, False), StepResult(2.0, 1.0, True, False)
    skipped = Skipped()
    for _ in range(3 * MAX_SKIPPED):
        assert "loss scale" in skipped.count(bad, scaler)
    skipped.check()
    assert skipped.count(good, scaler) == ""
    for _ in range(MAX_SKIPPED - 1):
        assert "not finite" in skipped.count(bad, scaler)
    skipped.check()
    skipped.count(bad, scaler)
    with pytest.raises(RunFailed, match="steps in a row"):
        skipped.check()
