"""A run that is killed, stopped or starved goes on as if nothing had happened: bitwise, with real processes."""
import os
import random
import re
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

import train
from exactgpt.checkpoint import (
    AlreadyFinished,
    checkpoint_path,
    delete_old_checkpoints,
    final_step,
    find_checkpoint,
    save_checkpoint,
)
from exactgpt.config import UserError
from exactgpt.files import FolderLock
from exactgpt.metrics import AppendFile
from tests.common import ROOT, start_process, torchrun_arguments
from tests.killed_runs import FLAGS, SCRIPT, SIZES, STEPS, assert_same_run, checkpoint_state


def launcher_words(*flags, launcher=()):
    """The command line of such a run in two processes under torchrun."""
    return [*torchrun_arguments(2, *launcher), str(ROOT / SCRIPT), *FLAGS, *flags]


KILLED = [  # processes, flags, accident: pairwise over processes, dtype, dropout, optimizer, place and kind of cut
    (1, ("--dtype", "fp32"), "kill:step:7"),
    (1, ("--dtype", "bf16", "--dropout", 0.2), "kill:save:8"),
    (1, ("--dtype", "fp16", "--dropout", 0.2), "kill:validate:10"),
    (1, ("--dtype", "bf16", "--optimizer", "muon"), "kill:step:11"),
    (2, ("--dtype", "fp32", "--dropout", 0.2), "kill:step:6:0"),
    (2, ("--dtype", "bf16"), "kill:step:9:1"),
    (2, ("--dtype", "fp16"), "kill:save:8:0"),
    (2, ("--dtype", "fp32", "--optimizer", "muon"), "kill:validate:5:1"),
    (4, ("--dtype", "fp32"), "kill:save:12:0"),
    (4, ("--dtype", "bf16", "--dropout", 0.2), "kill:step:5:2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("n, flags, accident", KILLED)
def test_a_killed_run_ends_bitwise_like_an_undisturbed_one(train_ranks, make_shards, tmp_path, undisturbed, n, flags,
                                                           accident):
    folder = make_shards(SIZES, val_sizes=[120])
    reference = undisturbed(folder, n, *flags)
    flags = (*flags, "--data_dir", folder, "--log_dir", tmp_path / "killed")
    codes, _ = train_ranks(n, *flags, ACCIDENT=accident)
    assert -signal.SIGKILL in codes and not (tmp_path / "killed" / "model_00012.pt").exists()
    codes, out = train_ranks(n, *flags)
    assert codes == [0] * n, out
    assert_same_run(reference, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.tmp"))


STOPPED = [  # processes, accident, the step whose state is saved (None: nothing was there to save)
    (1, "usr1:validate:5", 5), (1, "int:sample:6", 7), (1, "term:start:0", None), (2, "hup:step:7:1", 8),
    (2, "int:start:0:1", None),
]


@pytest.mark.slow
@pytest.mark.parametrize("n, accident, saved", STOPPED)
def test_a_stopped_run_saves_exits_0_and_goes_on_bitwise(train_ranks, make_shards, tmp_path, undisturbed, n, accident,
                                                         saved):
    folder = make_shards(SIZES, val_sizes=[120])
    reference = undisturbed(folder, n, "--dtype", "fp32")
    flags = ("--dtype", "fp32", "--data_dir", folder, "--log_dir", tmp_path / "stopped")
    codes, out = train_ranks(n, *flags, ACCIDENT=accident)
    assert codes == [0] * n and "stopped before" in out, out
    files = [p.name for p in (tmp_path / "stopped").glob("model_0*.pt")]
    assert max(files, default=None) == (f"model_{saved:05d}.pt" if saved else None)
    assert train_ranks(n, *flags)[0] == [0] * n
    assert_same_run(reference, tmp_path / "stopped")


def test_a_hang_up_that_nohup_ignores_stops_nothing(train_ranks, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir", tmp_path)
    codes, out = train_ranks(1, *flags, ACCIDENT="nohup:step:7")
    assert codes == [0] and "finished" in out and (tmp_path / "model_00012.pt").exists(), out


def wait_for(folder, pattern, seconds=60):
    """Wait until a file matches."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_kill_9_of_it_ends_the_workers(run, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--data_dir", make_shards(SIZES, val_sizes=[120]), "--max_steps", 2000)
    logs = tmp_path / "logs"
    launched = start_process(tmp_path, *launcher_words(*flags, "--log_dir", logs))
    wait_for(logs, "model_00004.pt")
    launched.send_signal(signal.SIGTERM)
    launched.wait(timeout=60)
    launched.log.seek(0)
    saved = re.search(r"stopped before step (\d+), .* the same command continues:\n(.*)\n", launched.log.read())
    assert saved and (logs / f"model_{int(saved[1]):05d}.pt").exists()

    launched = start_process(tmp_path, *shlex.split(saved[2])[1:])
    wait_for(logs, f"model_{(int(saved[1]) // 4 + 3) * 4:05d}.pt")
    workers = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    launched.kill()
    nohup = ("import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
             "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    again = start_process(tmp_path, "-c", nohup, *launcher_words(*flags, "--log_dir", logs))     # waits for the lock
    launched.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "the workers outlived their launcher"
        time.sleep(0.1)
    deadline = time.monotonic() + 90
    while "resuming from step" not in open(again.log.name).read():
        assert time.monotonic() < deadline and again.poll() is None, open(again.log.name).read()
        time.sleep(0.2)
    time.sleep(0.5)
    again.send_signal(signal.SIGHUP)      # which torchrun passes on, under nohup or not
    again.wait(timeout=60)
    saved = re.search(r"stopped before step (\d+), nothing is lost", open(again.log.name).read())
    assert saved and (logs / f"model_{int(saved[1]):05d}.pt").exists()


@pytest.mark.slow
def test_torchrun_restarts_killed_workers_and_the_end_is_the_same(run, train_ranks, make_shards, tmp_path, undisturbed):
    """--max_restarts 3, three times kill -9 of a random worker before a random step."""
    folder, dice = make_shards(SIZES, val_sizes=[120]), random.Random(11)
    kills = [f"kill:step:{step}:{dice.randrange(2)}" for step in sorted(dice.sample(range(1, STEPS), 3))]
    flags, reference = ("--dtype", "fp32", "--data_dir", folder), undisturbed(folder, 2, "--dtype", "fp32")
    restarting = launcher_words(*flags, "--log_dir", tmp_path / "restarted", launcher=["--max_restarts=3"])
    rc, _, err = run(*restarting, env={"ACCIDENT": ",".join(kills), "ACCIDENT_ONCE": str(tmp_path / "happened")})
    assert rc == 0 and (tmp_path / "happened").read_text() == "xxx", (kills, err)
    assert_same_run(reference, tmp_path / "restarted")


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_traceback(run, make_shards, tmp_path):
    begun = time.monotonic()
    words = launcher_words("--data_dir", make_shards(SIZES), "--eval_every", 0, "--log_dir", tmp_path / "logs")
    rc, _, err = run(*words, env={"ACCIDENT": "error:step:3:1"})
    assert rc != 0 and "rank 1" in err and "an accident in the code" in err and "Traceback" in err
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_another_number_of_processes_or_micro_batch_sees_the_same_tokens(run, train_ranks, make_shards, tmp_path,
                                                                         undisturbed):
    folder = make_shards(SIZES, val_sizes=[120])
    reference = undisturbed(folder, 1, "--dtype", "fp32")
    flags = ("--dtype", "fp32", "--data_dir", folder, "--log_dir", tmp_path / "moved")
    assert train_ranks(4, *flags, ACCIDENT="term:step:5")[0] == [0] * 4
    codes, out = train_ranks(2, *flags, ACCIDENT="term:step:8")
    assert codes == [0] * 2 and "world_size 2 instead of 4" in out, out
    rc, out, err = run(SCRIPT, *FLAGS, *flags, "--micro_batch_size", 4, env={"OMP_NUM_THREADS": "2"})
    assert rc == 0 and "not bitwise" in out, err
    assert "micro_batch_size 4 instead of 1" in out and "threads 2 instead of 1" in out
    both = (reference, tmp_path / "moved")
    ends = [torch.load(folder / "model_00012.pt", weights_only=True) for folder in both]
    assert abs(ends[0]["val_loss"] - ends[1]["val_loss"]) < 1e-5
    texts = [[line.split() for line in (folder / "log.txt").read_text().splitlines()] for folder in both]
    assert [t[:2] for t in texts[0]] == [t[:2] for t in texts[1]]
    assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(*texts)) < 1e-4


@pytest.mark.slow
def test_evaluation_does_not_change_training(train_ranks, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--dropout", 0.2, "--data_dir", make_shards(SIZES, val_sizes=[120]))
    assert train_ranks(1, *flags, "--eval_every", 1, "--sample_every", 1, "--log_dir", tmp_path / "often")[0] == [0]
    assert train_ranks(1, *flags, "--eval_every", 50, "--sample_every", 0, "--log_dir", tmp_path / "rarely")[0] == [0]
    ends = [checkpoint_state(tmp_path / name / "model_00012.pt") for name in ("often", "rarely")]
    places = [p for p in ends[0] if p.startswith(("/model", "/optimizer"))]
    assert all(torch.equal(torch.as_tensor(ends[0][p]), torch.as_tensor(ends[1][p])) for p in places if
               not isinstance(ends[0][p], (str, type(None))))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_notice(train_ranks, make_shards, tmp_path, undisturbed):
    folder, logs = make_shards(SIZES, val_sizes=[120]), tmp_path / "torn"
    reference = undisturbed(folder, 1, "--dtype", "fp32")
    flags = ("--dtype", "fp32", "--data_dir", folder, "--log_dir", logs)
    train_ranks(1, *flags, ACCIDENT="kill:step:10")
    newest = logs / "model_00008.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with open(logs / "metrics.jsonl", "a") as f:
        f.write('{"step": 10, "tok')                                   # a line that the kill tore
    codes, out = train_ranks(1, *flags)
    assert codes == [0] and "skipping" in out and "resuming from step 4" in out, out
    assert_same_run(reference, logs)


@pytest.mark.slow
def test_a_full_disk_neither_ends_the_run_nor_costs_the_older_checkpoints(train_ranks, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir", tmp_path / "logs",
             "--eval_every", 0)
    codes, out = train_ranks(1, *flags, ACCIDENT="full:save:9")
    assert codes == [0] and out.count("warning: checkpoint not written") == 2, out   # at 4 and 8; tried again at 10
    assert [p.name for p in sorted((tmp_path / "logs").glob("*.pt"))] == ["model_00010.pt", "model_00012.pt"]


def test_a_run_stopped_and_resumed_in_one_process_is_bitwise_the_same(make_shards, tmp_path, monkeypatch):
    """In fp16, whose loss scale is part of the state."""
    folder, real = make_shards(SIZES, val_sizes=[120]), train.train_step

    def step_that_is_asked_to_stop(run, config, runtime, tokens, step):
        runtime.stop_signal = "SIGTERM" * (step == 6)
        return real(run, config, runtime, tokens, step)
    for name, step in (("straight", real), ("stopped", step_that_is_asked_to_stop), ("stopped", real)):
        monkeypatch.setattr(train, "train_step", step)
        flags = (*FLAGS, "--dtype", "fp16", "--dropout", 0.2, "--micro_batch_size", 4, "--sample_every", 0)
        train.main(list(map(str, (*flags, "--data_dir", folder, "--log_dir", tmp_path / name))))
    assert (tmp_path / "stopped" / "model_00007.pt").exists()
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("line", ['{{"step": {}, "tokens": 8}}', "{} train 3.950000"], ids=["metrics.jsonl", "log.txt"])
def test_a_log_goes_on_with_the_step_that_the_run_goes_on_with(tmp_path, line):
    """The checkpoint of step 9 holds the weights before that step: what was logged of it comes again."""
    lines = [line.format(step) for step in (0, 8, 8, 9, 9, 10, 100)]       # steps, and evaluations before them
    (tmp_path / "log").write_text("\n".join([*lines, line.format(8)[:-2]]))       # the kill tore the last one
    log = AppendFile(tmp_path / "log", 9)
    log.write(line.format(9) + "\n")
    log.file.close()
    assert (tmp_path / "log").read_text().splitlines() == [*lines[:3], line.format(9)]


def stored(step, **more):
    """The entries that training needs, of a run that was to be 100 steps long."""
    return dict(dict(model={}, config={}, step=step, optimizer={}, scaler={}, train_config={"resume": "auto"},
                     resolved={"max_steps": 100}, data="", best_val_loss=1.0, finished=False), **more)


def test_going_back_to_an_older_checkpoint_goes_on_from_there_when_killed(tmp_path):
    """--resume FILE: later checkpoints of another start stand in the way, those of the same start are gone on from."""
    older, later = checkpoint_path(tmp_path, 4), checkpoint_path(tmp_path, 8)
    save_checkpoint(older, stored(4))
    config = SimpleNamespace(resume=str(older), log_dir=str(tmp_path))
    assert find_checkpoint(config, print)["step"] == 4
    save_checkpoint(later, stored(8))
    with pytest.raises(UserError, match=r"contains a later checkpoint, of step 8: leave out --resume"):
        find_checkpoint(config, print)
    save_checkpoint(later, stored(8, train_config={"resume": str(older)}))
    assert find_checkpoint(config, print)["step"] == 8
    later.write_bytes(b"damaged")
    assert find_checkpoint(config, lambda _: None)["step"] == 4


def test_the_same_resume_file_goes_on_when_rotation_has_deleted_it(tmp_path):
    file = checkpoint_path(tmp_path, 4)
    with FolderLock(tmp_path, 0):
        for step in (4, 8, 12, 16):
            save_checkpoint(checkpoint_path(tmp_path, step), stored(step, train_config={"resume": str(file)}))
            delete_old_checkpoints(tmp_path, 3, step)
        assert not file.exists()
        assert find_checkpoint(SimpleNamespace(resume=str(file), log_dir=str(tmp_path)), print)["step"] == 16


def test_a_file_from_elsewhere_is_gone_on_from_where_log_dir_is_damaged(tmp_path):
    (tmp_path / "logs").mkdir()
    checkpoint_path(tmp_path / "logs", 8).write_bytes(b"damaged")
    save_checkpoint(tmp_path / "backup.pt", stored(4))
    config = SimpleNamespace(resume=str(tmp_path / "backup.pt"), log_dir=str(tmp_path / "logs"))
    assert find_checkpoint(config, lambda _: None)["step"] == 4


@pytest.mark.parametrize("entries, stop_loss, expected", [
    (stored(7), 0.1, 100),
    (stored(7, train_config={"stop_loss": 0.1}, last_step=7), 0.1, 7),       # stopped in its last evaluation
    (stored(7, train_config={"stop_loss": 0.1}, last_step=7), 0.05, 100),    # now asked for less
    (stored(7, train_config={"stop_loss": 0.1}, last_step=100), 0.1, 100),   # not reached yet
    (stored(100, train_config={"stop_loss": 0.1}, finished=True), 0.1, 120),  # a wsd run that may grow
])
def test_a_run_ends_where_its_stop_loss_was_reached(entries, stop_loss, expected):
    plan = SimpleNamespace(max_steps=120 if entries["step"] == 100 else 100)
    assert final_step(SimpleNamespace(stop_loss=stop_loss), entries, plan) == expected


@pytest.mark.parametrize("entries", [stored(7, train_config={"stop_loss": 0.1}, finished=True),
                                     stored(100, finished=True)])
def test_a_finished_run_says_how_to_train_its_model_further(entries):
    config = SimpleNamespace(stop_loss=0.1, resume="auto", log_dir="logs/mine")
    with pytest.raises(AlreadyFinished, match=f"the run in logs/mine is finished, at step {entries['step']}; .*"
                                              "--init_from logs/mine --log_dir NEW"):
        final_step(config, entries, SimpleNamespace(max_steps=100))
