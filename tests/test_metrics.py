"""metrics.py: the figures of a log, from steps and evaluations of known length."""
import json
from types import SimpleNamespace

import pytest
import torch

from exactgpt import metrics
from exactgpt.device import Hardware
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


def test_the_forecast_of_a_dry_run_counts_whole_evaluations_also_before_the_first_step(make_log):
    log, now = make_log(is_main=False)
    train(log, now, 7.0, 10)         # the first step is slow
    train(log, now, 2.0, 10)
    for kind, every, seconds in (("validation", 10, 30), ("checkpoint", 0, 10)):
        with log.timed(kind, every):
            now[0] += seconds
    # 100 steps of 2 s, 11 validations of which half took 30 s, one checkpoint
    assert "5 tokens/s" in log.forecast(100, validation=0.5)
    assert "100 steps takes about 14m30s and 2 GB of disk." in log.forecast(100, 2e9, validation=0.5)
