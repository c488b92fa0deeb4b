"""lr_finder.py: a problem whose answer is known, and the script as a user runs it."""
import csv
import re
import shlex
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lr_finder
import train
from exactgpt.config import RunFailed, UserError, parse_config
from exactgpt.dataloader import TokenStream
from exactgpt.metrics import Tracker
from exactgpt.shards import ShardFolder
from lr_finder import FinderConfig, suggest, sweep, train_command
from tests.common import TINY, cpu_runtime, logged_losses, mlflow_runs, signalled_during, torchrun

CURVATURE = 4.0


class NoisyParabola(torch.nn.Module):
    """loss = CURVATURE / 2 * mean (w - z)^2, z noise from the tokens: SGD is stable up to the rate 2 / CURVATURE."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((8,), 10.0))

    def forward(self, x, y):
        z = (x[:, :8].float() - 128) / 1000
        return CURVATURE / 2 * (self.w - z).square().mean(0).sum()


def toy_run(folder, steps):
    """(run, config, runtime) of train_step for the parabola, learned with plain SGD."""
    model = NoisyParabola()
    shards = ShardFolder(folder)
    run = SimpleNamespace(
        raw_model=model, ddp=model, optimizer=torch.optim.SGD([dict(params=model.parameters(), peak_lr=1.0)], lr=1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False), micro_batch_size=4,
        train_stream=TokenStream(shards.train, 16), plan=SimpleNamespace(windows_per_step=8))
    config = FinderConfig(lr_low=1e-3 / CURVATURE, lr_high=100 / CURVATURE, steps=steps, max_lr=1.0, grad_clip=0.0)
    return run, config, cpu_runtime()


@pytest.mark.parametrize("steps", [120, 240])
def test_on_a_parabola_it_finds_the_known_rates(make_shards, tmp_path, steps):
    run, config, runtime = toy_run(make_shards([20000]), steps)
    rows = sweep(run, config, runtime, Tracker(config, tmp_path, "lr_finder"))
    rates, values = (np.array([row[name] for row in rows]) for name in ("lr", "loss"))
    half = max(1, steps // lr_finder.WINDOW)
    found = suggest(rates, lr_finder.smooth(values, half), half)
    # loss ~ exp(-2 c sum of rates), and the sum of a geometric series is about rate / log(ratio): as a function of
    # log(rate) it falls fastest where 2 c rate / log(ratio) = 1.
    steepest = np.log(rates[1] / rates[0]) / (2 * CURVATURE)
    assert found["steepest slope"] == pytest.approx(steepest, rel=0.35)
    assert steepest < 10 * found["one tenth of the minimum"] < 2 / CURVATURE
    assert 2 / CURVATURE < rates[-1] < 6 / CURVATURE and len(rows) < steps       # stopped, soon after the limit


def test_a_loss_that_falls_again_after_it_has_diverged_suggests_nothing():
    rates, steps = np.geomspace(1e-5, 1, 60), np.arange(60)
    losses = 10 - 6 / (1 + np.exp((20 - steps) / 3))      # falls fastest at step 20
    losses[45:] = 40 - 2 * np.arange(15)                  # and faster still where the rate is too high
    found = suggest(rates, losses, half=1)
    assert found["steepest slope"] == pytest.approx(rates[20])
    assert found["one tenth of the minimum"] == pytest.approx(rates[44] / 10)


def test_noise_moves_the_second_suggestion_less_than_the_first():
    """The reason that it gives for choosing the second."""
    rates, rng = np.geomspace(1e-5, 1, 200), np.random.default_rng(0)
    x = np.log10(rates)
    losses = 10 - 6 / (1 + np.exp(-(x + 3) / 0.35)) + np.exp(5 * (x + 1.6))      # falls, then diverges
    half = 200 // lr_finder.WINDOW
    found = [list(suggest(rates, lr_finder.smooth(losses + rng.normal(0, 0.1, 200), half), half).values())
             for _ in range(50)]
    steepest, tenth = np.log10(found).std(axis=0)      # in decades
    assert 2 * tenth < steepest and tenth < 0.1


def test_the_rates_grow_from_low_to_high_and_each_group_keeps_its_proportion(make_shards, tmp_path):
    run, config, runtime = toy_run(make_shards([20000]), 20)
    run.optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.zeros(1))], peak_lr=30.0))
    config.lr_low, config.lr_high, config.max_lr = 1e-4, 1e-2, 0.5
    used = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append([g["lr"] for g in optimizer.param_groups]))
    rows = sweep(run, config, runtime, Tracker(config, tmp_path, "lr_finder"))
    expected = np.geomspace(1e-4, 1e-2, 20)
    np.testing.assert_allclose([row["lr"] for row in rows], expected)
    np.testing.assert_allclose(used, np.outer(expected / 0.5, [1.0, 30.0]))


def test_a_sweep_that_begins_too_high_says_so(make_shards, tmp_path):
    run, config, runtime = toy_run(make_shards([20000]), 120)
    config.lr_low, config.lr_high = 100.0, 1000.0
    with pytest.raises(RunFailed, match="try a lower one"):
        sweep(run, config, runtime, Tracker(config, tmp_path, "lr_finder"))


def finder(*flags):
    lr_finder.main([str(f) for f in flags])


@pytest.mark.slow
@pytest.mark.parametrize("mlflow", [False, True])
def test_it_writes_picture_and_table_and_the_run_after_it_is_as_if_it_had_not_been(make_shards, tmp_path, capsys,
                                                                                    monkeypatch, mlflow):
    if mlflow:
        pytest.importorskip("mlflow")
    data, log_dir = make_shards([4000], tokens=np.arange(4064) % 7), tmp_path / "run"
    flags = (*TINY, "--data_dir", data, "--total_batch_size", 128, "--max_steps", 3, "--optimizer", "muon")
    with monkeypatch.context() as patched:      # it writes no checkpoint: the disk may be too small for one
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
        finder(*flags, "--log_dir", log_dir, "--steps", 40, "--lr_low", 1e-4, "--lr_high", 10, *["--mlflow"] * mlflow)
    out = capsys.readouterr().out
    assert "checkpoints" not in out
    with open(log_dir / "lr_finder.csv") as f:
        rows = list(csv.DictReader(f))
    rates = [float(row["lr"]) for row in rows]
    assert 10 <= len(rows) <= 40 and rates[0] == 1e-4 and np.allclose(np.diff(np.log(rates)), np.log(1e5) / 39)
    assert (log_dir / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    for words in ("steepest slope: ", "one tenth of the minimum: ", "suggested: the second",
                  "step  1/40 | lr 1.00e-04 | loss "):
        assert words in out
    command = shlex.split(out[out.index("next: ") + 6:])
    assert command[:2] == ["python", "train.py"] and "--muon_lr" in command
    train.main(command[2:])
    other = ["elsewhere" if word == str(log_dir) else word for word in command[2:]]
    other[other.index("elsewhere")] = str(tmp_path / "other")
    train.main(other)
    assert logged_losses(log_dir) == logged_losses(tmp_path / "other") and len(logged_losses(log_dir)) == 3
    with pytest.raises(UserError, match="already contains a run"):
        finder(*flags, "--log_dir", log_dir)
    if mlflow:
        [sweep_run], [train_run] = mlflow_runs(log_dir, "lr_finder"), mlflow_runs(log_dir, "train")
        assert sweep_run.history["loss"] == [(int(r["step"]), float(r["loss"])) for r in rows]
        assert set(sweep_run.artifacts) == {"lr_finder.csv", "lr_finder.png"} and sweep_run.params["steps"] == "40"
        assert len(train_run.history["loss"]) == 3


@pytest.mark.slow
def test_two_processes_with_other_micro_batches_see_the_same_losses(make_shards, run, tmp_path):
    data = make_shards([4000])
    flags = (*TINY, "--data_dir", data, "--total_batch_size", 128, "--steps", 12, "--lr_high", 1e-2)
    finder(*flags, "--log_dir", tmp_path / "one")
    rc, out, err = torchrun(run, 2, *flags, "--log_dir", tmp_path / "two", "--micro_batch_size", 2,
                            script="lr_finder.py")
    assert rc == 0, err
    assert "next: torchrun --nproc_per_node=2 train.py" in out and out.count("steepest slope") == 1
    one, two = (np.genfromtxt(tmp_path / name / "lr_finder.csv", delimiter=",", names=True)["loss"]
                for name in ("one", "two"))
    assert len(one) == 12 and np.allclose(one, two, rtol=1e-4)


def test_a_sweep_that_is_stopped_says_so_by_its_status_too(make_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lr_finder, "train_step", signalled_during(lr_finder.train_step))
    with pytest.raises(SystemExit) as ended:
        lr_finder.main(list(map(str, (*TINY, "--data_dir", make_shards([3000]), "--total_batch_size", 64, "--log_dir",
                                      tmp_path / "logs"))))
    assert ended.value.code == 130 and "stopped; nothing was written" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [".lock"]


LAUNCHED = dict(WORLD_SIZE="8", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")


def test_the_command_repeats_the_flags_that_were_typed(monkeypatch):
    for name, value in dict(LAUNCHED, LOCAL_WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    typed = ["--data_dir", "my data", "--beta2", "0.99995", "--max_lr", "1e-3", "--min_lr", "0", "--deterministic"]
    config = parse_config(FinderConfig, [*typed, "--steps", "50"])
    words = shlex.split(train_command(config, 0.00234567))
    assert words[:3] == ["torchrun", "--nproc_per_node=8", "train.py"]
    again = parse_config(train.TrainConfig, words[3:])
    assert again == parse_config(train.TrainConfig, [*typed[:4], "--max_lr", "2.3e-3", "--min_lr", "0", typed[-1]])


def test_on_several_nodes_the_command_leaves_the_launcher_open(monkeypatch):
    for name, value in dict(LAUNCHED, LOCAL_WORLD_SIZE="4").items():
        monkeypatch.setenv(name, value)
    assert train_command(FinderConfig(max_lr=1e-3), 1e-3).startswith("torchrun ... train.py")


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "lr_finder.csv").mkdir()
    rows = [dict(step=k, lr=1e-3 * 2**k, loss=2.0, grad_norm=1.0) for k in range(10)]
    with pytest.raises(UserError, match=r"cannot write .*lr_finder\.csv"):
        lr_finder.report(rows, FinderConfig(max_lr=1e-3, log_dir=str(tmp_path)), tracker=None)


def test_help_lists_what_the_sweep_uses_and_the_rest_is_passed_on(capsys):
    with pytest.raises(SystemExit):
        lr_finder.main(["--help"])
    out = capsys.readouterr().out
    assert "The other flags of train.py are taken too" in out
    listed = set(re.findall(r"^  --(\w+)", out, re.M))
    assert {f.name for f in fields(FinderConfig)} - listed == set(FinderConfig.UNLISTED) and "max_lr" in listed
    config = parse_config(FinderConfig, ["--max_steps", "7", "--eval_every", "3"])
    assert train_command(config, 1e-3).endswith("--max_steps 7 --max_lr 0.001 --min_lr 0.0001 --eval_every 3")


def test_mistakes_are_one_line():
    for flags, message in ((["--lr_low", "1", "--lr_high", "0.1"], "--lr_low 1 is not below --lr_high 0.1"),
                           (["--steps", "5"], "--steps must be >= 10"), (["--resume", "x.pt"], "leave --resume"),
                           (["--dry_run"], "leave --resume and --dry_run out"),
                           (["--lr_low", "0"], "--lr_low must be > 0")):
        with pytest.raises(UserError) as caught:
            lr_finder.main(flags)
        assert message in str(caught.value)
