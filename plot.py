"""Plot one or more runs: loss, HellaSwag next to GPT-2 and GPT-3 124M, learning rate, gradient norm.

    python plot.py logs                                         # writes logs/plot.png
    python plot.py logs/adamw logs/muon --x hours --out compare.svg

A run is a folder with metrics.jsonl or log.txt (ours or build-nanogpt's).
"""
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.figures import TOKENS_PER_STEP, X_LABELS, draw_runs, last_finite, read_run, save_figure


@dataclass
class PlotConfig:
    """The flags of this script."""
    runs: list[str] = flag([], "the --log_dir of one or more runs", group="what to draw", positional=True)
    x: str = flag("steps", "x axis: training steps, tokens or hours", group="what to draw", choices=tuple(X_LABELS))
    reference: str = flag("auto", "reference lines; auto: HellaSwag accuracy of GPT-2 and GPT-3 124M; gpt2: also the "
                           "loss of GPT-2 124M on FineWeb-Edu", group="what to draw", choices=("auto", "gpt2", "none"))
    title: str = flag("", "title of the figure (default: the run's name if there is only one)", group="what to draw")
    tokens_per_step: int = flag(TOKENS_PER_STEP, "tokens per training step, for runs with only a log.txt",
                                group="what to draw", low=1)
    out: str = flag("", ".png or .svg file to write (default: plot.png in the first run's folder)", group="output")

    def check(self):
        """Raise UserError if no run is named."""
        if not self.runs:
            raise UserError("name the folder of at least one run, for example: python plot.py logs")


def main(argv=None):
    """Draw the runs named by the flags (sys.argv, or argv). Raises UserError for user mistakes."""
    config = parse_config(PlotConfig, argv, __doc__.splitlines()[0])
    folders = {Path(folder).resolve(): folder for folder in config.runs}  # a run named twice is drawn once
    runs = [read_run(folder, config.tokens_per_step) for folder in
            tqdm(folders.values(), "reading", unit="run", leave=False, disable=None)]
    figure = draw_runs(make_names_unique(runs), config.x, config.title, config.reference)
    out = Path(config.out or Path(config.runs[0]) / "plot.png")
    save_figure(figure, out)
    for run in runs:
        print(run_summary(run))
    print(f"wrote {out}")


def make_names_unique(runs):
    """Return the runs, named by as many of their paths' last folders as it takes to tell them apart."""
    parts = [run.path.parent.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(runs) and depth < max(map(len, parts)):
        depth += 1
    return [replace(run, name="/".join(p[-depth:])) for run, p in zip(runs, parts)]


def run_summary(run):
    """Return a line with a run's last step, smoothed training loss, validation loss and HellaSwag accuracy."""
    facts = [f"step {run.last_step():,}"]
    if "loss" in run.series:
        facts.append(f"train {last_finite(run.series['loss'].smoothed()):.4f}")
    if "val_loss" in run.series:
        facts.append(f"val {last_finite(run.series['val_loss'].values):.4f}")
        facts.append("best val {1:.4f} at step {0:,}".format(*run.best_val()))
    if "hella_acc_norm" in run.series:
        facts.append(f"HellaSwag {last_finite(run.series['hella_acc_norm'].values):.4f}")
    if run.skipped:
        facts.append(f"{run.skipped} unreadable line{'s' * (run.skipped > 1)} skipped")
    return f"{run.path.parent}: {' | '.join(facts)}"


if __name__ == "__main__":
    run_script(main)
