"""A fine-tuning script that signals itself at a step."""

SCRIPT = """
import os, signal, sys
import {script} as script
from exactgpt import finetune
step = finetune.train_step
def train_step(run, *rest):
    if run.step == {at}:
        os.kill(os.getpid(), signal.{name})
    return step(run, *rest)
finetune.train_step = train_step
script.main(sys.argv[1:])
"""


def signalled(script, at, name):
    """The text of a script that does what `script` does and sends itself the signal `name` before step `at`."""
    return SCRIPT.format(script=script, at=at, name=name)
