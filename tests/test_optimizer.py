"""AdamW's and Muon's shares of the parameters, and Muon's arithmetic against torch's own."""
import copy
from types import SimpleNamespace

import pytest
import torch

from exactgpt.optimizer import Muon, OptimizerPair, make_optimizer, newton_schulz
from model import GPT, GPTConfig


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


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.ones(3))])
