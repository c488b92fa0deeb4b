"""How much two runs of one recipe differ that have only other seeds, beside the noise between documents.

    python -m bench.seeds

Trains a small model with each of some seeds, below logs/seeds, on Python's own documentation; after an interruption the
same command resumes. Scores each on the same validation documents as evaluate.py does, compares each two, and writes
how often the difference is more than noise, and how many documents and seeds it takes to see a difference.
"""
import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import comparison_row, describe_machine, write_results
from evaluate import EvaluateConfig, read_shards, score_documents
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.distributed import start
from exactgpt.error_bars import compare, conclusion, ratio_stderr
from exactgpt.open_model import open_model

DATA = "data/demo_seeds"
POWER = 2.8      # standard errors: a true difference of so many is found 4 times in 5


@dataclass(kw_only=True)
class SeedsConfig:
    """The flags of this benchmark."""
    seeds: int = flag(5, "number of runs", low=2)
    steps: int = flag(300, "steps of each run", low=1)


def main(argv=None):
    """Train with all seeds and write the comparison."""
    config = parse_config(SeedsConfig, argv, __doc__.split("\n\n")[0])
    if not Path(DATA).exists():
        run_python("prepare_text.py", "--demo", "--train_tokenizer", 4096, "--val_fraction", 0.2, "--out", DATA)
    for seed in range(config.seeds):
        run_python("train.py", "--data_dir", DATA, "--log_dir", f"logs/seeds/{config.steps}_{seed}", "--seed", seed,
                   "--n_layer", 4, "--n_head", 4, "--n_embd", 128, "--block_size", 128, "--total_batch_size", 4096,
                   "--max_steps", config.steps, "--max_lr", 2e-3, "--min_lr", 2e-4, "--eval_every", 0,
                   "--sample_every", 0, "--checkpoint_every", 0, "--device", "cpu")
    flags = EvaluateConfig(data_dir=DATA, device="cpu", dtype="fp32")
    documents, vocabulary = read_shards(flags)
    with start(flags) as runtime:
        scored = [score_documents(open_model(f"logs/seeds/{config.steps}_{seed}"), documents, vocabulary, runtime)
                  for seed in range(config.seeds)]
    tokens = scored[0].n_tokens
    means, stderrs = zip(*(ratio_stderr(s.losses, tokens) for s in scored))
    pairs = [(a, b, compare(scored[a].losses, scored[b].losses, tokens))
             for a, b in itertools.combinations(range(config.seeds), 2)]
    real = [c for _, _, c in pairs if "more than noise" in conclusion(c, "a", "b")]
    _, paired = zip(*(ratio_stderr(scored[a].losses - scored[b].losses, tokens) for a, b, _ in pairs))
    between_seeds, of_a_pair = float(np.std(means, ddof=1)), float(np.median(paired))
    print("\n".join(f"seeds {a} and {b}: {c.difference:+.4f}, {c.low:+.4f} to {c.high:+.4f}" for a, b, c in pairs))
    write_results("seeds", dict(
        machine=describe_machine(), config=vars(config), documents=len(documents), tokens=int(tokens.sum()),
        loss=means, loss_stderr=stderrs, std_between_seeds=between_seeds, stderr_of_a_difference=of_a_pair,
        pairs=[dict(c._asdict(), seeds=[a, b]) for a, b, c in pairs], pairs_more_than_noise=len(real),
        seen_between_checkpoints=POWER * of_a_pair,
        seen_between_recipes={n: POWER * between_seeds * (2 / n) ** 0.5 for n in (1, 3, 5, 10)}), [
            comparison_row(f"pairs of seeds of one recipe that differ by more than noise on {len(documents)} documents",
                           f"of {len(pairs)}", len(real))])


def run_python(script, *flags):
    """Run a script of ours. Raises UserError if it fails."""
    if subprocess.run([sys.executable, script, *map(str, flags)]).returncode:
        raise UserError(f"{script} failed; its messages are above")


if __name__ == "__main__":
    run_script(main)
