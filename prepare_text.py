"""Your own text to token shards: .txt, .md, .jsonl, .csv, .tsv, .parquet files and directories of them.

    python prepare_text.py book.txt --out data/book
    python prepare_text.py stories/ --separator '<|endoftext|>' --train_tokenizer 8192 --out data/stories
    python prepare_text.py --demo --train_tokenizer 4096 --out data/demo

Everything is read and checked before anything is written. Documents are shuffled by the seed; some go to validation.
"""
import hashlib
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from exactgpt.config import FolderLock, UserError, flag, human_bytes, parse_config, run_script
from exactgpt.documents import find_files, python_documents, read_documents
from exactgpt.shard_writer import (
    ShardWriter,
    available_cpus,
    encode_tasks,
    in_batches,
    matching_manifest,
    print_shards,
    writing_to,
)
from exactgpt.shards import Manifest, permutation
from exactgpt.tokenizer import default_tokenizer, train_tokenizer

POOL_BYTES = 10_000_000    # below this, starting worker processes takes longer than they save


@dataclass(kw_only=True)
class Config:
    """Every flag of this script."""
    paths: list[str] = flag([], "files and directories, in this order", group="text", positional=True)
    demo: bool = flag(False, "the documentation inside CPython instead of files", group="text")
    separator: str = flag("", r"what stands between the documents of a .txt (\n and \t are understood); "
                          "without it a file is one document", group="text")
    text_column: str = flag("text", "the column of .jsonl, .csv, .tsv and .parquet that holds the text", group="text")
    tokenizer: str = flag("", "folder whose vocab.bpe and encoder.json encode the text, such as one with shards "
                          "(default: GPT-2's vocabulary)", group="tokens")
    train_tokenizer: int | None = flag(None, "train a byte-pair vocabulary of N entries on this text instead",
                                       group="tokens", low=257, high=65535)
    out: str = flag("", "the folder to make, such as data/NAME (required)", group="tokens")
    val_fraction: float = flag(0.05, "share of the tokens kept for validation", group="tokens", above=0, below=1)
    shard_tokens: int = flag(100_000_000, "tokens in a shard", group="tokens", low=1, high=2_000_000_000)
    seed: int = flag(1337, "of the order of the documents", group="tokens", low=0)

    def check(self):
        """Raise UserError for flags that are missing or contradict each other; read the escapes in --separator."""
        if self.demo == bool(self.paths):
            raise UserError("--demo brings its own text; drop the files" if self.demo else
                            "name the files and directories to read, or --demo")
        if not self.out:
            raise UserError("say where the shards go: --out data/NAME")
        if self.tokenizer and self.train_tokenizer:
            raise UserError("--tokenizer and --train_tokenizer exclude each other: drop one of them")
        self.separator = self.separator.replace("\\n", "\n").replace("\\t", "\t")


class Corpus:
    """All documents of a command; iterating reads them again from the start as (text, starts) pairs.

    Documents of whitespace alone are left out.
    """

    def __init__(self, config):
        self._config = config
        self.files = [] if config.demo else find_files(config.paths)
        self._demo = list(python_documents()) if config.demo else []

    def __iter__(self):
        c = self._config
        files = (read_documents(path, c.text_column, c.separator) for path in self.files)
        for text, starts in itertools.chain(((text, True) for text in self._demo), *files):
            if not starts or (text and not text.isspace()):
                yield text, starts

    def survey(self):
        """(documents, bytes, sha256 of them all); reads everything, so that every fault shows. Raises UserError."""
        n_documents, n_bytes, digest = 0, 0, hashlib.sha256()
        with tqdm(desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for text, starts in self:
                data = text.encode("utf-8")
                digest.update(b"\xff" if starts else b"")      # a byte that UTF-8 never holds
                digest.update(data)
                n_documents += starts
                n_bytes += len(data)
                bar.update(len(data))
        if not n_documents:
            raise UserError(f"there is no text in {', '.join(map(str, self.files[:3]))}")
        return n_documents, n_bytes, digest.hexdigest()


def tokenise(corpus, n_bytes, tokenizer, file):
    """Write the corpus' tokens into an open file; (all tokens, a uint16 array that stays there; documents' starts)."""
    num_proc = available_cpus() if n_bytes > POOL_BYTES else 0
    tasks = ((None, iter_batch, batch) for batch in in_batches(corpus))
    n_tokens, starts = 0, []
    with tqdm(desc="tokenising", total=n_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for _, tokens, size in encode_tasks(tasks, tokenizer, num_proc):
            starts.append(n_tokens + np.flatnonzero(tokens == tokenizer.eot))
            n_tokens += len(tokens)
            file.write(tokens)
            bar.update(size)
    file.flush()
    return np.memmap(file, dtype="<u2", mode="r"), np.concatenate(starts)


def iter_batch(batch):
    """How a worker reads a task whose texts travel with it."""
    return batch


def split_documents(lengths, order, val_fraction):
    """(val, train): the documents of each split, in seeded order; val is empty where no document fits.

    lengths (documents,) in tokens. Documents go to val until it holds val_fraction of the tokens; one that would make
    it more than twice that, or all there is, is left to train.
    """
    total = lengths.sum()
    target = val_fraction * total
    most = min(2 * target, total - 1)
    val, n_val = [], 0
    for document in order:
        if n_val >= target:
            break
        if n_val + lengths[document] <= most:
            val.append(document)
            n_val += int(lengths[document])
    return np.array(val, dtype=np.int64), order[~np.isin(order, val)]


def write_shards(folder, manifest, tokens, starts, config):
    """Cut the tokens (all documents as read) into a val shard and train shards in seeded order."""
    ends = np.append(starts[1:], len(tokens))
    order = permutation(len(starts), config.seed, "documents")
    val, train = split_documents(ends - starts, order, config.val_fraction)
    documents = np.concatenate([val, train])
    if len(val):
        n_val = int((ends - starts)[val].sum())
    else:       # no document fits: val is the tail of what would be train
        n_val = max(1, int(config.val_fraction * len(tokens)))
        starts, ends = cut_tail(starts[train], ends[train], n_val)
        documents = np.arange(len(starts))
    writer = ShardWriter(folder, folder.resolve().name, manifest, n_val, config.shard_tokens)
    for d in tqdm(documents, desc="writing", unit="doc", unit_scale=True, disable=None, leave=False):
        writer.append(tokens[starts[d]:ends[d]], {})
    writer.finish()


def cut_tail(starts, ends, n_tail):
    """The same pieces in another order, (2, pieces): the last n_tail tokens first, the piece at the border cut."""
    before = np.cumsum(ends - starts) - (ends - starts)         # tokens in front of each piece
    border = before[-1] + ends[-1] - starts[-1] - n_tail
    i = int(np.searchsorted(before, border, side="right")) - 1  # the piece that holds the border
    cut = starts[i] + border - before[i]
    pieces = [(cut, ends[i]), *zip(starts[i + 1:], ends[i + 1:]), *zip(starts[:i], ends[:i]), (starts[i], cut)]
    return np.array([p for p in pieces if p[0] < p[1]]).T


def is_made(folder, manifest):
    """Whether a folder holds the shards of this command; says so. Raises UserError where it holds other things."""
    found = matching_manifest(folder, manifest)
    if found and found.complete:
        print(f"{folder} already holds the shards of this command")
        return True
    return False


def main(argv=None):
    """Make shards as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(Config, argv, description=__doc__.split("\n\n")[0])
    folder = Path(config.out)
    tokenizer = None if config.train_tokenizer else default_tokenizer(config.tokenizer)
    corpus = Corpus(config)
    n_documents, n_bytes, digest = corpus.survey()
    manifest = Manifest(source="CPython documentation" if config.demo else "text", vocab_size=0, eot=0,
                        tokenizer=tokenizer.name if tokenizer else "", seed=config.seed, settings=dict(
                            text=digest, train_tokenizer=config.train_tokenizer or 0, val_fraction=config.val_fraction,
                            shard_tokens=config.shard_tokens))
    if is_made(folder, manifest):
        return print_shards(folder)
    with FolderLock(folder, wait_s=0), writing_to(folder):
        if is_made(folder, manifest):    # by another process, meanwhile
            return print_shards(folder)
        if tokenizer is None:
            print(f"training a vocabulary of {config.train_tokenizer:,} entries on {human_bytes(n_bytes)}", flush=True)
            tokenizer = train_tokenizer((text for text, _ in corpus), config.train_tokenizer)
            if tokenizer.n_vocab < config.train_tokenizer:
                print(f"this text has pairs for {tokenizer.n_vocab:,} entries only")
        manifest.tokenizer, manifest.vocab_size, manifest.eot = tokenizer.name, tokenizer.n_vocab, tokenizer.eot
        manifest.save(folder)           # incomplete as yet: a killed run is recognised and done again
        tokenizer.save(folder)
        with tempfile.TemporaryFile(dir=folder) as file:    # nameless: a killed run leaves none
            write_shards(folder, manifest, *tokenise(corpus, n_bytes, tokenizer, file), config)
    print(f"{n_documents:,} documents, {human_bytes(n_bytes)} -> {folder}")
    return print_shards(folder)


if __name__ == "__main__":
    run_script(main)
