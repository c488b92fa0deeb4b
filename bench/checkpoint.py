"""How long a checkpoint takes to write and to read, against the disk's own speed.

    python -m bench.checkpoint                      # GPT-2 124M: weights and AdamW's moments, 1.5 GB
    python -m bench.checkpoint --model gpt2-xl      # 1558M: 18.7 GB, twice that in memory

Writes bench/results/checkpoint_{model}.json: seconds and GB/s of save_checkpoint (fsync included) and read_checkpoint
(checksums included), and of a plain write of as many bytes.
"""
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import machine, spread, write_results
from checkpoint import checkpoint_bytes, read_checkpoint, save_checkpoint
from config import flag, parse_config, run_script
from model import GPT, GPT2_SIZES, GPTConfig


@dataclass(kw_only=True)
class CheckpointBenchConfig:
    """The flags of this benchmark."""
    model: str = flag("gpt2", "GPT-2 size", choices=tuple(GPT2_SIZES))
    repeats: int = flag(3, "rounds", low=1)
    folder: str = flag(".", "a folder on the disk to measure")


def main(argv=None):
    """Write and read the checkpoint --repeats times and write the results."""
    config = parse_config(CheckpointBenchConfig, argv, __doc__.split("\n\n")[0])
    torch.manual_seed(0)
    model = GPT(GPTConfig(**GPT2_SIZES[config.model]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    entries = dict(model=model.state_dict(), config=model.config_dict(), optimizer=optimizer.state_dict(), step=0)
    rounds = []
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path, plain = Path(folder) / "model_00000.pt", Path(folder) / "plain"
        for _ in range(config.repeats):
            save = timed(save_checkpoint, path, entries)
            size = path.stat().st_size
            rounds.append(dict(save=save, read=timed(read_checkpoint, path), plain=timed(write_plain, plain, size)))
    seconds = {k: spread([r[k] for r in rounds]) for k in rounds[0]}
    write_results(f"checkpoint_{config.model}", dict(
        machine=machine(), model=config.model, gigabytes=size / 1e9,
        predicted_gigabytes=checkpoint_bytes(entries) / 1e9, seconds=seconds,
        gb_per_s={k: size / 1e9 / v[0] for k, v in seconds.items()},
        save_to_plain_write=spread([r["save"] / r["plain"] for r in rounds])[0]))


def timed(action, *arguments):
    """The seconds that action(*arguments) takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def write_plain(path, size):
    """Write a file of `size` zero bytes to the disk, and wait for it."""
    block = bytes(64 * 2**20)
    with open(path, "wb") as f:
        for start in range(0, size, len(block)):
            f.write(block[:size - start])
        f.flush()
        os.fsync(f.fileno())


if __name__ == "__main__":
    run_script(main)
