"""Token shards: a folder of NAME_{val,train}_{index:06d}.npy, one-dimensional uint16 arrays, and manifest.json.

Documents stand one after another, each after the end-of-text token; shard 0 is validation (build-nanogpt's
layout, whose shards are read unchanged). llm.c's and modded-nanogpt's .bin files are read too: 256 int32 of header
(magic 20240520, version 1, token count), then uint16 tokens. Nothing read is trusted: headers are held against
file sizes, the manifest against the files, and `verify` holds every token against the hashes.
"""
import dataclasses
import hashlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import UserError
from files import atomic_write, read_json, write_json
from tokenizer import load_tokenizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4
_SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)(?:_(?P<index>\d+))?\.(?:npy|bin)")


@dataclass
class Manifest:
    """What a shard folder holds and how it was made; the truth that a continued prepare script starts from."""
    source: str                # where the text came from
    tokenizer: str             # "gpt2", or the name of a trained vocabulary
    vocab_size: int
    eot: int                   # id of the end-of-text token
    seed: int = 0              # of the document order
    revision: str = ""         # commit of a hub data set
    settings: dict = field(default_factory=dict)   # flags that a continued prepare must keep
    shards: list = field(default_factory=list)     # rows {file, split, tokens, sha256}
    rows: int = 0              # documents consumed
    position: dict = field(default_factory=dict)   # where in the source the next shard begins
    complete: bool = False
    format: int = FORMAT_VERSION

    def save(self, folder):
        """Write FOLDER/manifest.json, atomically."""
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))


def load_manifest(folder):
    """The manifest of a shard folder, or None where there is none. Raises UserError for a damaged one."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    stored = read_json(path)
    hints = {f.name: f.type for f in dataclasses.fields(Manifest)}
    required = {f.name for f in dataclasses.fields(Manifest)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if stored.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} has format {stored.get('format')!r}, this code reads {FORMAT_VERSION}; make the shards again")
    wrong = [k for k, v in stored.items() if k not in hints or type(v) is not hints[k]] + list(required - set(stored))
    row_types = {"file": str, "split": str, "tokens": int, "sha256": str}
    wrong += [f"shards[{i}]" for i, row in enumerate(stored.get("shards", []) if not wrong else [])
              if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != row_types
              or row["tokens"] < 0 or row["split"] not in ("train", "val") or Path(row["file"]).name != row["file"]]
    if wrong:
        raise UserError(f"{path} is damaged (entry {wrong[0]!r}); make the shards again")
    return Manifest(**stored)


@dataclass(frozen=True)
class Shard:
    """One file of uint16 tokens whose header agrees with its size."""
    path: Path
    split: str                 # "train" or "val"
    n_tokens: int
    header_bytes: int          # where the tokens begin

    def row(self):
        """What identifies a shard's content place: (name, split, tokens); the path does not matter."""
        return (self.path.name, self.split, self.n_tokens)

    def open(self):
        """The open file, unbuffered; `read_tokens` reads from it."""
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard {self.path}: {error.strerror}") from error

    def read_tokens(self, file, start, out):
        """Fill the uint16 array `out` with the tokens from `start` on. Raises UserError where the file ends early.

        Reads, not a memory map: a shard that somebody truncates gives this error and not a SIGBUS, and the
        process does not seem to grow by the whole data set.
        """
        file.seek(self.header_bytes + 2 * start)
        view = memoryview(out).cast("B")
        while len(view):
            n = file.readinto(view)
            if not n:
                raise UserError(f"shard {self.path} became shorter while it was read; make it again")
            view = view[n:]


def open_shard(path):
    """The Shard of a .npy or .bin file. Raises UserError unless magic, version, type and length all agree."""
    path = Path(path)
    match = _SHARD_NAME.fullmatch(path.name)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            n_tokens, header_bytes = _read_npy_header(f, path) if path.suffix == ".npy" else _read_bin_header(f, path)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from error
    if size != header_bytes + 2 * n_tokens:
        raise UserError(f"shard {path} is damaged: its header promises {n_tokens:,} tokens, its size holds "
                        f"{(size - header_bytes) / 2:,.1f}; make it again")
    if n_tokens == 0:
        raise UserError(f"shard {path} is empty; delete it or make it again")
    return Shard(path, match["split"], n_tokens, header_bytes)


def _read_npy_header(f, path):
    try:
        version = np.lib.format.read_magic(f)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read_header(f)
    except (ValueError, KeyError, EOFError, TypeError, SyntaxError) as error:
        raise UserError(f"shard {path} is not a NumPy .npy file; make it again") from error
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 0:
        raise UserError(f"shard {path} holds {dtype} of shape {shape}, not a row of uint16 tokens")
    return int(shape[0]), f.tell()


def _read_bin_header(f, path):
    header = np.frombuffer(f.read(BIN_HEADER_BYTES).ljust(BIN_HEADER_BYTES, b"\0"), dtype="<i4")
    if header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        raise UserError(f"shard {path} is not a GPT-2 .bin file (magic {header[0]}, version {header[1]}; "
                        f"expected {BIN_MAGIC}, {BIN_VERSION})")
    return int(header[2]), BIN_HEADER_BYTES


class ShardFolder:
    """A folder of shards, checked: every file's header, the manifest against the files, one data set only."""

    def __init__(self, folder, need_complete=True):
        """Raises UserError naming what is missing or damaged and how to mend it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no shards: {folder} does not exist; make them with prepare_fineweb.py or prepare_text.py, "
                            "or name their folder with --data_dir")
        self.manifest = load_manifest(folder)
        if need_complete and self.manifest and not self.manifest.complete:
            raise UserError(f"{folder} is incomplete: run the same prepare command again, it continues")
        names = sorted(p.name for p in self.folder.iterdir() if _SHARD_NAME.fullmatch(p.name))
        if self.manifest:
            listed = [row["file"] for row in self.manifest.shards]
            missing, extra = sorted(set(listed) - set(names)), sorted(set(names) - set(listed))
            if missing or (extra and need_complete):
                raise UserError(f"{folder}: shard {(missing or extra)[0]} is "
                                f"{'missing' if missing else 'not in manifest.json'}; make the shards again")
            names = sorted(listed)
        if not names:
            raise UserError(f"no shards in {folder} (NAME_train_000001.npy or .bin); make them with prepare_fineweb.py "
                            "or prepare_text.py")
        self._check_names(names)
        self.shards = [open_shard(self.folder / name) for name in names]
        for shard, row in zip(self.shards, sorted(self.manifest.shards, key=lambda r: r["file"]) if self.manifest else ()):
            if (shard.split, shard.n_tokens) != (row["split"], row["tokens"]):
                raise UserError(f"shard {shard.path} holds {shard.n_tokens:,} tokens, manifest.json says {row['tokens']:,}; "
                                "make the shards again")
        self.train = [s for s in self.shards if s.split == "train"]
        self.val = [s for s in self.shards if s.split == "val"]

    def _check_names(self, names):
        parts = [_SHARD_NAME.fullmatch(name) for name in names]
        prefixes = sorted({p["name"] for p in parts})
        if len(prefixes) > 1:
            raise UserError(f"{self.folder} mixes the data sets {prefixes[0]!r} and {prefixes[1]!r}; give each a folder of its own")
        suffixes = {Path(name).suffix for name in names}
        if len(suffixes) > 1:
            raise UserError(f"{self.folder} mixes .npy and .bin shards; keep one kind")
        indices = sorted(int(p["index"]) for p in parts if p["index"] is not None)
        for index, following in zip(indices, indices[1:]):
            if following != index + 1:
                raise UserError(f"{self.folder}: shard {index + 1:06d} is missing between {index:06d} and {following:06d}"
                                if following > index else f"{self.folder}: two shards have the number {index:06d}")

    def tokenizer(self):
        """The tokenizer of these shards (its files lie beside them; GPT-2's else). Raises UserError if they disagree."""
        tokenizer = load_tokenizer(self.folder)
        if self.manifest and (tokenizer.name, tokenizer.n_vocab) != (self.manifest.tokenizer, self.manifest.vocab_size):
            raise UserError(f"{self.folder}: the shards were made with the vocabulary {self.manifest.tokenizer!r}, the files "
                            f"beside them are {tokenizer.name!r}; make the shards again")
        return tokenizer

    def fingerprint(self):
        """A hash of the (name, split, tokens) rows: the same shards in another place have the same."""
        return hashlib.sha256(repr([s.row() for s in self.shards]).encode()).hexdigest()

    def check_vocabulary(self, n_vocab, sample=65536):
        """Raise UserError if a token of the first `sample` of any shard lies outside the vocabulary."""
        for shard in self.shards:
            tokens = np.empty(min(sample, shard.n_tokens), dtype="<u2")
            with shard.open() as file:
                shard.read_tokens(file, 0, tokens)
            _check_largest(shard, tokens, n_vocab)

    def verify(self, n_vocab, progress=iter):
        """Read every token: hashes against the manifest, ids against the vocabulary. Raises UserError at the first fault."""
        expected = {row["file"]: row["sha256"] for row in self.manifest.shards} if self.manifest else {}
        for shard in progress(self.shards):
            tokens = np.empty(shard.n_tokens, dtype="<u2")
            with shard.open() as file:
                shard.read_tokens(file, 0, tokens)
            _check_largest(shard, tokens, n_vocab)
            if expected and hashlib.sha256(shard.path.read_bytes()).hexdigest() != expected[shard.path.name]:
                raise UserError(f"shard {shard.path} differs from its hash in manifest.json; delete the folder and make it again")


def _check_largest(shard, tokens, n_vocab):
    if tokens.max() >= n_vocab:
        raise UserError(f"shard {shard.path} holds token {tokens.max()}, outside the vocabulary of {n_vocab:,}; "
                        "its tokenizer is another one")


def save_shard(folder, name, split, index, tokens):
    """Write one shard atomically; its manifest row {file, split, tokens, sha256}."""
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype("<u2", copy=False), allow_pickle=False)
    file = f"{name}_{split}_{index:06d}.npy"
    with atomic_write(Path(folder) / file) as f:
        f.write(buffer.getbuffer())
    return dict(file=file, split=split, tokens=len(tokens), sha256=hashlib.sha256(buffer.getbuffer()).hexdigest())


class ShardWriter:
    """Cuts a stream of documents into shards and keeps the manifest in step with what is on the disk.

    Shard 0 holds the first `val_tokens` tokens, the following ones `shard_tokens` each, the last what is left;
    documents are cut at the borders, as build-nanogpt's fineweb.py does.
    """

    def __init__(self, folder, name, manifest, val_tokens, shard_tokens):
        self.folder, self.name, self.manifest = Path(folder), name, manifest
        self._sizes = (val_tokens, shard_tokens)
        self._buffer = np.empty(max(self._sizes), dtype="<u2")
        self._filled = 0

    def append(self, tokens, position):
        """Add one document (uint16, end-of-text first) that stands at `position` (a dict) in the source.

        When a shard is full it is written, and then the manifest, whose position says how much of which document
        the finished shards hold ("skip"): what a continued run begins with.
        """
        start = 0
        while start < len(tokens):
            size = self._sizes[min(len(self.manifest.shards), 1)]
            n = min(len(tokens) - start, size - self._filled)
            self._buffer[self._filled:self._filled + n] = tokens[start:start + n]
            self._filled += n
            start += n
            if self._filled == size:
                self._flush({**position, "skip": start})

    def _flush(self, position):
        index = len(self.manifest.shards)
        row = save_shard(self.folder, self.name, "train" if index else "val", index, self._buffer[:self._filled])
        self.manifest.shards.append(row)
        self.manifest.position = position
        self.manifest.save(self.folder)
        self._filled = 0

    def finish(self, position):
        """Write the last, shorter shard and mark the manifest complete."""
        if self._filled:
            self._flush(position)
        self.manifest.complete = True
        self.manifest.save(self.folder)
