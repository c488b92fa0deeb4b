"""Turn your own text into token shards: .txt, .md, .jsonl, .csv, .tsv and .parquet files, or directories of them.

    python prepare_text.py book.txt --out data/book
    python prepare_text.py stories/ --separator '<|endoftext|>' --train_tokenizer 8192 --out data/stories
    python prepare_text.py --demo --train_tokenizer 4096 --out data/demo

All input is read and checked before anything is written. Documents are shuffled by the seed; some go to validation.
To add an input format see exactgpt/documents.py.
"""
import exactgpt.launch  # noqa: F401  first, see there

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from exactgpt.config import TokenizerConfig, UserError, counted, flag, human_bytes, parse_config, run_script
from exactgpt.documents import find_files, python_documents, read_files
from exactgpt.shard_writer import encode_in_order, prepare_folder, write_shards
from exactgpt.shards import Manifest, permutation
from exactgpt.tokenizer import default_tokenizer, require_end_of_text, train_tokenizer


@dataclass(kw_only=True)
class PrepareTextConfig(TokenizerConfig):
    """The flags of prepare_text.py."""
    paths: list[str] = flag([], "files and directories to read, in this order", group="text", positional=True)
    demo: bool = flag(False, "use Python's own documentation instead of files")
    separator: str = flag("", "string between the documents of a .txt or .md file, with \\n and \\t for newline and "
                              "tab (default: one document per file)")
    text_column: str = flag("text", "column of .jsonl, .csv, .tsv and .parquet files that holds the text")
    train_tokenizer: int | None = flag(None, "train a byte-pair vocabulary of N entries on this text and use it",
                                       group="tokens", low=257, high=65535)
    out: str = flag("", "output folder, such as data/NAME (required)")
    val_fraction: float = flag(0.05, "fraction of the tokens kept for validation", above=0, below=1)
    shard_tokens: int = flag(100_000_000, "tokens per shard", low=1, high=2_000_000_000)
    seed: int = flag(1337, "random seed for the order of the documents", low=0)

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        if self.demo == bool(self.paths):
            raise UserError("--demo has its own text; drop the files" if self.demo else
                            "no input; name files or directories to read, or use --demo")
        if not self.out:
            raise UserError("no output folder; add --out data/NAME")
        if self.tokenizer and self.train_tokenizer:
            raise UserError("--tokenizer and --train_tokenizer cannot be combined; use one of them")


def iter_documents(config, files):
    """Return an iterator of (text, starts) over the documents of the command."""
    if config.demo:
        return ((text, True) for text in python_documents())
    return read_files(files, config.text_column, config.separator)


def scan_documents(documents):
    """Return (number of documents, bytes, sha256 of all text). Raises UserError for unreadable input."""
    n_documents, n_bytes, digest = 0, 0, hashlib.sha256()
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for text, starts in documents:
            data = text.encode("utf-8")
            digest.update(b"\xff" if starts else b"")      # UTF-8 never contains this byte, so it marks a start
            digest.update(data)
            n_documents += starts
            n_bytes += len(data)
            bar.update(len(data))
    return n_documents, n_bytes, digest.hexdigest()


def split_documents(lengths, order, val_fraction):
    """Return (val, train), the document numbers of each split in seeded order; val is empty if no document fits."""
    # Documents go to val until it has val_fraction of all tokens. One stays in train if it would make val more than
    # twice that size, or all there is.
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


def make_shards(config, manifest, files, n_documents):
    """Write the vocabulary, a validation shard and train shards of all documents, in seeded order."""
    if config.train_tokenizer:
        print(f"training a vocabulary of {config.train_tokenizer:,} entries on {counted(n_documents, 'document')}",
              flush=True)
        tokenizer = train_tokenizer((text for text, _ in iter_documents(config, files)), config.train_tokenizer)
        if tokenizer.n_vocab < config.train_tokenizer:
            print(f"the text is too small for that; the vocabulary has {tokenizer.n_vocab:,} entries")
    else:
        tokenizer = default_tokenizer(config.tokenizer)
    manifest.tokenizer, manifest.vocab_size, manifest.eot = tokenizer.name, tokenizer.n_vocab, tokenizer.eot
    manifest.save(config.out)       # still incomplete: after a kill, the same command recognizes it and starts over
    tokenizer.save(config.out)
    try:
        with tempfile.TemporaryFile(dir=config.out) as file:    # without a name, so a killed run leaves nothing behind
            documents = ((None, *document) for document in iter_documents(config, files))
            n_tokens, starts = 0, []        # starts: where each document starts in the file
            with tqdm(desc="tokenizing", total=n_documents, unit="doc", disable=None, leave=False) as bar:
                for _, tokens in encode_in_order(documents, tokenizer):
                    starts.append(n_tokens + np.flatnonzero(tokens == tokenizer.eot))
                    n_tokens += len(tokens)
                    file.write(tokens)
                    bar.update(len(starts[-1]))
            file.flush()
            tokens, starts = np.memmap(file, dtype="<u2", mode="r"), np.concatenate(starts)
            ends = np.append(starts[1:], len(tokens))
            order = permutation(len(starts), config.seed, "documents")
            val, train = split_documents(ends - starts, order, config.val_fraction)
            documents = (tokens[starts[d]:ends[d]] for d in np.concatenate([val, train]))
            n_val = int((ends - starts)[val].sum())
            if not len(val):       # no document fits: cut the end off the last one, which is then long enough
                n_val = max(1, int(config.val_fraction * len(tokens)))
                *others, last = documents
                documents = [last[-n_val:], *others, last[:-n_val]]
            bar = tqdm(documents, total=n_documents, desc="writing", unit="doc", disable=None, leave=False)
            pieces = (({}, document) for document in bar)
            name = Path(config.out).resolve().name.lstrip(".")      # the name of a shard begins with no dot
            write_shards(config.out, name, manifest, pieces, n_val, config.shard_tokens)
    except OSError as error:
        raise UserError(f"cannot write to {config.out}: {error.strerror or error}; fix that and run the same command "
                        "again") from error


def main(argv=None):
    """Make shards. argv: the flags (default: sys.argv). Raises UserError for user mistakes."""
    config = parse_config(PrepareTextConfig, argv, description=__doc__.split("\n\n")[0])
    tokenizer = None if config.train_tokenizer else default_tokenizer(config.tokenizer)
    tokenizer_name = require_end_of_text(tokenizer, "preparing text").name if tokenizer else ""
    files = find_files(config.paths)
    n_documents, n_bytes, digest = scan_documents(iter_documents(config, files))
    if not n_documents:
        raise UserError(f"no text in {', '.join(map(str, files[:3]))}")
    settings = dict(text=digest, train_tokenizer=config.train_tokenizer or 0, val_fraction=config.val_fraction,
                    shard_tokens=config.shard_tokens)
    wanted = Manifest(source="CPython documentation" if config.demo else "text", tokenizer=tokenizer_name,
                      vocab_size=0, eot=0, seed=config.seed, settings=settings)
    print(f"{counted(n_documents, 'document')}, {human_bytes(n_bytes)}", flush=True)
    # Not the folder's manifest: after a kill all shards are written again.
    prepare_folder(config.out, wanted, lambda _: make_shards(config, wanted, files, n_documents))


if __name__ == "__main__":
    run_script(main)
