"""Learning-rate range test: train a short run with a growing learning rate, and suggest a rate from its losses.

    python lr_finder.py --data_dir data/demo --log_dir logs/new --n_layer 4 ...    # the flags that you will train with
    torchrun --nproc_per_node=8 lr_finder.py

Writes lr_finder.png and lr_finder.csv into --log_dir and prints the train.py command to run next, with all flags of
train.py that were given here. The sweep does not influence that run, which starts from the same weights and tokens as
without it. (Smith 2015, arXiv 1506.01186; one tenth of the minimum as in fastai's lr_find.)
"""
import exactgpt.launch  # noqa: F401  first, see there

import csv
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from exactgpt.checkpoint import list_checkpoints
from exactgpt.config import (
    RunFailed,
    UserError,
    command,
    counted,
    flag,
    parse_config,
    read_ranks,
    run_script,
    with_changes,
)
from exactgpt.dataloader import DataOrder, TrainLoader
from exactgpt.distributed import StopRequested, lock_folder, start
from exactgpt.figures import COLOURS, GREY, INK, save_figure, smooth, style_axes
from exactgpt.files import atomic_write
from exactgpt.metrics import Tracker
from train import TrainConfig, set_up, train_step, warm_up

WINDOW = 40            # smooth the losses over a fortieth of the sweep on either side
RISE = 0.1, 0.25       # diverged: the loss has risen by 10% of the first loss, and by 25% of how far it had fallen
SCALE_STEPS = 40       # fp16: additional steps for the GradScaler to find its scale


@dataclass(kw_only=True)
class FinderConfig(TrainConfig):
    """The flags of the sweep, and those of train.py; UNLISTED: they matter only to the command that it prints."""
    UNLISTED = ("max_steps", "num_epochs", "stop_loss", "schedule", "min_lr", "warmup_steps", "eval_every",
                "val_tokens", "hellaswag_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume",
                "dry_run", "dollars_per_hour")
    lr_low: float = flag(1e-6, "learning rate of the first step", group="sweep", above=0)
    lr_high: float = flag(1.0, "learning rate of the last step, unless the loss diverges earlier", above=0)
    steps: int = flag(200, "number of steps", low=10)

    def check(self):
        """Raise UserError for flags that contradict each other."""
        super().check()
        if self.lr_low >= self.lr_high:
            raise UserError(f"--lr_low {self.lr_low:g} is not below --lr_high {self.lr_high:g}; lower it")
        if self.resume != "auto" or self.dry_run:
            raise UserError("a sweep is neither resumed nor tried; leave --resume and --dry_run out")


def main(argv=None):
    """Sweep, draw and suggest as the flags (sys.argv, or argv) say. Raises UserError for user mistakes, RunFailed."""
    config = parse_config(FinderConfig, argv, f"{__doc__.splitlines()[0]} The other flags of train.py are taken too, "
                                              "and repeated in the train.py command that is printed at the end.")
    folder, finished = Path(config.log_dir), False
    if list_checkpoints(folder):
        raise UserError(f"{folder} already contains a run; use a new --log_dir")
    with start(config) as runtime, lock_folder(folder, runtime):
        run, _ = set_up(with_changes(config, eval_every=0, hellaswag_every=0), runtime, saves=False)
        tracker = Tracker(with_changes(config, mlflow=config.mlflow and runtime.is_main), folder, "lr_finder")
        try:
            warm_up(run, runtime)
            runtime.setup_done()
            steps = sweep(run, config, runtime, tracker)
            if runtime.is_main:
                report(steps, config, tracker)
            finished = True
        except StopRequested:
            runtime.print("stopped; nothing was written")
            raise SystemExit(130)
        finally:
            tracker.close(finished)
        del run      # its DDP object must not outlive the process group, see start()


def sweep(run, config, runtime, tracker):
    """Train with growing rates until the loss diverges; return [{step, lr, loss, grad_norm}, ...]. Raises RunFailed."""
    loader = TrainLoader(DataOrder(run.train_stream, config.seed), run.plan.windows_per_step, runtime, 0,
                         config.steps + SCALE_STEPS)
    width = 2 * max(1, config.steps // WINDOW) + 1
    window, done = np.ones(width) / width, []
    try:
        for step in range(config.steps + SCALE_STEPS):
            rate = config.lr_low * (config.lr_high / config.lr_low) ** (len(done) / (config.steps - 1))
            for group in run.optimizer.param_groups:      # Muon's rate stays in proportion to AdamW's
                group["lr"] = group["peak_lr"] * rate / config.max_lr
            result = train_step(run, config, runtime, loader.next_step()[0], step)
            if step == 0:
                runtime.first_step_done()
            runtime.raise_if_stopping()
            if not result.finite and run.scaler.is_enabled() and not done:
                continue                                  # the loss scale is still too high
            if not result.finite:
                break
            done.append(dict(step=len(done), lr=rate, loss=result.loss, grad_norm=result.grad_norm))
            tracker.log(**done[-1])
            runtime.print(f"step {len(done):>{len(str(config.steps))}}/{config.steps} | lr {rate:.2e} | "
                          f"loss {result.loss:.4f} | norm {result.grad_norm:.3f}")
            means = np.convolve([row["loss"] for row in done], window, mode="valid")
            rise = means[-1] - means.min()
            if len(done) == config.steps or rise > max(RISE[0] * abs(means[0]), RISE[1] * (means[0] - means.min())):
                break
    finally:
        loader.close()
    runtime.print(f"the loss diverged at {rate:.2g}" if len(done) < config.steps else
                  f"the loss did not diverge up to {rate:.2g}: try a higher --lr_high")
    if len(done) < 10:
        raise RunFailed(f"the loss diverged within {counted(len(done), 'step')} from --lr_low {config.lr_low:g}; try a "
                        "lower one")
    return done


def suggest(rates, smoothed, half):
    """Return {name: learning rate}: where the loss falls fastest over log(rate), and a tenth of where it is lowest."""
    lowest = int(np.argmin(smoothed))
    slopes = smooth(np.gradient(smoothed, np.log(rates)), half)[:lowest + 1]
    return {"steepest slope": float(rates[np.argmin(slopes)]), "one tenth of the minimum": float(rates[lowest] / 10)}


def report(steps, config, tracker):
    """Write the table and the picture of a sweep, a list of {step, lr, loss, grad_norm}; print the suggestions."""
    rates, losses = (np.array([step[name] for step in steps]) for name in ("lr", "loss"))
    half = max(1, config.steps // WINDOW)
    smoothed = smooth(losses, half)
    suggested = suggest(rates, smoothed, half)
    table, picture = (Path(config.log_dir) / name for name in ("lr_finder.csv", "lr_finder.png"))
    with atomic_write(table, "w") as f:
        writer = csv.DictWriter(f, [*steps[0], "smoothed"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dict(step, smoothed=float(value)) for step, value in zip(steps, smoothed))
    save_figure(draw_lr_finder(rates, losses, smoothed, suggested), picture)
    tracker.artifact(table)
    tracker.artifact(picture)
    print(f"wrote {picture} and {table}")
    for name, rate in suggested.items():
        print(f"{name}: {rate:.2g}")
    print("suggested: the second, because noise moves the lowest loss less than the steepest fall, and a tenth of its "
          "rate is far from where the loss diverges")
    print(f"next: {train_command(config, suggested['one tenth of the minimum'])}")


def draw_lr_finder(lrs, losses, smoothed, suggestions):
    """Return a Figure of loss by learning rate, with the suggestions {name: learning rate} marked. Arrays (n,)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 5.3), dpi=160, facecolor="white")
    ax = figure.add_axes((0.09, 0.12, 0.83, 0.78))
    style_axes(ax, "loss by learning rate")
    ax.plot(lrs, losses, ".", color=COLOURS[0], alpha=0.3, ms=4, mew=0, label="each step")
    ax.plot(lrs, smoothed, color=COLOURS[0], lw=2, label="smoothed")
    ax.set_xscale("log")
    for (name, lr), colour, marker in zip(suggestions.items(), COLOURS[1:], "os"):
        ax.axvline(lr, color=colour, lw=1, ls=(0, (4, 3)))
        ax.plot(lr, np.interp(lr, lrs, smoothed), marker, color=colour, ms=9, mec="white", zorder=5,
                label=f"{name}: {lr:.2g}")
    # Show that the loss diverges, not how far: the axis ends a little above the first losses.
    start, low = np.nanmean(smoothed[:10]), np.nanmin(smoothed)
    room = (start - low) or 1.0
    ax.set_ylim(low - 0.15 * room, start + 0.35 * room)
    ax.set_xlabel("learning rate (log scale)", color=GREY, fontsize=9)
    ax.legend(loc="lower left", fontsize=9, labelcolor=INK, facecolor="white", edgecolor="none")
    return figure


def train_command(config, rate):
    """Return the train.py command with this peak rate, the flags that were typed, and other rates in proportion."""
    rate = float(f"{rate:.1e}")
    min_lr, muon_lr = (float(f"{other * rate / config.max_lr:.4g}") for other in (config.min_lr, config.muon_lr))
    scaled = with_changes(config, max_lr=rate, min_lr=min(rate, min_lr), muon_lr=muon_lr)
    words = []
    for f in fields(TrainConfig):
        value = getattr(scaled, f.name)
        if value != f.default and (f.name != "muon_lr" or config.optimizer == "muon"):
            words.append(f"--{f.name}")
            words += [] if value is True else [value]
    ranks = read_ranks()
    on_one_node = f"torchrun --nproc_per_node={ranks.world_size}" if ranks.world_size > 1 else "python"
    launcher = on_one_node if ranks.local_world_size == ranks.world_size else "torchrun ..."
    return command("train.py", *words).replace("python", launcher, 1)


if __name__ == "__main__":
    run_script(main)
