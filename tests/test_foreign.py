"""Nothing that is not ours is deleted, overwritten or followed through a link; what is ours is known by its mark."""
import os
import secrets
from pathlib import Path

import pytest
import torch

import train
from exactgpt.checkpoint import (
    checkpoint_path,
    claim_folder,
    delete_old_checkpoints,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from exactgpt.config import RunFailed, UserError
from exactgpt.distributed import temporary_folder
from exactgpt.files import FolderLock, atomic_write, check_new, new_folder
from exactgpt.metrics import AppendFile
from exactgpt.open_model import newest_model
from prepare_fineweb import delete_downloads
from tests.common import TINY, cpu_runtime, read_metrics

MARK = "0123456789abcdef"


def contents(folder):
    """Return {path: bytes of a file, target of a link, None for a folder} of all that is in a folder but the lock."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*")) if p.name != ".lock"}


# ---- temporary names ---------------------------------------------------------

def test_a_link_or_a_folder_with_the_temporary_name_is_neither_followed_nor_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda n: MARK)      # as if somebody had guessed the name
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f"file.{MARK}.tmp").symlink_to("theirs")
    (tmp_path / f"new.{MARK}.tmp").mkdir()
    (tmp_path / f"new.{MARK}.tmp" / "notes").touch()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*file: File exists"), atomic_write(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"cannot write .*new: File exists"), new_folder(tmp_path / "new"):
        pass
    assert contents(tmp_path) == before


def test_temporary_names_cannot_be_known_before(tmp_path):
    with atomic_write(tmp_path / "file") as one, atomic_write(tmp_path / "file") as two:
        assert one.name != two.name and {Path(f.name).parent for f in (one, two)} == {tmp_path}


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "file").symlink_to("theirs")
    with atomic_write(tmp_path / "file", "w") as f:
        f.write("ours")
    assert contents(tmp_path) == {"file": b"ours", "theirs": b"theirs"}


def test_a_link_that_leads_nowhere_counts_as_there(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").symlink_to("empty")
    for name in ("out", "folder"):
        with pytest.raises(UserError, match="already exists"):
            check_new(tmp_path / name, folder=True)


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "log.txt").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"cannot write .*log\.txt"):
        AppendFile(tmp_path / "log.txt", 0)
    (tmp_path / "elsewhere").write_text("0 train 1.0\n5 train 1.0\nnotes\n")
    log = AppendFile(tmp_path / "log.txt", 3)       # a resumed run's log: what it links to is read, and stays
    log.write("3 train 2.0\n")
    log.file.close()
    assert (tmp_path / "elsewhere").read_text() == "0 train 1.0\n5 train 1.0\nnotes\n"
    assert (tmp_path / "log.txt").read_text() == "0 train 1.0\n3 train 2.0\n"


# ---- the lock and its mark ---------------------------------------------------

@pytest.mark.parametrize("make", [lambda lock: lock.symlink_to("theirs"), os.mkdir, os.mkfifo],
                         ids=["a link", "a folder", "a pipe"])
def test_a_lock_that_is_no_plain_file_is_refused(make, tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is a link or no file at all; delete it"):
        FolderLock(tmp_path, wait_s=0)
    assert (tmp_path / "theirs").read_text() == "theirs" and os.path.lexists(tmp_path / ".lock")


def test_the_mark_stays_and_another_programs_lock_file_is_not_changed(tmp_path):
    marks = []
    for _ in range(2):
        with FolderLock(tmp_path / "ours", wait_s=0) as lock:
            lock.claim()
            marks.append(lock.mark)
    assert marks[0] == marks[1] and (tmp_path / "ours" / ".lock").read_text() == f"exactgpt {marks[0]}\n"
    (tmp_path / "ours" / "log.txt").touch()      # of a run that was killed before its first checkpoint
    with FolderLock(tmp_path / "ours", wait_s=0) as lock:
        lock.claim(["log.txt"])
    (tmp_path / ".lock").write_text("theirs")
    with FolderLock(tmp_path, wait_s=0) as lock:
        lock.claim()
    assert (tmp_path / ".lock").read_text() == "theirs"


def test_a_new_run_refuses_the_logs_of_another_program_again_and_again(train_steps, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "log.txt").write_text("0 val 10.9\n0 train 11.0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"contains log\.txt, which no run of exactgpt has written there"):
            train_steps()
    assert contents(logs) == {"log.txt": b"0 val 10.9\n0 train 11.0\n"}
    (logs / "log.txt").unlink()
    train_steps(1)
    assert [line["step"] for line in read_metrics(logs) if "loss" in line] == [0]


# ---- checkpoints -------------------------------------------------------------

@pytest.fixture
def train_steps(make_shards, tmp_path, monkeypatch):
    """Return train_steps(n=None, *flags): resume the run in tmp_path/logs, and stop after n of its 4 steps.

    It writes a checkpoint after every step, and keeps one.
    """
    data = make_shards([400], val_sizes=[100], tokens=[7] * 500)      # the loss falls
    step = train.train_step

    def start(n=None, *flags):
        done = []

        def train_step(run, config, runtime, *more):
            done.append(runtime)
            runtime.stop_signal = "SIGTERM" if len(done) == n else None
            return step(run, config, runtime, *more)
        monkeypatch.setattr(train, "train_step", train_step)
        train.main(list(map(str, [*TINY, "--data_dir", data, "--log_dir", tmp_path / "logs", "--checkpoint_every", 1,
                                  "--keep_checkpoints", 1, "--max_steps", 4, "--total_batch_size", 64, "--eval_every",
                                  1, *flags])))
    return start


def test_a_run_deletes_and_replaces_only_its_own_checkpoints(train_steps, tmp_path):
    logs, other = tmp_path / "logs", tmp_path / "other"
    train_steps(2, "--log_dir", other)
    train_steps(2)
    ours = ["model_00002.pt", "model_best.pt"]
    assert sorted(p.name for p in logs.glob("*.pt")) == ours
    theirs = {"model_00001.pt": (other / "model_00002.pt").read_bytes(), "model_backup.pt.tmp": b"half",
              "model_00004.pt": (other / "model_00002.pt").read_bytes()[:-100], "model_00099.pt": None,
              "model_000002.pt": "../other/copy.pt"}
    (other / "copy.pt").write_bytes((logs / "model_00002.pt").read_bytes())
    for name, value in theirs.items():
        if value is None:
            (logs / name).mkdir()
        elif isinstance(value, str):
            (logs / name).symlink_to(value)
        else:
            (logs / name).write_bytes(value)
    save_checkpoint(logs / "model_00000.pt", {"model": {}})      # an export
    theirs["model_00000.pt"] = (logs / "model_00000.pt").read_bytes()
    (logs / "model_000001.pt").write_bytes((logs / "model_00002.pt").read_bytes()[:-999])      # damaged, but ours
    with pytest.raises(RunFailed, match=r"model_00004\.pt exists, and another run or tool has written it; move it aw"):
        train_steps()
    after = contents(logs)
    assert {name: after[name] for name in theirs} == theirs
    (logs / "model_00004.pt").unlink()
    del theirs["model_00004.pt"]
    train_steps()
    after = contents(logs)
    assert {name: after.pop(name) for name in theirs} == theirs
    assert sorted(after) == ["log.txt", "metrics.jsonl", "model_00004.pt", "model_best.pt"]


def test_an_old_versions_run_goes_on_and_rotates_its_checkpoints(train_steps, tmp_path):
    logs = tmp_path / "logs"
    train_steps(1)
    for path in logs.glob("*.pt"):      # as earlier versions wrote them
        torch.save({name: value for name, value in read_checkpoint(path).items() if name != "run_id"}, path)
    (logs / ".lock").write_bytes(b"")
    with FolderLock(tmp_path / "other", 0):
        save_checkpoint(tmp_path / "other" / "x.pt", {})
    (tmp_path / "other" / "x.pt").rename(logs / "model_00000.pt")      # of another run, as today's versions write them
    train_steps(1)
    assert sorted(p.name for p in logs.glob("*.pt")) == ["model_00000.pt", "model_00002.pt", "model_best.pt"]
    mark = read_checkpoint(logs / "model_00002.pt")["run_id"]
    assert mark.startswith("old-") and (logs / ".lock").read_text() == f"exactgpt {mark}\n"
    (logs / ".lock").unlink()           # as people do who take it for a leftover: the checkpoint has the mark, too
    train_steps(1)
    assert [step for step, _ in list_checkpoints(logs)] == [3, 0]
    assert read_checkpoint(logs / "model_00003.pt")["run_id"] == mark


def test_only_the_newest_are_kept(tmp_path):
    with FolderLock(tmp_path, wait_s=0) as lock:
        lock.claim()
        for step in (5, 10, 99_999, 100_000):
            save_checkpoint(checkpoint_path(tmp_path, step), {"step": step})
        delete_old_checkpoints(tmp_path, 2, 10**6)
        assert set(contents(tmp_path)) == {"model_99999.pt", "model_100000.pt"}
        delete_old_checkpoints(tmp_path, 5, 10**6)
        assert len(list_checkpoints(tmp_path)) == 2
        save_checkpoint(checkpoint_path(tmp_path, 200), {"step": 200})
        delete_old_checkpoints(tmp_path, 1, 200)      # the later ones are damaged: the run has just saved step 200
        assert [step for step, _ in list_checkpoints(tmp_path)] == [100_000, 99_999, 200]


def test_a_mark_from_a_file_is_no_path(tmp_path):
    with FolderLock(tmp_path / "logs", wait_s=0) as lock:
        for mark in ("../../x", "*", 7, None):
            claim_folder(tmp_path / "logs", {"run_id": mark}, ())
            assert len(lock.mark) == 16 and int(lock.mark, 16) >= 0


# ---- other folders -----------------------------------------------------------

def test_a_dry_run_is_never_the_newest_model_and_is_gone_after_an_error(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 7), dict(step=7))
    runtime = cpu_runtime()
    for name in (".dry_run", ".dry_run_notes", ".dry_run_0123456789abcdef"):      # somebody else's
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
        (tmp_path / name / "notes").touch()
    (tmp_path / ".dry_run_link").symlink_to(tmp_path / ".dry_run")
    theirs = set(tmp_path.rglob("*"))
    left = tmp_path / ".dry_run_00000000000000aa"      # of one that was killed
    with FolderLock(left, 0) as lock:
        lock.claim(mark="00000000000000aa")
        checkpoint_path(left, 1).touch()
        with temporary_folder(runtime, tmp_path):      # it still runs
            assert left.exists()
    with pytest.raises(RunFailed), temporary_folder(runtime, tmp_path) as folder:
        assert [p.name for p in Path(folder).iterdir()] == [".lock"] and not left.exists()
        save_checkpoint(checkpoint_path(folder, 2), dict(step=2))
        assert newest_model(tmp_path) == checkpoint_path(tmp_path, 7)
        raise RunFailed("an accident")
    assert set(tmp_path.rglob("*")) == theirs
    with pytest.raises(UserError, match="Not a directory"), temporary_folder(runtime, newest_model(tmp_path)):
        pass


def test_only_an_older_adapter_is_replaced(tmp_path):
    def write():
        with new_folder(tmp_path / "adapter", replaces=("a", "b")) as temporary:
            (temporary / "a").write_text("new")
    write()
    write()
    assert contents(tmp_path) == {"adapter": None, "adapter/a": b"new"}
    (tmp_path / "adapter" / "notes").write_text("theirs")
    with pytest.raises(UserError, match="adapter will not be replaced, because it also contains notes; move that away"):
        write()
    assert contents(tmp_path) == {"adapter": None, "adapter/a": b"new", "adapter/notes": b"theirs"}


def test_downloads_go_but_what_others_put_there_stays(tmp_path):
    for name in ("data/1.parquet", "data/mine.txt", ".cache/huggingface/download/x.metadata", "empty/2.parquet"):
        (tmp_path / "downloads" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloads" / name).write_text("x")
    (tmp_path / "theirs").write_text("x")
    (tmp_path / "downloads/data/link").symlink_to(tmp_path)
    names = ("data/1.parquet", "empty/2.parquet", "3", "../theirs", str(tmp_path / "theirs"), "data/link/theirs")
    delete_downloads(tmp_path / "downloads", [{"path": name} for name in names])
    assert contents(tmp_path) == {"downloads": None, "downloads/data": None, "downloads/data/mine.txt": b"x",
                                  "downloads/data/link": str(tmp_path), "theirs": b"x"}
    for name in ("downloads/data/mine.txt", "downloads/data/link", "theirs"):
        (tmp_path / name).unlink()
    delete_downloads(tmp_path / "downloads", [])
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("flag", ["--log_dir", "--data_dir"])
def test_a_folder_without_a_name_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} must not be empty"):
        train.main([flag, ""])
