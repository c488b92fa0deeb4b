"""train.py, with one accident built in. Run as train.py is run; the environment variable ACCIDENT says which:

    WHAT:WHERE:STEP[:RANK]   WHAT  kill (SIGKILL), term, int, usr1 (signals), error (a Python exception), full (disk),
                                   inf (a gradient of that step), infs (from that step on), hang (and end),
                                   run (the shell command in ACCIDENT_COMMAND)
                             WHERE step (before its update), save (half the file is written), validate, sample, start

With a STEP the accident happens at that step; with a RANK on that rank only. ACCIDENT_ONCE names a file that marks
that it has happened: later starts are undisturbed, or have the next of several accidents, joined by commas.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import train
from exactgpt import checkpoint, config

once = os.environ.get("ACCIDENT_ONCE")
happened = len(Path(once).read_text()) if once and Path(once).exists() else 0
accidents = [*os.environ.get("ACCIDENT", "none:none:0").split(","), "none:none:0"]
what, where, at, *only_rank = accidents[min(happened, len(accidents) - 1)].split(":")
mine = not only_rank or only_rank[0] == os.environ.get("RANK", "0")


def accident():
    """Let it happen, on the ranks and in the start that it is meant for."""
    if not mine:
        return
    if once:
        with open(once, "a") as f:
            f.write("x")
    if what in ("inf", "infs", "none"):
        return
    if what == "hang":
        time.sleep(float(os.environ.get("ACCIDENT_SECONDS", 3600)))
        os._exit(1)
    if what == "run":
        subprocess.run(os.environ["ACCIDENT_COMMAND"], shell=True, check=True)
        return
    if what == "error":
        raise ValueError("an accident in the code")
    signals = dict(kill=signal.SIGKILL, term=signal.SIGTERM, int=signal.SIGINT, usr1=signal.SIGUSR1)
    os.kill(os.getpid(), signals[what])
    time.sleep(0.1)


def before(function, step_of, place):
    """The function, preceded by the accident when its step has come."""
    def wrapped(*args, **kwargs):
        if place == where and step_of(*args, **kwargs) == int(at):
            accident()
        return function(*args, **kwargs)
    return wrapped


save_checkpoint = checkpoint.save_checkpoint


def half_a_save(path, entries):
    """A save in whose middle the accident happens, or that finds the disk full until STEP."""
    if what == "full" and entries["step"] < int(at) and mine:
        raise OSError(28, "No space left on device")
    if where == "save" and what != "full" and entries["step"] == int(at):
        Path(f"{path}.tmp").write_bytes(b"PK\x03\x04 half of a file")
        accident()
    return save_checkpoint(path, entries)


def poisoned(train_step):
    """train_step with an infinite gradient where that is the accident; all ranks compare their weights after it."""
    def wrapped(run, config, runtime, tokens, step):
        hook = None
        if mine and (step == int(at) or (what == "infs" and step > int(at))):
            hook = run.raw_model.transformer.ln_f.weight.register_hook(lambda grad: grad * float("inf"))
        result = train_step(run, config, runtime, tokens, step)
        if hook:
            hook.remove()
        runtime.require_equal("weights", [p.double().sum().item() for p in run.raw_model.parameters()])
        return result
    return wrapped


if what in ("inf", "infs"):
    train.train_step = poisoned(train.train_step)
train.train_step = before(train.train_step, lambda run, config, runtime, tokens, step: step, "step")
checkpoint.save_checkpoint = half_a_save
train.write_samples = before(train.write_samples, lambda run, config, runtime, step: step, "sample")


class RunLog(train.RunLog):
    """The log of the run, which knows how far it is."""

    def __init__(self, run, progress, config, runtime):
        super().__init__(run, progress, config, runtime)
        train.validate = before(validate, lambda *_: progress.step, "validate")


validate, train.RunLog = train.validate, RunLog
train.compile_and_wrap = before(train.compile_and_wrap, lambda *_: 0, "start")

if __name__ == "__main__":
    sys.argv[0] = "train.py"
    config.run_script(train.main)
