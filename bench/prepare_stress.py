"""Stress prepare_fineweb.py beyond what fits into its tests: many kills at random moments, and a slow disk.

    python -m bench.prepare_stress

Kills: a run that is killed with SIGKILL at random moments and restarted must write the same bytes as an undisturbed
run. Memory: when writing a shard takes seconds, peak memory must stay under 1.5 GB, whatever the size of the row
groups.
"""
import contextlib
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.documents import python_documents

SLOW_WRITER = """
import sys, time, prepare_fineweb
from exactgpt import config, shard_writer
write, pause = shard_writer.save_shard, float(sys.argv.pop())
def slowly(*shard):
    time.sleep(pause)
    return write(*shard)
shard_writer.save_shard = slowly
config.run_script(prepare_fineweb.main)
"""


@dataclass(kw_only=True)
class PrepareStressConfig:
    """The flags of this stress test."""
    kills: int = flag(10, "number of kills (0: skip this part)", low=0)
    kill_megabytes: int = flag(60, "text for the killed run, in MB", low=1)
    memory_megabytes: int = flag(200, "text for the run with slow writes, in MB", low=1)
    pause_s: float = flag(3.0, "delay of each shard write, in seconds", low=0)
    workers: int = flag(2, "tokenizing threads", low=1)
    seed: int = flag(0, "random seed for the moments of the kills", low=0)


def write_parquet(path, megabytes, row_group_size, seed):
    """Write CPython's documentation to a parquet file, repeated in random orders up to `megabytes` of text."""
    import pyarrow
    import pyarrow.parquet
    texts, rng, size, documents = list(python_documents()), np.random.default_rng(seed), 0, []
    while size < megabytes * 1e6:
        documents += [texts[i] for i in rng.permutation(len(texts))]
        size += sum(len(t.encode()) for t in texts)
    table = pyarrow.table({"text": documents, "score": rng.random(len(documents))})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def prepare_flags(files, out, *flags):
    """Return the flags of prepare_fineweb.py as strings."""
    return ["--data_files", files, "--out", out, *map(str, flags)]


def hash_files(folder):
    """Return {file name: sha256} of a folder's files, without the lock."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir() if p.name != ".lock"}


def check_kills(config, folder):
    """Raise UserError unless a run that is killed --kills times writes the same files as an undisturbed one."""
    rng = random.Random(config.seed)
    for i in range(3):
        write_parquet(f"{folder}/{i}.parquet", config.kill_megabytes / 3, 100, i)
    flags = ["--shard_tokens", 200_000, "--num_proc", config.workers]
    files, straight, killed = f"{folder}/*.parquet", f"{folder}/straight", f"{folder}/killed"
    subprocess.run([sys.executable, "prepare_fineweb.py", *prepare_flags(files, straight, *flags)], check=True,
                   stdout=subprocess.DEVNULL)
    n_shards = len(list(Path(straight).glob("*.npy")))
    for target in sorted(rng.randrange(n_shards) for _ in range(config.kills)):
        process = subprocess.Popen([sys.executable, "prepare_fineweb.py", *prepare_flags(files, killed, *flags)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path(killed).glob("*.npy"))) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        note = "" if process.poll() is None else ", but it had finished"
        process.kill()
        process.wait()
        print(f"killed at {len(list(Path(killed).glob('*.npy')))} of {n_shards} shards{note}", flush=True)
    subprocess.run([sys.executable, "prepare_fineweb.py", *prepare_flags(files, killed, *flags)], check=True,
                   stdout=subprocess.DEVNULL)
    if hash_files(killed) != hash_files(straight):
        raise UserError("the killed run wrote different files than the undisturbed one")
    print(f"{config.kills} kills: {len(hash_files(straight))} files, all with the same bytes\n")


def peak_memory(process):
    """Watch a process until it ends; return its peak resident bytes."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        time.sleep(0.02)
    return peak


def check_memory(config, folder, row_group_size, name):
    """Raise UserError if the peak memory is over its limit or the run fails."""
    path = f"{folder}/{name}.parquet"
    write_parquet(path, config.memory_megabytes, row_group_size, 9)
    flags = prepare_flags(path, f"{folder}/{name}", "--shard_tokens", 10_000_000, "--num_proc", config.workers)
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, *flags, str(config.pause_s)],
                               stdout=subprocess.DEVNULL)
    peak = peak_memory(process)
    print(f"{config.memory_megabytes} MB of text, {name}, {config.pause_s} s delay per shard: peak {peak / 1e6:.0f} MB",
          flush=True)
    if process.returncode or peak > 1.5e9:
        raise UserError(f"{name}: over 1500 MB, or exit status not 0 ({process.returncode})")


def main(argv=None):
    """Check a run that is killed repeatedly and the memory of runs with slow writes."""
    config = parse_config(PrepareStressConfig, argv, description=__doc__.split("\n\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        if config.kills:
            check_kills(config, folder)
        check_memory(config, folder, 100, "small row groups")
        check_memory(config, folder, 10**9, "one row group")


if __name__ == "__main__":
    run_script(main)
