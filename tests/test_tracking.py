"""metrics.py: the MLflow mirror, read back from the real local store through MLflow's own client."""
import importlib.util
import json
import os
import time
from dataclasses import dataclass

import pytest

import finetune_classifier
import train
from exactgpt import metrics
from exactgpt.config import UserError
from exactgpt.metrics import Tracker
from tests.common import TINY, mlflow_runs, read_metrics

if importlib.util.find_spec("mlflow") is None:     # imported later: only then is its telemetry off
    pytest.skip("MLflow is not installed", allow_module_level=True)


@dataclass
class Config:
    """The parameters of a run."""
    mlflow: bool = True
    rate: float = 0.5


def logged(log_dir, name):
    """[(step, value)] of a quantity in metrics.jsonl."""
    return [(row["step"], row[name]) for row in read_metrics(log_dir) if row.get(name) is not None]


@pytest.mark.slow
def test_a_run_that_was_resumed_is_one_run_in_the_store_with_every_step_once(make_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, log_dir = make_shards([2000], tokens=[k % 7 for k in range(2064)]), tmp_path / "logs" / "one"
    flags = [str(f) for f in (*TINY, "--data_dir", data, "--log_dir", log_dir, "--total_batch_size", 64, "--max_steps",
                              6, "--eval_every", 2, "--val_tokens", 32, "--checkpoint_every", 4, "--mlflow")]
    train.main(flags)
    first = (log_dir / "metrics.jsonl").read_text()
    (log_dir / "model_00006.pt").unlink()                     # as if killed after step 5
    train.main(flags)                                         # repeats steps 4 and 5
    assert [json.loads(a)["step"] for a in first.splitlines()] == [
        json.loads(a)["step"] for a in (log_dir / "metrics.jsonl").read_text().splitlines()]
    [run] = mlflow_runs(log_dir, "train")
    for name in ("loss", "lr", "grad_norm", "val_loss", "val_bpb"):      # once each; repeated steps gave the same
        assert run.history[name] == logged(log_dir, name), name
    assert len(run.history["ms"]) == 6
    assert run.status == "FINISHED" and run.params["max_lr"] == "0.0006" and run.params["n_layer"] == "2"
    assert set(run.artifacts) == {"plot.png", "best_checkpoint.txt"}
    assert open(run.artifacts["best_checkpoint.txt"]).read() == f"{log_dir / 'model_best.pt'}\n"
    assert run.run.info.artifact_uri.startswith(log_dir.as_uri()) and not (tmp_path / "mlruns").exists()
    from mlflow.telemetry import get_telemetry_client
    assert get_telemetry_client() is None and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_rows_that_a_killed_process_had_not_sent_follow_and_a_fresh_start_is_a_new_run(tmp_path):
    def write(n):
        (tmp_path / "metrics.jsonl").write_text("".join(
            json.dumps(dict(step=k, tokens=8 * k, loss=1.0 / (k + 1), samples=["x"], mfu=None)) + "\n"
            for k in range(n)))
    tracker = Tracker(Config(), tmp_path, "train")
    for k in range(1200):                                     # 2400 numbers: three calls
        tracker.log(k, loss=1.0 / (k + 1), tokens=8 * k, note="text", flag=True, bad=float("nan"), none=None)
    tracker.close(finished=False)
    assert mlflow_runs(tmp_path, "train")[0].status == "KILLED"
    write(1205)                                               # five more rows came before the kill
    tracker = Tracker(Config(rate=0.25), tmp_path, "train", resumed=True)
    tracker.log(1205, loss=0.0)
    tracker.close()
    [run] = mlflow_runs(tmp_path, "train")
    assert run.status == "FINISHED" and run.params == {"mlflow": "True", "rate": "0.5"}
    assert run.history["loss"] == [*((k, 1.0 / (k + 1)) for k in range(1205)), (1205, 0.0)]
    assert set(run.history) == {"loss", "tokens"} and len(run.history["tokens"]) == 1205
    Tracker(Config(rate=0.25), tmp_path, "train").close()
    assert [r.params["rate"] for r in mlflow_runs(tmp_path, "train")] == ["0.25", "0.5"]


def test_batches_leave_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SEND_EVERY_S", 0.05)
    tracker = Tracker(Config(), tmp_path, "lr_finder")
    tracker.log(3, loss=2.0)
    while tracker._metrics or not tracker._run_id:            # the limit of a test ends what hangs
        time.sleep(0.01)
    assert mlflow_runs(tmp_path, "lr_finder")[0].history == {"loss": [(3, 2.0)]}
    tracker.close()


def test_training_goes_on_without_a_store_that_cannot_be_used(make_shards, tmp_path, capsys):
    data, log_dir = make_shards([2000]), tmp_path / "log"
    log_dir.mkdir()
    (log_dir / "mlflow.db").write_bytes(b"no database" * 1000)
    train.main([str(f) for f in (*TINY, "--data_dir", data, "--log_dir", log_dir, "--total_batch_size", 64,
                                 "--max_steps", 2, "--mlflow")])
    out = capsys.readouterr().out
    assert out.count("warning: MLflow: ") == 1 and "training continues without it" in out
    assert (log_dir / "model_00002.pt").exists() and len(logged(log_dir, "loss")) == 2


@pytest.mark.slow
def test_a_store_that_comes_back_gets_what_it_missed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "SEND_EVERY_S", 0.05)
    Tracker(Config(), tmp_path, "other").close()
    from mlflow import MlflowClient
    log_batch, calls = MlflowClient.log_batch, []

    def fail_at_first(self, *args, **options):
        calls.append(options)
        if len(calls) in (1, 3):                              # the parameters; the first metrics
            raise OSError("No space left on device")
        log_batch(self, *args, **options)
    monkeypatch.setattr(MlflowClient, "log_batch", fail_at_first)
    tracker = Tracker(Config(), tmp_path, "train")
    tracker.log(0, loss=3.0)
    while len(calls) < 4:
        time.sleep(0.01)
    tracker.log(1, loss=2.0)
    tracker.close()
    [run] = mlflow_runs(tmp_path, "train")
    assert run.history == {"loss": [(0, 3.0), (1, 2.0)]} and run.params["rate"] == "0.5"
    assert capsys.readouterr().out.count("warning: MLflow") == 1


def test_without_the_flag_nothing_happens_and_without_mlflow_one_line_does(tmp_path, monkeypatch):
    tracker = Tracker(Config(mlflow=False), tmp_path, "train")
    tracker.log(0, loss=1.0)
    tracker.artifact(tmp_path / "x.png")
    tracker.text("a.txt", "a")
    tracker.close()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-extras"):
        train.main(["--mlflow"])


def test_fine_tuning_mirrors_its_steps_epochs_and_results(classifier_flags, tmp_path):
    finetune_classifier.main([str(f) for f in (*classifier_flags(tmp_path / "out"), "--num_epochs", 1,
                                               "--mlflow")])
    [run] = mlflow_runs(tmp_path / "out", "fine-tuning")
    for name in ("loss", "lr", "val_loss", "macro_f1"):
        assert run.history[name] == logged(tmp_path / "out", name), name
    assert run.status == "FINISHED" and run.params["label_column"] == "sentiment"
    assert set(run.artifacts) == {"confusion.png", "metrics.json", "best_checkpoint.txt"}
