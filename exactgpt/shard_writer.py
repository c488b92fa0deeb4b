"""Documents to token arrays on every core: order kept, work in flight bounded, the same bytes for any workers.

A task says how to read some documents: a function and its arguments. Where the documents lie in a file the worker
reads them itself, so that the parent only joins uint16 arrays. Workers never import torch.
"""
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
import traceback

import numpy as np

from exactgpt.config import UserError

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
