"""config.py: flags of every type, one-line errors printed once over all ranks, atomic files, folder locks."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from exactgpt import config
from exactgpt.config import DeviceConfig, UserError, counted, flag, human_bytes, parse_config
from exactgpt.files import (
    FolderLock,
    atomic_write,
    check_new,
    find_visible,
    new_folder,
    read_json,
    read_text,
    write_json,
)
from tests.common import script_env

# -----------------------------------------------------------------------------
# flags


@dataclass(kw_only=True)
class Flags(DeviceConfig):
    source: str = flag(help="needed", group="data")
    steps: int = flag(100, "how many steps", group="length", low=0, high=1000, keep=True)
    epochs: float | None = flag(None, "passes, 100% of the data each", group="length", above=0)
    layers: int | None = flag(None, "layers", group="model", low=1)
    dropout: float = flag(0.0, "probability", group="model", low=0.0, below=1.0, keep=True)
    kind: str = flag("cosine", "shape", group="model", choices=("cosine", "wsd"))
    copies: int = flag(1, "copies", group="model", choices=(1, 2))
    prompt: list[str] = flag([], "text; may be given several times", group="text", repeat=True)
    verbose: bool = flag(False, "say more", group="text")

    def check(self):
        if self.epochs and self.layers:
            raise UserError("--epochs and --layers exclude each other")


@dataclass
class Files:
    files: list[str] = flag([], "what to read", positional=True)
    out: str = flag("x", "where to write")


@dataclass
class OneFile:
    file: str = flag(help="what to read", positional=True)


def parsed(*words, cls=Flags):
    return parse_config(cls, [*(["--source", "s"] if cls is Flags else []), *words])


def refusal(*words, cls=Flags):
    with pytest.raises(UserError) as caught:
        parsed(*words, cls=cls)
    return str(caught.value)


def test_without_flags_every_field_has_its_default():
    assert parsed() == Flags(source="s", steps=100, epochs=None, layers=None, dropout=0.0, kind="cosine", copies=1,
                             prompt=[], verbose=False, device="auto", dtype="auto")


@pytest.mark.parametrize("words, name, value", [
    (["--steps", "7"], "steps", 7), (["--steps=7"], "steps", 7), (["--steps", "0"], "steps", 0),
    (["--steps", "1000"], "steps", 1000), (["--epochs", "2"], "epochs", 2.0), (["--epochs", "1e-3"], "epochs", 0.001),
    (["--layers", "3"], "layers", 3), (["--dropout", "0.5"], "dropout", 0.5), (["--dropout", "0"], "dropout", 0.0),
    (["--kind", "wsd"], "kind", "wsd"), (["--copies", "2"], "copies", 2), (["--verbose"], "verbose", True),
    (["--prompt", "a b"], "prompt", ["a b"]), (["--prompt", "a", "--prompt", ""], "prompt", ["a", ""]),
    (["--dtype", "bf16"], "dtype", "bf16"), (["--source", "two"], "source", "two"),
])
def test_a_flag_sets_its_field_with_the_right_type(words, name, value):
    got = getattr(parsed(*words), name)
    assert got == value and type(got) is type(value)


def test_lists_are_not_shared_between_configs():
    parsed().prompt.append("leaked")
    assert parsed().prompt == []


@pytest.mark.parametrize("words, expected", [
    ([], []), (["a"], ["a"]), (["a", "b"], ["a", "b"]), (["--out", "o", "a"], ["a"]), (["a", "--out", "o"], ["a"]),
    (["a", "--out", "o", "b"], ["a", "b"]),
], ids=str)
def test_positional_arguments_may_appear_anywhere(words, expected):
    assert parsed(*words, cls=Files).files == expected


def test_a_single_positional_argument_is_required_and_unique():
    assert parsed("a", cls=OneFile).file == "a"
    assert "required: FILE" in refusal(cls=OneFile)
    assert "unknown argument b" in refusal("a", "b", cls=OneFile)
    assert "unknown argument --fil (" in refusal("a", "--fil", cls=OneFile)      # its name is no flag


@pytest.mark.parametrize("words, expected", [
    (["--step", "7"], "unknown argument --step; did you mean --steps?"),
    (["--ste=7"], "unknown argument --ste=7; did you mean --steps?"),
    (["--layer", "7"], "did you mean --layers?"), (["--Dropout", "0.1"], "did you mean --dropout?"),
    (["--n-layers", "7"], "did you mean --layers?"), (["--verb"], "did you mean --verbose?"),
    (["--st"], "did you mean --steps?"), (["--d"], "did you mean --device or --dtype or --dropout?"),
    (["--zzzz", "7"], "unknown argument --zzzz ("), (["-steps", "7"], "unknown argument -steps ("),
    (["stray"], "unknown argument stray ("),
])
def test_an_unknown_or_abbreviated_flag_is_an_error_that_suggests_the_nearest_ones(words, expected):
    assert expected in refusal(*words) and "--help lists the flags" in refusal(*words)


@pytest.mark.parametrize("words, expected", [
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "1.5"], "--steps: invalid int value: '1.5'"), (["--steps", ""], "--steps: invalid int value: ''"),
    (["--steps"], "--steps: expected one argument"), (["--steps", "-1"], "--steps must be >= 0, but is -1"),
    (["--steps", "1001"], "--steps must be <= 1000, but is 1001"),
    (["--epochs", "0"], "--epochs must be > 0, but is 0.0"),
    (["--dropout", "1"], "--dropout must be < 1.0, but is 1.0"),
    (["--dropout", "x"], "--dropout: invalid float value: 'x'"), (["--layers", "0"], "--layers must be >= 1"),
    (["--kind", "step"], "--kind must be one of cosine, wsd, but is 'step'"),
    (["--copies", "3"], "--copies must be one of 1, 2, but is 3"),
    (["--verbose=1"], "--verbose: ignored explicit argument '1'"),
    (["--epochs", "1", "--layers", "1"], "--epochs and --layers exclude each other"),
])
def test_an_invalid_value_is_an_error_that_says_what_is_valid(words, expected):
    assert expected in refusal(*words)


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["dropout", "epochs"])
def test_nan_and_infinity_are_invalid(name, text):
    assert f"--{name} must be a finite number, but is {float(text)}" in refusal(f"--{name}={text}")


def test_a_flag_without_default_is_required():
    with pytest.raises(UserError, match="required: --source"):
        parse_config(Flags, [])


def test_replace_checks_what_it_changes():
    changed = config.with_changes(parsed(), steps=5)
    assert changed.steps == 5 and changed.source == "s"
    with pytest.raises(UserError, match="--steps must be <= 1000"):
        config.with_changes(parsed(), steps=1001)
    with pytest.raises(UserError, match="exclude each other"):
        config.with_changes(parsed(), epochs=1.0, layers=1)


def test_help_lists_every_flag_once_in_its_group_with_default_and_choices(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["thing.py"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse_config(Flags, ["--help"], "Does it.")
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert out.startswith("usage: thing.py [--flag value ...]") and "\nDoes it.\n" in out
    assert max(map(len, out.splitlines())) <= 100
    groups = out.split("\n\n")
    for title, flags in {"system": ("--tokenizer TEXT", "--device TEXT", "--dtype auto|bf16|fp16|fp32"),
                         "data": ("--source TEXT",),
                         "length": ("--steps N", "--epochs X"), "text": ("--prompt TEXT", "--verbose"),
                         "model": ("--layers N", "--dropout X", "--kind cosine|wsd", "--copies 1|2")}.items():
        [group] = [g for g in groups if g.startswith(f"{title}:")]
        assert all(f"\n  {flag} " in f"{group} " for flag in flags)
        assert group.count("\n  --") == len(flags)
    assert "how many steps (default: 100)" in out and "passes, 100% of the data each\n" in out   # None shows no default
    assert "needed\n" in out and "shape (default: cosine)" in out


# -----------------------------------------------------------------------------
# errors

SCRIPT = """
import sys, time
from exactgpt.config import RunFailed, UserError, run_script
def main():
    print("started", flush=True)
    raise {error}
run_script(main)
"""


def test_a_user_error_is_one_line_and_status_2_and_a_failed_run_status_1(run):
    rc, out, err = run("-c", SCRIPT.format(error="UserError('two\\nlines,   one error')"))
    assert (rc, out, err) == (2, "started\n", "-c: error: two lines, one error\n")
    rc, _, err = run("-c", SCRIPT.format(error="RunFailed('it diverged')"))
    assert (rc, err) == (1, "-c: error: it diverged\n")


def test_rank_0_of_several_prints_and_exits_with_status_2(run):
    rc, _, err = run("-c", SCRIPT.format(error="UserError('no shards')"), env={"RANK": "0", "WORLD_SIZE": "2"})
    assert (rc, err) == (2, "-c: error: no shards\n")


def test_other_ranks_print_nothing_wait_for_torchruns_signal_and_exit_with_status_2(tmp_path):
    code, env = SCRIPT.format(error="UserError('no shards')"), dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost",
                                                                    MASTER_PORT="29500")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=script_env(tmp_path, env))
    assert process.stdout.readline() == "started\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)                                           # rank 0 must be able to print first
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (2, "", "")


def test_other_errors_keep_their_traceback_and_ctrl_c_is_quiet(run):
    rc, _, err = run("-c", SCRIPT.format(error="ValueError('a bug')"))
    assert rc == 1 and "Traceback" in err and err.endswith("ValueError: a bug\n")
    rc, _, err = run("-c", SCRIPT.format(error="KeyboardInterrupt"))
    assert (rc, err) == (130, "")


def test_a_closed_pipe_ends_what_only_prints_quietly(tmp_path):
    code = ("from exactgpt import config, launch\ndef main():\n    launch.require_output()\n"
            "    while True: print('x' * 4096)\nconfig.run_script(main)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=script_env(tmp_path))
    os.read(process.stdout.fileno(), 100)
    process.stdout.close()
    assert process.wait(10) == 0 and process.stderr.read() == b""
    process.stderr.close()


# -----------------------------------------------------------------------------
# files

def background(code, home):
    """Start a Python process that runs code; its standard output can be read line by line."""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=script_env(home))


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_file_gets_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_write(path) as f:
        f.write(b"whole")
        f.flush()
        assert not path.exists()
    assert path.read_bytes() == b"whole" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, "w") as f:
        f.write("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_kill_9_while_writing_leaves_the_old_file_and_the_next_run_cleans_up(tmp_path):
    path, mine = tmp_path / "file", tmp_path / "file.tmp"
    path.write_text("old")
    mine.write_text("a stranger's")
    writer = background(f"""
import time
from exactgpt.files import FolderLock, atomic_write, new_folder
lock = FolderLock({str(tmp_path)!r}, wait_s=0)
lock.claim()
with atomic_write({str(path)!r}) as f, new_folder({str(tmp_path / "new")!r}) as folder:
    f.write(b"half")
    f.flush()
    (folder / "x").touch()
    print(f.name, folder, flush=True)
    time.sleep(60)""", tmp_path)
    half, folder = map(Path, writer.stdout.readline().split())
    kill(writer)
    assert path.read_text() == "old" and half.read_bytes() == b"half" and (folder / "x").exists()
    assert half.parent == folder.parent == tmp_path
    with atomic_write(path, "w") as f:      # of a process without the lock: another temporary name
        f.write("n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode() and half.exists()
    with FolderLock(tmp_path, wait_s=0):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "file", "file.tmp"]
    assert mine.read_text() == "a stranger's"


@pytest.fixture
def disk_calls(monkeypatch):
    """The calls that force data to the disk and rename, in order: ("fsync", inode, bytes in it), ("rename", inode)."""
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        fsync(descriptor)
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def note_replace(old, new, **options):
        calls.append(("rename", os.stat(old).st_ino))
        replace(old, new, **options)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return calls


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_write_returns(tmp_path, disk_calls):
    """A power cut loses what was not forced to the disk: it could leave the name on an empty file, or the old file."""
    with atomic_write(tmp_path / "file") as f:
        f.write(b"x" * 1000)
    file, folder = (os.stat(path).st_ino for path in (tmp_path / "file", tmp_path))
    renamed = disk_calls.index(("rename", file))
    assert ("fsync", file, 1000) in disk_calls[:renamed]             # all of its bytes
    assert folder in [inode for _, inode, *_ in disk_calls[renamed + 1:]]


def test_every_file_in_a_folder_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, disk_calls):
    with new_folder(tmp_path / "new") as temporary:
        (temporary / "below").mkdir()
        for name in ("a", "below/b"):
            (temporary / name).write_bytes(b"x" * 1000)
    renamed = disk_calls.index(("rename", os.stat(tmp_path / "new").st_ino))
    before, after = ({inode for _, inode, *_ in calls} for calls in (disk_calls[:renamed], disk_calls[renamed + 1:]))
    assert {os.stat(tmp_path / "new" / name).st_ino for name in (".", "a", "below", "below/b")} <= before
    assert os.stat(tmp_path).st_ino in after


@pytest.mark.parametrize("make", [lambda folder: FolderLock(folder, wait_s=0).__exit__(),
                                  lambda folder: write_json(folder / "a.json", 1)])
def test_folders_made_on_the_way_are_on_the_disk_too(tmp_path, disk_calls, make):
    """Otherwise a power cut may take a new --log_dir away together with the first checkpoints in it."""
    make(tmp_path / "new" / "deep")
    synced = {inode for kind, inode, *_ in disk_calls if kind == "fsync"}
    assert {os.stat(path).st_ino for path in (tmp_path, tmp_path / "new")} <= synced


def test_lines_of_a_text_end_in_one_way(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\n"


def test_json_survives_the_round_trip(tmp_path):
    value = {"text": "h\u00e9llo \U0001f600", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())
    write_json(tmp_path / "b.json", [1])
    assert read_json(tmp_path / "b.json", list) == [1]


@pytest.mark.parametrize("data, message", [
    (b"{", "is not valid JSON"), (b"", "is not valid JSON"), (b"\xff\xfe", "is not UTF-8 text"),
    (b"[" * 200_000, "is not valid JSON"), (b"[1]", "must hold a JSON dict, but holds a list"), (None, "cannot read"),
], ids=["cut", "empty", "not UTF-8", "deep", "list", "absent"])
def test_bad_json_is_a_user_error_that_names_the_file(tmp_path, data, message):
    path = tmp_path / "some.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_locked_until_its_holder_exits(tmp_path):
    with FolderLock(tmp_path / "logs", wait_s=0):
        with pytest.raises(UserError, match=r"another run is using .*logs \(it holds .*\.lock\)"):
            FolderLock(tmp_path / "logs", wait_s=0)
        with FolderLock(tmp_path / "other", wait_s=0):
            pass
    with FolderLock(tmp_path / "logs", wait_s=0):
        pass


def test_kill_9_of_the_holder_releases_the_lock_to_a_waiting_process(tmp_path):
    holder = background(f"""
import time
from exactgpt.files import FolderLock
with FolderLock({str(tmp_path)!r}, wait_s=0):
    print("held", flush=True)
    time.sleep(60)""", tmp_path)
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(UserError, match="another run"):
        FolderLock(tmp_path, wait_s=0.5)
    assert 0.5 <= time.monotonic() - start < 5
    waiting = background(f"from exactgpt.files import FolderLock; FolderLock({str(tmp_path)!r}, 30); "
                         "print('got it')", tmp_path)
    time.sleep(0.3)
    kill(holder)
    said = waiting.communicate(timeout=10)[0].splitlines()
    assert said == [f"another run is using {tmp_path}; waiting up to 30 s for it to finish", "got it"]


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in .*file: Not a directory"):
        FolderLock(tmp_path / "file", wait_s=0)
    with pytest.raises(UserError, match=r"cannot write in .*file/below: Not a directory"):
        FolderLock(tmp_path / "file" / "below", wait_s=0)


def test_a_new_file_overwrites_nothing(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "not" / "yet")
    check_new(tmp_path / "empty", folder=True)
    for path, problem in (("there", "there already exists"), ("empty", "empty already exists"),
                          ("there/below", "cannot write .*below: .*there is not a folder that you may write in")):
        with pytest.raises(UserError, match=problem):
            check_new(tmp_path / path)


def test_a_folder_gets_its_name_only_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "new") as temporary:
        (temporary / "file").touch()
        assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(ValueError), new_folder(tmp_path / "other") as temporary:
        (temporary / "file").touch()
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_hidden_and_vanished_folders_are_skipped(tmp_path, monkeypatch):
    for name in (".dry_run/run", "a", "a/b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "model_1.pt").touch()
    for folder in (tmp_path, f"{tmp_path}/"):
        assert sorted(find_visible(folder, "model_*.pt")) == [tmp_path / "a/b/model_1.pt", tmp_path / "a/model_1.pt"]
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed(path if str(path)[-1:] != "b" else tmp_path / "gone"))
    assert find_visible(tmp_path, "model_*.pt") == [tmp_path / "a/model_1.pt"]


def test_a_number_agrees_with_its_noun():
    assert [counted(n, noun) for n, noun in ((1, "step"), (0, "step"), (2000, "process"), (1, "micro-batch"),
                                             (2, "micro-batch"))] == [
        "1 step", "0 steps", "2,000 processes", "1 micro-batch", "2 micro-batches"]


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (1_500_000_000, "1.5 GB"), (2 * 10**12, "2 TB"),
    (10**15, "1000 TB"),
])
def test_human_bytes(n, text):
    assert human_bytes(n) == text
