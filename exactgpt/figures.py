"""Read the logs of runs into NumPy arrays and draw them with matplotlib. No torch.

Logs are metrics.jsonl, or log.txt in build-nanogpt's three columns. Figures do not use pyplot: no display and no global
state, so that app.py may draw in several threads. Scripts draw last, so matplotlib is imported late: they start faster.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, atomic_write, human_count

TOKENS_PER_STEP = 524288   # build-nanogpt's, for a log.txt, which does not record it
EVALUATED = ("val_loss", "hella_acc_norm", "hella_acc")  # measured at step k before training it
TRAINED = ("loss", "lr", "grad_norm", "ms", "tok_per_sec", "mfu", "data_wait_ms", "peak_mem_gb")
LOG_TXT_NAMES = {"train": "loss", "val": "val_loss", "hella": "hella_acc_norm"}
FORMATS = (".png", ".svg")
X_LABELS = {"steps": "steps", "tokens": "training tokens", "hours": "hours of training"}

# OpenAI's 124M models as build-nanogpt quotes them: acc_norm by its hellaswag.py (GPT-3: the paper's Table H.1),
# loss on the FineWeb-Edu validation shard (GPT-2's tokenizer; not comparable with other text or vocabularies).
HELLASWAG_REFERENCES = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
LOSS_REFERENCES = {"GPT-2 124M": 3.2924}

# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
INK, GREY, LIGHT = "#222222", "#6f6f6f", "#e6e6e6"


# -----------------------------------------------------------------------------
# reading a log

@dataclass
class Series:
    """One logged quantity in step order; four arrays of shape (n,)."""
    steps: np.ndarray    # int64, strictly increasing
    tokens: np.ndarray   # float64, tokens trained on so far; NaN if the log does not record them
    hours: np.ndarray    # float64, total time of the training steps so far; NaN if the log does not record it
    values: np.ndarray   # float64; NaN for NaN, infinity or null

    def smoothed(self):
        """Return the values (n,) averaged over a window of a 50th of the run, as the curves show them."""
        return smooth(self.values, len(self.values) // 100)

    def x_values(self, x):
        """Return the positions (n,) on the axis x: steps, tokens or hours."""
        return getattr(self, x).astype(float)


@dataclass
class LoggedRun:
    """The log of one run: Series by their names in metrics.jsonl ("loss", "val_loss", ...), if they were logged."""
    name: str
    path: Path                 # the log that was read
    series: dict[str, Series]
    skipped: int = 0           # unreadable lines, not counting an incomplete last one

    def last_step(self):
        """Return the last step in the log."""
        return int(max(s.steps[-1] for s in self.series.values()))

    def best_val(self):
        """Return (step, value) of the lowest validation loss, (-1, NaN) if there is none."""
        val = self.series.get("val_loss")
        if val is None or np.isnan(val.values).all():
            return -1, float("nan")
        best = np.nanargmin(val.values)
        return int(val.steps[best]), float(val.values[best])


def read_run(folder, tokens_per_step=TOKENS_PER_STEP):
    """Read the LoggedRun in a folder from its metrics.jsonl, or else from its log.txt (ours or build-nanogpt's).

    log.txt does not record tokens, so they are computed from `tokens_per_step`. If a resumed run logged a step twice,
    the later line counts. Raises UserError if the folder has no readable log.
    """
    folder = Path(folder)
    try:
        path = next((p for p in (folder / "metrics.jsonl", folder / "log.txt") if p.is_file()), None)
        if path is None:
            raise UserError(_no_log_message(folder))
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    partial = lines.pop()  # "" after a complete last line, else a line that is still being written
    is_json = path.suffix == ".jsonl"
    parse = _parse_json_line if is_json else _parse_text_line
    parsed = [parse(line) for line in lines if line.strip()]
    entries = [entry for entry in parsed if entry]
    skipped = len(parsed) - len(entries)
    if is_json and parse(partial):  # only its newline is missing; in log.txt the number might be cut off unnoticed
        entries.append(parse(partial))
    series = _build_series(entries, None if is_json else tokens_per_step)
    if not series.keys() & {"loss", *EVALUATED}:
        raise UserError(f"{path} holds no losses yet; wait for the run's first step, or name another folder")
    return LoggedRun(folder.resolve().name, path, series, skipped)


def read_samples(folder):
    """Return {step: texts} that a run sampled from its model at its evaluations, {} if its log has none."""
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    entries = [_parse_json_line(line) for line in lines if '"samples"' in line]
    return {entry["step"]: [str(text) for text in entry["samples"]] for entry in entries
            if entry and isinstance(entry.get("samples"), list)}


def _no_log_message(folder):
    if not folder.exists():
        return f"no folder {folder}; name the --log_dir of a run"
    if not folder.is_dir():
        return f"{folder} is a file; name the folder that holds metrics.jsonl or log.txt"
    inside = sorted({p.parent.name for pattern in ("*/metrics.jsonl", "*/log.txt") for p in folder.glob(pattern)})
    hint = f"; its folders {', '.join(inside[:5])} do" if inside else "; name the --log_dir of a run"
    return f"{folder} does not hold metrics.jsonl or log.txt{hint}"


def _parse_json_line(line):
    """Parse a line of metrics.jsonl into {"step": int, name: value, ...}; return None if it is invalid."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _is_step(entry.get("step")) else None


def _parse_text_line(line):
    """Parse a line of log.txt, such as `250 val 3.9123`, into {"step": int, name: value}; None if it is invalid."""
    try:
        step, stream, value = line.split()
        entry = {"step": int(step), LOG_TXT_NAMES.get(stream, stream): float(value)}
    except ValueError:
        return None
    return entry if _is_step(entry["step"]) else None


def _is_step(value):
    return type(value) is int and 0 <= value < 2**53


def _build_series(entries, tokens_per_step):
    """Return {name: Series} of the logged entries; tokens_per_step is None if the entries record their tokens."""
    steps = np.array([entry["step"] for entry in entries], dtype=np.int64)
    tokens = _float_array([entry.get("tokens") for entry in entries])
    series = {}
    for name in TRAINED + EVALUATED:
        present = np.array([name in entry for entry in entries], dtype=bool)
        if present.any():
            values = _float_array([entry[name] for entry in entries if name in entry])
            series[name] = _drop_superseded(steps[present], tokens[present], values)
            if tokens_per_step:
                series[name].tokens = (series[name].steps + (name in TRAINED)) * float(tokens_per_step)
    if "ms" in series:
        ms = series["ms"]
        clock = np.concatenate([[0.0], np.cumsum(np.nan_to_num(ms.values))]) / 3.6e6
        for name, s in series.items():
            s.hours = clock[np.searchsorted(ms.steps, s.steps, side="right" if name in TRAINED else "left")]
    return series


def _drop_superseded(steps, tokens, values):
    """Return a Series without entries that precede one of the same or an earlier step: a resumed run repeated them."""
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    keep = steps < later
    return Series(steps[keep], tokens[keep], np.full(keep.sum(), np.nan), values[keep])


def _float_array(values):
    """Return a float64 array (n,), with NaN for everything that is not a finite number."""
    return np.array([v if type(v) in (int, float) and abs(v) < 1e300 else None for v in values], dtype=float)


def smooth(values, half):
    """Average each value with `half` neighbours on either side, (n,) -> (n,); NaN is skipped and stays NaN.

    Near the start the window shrinks on both sides, so that the steep first drop does not shift. Near the end only its
    right side shrinks, so that the last value is an average and not a single noisy step.
    """
    n = len(values)
    finite = np.isfinite(values)
    # Not a difference of cumulative sums, because one huge spike would cost all later values their precision.
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(finite, values, 0.0), window)[half:half + n]
    counts = np.convolve(finite, window)[half:half + n]
    for i in range(min(half, n)):
        start = slice(0, 2 * i + 1)
        sums[i], counts[i] = values[start][finite[start]].sum(), finite[start].sum()
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def last_finite(values):
    """Return the last finite value, or NaN."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


# -----------------------------------------------------------------------------
# curves of runs

def draw_runs(runs, x="steps", title="", reference="auto"):
    """Draw runs into a matplotlib Figure: loss, HellaSwag, learning rate and gradient norm, if logged.

    x: steps, tokens or hours. title: "" shows the name of a single run. reference: "auto" draws the HellaSwag accuracy
    of OpenAI's 124M models, "gpt2" also GPT-2's loss on FineWeb-Edu, "none" no lines.
    Raises UserError if a run's log does not record `x`.
    """
    end = 0.0
    for run in runs:
        positions = np.concatenate([series.x_values(x) for series in run.series.values()])
        if np.isnan(positions).all():
            raise UserError(f"{run.path} does not record {x}; choose another --x")
        end = max(end, np.nanmax(positions))
    end = end or 1.0  # every run is still at step 0
    logged = {name for run in runs for name in run.series}
    panels = [[(_draw_loss, {"loss", "val_loss"}), (_draw_hellaswag, {"hella_acc", "hella_acc_norm"})],
              [(_draw_lr, {"lr"}), (_draw_grad_norm, {"grad_norm"})]]
    rows = [[draw for draw, names in row if names & logged] for row in panels]
    columns = int(np.clip(100 // (max(len(run.name) for run in runs) + 7), 1, 6))  # of run names above the panels
    name_rows = -(-len(runs) // columns)
    figure, grid = new_figure([len(row) for row in rows], heights=[3.7, 1.75], top=0.73 + 0.22 * name_rows)
    styles = _run_styles(len(runs))
    for row, axes in zip(rows, grid):
        for draw, ax in zip(row, axes):
            draw(ax, runs, styles, x, reference)
            ax.set_xlim(-0.012 * end, 1.012 * end)
            ax.locator_params(axis="x", nbins=6)
            ax.xaxis.set_major_formatter(lambda value, _: human_count(value))
    for ax in grid[-1]:
        ax.set_xlabel(X_LABELS[x], color=GREY, fontsize=9)
    _draw_header(figure, runs, styles, title, columns)
    return figure


@dataclass
class _RunStyle:
    """The colours of one run: its curves differ in colour if it is alone, else each run has one colour."""
    train: str
    val: str
    raw: float        # opacity of the raw values behind the smoothed curve; 0: not drawn
    strength: float   # opacity of the smoothed curve; below 1 where the validation loss has the same colour


def _run_styles(n):
    if n == 1:
        return [_RunStyle(COLOURS[0], COLOURS[1], raw=0.22, strength=1.0)]
    colours = COLOURS
    if n > len(COLOURS):  # no palette has so many distinct colours; a colour scale at least shows the order
        import matplotlib
        colours = [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.88, n))]
    return [_RunStyle(colour, colour, raw=0.12 if n <= 3 else 0, strength=0.6) for colour in colours[:n]]


def _draw_loss(ax, runs, styles, x, reference):
    """Draw the training loss, raw (faint) and smoothed, and the validation loss with a dot per evaluation."""
    style_axes(ax, "loss")
    curves, ends = [], []
    for run, style in zip(runs, styles):
        run_ends = []
        if "loss" in run.series:
            train = run.series["loss"]
            _draw_trained(ax, train, style, x)
            curves.append(train.values)
            run_ends.append((train.smoothed(), style.train, "normal"))
        if "val_loss" in run.series:
            val = run.series["val_loss"]
            _draw_evaluated(ax, val, style.val, x)
            curves.append(val.values)
            run_ends.append((val.values, style.val, "bold"))
        ends += run_ends if len(runs) == 1 else run_ends[-1:]  # two numbers per run would be too crowded
    lines = _reference_lines(ax, LOSS_REFERENCES, above=False) if reference == "gpt2" else []
    start = _set_y_limits(ax, curves, lines + [last_finite(values) for values, _, _ in ends])
    if start is not None:
        ax.text(0.085, 0.975, f"\u2191 from {start:.1f}", transform=ax.transAxes, va="top", color=GREY, fontsize=8.5)
    _label_ends(ax, ends, "{:#.4g}")
    kinds = [("training, smoothed", dict(color=styles[0].train, alpha=styles[0].strength, lw=1.5), "loss"),
             ("validation", dict(color=styles[0].val, lw=1.5, marker="o", ms=4), "val_loss")]
    _legend(ax, runs, kinds, "upper right")


def _draw_hellaswag(ax, runs, styles, x, reference):
    """Draw the accuracy by an ending's mean loss per token (acc_norm, the usual figure) and by its total loss (acc)."""
    style_axes(ax, "HellaSwag accuracy")
    norms, plains = [], []
    for run, style in zip(runs, styles):
        if "hella_acc" in run.series:
            acc = run.series["hella_acc"]
            _draw_evaluated(ax, acc, style.train, x, ls="--", marker="", alpha=style.strength)
            plains.append((acc.values, style.train, "normal"))
        if "hella_acc_norm" in run.series:
            norm = run.series["hella_acc_norm"]
            _draw_evaluated(ax, norm, style.val, x)
            norms.append((norm.values, style.val, "bold"))
    lines = _reference_lines(ax, HELLASWAG_REFERENCES, above=True) if reference != "none" else []
    _set_y_limits(ax, [values for values, _, _ in norms + plains], lines, share=1.0)
    _label_ends(ax, norms + plains if len(runs) == 1 else norms or plains, "{:.4f}")
    kinds = [("acc_norm", dict(color=styles[0].val, lw=1.5, marker="o", ms=4), "hella_acc_norm"),
             ("acc", dict(color=styles[0].train, lw=1.5, ls="--", alpha=styles[0].strength), "hella_acc")]
    _legend(ax, runs, kinds, "lower right")


def _draw_lr(ax, runs, styles, x, reference):
    style_axes(ax, "learning rate")
    for run, style in zip(runs, styles):
        if "lr" in run.series:
            lr = run.series["lr"]
            ax.plot(*_downsample(lr.x_values(x), lr.values), color=style.train, lw=1.5, alpha=style.strength)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")


def _draw_grad_norm(ax, runs, styles, x, reference):
    style_axes(ax, "gradient norm")
    curves, ends = [], []
    for run, style in zip(runs, styles):
        if "grad_norm" in run.series:
            norm = run.series["grad_norm"]
            _draw_trained(ax, norm, style, x)
            curves.append(norm.values)
            ends.append((norm.smoothed(), style.train, "normal"))
    _set_y_limits(ax, curves, [0.0] + [last_finite(values) for values, _, _ in ends])
    if len(runs) <= 4:  # the norms of more runs overlap
        _label_ends(ax, ends, "{:.3g}")


# -----------------------------------------------------------------------------
# pieces of a panel

def _draw_trained(ax, series, style, x):
    """Draw a quantity logged at every training step, raw (faint) and smoothed."""
    positions = series.x_values(x)
    if style.raw:
        ax.plot(*_downsample(positions, series.values), color=style.train, alpha=style.raw, lw=0.6, zorder=2)
    ax.plot(*_downsample(positions, series.smoothed()), color=style.train, alpha=style.strength, lw=1.5, zorder=3)


def _draw_evaluated(ax, series, colour, x, **look):
    """Draw a quantity measured at evaluations, with a dot each."""
    dots = dict(marker="o", ms=4, mec="white", mew=0.5) if len(series.values) <= 50 else dict(marker="o", ms=2.2)
    ax.plot(series.x_values(x), series.values, **{**dict(color=colour, lw=1.5, zorder=4), **dots, **look})


def _downsample(x, y, bins=2000):
    """Reduce a curve to at most 2 * bins points: the lowest and highest of each bin, so that no spike is lost."""
    if len(y) <= 2 * bins:
        return x, y
    parts = np.array_split(np.arange(len(y)), bins)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    keep = sorted({i for part in parts for i in (part[low[part].argmin()], part[high[part].argmax()])})
    return x[keep], y[keep]


def _set_y_limits(ax, curves, must_show, share=0.95):
    """Set the y axis to the interesting range; return the highest first value if it is cut off, else None.

    A loss falls from 11 to 4 in a twentieth of a run and from 4 to 3 in the rest. If the upper twentieth of the values
    (or a spike) would take more than half of the height, it is cut off, except for values in `must_show`.
    """
    curves = [values[np.isfinite(values)] for values in curves]
    curves = [values for values in curves if len(values)]
    shown = [value for value in must_show if np.isfinite(value)]
    if not curves:
        return None
    low = min([np.quantile(values, 0.002) for values in curves] + shown)
    high = max([values.max() for values in curves] + shown)
    body = max([np.quantile(values, share) for values in curves] + shown)
    if body - low < 0.5 * (high - low):
        high = body
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - room if low else 0, high + room)  # an axis that starts at 0 has no margin below
    start = max(values[0] for values in curves)
    return start if start > high + room else None


def _reference_lines(ax, references, above):
    """Draw a labelled horizontal line per reference, labels away from the curves' start; return the lines' heights."""
    for name, value in references.items():
        ax.axhline(value, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
        ax.annotate(f"{name}  {value:g}", (0.015 if above else 0.2, value), xycoords=("axes fraction", "data"),
                    color=GREY, fontsize=8.5, xytext=(0, 3 if above else -3), textcoords="offset points",
                    va="bottom" if above else "top")
    return list(references.values())


def _label_ends(ax, ends, form):
    """Write the last finite value of each (values, colour, weight) to the right of the axes, without overlaps."""
    ends = sorted((last_finite(values), colour, weight) for values, colour, weight in ends)
    ends = [end for end in ends if np.isfinite(end[0])]
    low, high = ax.get_ylim()
    line = 0.145 / (ax.get_position().height * ax.figure.get_figheight())  # 0.145 inches, in units of the axes
    stack = line * np.arange(len(ends))
    wanted = np.array([(value - low) / (high - low) for value, _, _ in ends]) - stack
    # Pushing labels up from below or down from above keeps them a line apart, and so does the average of the two.
    places = (np.maximum.accumulate(wanted) + np.minimum.accumulate(wanted[::-1])[::-1]) / 2 + stack
    for (value, colour, weight), place in zip(ends, places):
        ax.annotate(form.format(value), (1, place), xycoords="axes fraction", xytext=(5, 0),
                    textcoords="offset points", va="center", color=colour, weight=weight, fontsize=9)


def _legend(ax, runs, kinds, place):
    """Draw a legend of the kinds of curves (label, line style, series name), in grey if colours stand for runs."""
    from matplotlib.lines import Line2D
    kinds = [(label, look if len(runs) == 1 else {**look, "color": GREY}) for label, look, name in kinds
             if any(name in run.series for run in runs)]
    ax.legend([Line2D([], [], **look) for _, look in kinds], [label for label, _ in kinds], loc=place, fontsize=8.5,
              labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.85, borderaxespad=0.3)


# -----------------------------------------------------------------------------
# pieces of a figure

def new_figure(columns, heights, width=11.0, top=0.7):
    """Return (Figure, rows of axes): columns[i] equal axes in row i, heights[i] inches tall; empty rows are omitted."""
    from matplotlib.figure import Figure
    left, right, between, bottom, below = 0.75, 0.75, 1.35, 0.6, 0.6  # inches
    full = [(n, h) for n, h in zip(columns, heights) if n]
    height = top + sum(h for _, h in full) + below * (len(full) - 1) + bottom
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    grid, y = [], height - top
    for n, h in full:
        w = (width - left - right - between * (n - 1)) / n
        grid.append([figure.add_axes([(left + i * (w + between)) / width, (y - h) / height, w / width, h / height])
                     for i in range(n)])
        y -= h + below
    return figure, grid


def style_axes(ax, title):
    """Style axes plainly: a light grid, no box, a left-aligned title instead of a rotated y label."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", pad=7)
    ax.grid(color=LIGHT, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=GREY, labelsize=8.5, length=0, which="both")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#bbbbbb")


def _draw_header(figure, runs, styles, title, columns):
    """Draw the title, and below it the subtitle of a single run or the names of several in their colours."""
    from matplotlib.lines import Line2D
    left, height = figure.axes[0].get_position().x0, figure.get_figheight()
    if title or len(runs) == 1:
        figure.text(left, 1 - 0.32 / height, shorten(title or runs[0].name, 70), fontsize=15, weight="bold", color=INK,
                    parse_math=False)
    if len(runs) == 1:
        figure.text(left, 1 - 0.53 / height, run_subtitle(runs[0]), fontsize=9.5, color=GREY)
        return
    lines = [Line2D([], [], color=style.val, lw=3) for style in styles]
    legend = figure.legend(lines, [shorten(run.name, 90) for run in runs], loc="upper left", ncols=columns,
                           bbox_to_anchor=(left, 1 - (0.44 if title else 0.3) / height), frameon=False, fontsize=10,
                           labelcolor=INK, handlelength=1.2, borderpad=0, borderaxespad=0, columnspacing=1.8)
    for name in legend.get_texts():
        name.set_parse_math(False)


def run_subtitle(run):
    """Return steps, tokens, hours and best validation loss of a run in one line, if its log has them."""
    last = max(run.series.values(), key=lambda s: s.steps[-1])
    facts = [f"{run.last_step():,} steps"]
    if np.isfinite(last.tokens[-1]):
        facts.append(f"{human_count(last.tokens[-1])} tokens")
    if np.isfinite(last.hours[-1]):
        facts.append(f"{last.hours[-1]:.1f} hours" if last.hours[-1] >= 1 else f"{60 * last.hours[-1]:.1f} minutes")
    if np.isfinite(run.best_val()[1]):
        facts.append("best validation loss {1:.4f} at step {0:,}".format(*run.best_val()))
    return "  ·  ".join(facts)


def shorten(text, length):
    """Return the text, cut to `length` characters with an ellipsis if it is longer."""
    return text if len(text) <= length else text[:length - 1] + "\u2026"


def save_figure(figure, path):
    """Write a figure atomically as .png or .svg, by the suffix of the path. Raises UserError if that fails."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot write {path}: the file name must end in {' or '.join(FORMATS)}")
    with atomic_write(path) as f:
        figure.savefig(f, format=path.suffix.lower()[1:])
