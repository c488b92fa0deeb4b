"""Examples as rows of tokens with targets, batches of rows of like length, and how an example looks to the loss.

Shapes: B rows, T tokens.
"""
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from model import IGNORED

ROW_MULTIPLE = 16        # rows are padded to a multiple of this: few shapes
SHOWN = 3                # examples that a dry run prints


@dataclass(frozen=True)
class Row:
    """One example: what the model reads, and what counts."""
    tokens: np.ndarray     # (T,) int32
    targets: np.ndarray    # (T,) int32, IGNORED where nothing counts

    def __len__(self):
        return len(self.tokens)


def make_row(tokens, targets):
    """The Row of two lists."""
    return Row(np.array(tokens, dtype=np.int32), np.array(targets, dtype=np.int32))


def make_batches(rows, indices, budget, block_size):
    """Yield (indices, x, y), x and y (B, T) int64: rows of like length, the longest first, B x T <= budget if B > 1."""
    indices = sorted(indices, key=lambda i: -len(rows[i]))
    first = 0
    while first < len(indices):
        T = min(-(-len(rows[indices[first]]) // ROW_MULTIPLE) * ROW_MULTIPLE, block_size)
        members = indices[first:first + max(1, budget // T)]
        x = torch.zeros(len(members), T, dtype=torch.long)     # padding lies behind a row: no token of it looks there
        y = torch.full((len(members), T), IGNORED, dtype=torch.long)
        for b, i in enumerate(members):
            x[b, :len(rows[i])] = torch.from_numpy(rows[i].tokens)
            y[b, :len(rows[i])] = torch.from_numpy(rows[i].targets)
        yield members, x, y
        first += len(members)


def render(row, tokenizer, target_text):
    """Lines that show a row as the loss sees it: "masked" is only read, "learned" is what counts.

    target_text(targets) -> the text of a list of targets.
    """
    pieces = [(False, int(row.tokens[0]))]
    for i, target in enumerate(row.targets):
        if target != IGNORED:
            pieces.append((True, int(target)))
        elif i + 1 < len(row):
            pieces.append((False, int(row.tokens[i + 1])))
    lines = []
    for learned, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
        ids = [piece[1] for piece in run]
        lines.append(f"  learned | {target_text(ids)!r}" if learned else f"  masked  | {tokenizer.decode(ids)!r}")
    return "\n".join(lines)


def show_examples(rows, tokenizer, target_text, print):
    """Print the first rows as the loss sees them."""
    for i, row in enumerate(rows[:SHOWN], 1):
        counting = int((row.targets != IGNORED).sum())
        print(f"example {i}: {len(row)} tokens are read, {counting} target{'s' * (counting > 1)}\n"
              f"{render(row, tokenizer, target_text)}")


def hash_rows(rows):
    """A hash of the tokens and targets of rows: a resumed run must have the same."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(4, "little") + row.tokens.tobytes() + row.targets.tobytes())
    return digest.hexdigest()
