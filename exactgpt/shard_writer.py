"""Tokenize documents on all cores and write them to shards; each finished shard gets an entry in the manifest.

The order of the documents is kept, memory is bounded, and the output is the same for any number of threads. Threads
are enough, because tiktoken encodes without Python's global lock.
"""
import collections
import contextlib
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, atomic_write, take_lock
from exactgpt.shards import ShardFolder, load_manifest

BATCH_CHARS = 1 << 20      # text per batch: enough to outweigh the overhead, little enough for memory


def encode_documents(tokenizer, documents):
    """Return the tokens of documents (label, text, starts) as one uint16 array.

    Each document begins with end-of-text. starts is False if the text continues the previous document.
    """
    parts = []
    for _, text, starts in documents:
        parts += [[tokenizer.eot]] if starts else []
        parts.append(tokenizer.encode_array(text))
    return np.concatenate(parts, dtype="<u2", casting="unsafe")


def encode_in_order(documents, tokenizer, n_threads):
    """Yield (label of the first document, tokens) for batches of consecutive documents (label, text, starts).

    At most three batches per thread are pending, even if the consumer is slow.
    """
    pending = collections.deque()
    with ThreadPoolExecutor(n_threads) as threads:
        for batch in _batches(documents):
            pending.append((batch[0][0], threads.submit(encode_documents, tokenizer, batch)))
            if len(pending) == 3 * n_threads:
                label, future = pending.popleft()
                yield label, future.result()
        for label, future in pending:
            yield label, future.result()


def _batches(documents):
    """Yield lists of documents (label, text, starts) with about BATCH_CHARS characters each."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def available_cpus():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -----------------------------------------------------------------------------
# the folder of shards

def load_matching_manifest(folder, wanted):
    """Return the folder's manifest if it was made by the same command as `wanted`, or None if the folder is new.

    A folder without a finished shard counts as new; of a complete one it says that there is nothing to do. Raises
    UserError if the folder contains something else.
    """
    found = load_manifest(folder)
    if found is None:
        others = [p.name for p in Path(folder).glob("[!.]*") if p.suffix != ".tmp"]
        if others:
            raise UserError(f"{folder} contains other files ({others[0]}); choose another --out")
        return None
    if not found.shards and not found.complete:
        return None
    theirs = {**found.settings, "seed": found.seed}
    differing = [k for k, v in {**wanted.settings, "seed": wanted.seed}.items() if theirs.get(k) != v]
    if wanted.tokenizer not in ("", found.tokenizer):       # "": not trained yet
        differing.append("tokenizer")
    if differing or found.source != wanted.source:
        raise UserError(f"{folder} contains shards of another command (differing: {', '.join(differing) or 'source'}); "
                        f"choose another --out, or delete {folder}")
    if found.complete:
        print(f"{folder} is already complete; nothing to do")
    return found


@contextlib.contextmanager
def locked_folder(folder, wanted, found):
    """Keep other processes out of the folder. Raises UserError if its manifest is no longer `found`."""
    with take_lock(folder, wait_s=0):
        if load_matching_manifest(folder, wanted) != found:
            raise UserError(f"another process wrote shards to {folder} in the meantime; run the same command again")
        yield


def print_summary(folder):
    """Print the sizes of a finished folder and the command to train on it."""
    shards = ShardFolder(folder)
    for name, split in (("train", shards.train), ("val", shards.val)):
        plural = "s" if len(split) != 1 else ""
        print(f"  {name:5s} {sum(s.n_tokens for s in split):>14,} tokens in {len(split)} shard{plural}")
    print(f"  vocabulary {shards.manifest.tokenizer}, {shards.manifest.vocab_size:,} entries")
    print(f"next: python train.py --data_dir {folder} --log_dir logs/{Path(folder).resolve().name} --dry_run\n"
          "      (estimates the time for GPT-2 124M; for a small model add --n_layer 4 --n_head 4 --n_embd 256)")


def save_shard(folder, name, split, index, tokens):
    """Write one shard and return its manifest entry {file, split, tokens, sha256}."""
    tokens = np.ascontiguousarray(tokens, dtype="<u2")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    file = f"{name}_{split}_{index:06d}.npy"
    digest = hashlib.sha256(header.getvalue())
    digest.update(tokens)
    with atomic_write(Path(folder) / file) as f:
        f.write(header.getvalue())
        f.write(tokens)
    return dict(file=file, split=split, tokens=len(tokens), sha256=digest.hexdigest())


class ShardWriter:
    """Cuts a stream of tokens into shards and keeps the manifest up to date with the files on disk.

    Shard 0 gets the first `val_tokens` tokens, each following shard gets `shard_tokens`, and the last gets the rest.
    Documents are cut at shard borders, as in build-nanogpt's fineweb.py.
    """

    def __init__(self, folder, name, manifest, val_tokens, shard_tokens):
        self.folder, self.name, self.manifest = Path(folder), name, manifest
        self._sizes = (val_tokens, shard_tokens)
        self._buffer = np.empty(max(self._sizes), dtype="<u2")
        self._filled = 0

    def append(self, tokens, position):
        """Add tokens (uint16) that begin at `position` (a dict) in the source.

        A full shard is written to disk, then the manifest. The manifest's position is where the next shard begins,
        "skip" tokens after `position`, and a continued run starts there.
        """
        start = 0
        while start < len(tokens):
            size = self._sizes[min(len(self.manifest.shards), 1)]
            n = min(len(tokens) - start, size - self._filled)
            part = tokens[start:start + n]
            self._buffer[self._filled:self._filled + n] = part
            self.manifest.rows += int(np.count_nonzero(part == self.manifest.eot))
            self._filled += n
            start += n
            if self._filled == size:
                self._flush({**position, "skip": position.get("skip", 0) + start})

    def _flush(self, position):
        index = len(self.manifest.shards)
        entry = save_shard(self.folder, self.name, "train" if index else "val", index, self._buffer[:self._filled])
        self.manifest.shards.append(entry)
        self.manifest.position = position
        self.manifest.save(self.folder)
        self._filled = 0

    def finish(self):
        """Write the last, shorter shard and mark the manifest complete."""
        self.manifest.complete = True
        self.manifest.position = {}
        if self._filled:
            self._flush({})
        else:
            self.manifest.save(self.folder)
