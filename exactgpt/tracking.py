"""The mirror of a run in MLflow: a SQLite store beside the run's own files, filled by a thread of its own.

    tracker = Tracker(config, log_dir, "train")     # does nothing unless config.mlflow
    tracker.log(step, loss=3.95, lr=2e-4)
    tracker.artifact(log_dir / "plot.png")
    tracker.close()

Importing MLflow takes seconds and a call 10 ms, so rows are sent in batches. The run neither waits for it nor ends with
it: what fails is warned of once, and tried again with the next batch.
"""
import contextlib
import importlib.util
import json
import logging
import math
import os
import shlex
import threading
import time
from collections import deque
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from exactgpt.config import UserError

SEND_EVERY_S = 10
BATCH = 1000                  # metrics of a call: MLflow takes no more
FINISH_S, STOP_S = 60, 10    # the longest wait for the last batch, after a run and after a stop
STORE, ARTIFACTS = "mlflow.db", "mlflow_artifacts"


def require_mlflow():
    """Raise UserError where MLflow is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("--mlflow needs MLflow: pip install -r requirements-extras.txt, or leave the flag out")


class Tracker:
    """One run of one experiment. Make it in one process only (rank 0), and close it."""

    def __init__(self, config, log_dir, experiment, resumed=False):
        """The parameters are the fields of the dataclass `config`; experiment: "train", "lr_finder", ...

        resumed: go on with the newest run of the experiment in log_dir; the rows of metrics.jsonl that it lacks (a
        killed process had not sent them) are sent first. Raises UserError where MLflow is not installed.
        """
        self._enabled = config.mlflow
        if not self._enabled:
            return
        require_mlflow()
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")    # read when it is imported
        self._log_dir, self._experiment, self._resumed = Path(log_dir), experiment, resumed
        self._params = {name: str(value) for name, value in asdict(config).items()}
        self._client, self._run_id, self._warned = None, None, False
        self._in_store = {}          # name -> last step that the store held when this process began
        self._metrics = deque()      # (name, value, time in ms, step), not sent yet
        self._actions = deque()      # what else to send, after the last metrics
        self._closing = threading.Event()
        rows = self._log_dir / "metrics.jsonl"
        if resumed and rows.exists():
            for line in rows.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError):      # a line that a full disk tore
                    self.log(**json.loads(line))
        self._thread = threading.Thread(target=self._work, daemon=True, name="MLflow")
        self._thread.start()
        if not resumed:
            print(f"to watch it: mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{self._log_dir / STORE}')}",
                  flush=True)

    def log(self, step, **values):
        """Take the numbers of a row; what is no finite number is left out."""
        if self._enabled:
            now = round(1000 * time.time())
            self._metrics.extend((name, value, now, step) for name, value in values.items()
                                 if type(value) in (int, float) and math.isfinite(value))

    def artifact(self, path, make=None):
        """Keep a copy of a file; make(path) writes it first, in the tracker's thread."""
        def keep():
            if make:
                make(path)
            self._client.log_artifact(self._run_id, str(path))
        if self._enabled:
            self._actions.append(keep)

    def text(self, name, text):
        """Keep a text as an artifact of this name."""
        if self._enabled:
            self._actions.append(lambda: self._client.log_text(self._run_id, text, name))

    def close(self, finished=True):
        """Send what is left, and wait for it, but not for ever. finished: else the run was stopped, and may go on."""
        if self._enabled:
            status = "FINISHED" if finished else "KILLED"
            self._actions.append(lambda: self._client.set_terminated(self._run_id, status))
            self._closing.set()
            self._thread.join(FINISH_S if finished else STOP_S)
            if self._thread.is_alive():
                self._warn("it takes too long, so its last rows are missing")

    def _work(self):
        """The thread: a batch at once, one every SEND_EVERY_S, and the rest when the tracker closes."""
        closing = False
        while not closing:
            self._attempt(self._send)
            closing = self._closing.wait(SEND_EVERY_S)
        for action in (self._send, *self._actions):
            self._attempt(action)

    def _attempt(self, action):
        try:
            action()
        except Exception as error:  # of a database, a disk, MLflow: any kind, and the run goes on
            self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _warn(self, problem):
        if not self._warned:
            print(f"warning: MLflow: {problem}; the run goes on without it", flush=True)
        self._warned = True

    def _send(self):
        """Send the metrics that wait, oldest first. A batch that fails stays: what MLflow has of it, it knows."""
        if self._client is None:
            self._client = self._open()
        from mlflow.entities import Metric
        while self._metrics:
            rows = list(islice(self._metrics, BATCH))
            new = [Metric(*row) for row in rows if row[3] > self._in_store.get(row[0], -1)]
            if new:
                self._client.log_batch(self._run_id, metrics=new)
            for _ in rows:
                self._metrics.popleft()

    def _open(self):
        """The client of the store in log_dir, both made where they are not yet; finds or begins the run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        for name in ("mlflow", "alembic"):          # of the tables that a new store gets
            logging.getLogger(name).setLevel(logging.WARNING)
        folder = self._log_dir.resolve()
        client = MlflowClient(f"sqlite:///{folder / STORE}")
        experiment = client.get_experiment_by_name(self._experiment)
        # Without a location of its own MLflow would put the artifacts into ./mlruns.
        number = experiment.experiment_id if experiment else client.create_experiment(
            self._experiment, artifact_location=(folder / ARTIFACTS).as_uri())
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs([number], order_by=newest, max_results=1) if self._resumed else []
        run = runs[0] if runs else client.create_run(number, run_name=folder.name)
        self._run_id, self._resumed = run.info.run_id, True     # should the rest fail, the next attempt finds it
        if runs:
            client.update_run(self._run_id, status="RUNNING")
        if not run.data.params:                     # a resumed run keeps those that it began with
            client.log_batch(self._run_id, params=[Param(*param) for param in self._params.items()])
        self._in_store = {name: max(metric.step for metric in client.get_metric_history(self._run_id, name))
                          for name in run.data.metrics}
        return client
