"""generation.py: text does not depend on the cache or the batch, and samples follow the model's distribution."""
import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from exactgpt import generation
from exactgpt.generation import Decoder, generate, generate_ids, pack_linears, prefill, sample, write_samples
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer
from model import GPT, GPTConfig
from tests.common import cpu_runtime, gpt_from_transformers

RAGGED = [[5, 7, 11], [3], [60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [5, 7, 11, 13]]


@pytest.fixture
def model(tiny_gpt2):
    """A GPT with varied greedy output: 65 tokens, block_size 32."""
    return gpt_from_transformers(tiny_gpt2(tie_word_embeddings=False))


def generated_ids(model, prompts, **options):
    """Return the ids that generate_ids yields for each prompt."""
    rows = [[] for _ in prompts]
    for step in generate_ids(model, prompts, **{"n_vocab": 65, "max_tokens": 80, "temperature": 0, **options}):
        assert len(step) == len(prompts)
        for row, token in zip(rows, step):
            row.append(token)
    return rows


@torch.no_grad()
def uncached(model, prompt, max_tokens):
    """Decode greedily without a cache: read the whole window for each token, cropped as generate_ids crops it."""
    block_size, tokens = model.config.block_size, []
    window = list(prompt)[-block_size:]
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        if len(window) == block_size:
            window = window[block_size - block_size // 2:]
        window.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("prompts", [RAGGED[:1], RAGGED[1:2], RAGGED[:3], RAGGED, [RAGGED[0]] * 3], ids=len)
def test_cached_greedy_decoding_equals_uncached_beyond_a_full_window(model, prompts):
    expected = [uncached(model, p, 80) for p in prompts]            # 80 new tokens: the window is full three times
    assert all(len(set(row)) > 8 for row in expected)
    assert generated_ids(model, prompts) == expected


@pytest.mark.parametrize("length", [15, 16, 31, 32, 33, 70])
def test_prompts_near_and_beyond_the_window_length_decode_as_uncached(model, length):
    prompts = [[(7 * i + 3) % 65 for i in range(length)], [1, 2]]
    assert generated_ids(model, prompts) == [uncached(model, p, 80) for p in prompts]


def test_a_row_does_not_depend_on_the_rest_of_the_batch(model):
    alone = [generated_ids(model, [p])[0] for p in RAGGED]
    assert generated_ids(model, RAGGED) == alone
    assert generated_ids(model, RAGGED[::-1]) == alone[::-1]


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_work(block_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, 65, 1, 1, 8)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
        model.transformer.wte.weight.normal_()
    assert generated_ids(model, [[3], [4, 5]], max_tokens=9) == [uncached(model, p, 9) for p in ([3], [4, 5])]


def test_greedy_text_equals_transformers_generate(tiny_gpt2):
    theirs = tiny_gpt2(tie_word_embeddings=False)
    ids = torch.tensor([[5, 7, 11, 13], [60, 2, 3, 4]])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=28,
                               pad_token_id=0)
    assert expected.shape == (2, 32)
    assert generated_ids(gpt_from_transformers(theirs), ids.tolist(), max_tokens=28) == expected[:, 4:].tolist()


def test_the_trained_gpt_nano_sorts_as_it_does_in_transformers(gpt_nano):
    from transformers import GPT2LMHeadModel
    theirs, ours = GPT2LMHeadModel.from_pretrained(gpt_nano), open_model(gpt_nano).model.eval()
    for prompt in ([2, 1, 0, 2, 1, 0], [0, 2, 2, 1, 0, 2], [1, 1, 2, 0, 0, 1]):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                                   eos_token_id=None, pad_token_id=0)[0, 6:].tolist()
        assert generated_ids(ours, [prompt], n_vocab=3, max_tokens=6)[0] == expected == sorted(prompt)


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (2.0, 0, 1.0), (5.0, 0, 1.0), (4.0, 5, 1.0), (3.0, 65, 1.0), (3.0, 1000, 1.0), (5.0, 0, 0.7), (9.0, 20, 0.8),
    (9.0, 0, 0.999),
])
def test_samples_follow_the_models_distribution(model, temperature, top_k, top_p):
    n = 20_000
    with torch.no_grad():
        logits = model(torch.tensor([[5, 7, 11]]))[0, -1].double() / temperature
    likeliest = logits.argsort(descending=True)[:top_k or None]
    p = torch.softmax(logits[likeliest], dim=0)
    n_kept = next(i for i in range(1, len(p) + 1) if i == len(p) or p[:i].sum() >= top_p)   # the fewest that reach it
    expected = torch.zeros(65, dtype=torch.double)
    expected[likeliest[:n_kept]] = n * p[:n_kept] / p[:n_kept].sum()
    tokens = generated_ids(model, [[5, 7, 11]] * n, max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(torch.tensor(tokens)[:, 0], minlength=65)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    chi_square, df = ((counts - expected) ** 2 / expected)[often].sum().item(), int(often.sum()) - 1
    assert df >= 4 and chi_square < df + 4 * (2 * df) ** 0.5         # beyond it: once in some ten thousand


def test_top_k_and_top_p_have_a_threshold_for_each_row():
    logits = torch.stack([torch.arange(10.0), 100 - torch.arange(10.0), torch.zeros(10)])
    noise = torch.empty(300, 3, 3).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([sample(logits, n, temperature=5.0) for n in noise])
    assert set(drawn[:, 0].tolist()) == {7, 8, 9} and set(drawn[:, 1].tolist()) == {0, 1, 2}
    assert (sample(logits, noise[0, :, :1])[:2] == torch.tensor([9, 0])).all()
    noise = torch.empty(300, 3, 10).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([sample(logits, n, top_p=0.7) for n in noise])
    assert set(drawn[:, 0].tolist()) == {8, 9} and len(set(drawn[:, 2].tolist())) in (7, 8)   # 0.63 + 0.23; 0.1 each
    assert (sample(logits, noise[0], top_p=1e-9)[:2] == torch.tensor([9, 0])).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 9e-6, 1e-30, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest_and_never_divides_to_nan(model, temperature):
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    assert generated_ids(model, RAGGED, temperature=temperature, top_k=0) == generated_ids(model, RAGGED)


def test_temperature_0_is_greedy_whatever_top_k_and_seed(model):
    expected = generated_ids(model, RAGGED)
    for top_k, seed in ((0, 1), (1, 2), (50, 3)):
        assert generated_ids(model, RAGGED, top_k=top_k, seed=seed) == expected
    assert generated_ids(model, RAGGED, temperature=1.0, top_k=1) == expected


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=0), dict(top_k=5), dict(temperature=9.0)], ids=str)
def test_ids_of_vocabulary_padding_are_never_sampled(options):
    model = GPT(GPTConfig(32, 128, 1, 2, 8, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[65:] = 1000.0
        assert (model(torch.tensor([[1, 2]]))[0, -1].argsort(descending=True)[:63] >= 65).all()
    rows = generated_ids(model, RAGGED, **{"temperature": 1.0, **options})
    assert all(0 <= token < 65 for row in rows for token in row)


def test_a_seed_gives_the_same_text_and_keeps_the_state_of_torchs_generator(model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generated_ids(model, RAGGED, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)                 # sampling must not disturb training
    torch.manual_seed(6)
    assert generated_ids(model, RAGGED, temperature=1.0, seed=1) == first
    assert generated_ids(model, RAGGED, temperature=1.0, seed=2) != first
    assert generated_ids(model, RAGGED, temperature=1.0, seed=(1, 250)) != first   # train.py: (seed, step)


def test_the_samples_of_a_run_are_other_ones_at_each_step_and_the_same_for_a_seed():
    tokenizer = Tokenizer([], "bytes")
    torch.manual_seed(0)
    run = SimpleNamespace(raw_model=GPT(GPTConfig(32, 320, 1, 2, 16)), tokenizer=tokenizer)
    texts = [write_samples(run, SimpleNamespace(seed=seed), cpu_runtime(), step)
             for seed, step in ((3, 0), (3, 250), (4, 0), (3, 0))]
    assert run.raw_model.training
    assert texts[0] == texts[3] and texts[0] not in texts[1:3] and texts[1] != texts[2]
    expected, _ = generate(run.raw_model.eval(), tokenizer, generation.SAMPLE_PROMPTS, max_tokens=48, seed=(3, 250))
    assert texts[1] == expected
    assert write_samples(run, SimpleNamespace(seed=3), SimpleNamespace(is_main=False), 0) == []


def test_equal_prompts_get_different_continuations(model):
    rows = generated_ids(model, [RAGGED[0]] * 4, temperature=1.0)
    assert len({tuple(row) for row in rows}) == 4


def test_a_row_ends_before_end_of_text_and_the_batch_when_all_rows_have(model):
    prompts = [RAGGED[0], RAGGED[2]]
    free = generated_ids(model, prompts)
    eot = free[0][5]
    ends = [row.index(eot) if eot in row else 80 for row in free]
    rows = generated_ids(model, prompts, eot=eot)
    assert ends[0] <= 5 and len(rows[0]) == min(80, max(ends) + 1)
    for row, end, unstopped in zip(rows, ends, free):
        assert row[:end] == unstopped[:end] and all(token is None for token in row[end:])
    assert generated_ids(model, prompts[:1], eot=eot)[0] == free[0][:ends[0]] + [None]


def test_gradients_are_off_while_decoding_and_on_between_tokens(model):
    inside = []
    model.transformer.ln_f.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    for _ in generate_ids(model, [[1]], n_vocab=65, max_tokens=3):
        assert torch.is_grad_enabled()
    assert inside == [False] * 3


def test_an_fp32_model_generates_under_bf16_autocast(model):
    """As train.py does for its samples: the cache is fp32, keys and values arrive in bf16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = generated_ids(model, RAGGED, max_tokens=40)
    assert all(len(row) == 40 for row in rows)
    in_fp32 = generated_ids(model, RAGGED, max_tokens=40)
    assert sum(a[0] == b[0] for a, b in zip(rows, in_fp32)) >= 3


def test_equal_prompts_are_prefilled_once(model):
    read = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    generated_ids(model, [RAGGED[0]] * 4 + [RAGGED[1]] * 3, max_tokens=3)
    assert read == [(2, 3), (7, 1), (7, 1)]


def test_generation_does_not_change_an_uncached_forward_pass(model):
    ids = torch.tensor([RAGGED[2]])
    with torch.no_grad():
        before = model(ids)
        generated_ids(model, RAGGED)
        assert torch.equal(model(ids), before)


def test_a_decoder_starts_fresh_after_an_abandoned_call(model):
    decoder, calls = Decoder(model), [(RAGGED, {}), (RAGGED[:2], {}), (RAGGED[2:], {}), (RAGGED[:2], dict(seed=3))]
    for prompts, options in calls:
        options = dict(temperature=1.0, max_tokens=20, **options)
        abandoned = generate_ids(decoder, prompts, n_vocab=65, **options)
        next(abandoned), next(abandoned)
        assert generated_ids(decoder, prompts, **options) == generated_ids(model, prompts, **options)


@pytest.fixture
def no_collector():
    """Turn off the garbage collector, so that reference cycles stay alive."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_dropped_cache_frees_its_memory_at_once(model, no_collector):
    cache = generation.KVCache(model, 2, 32)
    with torch.no_grad():
        prefill(model, cache, [0, 1], RAGGED[:2])
        model(torch.tensor([[3], [4]]), cache=cache)
    dropped = [weakref.ref(part) for part in (cache, cache.layers[0], cache.layers[0].k, cache.lengths)]
    del cache
    assert [part() for part in dropped] == [None] * 4


def test_caches_are_freed_without_the_garbage_collector(model, no_collector, monkeypatch):
    made, begin = [], generation.KVCache.begin
    monkeypatch.setattr(generation.KVCache, "begin",
                        lambda cache, T: made.append(weakref.ref(cache)) or begin(cache, T))
    generated_ids(model, RAGGED, max_tokens=3)
    assert len(made) == 3 and not any(cache() for cache in made)


def test_prefill_avoids_cudnn_which_plans_for_each_length(model, monkeypatch):
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watch(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    generated_ids(model, RAGGED, max_tokens=3)
    generation.top_next_tokens(model, RAGGED[0], 65)
    assert seen == [False] * 4 and torch.backends.cuda.cudnn_sdp_enabled()       # two layers, twice


def test_tokens_read_one_step_late_are_the_same(model, monkeypatch):
    """A GPU's tokens are read in this order, which gives it work while they are shown; beyond a full window."""
    expected, decoder, events = generated_ids(model, RAGGED), Decoder(model), []
    decoder.n_ahead = 1
    assert generated_ids(decoder, RAGGED) == expected
    monkeypatch.setattr(decoder, "decode_one_token", lambda *logits: (
        events.append("step") or Decoder.decode_one_token(decoder, *logits)))
    for _ in generate_ids(decoder, [[5]], n_vocab=65, max_tokens=4, temperature=0):
        events.append("shown")
    assert events == ["step", "step", "shown", "step", "shown", "step", "shown", "shown"]


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_text_as_the_eager_step(model):
    """Rows of different lengths, beyond a full window."""
    from torch._dynamo.utils import counters  # slow to import
    decoder, options = Decoder(model, compile=True), dict(temperature=1.0, seed=5)
    before = counters["stats"]["unique_graphs"]
    assert generated_ids(decoder, RAGGED[:3]) == generated_ids(model, RAGGED[:3])
    assert generated_ids(decoder, RAGGED[1:]) == generated_ids(model, RAGGED[1:])
    assert generated_ids(decoder, RAGGED[:3], **options) == generated_ids(model, RAGGED[:3], **options)
    assert decoder.compile and counters["stats"]["unique_graphs"] == before + 1    # one shape, one compilation


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_the_cuda_graph_gives_the_same_text_as_the_eager_step(model, compile):
    model.cuda()
    decoder = Decoder(model, compile=compile, cuda_graph=True)
    for options in ({}, dict(temperature=1.0, top_k=5), dict(temperature=2.0, top_k=0, top_p=0.9)):
        assert generated_ids(decoder, RAGGED, **options) == generated_ids(model, RAGGED, **options)
        assert generated_ids(decoder, RAGGED, **options) == generated_ids(model, RAGGED, **options)
    assert decoder.cuda_graph and decoder.compile == compile and decoder.graph


def test_a_failing_compiler_is_turned_off_with_a_one_line_notice(model, monkeypatch, capsys):
    def broken(function, **options):
        def compiled(*args, **options):
            raise RuntimeError("no compiler\nhere")
        return compiled
    monkeypatch.setattr(torch, "compile", broken)
    decoder = Decoder(model, compile=True)
    assert generated_ids(decoder, RAGGED) == generated_ids(model, RAGGED)
    assert capsys.readouterr().err == "compile failed, decoding without it: RuntimeError: no compiler here\n"
    assert generated_ids(decoder, RAGGED[:1]) == generated_ids(model, RAGGED[:1]) and capsys.readouterr().err == ""


def test_packed_linears_give_the_same_logits():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(32, 128, 2, 2, 64)).eval().bfloat16()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    packed, ids = copy.deepcopy(plain), torch.randint(128, (2, 32))
    pack_linears(packed)
    if packed.lm_head.weight is not None:
        pytest.skip("this build of torch has no packed bf16 linear layers")
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), plain(ids), atol=0.02, rtol=0.02)
        cache = generation.KVCache(packed, 2, 32)
        first = prefill(packed, cache, [0, 1], ids[:, :20].tolist())
        torch.testing.assert_close(first, plain(ids[:, :20])[:, -1], atol=0.02, rtol=0.02)
    assert not any(isinstance(module, torch.nn.Linear) and module.weight is not None for module in packed.modules())
    rows = generated_ids(packed, RAGGED, n_vocab=128, max_tokens=20)
    assert all(len(row) == 20 for row in rows)
