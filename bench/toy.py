"""Random data under the file names that the stages of bench.gpu read, to try them without a GPU or real data."""
import json

import numpy as np

from exactgpt.files import atomic_write
from exactgpt.shard_writer import save_shard
from exactgpt.shards import Manifest
from exactgpt.tokenizer import load_tokenizer


def write_random_shards(folder, tokenizer, n_val=500, n_train=4_100):
    """Write a complete shard folder of random tokens: one shard per split, a manifest and the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    tokenizer = load_tokenizer(folder)      # with the name that it gets when it is loaded from a folder
    random = np.random.default_rng(0)
    manifest = Manifest("made up", tokenizer.name, tokenizer.n_vocab, tokenizer.eot, complete=True)
    for i, (split, n) in enumerate(dict(val=n_val, train=n_train).items()):
        tokens = random.integers(0, tokenizer.n_vocab, n).astype("<u2")
        manifest.shards.append(save_shard(folder, "toy", split, i, tokens))
    manifest.save(folder)


def write_toy_data(data, tokenizer):
    """Write data/wikipedia_48m, data/tinyshakespeare and data/hellaswag; keep shards that already exist."""
    for name in ("wikipedia_48m", "tinyshakespeare"):
        if not (data / name / "manifest.json").exists():
            write_random_shards(data / name, tokenizer)
    with atomic_write(data / "hellaswag" / "hellaswag_val.jsonl", "w") as f:
        for i in range(8):
            endings = [f"goes {'on ' * (k + 1)}to the {word}." for k, word in enumerate(("sea", "hill", "town", "end"))]
            f.write(json.dumps(dict(activity_label="Walking", ctx=f"Person {i} stands up and", endings=endings,
                                    label=i % 4)) + "\n")
