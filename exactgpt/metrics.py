"""What a run writes down: the step line, log.txt in build-nanogpt's columns, metrics.jsonl with everything.

log.txt        250 val 3.9123     250 hella 0.2612     250 train 3.950000
metrics.jsonl  one JSON object a line: a row per step (training), evaluation, samples, skipped step; --mlflow mirrors it
"""
import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict, deque
from pathlib import Path

import torch

from exactgpt.checkpoint import disk_bytes
from exactgpt.figures import draw_runs, save_figure
from exactgpt.files import atomic_write
from exactgpt.history import read_run
from exactgpt.human import human_bytes, human_time
from exactgpt.plan import make_plan
from exactgpt.tracking import Tracker


class RunLog:
    """The log of a run: rank 0 writes and prints, the other ranks' logs do nothing."""

    def __init__(self, runtime, config, run):
        """Cut the files of an earlier start in config.log_dir back to run.first_step, and append from there."""
        self._runtime, self._run = runtime, run
        self._tokens_per_step = run.plan.tokens_per_step
        self._flops_per_token = run.raw.flops_per_token()
        self._recent_ms = deque(maxlen=50)
        self._pauses = defaultdict(list)      # (kind, every) -> seconds of each pause
        self.steps_done = 0
        if runtime.is_main:
            self._log_dir = log_dir = Path(config.log_dir)
            cut_back(log_dir / "log.txt", run.first_step, lambda line: int(line.split()[0]))
            cut_back(log_dir / "metrics.jsonl", run.first_step, lambda line: int(json.loads(line)["step"]))
            self._text, self._json = AppendFile(log_dir / "log.txt"), AppendFile(log_dir / "metrics.jsonl")
            self._tracker = Tracker(config, log_dir, "train", resumed=run.first_step > 0)

    def start_clock(self):
        """The step that `train` logs next begins now: evaluation and saving are outside the clock."""
        self._clock = time.perf_counter()

    def train(self, step, result, lr, data_wait_s):
        """Log one optimizer step (a StepResult) and the part of its time spent waiting for data."""
        seconds = time.perf_counter() - self._clock
        self._recent_ms.append(1000 * seconds)
        self.steps_done += 1
        if not self._runtime.is_main:
            return
        tok_per_sec = self._tokens_per_step / seconds
        peak = self._runtime.hardware.peak_flops()
        mfu = tok_per_sec * self._flops_per_token / (peak * self._runtime.world_size) if peak else None
        self._text.write(f"{step} train {result.loss:.6f}\n")
        self._row(step, (step + 1) * self._tokens_per_step, loss=result.loss, lr=lr, grad_norm=result.grad_norm,
                  ms=1000 * seconds, tok_per_sec=tok_per_sec, mfu=mfu, data_wait_ms=1000 * data_wait_s,
                  peak_mem_gb=peak_memory_gb(self._runtime))
        parts = [f"step {step:>{len(str(self._run.last_step))}}/{self._run.last_step}", f"loss {result.loss:.4f}",
                 f"lr {lr:.2e}", f"norm {result.grad_norm:.3f}", f"{1000 * seconds:.0f} ms",
                 f"{tok_per_sec:,.0f} tok/s"]
        parts += [f"mfu {100 * mfu:.1f}%"] if mfu else []
        print(" | ".join([*parts, f"eta {self.eta(step)}"]), flush=True)

    def skipped(self, step, reason, windows):
        """Log that a step's update was skipped, and the windows of the train split that it read."""
        if self._runtime.is_main:
            self._row(step, (step + 1) * self._tokens_per_step, skipped=reason, windows=windows.tolist())
            print(f"step {step}: update skipped on all ranks, {reason} ({len(windows)} windows, the first is "
                  f"{windows[0]}: metrics.jsonl has all)", flush=True)

    def validation(self, step, loss, n_tokens):
        """Log a validation loss, in nats, over n_tokens."""
        if self._runtime.is_main:
            self._text.write(f"{step} val {loss:.4f}\n")
            self._row(step, step * self._tokens_per_step, val_loss=loss)
            print(f"step {step}: validation loss {loss:.4f} over {n_tokens:,} tokens", flush=True)

    def hellaswag(self, step, score):
        """Log a HellaSwagScore: accuracies from 0 to 1."""
        if self._runtime.is_main:
            self._text.write(f"{step} hella {score.acc_norm:.4f}\n")
            self._row(step, step * self._tokens_per_step, hella_acc=score.acc, hella_acc_norm=score.acc_norm)
            print(f"step {step}: HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f} over {score.n:,} items",
                  flush=True)

    def samples(self, step, texts):
        """Log texts that the model wrote."""
        if self._runtime.is_main:
            self._row(step, step * self._tokens_per_step, samples=texts)
            for text in texts:
                print(f"step {step}: sample > {text!r}", flush=True)

    def _row(self, step, tokens, **values):
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._json.write(json.dumps(dict(step=step, tokens=tokens, **plain)) + "\n")
        self._tracker.log(step, tokens=tokens, **plain)

    @contextlib.contextmanager
    def pause(self, kind, every):
        """Time what happens every `every` steps beside the training, for the ETA."""
        start = time.monotonic()
        yield
        self._pauses[kind, every].append(time.monotonic() - start)

    def close(self):
        """Close the files; the mirror gets the curves and the best checkpoint's path."""
        if not self._runtime.is_main:
            return
        self._text.close()
        self._json.close()
        finished = self._run.first_step + self.steps_done >= self._run.last_step
        if finished:
            self._tracker.artifact(self._log_dir / "plot.png", make=self._draw)
        best = self._log_dir / "model_best.pt"
        if best.exists():
            self._tracker.text("best_checkpoint.txt", f"{best.resolve()}\n")
        self._tracker.close(finished)

    def _draw(self, path):
        save_figure(draw_runs([read_run(self._log_dir)]), path)

    def eta(self, step):
        """The time left after this step, evaluations and saves included, as 5h31m."""
        left = self._run.last_step - step - 1
        seconds = left * sum(self._recent_ms) / len(self._recent_ms) / 1000
        seconds += sum(left / every * sum(times) / len(times) for (_, every), times in self._pauses.items() if every)
        return human_time(seconds)

    def forecast(self, config, shares):
        """What the full run takes, from two steps and some evaluations of each kind.

        shares: the part of its work that an evaluation did here.
        """
        plan = make_plan(config, self._run.raw.config.block_size, self._run.train_stream.n_windows,
                         self._runtime.world_size)
        step_s = self._recent_ms[-1] / 1000
        every = dict(validation=config.eval_every, HellaSwag=config.hellaswag_every, samples=config.sample_every,
                     checkpoint=config.checkpoint_every)
        pauses = {kind: sum(times) / len(times) / shares.get(kind, 1) for (kind, _), times in self._pauses.items()}
        total = plan.max_steps * step_s + sum(s * (plan.max_steps // every[kind] + 1 if every[kind] else 1)
                                              for kind, s in pauses.items())
        return (f"dry run: {self._tokens_per_step / step_s:,.0f} tokens/s, {peak_memory_gb(self._runtime):.1f} GB at "
                f"most; the full run of {plan.max_steps} steps takes about {human_time(total)} and "
                f"{human_bytes(disk_bytes(config, self._run.raw, plan.max_steps))} of disk. Nothing was kept.")


class AppendFile:
    """A file that lines are added to; what a full disk refuses is kept and tried again with the next line."""

    def __init__(self, path):
        """Open the file at its end, making it where there is none. Raises OSError."""
        self._path, self._pending, self._warned = path, b"", False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line):
        """Add a line, its newline included, after those that still wait. A failure is warned of, once."""
        self._pending += line.encode("utf-8")
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending):]
        except OSError as error:
            if not self._warned:
                print(f"warning: cannot write {self._path} ({error.strerror}); trying again with each line", flush=True)
            self._warned = True

    def close(self):
        """Close the file."""
        os.close(self._descriptor)


def cut_back(path, first_step, step_of):
    """Drop the lines of a log from `first_step` on, and lines that are torn. Every line before stays as it is."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            if line.endswith("\n") and step_of(line) < first_step:
                kept.append(line)
    with atomic_write(path, "w") as f:
        f.writelines(kept)


def peak_memory_gb(runtime):
    """The most memory used so far, in GB: allocated on the card, or resident on a CPU."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) / 1e9
    import resource  # Unix only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
