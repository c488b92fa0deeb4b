"""Kill a training run again and again, at random moments, and see whether it ends as if nothing had happened.

    python -m bench.chaos --kills 20
    python -m bench.chaos --matrix

For 2 and for 4 CPU processes: one undisturbed run, then the same command, killed --kills times with SIGKILL (a worker,
the launcher, or the whole process group, by turns) after random times, many of them during saves, and started again
until it ends. Passes where parameters, optimizer and logs are bitwise those of the undisturbed run. Writes
bench/results/chaos.json.

--matrix: a tiny run in every combination of processes, dtype, dropout and optimizer, killed once in every kind of
place (tests/killed_runs.py). Writes bench/results/chaos_matrix.json.
"""
import contextlib
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

from tqdm import tqdm

from bench.common import compared, machine, write_results
from exactgpt.config import flag, parse_config, run_script
from tests import forks, killed_runs
from tests.common import ROOT, write_shards

STEPS = 200
FLAGS = ("--n_layer", 4, "--n_head", 4, "--n_embd", 256, "--block_size", 32, "--dropout", 0.1, "--device", "cpu",
         "--total_batch_size", 512, "--micro_batch_size", 2, "--max_steps", STEPS, "--eval_every", 7,
         "--val_tokens", 512, "--checkpoint_every", 3, "--sample_every", 50, "--hellaswag_every", 0)


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
        data = write_shards(Path(folder) / "data", (5000, 7001, 3333), (2000,))
        for processes in (2, 4):
            rows.append(torment(Path(folder), data, processes, config))
            print(json.dumps(rows[-1]), flush=True)
    write_results("chaos", dict(machine=machine(), seed=config.seed, steps=STEPS, rows=rows), [
        compared(f"{row['processes']} processes killed {row['kills']} times, {row['during_a_save']} of them in a save: "
                 "bitwise equal at the end", "of 1", int(row["bitwise_equal"])) for row in rows])
    if not all(row["bitwise_equal"] and row["logs_equal"] for row in rows):
        sys.exit(1)


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
    return dict(bitwise_equal=not killed_runs.differences_of_ends(straight, killed, n_steps),
                logs_equal=not killed_runs.differences_of_logs(straight, killed, n_steps))


def run_matrix(folder):
    """Kill a tiny run of each kind once in every place; exits with status 1 where an end differs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data, rows, begun = write_shards(folder / "data", killed_runs.SIZES, killed_runs.VAL_SIZES), [], time.monotonic()
    kinds, kills = killed_runs.KINDS, killed_runs.KILLS
    progress = tqdm(total=len(kinds) * len(kills), unit="kill")
    for kind in kinds:
        n = kind["processes"]
        words = [w for name in ("dtype", "dropout", "optimizer") for w in (f"--{name}", kind[name])]
        words = [*killed_runs.FLAGS, *words, "--data_dir", data, "--log_dir"]
        straight, killed = folder / "straight", folder / "killed"
        first = run_ranks(n, [*words, straight], folder)
        for accident in kills:
            rank = 0 if "save" in accident or "sample" in accident else len(rows) % n
            codes = run_ranks(n, [*words, killed], folder, f"{accident}:{rank}")
            row = dict(kind, accident=accident, rank=rank, killed=codes[rank] == -signal.SIGKILL)
            row["ended"] = not any(first + run_ranks(n, [*words, killed], folder))
            rows.append({**row, **compare(straight, killed, killed_runs.STEPS)})
            shutil.rmtree(killed)
            progress.update()
        shutil.rmtree(straight)
    checks = ("killed", "ended", "bitwise_equal", "logs_equal")
    failed = [row for row in rows if not all(row[c] for c in checks)]
    write_results("chaos_matrix", dict(machine=machine(), combinations=len(kinds), accidents=kills, kills=len(rows),
                                       seconds=round(time.monotonic() - begun),
                                       **{c: sum(row[c] for row in rows) for c in checks}, failed=failed), [
        compared(f"{len(kinds)} kinds of run killed in {len(kills)} places: bitwise equal at the end",
                 f"of {len(rows)}", sum(row["bitwise_equal"] and row["logs_equal"] for row in rows))])
    if failed:
        sys.exit(1)


def run_ranks(n, words, folder, accident="none:none:0"):
    """Run train.py with these arguments in n processes: their exit codes."""
    return forks.run_ranks(n, killed_runs.SCRIPT, words, {**os.environ, "ACCIDENT": accident}, folder / "output")


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


if __name__ == "__main__":
    run_script(main)
