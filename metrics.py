"""What a run writes down: the step line, log.txt in build-nanogpt's columns, metrics.jsonl with everything.

log.txt        250 val 3.9123     250 hella 0.2612     250 train 3.950000
metrics.jsonl  one JSON object a line: a row per step (training) and a row per evaluation
"""
import contextlib
import json
import math
import time
from collections import defaultdict, deque
from pathlib import Path

import torch

from files import atomic_write


class RunLog:
    """The log of a run: rank 0 writes and prints, the other ranks' logs do nothing."""

    def __init__(self, runtime, log_dir, first_step, max_steps, tokens_per_step, flops_per_token):
        """Cut the files of an earlier start back to `first_step`, and append from there."""
        self._runtime, self._tokens_per_step = runtime, tokens_per_step
        self.max_steps = max_steps
        self._flops_per_token = flops_per_token
        self._recent_ms = deque(maxlen=50)
        self._pauses = defaultdict(list)      # kind -> [every, seconds of each pause ...]
        if runtime.is_main:
            log_dir = Path(log_dir)
            cut_back(log_dir / "log.txt", first_step, lambda line: int(line.split()[0]))
            cut_back(log_dir / "metrics.jsonl", first_step, lambda line: int(json.loads(line)["step"]))
            self._text = open(log_dir / "log.txt", "a", encoding="utf-8", buffering=1)
            self._json = open(log_dir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)

    def train(self, step, loss, lr, grad_norm, seconds, data_wait_s, note=""):
        """Log one optimizer step: loss in nats, its duration in seconds, the part of it spent waiting for data."""
        self._recent_ms.append(1000 * seconds)
        if not self._runtime.is_main:
            return
        tok_per_sec = self._tokens_per_step / seconds
        peak = self._runtime.hardware.peak_flops()
        mfu = tok_per_sec * self._flops_per_token / (peak * self._runtime.world_size) if peak else None
        self._text.write(f"{step} train {loss:.6f}\n")
        self._row(step, (step + 1) * self._tokens_per_step, loss=loss, lr=lr, grad_norm=grad_norm, ms=1000 * seconds,
                  tok_per_sec=tok_per_sec, mfu=mfu, data_wait_ms=1000 * data_wait_s, peak_mem_gb=peak_memory_gb(self._runtime))
        parts = [f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}", f"loss {loss:.4f}", f"lr {lr:.2e}",
                 f"norm {grad_norm:.3f}", f"{1000 * seconds:.0f} ms", f"{tok_per_sec:,.0f} tok/s"]
        parts += [f"mfu {100 * mfu:.1f}%"] if mfu else []
        parts += [f"eta {self.eta(step)}"] + ([note] if note else [])
        print(" | ".join(parts), flush=True)

    def validation(self, step, loss, n_tokens):
        """Log a validation loss, in nats, over n_tokens."""
        if self._runtime.is_main:
            self._text.write(f"{step} val {loss:.4f}\n")
            self._row(step, step * self._tokens_per_step, val_loss=loss)
            print(f"step {step}: validation loss {loss:.4f} over {n_tokens:,} tokens", flush=True)

    def hellaswag(self, step, acc, acc_norm, n):
        """Log HellaSwag's accuracies over n items."""
        if self._runtime.is_main:
            self._text.write(f"{step} hella {acc_norm:.4f}\n")
            self._row(step, step * self._tokens_per_step, hella_acc=acc, hella_acc_norm=acc_norm)
            print(f"step {step}: HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f} over {n:,} items", flush=True)

    def samples(self, step, texts):
        """Log texts that the model wrote."""
        if self._runtime.is_main:
            self._row(step, step * self._tokens_per_step, samples=texts)
            for text in texts:
                print(f"step {step}: sample > {text!r}", flush=True)

    def _row(self, step, tokens, **values):
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._json.write(json.dumps(dict(step=step, tokens=tokens, **plain)) + "\n")

    @contextlib.contextmanager
    def pause(self, kind, every):
        """Time what happens every `every` steps beside the training, for the ETA."""
        start = time.monotonic()
        yield
        self._pauses[kind, every].append(time.monotonic() - start)

    def close(self):
        """Close the files."""
        if self._runtime.is_main:
            self._text.close()
            self._json.close()

    def eta(self, step):
        """The time left after this step, evaluations and saves included, as 5h31m."""
        left = self.max_steps - step - 1
        seconds = left * sum(self._recent_ms) / len(self._recent_ms) / 1000
        seconds += sum(left / every * sum(times) / len(times) for (_, every), times in self._pauses.items() if every)
        return human_time(seconds)


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
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kilobytes on Linux


def human_time(seconds):
    """5h31m, 12m05s or 42s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
