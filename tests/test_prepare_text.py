"""Test prepare_text.py and documents.py: the shards contain the text, or nothing is written at all."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest

import prepare_text
from exactgpt import documents, shard_writer
from exactgpt.config import UserError
from exactgpt.documents import find_files, read_documents, read_rows
from exactgpt.shards import ShardFolder, permutation
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
from tests.common import ROOT, SHARED_DATA, script_env

EOT = 50256
STORIES = [f"Story {i}. " + "Once upon a time, ü 😀\n" * (i % 7) + f"The end of {i}" for i in range(40)]


def stream(folder, split):
    return np.concatenate([np.load(s.path) for s in getattr(ShardFolder(folder), split)]).tolist()


def split_at_eot(tokens, eot=EOT):
    starts = [i for i, t in enumerate(tokens) if t == eot]
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(STORIES)))
    return path


# --- the split


def brute_force_split(lengths, order, val_fraction):
    """Apply the rule in docs/data.md to one document at a time."""
    total, val, train, full = sum(lengths), [], [], False
    for d in order:
        n_val = sum(lengths[i] for i in val)
        full = full or n_val >= val_fraction * total
        fits = n_val + lengths[d] <= 2 * val_fraction * total and n_val + lengths[d] < total
        (val if not full and fits else train).append(d)
    return val, train


@pytest.mark.parametrize("val_fraction", [0.01, 0.05, 0.3, 0.9])
def test_documents_are_split_and_ordered_by_the_rule(jsonl, tmp_path, val_fraction):
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "out"), "--seed", "7", "--val_fraction", str(val_fraction)])
    ids = [[EOT, *gpt2_tokenizer().encode(t)] for t in STORIES]
    order = permutation(len(ids), 7, "documents").tolist()
    val, train = brute_force_split([len(d) for d in ids], order, val_fraction)
    assert val
    assert split_at_eot(stream(tmp_path / "out", "val")) == [ids[d] for d in val]
    assert split_at_eot(stream(tmp_path / "out", "train")) == [ids[d] for d in train]


@pytest.mark.parametrize("n_texts", [1, 2])
@pytest.mark.parametrize("shard_tokens", [37, 1000])
@pytest.mark.parametrize("val_fraction", [0.0001, 0.05, 0.15])
def test_validation_is_the_end_of_the_text_if_no_document_fits(tmp_path, n_texts, shard_tokens, val_fraction):
    texts = ["one two three four " * 30, "five six seven eight nine " * 40][:n_texts]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    prepare_text.main([*(str(tmp_path / f"{i}.txt") for i in range(n_texts)), "--out", str(tmp_path / "out"),
                       "--shard_tokens", str(shard_tokens), "--val_fraction", str(val_fraction)])
    ids = [[EOT, *gpt2_tokenizer().encode(t)] for t in texts]
    whole = [token for d in permutation(n_texts, 1337, "documents") for token in ids[d]]
    n_val = max(1, int(val_fraction * len(whole)))
    assert stream(tmp_path / "out", "val") == whole[-n_val:]
    assert stream(tmp_path / "out", "train") == whole[:-n_val]
    assert len(ShardFolder(tmp_path / "out").val) == 1
    assert {s.n_tokens for s in ShardFolder(tmp_path / "out").train[:-1]} <= {shard_tokens}


def test_val_never_takes_all_documents(tmp_path):
    (tmp_path / "two.txt").write_text("one two three four|one two three four")
    prepare_text.main([str(tmp_path / "two.txt"), "--separator", "|", "--out", str(tmp_path / "out"),
                       "--val_fraction", "0.6"])
    assert stream(tmp_path / "out", "val") == stream(tmp_path / "out", "train") != []


# --- the readers


def test_every_format_gives_the_same_shards(jsonl, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    for suffix, dialect in (("csv", "excel"), ("tsv", None)):
        with open(folder / f"a.{suffix}", "w", newline="") as f:
            texts = STORIES if dialect else [t.replace("\n", " ") for t in STORIES]
            writer = csv.writer(f, "excel") if dialect else csv.writer(f, "excel-tab", quoting=csv.QUOTE_NONE)
            writer.writerows([("id", "body"), *enumerate(texts)])
    write_parquet(folder / "a.parquet", id=list(range(len(STORIES))), body=STORIES)
    (folder / "a.json").write_text(json.dumps([{"body": t} for t in STORIES]))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "<|endoftext|>".join(STORIES).encode())
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "jsonl")])
    expected = contents(tmp_path / "jsonl")
    for name in ("a.csv", "a.parquet", "a.json", "a.txt"):
        out = tmp_path / name / "jsonl"        # the folder's name becomes the shards' prefix
        prepare_text.main([str(folder / name), "--out", str(out), "--text_column", "body",
                           "--separator", "<|endoftext|>"])
        assert contents(out) == expected, name
    assert [t for (t,) in read_rows(folder / "a.tsv", ["body"])] == [t.replace("\n", " ") for t in STORIES]


def test_directories_are_read_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "a/z.md", "a/1.txt", ".hidden/x.txt", "b/picture.png", "b/.x.txt", "c/settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])] == ["a/1.txt", "a/z.md", "b/2.txt"]


@pytest.mark.parametrize("separator", ["", "\n\n", "<|endoftext|>", "d d", "x\n"])
@pytest.mark.parametrize("part_chars", [7, 100])
def test_parts_of_a_long_text_have_the_ids_of_the_whole(tmp_path, monkeypatch, separator, part_chars):
    monkeypatch.setattr(documents, "PART_CHARS", part_chars)
    text = "Some words\n\n\nand  more words, don't split 'em<|endoftext|>\n\n  x\n日本 語\u00a0 d d 12\n" * 9 + "end"
    path = tmp_path / "a.txt"
    path.write_text(text)
    parts = list(read_documents(path, separator=separator))
    whole, ids, t = [], [], gpt2_tokenizer()
    for part, starts in parts:
        if starts:
            whole.append("")
            ids.append([])
        whole[-1] += part
        ids[-1] += t.encode(part)
    expected = text.split(separator) if separator else [text]
    assert [w for w in whole if w] == [e for e in expected if e]
    assert ids == [t.encode(w) for w in whole]
    assert separator or len(parts) > 3


def test_a_separator_with_white_space_is_found_wherever_a_part_ends(tmp_path, monkeypatch):
    text = "".join(f"{'word ' * n}- -{'w' * n} - -" for n in range(12))
    (tmp_path / "a.txt").write_text(text)
    for part_chars in range(1, 40):
        monkeypatch.setattr(documents, "PART_CHARS", part_chars)
        found = []
        for part, starts in read_documents(tmp_path / "a.txt", separator="- -"):
            found += [""] * starts
            found[-1] += part
        assert [f for f in found if f] == [t for t in text.split("- -") if t], part_chars


def test_columns_come_in_the_order_asked_for_not_in_the_files(tmp_path):
    (tmp_path / "a.csv").write_text("label,n,text\nx,1,one\ny,2,two\n")
    (tmp_path / "a.tsv").write_text("label\tn\ttext\nx\t1\tone\ny\t2\ttwo\n")
    (tmp_path / "a.jsonl").write_text('{"label": "x", "text": "one"}\n{"label": "y", "text": "two"}\n')
    table = pyarrow.table(dict(label=["x", "y"], n=[1, 2], text=["one", "two"]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        rows = list(read_rows(tmp_path / f"a.{suffix}", ["text", "label"]))
        assert rows == [("one", "x"), ("two", "y")], suffix


def test_parts_become_one_document_in_the_shards(tmp_path, monkeypatch):
    text = "A long book with many words in it.\n" * 2000
    (tmp_path / "book.txt").write_text(text)
    for name, part_chars in (("a", 1 << 20), ("b", 500)):
        monkeypatch.setattr(documents, "PART_CHARS", part_chars)
        prepare_text.main([str(tmp_path / "book.txt"), "--out", str(tmp_path / name / "x")])
    assert contents(tmp_path / "a/x").keys() == contents(tmp_path / "b/x").keys()
    for split in ("val", "train"):
        assert stream(tmp_path / "a/x", split) == stream(tmp_path / "b/x", split)
    assert stream(tmp_path / "a/x", "train").count(EOT) == 1


def test_unusual_rows_are_read_as_text(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\ud800b", "n": 1}\r\n\r\n{"text": null}\n{"text": 3}\n'
                     b'{"text": " \\n"}\n{"text": "x"}')
    assert [t for (t,) in read_rows(path, ["text"])] == ["a\ufffdb", "", "3", " \n", "x"]
    prepare_text.main([str(path), "--out", str(tmp_path / "out")])
    tokens = stream(tmp_path / "out", "train") + stream(tmp_path / "out", "val")
    assert tokens.count(EOT) == 3           # blank documents are skipped


# --- reproducibility


def test_threads_write_the_same_bytes(jsonl, tmp_path, monkeypatch):
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "a" / "x")])
    monkeypatch.setattr(shard_writer.os, "sched_getaffinity", lambda _: range(5))
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 300)
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "b" / "x")])
    assert contents(tmp_path / "a" / "x") == contents(tmp_path / "b" / "x")


def test_the_hash_of_a_text_depends_on_the_borders_of_its_documents_but_not_of_parts():
    whole, parts, two = ([("ab", True)], [("a", True), ("b", False)], [("a", True), ("b", True)])
    found = [prepare_text.scan_documents(documents) for documents in (whole, parts, two)]
    assert [(n, n_bytes) for n, n_bytes, _ in found] == [(1, 2), (1, 2), (2, 2)]
    assert found[0][2] == found[1][2] != found[2][2]


def test_repeating_a_command_does_nothing_and_another_command_is_refused(jsonl, tmp_path, capsys):
    command = [str(jsonl), "--out", str(tmp_path / "out")]
    prepare_text.main(command)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name != ".lock"}
    Tokenizer([("a", "b")], "").save(tmp_path)
    prepare_text.main(command)
    assert "is already complete; nothing to do" in capsys.readouterr().out
    for more, named in ((["--seed", "1"], "seed"), (["--val_fraction", "0.1"], "val_fraction"),
                        (["--train_tokenizer", "300"], "train_tokenizer"), (["--shard_tokens", "50"], "shard_tokens"),
                        (["--tokenizer", str(tmp_path)], "tokenizer")):
        with pytest.raises(UserError, match=f"differing: {named}"):
            prepare_text.main(command + more)
    jsonl.write_text(jsonl.read_text().replace("Once", "Twice"))
    with pytest.raises(UserError, match="differing: text"):
        prepare_text.main(command)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name != ".lock"} == before


def test_tokenizer_flag_uses_the_vocabulary_in_that_folder(jsonl, tmp_path):
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "a" / "x"), "--train_tokenizer", "300"])
    prepare_text.main([str(jsonl), "--out", str(tmp_path / "b" / "x"), "--tokenizer", str(tmp_path / "a" / "x")])
    trained, again = contents(tmp_path / "a" / "x"), contents(tmp_path / "b" / "x")
    assert trained.pop("manifest.json") != again.pop("manifest.json") and trained == again


def test_a_folder_with_other_files_is_not_touched(jsonl, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("years of work")
    with pytest.raises(UserError, match=r"contains other files \(thesis\.docx\); choose another --out"):
        prepare_text.main([str(jsonl), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == {"thesis.docx": b"years of work"}


def test_a_killed_run_starts_over_and_writes_the_same_shards(jsonl, tmp_path):
    flags = [str(jsonl), "--train_tokenizer", "300", "--shard_tokens", "50"]
    prepare_text.main([*flags, "--out", str(tmp_path / "a" / "x")])
    out = tmp_path / "b" / "x"
    for n_files in (1, 4, 20):
        process = subprocess.Popen([sys.executable, str(ROOT / "prepare_text.py"), *flags, "--out", str(out)],
                                   env=script_env(tmp_path), stdout=subprocess.DEVNULL)
        while process.poll() is None and not (out.exists() and len(list(out.iterdir())) >= n_files):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    prepare_text.main([*flags, "--out", str(out)])
    assert contents(out) == contents(tmp_path / "a" / "x")


# --- the demo, and real text


@pytest.mark.slow
def test_demo_is_pythons_documentation_with_its_own_vocabulary(tmp_path, run):
    rc, out, err = run("prepare_text.py", "--demo", "--train_tokenizer", 1000, "--out", tmp_path / "demo")
    assert (rc, err) == (0, "") and f"python train.py --data_dir {tmp_path / 'demo'}" in out
    folder = ShardFolder(tmp_path / "demo")
    tokenizer = folder.tokenizer()
    assert tokenizer.n_vocab == 1000 and folder.manifest.complete and folder.manifest.rows > 300
    folder.verify(1000)
    train = stream(tmp_path / "demo", "train")
    n_val = folder.val[0].n_tokens
    assert 0.05 <= n_val / (n_val + len(train)) <= 0.1 and len(train) > 400_000
    text = tokenizer.decode(train)
    assert 'The "with" statement' in text and "Help on module json.decoder:" in text


def test_tinyshakespeare(tmp_path):
    path = SHARED_DATA / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    prepare_text.main([str(path), "--out", str(tmp_path / "out")])
    tokens = stream(tmp_path / "out", "train") + stream(tmp_path / "out", "val")
    assert tokens[0] == EOT and tokens[1:] == gpt2_tokenizer().encode(path.read_text())
    assert load_tokenizer(tmp_path / "out").name == "gpt2"


# --- bad input prints one line and writes nothing


BAD = {
    "empty.txt": (b"", r"no text in .*empty\.txt"),
    "blank.txt": (b" \n\t\n", r"no text in .*blank\.txt"),
    "program.txt": (b"\x7fELF\x02\x01\x01\x00\x00", r"program\.txt is a binary file"),
    "latin.txt": ("caf\u00e9 ".encode("latin-1"), r"latin\.txt is not UTF-8 text \(it contains the byte 0xe9\)"),
    "cut.txt": ("é".encode()[:1], r"cut\.txt is not UTF-8"),
    "image.png": (b"\x89PNG", r"image\.png: it must end in one of"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": "b"\n', r"bad\.jsonl, line 2: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1: not valid JSON"),
    "list.jsonl": (b'["a"]\n', r"list\.jsonl, line 1: must be a JSON object, but is a list"),
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n',
                  r"key\.jsonl, line 2: no column 'text' among body.*--text_column"),
    "type.jsonl": (b'{"text": ["a"]}\n', r"type\.jsonl, line 1: column 'text' contains a list"),
    "column.csv": (b"id,body\n1,a\n", r"column\.csv: no column 'text' among id, body"),
    "cells.csv": (b"id,text\n1,Hello, world\n", r"cells\.csv, line 2: 3 cells, but 2 in the header"),
    "none.csv": (b"", r"none\.csv: no column 'text' among none"),
    "fake.parquet": (b"PAR1 not really", r"fake\.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_user_error_and_writes_nothing(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_text.main([str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_damaged_parquet_page_is_found_before_anything_is_written(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=[f"some text number {i}" for i in range(5000)])
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet"):
        prepare_text.main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ([], "no input; name files or directories to read, or use --demo"),
    (["nothing.txt", "--out", "x"], "nothing.txt does not exist"),
    (["--demo"], "no output folder; add --out data/NAME"),
    (["--demo", "a.txt", "--out", "x"], "drop the files"),
    (["--demo", "--out", "x", "--val_fraction", "1"], "--val_fraction must be < 1"),
    (["--demo", "--out", "x", "--train_tokenizer", "256"], "--train_tokenizer must be >= 257"),
    (["--demo", "--out", "x", "--train_tokenizer", "300", "--tokenizer", "."], "cannot be combined; use one of them"),
    (["--demo", "--out", "x", "--tokenizer", "y"], "--tokenizer y: there is no vocab.bpe; name a folder"),
    (["--demo", "--out", "x", "--shards", "3"], "unknown argument --shards"),
    (["--demo", "--out", "x", "--val", "0.1"], "unknown argument --val"),
    ([".", "--out", "x"], "no text files in ."),
])
def test_wrong_commands_are_refused(tmp_path, run, flags, message):
    rc, out, err = run("prepare_text.py", *flags, cwd=tmp_path)
    assert rc == 2 and out == "" and message in err
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []
