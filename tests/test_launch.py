"""Workers end with their launcher, even if they still import torch when it is killed."""
import ast
import signal
import time
from pathlib import Path
from uuid import uuid4

import pytest

from tests.common import start_process, torchrun_arguments
from tests.syntax import TREES

LAUNCHED = ("finetune_classifier", "finetune_instruct", "hellaswag", "lr_finder", "train")     # by torchrun


def processes_with(mark):
    """Return {pid: command} of the processes whose environment has MARK=mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:      # it has ended, or is not ours
            pass
    return {pid: command for pid, command in found.items() if command}      # without those that have ended


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_death_signal_is_asked_for_before_anything_else_is_imported(name):
    body = [node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "exactgpt.launch" in ast.unparse(body[0])


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.6])
def test_kill_9_of_torchrun_leaves_no_worker_that_still_imports_torch(tmp_path, pause):
    mark = uuid4().hex
    launched = start_process(tmp_path, *torchrun_arguments(4), "train.py", "--device", "cpu", MARK=mark)
    deadline = time.monotonic() + 60
    while sum(b"train.py" in command and b"torch.distributed.run" not in command
              for command in processes_with(mark).values()) < 4:
        assert time.monotonic() < deadline and launched.poll() is None, open(launched.log.name).read()
        time.sleep(0.02)
    time.sleep(pause)
    launched.send_signal(signal.SIGKILL)
    launched.wait()
    time.sleep(1)
    assert not processes_with(mark)
