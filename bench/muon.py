"""Compare AdamW with GPT-3's learning rate, AdamW with two higher ones, and Muon: same model, tokens and seed.

    python -m bench.muon                                                                  # CPU, 12M parameters
    python -m bench.muon --model gpt2 --block_size 1024 --total_batch_size 524288 --steps 358       # one GPU

Trains each with train.py below logs/muon_*; after an interruption the same command resumes. Draws the curves to
bench/results/muon_*.png and writes how many tokens each needs to reach the last validation loss of the first.
"""
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from bench.common import RESULTS, comparison_row, describe_machine, write_results
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.figures import draw_runs, read_run, save_figure

RECIPES = {     # GPT-3's settings; AdamW as modded-nanogpt tuned it at 124M; twice that rate; Muon as it tuned that
    "adamw 6e-4": ["--optimizer", "adamw", "--max_lr", "6e-4", "--min_lr", "6e-5"],
    "adamw 1.8e-3": ["--optimizer", "adamw", "--max_lr", "1.8e-3", "--min_lr", "0", "--schedule", "wsd"],
    "adamw 3.6e-3": ["--optimizer", "adamw", "--max_lr", "3.6e-3", "--min_lr", "0", "--schedule", "wsd"],
    "muon": ["--optimizer", "muon", "--muon_lr", "0.02", "--max_lr", "1.8e-3", "--min_lr", "0", "--schedule", "wsd"],
}


@dataclass(kw_only=True)
class MuonConfig:
    """The flags of this benchmark."""
    data_dir: str = flag("data/wikipedia_48m", "folder of token shards")
    model: str = flag("", "GPT-2 size (default: a smaller model of 6 layers, 6 heads and 192 channels)")
    block_size: int = flag(256, "tokens per row", low=1)
    total_batch_size: int = flag(8192, "tokens per step", low=1)
    steps: int = flag(300, "steps of each run", low=20)
    compile: str = flag("on", "torch.compile, as in train.py", choices=("auto", "on", "off"))


def main(argv=None):
    """Train with all recipes and write the comparison."""
    config = parse_config(MuonConfig, argv, __doc__.split("\n\n")[0])
    name = f"muon_{config.model or 'small'}_{config.steps}"
    runs = {recipe: train(recipe, flags, config, name) for recipe, flags in RECIPES.items()}
    target = runs["adamw 6e-4"].series["val_loss"].values[-1]
    needed = {recipe: tokens_to_reach(run.series["val_loss"], target) for recipe, run in runs.items()}
    save_figure(draw_runs(list(runs.values()), "tokens", f"AdamW and Muon, {config.data_dir}"), RESULTS / f"{name}.png")
    write_results(name, dict(
        machine=describe_machine(), config=vars(config), flags=RECIPES, target_val_loss=target, tokens_needed=needed,
        val_loss={recipe: run.series["val_loss"].values.tolist() for recipe, run in runs.items()},
        val_tokens={recipe: run.series["val_loss"].tokens.tolist() for recipe, run in runs.items()},
        step_ms={recipe: float(np.median(run.series["ms"].values)) for recipe, run in runs.items()}), [
            comparison_row(f"{recipe}: tokens to a validation loss of {target:.3f}", "M tokens", needed[recipe] / 1e6,
                           "adamw 6e-4", needed["adamw 6e-4"] / 1e6) for recipe in list(RECIPES)[1:] if needed[recipe]])


def train(recipe, flags, config, name):
    """Start or resume train.py with a recipe's flags; return the Run that it logged. Raises UserError if it fails."""
    log_dir = f"logs/{name}/{recipe.replace(' ', '_')}"
    shape = ["--model", config.model] if config.model else ["--n_layer", 6, "--n_head", 6, "--n_embd", 192]
    flags = [*shape, "--data_dir", config.data_dir, "--block_size", config.block_size, "--total_batch_size",
             config.total_batch_size, "--max_steps", config.steps, "--warmup_steps", config.steps // 10,
             "--eval_every", config.steps // 20, "--val_tokens", 10 * config.total_batch_size, "--hellaswag_every", 0,
             "--sample_every", 0, "--checkpoint_every", config.steps // 5, "--compile", config.compile,
             "--log_dir", log_dir, *flags]
    if subprocess.run([sys.executable, "train.py", *map(str, flags)]).returncode:
        raise UserError(f"the run in {log_dir} failed; its messages are above")
    run = read_run(log_dir)
    run.name = recipe
    return run


def tokens_to_reach(series, target):
    """Return the tokens after which the validation loss first reaches the target, or None if it never does.

    Interpolates linearly between validations.
    """
    below = np.flatnonzero(series.values <= target)
    if not len(below):
        return None
    k = below[0]
    if k == 0:
        return float(series.tokens[0])
    fraction = (series.values[k - 1] - target) / (series.values[k - 1] - series.values[k])
    return float(series.tokens[k - 1] + fraction * (series.tokens[k] - series.tokens[k - 1]))


if __name__ == "__main__":
    run_script(main)
