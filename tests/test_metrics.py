"""metrics.py: the figures of a log, from steps and evaluations of known length; logs that are damaged."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

from exactgpt import metrics
from exactgpt.config import UserError
from exactgpt.device import Hardware
from exactgpt.figures import read_run
from exactgpt.metrics import RunLog
from exactgpt.optimizer import StepResult

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture
def make_log(tmp_path, monkeypatch):
    """make_log(flops_per_token=None, **fields of the Runtime) -> (RunLog of 100 steps, a list that holds the time)."""
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))

    def make(flops_per_token=None, **more):
        runtime = SimpleNamespace(**{**dict(is_main=True, world_size=1, hardware=Hardware("cpu"),
                                            device=torch.device("cpu")), **more})
        progress = SimpleNamespace(step=0, last_step=100)
        return RunLog(progress, SimpleNamespace(mlflow=False), runtime, tmp_path, "train", 0, flops_per_token), now
    return make


def train(log, now, seconds, tokens):
    log.start_clock()
    now[0] += seconds
    log.train(0, StepResult(3.0, 1.0, True), 1e-3, tokens)


def test_mfu_is_the_share_of_all_cards_peak(make_log, tmp_path, capsys):
    log, now = make_log(flops_per_token=1e9, world_size=8, hardware=H100)
    train(log, now, 0.5, 2_000_000)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["mfu"] == pytest.approx(4e6 * 1e9 / (8 * 989e12)) and line["ms"] == 500 and line["tok_per_sec"] == 4e6
    assert "| 500 ms | 4,000,000 tok/s | mfu 50.6% | eta 0m50s" in capsys.readouterr().out      # 99 steps of 0.5 s


def test_bits_per_byte_stand_beside_a_validation_loss_unless_no_target_has_bytes(make_log, tmp_path, capsys):
    log, _ = make_log(flops_per_token=1)      # a pretraining run: it has log.txt
    log.validation(3, math.log(2), 5000, 8000)      # 5,000 bits
    log.validation(4, 1.5, 1, 0)
    assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == [
        dict(step=3, tokens=0, val_loss=math.log(2), val_bpb=pytest.approx(0.625)),
        dict(step=4, tokens=0, val_loss=1.5)]
    assert (tmp_path / "log.txt").read_text() == "3 val 0.6931\n4 val 1.5000\n"
    assert capsys.readouterr().out == ("step 3: validation loss 0.6931, 0.6250 bits per byte, over 5,000 tokens\n"
                                       "step 4: validation loss 1.5000 over 1 token\n")


def test_the_forecast_of_a_dry_run_counts_whole_evaluations_also_before_the_first_step(make_log):
    log, now = make_log(is_main=False)
    train(log, now, 7.0, 10)         # the first step is slow
    train(log, now, 2.0, 10)
    for kind, every, seconds in (("validation", 10, 30), ("checkpoint", 0, 10)):
        with log.timed(kind, every):
            now[0] += seconds
    # 100 steps of 2 s, 11 validations of which half took 30 s, one checkpoint
    assert "5 tokens/s" in log.forecast(100, validation=0.5)
    assert "100 steps, 1k tokens, takes about 14m30s, 2 GB of disk. " in log.forecast(100, 2e9, validation=0.5)
    assert ("1 step, 10 tokens, takes about 1m12s, $0.48 (at $24.00 an hour)."
            in log.forecast(1, None, 24, validation=0.5))


def test_a_resumed_run_sends_mlflow_only_the_good_lines_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.Tracker, "_work", lambda self: None)      # no MLflow
    lines = ['{"step": 1, "loss": 2.5, "tokens": 64}', '{"step": Infinity, "loss": 1.0}', "[" * 10**5, '{"loss": 1.0}',
             '{"step": 2, "loss": Infinity, "lr": NaN, "norm": 1' + "0" * 400 + "}", '{"step": 3, "step": true}',
             '{"step": 4, "self": 7}', '{"step": 5, "loss": 2.0']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n\xff")
    tracker = metrics.Tracker(SimpleNamespace(mlflow=True), tmp_path, "train", resumed=True)
    assert [(name, value, step) for name, value, _, step in tracker._metrics] == [
        ("loss", 2.5, 1), ("tokens", 64, 1), ("self", 7, 4)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_log_that_cannot_be_read_is_named(name, tmp_path):
    path = tmp_path / name
    path.symlink_to("/proc/self/mem")      # reading its first bytes is an EIO
    for read in (lambda: metrics.AppendFile(path, 0), lambda: read_run(tmp_path)):
        with pytest.raises(UserError, match=f"cannot read .*{name}: Input/output error"):
            read()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"cannot read .*{name}: Is a directory"):
        metrics.AppendFile(path, 0)


def test_a_log_with_absurd_step_numbers_is_cut_without_them(tmp_path):
    (tmp_path / "log.txt").write_text(f"{'9' * 5000} train 1\n2 train 1.0\n3 train 1.0\n\u0663 train 1\n")
    metrics.AppendFile(tmp_path / "log.txt", 3).file.close()
    assert (tmp_path / "log.txt").read_text() == "2 train 1.0\n"
