"""dataloader.py against the contract "Data order" of DESIGN.md, by brute force and with frozen numbers."""
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exactgpt import dataloader
from exactgpt.config import UserError
from exactgpt.dataloader import DataOrder, TokenStream, TrainLoader, n_val_windows, val_batches
from exactgpt.shards import Shard, ShardFolder, permutation
from model import IGNORED
from tests.common import brute_force_order

CORPORA = [  # (tokens of the train shards, block_size)
    pytest.param((100,), 16, id="one shard"),
    pytest.param((61, 64, 32, 50), 16, id="borders within windows"),
    pytest.param((7, 3, 50, 2, 1, 40, 5), 16, id="shards shorter than a window"),
    pytest.param((1, 1, 1, 1, 1, 1, 1), 3, id="windows over many shards"),
    pytest.param((10, 20, 33), 1, id="windows of one token"),
    pytest.param((40, 41), 40, id="two windows"),
    pytest.param((5, 12), 16, id="one window"),
]


GOLDEN_PERMUTATION = [6, 1, 9, 0, 2, 4, 7, 5, 3, 8]
GOLDEN_ORDER = [8, 6, 0, 4, 1, 2, 5, 3, 7, 12, 11, 15, 14, 16, 10, 13, 9, 17, 18, 19] + \
    [19, 18, 17, 12, 16, 15, 11, 10, 9, 14, 13, 4, 2, 3, 7, 0, 6, 5, 1, 8]


def machine(rank=0, world_size=1):
    """What the loader asks of a Runtime."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


class CountingShard:
    """A shard without a file, whose token at place i of the whole stream is i % 65521 (a prime)."""

    def __init__(self, n_tokens, start):
        self.n_tokens, self.start = n_tokens, start

    def open(self):
        return SimpleNamespace(close=lambda: None)

    def read_tokens(self, file, start, out):
        assert start >= 0 and start + len(out) <= self.n_tokens
        out[:] = (self.start + start + np.arange(len(out), dtype=np.int64)) % 65521


def counting_stream(sizes, block_size):
    """A TokenStream of CountingShards."""
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    return TokenStream([CountingShard(n, int(start)) for n, start in zip(sizes, starts)], block_size)


def all_steps(order, n, n_steps, rank=0, world_size=1, first=0):
    """The rows that the loader hands a rank in the steps first..n_steps - 1: (n_steps - first, n / W, T + 1)."""
    loader = TrainLoader(order, n, machine(rank, world_size), first, n_steps)
    try:
        return torch.stack([loader.next_step()[0] for _ in range(first, n_steps)])
    finally:
        loader.close()


@pytest.mark.parametrize("sizes, block_size", CORPORA)
def test_every_train_window_is_visited_once_an_epoch(sizes, block_size):
    stream = counting_stream(sizes, block_size)
    order, n_windows = DataOrder(stream, seed=1337), (sum(sizes) - 1) // block_size
    assert stream.n_windows == n_windows
    for epoch in range(4):
        visited = order.windows(epoch * n_windows, (epoch + 1) * n_windows)
        assert sorted(visited.tolist()) == list(range(n_windows))


@pytest.mark.parametrize("sizes, block_size", CORPORA)
def test_the_order_is_that_of_the_contract_in_pieces_of_any_size(sizes, block_size):
    order = DataOrder(counting_stream(sizes, block_size), seed=7)
    expected = brute_force_order(sizes, block_size, 7, 200)
    assert order.windows(0, 200).tolist() == expected
    for start, stop in ((0, 1), (199, 200), (13, 170), (3, 5), (100, 199)):
        assert order.windows(start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("sizes, block_size", CORPORA)
def test_a_window_holds_its_tokens_and_one_more_across_shard_borders(sizes, block_size):
    stream = counting_stream(sizes, block_size)
    rows = stream.read(range(stream.n_windows))
    for k, row in enumerate(rows.tolist()):
        assert row == list(range(k * block_size, k * block_size + block_size + 1))
    assert rows[-1, -1] + block_size >= sum(sizes) - 1              # what is left over is no window


def test_the_loader_reads_train_shards_of_a_folder_and_never_val(make_shards):
    val, train = (50, 31), (61, 7, 90, 33)
    folder = ShardFolder(make_shards(train, val, vocab=50257, tokens=np.arange(sum(val) + sum(train))))
    stream = TokenStream(folder.train, 8)
    rows = all_steps(DataOrder(stream, 1), n=2, n_steps=stream.n_windows // 2)
    assert stream.n_windows == 23 and rows.shape == (11, 2, 9)
    first_tokens = rows[:, :, 0].flatten() - sum(val)               # 81 is the first train token
    assert first_tokens.min() >= 0
    assert (first_tokens // 8).tolist() == brute_force_order(train, 8, 1, 22)
    assert (rows == rows[:, :, :1] + torch.arange(9)).all() and rows.dtype == torch.int64


def test_token_ids_above_32767_stay_positive(make_shards):
    folder = ShardFolder(make_shards([40], vocab=50257, tokens=np.full(104, 50256)))
    assert (all_steps(DataOrder(TokenStream(folder.train, 4), 0), 2, 3) == 50256).all()
    x, y = next(val_batches(TokenStream(folder.val, 4), 2, 2, machine()))
    assert (x == 50256).all() and (y == 50256).all()


@pytest.mark.parametrize("sizes, block_size, n", [((61, 64, 32, 50), 4, 16), ((9, 3), 4, 8), ((500,), 8, 24)],
                         ids=["straddling epochs", "corpus smaller than a batch", "three epochs"])
def test_any_number_of_processes_sees_the_same_tokens_in_the_same_steps(sizes, block_size, n):
    stream = counting_stream(sizes, block_size)
    alone = all_steps(DataOrder(stream, 3), n, 9)
    expected = np.reshape(brute_force_order(sizes, block_size, 3, 9 * n), (9, n))
    assert (alone[:, :, 0] // block_size).tolist() == expected.tolist()
    for world_size in (2, 4, 8):
        ranks = [all_steps(DataOrder(stream, 3), n, 9, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(ranks, dim=1), alone)


@pytest.mark.parametrize("first", range(12))
def test_a_loader_that_begins_at_any_step_goes_on_as_the_first_one_did(first):
    stream = counting_stream((61, 7, 64, 30), 4)                    # 40 windows, steps of 12: epochs within steps
    straight = all_steps(DataOrder(stream, 5), 12, 12)
    assert torch.equal(all_steps(DataOrder(stream, 5), 12, 12, first=first), straight[first:])
    two_ranks = [all_steps(DataOrder(stream, 5), 12, 12, rank, 2, first) for rank in range(2)]
    assert torch.equal(torch.cat(two_ranks, dim=1), straight[first:])


def test_seeds_and_epochs_differ_and_an_epoch_goes_shard_by_shard():
    stream = counting_stream((320, 320, 320, 321), 4)
    orders = {seed: DataOrder(stream, seed).windows(0, 640).reshape(2, 320) for seed in range(3)}
    epochs = [epoch.tolist() for order in orders.values() for epoch in order]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    for epoch in epochs:
        shards = (np.array(epoch) // 80).reshape(4, 80)
        assert (shards == shards[:, :1]).all()                      # one shard after the other,
        assert epoch != sorted(epoch)                               # its windows shuffled
    assert len({tuple(np.array(epoch)[::80] // 80) for epoch in epochs}) > 1
    assert any((np.array(epoch)[::80] // 80).tolist() != [0, 1, 2, 3] for epoch in epochs)


def test_the_order_of_shards_and_windows_is_frozen():
    """Changing these numbers changes what every seed means and breaks the resume of every run. Never change them."""
    assert permutation(10, 1337, 0).tolist() == GOLDEN_PERMUTATION
    order = DataOrder(counting_stream((61, 7, 64, 30, 3), 8), seed=1337)
    assert order.windows(0, 40).tolist() == GOLDEN_ORDER


def test_the_worked_example_at_the_head_of_the_file_is_true():
    order = DataOrder(counting_stream((41, 12), 4), 1337)
    text = " ".join(dataloader.__doc__.split())
    epochs = [[" ".join(map(str, part)) for part in (windows[:2], windows[2:], windows[:11], windows[11:])]
              for windows in (order.windows(0, 13), order.windows(13, 26))]
    assert f"epoch 0 shard 1: {epochs[0][0]} shard 0: {epochs[0][1]} epoch 1" in text
    assert f"epoch 1 shard 0: {epochs[1][2]} shard 1: {epochs[1][3]} step 0" in text
    for step in (0, 3):
        a, b, c, d = order.windows(4 * step, 4 * step + 4)
        assert f"step {step} places {4 * step} to {4 * step + 3}: windows {a} {b} (rank 0) and {c} {d} (rank 1)" in text
    assert "N = 53 tokens, W = 13 windows: 0 to 10 begin in shard 0" in text
    assert (order.stream.n_tokens, order.stream.n_windows, list(order.stream.first_window)) == (53, 13, [0, 11])


def test_more_tokens_than_two_to_the_32_are_counted_right():
    size, block_size = 1_500_000_003, 1_000_000
    stream = counting_stream((size,) * 4, block_size)
    assert stream.n_tokens == 4 * size and stream.n_windows == 6000
    epoch = DataOrder(stream, 1).windows(0, 6000)
    assert epoch.dtype == np.int64 and np.array_equal(np.sort(epoch), np.arange(6000))
    assert stream.windows_in_shard.tolist() == [1501, 1500, 1500, 1499]
    for k in (0, 1500, 2147, 2148, 4294, 4295, 5999):               # about 2^31 and 2^32, and over a border
        row = stream.read([k])[0]
        place = k * block_size + np.array([0, 1, block_size // 2, block_size], dtype=np.int64)
        assert row[[0, 1, block_size // 2, block_size]].tolist() == (place % 65521).tolist()
    last = DataOrder(stream, 1).windows(6000 * 10**9, 6000 * 10**9 + 6000)
    assert np.array_equal(np.sort(last), np.arange(6000))           # epoch 10^9: a step number beyond 2^31


def test_a_shard_truncated_while_it_is_read_is_a_user_error_that_names_it(make_shards):
    path = make_shards([4000])
    folder = ShardFolder(path)
    stream = TokenStream(folder.train, 16)
    loader = TrainLoader(DataOrder(stream, 1), 8, machine(), 0, 1000)
    try:
        loader.next_step()
        with open(folder.train[0].path, "r+b") as f:
            f.truncate(600)
        with pytest.raises(UserError, match=r"test_train_000001\.npy became shorter"):
            for _ in range(100):
                loader.next_step()
    finally:
        loader.close()


def test_next_step_raises_what_the_thread_met(make_shards):
    folder = ShardFolder(make_shards([4000]))
    folder.train[0].path.unlink()
    loader = TrainLoader(DataOrder(TokenStream(folder.train, 16), 1), 8, machine(), 0, 1000)
    with pytest.raises(UserError, match=r"cannot read shard .*test_train_000001\.npy: No such file"):
        loader.next_step()
    loader.close()


def test_closing_ends_the_thread_whether_or_not_anything_was_read(make_shards):
    stream = TokenStream(ShardFolder(make_shards([4000])).train, 16)
    for n_read in (0, 1, 3):
        loader = TrainLoader(DataOrder(stream, 1), 8, machine(), 0, 1000)
        for _ in range(n_read):
            loader.next_step()
        loader.close()
        assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_the_windows_of_a_step_are_those_of_all_ranks():
    order = DataOrder(counting_stream((61, 64), 4), 3)
    loader = TrainLoader(order, 8, machine(rank=1, world_size=2), 0, 1)
    assert loader.windows_of_step(5).tolist() == brute_force_order((61, 64), 4, 3, 48)[40:]
    loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("n_windows", [1, 10, 12])
def test_validation_reads_the_same_windows_once_for_any_shape(world_size, batch_size, n_windows):
    stream = counting_stream((30, 70), 8)
    seen, numbers = [], set()
    for rank in range(world_size):
        batches = list(val_batches(stream, n_windows, batch_size, machine(rank, world_size)))
        numbers.add(len(batches))
        for x, y in batches:
            assert x.shape == y.shape == (batch_size, 8) and x.dtype == y.dtype == torch.int64
            for inputs, targets in zip(x, y):
                if (targets == IGNORED).all():
                    continue
                assert torch.equal(targets, inputs + 1)
                seen.append(int(inputs[0]) // 8)
    assert len(numbers) == 1                                        # every rank reaches every collective
    assert sorted(seen) == list(range(n_windows))


def test_validation_takes_the_first_tokens_and_at_most_what_there_is():
    stream = counting_stream((100,), 8)                             # 12 windows
    assert n_val_windows(stream, 10_485_760) == 12
    assert n_val_windows(stream, 40) == 5
    assert n_val_windows(stream, 47) == 5
    assert n_val_windows(stream, 1) == 1


@pytest.mark.parametrize("sizes", [(), (8,), (3, 5)], ids=str)
def test_a_val_split_without_a_full_window_names_the_flags(sizes):
    stream = counting_stream(sizes, 8)
    assert stream.n_windows == 0
    with pytest.raises(UserError, match=r"--val_fraction.*--block_size"):
        n_val_windows(stream, 1000)


def test_a_corpus_of_many_shards_keeps_few_of_them_open(make_shards, monkeypatch):
    monkeypatch.setattr("exactgpt.dataloader.MAX_OPEN", 3)
    stream = TokenStream(ShardFolder(make_shards([50] * 12)).train, 10)
    opened, before = [], len(os.listdir("/proc/self/fd"))
    open_shard = Shard.open
    monkeypatch.setattr(Shard, "open", lambda shard: opened.append(shard) or open_shard(shard))
    read = [stream.read([k])[0].tolist() for k in range(stream.n_windows)]
    assert len(opened) == 12 and len(os.listdir("/proc/self/fd")) == before + 3     # in order: each once
    assert [stream.read([k])[0].tolist() for k in reversed(range(stream.n_windows))] == read[::-1]
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_closed_files_are_opened_again_by_a_later_read(make_shards):
    stream = TokenStream(ShardFolder(make_shards([100])).train, 8)
    before = stream.read([3])
    stream.close()
    assert np.array_equal(stream.read([3]), before)
    stream.close()
