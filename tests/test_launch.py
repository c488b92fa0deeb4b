"""Workers end with their launcher, even if they still import torch when it is killed."""
import ast
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from exactgpt import launch
from tests.common import script_env, start_process, torchrun_arguments
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


WORKER = "from exactgpt import launch; print('here', flush=True); import time; time.sleep(60)"
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_worker_ends_with_its_launcher_and_a_run_started_by_hand_goes_on(tmp_path, by_torchrun):
    """kill -9 of the launcher. Both have our end of a pipe: it closes when the last of them has ended."""
    env = script_env(tmp_path, {"TORCHELASTIC_RUN_ID": "one"} if by_torchrun else {})
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER], stdout=subprocess.PIPE, env=env,
                                start_new_session=True)
    try:
        assert launcher.stdout.readline() == b"here\n"
        launcher.kill()
        launcher.wait()
        ended, _, _ = select.select([launcher.stdout], [], [], 10 if by_torchrun else 0.3)
        assert bool(ended) == by_torchrun
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)      # the launcher and its worker are alone in their group
        launcher.stdout.close()


@pytest.mark.parametrize("parent, command, ends", [
    (1, b"/sbin/init", True), (900, b"/usr/lib/systemd/systemd\0--user", True), (1, b"python\0-m\0torch", False),
    (900, b"python\0-m\0torch", False), (900, b"bash", False),
], ids=["init", "systemd --user", "torchrun in a container", "torchrun", "another program"])
def test_a_worker_whose_launcher_died_before_it_could_ask_for_the_signal_ends(monkeypatch, parent, command, ends):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    asked, ended = [], []
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *call: asked.append(call)))
    monkeypatch.setattr(launch.os, "getppid", lambda: parent)
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    monkeypatch.setattr(launch, "Path", lambda path: SimpleNamespace(read_bytes=lambda: command))
    launch.die_with_launcher()
    assert asked == [(1, signal.SIGKILL)] and ended == [1] * ends


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
