"""Tokenized fine-tuning examples: their batches of similar lengths, their printed form, their hash.

Shapes: B rows of a batch, T tokens.
"""
import hashlib

import numpy as np
import torch

from model import IGNORED

LENGTH_MULTIPLE = 16     # sequences are padded to a multiple of this, so that few shapes occur
N_SHOWN = 3              # examples that a dry run prints


class Example:
    """One tokenized example: `tokens` and `targets`, (T,) int32; targets are IGNORED where there is no loss."""

    def __init__(self, tokens, targets):
        self.tokens, self.targets = (np.array(ids, dtype=np.int32) for ids in (tokens, targets))

    def __len__(self):
        return len(self.tokens)


def make_batches(examples, micro_batch_tokens, block_size):
    """Yield (indices, x, y) of micro-batches, sorted by length to save padding, the longest first.

    x, y: (B, T) int64 with B x T <= micro_batch_tokens, unless B is 1.
    """
    indices = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    while indices:
        T = min(-(-len(examples[indices[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, block_size)
        B = max(1, micro_batch_tokens // T)
        members, indices = indices[:B], indices[B:]
        x = torch.zeros(len(members), T, dtype=torch.long)   # padded on the right: no real token attends to it
        y = torch.full((len(members), T), IGNORED, dtype=torch.long)
        for b, i in enumerate(members):
            x[b, :len(examples[i])] = torch.from_numpy(examples[i].tokens)
            y[b, :len(examples[i])] = torch.from_numpy(examples[i].targets)
        yield members, x, y


def evaluation_batches(examples, micro_batch_tokens, block_size, runtime):
    """Yield (indices, x, y) of this rank's share of all examples, on its device. Raises StopRequested.

    Every rank visits every batch, even if its share of it is empty, so that all ranks check for a stop equally often.
    """
    share = slice(runtime.rank, None, runtime.world_size)
    for members, x, y in make_batches(examples, micro_batch_tokens * runtime.world_size, block_size):
        if members[share]:
            yield members[share], x[share].to(runtime.device), y[share].to(runtime.device)
        runtime.check_for_stop()


def print_examples(examples, tokenizer, target_text, print):
    """Print the first examples as the loss sees them: "masked" text is only read, "learned" text is a target.

    target_text(targets) returns the text of a list of targets. They begin somewhere and go on to the end.
    """
    for i, example in enumerate(examples[:N_SHOWN], 1):
        start = int((example.targets == IGNORED).sum())
        masked, learned = example.tokens[:start + 1].tolist(), example.targets[start:].tolist()
        print(f"example {i}: {len(example)} tokens, {len(learned)} target{'s' * (len(learned) > 1)}\n"
              f"  masked  | {tokenizer.decode(masked)!r}\n  learned | {target_text(learned)!r}")


def hash_examples(examples):
    """Return a hash of all tokens and targets, which must be equal when a run is resumed."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(4, "little") + example.tokens.tobytes() + example.targets.tobytes())
    return digest.hexdigest()
