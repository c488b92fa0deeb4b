"""A fine-tuning script that signals itself at a step."""

SCRIPT = """
import os, signal, sys
import {script} as script
from exactgpt import finetune
original = finetune.train_step
def train_step(run, config, runtime, step):
    if step == {at}:
        os.kill(os.getpid(), signal.{name})
    return original(run, config, runtime, step)
finetune.train_step = train_step
script.main(sys.argv[1:])
"""


def signalled(script, at, name):
    """Return the text of a script that does what `script` does and sends itself the signal `name` before step `at`."""
    return SCRIPT.format(script=script, at=at, name=name)
