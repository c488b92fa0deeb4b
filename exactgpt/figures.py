"""What runs logged, read back as NumPy arrays, and figures of it: numbers in, matplotlib figures out. No torch.

metrics.jsonl is read, or log.txt in build-nanogpt's three columns. Figures are made without pyplot: no display and no
global state, so that a page may draw in several threads. matplotlib is imported where it draws, which keeps the start
of the scripts that draw last short.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exactgpt.config import UserError, atomic_write, human_count, human_rate

TOKENS_PER_STEP = 524288   # of a log.txt, which does not say: those of build-nanogpt's runs
EVALUATED = ("val_loss", "hella_acc_norm", "hella_acc")  # measured at step k before it is trained
TRAINED = ("loss", "lr", "grad_norm", "ms", "tok_per_sec", "mfu", "data_wait_ms", "peak_mem_gb")
LOG_TXT_NAMES = {"train": "loss", "val": "val_loss", "hella": "hella_acc_norm"}
FORMATS = (".png", ".svg")
X_LABELS = {"steps": "steps", "tokens": "training tokens", "hours": "hours of training"}

# OpenAI's 124M models as build-nanogpt quotes them: acc_norm by its hellaswag.py (GPT-3: the paper's Table H.1),
# loss on the FineWeb-Edu validation shard (GPT-2's tokenizer; comparable with no other text or vocabulary).
HELLASWAG_REFERENCES = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
LOSS_REFERENCES = {"GPT-2 124M": 3.2924}

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
INK, GREY, LIGHT = "#222222", "#6f6f6f", "#e6e6e6"


# -----------------------------------------------------------------------------
# reading a log

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


# -----------------------------------------------------------------------------
# curves of runs

def draw_runs(runs, x="steps", title="", reference="auto"):
    """A matplotlib Figure of any number of runs: loss, HellaSwag, learning rate, gradient norm; what was logged.

    x: steps, tokens or hours. title: "" is the name of a single run. reference: "auto" draws OpenAI's 124M models
    into HellaSwag, "gpt2" the loss of GPT-2 on FineWeb-Edu besides, "none" nothing.
    Raises UserError where a run's log does not hold `x`.
    """
    end = 0.0
    for run in runs:
        along = np.concatenate([series.along(x) for series in run.series.values()])
        if np.isnan(along).all():
            raise UserError(f"{run.path} does not tell the {x} of its steps; choose another --x")
        end = max(end, np.nanmax(along))
    end = end or 1.0  # a run that has only begun is at 0
    logged = {name for run in runs for name in run.series}
    panels = [[(_draw_loss, {"loss", "val_loss"}), (_draw_hellaswag, {"hella_acc", "hella_acc_norm"})],
              [(_draw_lr, {"lr"}), (_draw_grad_norm, {"grad_norm"})]]
    rows = [[draw for draw, names in row if names & logged] for row in panels]
    columns = int(np.clip(100 // (max(len(run.name) for run in runs) + 7), 1, 6))  # of names above the figure
    name_rows = -(-len(runs) // columns)
    figure, grid = new_figure([len(row) for row in rows], heights=[3.7, 1.75], top=0.73 + 0.22 * name_rows)
    styles = _styles(len(runs))
    for row, axes in zip(rows, grid):
        for draw, ax in zip(row, axes):
            draw(ax, runs, styles, x, reference)
            ax.set_xlim(-0.012 * end, 1.012 * end)
            ax.locator_params(axis="x", nbins=6)
            ax.xaxis.set_major_formatter(lambda value, _: human_count(value))
    for ax in grid[-1]:
        ax.set_xlabel(X_LABELS[x], color=GREY, fontsize=9)
    _head(figure, runs, styles, title, columns)
    return figure


@dataclass
class _Style:
    """How one run looks: a lone run's curves differ in colour, several runs differ from each other."""
    train: str
    val: str
    raw: float        # opacity of the values as logged, behind the smoothed curve
    strength: float   # opacity of the smoothed curve; full where no run's validation loss has the same colour


def _styles(n):
    if n == 1:
        return [_Style(COLOURS[0], COLOURS[1], raw=0.22, strength=1.0)]
    colours = COLOURS
    if n > len(COLOURS):  # no palette has that many colours that stay apart; a scale at least keeps their order
        import matplotlib
        colours = [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.88, n))]
    return [_Style(colour, colour, raw=0.12 if n <= 3 else 0, strength=0.6) for colour in colours[:n]]


def _draw_loss(ax, runs, styles, x, reference):
    """Training loss as logged (faint) and smoothed, validation loss with a dot per evaluation."""
    quiet_axes(ax, "loss")
    curves, ends = [], []
    for run, style in zip(runs, styles):
        own = []
        if "loss" in run.series:
            train = run.series["loss"]
            _draw_trained(ax, train, style, x)
            curves.append(train.values)
            own.append((train.smoothed(), style.train, "normal"))
        if "val_loss" in run.series:
            val = run.series["val_loss"]
            _draw_evaluated(ax, val, style.val, x)
            curves.append(val.values)
            own.append((val.values, style.val, "bold"))
        ends += own if len(runs) == 1 else own[-1:]  # both numbers of many runs would be a thicket
    lines = _reference_lines(ax, LOSS_REFERENCES, above=False) if reference == "gpt2" else []
    start = _limit(ax, curves, lines + [last_finite(values) for values, _, _ in ends])
    if start is not None:
        ax.text(0.085, 0.975, f"\u2191 from {start:.1f}", transform=ax.transAxes, va="top", color=GREY, fontsize=8.5)
    _label_ends(ax, ends, "{:#.4g}")
    kinds = [("training, smoothed", dict(color=styles[0].train, alpha=styles[0].strength, lw=1.5), "loss"),
             ("validation", dict(color=styles[0].val, lw=1.5, marker="o", ms=4), "val_loss")]
    _legend(ax, runs, kinds, "upper right")


def _draw_hellaswag(ax, runs, styles, x, reference):
    """Accuracy by the mean loss per token of an ending (acc_norm, the one that is quoted), and by its sum (acc)."""
    quiet_axes(ax, "HellaSwag accuracy")
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
    _limit(ax, [values for values, _, _ in norms + plains], lines, share=1.0)
    _label_ends(ax, norms + plains if len(runs) == 1 else norms or plains, "{:.4f}")
    kinds = [("acc_norm", dict(color=styles[0].val, lw=1.5, marker="o", ms=4), "hella_acc_norm"),
             ("acc", dict(color=styles[0].train, lw=1.5, ls="--", alpha=styles[0].strength), "hella_acc")]
    _legend(ax, runs, kinds, "lower right")


def _draw_lr(ax, runs, styles, x, reference):
    quiet_axes(ax, "learning rate")
    for run, style in zip(runs, styles):
        if "lr" in run.series:
            lr = run.series["lr"]
            ax.plot(*_thin(lr.along(x), lr.values), color=style.train, lw=1.5, alpha=style.strength)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: human_rate(value))


def _draw_grad_norm(ax, runs, styles, x, reference):
    quiet_axes(ax, "gradient norm")
    curves, ends = [], []
    for run, style in zip(runs, styles):
        if "grad_norm" in run.series:
            norm = run.series["grad_norm"]
            _draw_trained(ax, norm, style, x)
            curves.append(norm.values)
            ends.append((norm.smoothed(), style.train, "normal"))
    _limit(ax, curves, [0.0] + [last_finite(values) for values, _, _ in ends])
    if len(runs) <= 4:  # of more the norms lie upon each other
        _label_ends(ax, ends, "{:.3g}")


# -----------------------------------------------------------------------------
# pieces of a panel

def _draw_trained(ax, series, style, x):
    """A quantity of every training step: faint as logged, and smoothed."""
    along = series.along(x)
    if style.raw:
        ax.plot(*_thin(along, series.values), color=style.train, alpha=style.raw, lw=0.6, zorder=2)
    ax.plot(*_thin(along, series.smoothed()), color=style.train, alpha=style.strength, lw=1.5, zorder=3)


def _draw_evaluated(ax, series, colour, x, **look):
    """A quantity of evaluations: a dot each."""
    dots = dict(marker="o", ms=4, mec="white", mew=0.5) if len(series.values) <= 50 else dict(marker="o", ms=2.2)
    ax.plot(series.along(x), series.values, **{**dict(color=colour, lw=1.5, zorder=4), **dots, **look})


def _thin(x, y, bins=2000):
    """At most 2 * bins points of a long curve: the lowest and highest of each bin, so no spike is lost."""
    if len(y) <= 2 * bins:
        return x, y
    parts = np.array_split(np.arange(len(y)), bins)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    pick = sorted({i for part in parts for i in (part[low[part].argmin()], part[high[part].argmax()])})
    return x[pick], y[pick]


def _limit(ax, curves, must_show, share=0.95):
    """Set the y axis to what matters; returns the highest first value where that is above the frame, else None.

    A loss falls from 11 to 4 in a twentieth of a run and from 4 to 3 in the rest. Where the upper twentieth of the
    values (or a spike) would take more than half of the height it is cut off, `must_show` excepted.
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
    ax.set_ylim(low - room if low else 0, high + room)  # an axis from 0 stands on 0
    start = max(values[0] for values in curves)
    return start if start > high + room else None


def _reference_lines(ax, references, above):
    """Draw a named horizontal line per reference, the name on the side where curves come later; returns heights."""
    for name, value in references.items():
        ax.axhline(value, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
        ax.annotate(f"{name}  {value:g}", (0.015 if above else 0.2, value), xycoords=("axes fraction", "data"),
                    color=GREY, fontsize=8.5, xytext=(0, 3 if above else -3), textcoords="offset points",
                    va="bottom" if above else "top")
    return list(references.values())


def _label_ends(ax, ends, form):
    """Write the last finite value of each (values, colour, weight) right of the axes, none upon another."""
    ends = sorted((last_finite(values), colour, weight) for values, colour, weight in ends)
    ends = [end for end in ends if np.isfinite(end[0])]
    low, high = ax.get_ylim()
    line = 0.145 / (ax.get_position().height * ax.figure.get_figheight())  # inches of text, of the axes' height
    stack = line * np.arange(len(ends))
    wanted = np.array([(value - low) / (high - low) for value, _, _ in ends]) - stack
    # Pushed up from below, and pushed down from above, they stand a line apart: so does the middle of the two.
    places = (np.maximum.accumulate(wanted) + np.minimum.accumulate(wanted[::-1])[::-1]) / 2 + stack
    for (value, colour, weight), place in zip(ends, places):
        ax.annotate(form.format(value), (1, place), xycoords="axes fraction", xytext=(5, 0),
                    textcoords="offset points", va="center", color=colour, weight=weight, fontsize=9)


def _legend(ax, runs, kinds, place):
    """Name the kinds of curves (label, line style, name of the series); grey where colours stand for runs."""
    from matplotlib.lines import Line2D
    kinds = [(label, look if len(runs) == 1 else {**look, "color": GREY}) for label, look, name in kinds
             if any(name in run.series for run in runs)]
    ax.legend([Line2D([], [], **look) for _, look in kinds], [label for label, _ in kinds], loc=place, fontsize=8.5,
              labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.85, borderaxespad=0.3)


# -----------------------------------------------------------------------------
# pieces of a figure

def new_figure(columns, heights, width=11.0, top=0.7):
    """A Figure with rows of axes: columns[i] equal ones in row i, `heights` inches tall; empty rows take no room."""
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


def quiet_axes(ax, title):
    """Quiet axes: a light grid, no box, the title at the left in place of a turned label."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", pad=7)
    ax.grid(color=LIGHT, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=GREY, labelsize=8.5, length=0, which="both")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#bbbbbb")


def _head(figure, runs, styles, title, columns):
    """The title; under it the facts of a lone run, or the names of several in their colours."""
    from matplotlib.lines import Line2D
    left, height = figure.axes[0].get_position().x0, figure.get_figheight()
    if title or len(runs) == 1:
        figure.text(left, 1 - 0.32 / height, shorten(title or runs[0].name, 70), fontsize=15, weight="bold", color=INK,
                    parse_math=False)
    if len(runs) == 1:
        figure.text(left, 1 - 0.53 / height, describe(runs[0]), fontsize=9.5, color=GREY)
        return
    lines = [Line2D([], [], color=style.val, lw=3) for style in styles]
    legend = figure.legend(lines, [shorten(run.name, 90) for run in runs], loc="upper left", ncols=columns,
                           bbox_to_anchor=(left, 1 - (0.44 if title else 0.3) / height), frameon=False, fontsize=10,
                           labelcolor=INK, handlelength=1.2, borderpad=0, borderaxespad=0, columnspacing=1.8)
    for name in legend.get_texts():
        name.set_parse_math(False)


def describe(run):
    """The facts of a run in a line: steps, tokens, hours, best validation loss; those that its log tells."""
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
    """The text, its end an ellipsis where it is longer than `length` characters."""
    return text if len(text) <= length else text[:length - 1] + "\u2026"


def save_figure(figure, path):
    """Write a figure as .png or .svg, by the suffix of the path, atomically. Raises UserError where that fails."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot write {path}: the file's name must end in {' or '.join(FORMATS)}")
    try:
        with atomic_write(path) as f:
            figure.savefig(f, format=path.suffix.lower()[1:])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
