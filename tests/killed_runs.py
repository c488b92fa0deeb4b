"""Tiny runs of train.py to be killed and resumed, and their comparison with an undisturbed run.

test_resume.py kills a pairwise selection of KINDS; bench.chaos kills all of them at each of KILLS, and longer runs at
random moments.
"""
from itertools import product, zip_longest

import torch

from tests.common import read_metrics

SCRIPT = "tests/accidents.py"       # train.py with an accident built in
# Tokens per train and val shard. 18 windows of 16 tokens, 8 per step: an epoch ends inside every third batch, and
# shards end at all kinds of places.
SIZES, VAL_SIZES = [100, 150, 40], [120]
STEPS = 12
FLAGS = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--device", "cpu",
         "--total_batch_size", 128, "--micro_batch_size", 1, "--max_steps", STEPS, "--max_lr", 3e-3, "--eval_every", 5,
         "--val_tokens", 96, "--checkpoint_every", 4, "--sample_every", 6, "--hellaswag_every", 0)
# All combinations of the number of processes and the flags that matter for resuming.
KINDS = [dict(zip(("processes", "dtype", "dropout", "optimizer"), values))
         for values in product((1, 2, 4), ("fp32", "bf16", "fp16"), (0, 0.2), ("adamw", "muon"))]
# Kills at every kind of point in a run: WHAT:WHERE:STEP of accidents.py.
KILLS = ("kill:step:6", "kill:step:7", "kill:step:11", "kill:validate:5", "kill:sample:6", "kill:save:8",
         "kill:save:12")

COMPARED_ENTRIES = ("model", "optimizer", "scaler", "step", "val_loss", "best_val_loss", "finished")
COMPARED_METRICS = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "samples")


def checkpoint_state(path):
    """Return what must be bitwise equal in two checkpoints as a flat dict: {path in the checkpoint: value}."""
    flat = {}

    def walk(value, key):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{key}/{k}")
        elif isinstance(value, (list, tuple)):
            for i, v in enumerate(value):
                walk(v, f"{key}/{i}")
        else:
            flat[key] = value
    checkpoint = torch.load(path, weights_only=True)
    walk({k: checkpoint[k] for k in COMPARED_ENTRIES}, "")
    return flat


def checkpoint_differences(one, other, n_steps=STEPS):
    """Return the entries in which the last checkpoints of two log folders are not bitwise equal."""
    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    a, b = (checkpoint_state(folder / f"model_{n_steps:05d}.pt") for folder in (one, other))
    return [key for key in sorted({*a, *b}) if key not in a or key not in b or not same(a[key], b[key])]


def log_differences(one, other, n_steps=STEPS):
    """Return the differences between the log.txt and metrics.jsonl of two log folders.

    Also reports training steps that `other` has logged twice or not at all.
    """
    found = ["log.txt"] * ((one / "log.txt").read_text() != (other / "log.txt").read_text())
    metrics = [[{name: line.get(name) for name in COMPARED_METRICS} for line in read_metrics(folder)]
               for folder in (one, other)]
    found += [f"{a} is not {b}" for a, b in zip_longest(*metrics) if a != b]
    steps = [line["step"] for line in metrics[1] if line["loss"] is not None]
    return found + ([f"steps {steps}"] if steps != list(range(n_steps)) else [])


def assert_same_run(one, other):
    """Assert that two log folders have bitwise equal last checkpoints and the same logs."""
    found = checkpoint_differences(one, other) + log_differences(one, other)
    assert not found, found
