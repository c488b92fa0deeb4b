"""inference.py: the cache changes nothing, the batch changes nothing, samples follow the model's distribution."""
import pytest
import torch
from conftest import as_ours

import inference
from checkpoint import checkpoint_path, save_checkpoint
from inference import generate, generate_ids, sample
from model import GPT, GPTConfig
from tokenizer import Tokenizer

RAGGED = [[5, 7, 11], [3], [60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [5, 7, 11, 13]]


@pytest.fixture
def model(tiny_gpt2):
    """A model of ours whose greedy text wanders: 65 tokens, block_size 32."""
    return as_ours(tiny_gpt2(tie_word_embeddings=False))


def written(model, prompts, **options):
    """The ids that generate_ids writes for each prompt."""
    rows = [[] for _ in prompts]
    for step in generate_ids(model, prompts, **{"n_vocab": 65, "max_tokens": 80, "temperature": 0, **options}):
        assert len(step) == len(prompts)
        for row, token in zip(rows, step):
            row.append(token)
    return rows


@torch.no_grad()
def uncached(model, prompt, max_tokens):
    """Greedy decoding that reads the whole window for each token and crops it as DESIGN.md says."""
    block_size, tokens = model.config.block_size, []
    window = list(prompt)[-block_size:]
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        if len(window) == block_size:
            window = window[block_size - block_size // 2:]
        window.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("prompts", [RAGGED[:1], RAGGED[1:2], RAGGED[:3], RAGGED, [RAGGED[0]] * 3], ids=len)
def test_cached_equals_uncached_greedy_decoding_across_the_edge_of_the_window(model, prompts):
    expected = [uncached(model, p, 80) for p in prompts]            # 80 new tokens: the window is full three times
    assert all(len(set(row)) > 8 for row in expected)
    assert written(model, prompts) == expected


@pytest.mark.parametrize("length", [15, 16, 31, 32, 33, 70])
def test_prompts_about_as_long_as_the_window_and_longer_go_on_as_uncached(model, length):
    prompts = [[(7 * i + 3) % 65 for i in range(length)], [1, 2]]
    assert written(model, prompts) == [uncached(model, p, 80) for p in prompts]


def test_the_text_of_a_row_does_not_depend_on_what_else_is_in_the_batch(model):
    alone = [written(model, [p])[0] for p in RAGGED]
    assert written(model, RAGGED) == alone
    assert written(model, RAGGED[::-1]) == alone[::-1]


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_work(block_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, 65, 1, 1, 8)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
        model.transformer.wte.weight.normal_()
    assert written(model, [[3], [4, 5]], max_tokens=9) == [uncached(model, p, 9) for p in ([3], [4, 5])]


def test_greedy_text_is_that_of_transformers_generate(tiny_gpt2):
    theirs = tiny_gpt2(tie_word_embeddings=False)
    ids = torch.tensor([[5, 7, 11, 13], [60, 2, 3, 4]])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=28,
                               pad_token_id=0)
    assert expected.shape == (2, 32)
    assert written(as_ours(theirs), ids.tolist(), max_tokens=28) == expected[:, 4:].tolist()


def test_the_trained_gpt_nano_sorts_as_it_does_in_transformers(gpt_nano):
    from transformers import GPT2LMHeadModel
    theirs, ours = GPT2LMHeadModel.from_pretrained(gpt_nano), GPT.from_pretrained(gpt_nano).eval()
    for prompt in ([2, 1, 0, 2, 1, 0], [0, 2, 2, 1, 0, 2], [1, 1, 2, 0, 0, 1]):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                                   eos_token_id=None, pad_token_id=0)[0, 6:].tolist()
        assert written(ours, [prompt], n_vocab=3, max_tokens=6)[0] == expected == sorted(prompt)


@pytest.mark.parametrize("temperature, top_k", [(2.0, 0), (5.0, 0), (4.0, 5), (3.0, 65), (3.0, 1000)])
def test_samples_follow_the_models_distribution(model, temperature, top_k):
    n = 20_000
    with torch.no_grad():
        logits = model(torch.tensor([[5, 7, 11]]))[0, -1].double() / temperature
    likeliest = logits.argsort(descending=True)[:top_k or None]
    p = torch.zeros(65, dtype=torch.double)
    p[likeliest] = torch.softmax(logits[likeliest], dim=0)
    tokens = written(model, [[5, 7, 11]] * n, max_tokens=1, temperature=temperature, top_k=top_k)
    counts = torch.bincount(torch.tensor(tokens)[:, 0], minlength=65)
    assert counts[p == 0].sum() == 0
    observed, expected = counts[p * n >= 5], p[p * n >= 5] * n
    chi_square, df = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert df >= 4 and chi_square < df + 4 * (2 * df) ** 0.5         # beyond it: once in some ten thousand


def test_top_k_has_a_threshold_for_each_row():
    logits = torch.stack([torch.arange(10.0), 100 - torch.arange(10.0), torch.zeros(10)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample(logits, 5.0, 3, generator) for _ in range(300)])
    assert set(drawn[:, 0].tolist()) == {7, 8, 9} and set(drawn[:, 1].tolist()) == {0, 1, 2}
    assert (sample(logits[:2], 1.0, 1, generator) == torch.tensor([9, 0])).all()


def test_temperature_0_is_greedy_whatever_top_k_and_seed(model):
    expected = written(model, RAGGED)
    for top_k, seed in ((0, 1), (1, 2), (50, 3)):
        assert written(model, RAGGED, top_k=top_k, seed=seed) == expected
    assert written(model, RAGGED, temperature=1.0, top_k=1) == expected


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=0), dict(top_k=5), dict(temperature=9.0)], ids=str)
def test_padded_ids_are_never_sampled_even_with_huge_logits(options):
    model = GPT(GPTConfig(32, 128, 1, 2, 8, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[65:] = 1000.0
        assert (model(torch.tensor([[1, 2]]))[0, -1].argsort(descending=True)[:63] >= 65).all()
    rows = written(model, RAGGED, **{"temperature": 1.0, **options})
    assert all(0 <= token < 65 for row in rows for token in row)


def test_a_seed_gives_the_same_text_and_leaves_torchs_generator_alone(model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = written(model, RAGGED, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)                 # sampling must not disturb training
    torch.manual_seed(6)
    assert written(model, RAGGED, temperature=1.0, seed=1) == first
    assert written(model, RAGGED, temperature=1.0, seed=2) != first
    assert written(model, RAGGED, temperature=1.0, seed=(1, 250)) != first   # train.py: (seed, step)


def test_equal_prompts_get_different_continuations(model):
    rows = written(model, [RAGGED[0]] * 4, temperature=1.0)
    assert len({tuple(row) for row in rows}) == 4


def test_a_row_ends_before_end_of_text_and_the_batch_with_its_last_row(model):
    prompts = [RAGGED[0], RAGGED[2]]
    free = written(model, prompts)
    eot = free[0][5]
    ends = [row.index(eot) if eot in row else 80 for row in free]
    rows = written(model, prompts, eot=eot)
    assert ends[0] <= 5 and len(rows[0]) == min(80, max(ends) + 1)
    for row, end, unstopped in zip(rows, ends, free):
        assert row[:end] == unstopped[:end] and all(token is None for token in row[end:])
    assert written(model, prompts[:1], eot=eot)[0] == free[0][:ends[0]] + [None]


def test_gradients_are_off_inside_and_on_between_the_tokens(model):
    inside = []
    model.transformer.ln_f.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    for _ in generate_ids(model, [[1]], n_vocab=65, max_tokens=3):
        assert torch.is_grad_enabled()
    assert inside == [False] * 3


def test_samples_under_bf16_autocast_come_from_an_fp32_model(model):
    """As train.py writes them: the cache is fp32, keys and values arrive in bf16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = written(model, RAGGED, max_tokens=40)
    assert all(len(row) == 40 for row in rows)
    in_fp32 = written(model, RAGGED, max_tokens=40)
    assert sum(a[0] == b[0] for a, b in zip(rows, in_fp32)) >= 3


@pytest.fixture
def byte_model():
    """A model over bytes, padded to 320 rows, and its tokenizer of 257 entries."""
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 320, 1, 2, 16)).eval(), Tokenizer([], "bytes")


def test_generate_gives_prompt_and_continuation_and_counts_tokens(byte_model):
    model, tokenizer = byte_model
    prompts = ["Hello", "", "h\u00e9"]
    texts, n_tokens = generate(model, tokenizer, prompts, max_tokens=6, seed=3)
    rows = written(model, [tokenizer.encode("Hello"), [256], tokenizer.encode("h\u00e9")], n_vocab=257, eot=256,
                   max_tokens=6, temperature=1.0, seed=3)
    rows = [[t for t in row if t is not None] for row in rows]
    assert n_tokens == sum(map(len, rows))
    assert texts == [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, rows)]


def test_the_script_writes_the_same_text_for_the_same_seed_from_the_newest_checkpoint(run, byte_model, tmp_path):
    model, tokenizer = byte_model
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_checkpoint(checkpoint_path(tmp_path / "logs" / "demo", 7), dict(
        model=model.state_dict(), config=model.config_dict(), tokenizer=tokenizer.to_checkpoint(), step=7,
        val_loss=5.5))
    flags = ("--prompt", "Once", "--prompt", "Twice", "--num_seq", 2, "--max_tokens", 12, "--dtype", "fp32")
    rc, out, err = run("inference.py", *flags, cwd=tmp_path)
    assert rc == 0 and "model_00007.pt" in err and "step 7, validation loss 5.5000" in err and "tokens/s" in err
    texts, _ = generate(model, tokenizer, ["Once", "Once", "Twice", "Twice"], max_tokens=12)
    assert out == "".join(f"> {text}\n" for text in texts).replace("\r", "\n")   # as a text stream is read


def test_mistakes_are_one_line_and_status_2(gpt_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    for flags, message in (([], "give --prompt"), (["--prompt", "x"], "no model_XXXXX.pt below logs/"),
                           (["--prompt", "x", "--checkpoint", "bad.pt"], "bad.pt cannot be loaded as a checkpoint"),
                           (["--prompt", "x", "--checkpoint", "gone.pt"], "no checkpoint gone.pt"),
                           (["--prompt", "x", "--checkpoint", str(gpt_nano)], "comes without a tokenizer"),
                           (["--prompt", "x", "--max_tokens", "0"], "--max_tokens must be >= 1"),
                           (["--prompt", "x", "--temperature", "-1"], "--temperature must be >= 0.0")):
        with pytest.raises(inference.UserError) as caught:
            inference.main(flags)
        assert message in str(caught.value)
    assert capsys.readouterr() == ("", "")
