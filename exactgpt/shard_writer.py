"""Tokenize documents on all cores and write them to shards; each finished shard gets an entry in the manifest.

The order of the documents is kept, memory is bounded, and the output is the same for any number of threads. Threads
are enough, because tiktoken encodes without Python's global lock.
"""
import collections
import hashlib
import io
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, command, counted
from exactgpt.files import FolderLock, atomic_write
from exactgpt.shards import ShardFolder, load_manifest

SMALL_STEP = 2048          # tokens per step of a small model
BATCH_CHARS = 1 << 20      # text per batch: enough to outweigh the overhead, little enough for memory


def encode_documents(tokenizer, documents):
    """Return the tokens of documents (label, text, starts) as one uint16 array; end-of-text begins what `starts`."""
    parts = []
    for _, text, starts in documents:
        parts += [[tokenizer.eot]] if starts else []
        parts.append(tokenizer.encode_array(text))
    return np.concatenate(parts, dtype="<u2", casting="unsafe")


def encode_in_order(documents, tokenizer, n_threads=None):
    """Yield (label of the first document, tokens) for batches of consecutive documents (label, text, starts)."""
    # At most three batches per thread are pending, even if the consumer is slow. n_threads: None is one per core.
    if n_threads is None:
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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


# ---- the folder of shards ----------------------------------------------------

def prepare_folder(folder, wanted, write, check=lambda manifest: None):
    """Make the shards that the manifest `wanted` asks for, unless the folder has them already; print their sizes.

    check(manifest) runs before anything is written; write(manifest) has the folder to itself. They get the folder's
    manifest if the same command began it, otherwise `wanted`. Raises UserError if something else is in the folder.
    """
    found = _load_matching_manifest(folder, wanted)
    manifest = found or wanted
    if manifest.complete:
        print(f"{folder} is already complete; nothing to do")
    else:
        check(manifest)
        with FolderLock(folder, wait_s=0) as lock:
            if _load_matching_manifest(folder, wanted) != found:
                raise UserError(f"another process wrote shards to {folder} in the meantime; run the same command again")
            lock.claim()
            write(manifest)
    shards = ShardFolder(folder)
    for name, split in (("train", shards.train), ("val", shards.val)):
        print(f"  {name:5s} {counted(sum(s.n_tokens for s in split), 'token'):>21} in {counted(len(split), 'shard')}")
    print(f"  vocabulary {shards.manifest.tokenizer}, {shards.manifest.vocab_size:,} entries")
    print(_next_step(folder, shards))


def _next_step(folder, shards):
    """Return the command that comes next: a try of GPT-2 124M where there is a GPU, else a small model's training."""
    words = ["--data_dir", folder, "--log_dir", Path("logs", Path(folder).resolve().name)]
    n_train, n_val = (sum(shard.n_tokens for shard in split) for split in (shards.train, shards.val))
    if has_gpu() and n_val > 1024:
        return f"next: {command('train.py', *words, '--dry_run')}\n      (estimates the time for GPT-2 124M)"
    block_size = next((size for size in (256, 128, 64, 32, 16, 8, 4, 2) if size < min(n_train, n_val)), 1)
    steps = min(300, max(10, 10 * n_train // SMALL_STEP))      # ten epochs, but minutes at most
    words += ["--n_layer", 4, "--n_head", 4, "--n_embd", 256, "--block_size", block_size, "--total_batch_size",
              SMALL_STEP, "--max_steps", steps, "--max_lr", 2e-3, "--eval_every", 100, "--val_tokens", 65536]
    words += ["--hellaswag_every", 0]
    return f"next: {command('train.py', *words)}\n      (a small model; the first two flags alone train GPT-2 124M)"


def has_gpu():
    """Return True if there seems to be a GPU that torch can use. torch would know, but takes seconds to import."""
    return (os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd")
            or (sys.platform == "darwin" and platform.machine() == "arm64"))


def _load_matching_manifest(folder, wanted):
    """Return the folder's manifest, None without a finished shard. Raises UserError if it is not like `wanted`."""
    found = load_manifest(folder)
    if found is None:
        others = [p.name for p in Path(folder).glob("[!.]*") if p.suffix != ".tmp"]
        if others:
            raise UserError(f"{folder} contains other files ({others[0]}); choose another --out")
        return None
    if not found.shards and not found.complete:
        return None
    tokenizer = wanted.tokenizer or found.tokenizer         # "": not trained yet
    ours = {**wanted.settings, "seed": wanted.seed, "tokenizer": tokenizer}
    theirs = {**found.settings, "seed": found.seed, "tokenizer": found.tokenizer}
    differing = [k for k, v in ours.items() if theirs.get(k) != v]
    if differing:
        raise UserError(f"{folder} contains shards of another command (differing: {', '.join(differing)}); choose "
                        f"another --out, or delete {folder}")
    return found


def write_shards(folder, name, manifest, pieces, val_tokens, shard_tokens):
    """Cut a stream of pieces (position, tokens) into shards, and keep the manifest up to date with the files on disk.

    Shard 0 gets the first `val_tokens` tokens, each following shard gets `shard_tokens`, and the last gets the rest.
    Documents are cut at shard borders, as in build-nanogpt's fineweb.py. A position, a dict, says where in the source
    the piece begins. The manifest's says where the next shard does, "skip" tokens later: a continued run starts there.
    """
    buffer, filled = np.empty(max(val_tokens, shard_tokens), dtype="<u2"), 0

    def write_buffer():
        index = len(manifest.shards)
        manifest.shards.append(save_shard(folder, name, "train" if index else "val", index, buffer[:filled]))
    for position, tokens in pieces:
        start = 0
        while start < len(tokens):
            size = shard_tokens if manifest.shards else val_tokens
            part = tokens[start:start + size - filled]
            buffer[filled:filled + len(part)] = part
            manifest.rows += int(np.count_nonzero(part == manifest.eot))
            filled += len(part)
            start += len(part)
            if filled == size:
                write_buffer()
                manifest.position = {**position, "skip": position.get("skip", 0) + start}
                manifest.save(folder)
                filled = 0
    if filled:
        write_buffer()
    manifest.position, manifest.complete = {}, True
    manifest.save(folder)


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
