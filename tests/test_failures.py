"""What the world does to a run: full and read-only disks, shards that vanish, a second run (docs/failures.md)."""
import fcntl
import os
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

import train
from exactgpt import distributed
from exactgpt.checkpoint import write_checkpoint
from exactgpt.config import RunFailed, UserError
from exactgpt.dataloader import TokenStream
from exactgpt.files import FolderLock, FolderLost, atomic_write, new_folder, write_json
from exactgpt.metrics import AppendFile, Tracker
from exactgpt.shards import ShardFolder
from tests.common import TINY, cpu_runtime, read_metrics
from tests.killed_runs import SCRIPT

FLAGS = (*TINY, "--total_batch_size", 64, "--checkpoint_every", 4)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes) -> a folder on a tmpfs of that size; skipped without the right to mount one."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if not shutil.which("mount"):
            pytest.skip("no mount command here")
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder],
                                capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no right to mount a tmpfs: {result.stderr.strip()}")
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disturbed(run):
    """disturbed(step, command, *flags) -> (status, output) of train.py, before whose `step` a shell command runs."""
    def call(step, command, *flags):
        rc, out, err = run(SCRIPT, *flags, env=dict(ACCIDENT=f"run:step:{step}", ACCIDENT_COMMAND=command))
        return rc, out + err
    return call


def steps_logged(log_dir):
    return [row["step"] for row in read_metrics(log_dir) if "loss" in row]


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing_that_was_written(run, disturbed, make_shards, small_disk):
    """Warnings, the older checkpoint intact; with room again the same command goes on and makes up what is missing."""
    disk = small_disk(2000)
    flags = (*FLAGS, "--data_dir", make_shards([3000]), "--log_dir", disk / "logs", "--max_steps", 30,
             "--keep_checkpoints", 2)
    rc, out = disturbed(5, f"head -c 4000000 /dev/zero > {disk}/filler; true", *flags)
    assert rc == 1 and "checkpoint not written (older ones are intact)" in out
    assert "the last checkpoint could not be written: " in out and "B left; free some space. The same command" in out
    assert "Traceback" not in out, out
    assert [p.name for p in disk.glob("logs/*.pt")] == ["model_00004.pt"]
    (disk / "filler").unlink()
    rc, out, err = run("train.py", *flags)
    assert rc == 0 and "resuming from step 4" in out, err
    assert steps_logged(disk / "logs") == list(range(30))
    assert [p.name for p in sorted(disk.glob("logs/*.pt"))] == ["model_00028.pt", "model_00030.pt"]


@pytest.mark.slow
def test_a_disk_too_small_for_the_run_is_refused_at_the_start(run, make_shards, small_disk):
    disk = small_disk(200)
    rc, _, err = run("train.py", *FLAGS, "--data_dir", make_shards([3000]), "--log_dir", disk / "logs",
                     "--max_steps", 30)
    assert rc == 2 and "free some space, use another --log_dir, or a smaller --keep_checkpoints" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logs", "new"])
def test_a_read_only_log_dir_is_one_line(run, make_shards, small_disk, name):
    disk = small_disk(2000)
    (disk / "logs").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    rc, _, err = run("train.py", *FLAGS, "--data_dir", make_shards([3000]), "--log_dir", disk / name, "--max_steps", 2)
    assert (rc, err) == (2, f"train.py: error: cannot write in {disk / name}: Read-only file system\n")


@pytest.mark.slow
def test_a_log_dir_that_becomes_read_only_is_warned_of(disturbed, make_shards, small_disk):
    """As the kernel does with a disk that has an error."""
    logs = small_disk(2000) / "logs"
    rc, out = disturbed(5, f"mount --bind {logs} {logs} && mount -o remount,bind,ro {logs}", *FLAGS, "--data_dir",
                        make_shards([3000]), "--log_dir", logs, "--max_steps", 12)
    subprocess.run(["umount", "-l", logs], check=True)
    assert rc == 1 and "Read-only file system" in out and "Traceback" not in out, out
    assert [p.name for p in logs.glob("*.pt")] == ["model_00004.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("command, status, says", [
    ("truncate -s 200 {}", 2, "shard {} became shorter while it was read; recreate it"), ("rm {}", 0, "finished"),
], ids=["truncated", "deleted"])
def test_a_shard_that_changes_under_the_run(run, disturbed, make_shards, tmp_path, command, status, says):
    """Truncated: one line, and with the shard back the same command goes on. Deleted: an open file lives on."""
    folder, log_dir = make_shards([3000]), tmp_path / "logs"
    shard = folder / "test_train_000001.npy"
    whole = shard.read_bytes()
    flags = (*FLAGS, "--data_dir", folder, "--log_dir", log_dir, "--max_steps", 20)
    rc, out = disturbed(6, command.format(shard), *flags)
    assert rc == status and says.format(shard) in out and "Traceback" not in out, out
    shard.write_bytes(whole)
    rc, _, err = run("train.py", *flags)
    assert rc == 0 and steps_logged(log_dir) == list(range(20)), err


@pytest.mark.slow
def test_a_shard_truncated_under_two_processes_ends_both(run_ranks, make_shards, tmp_path):
    folder = make_shards([3000])
    shard = folder / "test_train_000001.npy"
    accident = dict(ACCIDENT="run:step:6:0", ACCIDENT_COMMAND=f"truncate -s 200 {shard}")
    codes, out = run_ranks(2, SCRIPT, *FLAGS, "--data_dir", folder, "--log_dir", tmp_path / "logs",
                           "--max_steps", 20, env=accident)
    assert all(codes) and f"shard {shard} became shorter" in out and "Traceback" not in out, out


def test_a_shard_that_is_gone_before_it_was_opened_is_named(make_shards):
    folder = ShardFolder(make_shards([300, 300]))
    stream = TokenStream(folder.train, 16)
    folder.train[1].path.unlink()
    stream.read([0])
    with pytest.raises(UserError, match=r"cannot read shard .*test_train_000002\.npy: No such file"):
        stream.read([stream.n_windows - 1])
    stream.close()


def test_a_second_run_in_a_log_dir_waits_and_is_refused(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "FolderLock", lambda folder, wait_s: FolderLock(folder, wait_s=0.3))
    flags = [*FLAGS, "--data_dir", make_shards([3000]), "--log_dir", tmp_path / "logs", "--max_steps", 1]
    with FolderLock(tmp_path / "logs", wait_s=0), pytest.raises(UserError, match=r"another run is using .*logs"):
        train.main(list(map(str, flags)))
    train.main(list(map(str, flags)))


@pytest.mark.parametrize("command, still_ours", [
    ("rm -r logs", False), ("mv logs elsewhere", False), ("rm -r logs; mkdir logs", False),
    ("rm -r logs; touch logs", False), ("rm -r logs; ln -s elsewhere logs", False),
    ("rm logs/.lock; touch logs/.lock", False), ("rm logs/.lock", True),
    ("touch logs/notes", True), ("chmod 500 logs", True),
])
def test_a_process_owns_the_folder_that_it_locked_and_no_other_of_that_name(tmp_path, command, still_ours):
    logs = tmp_path / "logs"
    (tmp_path / "elsewhere").mkdir()
    with FolderLock(logs, wait_s=0):
        (logs / "deep").mkdir()
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        before = sorted(tmp_path.rglob("*"))
        if still_ours:
            write_json(logs / "deep" / "a.json", 1)
            assert (logs / "deep" / "a.json").exists()
            return
        for write in (write_json, lambda path, _: new_folder(path).__enter__()):
            with pytest.raises(FolderLost, match=r"logs was deleted, moved, or taken over by another run"):
                write(logs / "deep" / "a.json", 1)
        assert sorted(tmp_path.rglob("*")) == before
    write_json(logs.with_name("other") / "a.json", 1)      # other folders, and later ones, are nobody's


def test_a_relative_folder_is_lost_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    os.chdir("work")
    with FolderLock("logs", wait_s=0):
        write_json("logs/a.json", 1)
        shutil.rmtree(tmp_path / "work")
        with pytest.raises(FolderLost):
            write_json("logs/b.json", 1)
    os.chdir(tmp_path)


def test_a_folder_lost_during_a_write_keeps_what_its_new_owner_is_writing(tmp_path):
    logs = tmp_path / "logs"
    with FolderLock(logs, wait_s=0) as lock, pytest.raises(FolderLost), atomic_write(logs / "model_00010.pt"):
        shutil.rmtree(logs)
        logs.mkdir()
        theirs = logs / f"model_00010.pt.{lock.mark}.tmp"      # in a copy of the folder, which has its mark
        theirs.write_bytes(b"half of the other's")
    assert list(logs.iterdir()) == [theirs]


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_log_that_cannot_be_created_is_one_line(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "absent" / name)
    with pytest.raises(UserError, match=rf"cannot write .*{name}: it is a link"):
        AppendFile(tmp_path / name, 0)


def test_the_tracker_writes_nothing_in_a_lost_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "_send", lambda self: None)
    logs, done = tmp_path / "logs", []
    with FolderLock(logs, wait_s=0):
        tracker = Tracker(SimpleNamespace(mlflow=True), logs, "train")
        shutil.rmtree(logs)
        tracker._actions.append(lambda: done.append("an artifact"))
        tracker.close()
    assert done == [] and not logs.exists()


def test_the_loss_of_the_folder_on_rank_0_is_raised_on_all_ranks(tmp_path):
    rank_1 = cpu_runtime(rank=1, world_size=2)
    rank_1.sum = lambda *values: [value + 1 for value in values]      # rank 0 could not write, and the run ends
    with pytest.raises(RunFailed):
        write_checkpoint(rank_1, tmp_path / "model_00001.pt", {})
    rank_1.sum = lambda failed, ends: [failed + 1, ends]
    assert write_checkpoint(rank_1, tmp_path / "model_00001.pt", {})


def test_who_waits_for_a_folder_that_is_deleted_meanwhile_gets_the_new_one(tmp_path):
    logs, locks = tmp_path / "logs", []
    with FolderLock(logs, wait_s=0):
        waiting = threading.Thread(target=lambda: locks.append(FolderLock(logs, wait_s=20)))
        waiting.start()
        time.sleep(0.3)
        shutil.rmtree(logs)
    waiting.join()
    with locks[0], pytest.raises(UserError, match="another run is using"):
        write_json(logs / "a.json", 1)
        FolderLock(logs, wait_s=0)


def test_a_run_whose_folder_was_made_anew_ends_and_leaves_it_alone(disturbed, make_shards, tmp_path):
    logs = tmp_path / "logs"
    rc, out = disturbed(6, f"rm -r {logs}; mkdir {logs}; echo x > {logs}/metrics.jsonl", *FLAGS, "--data_dir",
                        make_shards([3000]), "--log_dir", logs, "--max_steps", 2000, "--checkpoint_every", 0)
    assert rc == 1 and out.count("was deleted, moved, or taken over by another run, so this run ends") == 1, out
    assert "Traceback" not in out and "step    8/2000" not in out
    assert [path.name for path in logs.iterdir()] == ["metrics.jsonl"] and (logs / "metrics.jsonl").read_text() == "x\n"


def test_a_file_system_without_locks_is_a_notice(tmp_path, monkeypatch, capsys):
    """Lustre mounted without -o flock, some FUSE file systems."""
    def refuse(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock(tmp_path, wait_s=0):
        pass
    assert "cannot lock" in capsys.readouterr().out
