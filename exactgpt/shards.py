"""Read folders of token shards: NAME_{val,train}_{index:06d}.npy, one-dimensional uint16 arrays, and manifest.json.

Each document follows an end-of-text token, and shard 0 is validation. This is build-nanogpt's layout, so its shards
work unchanged. The .bin files of llm.c and modded-nanogpt work too: a header of 256 int32 (magic 20240520, version 1,
token count), then uint16 tokens; and nanoGPT's train.bin and val.bin: uint16 tokens without a header. Files are not
trusted: docs/data.md says what is checked when.

To add a format of uint16 tokens after one header: a function like _read_bin_header, and an entry in HEADER_READERS.
"""
import dataclasses
import functools
import hashlib
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exactgpt.characters import META
from exactgpt.config import UserError, counted
from exactgpt.files import read_json, reading, write_json
from exactgpt.tokenizer import load_tokenizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4
NANOGPT_FILES = ("train.bin", "val.bin")
HEAD_BYTES = 8192          # of a .bin file, to see what it is if it is not what it should be
ENTRY_TYPES = {"shards": {"file": str, "split": str, "tokens": int, "sha256": str},
               "files": {"path": str, "size": int, "sha256": str}}


@dataclass
class Manifest:
    """The contents of manifest.json: what a shard folder holds, how it was made and where to continue after a kill."""
    source: str                # where the text came from
    tokenizer: str             # "gpt2", or the name of a trained vocabulary
    vocab_size: int
    eot: int                   # id of the end-of-text token
    seed: int = 0              # seed of the document order
    revision: str = ""         # commit of a hub data set
    settings: dict = field(default_factory=dict)   # flags and text hash; a command with other settings is refused
    files: list = field(default_factory=list)      # source files {path, size, sha256}; position["file"] is an index
    shards: list = field(default_factory=list)     # entries {file, split, tokens, sha256}
    rows: int = 0              # documents written so far
    position: dict = field(default_factory=dict)   # where in the source the next shard begins; empty when complete
    complete: bool = False
    format: int = FORMAT_VERSION

    def save(self, folder):
        """Write FOLDER/manifest.json, atomically."""
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))


def load_manifest(folder):
    """Return the manifest of a shard folder, or None if it has none. Raises UserError if it is damaged."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    stored = read_json(path)
    if stored.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} has format {stored.get('format')!r}, but this code reads {FORMAT_VERSION}; "
                        "recreate the shards")
    types = {f.name: f.type for f in dataclasses.fields(Manifest)}
    required = {"source", "tokenizer", "vocab_size", "eot"}
    wrong = [key for key in required | stored.keys() if type(stored.get(key)) is not types.get(key)]
    if not wrong:
        for key, entry_types in ENTRY_TYPES.items():
            wrong += [f"{key}[{i}]" for i, entry in enumerate(stored.get(key, []))
                      if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != entry_types]
        wrong += [key for key, value in stored.get("position", {}).items() if type(value) is not int or value < 0]
    if wrong:
        raise UserError(f"{path} is damaged (entry {min(wrong)!r}); recreate the shards")
    return Manifest(**stored)


@dataclass(frozen=True)
class Shard:
    """One file of uint16 tokens. Its header and its size agree."""
    path: Path
    split: str                 # "train" or "val"
    n_tokens: int
    header_bytes: int          # offset of the first token

    def open(self):
        """Open the file, unbuffered, for `read_tokens`. Raises UserError."""
        with reading(f"shard {self.path}"):
            return open(self.path, "rb", buffering=0)

    def read_tokens(self, file, start, out):
        """Fill the uint16 array `out` with the tokens from `start` on. Raises UserError if the file ends early."""
        # Not a memory map: if someone truncates the shard we get this error instead of a SIGBUS, and the resident size
        # of the process does not appear to grow by the whole data set.
        file.seek(self.header_bytes + 2 * start)
        view = memoryview(out).cast("B")
        while len(view):
            with reading(f"shard {self.path}"):
                n = file.readinto(view)
            if not n:
                raise UserError(f"shard {self.path} became shorter while it was read; recreate it")
            view = view[n:]


def open_shard(path):
    """Return the Shard of a .npy or .bin file. Raises UserError unless magic, version, dtype and length are correct."""
    path = Path(path)
    match = _SHARD_NAME.fullmatch(path.name)
    with reading(f"shard {path}"), open(path, "rb") as f:
        size = path.stat().st_size
        n_tokens, header_bytes = HEADER_READERS[path.suffix](f, path)
    if size != header_bytes + 2 * n_tokens:
        raise UserError(f"shard {path} is damaged: its header promises {counted(n_tokens, 'token')}, but its size is "
                        f"{counted(max(0, size - header_bytes) // 2, 'token')}; recreate it")
    if n_tokens == 0:
        raise UserError(f"shard {path} is empty; delete it or recreate it")
    return Shard(path, match["split"], n_tokens, header_bytes)


def _read_npy_header(f, path):
    try:
        np.lib.format.read_magic(f)
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    except OSError:
        raise
    except Exception as error:      # NumPy's parser may raise anything on garbage
        raise UserError(f"shard {path} is not a NumPy .npy file; recreate it") from error
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 0:
        raise UserError(f"shard {path} contains {dtype} of shape {shape}, not a 1-D array of uint16; recreate it")
    return int(shape[0]), f.tell()


def _read_bin_header(f, path):
    head = f.read(HEAD_BYTES)
    header = np.frombuffer(head[:BIN_HEADER_BYTES].ljust(BIN_HEADER_BYTES, b"\0"), dtype="<i4")
    if header[0] == BIN_MAGIC and header[1] == BIN_VERSION:
        return int(header[2]), BIN_HEADER_BYTES
    kind = "part of a Megatron data set (there is an .idx file)" if path.with_suffix(".idx").exists() else next(
        (name for matches, name in FOREIGN_FILES if matches(head)), None)
    seems = f"; it seems to be {kind}" if kind else ""
    if path.name not in NANOGPT_FILES:
        raise UserError(f"shard {path} is not a GPT-2 .bin file (magic {header[0]}, version {header[1]}; "
                        f"expected {BIN_MAGIC}, {BIN_VERSION}){seems}")
    size = f.seek(0, os.SEEK_END)
    if kind or size % 2:
        raise UserError(f"shard {path} of {size:,} bytes does not hold uint16 tokens{seems}; recreate it")
    return size // 2, 0


def _holds_wide_numbers(head, n):
    """Return True if the bytes are numbers of n uint16 each: all but the first are 0 or 1, which tokens never are."""
    numbers = np.frombuffer(head[:len(head) // (2 * n) * 2 * n], dtype="<u2").reshape(-1, n)
    return len(numbers) >= 32 and numbers[:, 1:].max() <= 1 and (numbers[:, 0] > 1).mean() > 0.5


FOREIGN_FILES = (          # what else may be called NAME.bin: (test of its first bytes, name)
    *((re.compile(pattern, re.DOTALL).match, name) for pattern, name in (
        (rb"version https://git-lfs", "a Git LFS pointer to the file (git lfs pull gets it)"),
        (re.escape((20240801).to_bytes(4, "little")), "llm.c's uint32 tokens for Llama 3"),
        (rb"PK\x03\x04|\x80\x02\x8a\x0al\xfc\x9cF", "a PyTorch or zip file"),
        (rb"GGUF", "a GGUF model"),
        (rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|\xfd7zXZ", "a compressed file"),
        (rb"\x93NUMPY", "a NumPy .npy file"),
        (rb"....\0\0\0\0\{\"", "a safetensors file"),
        (rb"[^\x00-\x08\x0b\x0c\x0e-\x1f]{256}", "plain text"))),
    (functools.partial(_holds_wide_numbers, n=4), "numbers of 64 bits"),
    (functools.partial(_holds_wide_numbers, n=2), "numbers of 32 bits"))
HEADER_READERS = {".npy": _read_npy_header, ".bin": _read_bin_header}     # (file, path) -> (tokens, header bytes)
# A name may begin with anything but a dot: macOS leaves ._NAME beside a copied NAME.
_SHARD_NAME = re.compile(r"(?:(?P<name>(?!\.)[^/\\]+)_|(?=(?:train|val)\.bin))(?P<split>train|val)(?:_(?P<index>\d+))?"
                         rf"(?:{'|'.join(map(re.escape, HEADER_READERS))})")


class ShardFolder:
    """A checked folder of shards: all headers are valid, the files match the manifest, there is only one data set."""
    # manifest is None for shards made by other tools. train and val list the shards of each split in file order.

    def __init__(self, folder, need_complete=True):
        """Check the folder. Raises UserError that says what is missing or damaged."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no shards: there is no folder {folder}; make them with prepare_fineweb.py or "
                            "prepare_text.py, or name another folder")
        self.manifest = load_manifest(folder)
        names = {p.name for p in self.folder.iterdir() if _SHARD_NAME.fullmatch(p.name) and p.is_file()}
        if self.manifest:
            listed = {entry["file"]: (entry["split"], entry["tokens"]) for entry in self.manifest.shards}
            if need_complete and not self.manifest.complete:
                raise UserError(f"{folder} is incomplete; run the same prepare command again to complete it")
            if listed.keys() - names:
                raise UserError(f"{folder}: shard {min(listed.keys() - names)} is missing; recreate the shards")
            if names - listed.keys() and self.manifest.complete:
                raise UserError(f"{folder}: shard {min(names - listed.keys())} is not in manifest.json; move it away")
            names = listed.keys()
        if not names:
            raise UserError(f"no shards in {folder} (NAME_train_000001{' or '.join(HEADER_READERS)}, or nanoGPT's "
                            f"{' and '.join(NANOGPT_FILES)}); make them with prepare_fineweb.py or prepare_text.py")
        matches = sorted(map(_SHARD_NAME.fullmatch, names), key=lambda m: (m["split"], int(m["index"] or 0), m.string))
        if len({Path(name).suffix for name in names}) > 1:
            raise UserError(f"{folder} mixes {' and '.join(HEADER_READERS)} shards; keep only one kind")
        prefixes = sorted({m["name"] or NANOGPT_FILES[0] for m in matches})
        if len(prefixes) > 1:
            raise UserError(f"{folder} mixes the data sets {prefixes[0]!r} and {prefixes[1]!r}; give each a folder")
        # We and most other tools number both splits in one sequence; a few restart at 0 for train.
        val, train = ([int(m["index"]) for m in matches if m["split"] == split and m["index"]]
                      for split in ("val", "train"))
        for indices in (val, train) if set(val) & set(train) else (sorted(val + train),):
            for index, following in itertools.pairwise(indices):
                if following != index + 1:
                    raise UserError(f"{folder}: shard {following:06d} follows {index:06d}; recreate what is missing, "
                                    "or delete what is there twice")
        self.shards = [open_shard(self.folder / m.string) for m in matches]
        for shard in self.shards:
            if self.manifest and (shard.split, shard.n_tokens) != listed[shard.path.name]:
                raise UserError(f"shard {shard.path} has {counted(shard.n_tokens, 'token')}, but manifest.json says "
                                f"{listed[shard.path.name][1]:,}; recreate the shards")
        self.train = [s for s in self.shards if s.split == "train"]
        self.val = [s for s in self.shards if s.split == "val"]

    def tokenizer(self, fallback_folder=""):
        """Return the tokenizer as load_tokenizer does. Raises UserError, also if it is not the one in the manifest."""
        tokenizer = load_tokenizer(self.folder, fallback_folder)
        m = self.manifest
        if m and (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) != (m.tokenizer, m.vocab_size, m.eot):
            raise UserError(f"{self.folder}: the shards were made with the vocabulary {m.tokenizer!r}, not with "
                            f"{tokenizer.name!r}; restore their vocab.bpe or recreate the shards")
        # The first 256 ids of a byte-pair vocabulary are single bytes: there is no text in which merges never occur.
        if (tokenizer.eot is not None and self.shards[0].path.name in NANOGPT_FILES and tokenizer.n_vocab > 257
                and all(tokens.max() < 256 for shard in self.shards for tokens in _samples(shard))):
            raise UserError(f"{self.folder} seems to hold characters, but its {META} is missing; copy it there from "
                            "where the files were made")
        return tokenizer

    def fingerprint(self, sample):
        """Return the checkpoint's entries {name: hash} that tell other data. A copy of the folder has the same ones.

        sample: what check_vocabulary returned.
        """
        # The path is left out: folders may move.
        entries = dict(data=_hash([(s.path.name, s.split, s.n_tokens) for s in self.shards]), data_sample=sample)
        if self.manifest:
            hashes = {entry["file"]: entry["sha256"] for entry in self.manifest.shards}
            entries["data_sha256"] = _hash([hashes[s.path.name] for s in self.shards])
        return entries

    def check_vocabulary(self, n_vocab):
        """Read samples of each shard; return a hash of them. Raises UserError if a token is outside the vocabulary."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for tokens in _samples(shard):
                _check_token_ids(shard, tokens, n_vocab)
                digest.update(tokens)
        return digest.hexdigest()

    def verify(self, n_vocab, progress=lambda n_bytes: None):
        """Raise UserError if a token is outside the vocabulary, or a file differs from its hash in the manifest."""
        hashes = {entry["file"]: entry["sha256"] for entry in self.manifest.shards} if self.manifest else {}
        buffer = np.empty(1 << 22, dtype="<u2")
        for shard in self.shards:
            with shard.open() as file:
                with reading(f"shard {shard.path}"):
                    digest = hashlib.sha256(file.read(shard.header_bytes))
                for start in range(0, shard.n_tokens, len(buffer)):
                    tokens = buffer[:min(len(buffer), shard.n_tokens - start)]
                    shard.read_tokens(file, start, tokens)
                    digest.update(tokens)
                    _check_token_ids(shard, tokens, n_vocab)
                    progress(tokens.nbytes)
            if digest.hexdigest() != hashes.get(shard.path.name, digest.hexdigest()):
                raise UserError(f"shard {shard.path} differs from its hash in manifest.json; delete {self.folder} "
                                "and recreate it")


def _hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _samples(shard, size=8192, places=4):
    """Yield the tokens at `places` places of a shard, the ends among them, in one array of `size` that is reused."""
    tokens = np.empty(min(size, shard.n_tokens), dtype="<u2")
    with shard.open() as file:
        for start in np.linspace(0, shard.n_tokens - len(tokens), places, dtype=np.int64).tolist():
            shard.read_tokens(file, start, tokens)
            yield tokens


def _check_token_ids(shard, tokens, n_vocab):
    if tokens.max() >= n_vocab:
        raise UserError(f"shard {shard.path} contains token {tokens.max()}, outside the vocabulary of {n_vocab:,}; "
                        "it was made with another tokenizer")


def permutation(n, *key):
    """Return a permutation of range(n) that depends only on n and key, with every version of NumPy."""
    # NumPy may change its shuffles, but it guarantees the raw stream of Philox (Salmon et al. 2011), so we sort that.
    digest = hashlib.sha256(repr(key).encode()).digest()
    random = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(random, kind="stable")
