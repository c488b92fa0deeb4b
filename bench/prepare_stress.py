"""What is too long for the tests of prepare_fineweb.py: many kills at random moments, and memory under a slow writer.

    python -m bench.prepare_stress

Kills: the same command, killed with SIGKILL at random moments and run again, must leave the bytes of a straight run.
Memory: text goes through while writing a shard takes seconds; the peak of the parent and of its workers must stay
under 1.5 GB and 0.2 GB, whatever the size of the row groups.
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
class Config:
    """The flags of this stress test."""
    kills: int = flag(10, "how often the run is killed", low=0)
    kill_megabytes: int = flag(60, "text of the killed run", low=1)
    memory_megabytes: int = flag(200, "text of the run with the slow writer", low=1)
    pause_s: float = flag(3.0, "what writing a shard takes longer", low=0)
    workers: int = flag(2, "tokenising processes", low=0)
    seed: int = flag(0, "of the moments", low=0)


def write_parquet(path, megabytes, row_group_size, seed):
    """CPython's documentation, in another order each time, until the file holds so many megabytes of text."""
    import pyarrow
    import pyarrow.parquet
    texts, rng, size, documents = list(python_documents()), np.random.default_rng(seed), 0, []
    while size < megabytes * 1e6:
        documents += [texts[i] for i in rng.permutation(len(texts))]
        size += sum(len(t.encode()) for t in texts)
    table = pyarrow.table({"text": documents, "score": rng.random(len(documents))})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def command(files, out, *flags):
    """The flags of a prepare_fineweb.py, as strings."""
    return ["--data_files", files, "--out", out, *map(str, flags)]


def hashes(folder):
    """{name: sha256} of the files of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir() if p.name != ".lock"}


def kill_again_and_again(config, folder):
    """Raise UserError unless the killed runs leave what a straight one does."""
    rng = random.Random(config.seed)
    for i in range(3):
        write_parquet(f"{folder}/{i}.parquet", config.kill_megabytes / 3, 100, i)
    flags = ["--shard_tokens", 200_000, "--num_proc", config.workers]
    files, straight, killed = f"{folder}/*.parquet", f"{folder}/straight", f"{folder}/killed"
    subprocess.run([sys.executable, "prepare_fineweb.py", *command(files, straight, *flags)], check=True,
                   stdout=subprocess.DEVNULL)
    n_shards = len(list(Path(straight).glob("*.npy")))
    for target in sorted(rng.randrange(n_shards) for _ in range(config.kills)):
        process = subprocess.Popen([sys.executable, "prepare_fineweb.py", *command(files, killed, *flags)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path(killed).glob("*.npy"))) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        note = "" if process.poll() is None else ", it was done"
        process.kill()
        process.wait()
        print(f"killed at {len(list(Path(killed).glob('*.npy')))} of {n_shards} shards{note}", flush=True)
    subprocess.run([sys.executable, "prepare_fineweb.py", *command(files, killed, *flags)], check=True,
                   stdout=subprocess.DEVNULL)
    if hashes(killed) != hashes(straight):
        raise UserError("the killed run left other files than the straight one")
    print(f"{config.kills} kills: {len(hashes(straight))} files, all the same bytes\n")


def peak_memory(process):
    """(parent, [workers]) peak resident bytes of a running process and its children, watched until it ends."""
    peaks = {}
    while process.poll() is None:
        for pid in [process.pid, *_children(process.pid)]:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
                peaks[pid] = max(peaks.get(pid, 0), 1024 * kilobytes)
        time.sleep(0.02)
    return peaks.pop(process.pid, 0), list(peaks.values())


def _children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def watch_memory(config, folder, row_group_size, name):
    """Raise UserError where the peak of the parent or of a worker is over its bound."""
    path = f"{folder}/{name}.parquet"
    write_parquet(path, config.memory_megabytes, row_group_size, 9)
    flags = command(path, f"{folder}/{name}", "--shard_tokens", 10_000_000, "--num_proc", config.workers)
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, *flags, str(config.pause_s)],
                               stdout=subprocess.DEVNULL)
    parent, workers = peak_memory(process)
    print(f"{config.memory_megabytes} MB of text, {name}, {config.pause_s} s more a shard: peak {parent / 1e6:.0f} MB, "
          f"workers {', '.join(f'{w / 1e6:.0f}' for w in workers)} MB", flush=True)
    if process.returncode or parent > 1.5e9 or max(workers, default=0) > 0.2e9:
        raise UserError(f"{name}: over 1500 MB, or over 200 MB in a worker, or status {process.returncode}")


def main(argv=None):
    """Kill a run again and again, and watch the memory of a slow one."""
    config = parse_config(Config, argv, description=__doc__.split("\n\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        if config.kills:
            kill_again_and_again(config, folder)
        watch_memory(config, folder, 100, "small row groups")
        watch_memory(config, folder, 10**9, "one row group")


if __name__ == "__main__":
    run_script(main)
