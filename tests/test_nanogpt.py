"""nanoGPT's first tutorial continued here: its token files, the characters of its meta.pkl, its checkpoints."""
import gzip
import io
import lzma
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch.nn import functional as F

import convert
import finetune_instruct
import hellaswag
import inference
import prepare_fineweb
import prepare_text
from exactgpt.checkpoint import read_checkpoint
from exactgpt.generation import generate, generate_ids, top_next_tokens
from exactgpt.open_model import open_model, open_weights
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import CharacterTokenizer, Tokenizer, from_checkpoint, gpt2_tokenizer, load_tokenizer
from finetune_classifier import encode_example
from tests.common import (
    HELLASWAG_FILE,
    SHARED_DATA,
    TINY,
    in_our_layout,
    read_metrics,
    refusal,
    write_nanogpt_checkpoint,
    write_nanogpt_data,
)
from tests.mutants import Bomb

TEXT = "MARCIUS:\n\tThanks. What's the matter, you dissentious rogues,\nThat, rubbing the poor itch!\n" * 40
CHARACTERS = sorted(set(TEXT))


def write_meta(folder, characters=CHARACTERS, protocol=None, **entries):
    """Write a meta.pkl of characters; entries: to replace some of the dict's."""
    meta = dict(vocab_size=len(characters), itos=dict(enumerate(characters)),
                stoi={c: i for i, c in enumerate(characters)})
    (folder / "meta.pkl").write_bytes(pickle.dumps({**meta, **entries}, protocol=protocol))


def write_tokens(path, ids, dtype="<u2"):
    np.asarray(ids).astype(dtype).tofile(path)


@pytest.fixture
def data(tmp_path):
    """Return nano/data/play: the folder that nanoGPT's prepare.py makes of TEXT."""
    folder = tmp_path / "nano" / "data" / "play"
    write_nanogpt_data(folder, TEXT)
    return folder


@pytest.fixture
def checkpoint(tiny_gpt2, tmp_path):
    """Return (nano/out-play/ckpt.pt in nanoGPT's layout, transformers' model of its weights), without biases."""
    theirs = tiny_gpt2(vocab_size=len(CHARACTERS), activation_function="gelu")
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("bias"):
            tensor.zero_()
        else:
            state[name] = in_our_layout(theirs, name, tensor).contiguous().clone()
    path = tmp_path / "nano" / "out-play" / "ckpt.pt"
    write_nanogpt_checkpoint(path, state, "play", n_layer=2, n_head=3, n_embd=24, vocab_size=len(CHARACTERS))
    return path, theirs


def change(path, **entries):
    torch.save({**torch.load(path, weights_only=True), **entries}, path)


# -----------------------------------------------------------------------------
# meta.pkl

@pytest.mark.parametrize("characters", [
    CHARACTERS, ["a"], ["\0", "\n", "\r", "\x1a", "'", "\\", "\x85", "é", "\u2028", "\ud800", "\udfff", "\U0001f600"],
    list(map(chr, range(0x4e00, 0x4e00 + 3000)))], ids=["play", "one", "odd", "many"])
def test_the_characters_of_every_protocol_are_those_that_pickle_reads(tmp_path, characters):
    names = set()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        write_meta(tmp_path, characters, protocol)
        stored = pickle.loads((tmp_path / "meta.pkl").read_bytes())
        tokenizer = load_tokenizer(tmp_path)
        text = "".join(reversed(characters)) + characters[0]
        assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == [stored["stoi"][c] for c in text]
        assert tokenizer.encode_array(text).dtype == np.uint16
        assert tokenizer.n_vocab == stored["vocab_size"] and tokenizer.eot is None
        names.add(tokenizer.name)
        shown = [c.encode("utf-8", "replace").replace(b"?", b"\xef\xbf\xbd") for c in characters]
        assert [tokenizer.decode_bytes([i]) for i in range(len(characters))] == shown
        assert tokenizer.byte_lengths.tolist() == [*map(len, shown), 0] and tokenizer.byte_lengths.dtype == np.int64
        assert tokenizer.decode([*range(len(characters)), len(characters), -1]) == b"".join(shown).decode()
        assert tokenizer.start == stored["stoi"].get("\n", 0)
    assert len(names) == 1 and names != {CharacterTokenizer("ab").name}


def bombs(marker):
    calls = [(os.mkdir, marker), (os.system, f"mkdir {marker}"), (eval, f"open({marker!r}, 'w')")]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for call in calls:
            yield pickle.dumps(Bomb(*call), protocol)
            yield pickle.dumps(dict(vocab_size=1, itos={0: "a"}, stoi={"a": 0}, more=Bomb(*call)), protocol)
    yield b"(S'mkdir " + marker.encode() + b"'\nios\nsystem\n."          # INST, the oldest way
    yield pickle.dumps(dict(vocab_size=np.int64(1), itos={0: "a"}, stoi={"a": 0}))      # harmless, but asks for a call
    yield pickle.dumps(dict(vocab_size=1, itos=["a"], stoi={"a": 0}))


def test_no_code_in_meta_pkl_runs(tmp_path):
    for bomb in bombs(str(tmp_path / "BOOM")):
        (tmp_path / "meta.pkl").write_bytes(bomb)
        assert "might run code" in refusal(load_tokenizer, tmp_path)
    assert not (tmp_path / "BOOM").exists()


@pytest.mark.parametrize("data", [
    b"", b".", b"hello", b"}" * 100_000 + b".", b"(" * 100_000 + b".", b"}" + b"K\1}" * 100_000 + b"s" * 100_000 + b".",
    b"}r\xff\xff\xff\xff.", b"}j\xff\xff\xff\xff.", b"X\xff\xff\xff\x7fa.", b"\x8d" + b"\xff" * 8 + b"a.",
    b"\x8d" + b"\xff" * 7 + b"\x3fa.", b"I" + b"9" * 100_000 + b"\n.", b"I70000\n.", b"K\1K\2s.", b"}K\1s.", b"s.",
    b"}q\0h\0h\0s.", b"\x80\x05}\x94h\0."], ids=lambda data: repr(data[:12]))
def test_a_damaged_meta_pkl_is_one_line(tmp_path, data):
    (tmp_path / "meta.pkl").write_bytes(data)
    message = refusal(load_tokenizer, tmp_path)
    assert str(tmp_path / "meta.pkl") in message and len(message) < 400 + len(str(tmp_path))


def test_what_would_take_long_is_refused(tmp_path):
    write_meta(tmp_path, more="a" * (4 << 20))
    assert "it is larger than 3 MB" in refusal(load_tokenizer, tmp_path)
    write_meta(tmp_path, itos={k * (2**61 - 1): "a" for k in range(9)}, protocol=0)      # equal hashes
    assert "might run code" in refusal(load_tokenizer, tmp_path)       # LONG, for what is beyond 32 bits
    for data in (b"I70000\n.", b"J\xff\xff\xff\xff.", b"I2305843009213693951\n."):
        (tmp_path / "meta.pkl").write_bytes(data)
        assert "not between 0 and 65535" in refusal(load_tokenizer, tmp_path)


def test_every_truncation_of_meta_pkl_is_one_line(tmp_path):
    for protocol in (0, 4):
        write_meta(tmp_path, ["a", "b"], protocol)
        whole = (tmp_path / "meta.pkl").read_bytes()
        for n in range(len(whole)):
            (tmp_path / "meta.pkl").write_bytes(whole[:n])
            refusal(load_tokenizer, tmp_path)


@pytest.mark.parametrize("entries, why", [
    (dict(itos={0: "a", 1: "bc"}), "not a single character"), (dict(itos={0: "a", 1: ""}), "not a single character"),
    (dict(itos={0: "a", 1: 2}), "not a single character"), (dict(itos={0: "a", 2: "b"}), "of another kind"),
    (dict(itos={0: "a", 1: "b", 2: "c"}), "itos and stoi"), (dict(stoi={"a": 1, "b": 0}), "itos and stoi"),
    (dict(stoi={"a": 0}), "itos and stoi"), (dict(itos={0: "a", 1: "a"}, stoi={"a": 1}), "each of them once"),
    (dict(vocab_size=3), "of another kind"), (dict(vocab_size=1), "itos and stoi"), (dict(vocab_size="2"), "another"),
    (dict(vocab_size=0, itos={}, stoi={}), "1 to 65535 characters"), (dict(itos={0: {}, 1: "b"}), "not a single")])
def test_a_vocabulary_that_is_not_one_of_characters_is_refused(tmp_path, entries, why):
    write_meta(tmp_path, ["a", "b"], **entries)
    assert why in refusal(load_tokenizer, tmp_path)


def test_a_vocabulary_beyond_uint16_and_a_second_one_are_refused(tmp_path):
    write_meta(tmp_path, [chr(0x10000 + i) for i in range(65536)], 4)
    assert "65535" in refusal(load_tokenizer, tmp_path)
    write_meta(tmp_path)
    Tokenizer([], "").save(tmp_path)
    assert "two vocabularies" in refusal(load_tokenizer, tmp_path)


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = CharacterTokenizer("".join(CHARACTERS))
    for encode in (tokenizer.encode, tokenizer.encode_array):
        assert refusal(encode, "Thanks, \u00e9h!") == (
            f"the character '\u00e9' is not among the {len(CHARACTERS)} of this vocabulary (in 'Thanks, \u00e9h!')")
    encode = CharacterTokenizer("ab").encode
    assert f"(in '{'a' * 20}Z{'b' * 19}')" in refusal(encode, "a" * 99 + "Z" + "b" * 99)


def test_a_checkpoint_keeps_the_characters_and_trusts_nothing_that_it_says(tmp_path):
    tokenizer = CharacterTokenizer("\ud800\n\U0001f600")
    torch.save(tokenizer.to_checkpoint(), tmp_path / "x.pt")
    again = from_checkpoint(torch.load(tmp_path / "x.pt", weights_only=True))
    assert (again.name, again.characters) == (tokenizer.name, tokenizer.characters)
    assert from_checkpoint(dict(tokenizer.to_checkpoint(), name="gpt2")).name == tokenizer.name
    for stored in ("", "aa", 3, ["a"], None, "".join(map(chr, range(65536)))):
        assert "not a vocabulary of characters" in refusal(from_checkpoint, dict(name="x", characters=stored))
    write_meta(tmp_path)
    assert "but --tokenizer" in refusal(from_checkpoint, tokenizer.to_checkpoint(), tmp_path)
    assert "but --tokenizer" in refusal(from_checkpoint, gpt2_tokenizer().to_checkpoint(), tmp_path)
    assert from_checkpoint(None, tmp_path).characters == "".join(CHARACTERS)
    (tmp_path / "other").mkdir()
    write_meta(tmp_path / "other", ["a"])
    assert "but --tokenizer" in refusal(load_tokenizer, tmp_path, tmp_path / "other")


# -----------------------------------------------------------------------------
# train.bin and val.bin

def tokens_of(shard):
    out = np.empty(shard.n_tokens, dtype="<u2")
    with shard.open() as file:
        shard.read_tokens(file, 0, out)
    return out


def test_train_bin_and_val_bin_are_one_shard_each(data, capsys):
    shards = ShardFolder(data)
    assert ([s.path.name for s in shards.train], [s.path.name for s in shards.val]) == (["train.bin"], ["val.bin"])
    tokenizer = shards.tokenizer()
    assert tokenizer.decode([*tokens_of(shards.train[0]), *tokens_of(shards.val[0])]) == TEXT
    prepare_fineweb.main(["--verify", "--out", str(data)])
    assert f"2 shards, {len(TEXT):,} tokens: sizes and token ids are correct" in capsys.readouterr().out
    write_tokens(data / "val.bin", [0, len(CHARACTERS)])
    message = refusal(prepare_fineweb.main, ["--verify", "--out", str(data)])
    assert f"val.bin contains token {len(CHARACTERS)}, outside the vocabulary of {len(CHARACTERS)}" in message


def test_without_meta_pkl_they_are_gpt2s_tokens_unless_they_look_like_characters(data, tmp_path):
    ids = gpt2_tokenizer().encode(TEXT * 5)
    for name in ("train.bin", "val.bin"):
        write_tokens(data / name, ids)
    shutil.move(data / "meta.pkl", tmp_path)
    assert ShardFolder(data).tokenizer().name == "gpt2"
    write_tokens(data / "train.bin", [256] + [0] * 20_000)        # a single merge is enough
    write_tokens(data / "val.bin", [0] * 100)
    assert ShardFolder(data).tokenizer().name == "gpt2"
    for name in ("train.bin", "val.bin"):
        write_tokens(data / name, np.arange(10_000) % 256)
    assert f"{data} seems to hold characters, but its meta.pkl is missing" in refusal(ShardFolder(data).tokenizer)
    write_meta(tmp_path, [chr(i) for i in range(300)])
    assert ShardFolder(data).tokenizer(tmp_path).n_vocab == 300


def test_a_header_is_read_and_what_is_no_row_of_tokens_is_refused(data):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 50
    (data / "val.bin").write_bytes(header.tobytes() + np.arange(50).astype("<u2").tobytes())
    assert tokens_of(ShardFolder(data).val[0]).tolist() == list(range(50))
    for content, message in ((b"abc", "val.bin of 3 bytes does not hold uint16 tokens; recreate it"),
                             (b"", "val.bin is empty")):
        (data / "val.bin").write_bytes(content)
        assert message in refusal(ShardFolder, data)
    (data / "val.bin").unlink()
    np.save(data / "x_val_000000.npy", np.arange(9, dtype=np.uint16))
    assert "mixes .npy and .bin" in refusal(ShardFolder, data)
    (data / "x_val_000000.npy").rename(data / "x_val_000000.bin")
    assert "mixes the data sets 'train.bin' and 'x'" in refusal(ShardFolder, data)


def written(write, *args, **options):
    file = io.BytesIO()
    write(*args, file, **options)
    return file.getvalue()


IDS = np.random.default_rng(0).integers(0, 50257, 3000)
TENSORS = {"transformer.wte.weight": torch.zeros(30, 4)}
FOREIGN = {
    "llm.c's uint32": np.array([20240801, 1, 3000, *[0] * 253, *IDS], "<u4").tobytes(), "32 bits": IDS.astype("<u4"),
    "32 bits ": IDS.astype("<i4") * 2, "64 bits": IDS.astype("<i8"), "zip": written(torch.save, TENSORS),
    "PyTorch": written(torch.save, TENSORS, _use_new_zipfile_serialization=False), "GGUF": b"GGUF\3\0\0\0" + bytes(99),
    "compressed": gzip.compress(IDS.tobytes()), "compressed ": lzma.compress(IDS.tobytes()),
    "compressed  ": bytes.fromhex("28b52ffd") + IDS.tobytes(), "safetensors": safetensors_bytes(TENSORS),
    "NumPy": written(lambda f: np.save(f, IDS)), "plain text": ("Thanks, caf\u00e9.\r\n\t" * 99).encode(),
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Megatron": IDS.astype("<u2")}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["train.bin", "NAME_train_000001.bin"])
def test_a_strangers_bin_file_is_refused_by_what_it_seems_to_be(tmp_path, kind, name):
    (tmp_path / name).write_bytes(bytes(FOREIGN[kind]))
    if kind == "Megatron":
        (tmp_path / name).with_suffix(".idx").touch()
    message = refusal(ShardFolder, tmp_path)
    assert str(tmp_path / name) in message and kind.strip() in message.split("it seems to be ")[1]


def test_no_row_of_real_tokens_seems_to_be_anything_else(tmp_path):
    real = SHARED_DATA / "wikipedia_48m_tokens.uint16.xz"
    words = np.frombuffer(lzma.open(real).read(1 << 20), "<u2") if real.exists() else gpt2_tokenizer().encode(TEXT * 9)
    characters = [CHARACTERS.index(c) for c in TEXT]
    rows = [words[i:i + n] for n in (50, 5000) for i in range(0, len(words) - n, 20_000)]
    rows += [characters, characters[1:], [0, 1] * 5000, [5, 0] * 20, [0] * 5000, [7] * 5000, np.arange(65536)]
    for row in rows:
        write_tokens(tmp_path / "train.bin", row)
        assert ShardFolder(tmp_path).train[0].n_tokens == len(row)


def test_hidden_files_and_folders_are_no_shards(data, tmp_path):
    for name in ("._x_train_000001.npy", ".x_val_000000.npy", "._train.bin"):
        (data / name).write_bytes(b"\0\5\x16\7")
    for name in ("x_train_000001.npy", "x_val_000000.bin"):
        (data / name).mkdir()
    os.mkfifo(data / "y_train_000001.npy")
    assert [s.path.name for s in ShardFolder(data).shards] == ["train.bin", "val.bin"]
    for name in ("train_000001.bin", "train.npy"):       # only nanoGPT's own names may lack the data set's
        shutil.copy(data / "train.bin", data / name)
    assert len(ShardFolder(data).shards) == 2
    (tmp_path / "play.txt").write_text(TEXT)
    prepare_text.main([str(tmp_path / "play.txt"), "--out", str(tmp_path / ".hidden")])
    assert [s.path.name for s in ShardFolder(tmp_path / ".hidden").val] == ["hidden_val_000000.npy"]


# -----------------------------------------------------------------------------
# checkpoints

def test_a_checkpoint_finds_its_characters_by_flag_beside_it_or_in_the_working_directory(
        data, checkpoint, tmp_path, monkeypatch, capsys):
    path, theirs = checkpoint
    ids = torch.randint(len(CHARACTERS), (2, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir("/")
    opened = open_model(path)
    assert opened.tokenizer.encode(TEXT) == [CHARACTERS.index(c) for c in TEXT] and opened.step == 5000
    assert str(data / "meta.pkl") in capsys.readouterr().err
    torch.testing.assert_close(opened.model.eval()(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    monkeypatch.chdir(path.parent)                                   # a relative path, beside it
    assert open_model("ckpt.pt").tokenizer.name == opened.tokenizer.name
    shutil.move(path, tmp_path / "ckpt.pt")
    assert open_model(tmp_path / "ckpt.pt").tokenizer is None
    message = refusal(open_model(tmp_path / "ckpt.pt").with_tokenizer)
    assert "meta.pkl" in message and "--tokenizer" in message
    assert open_model(tmp_path / "ckpt.pt", tokenizer=data).tokenizer.name == opened.tokenizer.name
    monkeypatch.chdir(tmp_path / "nano")
    assert open_model(tmp_path / "ckpt.pt").tokenizer.name == opened.tokenizer.name
    for name in ("../data/play", "/etc", "..", ".", "", "play/", "a" * 999, 3, None, {}):       # a plain name only
        change(tmp_path / "ckpt.pt", config=dict(dataset=name))
        assert open_model(tmp_path / "ckpt.pt").tokenizer is None
    change(tmp_path / "ckpt.pt", config=None)
    assert open_model(tmp_path / "ckpt.pt").tokenizer is None


@pytest.mark.parametrize("characters", [CHARACTERS[1:], [*CHARACTERS, "\u00e9"]], ids=["fewer", "more"])
def test_other_characters_are_refused(data, checkpoint, capsys, characters):
    path, _ = checkpoint
    mine = open_weights(path, load_tokenizer(data), "")["model"]
    assert len(mine["transformer.wte.weight"]) == len(CHARACTERS)    # not padded
    other = CharacterTokenizer("".join(reversed(CHARACTERS)))
    assert f"uses the vocabulary {load_tokenizer(data).name}, but the shards use" in refusal(
        open_weights, path, other, "")
    write_meta(data, characters)
    assert open_model(path).tokenizer is None
    assert f"--tokenizer {data} is not the vocabulary of" in refusal(open_model, path, tokenizer=str(data))
    (data / "meta.pkl").unlink()
    capsys.readouterr()
    open_weights(path, other, "")
    assert f"{path} does not say which vocabulary" in capsys.readouterr().err
    assert f"has a vocabulary of {len(CHARACTERS)}, but the shards need {len(characters)}" in refusal(
        open_weights, path, CharacterTokenizer("".join(characters)), "")


def test_generation_ends_at_no_character_and_begins_an_empty_prompt_with_a_new_line(data, checkpoint):
    opened = open_model(checkpoint[0])
    model, tokenizer = opened.model.eval(), opened.tokenizer
    (text,), n_tokens = generate(model, tokenizer, [""], max_tokens=300, top_k=0, temperature=9.0)
    steps = generate_ids(model, [[CHARACTERS.index("\n")]], n_vocab=len(CHARACTERS), max_tokens=300, top_k=0,
                         temperature=9.0)
    assert text == "".join(CHARACTERS[step[0]] for step in steps)
    assert n_tokens == len(text) == 300 and set(text) == set(CHARACTERS)     # none of them ends it


def test_every_script_takes_characters(data, checkpoint, capsys, monkeypatch):
    path, _ = checkpoint
    opened = open_model(path)
    assert encode_example("", 3, opened.tokenizer, 32).tokens == [CHARACTERS.index("\n")]
    typed = iter(["caf\u00e9", "Thanks"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or sys.exit())
    with pytest.raises(SystemExit):
        inference.main(["--checkpoint", str(path), "--device", "cpu", "--num_seq", "1", "--max_tokens", "9"])
    out, err = capsys.readouterr()      # an unknown character ends nothing
    assert "the character 'f' is not among" in err and out.startswith("> Thanks") and len(out) == len("> Thanks\n") + 9
    page = pytest.importorskip("app", exc_type=ImportError)
    _, table = page.look_up(str(path), 0, "", SimpleNamespace(tokenizer="", device="cpu", dtype="fp32"))
    expected = top_next_tokens(opened.model.eval(), [CHARACTERS.index("\n")], len(CHARACTERS))
    assert table["Token"] == [page.WHITESPACE_SYMBOLS.get(CHARACTERS[i], CHARACTERS[i]) for i, _ in expected]


def val_loss_of(theirs, data, block_size=32):
    """The mean loss of transformers' model over the full windows of val.bin."""
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", "<u2").astype(np.int64))
    n = (len(tokens) - 1) // block_size
    x, y = tokens[:n * block_size].view(n, -1), tokens[1:n * block_size + 1].view(n, -1)
    with torch.no_grad():
        return F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()


def test_the_tutorial_is_continued(data, checkpoint, run, tmp_path):
    path, theirs = checkpoint
    flags = ("--data_dir", data, "--log_dir", tmp_path / "run", "--total_batch_size", 64, "--max_lr", 1e-3, "--dropout",
             0.2, "--device", "cpu", "--dtype", "fp32", "--eval_every", 3, "--hellaswag_every", 0, "--sample_every", 3)
    rc, out, err = run("train.py", *flags, "--init_from", path, "--max_steps", 3)
    assert rc == 0, err
    lines = read_metrics(tmp_path / "run")
    assert next(line["val_loss"] for line in lines if "val_loss" in line) == pytest.approx(val_loss_of(theirs, data))
    stored = read_checkpoint(tmp_path / "run" / "model_00003.pt")
    assert stored["config"]["vocab_size"] == len(CHARACTERS) and stored["config"]["activation"] == "gelu"
    assert not stored["config"]["bias"]
    shutil.rmtree(data)                                              # the checkpoint has its own characters
    rc, out, err = run("inference.py", "--checkpoint", tmp_path / "run" / "model_00003.pt", "--prompt", "Thanks",
                       "--max_tokens", 20, "--num_seq", 1, "--device", "cpu", "--temperature", 0, cwd=tmp_path)
    assert rc == 0 and out.startswith("> Thanks") and len(out) == len("> Thanks\n") + 20, err


@pytest.mark.slow
def test_a_new_model_of_characters_resumes(data, run, tmp_path):
    flags = ("--data_dir", data, "--log_dir", tmp_path / "run", *TINY, "--total_batch_size", 64, "--max_steps", 4,
             "--checkpoint_every", 2)
    assert run("train.py", *flags)[0] == 0
    last = tmp_path / "run" / "model_00004.pt"
    straight = read_checkpoint(last)["model"]
    assert len(straight["transformer.wte.weight"]) == 64             # padded
    last.unlink()
    assert run("train.py", *flags)[0] == 0
    assert all(torch.equal(tensor, straight[name]) for name, tensor in read_checkpoint(last)["model"].items())
    last.unlink()
    np.fromfile(data / "train.bin", "<u2")[:-1].tofile(data / "train.bin")
    rc, _, err = run("train.py", *flags)
    assert rc == 2 and len(err.splitlines()) == 1 and "token shards" in err, err


def test_what_needs_an_end_of_text_or_other_characters_says_so(data, checkpoint, tmp_path):
    path = str(checkpoint[0])
    (tmp_path / "items.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}]')
    (tmp_path / "play.txt").write_text(TEXT)
    no_end = f"needs an end-of-text token, but the vocabulary {load_tokenizer(data).name} has only characters"
    for main, flags, message in (
            (finetune_instruct.main, ["--data", str(tmp_path / "items.json"), "--init_from", path, "--full"], no_end),
            (prepare_text.main, [str(tmp_path / "play.txt"), "--tokenizer", str(data)], no_end),
            (prepare_fineweb.main, ["--data_files", str(tmp_path / "*.txt"), "--tokenizer", str(data)], no_end),
            (convert.main, ["--checkpoint", path], "cannot hold a vocabulary of characters"),
            (hellaswag.main, ["--checkpoint", path, "--data", str(HELLASWAG_FILE)], "cannot be scored on HellaSwag")):
        more = [] if main is hellaswag.main else ["--out", str(tmp_path / f"out of {main.__module__}")]
        assert message in refusal(main, [*flags, *more])
    convert.main(["--checkpoint", path, "--out", str(tmp_path / "mine.pt")])
    assert open_model(tmp_path / "mine.pt").tokenizer.name == load_tokenizer(data).name
