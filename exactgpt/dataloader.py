"""Data order and batches: which tokens step s trains on is a pure function of (seed, s).

The train shards, in file order, are one stream of N tokens. With T = block_size it has W = (N - 1) // T windows; window
k is tokens [kT, kT + T]: T inputs, and the same shifted by one as targets. An epoch visits every window once: shards
in a permuted order, and windows in a permuted order within their shard. The epochs, one after another, form an endless
list of windows. Step s takes n = total_batch_size / T of them, those at the places s n to (s + 1) n - 1. Of these, rank
r of R takes the places s n + r n / R to s n + (r + 1) n / R - 1; train_step cuts them into micro-batches.

Worked example: --seed 1337 --block_size 4 --total_batch_size 16 (n = 4), two processes, shards of 41 and 12 tokens:

    stream     N = 53 tokens, W = 13 windows: 0 to 10 begin in shard 0 (10 ends in shard 1), 11 and 12 in shard 1
    epoch 0    shard 1: 12 11    shard 0: 6 0 4 1 2 9 8 10 5 3 7
    epoch 1    shard 0: 4 2 3 7 0 6 8 9 5 10 1    shard 1: 11 12
    step 0     places 0 to 3: windows 12 11 (rank 0) and 6 0 (rank 1)
    step 3     places 12 to 15: windows 7 4 (rank 0) and 2 3 (rank 1); 7 is the last of epoch 0, the others of epoch 1

So any number of processes that divides n sees the same tokens at the same step, and the loader has no state: a run
resumes at any step, with another number of processes or another micro-batch.
"""
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from exactgpt.config import UserError, counted
from exactgpt.shards import permutation
from model import IGNORED

MAX_OPEN = 64   # open shards: a process may usually open 1,024 files, and 100B tokens are 1,000 shards


class TokenStream:
    """The shards of one split as one stream of N tokens, cut into windows of T + 1 that overlap by one token."""

    def __init__(self, shards, block_size):
        """Open no file yet: shards are opened when they are read. n_windows may be 0."""
        self.block_size = block_size
        self._shards = shards
        self._files = {}      # shard number -> its open file, the most recently read last
        self.ends = np.cumsum([s.n_tokens for s in shards], dtype=np.int64)           # ends[i]: tokens up to shard i
        self.n_tokens = int(self.ends[-1]) if shards else 0
        self.n_windows = max(0, (self.n_tokens - 1) // block_size)
        # first_window[i]: the first window whose first token lies in shard i (its tail may lie in the next)
        starts = self.ends - np.array([s.n_tokens for s in shards], dtype=np.int64)
        self.first_window = np.minimum(-(-starts // block_size), self.n_windows)
        self.windows_in_shard = np.diff(np.append(self.first_window, self.n_windows))

    def read(self, windows):
        """Return the tokens of windows, uint16 (len(windows), T + 1). Raises UserError for a shard that shrank."""
        out = np.empty((len(windows), self.block_size + 1), dtype="<u2")
        for row, k in zip(out, windows):
            start, filled = int(k) * self.block_size, 0
            while filled < len(row):      # a window may end in the next shard, or in the one after
                i = int(np.searchsorted(self.ends, start + filled, side="right"))
                n = min(len(row) - filled, int(self.ends[i]) - start - filled)
                offset = start + filled - int(self.ends[i] - self._shards[i].n_tokens)
                self._shards[i].read_tokens(self._file(i), offset, row[filled:filled + n])
                filled += n
        return out

    def _file(self, i):
        """Return the open file of shard i, and close the least recently read one if too many are open."""
        self._files[i] = self._files.pop(i, None) or self._shards[i].open()
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return self._files[i]

    def close(self):
        """Close the files. A later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()


class DataOrder:
    """The order in which training visits the windows of a TokenStream."""

    def __init__(self, stream, seed):
        """Make the order that (stream, seed) stands for; nothing else influences it."""
        self.stream, self.seed = stream, seed
        self._shard_order = lru_cache(maxsize=2)(self._make_shard_order)
        self._windows = lru_cache(maxsize=2)(self._make_windows)      # a step touches one shard, rarely two or three

    def _make_shard_order(self, epoch):
        """Return (shards in the order of this epoch, the number of windows up to the end of each)."""
        order = permutation(len(self.stream.windows_in_shard), self.seed, epoch)
        return order, np.cumsum(self.stream.windows_in_shard[order])

    def _make_windows(self, epoch, shard):
        """Return the window numbers of a shard in the order of this epoch."""
        n = int(self.stream.windows_in_shard[shard])
        return self.stream.first_window[shard] + permutation(n, self.seed, epoch, int(shard))

    def windows(self, start, stop):
        """Return the window numbers, int64, at the places start..stop - 1 of the endless list."""
        parts, g, W = [], start, self.stream.n_windows
        while g < stop:      # once for each shard, and each epoch, that the places touch
            epoch, place = divmod(g, W)
            order, ends = self._shard_order(epoch)
            i = int(np.searchsorted(ends, place, side="right"))
            begin = int(ends[i - 1]) if i else 0
            n = min(stop - g, int(ends[i]) - place)
            parts.append(self._windows(epoch, int(order[i]))[place - begin:place - begin + n])
            g += n
        return np.concatenate(parts)


class TrainLoader:
    """Reads one rank's tokens step by step, in a thread that is up to three steps ahead."""

    def __init__(self, order, windows_per_step, runtime, first_step, last_step):
        """Start reading the steps first_step..last_step - 1. windows_per_step: of all ranks together."""
        self._order, self._n, self._device = order, windows_per_step, runtime.device
        self._rank, self._share = runtime.rank, windows_per_step // runtime.world_size
        self._thread = ThreadPoolExecutor(1, "loader")
        self._reads = (self._thread.submit(self._read, step) for step in range(first_step, last_step))
        self._ahead = deque(islice(self._reads, 3))

    def _read(self, step):
        """Return this rank's tokens of a step, uint16: ranks take consecutive slices of the step's windows."""
        start = step * self._n + self._rank * self._share
        tokens = torch.from_numpy(self._order.stream.read(self._order.windows(start, start + self._share)))
        return tokens.pin_memory() if self._device.type == "cuda" else tokens

    def next_step(self):
        """Return the next step's tokens (n / world_size, T + 1), int64 on the device, and the seconds spent waiting."""
        start = time.perf_counter()
        tokens = self._ahead.popleft().result()
        wait_s = time.perf_counter() - start
        self._ahead.extend(islice(self._reads, 1))
        # The device widens the uint16 to int64: a quarter of the bytes to copy.
        return tokens.to(self._device, non_blocking=True).to(torch.int64), wait_s

    def windows_of_step(self, step):
        """Return the window numbers of a whole step, for the log of a step that went wrong."""
        return self._order.windows(step * self._n, (step + 1) * self._n)

    def close(self):
        """Stop the thread and close the shards."""
        self._thread.shutdown(cancel_futures=True)
        self._order.stream.close()


def n_val_windows(stream, val_tokens):
    """Return the number of windows, from the first on, that validation reads. Raises UserError if there are none."""
    if stream.n_windows < 1:
        raise UserError(f"the val split is shorter than one window of {counted(stream.block_size, 'token')}: use "
                        "more text or a larger --val_fraction, or train with a smaller --block_size or with "
                        "--eval_every 0")
    return min(stream.n_windows, max(1, val_tokens // stream.block_size))


def val_batches(stream, n_windows, batch_size, runtime):
    """Yield this rank's validation batches (x, y), each (batch_size, T) int64, of the first n_windows in file order."""
    # Every rank gets the same number of batches, because validate enters a collective after each. All have one shape,
    # because a new one would compile again: rows beyond the last window have only IGNORED targets.
    per_round = batch_size * runtime.world_size
    for first in range(runtime.rank * batch_size, -(-n_windows // per_round) * per_round, per_round):
        windows = np.arange(first, min(first + batch_size, n_windows))
        tokens = np.zeros((batch_size, stream.block_size + 1), dtype=np.int64)
        targets = np.full((batch_size, stream.block_size), IGNORED, dtype=np.int64)
        tokens[:len(windows)] = stream.read(windows)
        targets[:len(windows)] = tokens[:len(windows), 1:]
        yield torch.from_numpy(tokens[:, :-1].copy()).to(runtime.device), torch.from_numpy(targets).to(runtime.device)
