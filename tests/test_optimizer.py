"""optimizer.py: AdamW's and Muon's shares of the parameters and arithmetic, the end of a step, learning rates by hand.

That a step is skipped on all ranks: test_policies.py.
"""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exactgpt.config import RunFailed
from exactgpt.distributed import Runtime
from exactgpt.muon import Muon, OptimizerPair, newton_schulz
from exactgpt.optimizer import (
    MAX_SKIPPED,
    SkippedSteps,
    StepResult,
    decay_start,
    finish_step,
    learning_rate_factor,
    make_optimizer,
)
from model import GPT, GPTConfig
from tests.common import cpu_runtime
from train import Plan

# -----------------------------------------------------------------------------
# AdamW and Muon


def config(**changes):
    defaults = dict(optimizer="muon", max_lr=1e-3, muon_lr=0.02, muon_weight_decay=0.01, weight_decay=0.1, beta1=0.9,
                    beta2=0.95, adam_eps=1e-8)
    return SimpleNamespace(**{**defaults, **changes})


def runtime(rank=0, world_size=1):
    return SimpleNamespace(rank=rank, world_size=world_size, dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_is_torch_optim_muon_on_one_matrix(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = Muon([ours], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
                                 adjust_lr_fn="original")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, start, atol=1e-2)


def test_queries_keys_and_values_are_orthogonalised_apart():
    torch.manual_seed(0)
    start = torch.randn(96, 32)
    joint = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(p.clone()) for p in start.chunk(3)]
    joint.grad = torch.randn(96, 32)
    for part, grad in zip(parts, joint.grad.chunk(3)):
        part.grad = grad.clone()
    Muon([joint], pieces={joint: 3}).step()
    Muon(parts).step()
    assert torch.equal(joint.detach(), torch.cat([p.detach() for p in parts]))


def test_newton_schulz_moves_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 40, 24), 5, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(torch.ones(1, 2, 2) + torch.eye(2), full_matrices=False)
    near = newton_schulz(torch.ones(1, 2, 2) + torch.eye(2), 5, torch.float32)
    assert torch.allclose(near, u @ v, atol=0.4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(name):
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=8))
    optimizer = make_optimizer(model, config(optimizer=name), runtime())
    covered = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(covered) == len(set(map(id, covered))) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() < 2) == (group["weight_decay"] == 0) for p in group["params"])
        assert group["peak_lr"] in (1e-3, 0.02)
    if name == "muon":
        muons = {id(p) for g in optimizer.param_groups if g["peak_lr"] == 0.02 for p in g["params"]}
        assert muons == {id(p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}


def test_adamw_follows_its_formula_with_the_rates_of_the_flags():
    """Decoupled weight decay, arXiv:1711.05101, in double precision."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    flags = config(optimizer="adamw", max_lr=0.05, beta1=0.6, beta2=0.7, adam_eps=0.3, weight_decay=0.4)
    optimizer = make_optimizer(layer, flags, runtime())
    expected = {name: p.detach().double() for name, p in layer.named_parameters()}
    means, squares = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for t in range(1, 4):
        for name, p in layer.named_parameters():
            p.grad = torch.randn(p.shape)
            gradient, decay = p.grad.double(), 0.4 if name == "weight" else 0.0
            means[name] = 0.6 * means[name] + 0.4 * gradient
            squares[name] = 0.7 * squares[name] + 0.3 * gradient ** 2
            direction = means[name] / (1 - 0.6 ** t) / ((squares[name] / (1 - 0.7 ** t)).sqrt() + 0.3)
            expected[name] = expected[name] * (1 - 0.05 * decay) - 0.05 * direction
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_pair_saves_and_restores_both_states():
    torch.manual_seed(0)
    models = [GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pairs = [make_optimizer(m, config(), runtime()) for m in models]
    assert isinstance(pairs[0], OptimizerPair)

    def step(model, pair, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        pair.step()
        pair.zero_grad()
    step(models[0], pairs[0], 1)
    models[1].load_state_dict(models[0].state_dict())
    pairs[1].load_state_dict(copy.deepcopy(pairs[0].state_dict()))   # as a file gives it
    for model, pair in zip(models, pairs):
        step(model, pair, 2)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))


# -----------------------------------------------------------------------------
# the end of a step

RUNTIME = cpu_runtime()


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
    return finish_step(model, optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False), 1.0, torch.tensor(loss),
                  RUNTIME)


def state(model, optimizer):
    """Weights and the optimizer's state, as they are now."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_is_clipping_and_the_optimizers_step(name):
    (model, optimizer), (twin, other) = trained(name), trained(name)
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    other.step()
    assert updated(model, optimizer) == StepResult(2.0, norm.item(), True) and norm > 1
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scaled_gradients_are_clipped_and_applied_as_if_they_had_never_been_scaled(name):
    """In fp16 gradients come 1024 times too large here. Clipped like that, they would shrink to nothing."""
    (model, optimizer), (twin, other) = trained(name), trained(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))                           # as the backward pass would have begun
    for p in model.parameters():
        p.grad.mul_(1024)
    assert updated(model, optimizer, scaler=scaler) == updated(twin, other)
    torch.testing.assert_close(state(model, optimizer), state(twin, other), rtol=0, atol=0)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    before = state(model, optimizer)
    assert not updated(model, optimizer, scaler=scaler).finite and scaler.get_scale() == 512
    torch.testing.assert_close(state(model, optimizer), before, rtol=0, atol=0)


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
        finish_step(model, optimizer, scaler, 1.0, loss, RUNTIME)
    assert seen == ["_fused_adamw_", "_fused_adamw_", "read"]       # of matrices, of vectors


def test_the_search_for_a_loss_scale_is_no_row_of_bad_steps():
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 2.0)
    bad, good = StepResult(2.0, float("inf"), False), StepResult(2.0, 1.0, True)
    skipped = SkippedSteps()
    for _ in range(3 * MAX_SKIPPED):
        assert "loss scale" in skipped.record(bad, scaler)
    skipped.check()
    assert skipped.record(good, scaler) == ""
    for _ in range(MAX_SKIPPED - 1):
        assert "not finite" in skipped.record(bad, scaler)
    skipped.check()
    skipped.record(bad, scaler)
    with pytest.raises(RunFailed, match="steps in a row"):
        skipped.check()


def test_skipped_updates_with_a_good_one_between_them_do_not_end_a_run():
    scaler, skipped = SimpleNamespace(is_enabled=lambda: False), SkippedSteps()
    for _ in range(3):
        for _ in range(MAX_SKIPPED - 1):
            skipped.record(StepResult(2.0, float("nan"), False), scaler)
            skipped.check()
        assert skipped.record(StepResult(2.0, 1.0, True), scaler) == ""


# -----------------------------------------------------------------------------
# learning rates

def schedule(max_steps, warmup_steps):
    return Plan(max_steps, warmup_steps, 8, 8, 128, 1.0)


def rate(step, max_steps=19073, warmup_steps=715, kind="cosine", max_lr=6e-4, min_lr=6e-5):
    return max_lr * learning_rate_factor(step, schedule(max_steps, warmup_steps), kind, min_lr / max_lr)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("step, shown", [(0, "6.00e-07"), (100, "6.06e-05"), (500, "3.01e-04"), (999, "6.00e-04")])
def test_the_warm_up_is_the_second_seed_projects_table(kind, step, shown):
    assert f"{rate(step, warmup_steps=1000, kind=kind):.2e}" == shown


@pytest.mark.parametrize("step, expected", [
    (715, 6e-4),                                                    # the peak, where the cosine begins
    (715 + 9179, 6e-5 + 0.5 * 5.4e-4),                              # half way: the mean of both ends
    (715 + 9179 // 2, 6e-5 + 0.5 * (1 + math.cos(math.pi * 4589 / 18358)) * 5.4e-4),
    (19073, 6e-5), (25000, 6e-5),
])
def test_cosine_goes_from_peak_to_min_lr(step, expected):
    assert rate(step) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("step, expected", [
    (9, 1.0), (10, 1.0), (69, 1.0), (70, 1.0), (71, 1 - 0.9 / 30), (85, 0.55), (99, 1 - 0.9 * 29 / 30), (100, 0.1),
    (120, 0.1),
])
def test_wsd_is_constant_and_then_linear_over_the_last_three_tenths(step, expected):
    assert learning_rate_factor(step, schedule(100, 10), "wsd", 0.1) == pytest.approx(expected, rel=1e-12)


def test_decay_begins_after_the_warm_up_at_the_earliest():
    assert decay_start(schedule(100, 10)) == 70 and decay_start(schedule(100, 90)) == 90
    assert decay_start(schedule(0, 0)) == 0


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("max_steps, warmup_steps", [(0, 0), (1, 0), (1, 1), (10, 10), (10, 0), (1000, 715)])
def test_the_rate_rises_to_its_peak_and_never_again(kind, max_steps, warmup_steps):
    factors = [learning_rate_factor(s, schedule(max_steps, warmup_steps), kind, 0.1) for s in range(max_steps + 1)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    if warmup_steps < max_steps > 1:
        assert factors[warmup_steps] == 1 and factors[-1] == pytest.approx(0.1)
