"""evaluate.py on texts: every token once, means and bits per byte as independent references have them."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
from evaluate import EvaluateConfig, main, read_shards, read_texts, score_documents, summarize
from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import parse_config
from exactgpt.files import as_json
from exactgpt.open_model import OpenedModel, open_model
from exactgpt.scoring import text_windows
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import CharacterTokenizer, Tokenizer, train_tokenizer
from model import GPT, GPTConfig
from tests.common import cpu_runtime, gpt_from_transformers, refusal, write_nanogpt_data

TEXTS = ["Ein Fluß, 日本 und ein Wort, das über das Fenster reicht: é.", "short", "a  b\n\nc ", "x",
         "The window of the model is much shorter than this text, which says little."]


@pytest.fixture(scope="module")
def own_tokenizer():
    """Return a trained vocabulary of 320 entries, a multiple of 64: models have no rows of padding."""
    return train_tokenizer(TEXTS[:1] * 3 + ["".join(map(chr, range(0x100, 0x800)))], 320)


@pytest.fixture
def theirs(tiny_gpt2, own_tokenizer):
    return tiny_gpt2(vocab_size=own_tokenizer.n_vocab, n_positions=16)


@pytest.fixture
def opened(theirs, own_tokenizer):
    return OpenedModel(gpt_from_transformers(theirs), own_tokenizer, "here")


def config(**flags):
    return EvaluateConfig(**flags)


def write_texts(folder):
    """Write a folder with one document a file, in order, and one that holds nothing but white space."""
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    (folder / "9.txt").write_text(" \n")
    return folder


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 9])
def test_windows_score_each_token_once_with_half_a_window_of_context(block_size):
    for n in range(1, 40):
        scored = []
        for begin, end, n_scored in text_windows(n, block_size):
            assert 0 < n_scored < end - begin <= block_size + 1
            assert begin == 0 or end - n_scored - begin > block_size // 2 - (block_size == 1)
            scored += range(end - n_scored, end)
        assert scored == list(range(1, n))


@torch.no_grad()
def reference_losses(theirs, ids, start):
    """Return the loss of each token, one forward pass of transformers each, from the window's definition."""
    ids, (T, stride) = [start, *ids], (16, 8)
    losses = []
    for j in range(1, len(ids)):
        begin = max(0, -(-(j - T) // stride) * stride)      # the first window that reaches token j
        logits = theirs(torch.tensor([ids[begin:j]])).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[j]].item())
    return losses


@pytest.mark.parametrize("batch_tokens", [1, 40, 0])
def test_texts_score_as_one_token_at_a_time_with_transformers(theirs, opened, tmp_path, batch_tokens, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 64 if batch_tokens else 1 << 20)
    documents = read_texts(config(text=[str(write_texts(tmp_path / "texts"))]))
    assert [d.text for d in documents] == TEXTS
    scored = score_documents(opened, documents, None, cpu_runtime(), batch_tokens)
    ids = [opened.tokenizer.encode(text) for text in TEXTS]
    expected = [reference_losses(theirs, row, opened.tokenizer.eot) for row in ids]
    np.testing.assert_allclose(scored.losses, [sum(losses) for losses in expected], rtol=2e-5)
    assert scored.n_tokens.tolist() == [len(row) for row in ids] and max(map(len, ids)) > 3 * 16
    result, total = summarize(scored, documents), sum(map(sum, expected))
    n_bytes, n_words = (sum(len(part) for part in parts) for parts in (
        [text.encode() for text in TEXTS], [text.split() for text in TEXTS]))
    assert sum(opened.tokenizer.byte_lengths[row].sum() for row in ids) == result["bytes"] == n_bytes
    assert (result["tokens"], result["words"], result["documents"]) == (sum(map(len, ids)), n_words, 5)
    assert [result[name] for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte")] == pytest.approx(
        [total / sum(map(len, ids)), math.exp(total / sum(map(len, ids))), math.exp(total / n_words),
         total / math.log(2) / n_bytes], rel=2e-5)
    # standard errors: the spread of what remains when one document after another is left out
    without = [summarize(evaluate.TextLosses(*(np.delete(a, i) for a in scored)), documents[:i] + documents[i + 1:])
               for i in range(5)]
    for name in ("loss", "bits_per_byte"):
        jackknife = math.sqrt(4 / 5 * sum((w[name] - np.mean([v[name] for v in without])) ** 2 for w in without))
        assert result[f"{name}_stderr"] == pytest.approx(jackknife, rel=0.35)
    assert result["perplexity_stderr"] == pytest.approx(result["perplexity"] * result["loss_stderr"])


def test_documents_come_from_files_rows_and_separators(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    book = tmp_path / "book.txt"
    book.write_text("<END>\\n".join(TEXTS).replace("\\n", "\n"))
    def texts(**flags):
        return [d.text for d in read_texts(config(**flags))]
    assert texts(text=[str(rows)], text_column="body") == TEXTS
    assert texts(text=[str(rows), str(rows)], text_column="body", limit=7) == TEXTS + TEXTS[:2]
    assert texts(text=[str(book)], separator="<END>\\n") == TEXTS
    long = "word " * 600_000      # read in parts
    book.write_text(long)
    assert texts(text=[str(book), str(rows)], text_column="body", limit=2) == [long, TEXTS[0]]
    flags = parse_config(EvaluateConfig, ["--text", "a", "b", "--limit", "1", "--text", "c"])
    assert flags.text == ["a", "b", "c"]


def test_documents_of_shards_lie_between_end_of_text_tokens(make_shards, opened, own_tokenizer, tmp_path):
    eot, ids = own_tokenizer.eot, [own_tokenizer.encode(text) for text in TEXTS]
    stream = [token for row in ids for token in (eot, *row)] + [eot, eot]
    cut = 1 + len(ids[0]) + 4      # the second document spans two shards
    folder = make_shards([len(stream) - cut], val_sizes=[cut], tokens=stream, tokenizer=own_tokenizer)
    val, name = read_shards(config(data_dir=str(folder)))
    assert name == own_tokenizer.name and [d.ids.tolist() for d in val] == [ids[0], ids[1][:3]]
    train, _ = read_shards(config(data_dir=str(folder), split="train"))
    assert [d.ids.tolist() for d in train] == [row for row in [ids[1][3:], *ids[2:]] if row]
    shards = ShardFolder(folder)
    both = list(evaluate._split_at(eot, [*shards.val, *shards.train]))
    assert [piece.tolist() for piece in both if len(piece)] == ids
    assert [d.n_bytes for d in val] == [len(TEXTS[0].encode()), len(own_tokenizer.decode_bytes(ids[1][:3]))]
    assert len(read_shards(config(data_dir=str(folder), limit=1))[0]) == 1
    # ids of the same vocabulary are scored as they are, even where the tokenizer would make others of the text
    text = TEXTS[4][:10]
    odd = [evaluate.Document(text, np.array([Tokenizer([], "").encode(c)[0] for c in text], dtype="<u2"), 10, 2)]
    n_tokens = [score_documents(opened, odd, vocabulary, cpu_runtime()).n_tokens for vocabulary in (name, "other")]
    assert n_tokens == [10, len(own_tokenizer.encode(text))] and n_tokens[1] < 10


def test_characters_are_scored_after_the_start_that_an_empty_prompt_has(tmp_path):
    text = "to be\nor not é"
    characters = write_nanogpt_data(tmp_path / "chars", text * 9)
    tokenizer = CharacterTokenizer("".join(characters))
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, tokenizer.n_vocab, 1, 2, 16)).eval()
    opened = OpenedModel(model, tokenizer, "chars")
    document, = read_shards(config(data_dir=str(tmp_path / "chars")))[0]
    assert document.text == (text * 9)[int(len(text) * 9 * 0.9):]
    short = [evaluate.Document("be", None, 2, 1)]
    loss = score_documents(opened, short, None, cpu_runtime()).losses[0]
    x, y = torch.tensor([[characters.index(c) for c in "\nbe"]]).unfold(1, 2, 1)[0].T
    assert loss == pytest.approx(model(x[None], y[None], reduction="sum").item(), rel=1e-5)
    unknown = [evaluate.Document("Q", None, 1, 1)]
    assert "'Q' is not among" in refusal(score_documents, opened, unknown, None, cpu_runtime())


def save(path, tokenizer, seed=0, vocab=None, block_size=16):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab or tokenizer.n_vocab, 1, 2, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict(), step=1, val_loss=1.0,
                               tokenizer=tokenizer.to_checkpoint()))
    return str(path)


def test_the_command_compares_two_models(own_tokenizer, tmp_path, capsys):
    a, b = (save(tmp_path / f"{seed}.pt", own_tokenizer, seed) for seed in (0, 1))
    chars = save(tmp_path / "chars.pt", Tokenizer([], "bytes"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text + str(i)}) + "\n" for i in range(8) for text in TEXTS))

    def compare(*models):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}.json"
        main(["--checkpoint", models[0], *(["--compare", models[1]] if models[1:] else []), "--text", str(texts),
              "--device", "cpu", "--dtype", "fp32", "--json", str(out)])
        return json.loads(out.read_text())
    one, two, other = compare(a), compare(a, b), compare(b)
    for key in ("loss", "bits_per_byte_stderr", "word_perplexity", "tokens", "bytes", "documents"):
        assert one[key] == two[key] and other[key] == two["other"][key]
    assert two["metric"] == "loss" and two["difference"] == pytest.approx(one["loss"] - other["loss"])
    assert two["low"] < two["difference"] < two["high"] and two["better"] + two["worse"] == two["n"] == 40
    assert (two["difference"] < 0) == (two["better"] > two["worse"])
    out = capsys.readouterr().out
    assert f"{a if two['difference'] < 0 else b} is better than" in out and "several runs of each" in out
    assert f"loss             {one['loss']:.4f} ± {one['loss_stderr']:.4f}" in out and "40 documents" in out
    mixed = compare(a, chars)      # tokens of different lengths
    assert mixed["metric"] == "bits_per_byte" and mixed["other"]["tokens"] > mixed["tokens"]
    assert mixed["difference"] == pytest.approx(mixed["bits_per_byte"] - mixed["other"]["bits_per_byte"])
    same = compare(a, a)
    assert same["difference"] == same["low"] == same["high"] == 0 and same["conclusion"].startswith("No difference")
    texts.write_text(json.dumps({"text": "one"}) + "\n")
    alone = compare(a, b)
    assert alone["low"] is alone["loss_stderr"] is None and "1 document is too few" in alone["conclusion"]
    assert "one document has no error bars" in capsys.readouterr().out


def test_what_json_cannot_hold_becomes_what_it_can():
    plain = as_json(dict(a=np.float32(0.5), b=[np.int64(3), math.inf, None], c=(np.array([1.0, np.nan]), "x")))
    assert json.dumps(plain) == '{"a": 0.5, "b": [3, null, null], "c": [[1.0, null], "x"]}'


def test_it_does_not_say_what_it_cannot_know(own_tokenizer, tmp_path, monkeypatch):
    model = save(tmp_path / "a.pt", own_tokenizer)
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "there.json").mkdir()
    for flags, words in (
            ([], "name what to evaluate: --text"),
            (["--text", "a", "--tasks", "b"], "--text and --tasks cannot be combined"),
            (["--tasks", " , "], "names no task"),
            (["--text", "a", "--num_fewshot", "2"], "--num_fewshot belongs to --tasks"),
            (["--tasks", "a", "--text_column", "b"], "--text_column belongs to --text"),
            (["--text", "a", "--split", "train"], "--split belongs to --data_dir"),
            (["--tasks", "piqa", "--include_path", "nowhere"], "--include_path nowhere is not a folder"),
            (["--text", str(tmp_path / "blank.txt")], "there is no text in"),
            (["--text", str(tmp_path / "gone.txt")], "gone.txt does not exist"),
            (["--data_dir", str(tmp_path)], "no shards in"),
            (["--text", str(tmp_path / "blank.txt"), "--json", str(tmp_path / "there.json")], "there.json")):
        assert words in refusal(main, ["--checkpoint", model, "--device", "cpu", *flags])
    monkeypatch.setattr("exactgpt.config.importlib.util.find_spec", lambda name: None)
    assert refusal(config(tasks="hellaswag").check) == "this needs lm_eval: pip install -r requirements-extras.txt"
    assert refusal(config(text=["a"], compare="b").check) == "this needs scipy: pip install -r requirements-extras.txt"
    config(text=["a"]).check()
    assert open_model(model).tokenizer.name == own_tokenizer.name
