"""Tokenized fine-tuning examples: their batches of similar lengths, their printed form, their hash.

Shapes: B rows of a batch, T tokens.
"""
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from model import IGNORED

LENGTH_MULTIPLE = 16     # sequences are padded to a multiple of this, so that few shapes occur
N_SHOWN = 3              # examples that a dry run prints


@dataclass(frozen=True)
class Example:
    """One tokenized example."""
    tokens: np.ndarray     # (T,) int32
    targets: np.ndarray    # (T,) int32, IGNORED where there is no loss

    def __len__(self):
        return len(self.tokens)


def make_example(tokens, targets):
    """Build an Example from two lists of equal length."""
    return Example(np.array(tokens, dtype=np.int32), np.array(targets, dtype=np.int32))


def make_batches(examples, indices, micro_batch_tokens, block_size):
    """Yield (indices, x, y) of micro-batches, sorted by length to save padding, the longest first.

    x, y: (B, T) int64 with B x T <= micro_batch_tokens, unless B is 1.
    """
    indices = sorted(indices, key=lambda i: -len(examples[i]))
    first = 0
    while first < len(indices):
        T = min(-(-len(examples[indices[first]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, block_size)
        members = indices[first:first + max(1, micro_batch_tokens // T)]
        x = torch.zeros(len(members), T, dtype=torch.long)   # padded on the right: no real token attends to it
        y = torch.full((len(members), T), IGNORED, dtype=torch.long)
        for b, i in enumerate(members):
            x[b, :len(examples[i])] = torch.from_numpy(examples[i].tokens)
            y[b, :len(examples[i])] = torch.from_numpy(examples[i].targets)
        yield members, x, y
        first += len(members)


def evaluation_batches(examples, micro_batch_tokens, block_size, runtime):
    """Yield (indices, x, y) of this rank's share of all examples, on its device. Raises StopRequested.

    Every rank visits every batch, even if its share of it is empty, so that all ranks check for a stop equally often.
    """
    share = slice(runtime.rank, None, runtime.world_size)
    for members, x, y in make_batches(examples, range(len(examples)), micro_batch_tokens * runtime.world_size,
                                      block_size):
        if members[share]:
            yield members[share], x[share].to(runtime.device), y[share].to(runtime.device)
        runtime.check_for_stop()


def empty_batch():
    """Return a batch without targets, for a rank that has no example in a step: DDP needs a backward on every rank."""
    return [], torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED)


def format_example(example, tokenizer, target_text):
    """Return lines that show what the loss sees: "masked" text is only read, "learned" text is a target.

    target_text(targets) returns the text of a list of targets.
    """
    pieces = [(False, int(example.tokens[0]))]
    for i, target in enumerate(example.targets):
        if target != IGNORED:
            pieces.append((True, int(target)))
        elif i + 1 < len(example):
            pieces.append((False, int(example.tokens[i + 1])))
    lines = []
    for learned, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        ids = [piece[1] for piece in group]
        lines.append(f"  learned | {target_text(ids)!r}" if learned else f"  masked  | {tokenizer.decode(ids)!r}")
    return "\n".join(lines)


def print_examples(examples, tokenizer, target_text, print):
    """Print the first N_SHOWN examples with format_example."""
    for i, example in enumerate(examples[:N_SHOWN], 1):
        n_targets = int((example.targets != IGNORED).sum())
        print(f"example {i}: {len(example)} tokens, {n_targets} target{'s' * (n_targets > 1)}\n"
              f"{format_example(example, tokenizer, target_text)}")


def hash_examples(examples):
    """Return a hash of all tokens and targets, which must be equal when a run is resumed."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(4, "little") + example.tokens.tobytes() + example.targets.tobytes())
    return digest.hexdigest()
