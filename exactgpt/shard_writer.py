"""Documents to token shards: encoded on every core, cut into files, each named in the manifest once it is whole.

The order is kept, work in flight is bounded, and the bytes are the same for any number of workers. A task says how to
read some documents: a function and its arguments. Where the documents lie in a file the worker reads them itself, so
that the parent only joins uint16 arrays. Workers never import torch.
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

TASK_CHARS = 1 << 20       # about what a task should read: large against its overhead, small against memory


def encode_documents(tokenizer, documents):
    """One uint16 array of all the (text, starts) pairs, end-of-text before each document; and the bytes of the texts.

    starts is False where a text continues the document before it.
    """
    parts, n_bytes = [np.empty(0, dtype="<u2")], 0
    eot = np.array([tokenizer.eot], dtype="<u2")
    for text, starts in documents:
        if starts:
            parts.append(eot)
        parts.append(tokenizer.encode_array(text))
        n_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return np.concatenate(parts), n_bytes


def in_batches(documents):
    """Cut a stream of (text, starts) pairs into lists of about TASK_CHARS characters."""
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

    read(*args), called in a worker, gives (text, starts) pairs. num_proc 0: everything in this process. At most three
    tasks a worker are in flight or wait for their turn, however slow the consumer is. Raises what `read` raises when
    the task's turn comes, and UserError when a worker dies.
    """
    if num_proc == 0:
        for label, read, *args in tasks:
            yield label, *encode_documents(tokenizer, read(*args))
        return
    tasks, labels, results = enumerate(tasks), {}, {}
    with _Workers(tokenizer, num_proc) as workers:
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


class _Workers:
    """Processes that encode tasks. They keep nothing, so they are simply killed at the end, whatever the end is."""

    def __init__(self, tokenizer, n):
        self._processes, self._load = [], {}      # load: {pipe to a worker: tasks that it has}
        # Spawned, because the parent has threads (downloads, pyarrow) that a fork would break. They inherit that
        # SIGINT is blocked: Ctrl-C is the parent's, and a worker that still imports would print a traceback.
        context = multiprocessing.get_context("spawn")
        multiprocessing.resource_tracker.ensure_running()       # spawning starts it, and it unblocks SIGINT then
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(n):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._load[ours] = 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._tokenizer = tokenizer

    def __enter__(self):
        for pipe in self._load:         # not among the arguments: start() would wait forever for a worker that died
            with self._deaths():
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
        with self._deaths():
            pipe.send((number, read, args))

    def receive(self):
        """(number of a task, its result: (tokens, bytes) or an exception), as they come."""
        pipe = multiprocessing.connection.wait([p for p, load in self._load.items() if load])[0]
        self._load[pipe] -= 1
        with self._deaths():
            return pipe.recv()

    @contextlib.contextmanager
    def _deaths(self):
        try:
            yield
        except (EOFError, OSError) as error:
            raise UserError("a tokenising process was killed (out of memory?); run the same command again, with fewer "
                            "--num_proc where it has that") from error


def _work(pipe):
    """A worker's life: it ends with its parent, even after kill -9, because then the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tokenizer = pipe.recv()
    except EOFError:
        return
    tasks = queue.SimpleQueue()
    threading.Thread(target=_read_ahead, args=(pipe, tasks), daemon=True).start()
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


def _read_ahead(pipe, tasks):
    """Take tasks off the pipe at once: parent and worker would wait forever if each waited for the other to read."""
    try:
        while True:
            tasks.put(pipe.recv())
    finally:
        os._exit(1)


def available_cpus():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -----------------------------------------------------------------------------
# the folder of shards

def matching_manifest(folder, wanted):
    """The manifest of `folder` if the command that made it is that of the manifest `wanted`; None for a new folder.

    A folder without a finished shard is as good as new. Raises UserError where the folder holds something else.
    """
    folder = Path(folder)
    found = load_manifest(folder)
    if found is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.suffix != ".tmp"] \
            if folder.is_dir() else []
        if others:
            raise UserError(f"{folder} holds other files ({others[0]}); choose another --out")
        return None
    if not found.shards and not found.complete:
        return None
    differing = [k for k, v in {**wanted.settings, "seed": wanted.seed}.items()
                 if {**found.settings, "seed": found.seed}.get(k) != v]
    if wanted.tokenizer not in ("", found.tokenizer):       # "": still to be trained
        differing.append("tokenizer")
    if differing or found.source != wanted.source:
        raise UserError(f"{folder} holds shards of another command (differing: {', '.join(differing) or 'source'}); "
                        f"choose another --out, or delete {folder}")
    return found


def print_shards(folder):
    """Print what a finished folder holds and the command that trains on it."""
    shards = ShardFolder(folder)
    for name, split in (("train", shards.train), ("val", shards.val)):
        plural = "s" if len(split) != 1 else ""
        print(f"  {name:5s} {sum(s.n_tokens for s in split):>14,} tokens in {len(split)} shard{plural}")
    print(f"  vocabulary {shards.manifest.tokenizer}, {shards.manifest.vocab_size:,} entries")
    print(f"next: python train.py --data_dir {folder} --log_dir logs/{Path(folder).resolve().name} --dry_run\n"
          "      (says how long GPT-2 124M takes here; for a small one add --n_layer 4 --n_head 4 --n_embd 256)")


@contextlib.contextmanager
def writing_to(folder):
    """What goes wrong while the files of a folder are written (a full disk) becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}; make room there and run the same "
                        "command again") from error


def save_shard(folder, name, split, index, tokens):
    """Write one shard atomically; its manifest row {file, split, tokens, sha256}."""
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
        """Add tokens (uint16) that the source holds from `position` (a dict) on.

        When a shard is full it is written, and then the manifest, whose position says where the next one begins:
        "skip" tokens after `position`. A continued run begins there.
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
        row = save_shard(self.folder, self.name, "train" if index else "val", index, self._buffer[:self._filled])
        self.manifest.shards.append(row)
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
