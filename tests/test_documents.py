"""Test documents.py and formats.py on strange files: read as their authors meant them, or refused in one line."""
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import zipfile

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from exactgpt import documents, tokenizer
from exactgpt.config import UserError
from exactgpt.documents import find_files, read_documents, read_rows, read_texts
from exactgpt.files import read_text
from exactgpt.tokenizer import gpt2_tokenizer
from tests import mutants

TEXT = "The words of a story, é and 日本 too.\n" * 40
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")


def read(path):
    """Return the texts of a file's documents."""
    return [text for text, _ in read_documents(path)]


def write_table(path, **columns):
    """Write a parquet file and return its path; arguments of write_table are those with a capital first letter."""
    options = {name.lower(): columns.pop(name) for name in [*columns] if name[0].isupper()}
    pyarrow.parquet.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


# --- what a file is


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", data)
    return file.getvalue()


FORMATS = {
    "UTF-16": lambda data: data.decode().encode("utf-16"), "UTF-32": lambda data: data.decode().encode("utf-32"),
    "UTF-16 with a big-endian mark": lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
    **{name.upper(): lambda data, name=name: data.decode().encode(name)
       for name in ("utf-16le", "utf-16be", "utf-32le", "utf-32be")},
    "compressed by gzip": gzip.compress, "compressed by bzip2": bz2.compress, "compressed by xz": lzma.compress,
    "compressed by zstd": lambda data: pa.compress(data, "zstd", asbytes=True), "a zip archive": zipped,
}


@pytest.mark.parametrize("what", FORMATS)
def test_what_a_file_really_is_is_named_with_the_command_that_makes_text_of_it(tmp_path, what):
    for suffix in SUFFIXES:
        path = tmp_path / f"my file{suffix}"
        path.write_bytes(FORMATS[what](TEXT.encode()))
        for function in (read, read_text):
            with pytest.raises(UserError, match=f"not UTF-8 text but {what.split(' with ')[0]}.*; convert it"):
                function(path)
    path = tmp_path / "my file.txt"
    with pytest.raises(UserError) as caught:
        read(path)
    command = str(caught.value).split("convert it first: ")[1]
    assert command.endswith(" 'new-my file.txt'") and "\n" not in command
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not on this machine")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read(tmp_path / "new-my file.txt") == [TEXT]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"%PDF-1.7 ...", r"a\.txt is not UTF-8 text but a PDF; convert it first: pdftotext .*a\.txt new-a\.txt"),
    ("a.txt", b"PAR1 ...", r"is not UTF-8 text but parquet; convert it first: mv (.*)a\.txt \1a\.txt\.parquet"),
    ("a.csv", b"\x7fELF\2\1\1\0", r"a\.csv is a binary file"),
    ("a.txt", np.arange(300, dtype="<u4").tobytes(), r"a\.txt is a binary file"),      # zeros as in UTF-32
    ("a.csv", b"text\ncaf\xe9", r"contains the byte 0xe9\); convert .* iconv -f latin1 -t utf-8 .*a\.csv > new-a\.csv"),
    ("a.parquet", TEXT.encode(), r"a\.parquet is text, not parquet; rename it"),
    ("a.parquet", gzip.compress(b"PAR1"), r"a\.parquet is not parquet but compressed by gzip; .* > new-a\.parquet"),
    ("a.parquet", b"\0" * 100, r"a\.parquet is not a readable parquet file"),
    ("a.parquet", b"", r"a\.parquet is not a readable parquet file"),
])
def test_other_strangers_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["", "a", "BZh9 and %PDF are words", "\ufeffmarked", "PK"])
def test_text_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "".join(read(tmp_path / "a.txt")) == read_text(tmp_path / "a.txt") == text.removeprefix("\ufeff")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".parquet"])
def test_what_cannot_be_read_is_one_line_and_never_a_hang(tmp_path, suffix):
    functions = [read] if suffix == ".parquet" else [read, read_text]
    path = tmp_path / f"a{suffix}"
    os.mkfifo(tmp_path / "pipe")
    for target, message in (("pipe", "is a folder, a pipe or a device; name a file"), ("/dev/zero", "a device"),
                            (tmp_path, "a folder"), ("/proc/self/mem", "Input/output error"), ("gone", "No such file")):
        path.symlink_to(target)
        for function in functions:
            with pytest.raises(UserError, match=rf"^cannot read .*a{suffix}: .*{message}"):
                function(path)
        path.unlink()


def test_a_folder_with_a_part_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Permission denied"):
        find_files([tmp_path])
    with pytest.raises(UserError, match=r"cannot read a{300}\.txt: File name too long"):
        find_files(["a" * 300 + ".txt"])


# --- long text


class Counted:
    """A compiled pattern that counts the characters it is asked to search."""

    def __init__(self, pattern):
        self.pattern, self.searched = pattern, 0

    def match(self, text, begin, end=None):
        match = self.pattern.match(text, begin, *[end] * (end is not None))
        self.searched += (end or match.end()) - begin
        return match


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
@pytest.mark.parametrize("character", ["a", " ", "\t", "日"])
def test_each_character_of_a_text_without_words_is_searched_about_once(tmp_path, monkeypatch, character, separator):
    monkeypatch.setattr(documents, "PART_CHARS", 100)
    monkeypatch.setattr(documents, "_SAFE_CUT", Counted(documents._SAFE_CUT))
    text = f"first words {character * 20_000}. last words " + "w" * 130
    (tmp_path / "a.txt").write_text(text)
    assert "".join(part for part, _ in read_documents(tmp_path / "a.txt", separator=separator)) == text
    assert documents._SAFE_CUT.searched < 1.5 * len(text)


def test_the_length_of_white_space_is_measured_once(monkeypatch):
    monkeypatch.setattr(tokenizer, "LONG_SPACE", 100)
    monkeypatch.setattr(tokenizer, "_SPACE", Counted(tokenizer._SPACE))
    text = "a" + " " * 20_000 + "b"
    assert gpt2_tokenizer().decode(gpt2_tokenizer().encode(text)) == text
    assert tokenizer._SPACE.searched <= len(text)


@pytest.mark.parametrize("separator", [None, "|"])
def test_no_part_of_ordinary_text_is_long(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(documents, "PART_CHARS", 100)
    (tmp_path / "a.txt").write_text("w" * 1000 + "|" + "words of one document " * 300)
    parts = [part for part, _ in read_documents(tmp_path / "a.txt", separator=separator)]
    assert len(parts) > 60 and max(map(len, parts[2:])) < 130


# --- tables


def test_csv_as_others_write_it_is_read(tmp_path):
    rows = [("one", "a"), ('say "no"', "b,c"), ("two\nlines", "d"), ("two\r\nlines", "e"), ("", "f"), ("6\" long", "")]
    for name, options in (("minimal", {}), ("all", dict(quoting=csv.QUOTE_ALL)), ("unix", dict(dialect="unix"))):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            csv.writer(f, **options).writerows([("text", "label"), *rows])
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "pandas.csv", index=False)
    for name in ("minimal", "all", "unix", "pandas"):
        assert list(read_rows(tmp_path / f"{name}.csv", ["text", "label"])) == rows, name
    (tmp_path / "excel.csv").write_bytes('\ufefftext,n\r\n"a ""b""\nc",1\r\né,2\r\na"b,3\r\n'.encode())
    assert read(tmp_path / "excel.csv") == ['a "b"\nc', "é", 'a"b']


@pytest.mark.parametrize("data, line", [
    ('text,n\na,1\n"b,2\nc,3\n', 3), ('text,n\n"a\nb",1\n"c,2\n"d",3\n', 4), ('"text,n\na,1\n', 1),
    ('text,n\n"a "b" c",1\n', 2), ('text,n\na,1\n\nb,"2\n', 4),
])
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path, data, line):
    (tmp_path / "a.csv").write_text(data)
    with pytest.raises(UserError, match=rf"a\.csv, line {line}: the row that begins here is not .* close each"):
        read(tmp_path / "a.csv")


def test_a_cell_that_never_ends_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CELL_CHARS", 1000)
    (tmp_path / "a.csv").write_text('text\n"' + "a\n" * 501)
    with pytest.raises(UserError, match=r"line 2: .*field larger than field limit"):
        read(tmp_path / "a.csv")


def test_values_are_text_as_their_format_writes_them(tmp_path):
    values = [True, False, 3, -1.5, float("nan"), float("inf"), -float("inf"), None, "nan", ""]
    texts = ["true", "false", "3", "-1.5", "", "", "", "", "nan", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": v}) + "\n" for v in values) + '{"text": 1e999}')
    (tmp_path / "a.json").write_text(json.dumps([{"text": v} for v in values] + [{"text": float("nan")}]))
    for suffix in ("jsonl", "json"):
        assert read(tmp_path / f"a.{suffix}") == [*texts, ""]
    assert [text for _, text in read_texts(tmp_path / "a.jsonl", "text")] == [*texts, ""]


WORDS = ["one", None, "two", "two", ""]
KINDS = {
    "string": WORDS, "large_string": pa.array(WORDS, pa.large_string()),
    "string_view": pa.array(WORDS, pa.string_view()), "dictionary": pa.array(WORDS).dictionary_encode(),
    "int": pa.array([1, None, 2], pa.int8()), "float": pa.array([1.5, float("nan"), float("inf"), None]),
    "bool": [True, False, None], "null": pa.nulls(2),
}
EXPECTED = {"int": ["1", "", "2"], "float": ["1.5", "", "", ""], "bool": ["true", "false", ""], "null": ["", ""]}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_columns_of_text_and_numbers_are_read(tmp_path, kind):
    path = write_table(tmp_path / "a.parquet", **{"text.en": ["wrong"] * len(KINDS[kind]), "text": KINDS[kind]})
    expected = EXPECTED.get(kind, ["one", "", "two", "two", ""])
    assert read(path) == expected and list(read_texts(path, "text", 1)) == [*enumerate(expected)][1:]
    assert list(read_rows(path, ["text", "text"])) == [(text, text) for text in expected]


@pytest.mark.parametrize("kind, value", [
    (pa.list_(pa.string()), ["a"]), (pa.large_list(pa.string()), ["a"]), (pa.list_(pa.string(), 1), ["a"]),
    (pa.struct([("x", pa.string())]), {"x": "a"}), (pa.map_(pa.string(), pa.string()), [("a", "b")]),
    (pa.binary(), b"a"), (pa.decimal128(5, 2), 1), (pa.timestamp("us"), 0), (pa.date32(), 0), (pa.duration("s"), 0),
], ids=str)
def test_other_parquet_columns_are_refused_by_name(tmp_path, kind, value):
    path = write_table(tmp_path / "a.parquet", text=pa.array([None, value], kind))
    for function in (read, lambda path: list(read_texts(path, "text"))):
        with pytest.raises(UserError, match=rf"column 'text' contains {re.escape(str(kind)[:4])}.*, not text"):
            function(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    pyarrow.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    for suffix in ("parquet", "csv"):
        with pytest.raises(UserError, match="2 columns are named 'text'; rename one"):
            read(tmp_path / f"a.{suffix}")


# --- a parquet file of a few kilobytes that asks for gigabytes


def repeated(text, n):
    """Return a column in which n rows refer to one text."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))


BOMBS = {
    "a dictionary": lambda path: write_table(path, text=repeated("a" * 3_000_000, 10_000)),
    "a dictionary of plain strings": lambda path: write_table(path, text=["a" * 3_000_000] * 40),
    "deltas": lambda path: write_table(path, text=["a" * 3_000_000] * 40, Use_dictionary=False,
                                       Column_encoding={"text": "DELTA_BYTE_ARRAY"}),
    "zeros": lambda path: write_table(path, text=["a" * 45_000_000], Use_dictionary=False),
    "nulls": lambda path: write_table(path, text=pa.nulls(2_000_000)),
    "a label": lambda path: write_table(path, text=["a"] * 1000, label=repeated("a" * 3_000_000, 1000)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_parquet_bomb_is_one_line_and_little_memory(tmp_path, monkeypatch, bomb):
    BOMBS[bomb](tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 8000
    for where, name, value in ((documents, "UNPACKED_BYTES", 8_000_000), (documents, "BATCH_BYTES", 4_000_000),
                               (mutants, "MEMORY_LIMIT", 40_000_000)):
        monkeypatch.setattr(where, name, value)
    with mutants.time_and_memory_limits(), pytest.raises(UserError, match="unpacks to more than 1,000 times its size"):
        list(read_rows(tmp_path / "a.parquet", ["text"] + ["label"] * (bomb == "a label")))


def test_what_a_file_unpacks_to_counts_a_dictionary_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNPACKED_BYTES", 0)
    monkeypatch.setattr(documents, "UNPACKED_RATIO", 10)
    words = [bytes(part).hex() for part in np.random.default_rng(0).integers(0, 256, (1000, 100), dtype=np.uint8)]
    path = write_table(tmp_path / "a.parquet", text=pa.array(words * 3).dictionary_encode())
    assert read(path) == words * 3


@pytest.mark.parametrize("error", [MemoryError("malloc"), pa.ArrowKeyError("malloc"), ValueError("malloc\n")])
def test_whatever_pyarrow_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(documents, "_parquet_batches", fail)
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file \('?malloc'?\)$"):
        read(write_table(tmp_path / "a.parquet", text=["a"]))


def test_long_values_that_repeat_are_read_if_the_file_is_large_enough(tmp_path):
    """A few at a time, so that they fit the memory."""
    rng = np.random.default_rng(0)
    texts = ["a" * 1_000_000, "b" * 1000, rng.bytes(100_000).hex()]
    path = write_table(tmp_path / "a.parquet", text=[texts[i % 3] for i in range(100)], Row_group_size=40)
    assert read(path) == [texts[i % 3] for i in range(100)]
