"""Token shards: a folder of NAME_{val,train}_{index:06d}.npy, one-dimensional uint16 arrays, and manifest.json.

Documents stand one after another, each after the end-of-text token; shard 0 is validation (build-nanogpt's
layout, whose shards are read unchanged). llm.c's and modded-nanogpt's .bin files are read too: 256 int32 of header
(magic 20240520, version 1, token count), then uint16 tokens. Nothing read is trusted: headers are held against
file sizes, the manifest against the files, and `verify` holds every token against the hashes.
"""
import dataclasses
import hashlib
import itertools
import re
import warnings
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, read_json, write_json
from exactgpt.tokenizer import load_tokenizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4
FILE_TYPES = {"path": str, "size": int, "sha256": str}
_SHARD_NAME = re.compile(r"(?P<name>[^/\\]+)_(?P<split>train|val)(?:_(?P<index>\d+))?\.(?:npy|bin)")


@dataclass
class Manifest:
    """What a shard folder holds and how it was made; the truth that a continued prepare_fineweb.py starts from
    (prepare_text.py begins again)."""
    source: str                # where the text came from
    tokenizer: str             # "gpt2", or the name of a trained vocabulary
    vocab_size: int
    eot: int                   # id of the end-of-text token
    seed: int = 0              # of the document order
    revision: str = ""         # commit of a hub data set
    settings: dict = field(default_factory=dict)   # what the same command has the same: flags, the hash of the text
    files: list = field(default_factory=list)      # source files {path, size, sha256} that position counts
    shards: list = field(default_factory=list)     # rows {file, split, tokens, sha256}
    rows: int = 0              # documents consumed
    position: dict = field(default_factory=dict)   # where in the source the next shard begins; empty at the end
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
    if stored.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} has format {stored.get('format')!r}, this code reads {FORMAT_VERSION}; "
                        "make the shards again")
    known = {f.name: f for f in dataclasses.fields(Manifest)}
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    wrong = [k for k, v in stored.items() if k not in known or type(v) is not known[k].type]
    wrong += required - set(stored)
    if not wrong:
        wrong = [f"shards[{i}]" for i, row in enumerate(stored.get("shards", [])) if not _is_shard_row(row)]
        wrong += [f"files[{i}]" for i, row in enumerate(stored.get("files", [])) if _types(row) != FILE_TYPES]
        wrong += [k for k, v in stored.get("position", {}).items() if type(v) is not int or v < 0]
    if wrong:
        raise UserError(f"{path} is damaged (entry {wrong[0]!r}); make the shards again")
    return Manifest(**stored)


def _types(row):
    return {k: type(v) for k, v in row.items()} if isinstance(row, dict) else None


def _is_shard_row(row):
    return (_types(row) == {"file": str, "split": str, "tokens": int, "sha256": str}
            and row["tokens"] > 0 and row["split"] in ("train", "val") and bool(_SHARD_NAME.fullmatch(row["file"])))


@dataclass(frozen=True)
class Shard:
    """One file of uint16 tokens whose header agrees with its size."""
    path: Path
    split: str                 # "train" or "val"
    n_tokens: int
    header_bytes: int          # where the tokens begin

    def row(self):
        """What the fingerprint of a folder takes of a shard: (name, split, tokens); the path does not matter."""
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
                        f"{max(0, size - header_bytes) // 2:,}; make it again")
    if n_tokens == 0:
        raise UserError(f"shard {path} is empty; delete it or make it again")
    return Shard(path, match["split"], n_tokens, header_bytes)


def _read_npy_header(f, path):
    try:
        version = np.lib.format.read_magic(f)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of a header in Python 2's manner
            shape, _, dtype = read_header[version](f)
    except Exception as error:      # whatever the parser says of a foreign header
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
    """A folder of shards, checked: every file's header, the manifest against the files, one data set only.

    manifest is None in peers' folders. train and val are the shards of each split in file order.
    """

    def __init__(self, folder, need_complete=True):
        """Raises UserError naming what is missing or damaged and how to mend it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            problem = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise UserError(f"no shards: {folder} {problem}; make them with prepare_fineweb.py or prepare_text.py, or "
                            "name the folder where they are")
        self.manifest = load_manifest(folder)
        if need_complete and self.manifest and not self.manifest.complete:
            raise UserError(f"{folder} is incomplete: run the same prepare command again, which completes it")
        names = [p.name for p in self.folder.iterdir() if _SHARD_NAME.fullmatch(p.name)]
        if self.manifest:
            names = self._listed_names(set(names))
        if not names:
            raise UserError(f"no shards in {folder} (NAME_train_000001.npy or .bin); make them with "
                            "prepare_fineweb.py or prepare_text.py")
        self._check_names([_SHARD_NAME.fullmatch(name) for name in names])
        self.shards = [open_shard(self.folder / name) for name in sorted(names, key=_file_order)]
        self.train = [s for s in self.shards if s.split == "train"]
        self.val = [s for s in self.shards if s.split == "val"]
        if self.manifest:
            self._check_rows()

    def _listed_names(self, present):
        listed = {row["file"] for row in self.manifest.shards}
        if listed - present:
            raise UserError(f"{self.folder}: shard {min(listed - present)} is missing; make the shards again")
        if present - listed and self.manifest.complete:
            raise UserError(f"{self.folder}: shard {min(present - listed)} is not in manifest.json; move it away")
        return listed

    def _check_rows(self):
        rows = {row["file"]: row for row in self.manifest.shards}
        for shard in self.shards:
            row = rows[shard.path.name]
            if (shard.split, shard.n_tokens) != (row["split"], row["tokens"]):
                raise UserError(f"shard {shard.path} holds {shard.n_tokens:,} tokens, manifest.json says "
                                f"{row['tokens']:,}; make the shards again")

    def _check_names(self, matches):
        prefixes = sorted({m["name"] for m in matches})
        if len(prefixes) > 1:
            raise UserError(f"{self.folder} mixes the data sets {prefixes[0]!r} and {prefixes[1]!r}; give each a "
                            "folder of its own")
        if len({Path(m.string).suffix for m in matches}) > 1:
            raise UserError(f"{self.folder} mixes .npy and .bin shards; keep one kind")
        numbers = {split: sorted(int(m["index"]) for m in matches if m["split"] == split and m["index"])
                   for split in ("train", "val")}
        if not set(numbers["train"]) & set(numbers["val"]):     # ours and most peers' count through both splits
            numbers = {"train or val": sorted(numbers["train"] + numbers["val"])}
        for split, indices in numbers.items():
            for index, following in itertools.pairwise(indices):
                if following != index + 1:
                    what = f"is missing before {following:06d}" if following > index else "is there twice"
                    raise UserError(f"{self.folder}: {split} shard {min(index + 1, following):06d} {what}")

    def tokenizer(self, otherwise=""):
        """The tokenizer of these shards: its files lie beside them, else in the folder `otherwise`; else GPT-2's.

        Raises UserError where the manifest names another one, and where both folders have one and they differ.
        """
        tokenizer = load_tokenizer(self.folder, otherwise)
        m = self.manifest
        if m and (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) != (m.tokenizer, m.vocab_size, m.eot):
            raise UserError(f"{self.folder}: the shards were made with the vocabulary {m.tokenizer!r}, not with "
                            f"{tokenizer.name!r}; bring the right vocab.bpe or make the shards again")
        return tokenizer

    def fingerprint(self):
        """A hash of the (name, split, tokens) rows: the same shards in another place have the same."""
        return hashlib.sha256(repr([s.row() for s in self.shards]).encode()).hexdigest()

    def check_vocabulary(self, n_vocab, sample=8192, places=4):
        """Raise UserError if a sampled token lies outside the vocabulary: `sample` tokens at `places` of each shard."""
        for shard in self.shards:
            tokens = np.empty(min(sample, shard.n_tokens), dtype="<u2")
            with shard.open() as file:
                for start in np.linspace(0, shard.n_tokens - len(tokens), places, dtype=np.int64).tolist():
                    shard.read_tokens(file, start, tokens)
                    _check_largest(shard, tokens, n_vocab)

    def verify(self, n_vocab, progress=lambda n_bytes: None):
        """Read every token: ids against the vocabulary, files against the manifest's hashes where there is one.

        progress is called with the number of bytes after each piece. Raises UserError at the first fault.
        """
        hashes = {row["file"]: row["sha256"] for row in self.manifest.shards} if self.manifest else {}
        buffer = np.empty(1 << 22, dtype="<u2")
        for shard in self.shards:
            with shard.open() as file:
                digest = hashlib.sha256(file.read(shard.header_bytes))
                for start in range(0, shard.n_tokens, len(buffer)):
                    tokens = buffer[:min(len(buffer), shard.n_tokens - start)]
                    shard.read_tokens(file, start, tokens)
                    digest.update(tokens)
                    _check_largest(shard, tokens, n_vocab)
                    progress(tokens.nbytes)
            if digest.hexdigest() != hashes.get(shard.path.name, digest.hexdigest()):
                raise UserError(f"shard {shard.path} differs from its hash in manifest.json; delete {self.folder} "
                                "and make it again")


def _file_order(name):
    m = _SHARD_NAME.fullmatch(name)
    return m["split"], int(m["index"] or 0), name


def _check_largest(shard, tokens, n_vocab):
    if tokens.max() >= n_vocab:
        raise UserError(f"shard {shard.path} holds token {tokens.max()}, outside the vocabulary of {n_vocab:,}; "
                        "its tokenizer is another one")


def permutation(n, *key):
    """A permutation of range(n), a pure function of (n, key) that no NumPy release may change.

    Sorts the raw output of the Philox generator (Salmon et al. 2011), whose stream NumPy guarantees.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    random = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(random, kind="stable")
