"""Curves of one or more runs: loss, HellaSwag beside GPT-2 and GPT-3 124M, learning rate, gradient norm.

    python plot.py logs                                         # writes logs/plot.png
    python plot.py logs/adamw logs/muon --x hours --out compare.svg

A run is a folder with metrics.jsonl, or with log.txt alone (ours or build-nanogpt's).
"""
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.figures import TOKENS_PER_STEP, X_LABELS, draw_runs, last_finite, read_run, save_figure


@dataclass
class PlotConfig:
    """Every flag of this script."""
    runs: list[str] = flag([], "folders of runs: the --log_dir of each", group="what to draw", positional=True)
    x: str = flag("steps", "the horizontal axis", group="what to draw", choices=tuple(X_LABELS))
    reference: str = flag("auto", "OpenAI's models as lines; auto: 124M in HellaSwag; gpt2: the loss of GPT-2 124M on "
                           "FineWeb-Edu besides", group="what to draw", choices=("auto", "gpt2", "none"))
    title: str = flag("", "above the figure (default: the name of a single run)", group="what to draw")
    tokens_per_step: int = flag(TOKENS_PER_STEP, "for runs that have log.txt alone, which does not say",
                                group="what to draw", low=1)
    out: str = flag("", "a .png or .svg file (default: plot.png in the first run's folder)", group="output")

    def check(self):
        """Raise UserError where no run is named."""
        if not self.runs:
            raise UserError("name the folder of at least one run, for example: python plot.py logs")


def main(argv=None):
    """Draw as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(PlotConfig, argv, __doc__.splitlines()[0])
    folders = {Path(folder).resolve(): folder for folder in config.runs}  # one named twice is drawn once
    runs = [read_run(folder, config.tokens_per_step) for folder in
            tqdm(folders.values(), "reading", unit="run", leave=False, disable=None)]
    figure = draw_runs(tell_apart(runs), config.x, config.title, config.reference)
    out = Path(config.out or Path(config.runs[0]) / "plot.png")
    save_figure(figure, out)
    for run in runs:
        print(summary(run))
    print(f"wrote {out}")


def tell_apart(runs):
    """The runs; where names occur twice, each is the end of the run's path that no other run has."""
    parts = [run.path.parent.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(runs) and depth < max(map(len, parts)):
        depth += 1
    return [replace(run, name="/".join(p[-depth:])) for run, p in zip(runs, parts)]


def summary(run):
    """One line: last step, training loss (smoothed), validation loss, best validation loss; those that were logged."""
    facts = [f"step {run.last_step():,}"]
    if "loss" in run.series:
        facts.append(f"train {last_finite(run.series['loss'].smoothed()):.4f}")
    if "val_loss" in run.series:
        facts.append(f"val {last_finite(run.series['val_loss'].values):.4f}")
        facts.append("best val {1:.4f} at step {0:,}".format(*run.best_val()))
    if "hella_acc_norm" in run.series:
        facts.append(f"HellaSwag {last_finite(run.series['hella_acc_norm'].values):.4f}")
    if run.skipped:
        facts.append(f"{run.skipped} unreadable line{'s' * (run.skipped > 1)} left out")
    return f"{run.path.parent}: {' | '.join(facts)}"


if __name__ == "__main__":
    run_script(main)
