"""Kill a training run again and again, at random moments, and see whether it ends as if nothing had happened.

    python -m bench.chaos --kills 20
    python -m bench.chaos --matrix

For 2 and for 4 CPU processes: one undisturbed run, then the same command, killed --kills times with SIGKILL (a worker,
the launcher, or the whole process group, by turns) after random times, many of them during saves, and started again
until it ends. Passes where parameters, optimizer and logs are bitwise those of the undisturbed run. Writes
bench/results/chaos.json.

--matrix: a tiny run in every combination of processes, dtype, dropout and optimizer, killed once in every kind of
place; the tests take a pairwise part of it. Writes bench/results/chaos_matrix.json.
"""
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.common import compared, machine, write_results
from bench.forks import start_ranks
from exactgpt.config import flag, parse_config, run_script
from exactgpt.shard_writer import save_shard
from exactgpt.shards import Manifest
from exactgpt.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]
STEPS = 200
FLAGS = ("--n_layer", 4, "--n_head", 4, "--n_embd", 256, "--block_size", 32, "--dropout", 0.1, "--device", "cpu",
         "--total_batch_size", 512, "--micro_batch_size", 2, "--max_steps", STEPS, "--eval_every", 7,
         "--val_tokens", 512, "--checkpoint_every", 3, "--sample_every", 50, "--hellaswag_every", 0)
TINY_STEPS = 12
TINY_FLAGS = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--device", "cpu",
              "--total_batch_size", 128, "--micro_batch_size", 1, "--max_steps", TINY_STEPS, "--max_lr", 3e-3,
              "--eval_every", 5, "--val_tokens", 96, "--checkpoint_every", 4, "--sample_every", 6,
              "--hellaswag_every", 0)
MATRIX = dict(processes=(1, 2, 4), dtype=("fp32", "bf16", "fp16"), dropout=(0, 0.2), optimizer=("adamw", "muon"))
# WHAT:WHERE:STEP of tests/chaos.py. An epoch ends inside every third batch; the shards' ends fall everywhere.
ACCIDENTS = ("kill:step:6", "kill:step:7", "kill:step:11", "kill:validate:5", "kill:sample:6", "kill:save:8",
             "kill:save:12")


@dataclass(kw_only=True)
class ChaosConfig:
    """The flags of this benchmark."""
    matrix: bool = flag(False, "every combination once instead of random kills")
    kills: int = flag(20, "kills of each run", low=1)
    seed: int = flag(0, "of the kills' times and targets", low=0)


def main(argv=None):
    """Torment runs of 2 and 4 processes and write the results; exits with status 1 where any differed."""
    config = parse_config(ChaosConfig, argv, __doc__.split("\n\n")[0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if config.matrix:
            return run_matrix(Path(folder))
        data = make_data(Path(folder) / "data", (2000, 5000, 7001, 3333))
        for processes in (2, 4):
            rows.append(torment(Path(folder), data, processes, config))
            print(json.dumps(rows[-1]), flush=True)
    write_results("chaos", dict(machine=machine(), seed=config.seed, steps=STEPS, rows=rows), [
        compared(f"{row['processes']} processes killed {row['kills']} times, {row['during_a_save']} of them in a save: "
                 "bitwise equal at the end", "of 1", int(row["bitwise_equal"])) for row in rows])
    if not all(row["bitwise_equal"] and row["logs_equal"] for row in rows):
        sys.exit(1)


def make_data(folder, sizes):
    """Shards of random bytes: the first for validation, the others for training; they end inside batches and epochs."""
    folder.mkdir()
    Tokenizer([], "bytes").save(folder)
    tokenizer = load_tokenizer(folder)
    manifest = Manifest("random bytes", tokenizer.name, tokenizer.n_vocab, tokenizer.eot, complete=True)
    generator = np.random.default_rng(0)
    for i, n in enumerate(sizes):
        tokens = generator.integers(0, 257, n)
        manifest.shards.append(save_shard(folder, "bytes", "train" if i else "val", i, tokens))
    manifest.save(folder)
    return folder


def torment(folder, data, processes, config):
    """The undisturbed run, the killed one, and how they compare: a row of the results (a dict).

    Raises RuntimeError if a start that nothing kills ends in an error.
    """
    straight, killed = folder / f"straight_{processes}", folder / f"killed_{processes}"
    launch(data, straight, processes).wait()
    dice, done, begun = random.Random(config.seed), [], time.monotonic()
    while not (killed / f"model_{STEPS:05d}.pt").exists():
        process = launch(data, killed, processes)
        if len(done) < config.kills:
            done.append(kill_later(process, killed, dice, ("worker", "launcher", "group")[len(done) % 3]))
            process.wait()
        elif process.wait() != 0:
            raise RuntimeError(f"an undisturbed start failed, see {killed}.log")
    return dict(processes=processes, kills=len(done), targets=Counter(target for target, _ in done),
                during_a_save=sum(saving for _, saving in done), seconds=round(time.monotonic() - begun),
                **compare(straight, killed, STEPS))


def compare(straight, killed, n_steps):
    """Whether two log folders hold the same end and the same logs: {"bitwise_equal": bool, "logs_equal": bool}."""
    ends = [torch.load(f / f"model_{n_steps:05d}.pt", weights_only=True) for f in (straight, killed)]
    logs = [(f / "log.txt").read_text() for f in (straight, killed)]
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    entries = ("model", "optimizer", "scaler", "best_val_loss", "val_loss")
    return dict(bitwise_equal=all(equal(ends[0][k], ends[1][k]) for k in entries),
                logs_equal=logs[0] == logs[1] and steps == list(range(n_steps)))


def run_matrix(folder):
    """Kill a tiny run once in every place of every combination; exits with status 1 where an end differs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data, rows = make_data(folder / "data", (120, 100, 150, 40)), []
    cases = list(itertools.product(*MATRIX.values()))
    progress = tqdm(total=len(cases) * len(ACCIDENTS), unit="kill")
    for case in cases:
        case = dict(zip(MATRIX, case))
        words = [w for name in ("dtype", "dropout", "optimizer") for w in (f"--{name}", case[name])]
        words = [*TINY_FLAGS, *words, "--data_dir", data, "--log_dir"]
        straight, killed = folder / "straight", folder / "killed"
        first = run_ranks(case["processes"], [*words, straight], folder)
        for accident in ACCIDENTS:
            rank = 0 if "save" in accident or "sample" in accident else len(rows) % case["processes"]
            codes = run_ranks(case["processes"], [*words, killed], folder, f"{accident}:{rank}")
            row = dict(case, accident=accident, rank=rank, killed=codes[rank] == -signal.SIGKILL)
            row["ended"] = not any(first + run_ranks(case["processes"], [*words, killed], folder))
            rows.append({**row, **compare(straight, killed, TINY_STEPS)})
            shutil.rmtree(killed)
            progress.update()
        shutil.rmtree(straight)
    checks = ("killed", "ended", "bitwise_equal", "logs_equal")
    failed = [row for row in rows if not all(row[c] for c in checks)]
    write_results("chaos_matrix", dict(machine=machine(), combinations=len(cases), accidents=ACCIDENTS, kills=len(rows),
                                       **{c: sum(row[c] for row in rows) for c in checks}, failed=failed), [
        compared(f"{len(cases)} kinds of run killed in {len(ACCIDENTS)} places: bitwise equal at the end",
                 f"of {len(rows)}", sum(row["bitwise_equal"] and row["logs_equal"] for row in rows))])
    if failed:
        sys.exit(1)


def run_ranks(n, words, folder, accident="none:none:0"):
    """Run train.py with these arguments in n processes: their exit codes."""
    ranks = start_ranks(n, "tests/chaos.py", words, {**os.environ, "ACCIDENT": accident}, folder / "output")
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def launch(data, log_dir, processes):
    """Start train.py under torchrun, in a process group of its own: the Popen, its output added to LOG_DIR.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               ROOT / "train.py", *FLAGS, "--data_dir", data, "--log_dir", log_dir]
    log = open(f"{log_dir}.log", "a")
    return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_later(process, log_dir, dice, target):
    """Kill the target some time after the run has begun to train: (target, whether a save was under way).

    target: "worker", "launcher" or "group". Raises RuntimeError where the run makes no checkpoint in two minutes.
    """
    newest = max(log_dir.glob("model_0*.pt"), default=None)
    deadline = time.monotonic() + 120
    while process.poll() is None and max(log_dir.glob("model_0*.pt"), default=None) == newest:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run made no checkpoint in two minutes, see {log_dir}.log")
        time.sleep(0.005)
    workers = [int(p) for p in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]
    time.sleep(dice.uniform(0, 1.0))
    patience = time.monotonic() + (3 if dice.random() < 0.5 else 0)  # half of the kills wait for a save
    while not (saving := any(log_dir.glob("*.tmp"))) and time.monotonic() < patience:
        pass
    victims = dict(worker=workers and [dice.choice(workers)], launcher=[process.pid], group=[*workers, process.pid])
    for pid in victims[target]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return target, saving


def equal(a, b):
    """Whether two trees of plain data and tensors are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


if __name__ == "__main__":
    run_script(main)
