"""Run train.py with an accident built in. Use it like train.py; the environment variable ACCIDENT says which one:

    WHAT:WHERE:STEP[:RANK]   WHAT   kill (SIGKILL), term, int, usr1 (signals), error (a Python exception), full (disk),
                                    hup (SIGHUP), nohup (SIGHUP, ignored from the start), inf (an infinite gradient at
                                    STEP), infs (from STEP on), hang (then exit),
                                    run (the shell command in ACCIDENT_COMMAND)
                             WHERE  step (before its update), save (half the file is written), validate, sample, start

The accident happens at STEP, on all ranks or only on RANK. ACCIDENT_ONCE names a file that counts accidents: with it,
ACCIDENT may list several, separated by commas, and each start has the next one, or none if all have happened.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import train
from exactgpt import checkpoint, config
from exactgpt.files import FolderLock

count_file = os.environ.get("ACCIDENT_ONCE")
n_happened = len(Path(count_file).read_text()) if count_file and Path(count_file).exists() else 0
accidents = [*os.environ.get("ACCIDENT", "none:none:0").split(","), "none:none:0"]
what, where, at_step, *only_rank = accidents[min(n_happened, len(accidents) - 1)].split(":")
at_step = int(at_step)
if what == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
on_this_rank = not only_rank or only_rank[0] == os.environ.get("RANK", "0")


def cause_accident():
    """Cause the accident if it is meant for this rank, and count it."""
    if not on_this_rank:
        return
    if count_file:
        with open(count_file, "a") as f:
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
    signals = dict(kill=signal.SIGKILL, term=signal.SIGTERM, int=signal.SIGINT, usr1=signal.SIGUSR1,
                   hup=signal.SIGHUP, nohup=signal.SIGHUP)
    os.kill(os.getpid(), signals[what])
    time.sleep(0.1)


def with_accident_before(function, step_of, place):
    """Return the function with the accident before it, if `place` is WHERE and step_of(arguments) is STEP."""
    def wrapped(*args, **kwargs):
        if place == where and step_of(*args, **kwargs) == at_step:
            cause_accident()
        return function(*args, **kwargs)
    return wrapped


save_checkpoint = checkpoint.save_checkpoint


def save_with_accident(path, entries):
    """Save a checkpoint with the accident halfway through, or with a full disk until STEP."""
    if what == "full" and entries["step"] < at_step and on_this_rank:
        raise config.UserError("cannot write: No space left on device")
    if where == "save" and what != "full" and entries["step"] == at_step:
        Path(f"{path}.{FolderLock.mark_of(path.parent)}.tmp").write_bytes(b"PK\x03\x04 half of a file")
        cause_accident()
    return save_checkpoint(path, entries)


def with_infinite_gradient(train_step):
    """Return train_step with an infinite gradient at STEP (inf) or from STEP on (infs).

    After each step all ranks compare their weights.
    """
    def wrapped(run, config, runtime, tokens, step):
        hook = None
        if on_this_rank and (step == at_step or (what == "infs" and step > at_step)):
            hook = run.raw_model.transformer.ln_f.weight.register_hook(lambda grad: grad * float("inf"))
        result = train_step(run, config, runtime, tokens, step)
        if hook:
            hook.remove()
        runtime.require_equal("weights", [p.double().sum().item() for p in run.raw_model.parameters()])
        return result
    return wrapped


if what in ("inf", "infs"):
    train.train_step = with_infinite_gradient(train.train_step)
train.train_step = with_accident_before(train.train_step, lambda run, config, runtime, tokens, step: step, "step")
checkpoint.save_checkpoint = save_with_accident
train.write_samples = with_accident_before(train.write_samples, lambda run, config, runtime, step: step, "sample")


class RunLog(train.RunLog):
    """The run's log, which also gives validate() an accident: validate itself does not know the step."""

    def __init__(self, progress, *more):
        super().__init__(progress, *more)
        train.validate = with_accident_before(validate, lambda *_: progress.step, "validate")


validate, train.RunLog = train.validate, RunLog
train.compile_and_wrap = with_accident_before(train.compile_and_wrap, lambda *_: 0, "start")

if __name__ == "__main__":
    sys.argv[0] = "train.py"
    config.run_script(train.main)
