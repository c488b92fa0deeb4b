"""Documents to token arrays on every core: order kept, work in flight bounded, the same bytes for any workers.

A task says how to read some documents: a function and its arguments. Where the documents lie in a file the worker
reads them itself, so that the parent only joins uint16 arrays. Workers never import torch.
"""
import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading

import numpy as np

from config import UserError

TASK_CHARS = 1 << 20       # about what a task should read: large against its overhead, small against memory
_worker = {}               # in a worker process: its tokenizer


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


def encode_tasks(tasks, tokenizer, num_proc, start_method="spawn"):
    """Yield (label, tokens, bytes of text) for each task (label, read, *args), in order.

    read(*args), called in a worker, gives (text, starts) pairs. num_proc 0: everything in this process. Spawned
    workers, because the parent has threads (downloads, pyarrow) that a fork would break. At most three tasks
    a worker are in flight, however slow the consumer is. Raises UserError when a worker dies, and what `read` raises.
    """
    if num_proc == 0:
        for label, read, *args in tasks:
            yield label, *encode_documents(tokenizer, read(*args))
        return
    context = multiprocessing.get_context(start_method)
    executor = concurrent.futures.ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer,))
    in_flight = collections.deque()
    try:
        for label, read, *args in tasks:
            with _without_ctrl_c():
                in_flight.append((label, executor.submit(_encode, read, *args)))
            if len(in_flight) >= 3 * num_proc:
                yield _first(in_flight)
        while in_flight:
            yield _first(in_flight)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a tokenising process was killed (out of memory?); run the same command again, with fewer "
                        "--num_proc where it has that") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _first(in_flight):
    label, future = in_flight.popleft()
    return label, *future.result()


@contextlib.contextmanager
def _without_ctrl_c():
    """Workers start inside submit() and inherit that SIGINT is blocked: Ctrl-C is the parent's, who stops them."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _start_worker(tokenizer):
    threading.Thread(target=_follow_parent, daemon=True).start()
    _worker["tokenizer"] = tokenizer


def _follow_parent():
    """End when the parent has ended, however: after kill -9 nothing else would wake a worker that waits for tasks."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(read, *args):
    return encode_documents(_worker["tokenizer"], read(*args))


def available_cpus():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
