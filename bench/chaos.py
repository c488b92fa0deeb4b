"""Kill training runs at random moments, resume them, and compare the results with an undisturbed run.

    python -m bench.chaos --kills 20
    python -m bench.chaos --matrix
    python -m bench.chaos --launcher

For 2 and for 4 CPU processes: one undisturbed run, then the same command, killed --kills times with SIGKILL and
restarted until it finishes. The kills hit a worker, the launcher and the whole process group in turn, at random times,
many of them during saves. A run passes if its parameters, optimizer and logs are bitwise equal to those of the
undisturbed run. Writes bench/results/chaos.json.

--matrix: a tiny run in every combination of processes, dtype, dropout and optimizer, killed once at each point of
tests/killed_runs.py. Writes bench/results/chaos_matrix.json.

--launcher: torchrun with four workers, killed 40 times at a random moment from its workers' first line on; in half of
the starts one worker is stopped, so that the others wait for it at the store. None may be left. Writes
bench/results/chaos_launcher.json.
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

from bench.common import comparison_row, describe_machine, write_results
from exactgpt.config import flag, parse_config, run_script
from tests import forks, killed_runs
from tests.common import ROOT, processes_with, write_shards

STEPS = 200
LAUNCHES = 40
FLAGS = ("--n_layer", 4, "--n_head", 4, "--n_embd", 256, "--block_size", 32, "--dropout", 0.1, "--device", "cpu",
         "--total_batch_size", 512, "--micro_batch_size", 2, "--max_steps", STEPS, "--eval_every", 7,
         "--val_tokens", 512, "--checkpoint_every", 3, "--sample_every", 50, "--hellaswag_every", 0)


@dataclass(kw_only=True)
class ChaosConfig:
    """The flags of this benchmark."""
    matrix: bool = flag(False, "kill tiny runs of every combination once at each point, instead of at random")
    launcher: bool = flag(False, "kill torchrun while its workers start, and count the workers that are left")
    kills: int = flag(20, "number of kills of each run", low=1)
    seed: int = flag(0, "random seed for the times and targets of the kills", low=0)


def main(argv=None):
    """Kill runs of 2 and 4 processes and write the results. Exits with status 1 if any run differs."""
    config = parse_config(ChaosConfig, argv, __doc__.split("\n\n")[0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if config.matrix:
            return run_matrix(Path(folder))
        if config.launcher:
            return kill_launchers(Path(folder), config)
        data = write_shards(Path(folder) / "data", (5000, 7001, 3333), (2000,))
        for processes in (2, 4):
            rows.append(compare_with_killed_run(Path(folder), data, processes, config))
            print(json.dumps(rows[-1]), flush=True)
    write_results("chaos", dict(machine=describe_machine(), seed=config.seed, steps=STEPS, rows=rows), [
        comparison_row(f"{row['processes']} processes killed {row['kills']} times, {row['during_a_save']} of them in a "
                       "save: bitwise equal at the end", "of 1", int(row["bitwise_equal"])) for row in rows])
    if not all(row["bitwise_equal"] and row["logs_equal"] for row in rows):
        sys.exit(1)


def compare_with_killed_run(folder, data, processes, config):
    """Run train.py undisturbed and with kills; return a row of the results (a dict).

    Raises RuntimeError if a start fails that was not killed.
    """
    straight, killed = folder / f"straight_{processes}", folder / f"killed_{processes}"
    start_torchrun(data, straight, processes).wait()
    rng, kills, start_time = random.Random(config.seed), [], time.monotonic()
    while not (killed / f"model_{STEPS:05d}.pt").exists():
        process = start_torchrun(data, killed, processes)
        if len(kills) < config.kills:
            kills.append(kill_at_random(process, killed, rng, ("worker", "launcher", "group")[len(kills) % 3]))
            process.wait()
        elif process.wait() != 0:
            raise RuntimeError(f"a run that was not killed failed; see {killed}.log")
    return dict(processes=processes, kills=len(kills), targets=Counter(target for target, _ in kills),
                during_a_save=sum(saving for _, saving in kills), seconds=round(time.monotonic() - start_time),
                **compare_runs(straight, killed, STEPS))


def compare_runs(straight, killed, n_steps):
    """Compare two log folders; return {"bitwise_equal": bool, "logs_equal": bool}."""
    return dict(bitwise_equal=not killed_runs.checkpoint_differences(straight, killed, n_steps),
                logs_equal=not killed_runs.log_differences(straight, killed, n_steps))


def run_matrix(folder):
    """Kill a tiny run of each kind once at each point. Exits with status 1 if any run differs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data = write_shards(folder / "data", killed_runs.SIZES, killed_runs.VAL_SIZES)
    rows, start_time = [], time.monotonic()
    kinds, kills = killed_runs.KINDS, killed_runs.KILLS
    progress = tqdm(total=len(kinds) * len(kills), unit="kill")
    for kind in kinds:
        n = kind["processes"]
        flags = [word for name in ("dtype", "dropout", "optimizer") for word in (f"--{name}", kind[name])]
        flags = [*killed_runs.FLAGS, *flags, "--data_dir", data, "--log_dir"]
        straight, killed = folder / "straight", folder / "killed"
        straight_codes = run_with_accident(n, [*flags, straight], folder)
        for accident in kills:
            rank = 0 if "save" in accident or "sample" in accident else len(rows) % n
            codes = run_with_accident(n, [*flags, killed], folder, f"{accident}:{rank}")
            row = dict(kind, accident=accident, rank=rank, killed=codes[rank] == -signal.SIGKILL)
            row["ended"] = not any(straight_codes + run_with_accident(n, [*flags, killed], folder))
            rows.append({**row, **compare_runs(straight, killed, killed_runs.STEPS)})
            shutil.rmtree(killed)
            progress.update()
        shutil.rmtree(straight)
    checks = ("killed", "ended", "bitwise_equal", "logs_equal")
    failed = [row for row in rows if not all(row[c] for c in checks)]
    write_results("chaos_matrix", dict(machine=describe_machine(), combinations=len(kinds), accidents=kills,
                                       kills=len(rows), seconds=round(time.monotonic() - start_time),
                                       **{c: sum(row[c] for row in rows) for c in checks}, failed=failed), [
        comparison_row(f"{len(kinds)} kinds of run killed in {len(kills)} places: bitwise equal at the end",
                       f"of {len(rows)}", sum(row["bitwise_equal"] and row["logs_equal"] for row in rows))])
    if failed:
        sys.exit(1)


def kill_launchers(folder, config):
    """Kill torchrun 40 times while its workers start. Exits with status 1 if a worker is left."""
    rng, rows = random.Random(config.seed), []
    data = write_shards(folder / "data", (5000,), (2000,))
    for i in tqdm(range(LAUNCHES), unit="launch"):
        os.environ["MARK"] = mark = f"{os.getpid()}-{i}"
        launcher = start_torchrun(data, folder / f"logs{i}", processes=4)
        while len(workers := [pid for pid in processes_with(mark) if pid != launcher.pid]) < 4:
            time.sleep(0.001)
        slow = rng.choice(workers)
        if i % 2:
            os.kill(slow, signal.SIGSTOP)
        pause = rng.uniform(0, 0.5 if i % 4 < 2 else 8)      # while Python starts and torch is imported, or any time
        time.sleep(pause)
        launcher.kill()
        launcher.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(slow, signal.SIGCONT)      # it may not have asked for the death signal yet
        begin = time.monotonic()
        while (left := len(processes_with(mark))) and time.monotonic() < begin + 20:
            time.sleep(0.01)
        rows.append(dict(pause=round(pause, 3), stopped=i % 2, left=left, seconds=round(time.monotonic() - begin, 3)))
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)
    left = sum(row["left"] for row in rows)
    write_results("chaos_launcher", dict(machine=describe_machine(), seed=config.seed, left=left, rows=rows), [
        comparison_row(f"torchrun killed {LAUNCHES} times while its 4 workers start: workers left", "of 160", left)])
    if left:
        sys.exit(1)


def run_with_accident(n, flags, folder, accident="none:none:0"):
    """Run train.py in n processes with an accident (tests/accidents.py); return the exit codes."""
    return forks.run_ranks(n, killed_runs.SCRIPT, flags, {**os.environ, "ACCIDENT": accident}, folder / "output")


def start_torchrun(data, log_dir, processes):
    """Start train.py under torchrun in a new session; return the Popen. Its output is appended to LOG_DIR.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               ROOT / "train.py", *FLAGS, "--data_dir", data, "--log_dir", log_dir]
    log = open(f"{log_dir}.log", "a")
    return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_at_random(process, log_dir, rng, target):
    """Kill the target up to 4 s after the run's next checkpoint; return (target, True if it was saving then).

    target: "worker", "launcher" or "group". Raises RuntimeError if the run makes no checkpoint in two minutes.
    """
    newest = max(log_dir.glob("model_0*.pt"), default=None)
    deadline = time.monotonic() + 120
    while process.poll() is None and max(log_dir.glob("model_0*.pt"), default=None) == newest:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run made no checkpoint in two minutes; see {log_dir}.log")
        time.sleep(0.005)
    workers = [int(p) for p in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]
    time.sleep(rng.uniform(0, 1.0))
    save_deadline = time.monotonic() + (3 if rng.random() < 0.5 else 0)  # half of the kills wait for a save
    while not (saving := any(log_dir.glob("*.tmp"))) and time.monotonic() < save_deadline:
        pass
    victims = dict(worker=workers and [rng.choice(workers)], launcher=[process.pid], group=[*workers, process.pid])
    for pid in victims[target]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return target, saving


if __name__ == "__main__":
    run_script(main)
