"""Measure how many tokens per second the data loader delivers, and how long a training step waits for it.

    python -m bench.loader

The data are two shards of random tokens (100M each by default) in a temporary folder. Measured are the loader alone, as
fast as it can deliver; the loader at the pace of a GPU that trains on 500,000 tokens per second; and, for comparison,
plain slices of the shards in file order, as build-nanogpt's DataLoaderLite reads them. Writes
bench/results/loader.json.
"""
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench.common import comparison_row, describe_machine, median_and_range, write_results
from exactgpt.config import flag, parse_config, run_script
from exactgpt.dataloader import DataOrder, TokenStream, TrainLoader
from exactgpt.shard_writer import save_shard
from exactgpt.shards import ShardFolder


@dataclass(kw_only=True)
class LoaderConfig:
    """The flags of this benchmark."""
    shard_tokens: int = flag(100_000_000, "tokens per shard", low=1_000_000)
    block_size: int = flag(1024, "tokens per row", low=1)
    total_batch_size: int = flag(524_288, "tokens per step", low=1)
    steps: int = flag(100, "steps per round at full speed", low=1)
    rounds: int = flag(5, "number of rounds; the medians count", low=1)
    pace: int = flag(500_000, "speed of the simulated training, in tokens per second", low=1)
    paced_steps: int = flag(8, "steps per round with simulated training", low=1)


def main(argv=None):
    """Time the loader alone, plain slices and the paced loader in turn, and write the results."""
    config = parse_config(LoaderConfig, argv, __doc__.split("\n\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        random_tokens = np.random.default_rng(0)
        for i, n in enumerate((1000, config.shard_tokens, config.shard_tokens)):
            tokens = random_tokens.integers(0, 50257, n, dtype=np.uint16)
            save_shard(folder, "random", "train" if i else "val", i, tokens)
        stream = TokenStream(ShardFolder(folder).train, config.block_size)
        fast, plain, waits = [], [], []
        for round_ in range(config.rounds):
            fast.append(config.steps * config.total_batch_size / time_loader(stream, config, round_)[0])
            plain.append(config.steps * config.total_batch_size / time_plain_slices(Path(folder), config))
            seconds, waited = time_loader(stream, config, round_, config.total_batch_size / config.pace)
            waits.append(waited / seconds)
    fast, plain, waits = map(median_and_range, (fast, plain, waits))
    write_results("loader", dict(machine=describe_machine(), config=vars(config), tokens_per_s=fast,
                                 plain_tokens_per_s=plain, wait_share_at_pace=waits), [
        comparison_row("loader alone", "tokens/s", fast[0], "plain slices in file order", plain[0]),
        comparison_row(f"loader, waited at {config.pace:,} tokens/s", "% of a step", 100 * waits[0])])


def time_loader(stream, config, seed, seconds_per_step=0.0):
    """Take steps from a TrainLoader, sleeping after each in place of training; return (seconds, seconds waited)."""
    n = config.paced_steps if seconds_per_step else config.steps
    runtime = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    loader = TrainLoader(DataOrder(stream, seed), config.total_batch_size // config.block_size, runtime, 0, n)
    start_time, waited = time.perf_counter(), 0.0
    for i in range(n):
        _, wait_s = loader.next_step()
        waited += wait_s if i else 0.0   # the first step cannot be loaded during an earlier one
        time.sleep(seconds_per_step)
    seconds = time.perf_counter() - start_time
    loader.close()
    return seconds, waited


def time_plain_slices(folder, config):
    """Return the seconds that --steps slices of the shards in file order take, converted to int64."""
    start_time, left = time.perf_counter(), config.steps
    for path in sorted(folder.glob("*_train_*.npy")):
        tokens = np.load(path)
        for start in range(0, len(tokens) - config.total_batch_size, config.total_batch_size):
            torch.from_numpy(tokens[start:start + config.total_batch_size + 1].astype(np.int64))
            left -= 1
            if not left:
                return time.perf_counter() - start_time
    raise RuntimeError("the shards hold fewer than --steps steps; raise --shard_tokens")


if __name__ == "__main__":
    run_script(main)
