"""Batches from token shards by one global cursor: what step s trains on is a pure function of (seed, s).

The train shards, in file order, are one stream of N tokens with W = (N - 1) // T windows, window k being tokens
[kT, kT + T]: T inputs and their targets. An epoch visits every window once, the shards in a permuted order and the
windows permuted within their shard. Step s takes global positions [s n, (s + 1) n); position g is place g % W of
epoch g // W. Rank r takes its slice of the n windows. So 1, 2, 4 or 8 processes see the same tokens at the same
step, and the only state of the loader is the step number.
"""
import queue
import threading
import time
from functools import lru_cache

import numpy as np
import torch

from exactgpt.config import UserError
from exactgpt.shards import permutation
from model import IGNORED

MAX_OPEN = 64   # files: systems allow a process 1,024, and FineWeb-Edu's 100B tokens are as many shards


class TokenStream:
    """The shards of one split as one row of N tokens, cut into windows of T + 1 that overlap by one token."""

    def __init__(self, shards, block_size):
        """Shards are opened when they are read, MAX_OPEN of them stay open. Without a full window n_windows is 0."""
        self.block_size = block_size
        self._shards = shards
        self._files = {}      # number of a shard -> its open file, the one read last at the end
        self.ends = np.cumsum([s.n_tokens for s in shards], dtype=np.int64)           # ends[i]: tokens up to shard i
        self.n_tokens = int(self.ends[-1]) if shards else 0
        self.n_windows = max(0, (self.n_tokens - 1) // block_size)
        # first_window[i]: the first window whose first token lies in shard i (its tail may lie in the next)
        starts = self.ends - np.array([s.n_tokens for s in shards], dtype=np.int64)
        self.first_window = np.minimum(-(-starts // block_size), self.n_windows)
        self.windows_in_shard = np.diff(np.append(self.first_window, self.n_windows))

    def read(self, windows):
        """uint16 array (len(windows), T + 1) of the tokens of the windows. Raises UserError for a shard that shrank."""
        out = np.empty((len(windows), self.block_size + 1), dtype="<u2")
        for row, k in zip(out, windows):
            start, filled = int(k) * self.block_size, 0
            while filled < len(row):
                i = int(np.searchsorted(self.ends, start + filled, side="right"))
                n = min(len(row) - filled, int(self.ends[i]) - start - filled)
                offset = start + filled - int(self.ends[i] - self._shards[i].n_tokens)
                self._shards[i].read_tokens(self._file(i), offset, row[filled:filled + n])
                filled += n
        return out

    def _file(self, i):
        """The open file of shard i; an epoch goes shard by shard, so the one not read for longest is done with."""
        self._files[i] = self._files.pop(i, None) or self._shards[i].open()
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return self._files[i]

    def close(self):
        """Close the files; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()


class DataOrder:
    """Which windows of a TokenStream stand at which global positions."""

    def __init__(self, stream, seed):
        """The seed alone decides the order of the windows of a stream."""
        self.stream, self.seed = stream, seed
        self._shard_order = lru_cache(maxsize=2)(self._make_shard_order)
        self._windows = lru_cache(maxsize=2)(self._make_windows)  # a batch touches few shards, one after the other

    def _make_shard_order(self, epoch):
        order = permutation(len(self.stream.windows_in_shard), self.seed, epoch)
        return order, np.cumsum(self.stream.windows_in_shard[order])

    def _make_windows(self, epoch, shard):
        n = int(self.stream.windows_in_shard[shard])
        return self.stream.first_window[shard] + permutation(n, self.seed, epoch, int(shard))

    def windows(self, start, stop):
        """The window numbers (int64) at the global positions start..stop - 1."""
        parts, g, W = [], start, self.stream.n_windows
        while g < stop:
            epoch, place = divmod(g, W)
            order, ends = self._shard_order(epoch)
            i = int(np.searchsorted(ends, place, side="right"))
            begin = int(ends[i - 1]) if i else 0
            n = min(stop - g, int(ends[i]) - place)
            parts.append(self._windows(epoch, int(order[i]))[place - begin:place - begin + n])
            g += n
        return np.concatenate(parts)


class TrainLoader:
    """The tokens of one rank, step by step, read ahead by a thread.

    next_step() gives the rank's share of the step on its device, (n / world_size, T + 1) int64, and the seconds
    it had to wait. The thread reads uint16; the device widens.
    """

    def __init__(self, order, windows_per_step, runtime, first_step, last_step):
        """Begin to read the steps first_step..last_step - 1; windows_per_step counts all ranks'."""
        self._order, self._n, self._device = order, windows_per_step, runtime.device
        self._rank, self._world_size = runtime.rank, runtime.world_size
        self._queue = queue.Queue(maxsize=2)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(first_step, last_step), daemon=True)
        self._thread.start()

    def _local(self, step):
        share = self._n // self._world_size
        start = step * self._n + self._rank * share
        return self._order.windows(start, start + share)

    def _read_ahead(self, first_step, last_step):
        for step in range(first_step, last_step):
            try:
                tokens = torch.from_numpy(self._order.stream.read(self._local(step)))
                item = tokens.pin_memory() if self._device.type == "cuda" else tokens
            except Exception as error:  # handed to the main thread, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, Exception):
                return

    def next_step(self):
        """(tokens, wait_s) of the next step. Raises what the reading thread met (UserError for a damaged shard)."""
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        wait_s = time.perf_counter() - start
        return item.to(self._device, non_blocking=True).to(torch.int64), wait_s

    def windows_of_step(self, step):
        """The window numbers of a whole step, all ranks', for the log of a step that went wrong."""
        return self._order.windows(step * self._n, (step + 1) * self._n)

    def close(self):
        """Stop the thread and close the shards."""
        self._closed.set()
        self._thread.join()
        self._order.stream.close()


def n_val_windows(stream, val_tokens):
    """How many windows validation reads, the first ones. Raises UserError where the split holds none."""
    if stream.n_windows < 1:
        raise UserError(f"the val split holds no full window of {stream.block_size} tokens: make the shards with a "
                        "larger --val_fraction, or train with a smaller --block_size, or with --eval_every 0")
    return min(stream.n_windows, max(1, val_tokens // stream.block_size))


def val_batches(stream, n_windows, batch_size, runtime):
    """This rank's validation batches (x, y), each (batch_size, T) int64: always the same windows, in file order.

    The first n_windows are dealt out in batches; every rank gets the same number of batches of one shape, rows
    beyond the end having only IGNORED targets.
    """
    per_round = batch_size * runtime.world_size
    for first in range(runtime.rank * batch_size, -(-n_windows // per_round) * per_round, per_round):
        windows = np.arange(first, min(first + batch_size, n_windows))
        tokens = np.zeros((batch_size, stream.block_size + 1), dtype=np.int64)
        targets = np.full((batch_size, stream.block_size), IGNORED, dtype=np.int64)
        if len(windows):
            tokens[:len(windows)] = stream.read(windows)
            targets[:len(windows)] = tokens[:len(windows), 1:]
        yield torch.from_numpy(tokens[:, :-1].copy()).to(runtime.device), torch.from_numpy(targets).to(runtime.device)
