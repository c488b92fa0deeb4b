"""Tiny runs of train.py that are killed and started again, and how their ends compare with an undisturbed run's.

test_resume.py kills some of the KINDS, pairwise; bench.chaos all of them in every place, and longer runs at random.
"""
from itertools import product, zip_longest

import torch

from tests.common import logged_rows

SCRIPT = "tests/accidents.py"       # train.py with an accident built in, run as train.py is run
# 18 windows of 16 tokens, 8 a step: an epoch ends inside every third batch, and shards end everywhere.
SIZES, VAL_SIZES = [100, 150, 40], [120]
STEPS = 12
FLAGS = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--device", "cpu",
         "--total_batch_size", 128, "--micro_batch_size", 1, "--max_steps", STEPS, "--max_lr", 3e-3, "--eval_every", 5,
         "--val_tokens", 96, "--checkpoint_every", 4, "--sample_every", 6, "--hellaswag_every", 0)
# The flags by which runs differ in kind, and the number of processes.
KINDS = [dict(zip(("processes", "dtype", "dropout", "optimizer"), values))
         for values in product((1, 2, 4), ("fp32", "bf16", "fp16"), (0, 0.2), ("adamw", "muon"))]
# A kill in every kind of place: WHAT:WHERE:STEP of accidents.py.
KILLS = ("kill:step:6", "kill:step:7", "kill:step:11", "kill:validate:5", "kill:sample:6", "kill:save:8",
         "kill:save:12")

COMPARED = ("model", "optimizer", "scaler", "step", "val_loss", "best_val_loss", "finished")
LOGGED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "samples")


def state_of(path):
    """What must be bitwise equal in two checkpoints, flat: {place: tensor or value}."""
    flat = {}

    def walk(value, place):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{place}/{k}")
        elif isinstance(value, (list, tuple)):
            for i, v in enumerate(value):
                walk(v, f"{place}/{i}")
        else:
            flat[place] = value
    checkpoint = torch.load(path, weights_only=True)
    walk({k: checkpoint[k] for k in COMPARED}, "")
    return flat


def differences_of_ends(one, other, n_steps=STEPS):
    """The places where the last checkpoints of two log folders are not bitwise equal."""
    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    a, b = (state_of(folder / f"model_{n_steps:05d}.pt") for folder in (one, other))
    return [place for place in sorted({*a, *b}) if place not in a or place not in b or not same(a[place], b[place])]


def differences_of_logs(one, other, n_steps=STEPS):
    """Where log.txt differs, or a line of metrics.jsonl that holds another number or does not come once a step."""
    found = ["log.txt"] * ((one / "log.txt").read_text() != (other / "log.txt").read_text())
    rows = [[{name: row.get(name) for name in LOGGED} for row in logged_rows(folder)] for folder in (one, other)]
    found += [f"{a} is not {b}" for a, b in zip_longest(*rows) if a != b]
    steps = [row["step"] for row in rows[1] if row["loss"] is not None]
    return found + ([f"steps {steps}"] if steps != list(range(n_steps)) else [])


def assert_same_run(one, other):
    """Two log folders hold the same end, bitwise, and the same logs."""
    found = differences_of_ends(one, other) + differences_of_logs(one, other)
    assert not found, found
