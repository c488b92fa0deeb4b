"""Plot one or more runs: loss, HellaSwag next to GPT-2 and GPT-3 124M, bits per byte, learning rate, gradient norm.

    python plot.py logs                                         # writes logs/plot.png
    python plot.py logs/adamw logs/muon --x hours --out compare.svg

A run is a folder with metrics.jsonl or log.txt (ours or build-nanogpt's).
"""
import exactgpt.launch  # noqa: F401  first, see there

import os
from dataclasses import dataclass
from pathlib import Path

from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.figures import REFERENCES, TOKENS_PER_STEP, X_LABELS, draw_runs, read_run, save_figure


@dataclass
class PlotConfig:
    """The flags of this script."""
    runs: list[str] = flag([], "the --log_dir of one or more runs", group="what to draw", positional=True)
    x: str = flag("steps", "x axis: training steps, tokens or hours", choices=tuple(X_LABELS))
    reference: str = flag("auto", "reference lines; auto: HellaSwag accuracy of GPT-2 and GPT-3 124M; gpt2: also the "
                                  "loss of GPT-2 124M on FineWeb-Edu", choices=tuple(REFERENCES))
    title: str = flag("", "title of the figure (default: the run's name if there is only one)")
    tokens_per_step: int = flag(TOKENS_PER_STEP, "tokens per training step, for runs with only a log.txt", low=1)
    out: str = flag("", ".png or .svg file to write (default: plot.png in the first run's folder)", group="output")

    def check(self):
        """Raise UserError if no run is named."""
        if not self.runs:
            raise UserError("name the folder of at least one run, for example: python plot.py logs")


def main(argv=None):
    """Draw the runs named by the flags (sys.argv, or argv). Raises UserError for user mistakes."""
    config = parse_config(PlotConfig, argv, __doc__.splitlines()[0])
    runs = {Path(run).resolve(): read_run(run, config.tokens_per_step) for run in config.runs}   # each one once
    common = os.path.commonpath([path.parent for path in runs])
    for path, run in runs.items():
        run.name = str(path.relative_to(common))
    figure = draw_runs(list(runs.values()), config.x, config.title, config.reference)
    out = Path(config.out or Path(config.runs[0]) / "plot.png")
    save_figure(figure, out)
    for run in runs.values():
        print(f"{run.path.parent}: {' | '.join(run.facts())}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
