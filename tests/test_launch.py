"""launch.py, and how config.py uses it: launchers that die, lost output, Ctrl-C, the environment."""
import ast
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from uuid import uuid4

import pytest

from exactgpt import launch
from exactgpt.config import UserError, parse_config, read_ranks
from plot import PlotConfig
from tests import forks
from tests.common import (
    HELLASWAG_FILE,
    ROOT,
    TINY,
    processes_with,
    read_metrics,
    script_env,
    start_process,
    torchrun_arguments,
)
from tests.syntax import TREES

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "model")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_death_signal_is_asked_for_before_anything_else_is_imported(name):
    body = [node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "exactgpt.launch" in ast.unparse(body[0])


WORKER = "from exactgpt import launch; print('here', flush=True); import time; time.sleep(60)"
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_worker_ends_with_its_launcher_and_a_run_started_by_hand_goes_on(tmp_path, by_torchrun):
    """kill -9 of the launcher. Both have our end of a pipe: it closes when the last of them has ended."""
    env = script_env(tmp_path, {"TORCHELASTIC_RUN_ID": "one", **({"WORLD_SIZE": "1"} if by_torchrun else {})})
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
    monkeypatch.setenv("WORLD_SIZE", "1")
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


# -----------------------------------------------------------------------------
# environment

LAUNCHED = dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("env, ranks", [
    ({}, (0, 1, 0, 1, ("", 0))), ({"RANK": "3", "LOCAL_RANK": "x", "MASTER_PORT": ""}, (0, 1, 0, 1, ("", 0))),
    ({"WORLD_SIZE": "", "RANK": ""}, (0, 1, 0, 1, ("", 0))), ({"WORLD_SIZE": "1", "RANK": "7"}, (0, 1, 0, 1, ("", 0))),
    (LAUNCHED, (1, 2, 0, 1, ("localhost", 29500))),
    (dict(LAUNCHED, LOCAL_WORLD_SIZE="2", LOCAL_RANK="1"), (1, 2, 1, 2, ("localhost", 29500))),
    (dict(LAUNCHED, LOCAL_RANK="1"), (1, 2, 1, 1, ("localhost", 29500))),      # DeepSpeed's launcher sets no more
])
def test_without_a_world_the_rank_is_0_whatever_else_an_earlier_launcher_has_left(monkeypatch, env, ranks):
    set_launcher(monkeypatch, env)
    assert read_ranks() == ranks


@pytest.mark.parametrize("name, value, words", [
    ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', but must be a whole number"), ("WORLD_SIZE", "0", "is '0'"),
    ("WORLD_SIZE", "-1", "is '-1'"), ("RANK", "2", "RANK is '2', but must be a whole number from 0 to 1"),
    ("RANK", "", "WORLD_SIZE is 2, but RANK is not set"), ("RANK", "0x1", "is '0x1'"), ("RANK", "²", "is '²'"),
    ("LOCAL_RANK", "2", "is '2'"), ("LOCAL_RANK", "abc", "is 'abc'"), ("LOCAL_WORLD_SIZE", "3", "from 1 to 2"),
    ("MASTER_PORT", "65536", "is '65536'"), ("MASTER_PORT", "http", "is 'http'"),
    ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
])
def test_a_launcher_that_set_nonsense_is_one_line(monkeypatch, name, value, words):
    set_launcher(monkeypatch, dict(LAUNCHED, **{name: value}))
    with pytest.raises(UserError, match=re.escape(words)):
        read_ranks()


def set_launcher(monkeypatch, env):
    """Set a launcher's variables, and no others."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("env", [{"RANK": "3"}, {"RANK": ""}, {"WORLD_SIZE": "abc"}, {"COLUMNS": ""}, {"COLUMNS": "x"}])
def test_a_stale_environment_neither_silences_nor_delays_an_error(run, env):
    begin = time.monotonic()
    rc, _, err = run("plot.py", "absent", env=env)
    assert rc == 2 and len(err.splitlines()) == 1 and err.startswith("plot.py: error: ")
    assert time.monotonic() - begin < 8      # another rank would wait for ten seconds


@pytest.mark.parametrize("columns", ["", "x", "-3", "0", "1", "80", "99999"])
def test_help_fits_any_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parse_config(PlotConfig, ["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


# -----------------------------------------------------------------------------
# Ctrl-C during the imports

def test_ctrl_c_while_a_script_imports_is_quiet(tmp_path):
    """Each of these packages is imported by every script, or by all but those that need no torch."""
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)"
    for name in ("numpy", "torch", "tqdm", "streamlit"):
        (tmp_path / f"{name}.py").write_text(code)
    env = dict(script_env(tmp_path), PYTHONPATH=f"{tmp_path}:{ROOT}")
    started = [subprocess.Popen([sys.executable, ROOT / f"{name}.py"], stderr=subprocess.PIPE, env=env)
               for name in SCRIPTS]
    ends = {name: (process.communicate(timeout=20)[1], process.returncode) for name, process in zip(SCRIPTS, started)}
    assert ends == {name: (b"", -signal.SIGINT) for name in SCRIPTS}


def test_an_ignored_ctrl_c_stays_ignored_and_pytest_keeps_its_own(tmp_path):
    """A shell starts background jobs with SIGINT ignored."""
    assert signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, signal.SIG_IGN)
    code = ("import atexit, runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "atexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)); "
            "sys.argv = ['plot.py', '--help']; runpy.run_path('plot.py', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=script_env(tmp_path), capture_output=True,
                            text=True)
    assert result.stdout.endswith("True\n"), result


# -----------------------------------------------------------------------------
# output that nobody can read

def train_flags(folder, log_dir):
    return (*TINY, "--data_dir", folder, "--log_dir", log_dir, "--total_batch_size", 64, "--max_steps", 6,
            "--eval_every", 2, "--val_tokens", 48, "--sample_every", 3, "--checkpoint_every", 2)


def steps_of(log_dir):
    return [row["step"] for row in read_metrics(log_dir) if "loss" in row]


@pytest.mark.slow
def test_a_run_outlives_its_output(make_shards, tmp_path):
    """A full disk, streams that were closed, a pipe whose reader goes, a terminal that hangs up."""
    folder, (terminal, slave) = make_shards([900]), os.openpty()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    outputs = dict(full="/dev/full", closed=None, pipe=tmp_path / "pipe", terminal=os.ttyname(slave))
    runs = {kind: forks.start("train.py", train_flags(folder, tmp_path / f"to_{kind}"), script_env(tmp_path), output)
            for kind, output in outputs.items()}
    for end in (reader, terminal):
        assert select.select([end], [], [], 60)[0]      # the run has begun to write
        os.close(end)
    os.close(slave)
    for kind, process in runs.items():
        process.join(60)
        assert process.exitcode == 0, kind
        assert steps_of(tmp_path / f"to_{kind}") == list(range(6)) and (tmp_path / f"to_{kind}/model_00006.pt").exists()


def test_what_only_prints_says_that_its_output_is_lost(byte_model, tmp_path):
    for script, flags in (("inference.py", ["--prompt", "a", "--max_tokens", 3]),
                          ("hellaswag.py", ["--data", HELLASWAG_FILE, "--limit", 2])):
        process = forks.start(script, ["--checkpoint", byte_model[0], "--device", "cpu", *flags], script_env(tmp_path),
                              "/dev/full", tmp_path / "err")
        process.join(60)
        assert process.exitcode == 2
        last = (tmp_path / "err").read_text().splitlines()[-1]
        assert last == f"{script}: error: cannot write to standard output: No space left on device"


@pytest.mark.parametrize("ending, status, words", [
    ("pass", 2, "-c: error: cannot write to standard output: No space left on device\n"),
    ("raise config.UserError('bad thing')", 2, "-c: error: bad thing\n"), ("raise KeyboardInterrupt", 130, ""),
])
def test_lost_results_do_not_hide_how_a_script_ends(tmp_path, ending, status, words):
    code = ("from exactgpt import config, launch\ndef main():\n    launch.require_output()\n    print('x')\n"
            f"    {ending}\nconfig.run_script(main)")
    env = {name: value for name, value in script_env(tmp_path).items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (result.returncode, result.stderr) == (status, words)


def test_a_closed_stream_is_not_given_to_the_next_file(tmp_path):
    code = ("import os, sys, exactgpt.launch as launch\nf = open('x', 'w')\nos.write(2, b'for people')\n"
            "launch.guard_streams()\nprint('more', file=sys.stderr)\nprint(f.fileno(), sys.stdin)")
    command = f"cd {tmp_path} && {sys.executable} -c \"{code}\" <&- 2>&-"
    result = subprocess.run(command, shell=True, env=script_env(tmp_path), capture_output=True, text=True)
    assert result.stdout == "3 None\n" and (tmp_path / "x").read_bytes() == b"", result


@pytest.mark.slow
def test_letters_that_standard_output_lacks_are_escaped(run, make_shards, tmp_path):
    """An ASCII terminal, folders named with letters; then a locale in which Python cannot read the name either."""
    log_dir, out = tmp_path / "gr\u00fcn\U0001f600", tmp_path / "out"
    env = dict(script_env(tmp_path), PYTHONIOENCODING="ascii")
    for script, flags in (("train.py", train_flags(make_shards([900]), log_dir)),
                          ("inference.py", ["--checkpoint", log_dir / "model_00006.pt", "--prompt", "\u00fc"])):
        process = forks.start(script, flags, env, out)
        process.join(60)
        assert process.exitcode == 0, out.read_text()
    said = out.read_bytes()
    assert rb"gr\xfcn\U0001f600/model_00006.pt" in said and b"> \\xfc" in said and said.isascii()
    (tmp_path / "text.txt").write_text("\u00fc" * 3000)
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    rc, out, err = run("prepare_text.py", tmp_path / "text.txt", "--out", tmp_path / "\u00fc", env=plain)
    assert rc == 0 and "next: python train.py --data_dir" in out, err
    assert (tmp_path / "\u00fc" / "manifest.json").exists()
    rc, out, err = run("plot.py", log_dir, env=plain)
    assert rc == 0 and f"wrote {log_dir}/plot.png" in out, err      # as the user typed it


@pytest.mark.parametrize("text, shown", [("\u00fc", "\u00fc"), ("\udcc3\udcbc", "\u00fc"), ("\udcff", "\ufffd"),
                                         ("a\ud800b", r"a\ud800b"), ("", "")])
def test_what_a_locale_could_not_read_becomes_text_again(text, shown):
    assert launch.printable(text) == shown


def test_output_that_fails_for_a_while_goes_on_after_it(tmp_path):
    class Disk:
        text, full = "", False

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            self.text += text

        def flush(self):
            if self.full:
                raise OSError(28, "No space left on device")
    disk = Disk()
    output = launch.Output(disk)
    for disk.full, line in ((False, "a"), (True, "b"), (False, "c")):
        print(line, file=output, flush=True)
    assert disk.text == "a\nc\n" and output.lost.errno == 28
    output.required, disk.full = True, True
    with pytest.raises(OSError):
        print("d", file=output)
