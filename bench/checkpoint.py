"""Measure how fast checkpoints are written and read, against a plain write to the same disk.

    python -m bench.checkpoint                      # GPT-2 124M: weights and AdamW's moments, 1.5 GB
    python -m bench.checkpoint --model gpt2-xl      # 1558M: needs 18.7 GB of disk and of memory

Writes bench/results/checkpoint_{model}.json: seconds and GB/s of save_checkpoint (with fsync) and read_checkpoint (with
checksums), and of a plain write of as many bytes.
"""
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import comparison_row, describe_machine, median_and_range, write_results
from exactgpt.checkpoint import read_checkpoint, save_checkpoint
from exactgpt.config import flag, parse_config, run_script
from model import GPT, GPT2_SIZES, GPTConfig


@dataclass(kw_only=True)
class CheckpointBenchConfig:
    """The flags of this benchmark."""
    model: str = flag("gpt2", "GPT-2 size of the checkpoint", choices=tuple(GPT2_SIZES))
    repeats: int = flag(3, "number of times that each operation is measured", low=1)
    folder: str = flag(".", "folder on the disk to measure")


def main(argv=None):
    """Save and read a checkpoint --repeats times and write the results."""
    config = parse_config(CheckpointBenchConfig, argv, __doc__.split("\n\n")[0])
    seconds = dict(save=[], plain=[], read=[])
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path, plain = Path(folder) / "model_00000.pt", Path(folder) / "plain"
        entries = random_checkpoint(GPT2_SIZES[config.model])
        predicted = 12 * sum(w.numel() for w in entries["model"].values())      # as check_disk does, in fp32
        for _ in range(config.repeats):
            seconds["save"].append(seconds_taken(save_checkpoint, path, entries))
            size = path.stat().st_size
            seconds["plain"].append(seconds_taken(write_zeros, plain, size))
            plain.unlink()
        del entries                      # memory may not have room for two of them
        for _ in range(config.repeats):
            seconds["read"].append(seconds_taken(read_checkpoint, path))
    rate = {k: size / 1e9 / median_and_range(v)[0] for k, v in seconds.items()}
    write_results(f"checkpoint_{config.model}", dict(
        machine=describe_machine(), model=config.model, gigabytes=size / 1e9, predicted_gigabytes=predicted / 1e9,
        seconds={k: median_and_range(v) for k, v in seconds.items()},
        gb_per_s=rate,
        save_to_plain_write=median_and_range([a / b for a, b in zip(seconds["save"], seconds["plain"])])[0]), [
        comparison_row(f"checkpoint, {config.model}, {size / 1e9:.1f} GB, {what}", "GB/s", rate[what],
                       "a plain write", rate["plain"]) for what in ("save", "read")])


def random_checkpoint(shape):
    """Return the entries of a checkpoint of this shape: random weights and AdamW moments."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape))
    moments = {i: dict(step=torch.ones(()), exp_avg=torch.rand_like(p.detach()),
                       exp_avg_sq=torch.rand_like(p.detach()))
               for i, p in enumerate(model.parameters())}
    return dict(model=model.state_dict(), config=model.config_dict(), optimizer=dict(state=moments), step=0)


def seconds_taken(action, *arguments):
    """Return the seconds that action(*arguments) takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def write_zeros(path, size):
    """Write a file of `size` zero bytes and flush it to disk."""
    block = bytes(64 * 2**20)
    with open(path, "wb") as f:
        for start in range(0, size, len(block)):
            f.write(block[:size - start])
        f.flush()
        os.fsync(f.fileno())


if __name__ == "__main__":
    run_script(main)
