"""What a run logged, read back: metrics.jsonl, or log.txt in build-nanogpt's three columns, as NumPy arrays."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exactgpt.config import UserError
from exactgpt.plan import TOKENS_PER_STEP

EVALUATED = ("val_loss", "hella_acc_norm", "hella_acc")  # measured at step k before it is trained
TRAINED = ("loss", "lr", "grad_norm", "ms", "tok_per_sec", "mfu", "data_wait_ms", "peak_mem_gb")
LOG_TXT_NAMES = {"train": "loss", "val": "val_loss", "hella": "hella_acc_norm"}


@dataclass
class Series:
    """One logged quantity in the order of steps; four arrays of one length (n,)."""
    steps: np.ndarray    # int64, strictly increasing
    tokens: np.ndarray   # float64, tokens trained on so far; NaN where the log does not say
    hours: np.ndarray    # float64, summed time of the training steps so far; NaN where the log does not say
    values: np.ndarray   # float64; NaN where the log holds NaN, infinity or null

    def smoothed(self):
        """The values (n,) as curves show them: each the mean of the 50th of the run around it."""
        return smooth(self.values, len(self.values) // 100)

    def along(self, x):
        """The positions (n,) on the axis x: steps, tokens or hours."""
        return getattr(self, x).astype(float)


@dataclass
class LoggedRun:
    """What a log folder says, by the names of metrics.jsonl ("loss", "val_loss", ...); absent names have no key."""
    name: str
    path: Path                 # the log that was read
    series: dict[str, Series]
    skipped: int = 0           # lines that could not be read, a torn last line not counted

    def last_step(self):
        """The last step that any row is about."""
        return int(max(s.steps[-1] for s in self.series.values()))

    def best_val(self):
        """(step, value) of the lowest validation loss; (-1, NaN) where there is none."""
        val = self.series.get("val_loss")
        if val is None or np.isnan(val.values).all():
            return -1, float("nan")
        best = np.nanargmin(val.values)
        return int(val.steps[best]), float(val.values[best])


def read_run(folder, tokens_per_step=TOKENS_PER_STEP):
    """The LoggedRun in a folder: its metrics.jsonl, or where that is absent its log.txt (ours or build-nanogpt's).

    log.txt has no tokens, so there they are counted with `tokens_per_step`. Where a resumed run logged a step
    twice the later line counts. Raises UserError for a folder without a readable log.
    """
    folder = Path(folder)
    try:
        path = next((p for p in (folder / "metrics.jsonl", folder / "log.txt") if p.is_file()), None)
        if path is None:
            raise UserError(_no_log(folder))
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    torn = lines.pop()  # "" after a complete last line, else the line that is being written right now
    is_json = path.suffix == ".jsonl"
    parse = _parse_json if is_json else _parse_columns
    rows = [parse(line) for line in lines if line.strip()]
    good = [row for row in rows if row]
    skipped = len(rows) - len(good)
    if is_json and parse(torn):  # complete but for its end of line; in columns a number may be cut short unseen
        good.append(parse(torn))
    series = _collect(good, None if is_json else tokens_per_step)
    if not series.keys() & {"loss", *EVALUATED}:
        raise UserError(f"{path} holds no losses yet; wait for the run's first step, or name another folder")
    return LoggedRun(folder.resolve().name, path, series, skipped)


def read_samples(folder):
    """{step: texts} that the model of a run wrote at its evaluations; {} where its log holds none."""
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    rows = [_parse_json(line) for line in lines if '"samples"' in line]
    return {row["step"]: [str(text) for text in row["samples"]] for row in rows
            if row and isinstance(row.get("samples"), list)}


def _no_log(folder):
    if not folder.exists():
        return f"there is no folder {folder}; name the --log_dir of a run"
    if not folder.is_dir():
        return f"{folder} is a file; name the folder that holds metrics.jsonl or log.txt"
    inside = sorted({p.parent.name for pattern in ("*/metrics.jsonl", "*/log.txt") for p in folder.glob(pattern)})
    hint = f"; its folders {', '.join(inside[:5])} do" if inside else "; name the --log_dir of a run"
    return f"{folder} holds no metrics.jsonl and no log.txt{hint}"


def _parse_json(line):
    """A row {"step": int, name: value, ...}, or None for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_step(row.get("step")) else None


def _parse_columns(line):
    """The row of `250 val 3.9123`, or None for a line of another form."""
    try:
        step, stream, value = line.split()
        row = {"step": int(step), LOG_TXT_NAMES.get(stream, stream): float(value)}
    except ValueError:
        return None
    return row if _is_step(row["step"]) else None


def _is_step(value):
    return type(value) is int and 0 <= value < 2**53


def _collect(rows, tokens_per_step):
    """The Series by name; tokens_per_step is None where the rows carry their tokens."""
    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    tokens = _floats([row.get("tokens") for row in rows])
    series = {}
    for name in TRAINED + EVALUATED:
        present = np.array([name in row for row in rows], dtype=bool)
        if present.any():
            values = _floats([row[name] for row in rows if name in row])
            series[name] = _in_order(steps[present], tokens[present], values)
            if tokens_per_step:
                series[name].tokens = (series[name].steps + (name in TRAINED)) * float(tokens_per_step)
    if "ms" in series:
        ms = series["ms"]
        clock = np.concatenate([[0.0], np.cumsum(np.nan_to_num(ms.values))]) / 3.6e6
        for name, s in series.items():
            s.hours = clock[np.searchsorted(ms.steps, s.steps, side="right" if name in TRAINED else "left")]
    return series


def _in_order(steps, tokens, values):
    """A Series without the rows that a later row takes back: a step seen again cuts the log back to it."""
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    keep = steps < later
    return Series(steps[keep], tokens[keep], np.full(keep.sum(), np.nan), values[keep])


def _floats(values):
    """A float64 array (n,); NaN for NaN, infinity, null and whatever else is no number."""
    return np.array([v if type(v) in (int, float) and abs(v) < 1e300 else None for v in values], dtype=float)


def smooth(values, half):
    """The mean of each value and `half` neighbours on either side, (n,) -> (n,); NaN is left out and stays NaN.

    Near the start the window shrinks on both sides alike, so that the steep first fall stays where it is; near
    the end only its right side does, so that the last value is a mean and no single noisy step.
    """
    n = len(values)
    finite = np.isfinite(values)
    # Not a difference of cumulative sums: one enormous spike would cost every later value its digits.
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(finite, values, 0.0), window)[half:half + n]
    counts = np.convolve(finite, window)[half:half + n]
    for i in range(min(half, n)):
        start = slice(0, 2 * i + 1)
        sums[i], counts[i] = values[start][finite[start]].sum(), finite[start].sum()
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def last_finite(values):
    """The last finite value, or NaN."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")
