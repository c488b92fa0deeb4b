"""Logs of a run: the banner, the step line, log.txt, metrics.jsonl, and optionally MLflow.

log.txt        250 val 3.9123     250 hella 0.2612     250 train 3.950000       (build-nanogpt's columns)
metrics.jsonl  one JSON object a line, for each training step, evaluation, list of samples and skipped update

MLflow gets a SQLite store beside the run's own files. A thread fills it in batches, because importing MLflow takes
seconds and a call 10 ms. Training neither waits for it nor fails with it: a failed batch prints one warning and is
retried with the next.
"""
import contextlib
import errno
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
from collections import defaultdict, deque
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from exactgpt.checkpoint import disk_bytes, resolved_differences
from exactgpt.config import UserError, counted, human_bytes, human_count, human_time
from exactgpt.files import FolderLock, FolderLost, as_json, atomic_write, reading

SEND_EVERY_S = 10
BATCH = 1000                  # metrics per call: MLflow's limit
FINISH_S, STOP_S = 60, 10     # longest wait for the last batch, after a finished and after a stopped run
STORE, ARTIFACTS = "mlflow.db", "mlflow_artifacts"


def print_banner(run, config, runtime, checkpoint, saves):
    """Print what this start will do. checkpoint: the one it resumes from, or None. saves: it writes checkpoints."""
    c, plan, resolved, n_params = run.raw_model.config, run.plan, run.resolved, run.raw_model.n_params()
    accum = plan.local_windows // run.micro_batch_size
    lines = {
        "model": f"GPT-2, {n_params:,} parameters: {counted(c.n_layer, 'layer')}, {counted(c.n_head, 'head')}, "
                 f"{c.n_embd} channels",
        "tokens": f"block_size {c.block_size}, vocabulary {run.tokenizer.name} of {run.tokenizer.n_vocab:,}"
                  + f" (padded to {c.vocab_size:,})" * (c.vocab_size > run.tokenizer.n_vocab),
        "data": f"{config.data_dir}: {run.train_stream.n_tokens:,} train and {run.val_stream.n_tokens:,} val tokens in "
                f"{counted(len(run.shards.shards), 'shard')}",
        "step": f"{plan.tokens_per_step:,} tokens = {counted(runtime.world_size, 'process')} x "
                f"{counted(accum, 'micro-batch')} x {counted(run.micro_batch_size, 'row')} x {c.block_size}",
        "length": f"{counted(plan.max_steps, 'step')}, {plan.epochs:.2f} epochs; {config.optimizer}, {config.schedule} "
                  f"schedule with {counted(plan.warmup_steps, 'step')} of warm-up",
        "machine": f"{runtime.hardware.name} ({runtime.device}), {resolved['dtype']}, {resolved['attention']} "
                   f"attention, compile {'on' if resolved['compile'] else 'off'}, torch {torch.__version__}",
    }
    if saves:
        lines["disk"] = (f"{human_bytes(disk_bytes(config, n_params, plan.max_steps))} in {config.log_dir} for "
                         f"{counted(config.keep_checkpoints, 'checkpoint')}")
    runtime.print("\n".join(f"{title:>8}  {text}" for title, text in lines.items()))
    if checkpoint:
        runtime.print(f"resuming from step {checkpoint['step']}")
        changed = resolved_differences(checkpoint["resolved"], resolved)
        if changed:
            runtime.print(f"same tokens, not bitwise the same run: {', '.join(changed)}")


class RunLog:
    """Log of a run: rank 0 writes and prints, on other ranks it only keeps time."""

    def __init__(self, progress, config, runtime, folder, experiment, tokens, flops_per_token=None):
        """Open the logs in a folder, without what an earlier start logged from progress.step on, and the tracker."""
        # tokens: trained on until now. flops_per_token: of pretraining, which also has log.txt and logs the MFU.
        self._progress, self._runtime, self._folder = progress, runtime, Path(folder)
        self._tokens, self._flops_per_token = tokens, flops_per_token
        self._recent_s = deque(maxlen=50)    # of each step
        self._times = defaultdict(list)      # (what is timed, every how many steps) -> the seconds it took each time
        if runtime.is_main:
            self._json = AppendFile(self._folder / "metrics.jsonl", progress.step)
            self._text = AppendFile(self._folder / "log.txt", progress.step) if flops_per_token else None
            self.tracker = Tracker(config, folder, experiment, resumed=progress.step > 0)

    def start_clock(self):
        """Start the clock of the step that `train` logs next. Evaluation and saving are outside of it."""
        self._clock = time.perf_counter()

    def train(self, step, result, lr, n_tokens, data_wait_s=0.0):
        """Log a training step: its StepResult, learning rate, tokens on all ranks, and seconds of waiting for data."""
        seconds = time.perf_counter() - self._clock
        self._recent_s.append(seconds)
        self._tokens += n_tokens
        self._tok_per_sec = n_tokens / seconds
        if not self._runtime.is_main:
            return
        last_step, ms, rate = self._progress.last_step, 1000 * seconds, self._tok_per_sec
        parts = [f"step {step:>{len(str(last_step))}}/{last_step}", f"loss {result.loss:.4f}", f"lr {lr:.2e}",
                 f"norm {result.grad_norm:.3f}", f"{ms:.0f} ms", f"{rate:,.0f} tok/s"]
        values = dict(loss=result.loss, lr=lr, grad_norm=result.grad_norm, ms=ms, tok_per_sec=rate)
        if self._flops_per_token:
            peak = self._runtime.hardware.peak_flops()
            mfu = rate * self._flops_per_token / (peak * self._runtime.world_size) if peak else None
            values |= dict(mfu=mfu, data_wait_ms=1000 * data_wait_s, peak_mem_gb=peak_memory_gb(self._runtime))
            parts += [f"mfu {100 * mfu:.1f}%"] if mfu else []
        self.note(step, " | ".join([*parts, f"eta {self.eta(step)}"]), f"train {result.loss:.6f}", **values)
        try:
            FolderLock.check(self._folder)
        except FolderLost:      # the next all-reduce stops all ranks, and the save then raises this on all
            self._runtime.stop_signal = "loss of the folder"

    def skipped(self, step, reason, windows):
        """Log that the update of a step was skipped, and the windows of the train split that it read."""
        self.note(step, f"step {step}: update skipped on all ranks, {reason} ({counted(len(windows), 'window')}, the "
                        f"first is {windows[0]}: metrics.jsonl has all)", skipped=reason, windows=windows.tolist())

    def validation(self, step, loss, n_tokens, n_bytes):
        """Log a validation loss, in nats, the mean over n_tokens, and its bits per byte, if they have any bytes."""
        values, words = dict(val_loss=loss), ""
        if n_bytes:
            values["val_bpb"] = loss * n_tokens / math.log(2) / n_bytes
            words = f", {values['val_bpb']:.4f} bits per byte,"
        message = f"step {step}: validation loss {loss:.4f}{words} over {counted(n_tokens, 'token')}"
        self.note(step, message, f"val {loss:.4f}", **values)

    def hellaswag(self, step, score):
        """Log a HellaSwagScore: accuracies from 0 to 1."""
        message = (f"step {step}: HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f} over "
                   f"{counted(score.n, 'item')}")
        self.note(step, message, f"hella {score.acc_norm:.4f}", hella_acc=score.acc, hella_acc_norm=score.acc_norm)

    def samples(self, step, texts):
        """Log texts that the model wrote."""
        self.note(step, "\n".join(f"step {step}: sample > {text!r}" for text in texts), samples=texts)

    def note(self, step, message, text="", **values):
        """Print a message, and add the values to metrics.jsonl and MLflow, and a text, if any, to log.txt."""
        if not self._runtime.is_main:
            return
        plain = as_json(values)      # no inf and NaN
        if self._text and text:
            self._text.write(f"{step} {text}\n")
        self._json.write(json.dumps(dict(step=step, tokens=self._tokens, **plain)) + "\n")
        self.tracker.log(step, tokens=self._tokens, **plain)
        print(message, flush=True)

    @contextlib.contextmanager
    def timed(self, kind, every):
        """Measure the time of what happens every `every` steps besides training, for the ETA."""
        start = time.monotonic()
        yield
        self._times[kind, every].append(time.monotonic() - start)

    def close(self):
        """Close the files. MLflow gets the curves, if pretraining is finished, and the path of the best checkpoint."""
        if not self._runtime.is_main:
            return
        finished = self._progress.step >= self._progress.last_step
        self._json.file.close()
        if self._text:
            self._text.file.close()
            best = self._folder / "model_best.pt"
            if finished:
                self.tracker.artifact(self._folder / "plot.png", draw=True)
            if best.exists():
                self.tracker.text("best_checkpoint.txt", f"{best.resolve()}\n")
        self.tracker.close(finished)

    def eta(self, step):
        """Return the time left after this step, evaluations and saves included: "5h31m"."""
        left = self._progress.last_step - step - 1
        seconds = left * sum(self._recent_s) / len(self._recent_s)
        seconds += sum(left / every * sum(times) / len(times) for (_, every), times in self._times.items() if every)
        return human_time(seconds)

    def forecast(self, n_steps, disk=None, dollars_per_hour=0.0, **shares):
        """Return a line that says what the full run takes, judging by the steps and evaluations of a dry run."""
        # disk: the bytes that it takes. shares: the part of a full evaluation that was done here, validation=0.1.
        seconds = n_steps * self._recent_s[-1]
        for (kind, every), times in self._times.items():
            seconds += (n_steps // every + 1 if every else 1) * sum(times) / len(times) / shares.get(kind, 1)
        costs = [f"about {human_time(seconds)}"] + ([f"{human_bytes(disk)} of disk"] if disk else [])
        if dollars_per_hour:
            costs.append(f"${seconds / 3600 * dollars_per_hour:,.2f} (at ${dollars_per_hour:,.2f} an hour)")
        n_tokens = n_steps * self._tokens / len(self._recent_s)
        return (f"dry run: {self._tok_per_sec:,.0f} tokens/s, {peak_memory_gb(self._runtime):.1f} GB at most; the full "
                f"run of {counted(n_steps, 'step')}, {human_count(n_tokens)} tokens, takes {', '.join(costs)}. "
                "Nothing was kept.")


class AppendFile:
    """A log that lines are appended to, each beginning with its step; failed writes are retried with the next line."""

    def __init__(self, path, first_step):
        """Open the file to append to it; create it if it does not exist. Raises UserError."""
        # Lines from `first_step` on, and torn ones, are deleted: a run that resumes at step k logs step k again.
        self._path, self._pending, self._warned = path, b"", False
        if path.exists():
            with reading(path):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            whole = [re.match(r'(?:\{"step": )?([0-9]{1,15})\b.*\n', line) for line in lines]
            with atomic_write(path, "w") as f:
                f.writelines(line[0] for line in whole if line and int(line[1]) < first_step)
        try:
            self.file = open(path, "ab", buffering=0,      # not through a link to a file that is not ours
                             opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
        except OSError as error:      # the disk is full, or has no more room for names
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"cannot write {path}: {why}") from error

    def write(self, line):
        """Append a line, which includes its newline, after those that could not be written. Warns once."""
        self._pending += line.encode("utf-8")
        try:
            while self._pending:
                self._pending = self._pending[self.file.write(self._pending):]
        except OSError as error:
            if not self._warned:
                print(f"warning: cannot write {self._path} ({error.strerror}); retrying with each line", flush=True)
            self._warned = True


def peak_memory_gb(runtime):
    """Return the peak memory so far in GB: allocated on the card, or resident on a CPU."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) / 1e9
    import resource  # Unix only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- MLflow ------------------------------------------------------------------

class Tracker:
    """A run in MLflow; does nothing unless config.mlflow. Make it on rank 0 only, and close it."""

    def __init__(self, config, log_dir, experiment, resumed=False):
        """Log the fields of `config` as parameters. experiment: "train", "lr_finder", ..."""
        # resumed: continue the newest run of the experiment in log_dir, and first send the lines of metrics.jsonl that
        # a killed process had not sent.
        self._enabled = config.mlflow
        self._actions = deque()      # what to do after the last metrics are sent
        if not self._enabled:
            return
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")    # read when MLflow is imported
        self._log_dir, self._experiment, self._resumed = Path(log_dir), experiment, resumed
        self._config, self._client, self._run_id, self._warned = config, None, None, False
        self._in_store = {}          # name -> last step in the store when this process started
        self._metrics = deque()      # (name, value, time in ms, step), not sent yet
        self._closing = threading.Event()
        written = self._log_dir / "metrics.jsonl"
        if resumed and written.exists():
            from exactgpt.figures import parse_line  # only MLflow needs it here
            with reading(written):
                lines = written.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                entry = parse_line(line)
                if entry:      # else it was torn by a full disk
                    self._queue(entry.pop("step"), entry)
        self._thread = threading.Thread(target=self._work, daemon=True, name="MLflow")
        self._thread.start()
        if not resumed:
            print(f"to watch it: mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{self._log_dir / STORE}')}",
                  flush=True)

    def log(self, step, **values):
        """Queue the numbers of a line of metrics.jsonl, but for those that are not finite."""
        if self._enabled:
            self._queue(step, values)

    def _queue(self, step, values):
        now = round(1000 * time.time())
        self._metrics.extend((name, value, now, step) for name, value in values.items()
                             if type(value) in (int, float) and abs(value) < 1e300)

    def artifact(self, path, draw=False):
        """Queue a copy of a file. draw: first draw the run's curves there, in the tracker's thread."""
        def keep():
            if draw:
                from exactgpt.figures import draw_runs, read_run, save_figure  # only MLflow needs them here
                save_figure(draw_runs([read_run(path.parent)]), path)
            self._client.log_artifact(self._run_id, str(path))
        self._actions.append(keep)

    def text(self, name, text):
        """Queue a text as an artifact of this name."""
        self._actions.append(lambda: self._client.log_text(self._run_id, text, name))

    def close(self, finished=True):
        """Send what is queued and wait for it, for a limited time. finished: False if the run may be resumed."""
        if self._enabled:
            status = "FINISHED" if finished else "KILLED"
            self._actions.append(lambda: self._client.set_terminated(self._run_id, status))
            self._closing.set()
            self._thread.join(FINISH_S if finished else STOP_S)
            if self._thread.is_alive():
                self._warn("it takes too long, so the last values are missing")

    def _work(self):
        """Send a batch every SEND_EVERY_S, and the rest when the tracker closes. Runs in the thread."""
        closing = False
        while not closing:
            closing = self._closing.is_set()
            for action in (self._send, *(self._actions if closing else ())):
                try:
                    FolderLock.check(self._log_dir)      # the store and the artifacts are in there
                    action()
                except FolderLost:      # the run ends, and says so
                    return
                except Exception as error:      # of a database, a disk, MLflow: training continues whatever it is
                    self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            self._closing.wait(SEND_EVERY_S)

    def _warn(self, problem):
        if not self._warned:
            print(f"warning: MLflow: {problem}; training continues without it", flush=True)
        self._warned = True

    def _send(self):
        """Send the queued metrics, oldest first. A failed batch stays queued; MLflow ignores what it has already."""
        if self._client is None:
            self._client = self._open()
        from mlflow.entities import Metric
        while self._metrics:
            batch = list(islice(self._metrics, BATCH))
            new = [Metric(*metric) for metric in batch if metric[3] > self._in_store.get(metric[0], -1)]
            if new:
                self._client.log_batch(self._run_id, metrics=new)
            for _ in batch:
                self._metrics.popleft()

    def _open(self):
        """Return a client of the store in log_dir, which is created if needed; find or begin the run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        for name in ("mlflow", "alembic"):          # they report every table that a new store gets
            logging.getLogger(name).setLevel(logging.WARNING)
        folder = self._log_dir.resolve()
        FolderLock.check(self._log_dir)             # again: the import took seconds, and MLflow would create the folder
        client = MlflowClient(f"sqlite:///{folder / STORE}")
        experiment = client.get_experiment_by_name(self._experiment)
        # Without an explicit location MLflow would put the artifacts into ./mlruns.
        number = experiment.experiment_id if experiment else client.create_experiment(
            self._experiment, artifact_location=(folder / ARTIFACTS).as_uri())
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs([number], order_by=newest, max_results=1) if self._resumed else []
        run = runs[0] if runs else client.create_run(number, run_name=folder.name)
        self._run_id, self._resumed = run.info.run_id, True     # if the rest fails, the next attempt finds the run
        if runs:
            client.update_run(self._run_id, status="RUNNING")
        if not run.data.params:                     # a resumed run keeps its first parameters
            params = [Param(name, str(value)) for name, value in asdict(self._config).items()]
            client.log_batch(self._run_id, params=params)
        self._in_store = {name: max(metric.step for metric in client.get_metric_history(self._run_id, name))
                          for name in run.data.metrics}
        return client

