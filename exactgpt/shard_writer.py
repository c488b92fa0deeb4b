"""Tokenize documents on all cores and write them to shards; each finished shard gets an entry in the manifest.

The order of the documents is kept, memory is bounded, and the output is the same for any number of workers. A task is a
function that returns some documents, and its arguments. For prepare_fineweb.py that function reads a piece of a file,
so workers do the reading and the parent only joins uint16 arrays. Workers never import torch.
"""
import contextlib
import hashlib
import io
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
import traceback
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, atomic_write
from exactgpt.shards import ShardFolder, load_manifest

TASK_CHARS = 1 << 20       # text per task: enough to outweigh the overhead, little enough for memory


def encode_documents(tokenizer, documents):
    """Return the tokens of (text, starts) pairs as one uint16 array, and the number of bytes of text.

    Each document begins with end-of-text. starts is False if the text continues the previous document.
    """
    parts, n_bytes = [np.empty(0, dtype="<u2")], 0
    eot = np.array([tokenizer.eot], dtype="<u2")
    for text, starts in documents:
        if starts:
            parts.append(eot)
        parts.append(tokenizer.encode_array(text))
        n_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return np.concatenate(parts), n_bytes


def batch_documents(documents):
    """Yield lists of (text, starts) pairs with about TASK_CHARS characters each."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= TASK_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_tasks(tasks, tokenizer, num_proc):
    """Yield (label, tokens, bytes of text) for each task (label, read, *args), in order.

    Workers call read(*args), which returns (text, starts) pairs. num_proc 0: do everything in this process. At most
    three tasks per worker are pending, even if the consumer is slow. An error in `read` is raised when the results
    reach that task. Raises UserError if a worker dies.
    """
    if num_proc == 0:
        for label, read, *args in tasks:
            yield label, *encode_documents(tokenizer, read(*args))
        return
    tasks, labels, results = enumerate(tasks), {}, {}
    with _WorkerPool(tokenizer, num_proc) as workers:
        for turn in itertools.count():
            for number, (label, read, *args) in itertools.islice(tasks, 3 * num_proc - len(labels)):
                labels[number] = label
                workers.send(number, read, args)
            if not labels:
                return
            while turn not in results:
                number, result = workers.receive()
                results[number] = result
            result = results.pop(turn)
            if isinstance(result, Exception):
                raise result
            yield labels.pop(turn), *result


class _WorkerPool:
    """Processes that encode tasks. They have no state worth saving, so they are always just killed at the end."""

    def __init__(self, tokenizer, n):
        self._processes, self._load = [], {}      # load: {pipe to a worker: number of its unfinished tasks}
        # Spawn, because the parent has threads (downloads, pyarrow) and forking with threads can deadlock. SIGINT is
        # blocked and workers inherit that: Ctrl-C is for the parent, and a worker that is still importing would print
        # a traceback.
        context = multiprocessing.get_context("spawn")
        multiprocessing.resource_tracker.ensure_running()       # spawning would start it, and that unblocks SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(n):
                ours, theirs = context.Pipe()
                process = context.Process(target=_worker_main, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._load[ours] = 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._tokenizer = tokenizer

    def __enter__(self):
        for pipe in self._load:     # not as an argument of Process: start() would hang if the worker died
            with self._worker_death_as_user_error():
                pipe.send(self._tokenizer)
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def send(self, number, read, args):
        pipe = min(self._load, key=self._load.get)
        self._load[pipe] += 1
        with self._worker_death_as_user_error():
            pipe.send((number, read, args))

    def receive(self):
        """Return (task number, result) of any finished task. The result is (tokens, bytes) or an exception."""
        pipe = multiprocessing.connection.wait([p for p, load in self._load.items() if load])[0]
        self._load[pipe] -= 1
        with self._worker_death_as_user_error():
            return pipe.recv()

    @contextlib.contextmanager
    def _worker_death_as_user_error(self):
        try:
            yield
        except (EOFError, OSError) as error:
            raise UserError("a tokenizer process was killed (out of memory?); run the same command again, with a "
                            "smaller --num_proc if it has that flag") from error


def _worker_main(pipe):
    """Encode tasks from the pipe until it closes. It closes whenever the parent ends, even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tokenizer = pipe.recv()
    except EOFError:
        return
    tasks = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(pipe, tasks), daemon=True).start()
    while True:
        number, read, args = tasks.get()
        try:
            result = encode_documents(tokenizer, read(*args))
        except UserError as error:
            result = error
        except Exception:
            result = RuntimeError(traceback.format_exc())
        try:
            pipe.send((number, result))
        except OSError:
            os._exit(1)


def _receive_tasks(pipe, tasks):
    """Read tasks from the pipe at once. Otherwise parent and worker could both block on a full pipe, forever."""
    try:
        while True:
            tasks.put(pipe.recv())
    finally:
        os._exit(1)


def available_cpus():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -----------------------------------------------------------------------------
# the folder of shards

def load_matching_manifest(folder, wanted):
    """Return the folder's manifest if it was made by the same command as `wanted`, or None if the folder is new.

    A folder without a finished shard counts as new. Raises UserError if the folder contains something else.
    """
    folder = Path(folder)
    found = load_manifest(folder)
    if found is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.suffix != ".tmp"] \
            if folder.is_dir() else []
        if others:
            raise UserError(f"{folder} contains other files ({others[0]}); choose another --out")
        return None
    if not found.shards and not found.complete:
        return None
    differing = [k for k, v in {**wanted.settings, "seed": wanted.seed}.items()
                 if {**found.settings, "seed": found.seed}.get(k) != v]
    if wanted.tokenizer not in ("", found.tokenizer):       # "": not trained yet
        differing.append("tokenizer")
    if differing or found.source != wanted.source:
        raise UserError(f"{folder} contains shards of another command (differing: {', '.join(differing) or 'source'}); "
                        f"choose another --out, or delete {folder}")
    return found


def print_summary(folder):
    """Print the sizes of a finished folder and the command to train on it."""
    shards = ShardFolder(folder)
    for name, split in (("train", shards.train), ("val", shards.val)):
        plural = "s" if len(split) != 1 else ""
        print(f"  {name:5s} {sum(s.n_tokens for s in split):>14,} tokens in {len(split)} shard{plural}")
    print(f"  vocabulary {shards.manifest.tokenizer}, {shards.manifest.vocab_size:,} entries")
    print(f"next: python train.py --data_dir {folder} --log_dir logs/{Path(folder).resolve().name} --dry_run\n"
          "      (estimates the time for GPT-2 124M; for a small model add --n_layer 4 --n_head 4 --n_embd 256)")


@contextlib.contextmanager
def report_write_errors(folder):
    """Turn an OSError while writing to a folder, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; fix that and run the same command "
                        "again") from error


def save_shard(folder, name, split, index, tokens):
    """Write one shard atomically and return its manifest entry {file, split, tokens, sha256}."""
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
