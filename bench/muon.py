"""AdamW as GPT-2's descendants run it, AdamW with two higher rates, and Muon: the same model, tokens and seed.

    python -m bench.muon                                                                  # CPU, 12M parameters
    python -m bench.muon --model gpt2 --block_size 1024 --total_batch_size 524288 --steps 358       # one GPU

Trains each with train.py below logs/muon_* (interrupted, the same command goes on), draws their curves into
bench/results/muon_*.png and writes how many tokens each needed to reach the plain AdamW's last validation loss.
"""
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from bench.common import RESULTS, compared, machine, write_results
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.figures import draw_runs, read_run, save_figure

WAYS = {     # GPT-3's settings; modded-nanogpt's tuned ones for AdamW and Muon at 124M; twice that rate
    "adamw 6e-4": ["--optimizer", "adamw", "--max_lr", "6e-4", "--min_lr", "6e-5"],
    "adamw 1.8e-3": ["--optimizer", "adamw", "--max_lr", "1.8e-3", "--min_lr", "0", "--schedule", "wsd"],
    "adamw 3.6e-3": ["--optimizer", "adamw", "--max_lr", "3.6e-3", "--min_lr", "0", "--schedule", "wsd"],
    "muon": ["--optimizer", "muon", "--muon_lr", "0.02", "--max_lr", "1.8e-3", "--min_lr", "0", "--schedule", "wsd"],
}


@dataclass(kw_only=True)
class MuonConfig:
    """The flags of this benchmark."""
    data_dir: str = flag("data/wikipedia_48m", "token shards")
    model: str = flag("", "a GPT-2 size (default: 6 layers, 6 heads, 192 channels)")
    block_size: int = flag(256, "tokens of a row", low=1)
    total_batch_size: int = flag(8192, "tokens of a step", low=1)
    steps: int = flag(300, "steps of each", low=20)
    compile: str = flag("on", "torch.compile", choices=("auto", "on", "off"))


def main(argv=None):
    """Train all ways and write the comparison."""
    config = parse_config(MuonConfig, argv, __doc__.split("\n\n")[0])
    name = f"muon_{config.model or 'small'}_{config.steps}"
    runs = {way: train(way, flags, config, name) for way, flags in WAYS.items()}
    target = runs["adamw 6e-4"].series["val_loss"].values[-1]
    needed = {way: tokens_to(run.series["val_loss"], target) for way, run in runs.items()}
    save_figure(draw_runs(list(runs.values()), "tokens", f"AdamW and Muon, {config.data_dir}"), RESULTS / f"{name}.png")
    write_results(name, dict(
        machine=machine(), config=vars(config), flags=WAYS, target_val_loss=target, tokens_needed=needed,
        val_loss={way: run.series["val_loss"].values.tolist() for way, run in runs.items()},
        val_tokens={way: run.series["val_loss"].tokens.tolist() for way, run in runs.items()},
        step_ms={way: float(np.median(run.series["ms"].values)) for way, run in runs.items()}), [
            compared(f"{way}: tokens to a validation loss of {target:.3f}", "M tokens", needed[way] / 1e6,
                     "adamw 6e-4", needed["adamw 6e-4"] / 1e6) for way in list(WAYS)[1:] if needed[way]])


def train(way, flags, config, name):
    """Run train.py one way, or go on with it; the Run that it logged."""
    log_dir = f"logs/{name}/{way.replace(' ', '_')}"
    shape = ["--model", config.model] if config.model else ["--n_layer", 6, "--n_head", 6, "--n_embd", 192]
    words = [*shape, "--data_dir", config.data_dir, "--block_size", config.block_size, "--total_batch_size",
             config.total_batch_size, "--max_steps", config.steps, "--warmup_steps", config.steps // 10,
             "--eval_every", config.steps // 20, "--val_tokens", 10 * config.total_batch_size, "--hellaswag_every", 0,
             "--sample_every", 0, "--checkpoint_every", config.steps // 5, "--compile", config.compile,
             "--log_dir", log_dir, *flags]
    if subprocess.run([sys.executable, "train.py", *map(str, words)]).returncode:
        raise UserError(f"the run in {log_dir} did not end well")
    run = read_run(log_dir)
    run.name = way
    return run


def tokens_to(series, target):
    """The tokens after which a validation loss is first at or below the target, between evaluations by a line;
    None: never."""
    below = np.flatnonzero(series.values <= target)
    if not len(below):
        return None
    k = below[0]
    if k == 0:
        return float(series.tokens[0])
    share = (series.values[k - 1] - target) / (series.values[k - 1] - series.values[k])
    return float(series.tokens[k - 1] + share * (series.tokens[k] - series.tokens[k - 1]))


if __name__ == "__main__":
    run_script(main)
