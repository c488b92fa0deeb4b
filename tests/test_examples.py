"""The examples run: the Slurm script between stand-ins for srun and scontrol, and with flags that train.py has."""
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from tests.common import ROOT, script_env
from train import TrainConfig

TINY = ("--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--block_size", 8, "--device", "cpu", "--dtype", "fp32",
        "--total_batch_size", 64, "--hellaswag_every", 0, "--sample_every", 0, "--eval_every", 0)
PROGRAMS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$ASKED"; [ "$1" = show ] && echo localhost; true',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(*flags) -> the script as a process of this machine; tmp_path/asked notes what it asks of scontrol."""
    started = []
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", ASKED=str(tmp_path / "asked"), SLURM_JOB_ID="7",
               SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1")

    def submit(*flags):
        command = ["bash", "examples/slurm.sbatch", *map(str, flags)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=script_env(tmp_path, env), text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield submit
    for process in started:
        process.kill()


@pytest.mark.slow
def test_the_slurm_script_saves_and_requeues_when_it_is_signalled(sbatch, make_shards, tmp_path):
    flags = [*TINY, "--data_dir", make_shards([3000]), "--log_dir", tmp_path / "logs", "--checkpoint_every", 5]
    job = sbatch(*flags, "--max_steps", 100_000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("logs/model_*.pt")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=60)[0]
    step = re.search(r"stopped before step (\d+)", out)
    assert job.returncode == 0 and step and (tmp_path / "logs" / f"model_{int(step[1]):05d}.pt").exists(), out
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"
    (tmp_path / "asked").unlink()
    mistake = sbatch(*flags, "--max_steps", 5)                      # another length: nothing that a requeue could mend
    assert mistake.wait(60) != 0 and "requeue" not in (tmp_path / "asked").read_text()


def test_the_flags_of_the_examples_are_train_pys():
    known = {f"--{field.name}" for field in fields(TrainConfig)}
    texts = [(ROOT / "examples" / name).read_text().replace("\\\n", " ") for name in ("multinode.md", "slurm.sbatch")]
    commands = re.findall(r"(?:train\.py|slurm\.sbatch) (--[^\n&`]*)", "".join(texts))
    flags = {word for command in commands for word in re.findall(r"--\w+", command)}
    assert {"--data_dir", "--log_dir", "--schedule"} <= flags <= known
