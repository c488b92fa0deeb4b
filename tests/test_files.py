"""files.py: a file is the old one or the new one, never a part; a folder belongs to one process."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from common import script_env

from exactgpt.config import (
    FolderLock,
    UserError,
    atomic_write,
    check_new_file,
    find_visible,
    human_bytes,
    read_json,
    write_json,
)


def background(code, home):
    """A Python process that runs code; its standard output can be read line by line."""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=script_env(home))


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
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


def test_kill_9_while_writing_leaves_the_old_file_and_the_next_try_clears_up(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    writer = background(f"""
import time
from exactgpt.config import atomic_write
with atomic_write({str(path)!r}) as f:
    f.write(b"half")
    f.flush()
    print("writing", flush=True)
    time.sleep(60)""", tmp_path)
    assert writer.stdout.readline() == "writing\n"
    kill(writer)
    assert path.read_text() == "old" and (tmp_path / "file.tmp").read_bytes() == b"half"
    with atomic_write(path, "w") as f:
        f.write("n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode() and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_survives_the_round_trip(tmp_path):
    value = {"text": "h\u00e9llo \U0001f600", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())
    write_json(tmp_path / "b.json", [1])
    assert read_json(tmp_path / "b.json", list) == [1]


@pytest.mark.parametrize("data, message", [
    (b"{", "is not valid JSON"), (b"", "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"),
    (b"[" * 200_000, "is not valid JSON"), (b"[1]", "must hold a JSON dict, but holds a list"), (None, "cannot read"),
], ids=["cut", "empty", "not UTF-8", "deep", "list", "absent"])
def test_bad_json_is_a_user_error_that_names_the_file(tmp_path, data, message):
    path = tmp_path / "some.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_locked_until_its_holder_leaves(tmp_path):
    with FolderLock(tmp_path / "logs", wait_s=0):
        with pytest.raises(UserError, match=r"another run is using .*logs \(it holds .*\.lock\)"):
            FolderLock(tmp_path / "logs", wait_s=0)
        with FolderLock(tmp_path / "other", wait_s=0):
            pass
    with FolderLock(tmp_path / "logs", wait_s=0):
        pass


def test_kill_9_of_the_holder_frees_the_folder_for_one_that_waits(tmp_path):
    holder = background(f"""
import time
from exactgpt.config import FolderLock
with FolderLock({str(tmp_path)!r}, wait_s=0):
    print("held", flush=True)
    time.sleep(60)""", tmp_path)
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(UserError, match="another run"):
        FolderLock(tmp_path, wait_s=0.5)
    assert 0.5 <= time.monotonic() - start < 5
    waiting = background(f"from exactgpt.config import FolderLock; FolderLock({str(tmp_path)!r}, 30); "
                         "print('got it')", tmp_path)
    time.sleep(0.3)
    kill(holder)
    said = waiting.communicate(timeout=10)[0].splitlines()
    assert said == [f"another run is using {tmp_path}; waiting up to 30 s for its end", "got it"]


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be a folder: .*file is a file"):
        FolderLock(tmp_path / "file", wait_s=0)
    with pytest.raises(UserError, match=r"cannot be a folder"):
        FolderLock(tmp_path / "file" / "below", wait_s=0)


def test_a_new_file_writes_over_nothing(tmp_path):
    (tmp_path / "there").touch()
    check_new_file(tmp_path / "not" / "yet", "--out")
    for path, problem in (("there", "exists already"), ("there/below", "cannot write in")):
        with pytest.raises(UserError, match=f"--out .*{problem}"):
            check_new_file(tmp_path / path, "--out")


def test_what_is_hidden_or_goes_away_is_not_found(tmp_path, monkeypatch):
    for name in (".dry_run/run", "a", "a/b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "model_1.pt").touch()
    assert sorted(find_visible(tmp_path, "model_*.pt")) == [tmp_path / "a/b/model_1.pt", tmp_path / "a/model_1.pt"]
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed(path if str(path)[-1:] != "b" else tmp_path / "gone"))
    assert find_visible(tmp_path, "model_*.pt") == [tmp_path / "a/model_1.pt"]


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1536, "1.5 kB"), (1_500_000_000, "1.5 GB"), (2 * 10**12, "2.0 TB"),
    (10**15, "1000.0 TB"),
])
def test_bytes_for_people(n, text):
    assert human_bytes(n) == text
