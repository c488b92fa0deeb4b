"""Read the logs of runs into NumPy arrays and draw them with matplotlib. No torch.

Logs are metrics.jsonl, or log.txt in build-nanogpt's three columns. Figures do not use pyplot: no display and no global
state, so that app.py may draw in several threads. Scripts draw last, so matplotlib is imported late: they start faster.
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exactgpt import launch
from exactgpt.config import UserError, counted, human_count, human_time
from exactgpt.files import atomic_write, reading

TOKENS_PER_STEP = 524288   # build-nanogpt's, for a log.txt, which does not record it
TRAINED = ("loss", "lr", "grad_norm", "ms")
EVALUATED = ("val_loss", "val_bpb", "hella_acc_norm", "hella_acc")  # measured at step k before training it
LOG_TXT_NAMES = {"train": "loss", "val": "val_loss", "hella": "hella_acc_norm"}
X_LABELS = {"steps": "steps", "tokens": "training tokens", "hours": "hours of training"}

# What the panels show, how that looks, and the rows of panels by their heights in inches.
PANELS = {"loss": ("loss", "val_loss"), "HellaSwag accuracy": ("hella_acc", "hella_acc_norm"),
          "bits per byte": ("val_bpb",), "learning rate": ("lr",), "gradient norm": ("grad_norm",)}
DOTS = dict(marker="o", ms=4, mec="white", mew=0.5, zorder=4)
LOOKS = {"loss": dict(label="training, smoothed"), "val_loss": dict(label="validation", **DOTS), "val_bpb": DOTS,
         "hella_acc": dict(label="acc", ls="--"), "hella_acc_norm": dict(label="acc_norm", **DOTS), "lr": {},
         "grad_norm": {}}
NOISY = ("loss", "grad_norm")      # drawn raw (faint) and smoothed
ROWS = {3.7: ("loss", "HellaSwag accuracy"), 1.75: ("bits per byte", "learning rate", "gradient norm")}
GAP = 0.142                # between two panels, as a share of the width of a row
FACTS = {"loss": "train {:.4f}", "val_loss": "val {:.4f} at step {:,}", "val_bpb": "{:.4f} bits per byte",
         "hella_acc_norm": "HellaSwag {:.4f}"}

# OpenAI's 124M models as build-nanogpt quotes them: acc_norm by its hellaswag.py (GPT-3: the paper's Table H.1),
# loss on the FineWeb-Edu validation shard (GPT-2's tokenizer; not comparable with other text or vocabularies).
HELLASWAG = {"HellaSwag accuracy": {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}}
REFERENCES = {"auto": HELLASWAG, "gpt2": {**HELLASWAG, "loss": {"GPT-2 124M": 3.2924}}, "none": {}}

# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
SIGNED = {".png": "Software", ".svg": "Title"}      # suffix -> where a figure says that it is ours
INK, GREY, LIGHT = "#222222", "#6f6f6f", "#e6e6e6"


# ---- reading a log -----------------------------------------------------------

@dataclass
class Series:
    """One logged quantity in step order; four arrays of shape (n,)."""
    steps: np.ndarray    # int64, strictly increasing
    tokens: np.ndarray   # float64, tokens trained on so far; NaN if the log does not record them
    hours: np.ndarray    # float64, total time of the training steps so far; NaN if the log does not record it
    values: np.ndarray   # float64; NaN for NaN, infinity or null


@dataclass
class LoggedRun:
    """The log of one run: Series by their names in metrics.jsonl ("loss", "val_loss", ...), if they were logged."""
    name: str
    path: Path                 # the log that was read
    series: dict[str, Series]
    samples: dict[int, list[str]] = field(default_factory=dict)    # step -> texts that the model wrote
    skipped: int = 0           # unreadable lines, not counting an incomplete last one

    def shown(self, name):
        """Return a quantity's values (n,) as its curve shows them: averaged over a 50th of the run if noisy."""
        values = self.series[name].values
        return smooth(values, len(values) // 100) if name in NOISY else values

    def facts(self):
        """Return a list of short texts: how long the run was, its last and best values, if its log has them."""
        last = max(self.series.values(), key=lambda s: s.steps[-1])
        facts = [counted(last.steps[-1], "step")]
        if np.isfinite(last.tokens[-1]):
            facts.append(f"{human_count(last.tokens[-1])} tokens")
        if np.isfinite(last.hours[-1]):
            facts.append(human_time(3600 * last.hours[-1]))
        best_fact = []
        for name, form in FACTS.items():
            if name in self.series and np.isfinite(self.series[name].values).any():
                values, steps = self.shown(name), self.series[name].steps
                end = np.flatnonzero(np.isfinite(values))[-1]
                facts.append(form.format(values[end], steps[end]))
                best = np.nanargmin(values)
                if name == "val_loss" and best != end:
                    best_fact = ["best " + form.format(values[best], steps[best])]
        facts += best_fact      # apart from the last values
        if self.skipped:
            facts.append(f"{counted(self.skipped, 'unreadable line')} skipped")
        return facts


def read_run(folder, tokens_per_step=TOKENS_PER_STEP):
    """Read the LoggedRun in a folder from metrics.jsonl, else log.txt (ours or build-nanogpt's). Raises UserError."""
    # log.txt does not record tokens, so they are computed from `tokens_per_step`.
    folder, names = Path(folder), ("metrics.jsonl", "log.txt")
    with reading(folder):
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            inside = sorted({p.parent.name for name in names for p in folder.glob(f"*/{name}")})
            raise UserError(f"no metrics.jsonl or log.txt in {folder}" + (
                f", but in its folders {', '.join(inside[:5])}" if inside else "; name the --log_dir of a run"))
    with reading(path):
        *lines, partial = path.read_text(encoding="utf-8", errors="replace").split("\n")
    is_json = path.suffix == ".jsonl"
    parsed = [parse_line(line, is_json) for line in lines if line.strip()]
    skipped = parsed.count(None)
    if is_json:      # it may lack only its newline; in log.txt it may lack digits, unnoticed
        parsed.append(parse_line(partial, is_json))
    entries = [entry for entry in parsed if entry]
    series = _build_series(entries, None if is_json else tokens_per_step)
    if not series.keys() & {"loss", *EVALUATED}:
        raise UserError(f"{path} holds no losses yet; wait for the run's first step, or name another folder")
    samples = {entry["step"]: [text for text in entry["samples"] if isinstance(text, str)] for entry in entries
               if isinstance(entry.get("samples"), list)}
    return LoggedRun(folder.resolve().name, path, series, samples, skipped)


def parse_line(line, is_json=True):
    """Parse a line of metrics.jsonl, or of log.txt (`250 val 3.9123`), into {"step": int, name: value, ...} or None."""
    try:
        if is_json:
            entry = json.loads(line)
        else:
            step, stream, value = line.split()
            entry = {"step": int(step), LOG_TXT_NAMES.get(stream, stream): float(value)}
        return entry if type(entry["step"]) is int and 0 <= entry["step"] < 2**53 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _build_series(entries, tokens_per_step):
    """Return {name: Series} of the logged entries; tokens_per_step is None if the entries record their tokens."""
    def finite(name):
        values = [entry.get(name) for entry in kept]
        return np.array([v if type(v) in (int, float) and abs(v) < 1e300 else None for v in values], dtype=float)
    series = {}
    for name in TRAINED + EVALUATED:
        kept = []
        for entry in reversed(entries):    # backward: a resumed run's lines count, not the same and later steps before
            if name in entry and (not kept or entry["step"] < kept[-1]["step"]):
                kept.append(entry)
        if kept:
            kept.reverse()
            steps = np.array([entry["step"] for entry in kept])
            tokens = (steps + (name in TRAINED)) * float(tokens_per_step) if tokens_per_step else finite("tokens")
            series[name] = Series(steps, tokens, np.full(len(steps), np.nan), finite(name))
    if "ms" in series:
        ms = series["ms"]
        clock = np.concatenate([[0.0], np.cumsum(np.nan_to_num(ms.values))]) / 3.6e6
        for name, s in series.items():
            s.hours = clock[np.searchsorted(ms.steps, s.steps, side="right" if name in TRAINED else "left")]
    return series


def smooth(values, half):
    """Average each value with `half` neighbours on either side, (n,) -> (n,); NaN is skipped and stays NaN."""
    # Near the start the window shrinks on both sides, so that the steep first drop does not shift. Near the end only
    # its right side shrinks, so that the last value is an average and not a single noisy step.
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


# ---- drawing -----------------------------------------------------------------

def draw_runs(runs, x="steps", title="", reference="auto"):
    """Draw runs into a matplotlib Figure: loss, HellaSwag, bits per byte, learning rate, gradient norm, if logged.

    x: steps, tokens or hours. title: "" shows the name of a single run. reference: "auto" draws the HellaSwag accuracy
    of OpenAI's 124M models, "gpt2" also GPT-2's loss on FineWeb-Edu, "none" no lines.
    Raises UserError if a run's log does not record `x`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    for run in runs:
        if all(np.isnan(getattr(series, x)).all() for series in run.series.values()):
            raise UserError(f"{run.path} does not record {x}; choose another --x")
    logged = {name for run in runs for name in run.series}
    rows = {height: [panel for panel in row if logged & set(PANELS[panel])] for height, row in ROWS.items()}
    rows = {height: row for height, row in rows.items() if row}
    n = math.lcm(*map(len, rows.values()))      # columns of the grid: the panels of a row share its width equally
    columns = int(np.clip(100 // (max(len(run.name) for run in runs) + 7), 1, 6))  # of run names above the panels
    top = 0.73 + 0.22 * -(-len(runs) // columns)
    height = top + sum(rows) + 0.6 * len(rows)
    alone, left = len(runs) == 1, 0.068
    figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
    axes = figure.subplot_mosaic([[p for p in row for _ in range(n // len(row))] for row in rows.values()], sharex=True,
                                 height_ratios=list(rows),
                                 gridspec_kw=dict(left=left, right=1 - left, wspace=n * GAP / (1 - (n - 1) * GAP),
                                                  top=1 - top / height, bottom=0.6 / height, hspace=0.22))
    # No palette has more distinct colours; a colour scale at least shows the order.
    colours = COLOURS if len(runs) <= len(COLOURS) else colormaps["viridis"](np.linspace(0, 0.88, len(runs)))
    for panel, ax in axes.items():
        style_axes(ax, panel)
        _draw_panel(ax, PANELS[panel], runs, colours, x, REFERENCES[reference].get(panel, {}))
        ax.margins(x=0.012)
        ax.locator_params(axis="x", nbins=6)
        ax.xaxis.set_major_formatter(lambda value, _: human_count(value))
        ax.tick_params(labelbottom=True)
        if panel in list(rows.values())[-1]:
            ax.set_xlabel(X_LABELS[x], color=GREY, fontsize=9)
    heading = title or (runs[0].name if alone else "")
    figure.text(left, 1 - 0.32 / height, shorten(heading, 70), size=15, weight="bold", color=INK, parse_math=False)
    if alone:
        facts = "  ·  ".join(runs[0].facts())
        figure.text(left, 1 - 0.53 / height, facts, size=min(9.5, 1380 / len(facts)), color=GREY)     # many: smaller
    else:
        figure.legend([Line2D([], [], color=colour, lw=3) for _, colour in zip(runs, colours)],
                      [shorten(run.name, 90).replace("$", r"\$") for run in runs], loc="upper left", ncols=columns,
                      bbox_to_anchor=(left, 1 - (0.44 if heading else 0.3) / height), frameon=False, fontsize=10,
                      labelcolor=INK, handlelength=1.2, borderpad=0, borderaxespad=0, columnspacing=1.8)
    return figure


def _draw_panel(ax, names, runs, colours, x, references):
    """Draw the quantities `names` of the runs, with the last values beside the axes and a line per reference."""
    # The curves of a single run differ in colour, else each run has one colour and its first quantity is paler.
    curves, ends, alone = [], [], len(runs) == 1
    form = "{:.2g}".format if names == ("lr",) else "{:#.4g}".format
    for run, run_colour in zip(runs, colours):
        run_ends = []
        for k, name in enumerate(names):
            if name not in run.series:
                continue
            series, shown, colour = run.series[name], run.shown(name), COLOURS[k] if alone else run_colour
            positions, finite = getattr(series, x), np.isfinite(series.values)
            if name in NOISY and len(runs) <= 3:
                ax.plot(positions, series.values, color=colour, alpha=0.22 if alone else 0.12, lw=0.6)
            [line] = ax.plot(positions, shown, color=colour, lw=1.5, alpha=1.0 if alone or k else 0.6, **LOOKS[name])
            if len(shown) > 50:
                line.set(markersize=3, markeredgewidth=0)
            if finite.any():
                curves.append(series.values[finite])
                value = shown[finite][-1]
                if alone and name in ("val_loss", "val_bpb"):      # others end at the run's last step
                    run_ends.append((value, f"step {series.steps[finite][-1]:,}", colour, "normal", 7.5))
                run_ends.append((value, form(value), colour, "bold" if k else "normal", 9))
        ends += run_ends if alone else run_ends[-1:]    # two numbers per run would be too crowded
    for name, value in references.items():
        ax.axhline(value, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
        ax.annotate(f"{name}  {value:g}", (0.015, value), xycoords=("axes fraction", "data"), color=GREY, fontsize=8.5,
                    xytext=(0, 3), textcoords="offset points")
    if names == ("lr",):
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    if len(names) > 1:
        handles = {line.get_label(): line for line in ax.get_legend_handles_labels()[0]}
        legend = ax.legend(handles.values(), handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False,
                           fontsize=8.5, labelcolor=INK, borderaxespad=0.1)
        for line in legend.get_lines() if not alone else []:
            line.set_color(GREY)
    zero = [0.0] if names in (("lr",), ("grad_norm",)) else []
    if curves:
        _set_y_limits(ax, curves, [*references.values(), *zero, *[end[0] for end in ends]])
        _label_ends(ax, sorted(ends, key=lambda end: end[0]))


def _set_y_limits(ax, curves, must_show):
    """Set the y axis to the interesting range of curves, arrays (n,) of finite values."""
    # A loss falls from 11 to 4 in a twentieth of a run and from 4 to 3 in the rest. If the upper twentieth of the
    # values (or a spike) would take more than half of the height, it is cut off, except for values in `must_show`.
    low = min([np.quantile(values, 0.002) for values in curves] + must_show)
    high = max([values.max() for values in curves] + must_show)
    body = max([np.quantile(values, 0.95) for values in curves] + must_show)
    if body - low < 0.5 * (high - low):
        high = body
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - room if low else 0, high + room)  # an axis that starts at 0 has no margin below
    start = max(values[0] for values in curves)
    if start > high + room:
        ax.text(0.12, 0.975, f"\u2191 from {start:.1f}", transform=ax.transAxes, va="top", color=GREY, fontsize=8.5)


def _label_ends(ax, ends):
    """Write the text of each (value, text, colour, weight, size), lowest first, right of the axes, without overlaps."""
    low, high = ax.get_ylim()
    line = 0.145 / (ax.get_position().height * ax.figure.get_figheight())  # 0.145 inches, in units of the axes
    if line * len(ends) > 0.5:
        return
    stack = line * np.arange(len(ends))
    wanted = np.array([(value - low) / (high - low) for value, *_ in ends]) - stack
    wanted = np.maximum(wanted, line / 2)      # above the labels of the x axis
    # Pushing labels up from below or down from above keeps them a line apart, and so does the average of the two.
    places = (np.maximum.accumulate(wanted) + np.minimum.accumulate(wanted[::-1])[::-1]) / 2 + stack
    for (_, text, colour, weight, size), place in zip(ends, places):
        ax.annotate(text, (1, place), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
                    va="center", color=colour, weight=weight, fontsize=size)


def style_axes(ax, title):
    """Style axes plainly: a light grid, no box, a left-aligned title instead of a rotated y label."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", pad=7)
    ax.grid(color=LIGHT, lw=0.8)
    ax.tick_params(colors=GREY, labelsize=8.5, length=0, which="both")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#bbbbbb")


def shorten(text, length):
    """Return the text, cut to `length` characters with an ellipsis if it is longer, and without undecoded bytes."""
    text = launch.printable(text)
    return text if len(text) <= length else text[:length - 1] + "\u2026"


def save_figure(figure, path):
    """Write a figure atomically as .png or .svg, by the suffix of the path, also over an older one of ours.

    Raises UserError if that fails, or if another program has made the file that is there.
    """
    path = Path(path)
    if path.suffix.lower() not in SIGNED:
        raise UserError(f"cannot write {path}: the file name must end in {' or '.join(SIGNED)}")
    if path.exists():
        with reading(path), open(path, "rb") as f:
            if b"exactgpt" not in f.read(2000):
                raise UserError(f"{path} exists, and it is no figure of ours; move it away or choose another name")
    with atomic_write(path) as f:
        figure.savefig(f, format=path.suffix.lower()[1:], metadata={SIGNED[path.suffix.lower()]: "exactgpt"})
