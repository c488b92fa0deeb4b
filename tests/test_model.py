"""model.py against transformers' GPT-2, NumPy, and hand-computed numbers."""
import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exactgpt.generation import KVCache
from exactgpt.optimizer import parameter_groups
from model import GPT, GPT2_SIZES, IGNORED, MLP, CausalSelfAttention, GPTConfig, padded_vocab
from tests.common import gpt_from_transformers, in_our_layout

TINY = dict(block_size=32, vocab_size=65, n_layer=2, n_head=3, n_embd=24)
PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


def random_model(**options):
    """A tiny GPT with weights large enough that every path shows in the output."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **options}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def random_ids(*shape, vocab=65, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, x, y, seed=0):
    """(loss, {name: gradient}) of one forward and backward pass whose dropout is seeded."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(x, y)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_each_size_has_as_many_parameters_as_openais(size):
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = GPT2_SIZES[size]
    with torch.device("meta"):
        ours, theirs = GPT(GPTConfig(vocab_size=50257, **shape)), GPT2LMHeadModel(GPT2Config(**shape))
    assert ours.n_params() == PARAMETERS[size] == theirs.num_parameters()


def test_flops_per_token_are_those_of_the_palm_formula():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.flops_per_token() == 6 * 124_439_808 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("theirs_has, activation", [
    ({}, "gelu_tanh"),
    (dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3), "gelu_tanh"),
    (dict(activation_function="gelu"), "gelu"),
    (dict(activation_function="relu", n_head=1), "relu"),
], ids=["gpt2", "untied, another epsilon", "exact gelu", "relu, one head"])
def test_logits_loss_and_every_gradient_agree_with_transformers(tiny_gpt2, theirs_has, activation):
    theirs = tiny_gpt2(**theirs_has)
    ours = gpt_from_transformers(theirs, activation)
    ids = random_ids(3, 33)
    x, y = ids[:, :-1], ids[:, 1:]
    logits = theirs(x).logits
    loss = F.cross_entropy(logits.reshape(-1, 65), y.reshape(-1))
    loss.backward()
    torch.testing.assert_close(ours(x), logits, atol=1e-4, rtol=1e-4)
    our_loss, grads = gradients(ours, x, y)
    assert our_loss == pytest.approx(loss.item(), abs=1e-5)
    for name, grad in grads.items():
        expected = in_our_layout(theirs, name, theirs.get_parameter(name).grad)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_attention_equals_a_loop_over_heads_queries_and_keys():
    torch.manual_seed(0)
    layer = CausalSelfAttention(GPTConfig(**{**TINY, "n_head": 2, "n_embd": 6})).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    w, b = layer.c_attn.weight.detach().numpy(), layer.c_attn.bias.detach().numpy()
    q, k, v = np.split(x[0].numpy() @ w.T + b, 3, axis=1)
    expected = np.zeros((5, 6))
    for head in (slice(0, 3), slice(3, 6)):
        for t in range(5):
            scores = np.array([q[t, head] @ k[s, head] / math.sqrt(3) for s in range(t + 1)])
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[t, head] = sum(weight * v[s, head] for s, weight in enumerate(weights))
    expected = expected @ layer.c_proj.weight.detach().numpy().T + layer.c_proj.bias.detach().numpy()
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, atol=1e-12)


def test_the_default_activation_is_the_tanh_gelu_of_gpt2():
    mlp = MLP(GPTConfig(**TINY)).double()
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    tanh_gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    torch.testing.assert_close(mlp.activation(x), tanh_gelu, atol=1e-12, rtol=0)
    assert (mlp.activation(x) - F.gelu(x)).abs().max() > 1e-4   # the exact one (nanoGPT's defect) is another function


def test_future_tokens_do_not_change_the_past():
    model, x = random_model(), random_ids(1, 20)
    changed = x.clone()
    changed[0, 11] = (x[0, 11] + 1) % 65
    before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(before[:11], after[:11], atol=0, rtol=0)
    assert ((before[11:] - after[11:]).abs().amax(dim=1) > 1e-3).all()


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=2, n_embd=128, tie_word_embeddings=False))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
        else:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name


def test_the_first_loss_of_a_fresh_model_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 1024}))
    ids = random_ids(8, 33, vocab=1024)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(1024), abs=0.05)


def test_the_output_layer_is_the_token_embedding_unless_untied():
    tied, untied = GPT(GPTConfig(**TINY)), GPT(GPTConfig(**TINY, tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.n_params() - tied.n_params() == 65 * 24
    reread = GPT.from_state(tied.config_dict(), tied.state_dict())
    assert reread.lm_head.weight is reread.transformer.wte.weight


def test_dropout_works_in_training_only():
    model, x = random_model(dropout=0.3), random_ids(2, 16)
    without = random_model(dropout=0.0)
    torch.testing.assert_close(model(x), without(x), atol=0, rtol=0)
    model.train()
    assert not torch.allclose(model(x), model(x))
    torch.testing.assert_close(without.train()(x), without.eval()(x), atol=0, rtol=0)


def test_dropout_stands_at_gpt2s_places():
    """Embeddings, attention weights, and both residual branches: with rate p each zeroes about p of its elements."""
    torch.manual_seed(0)
    config = GPTConfig(**{**TINY, "block_size": 512}, dropout=0.25)
    x = torch.randn(1, 512, 24)
    for branch in (MLP(config).train(), CausalSelfAttention(config).train()):
        assert (branch(x) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    attention = CausalSelfAttention(config).train()
    with torch.no_grad():
        torch.nn.init.eye_(attention.c_proj.weight)
        attention.c_proj.bias.zero_()
        attention.c_attn.weight.zero_()
        attention.c_attn.bias[48:] = 1.0                             # every value is 1: outputs are sums of weights
    y = attention(x)[0]
    first = y[0][y[0] != 0] / (4 / 3)                                # a token that sees only itself: weight 0 or 4/3
    torch.testing.assert_close(first, torch.full_like(first, 4 / 3))
    model = GPT(config).train()
    seen = []
    model.transformer.h[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model(random_ids(1, 512))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_blocks_gives_the_same_gradients(dropout):
    model, x, y = random_model(dropout=dropout).train(), random_ids(2, 16), random_ids(2, 16, seed=1)
    loss, kept = gradients(model, x, y)
    model.recompute = True
    calls = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed_loss, recomputed = gradients(model, x, y)
    assert len(calls) == 2                                          # forward, and again in the backward pass
    assert recomputed_loss == loss
    for name, grad in kept.items():
        torch.testing.assert_close(recomputed[name], grad, atol=0, rtol=0)


def test_recomputing_blocks_keeps_packed_rows_apart():
    model, x, y = random_model().train(), random_ids(1, 12), random_ids(1, 12, seed=1)
    row = torch.tensor([0] * 5 + [1] * 7)
    mask = (row[:, None] == row[None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(x, y, attn_mask=mask).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_ragged_rows_read_through_a_kv_cache_give_the_uncached_logits():
    model = random_model()
    rows, lengths = random_ids(3, 32), torch.tensor([9, 1, 4])
    cache = KVCache(model, 3, 32)
    prompts = torch.full((3, 9), 64)                                # right-padded with rubbish
    for i, n in enumerate(lengths):
        prompts[i, :n] = rows[i, :n]
    with torch.no_grad():
        logits = model(prompts, cache=cache)
        cache.lengths += lengths
        for i, n in enumerate(lengths):
            torch.testing.assert_close(logits[i, n - 1], model(rows[i:i + 1, :n])[0, -1], atol=1e-5, rtol=1e-5)
        for _ in range(32 - 9):
            new = rows[torch.arange(3), cache.lengths][:, None]
            logits = model(new, cache=cache)[:, 0]
            cache.lengths += 1
            for i, n in enumerate(cache.lengths):
                torch.testing.assert_close(logits[i], model(rows[i:i + 1, :n])[0, -1], atol=1e-5, rtol=1e-5)


def test_rows_packed_with_positions_and_mask_equal_separate_rows():
    model, a, b = random_model(), random_ids(1, 5), random_ids(1, 7, seed=1)
    row = torch.tensor([0] * 5 + [1] * 7)
    mask = (row[:, None] == row[None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    packed = model(torch.cat([a, b], dim=1), positions=positions, attn_mask=mask)
    torch.testing.assert_close(packed, torch.cat([model(a), model(b)], dim=1), atol=1e-5, rtol=1e-5)


def test_ignored_targets_do_not_count():
    model, x, y = random_model(), random_ids(2, 8), random_ids(2, 8, seed=1)
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    masked = y.clone()
    masked[0, 3:], masked[1, 0] = IGNORED, IGNORED
    counted = masked != IGNORED
    torch.testing.assert_close(model(x, masked), each[counted].mean())
    torch.testing.assert_close(model(x, masked, reduction="sum"), each[counted].sum())
    torch.testing.assert_close(model(x, masked, reduction="none"), each * counted)
    assert model(x, torch.full_like(y, IGNORED), reduction="sum").item() == 0


def test_the_loss_is_fp32_under_bf16_autocast():
    model, x, y = random_model(), random_ids(2, 8), random_ids(2, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(x), model(x, y)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), atol=1e-6, rtol=0)


def test_cropping_the_block_size_keeps_the_rest_of_the_model():
    model, x = random_model(), random_ids(1, 10)
    before = model(x)
    model.crop_block_size(10)
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)
    assert model.config.block_size == 10 and model.transformer.wpe.weight.requires_grad
    torch.testing.assert_close(GPT.from_state(model.config_dict(), model.state_dict())(x), before, atol=0, rtol=0)
    with pytest.raises(ValueError, match="11 tokens do not fit block_size 10"):
        model(random_ids(1, 11))
    with pytest.raises(ValueError, match="block_size 11"):
        model.crop_block_size(11)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups_hold_every_parameter_once(tied):
    model = GPT(GPTConfig(**TINY, tie_word_embeddings=tied))
    decay, no_decay = parameter_groups(model, 0.1)
    grouped = [id(p) for group in (decay, no_decay) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("ln_" not in names[id(p)] and names[id(p)].endswith("weight") for p in decay["params"])
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in no_decay["params"])
    model.transformer.wpe.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.1)[0]["params"]) == len(decay["params"]) - 1


@pytest.mark.parametrize("change, message", [
    (dict(n_head=5), r"n_embd \(24\) must be a multiple of n_head \(5\)"),
    (dict(n_layer=0), "n_layer must be a whole number above 0, but is 0"),
    (dict(vocab_size=-1), "vocab_size"), (dict(block_size="8"), "block_size"), (dict(n_embd=2.0), "n_embd"),
    (dict(n_head=True), "n_head"), (dict(dropout=1.0), "dropout must be >= 0 and < 1"), (dict(dropout=-0.1), "dropout"),
    (dict(dropout=math.nan), "dropout"), (dict(dropout="0"), "dropout"),
    (dict(activation="swish"), "activation must be one of gelu_tanh, gelu, relu"),
])
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **change})


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize("change, message", [
    (lambda s: without(s, "transformer.h.1.mlp.c_fc.bias"), "missing weight transformer.h.1.mlp.c_fc.bias"),
    (lambda s: without(s, "transformer.wte.weight"), "missing weight"),
    (lambda s: {**s, "transformer.h.2.ln_1.weight": torch.ones(24)}, "unknown weight transformer.h.2.ln_1.weight"),
    (lambda s: {**s, "transformer.wpe.weight": torch.ones(16, 24)}, r"shape \(16, 24\), expected \(32, 24\)"),
    (lambda s: {**s, "transformer.wpe.weight": [1.0]}, "missing weight transformer.wpe.weight"),
    (lambda s: {**s, "transformer.wpe.weight": torch.ones(32, 24, dtype=torch.int64)}, "wpe.weight holds int64"),
])
def test_a_state_that_does_not_fit_is_named(change, message):
    model = GPT(GPTConfig(**TINY))
    with pytest.raises(ValueError, match=message):
        GPT.from_state(model.config_dict(), change(dict(model.state_dict())))


def test_a_dict_that_is_no_config_is_named():
    with pytest.raises(ValueError, match="not a GPT-2 config"):
        GPT.from_state(dict(TINY, rope=True), {})


def test_a_model_from_a_state_trains():
    source = random_model()
    model = GPT.from_state(source.config_dict(), copy.deepcopy(source.state_dict()))
    assert all(p.requires_grad for p in model.parameters())
    loss, grads = gradients(model, random_ids(2, 8), random_ids(2, 8, seed=1))
    assert loss > 0 and all(g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize("n, rows", [(1, 64), (64, 64), (65, 128), (50257, 50304), (50304, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(n, rows):
    assert padded_vocab(n) == rows
