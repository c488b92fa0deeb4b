"""How many tokens a second the loader delivers, and how long a training step waits for it.

    python -m bench.loader

On shards of random tokens (2 x 100M by default, written to a temporary folder): the loader alone, as fast as it can be
emptied; and paced as a GPU that trains 500,000 tokens a second would empty it. For comparison plain slices of the
shards in file order, as build-nanogpt's DataLoaderLite reads them. Writes bench/results/loader.json.
"""
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench.common import compared, machine, spread, write_results
from exactgpt.config import flag, parse_config, run_script
from exactgpt.dataloader import DataOrder, TokenStream, TrainLoader
from exactgpt.shard_writer import save_shard
from exactgpt.shards import ShardFolder


@dataclass(kw_only=True)
class LoaderConfig:
    """The flags of this benchmark."""
    shard_tokens: int = flag(100_000_000, "tokens of a shard", low=1_000_000)
    block_size: int = flag(1024, "tokens of a row", low=1)
    total_batch_size: int = flag(524_288, "tokens of a step", low=1)
    steps: int = flag(100, "steps of a round", low=1)
    rounds: int = flag(5, "rounds", low=1)
    pace: int = flag(500_000, "tokens per second of the paced rounds", low=1)
    paced_steps: int = flag(8, "steps of a paced round", low=1)


def main(argv=None):
    """Time the loader alone, plain slices and the loader at a pace by turns."""
    config = parse_config(LoaderConfig, argv, __doc__.split("\n\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        random_tokens = np.random.default_rng(0)
        for i, n in enumerate((1000, config.shard_tokens, config.shard_tokens)):
            tokens = random_tokens.integers(0, 50257, n, dtype=np.uint16)
            save_shard(folder, "random", "train" if i else "val", i, tokens)
        stream = TokenStream(ShardFolder(folder).train, config.block_size)
        fast, plain, waits = [], [], []
        for round_ in range(config.rounds):
            fast.append(config.steps * config.total_batch_size / drain(stream, config, round_)[0])
            plain.append(config.steps * config.total_batch_size / read_plainly(Path(folder), config))
            seconds, waited = drain(stream, config, round_, config.total_batch_size / config.pace)
            waits.append(waited / seconds)
    write_results("loader", dict(machine=machine(), config=vars(config), tokens_per_s=spread(fast),
                                 plain_tokens_per_s=spread(plain), wait_share_at_pace=spread(waits)), [
        compared("loader alone", "tokens/s", spread(fast)[0], "plain slices in file order", spread(plain)[0]),
        compared(f"loader, waited at {config.pace:,} tokens/s", "% of a step", 100 * spread(waits)[0])])


def drain(stream, config, seed, seconds_per_step=0.0):
    """(seconds, seconds waited) of taking steps from a TrainLoader, pretending to train for a while after each."""
    n = config.paced_steps if seconds_per_step else config.steps
    runtime = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    loader = TrainLoader(DataOrder(stream, seed), config.total_batch_size // config.block_size, runtime, 0, n)
    begun, waited = time.perf_counter(), 0.0
    for i in range(n):
        _, wait_s = loader.next_step()
        waited += wait_s if i else 0.0   # the first step of a run has nothing to overlap with
        time.sleep(seconds_per_step)
    seconds = time.perf_counter() - begun
    loader.close()
    return seconds, waited


def read_plainly(folder, config):
    """The seconds that slices of the shards in file order take, widened to int64."""
    begun, left = time.perf_counter(), config.steps
    for path in sorted(folder.glob("*_train_*.npy")):
        tokens = np.load(path)
        for start in range(0, len(tokens) - config.total_batch_size, config.total_batch_size):
            torch.from_numpy(tokens[start:start + config.total_batch_size + 1].astype(np.int64))
            left -= 1
            if not left:
                return time.perf_counter() - begun
    raise RuntimeError("the shards hold fewer steps than a round")


if __name__ == "__main__":
    run_script(main)
