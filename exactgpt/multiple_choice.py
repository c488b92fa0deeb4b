"""How likely a model finds each of several endings of one context, the context computed once.

A question is one row of tokens (one per ending, where that is too long): the context, and behind it the endings without
their last tokens, which predict nothing. An ending sees the context and itself, and its positions go on from the
context's, as if it stood there alone:

    tokens     c c c c | a a | b b b | d | e e
    positions  0 1 2 3 | 4 5 | 4 5 6 | 4 | 4 5

That is half the tokens of a row per ending, and the output layer reads only the places that predict an ending.
Shapes: B rows, T tokens of a row, S scored tokens of all rows, C channels, V vocabulary rows.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from exactgpt.device import attention_without_cudnn

PADDING = -1             # the segment of padding; a context is segment 0, its endings are 1, 2, ...
ROW_MULTIPLE = 16        # rows are padded to a multiple of this: 18 lengths for HellaSwag, 5% padding (32: 10%)
BATCH_TOKENS = 8192      # of a forward pass; the logits take 3 GB, most of what it needs
CPU_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class PackedRow:
    """A row for the model, and what to score in it: arrays of T tokens and of S scored ones."""
    tokens: np.ndarray       # (T,) the context, then endings without their last token
    positions: np.ndarray    # (T,)
    segments: np.ndarray     # (T,) 0 in the context, k + 1 in ending k
    places: np.ndarray       # (S,) where in the row the model predicts
    targets: np.ndarray      # (S,) this token
    owners: np.ndarray       # (S,) of this ending


def pack_question(context, endings, block_size):
    """The Rows of a question (ids; a context of at least one): one if it fits block_size, else one per ending.

    A context that is too long even for one ending is cut from the left, for each ending as far as that one needs,
    as lm-evaluation-harness does; an ending longer than the window is scored on its last block_size tokens.
    """
    if len(context) + sum(len(e) - 1 for e in endings) <= block_size:
        return [pack_endings(context, dict(enumerate(endings)))]
    rows = []
    for k, ending in enumerate(endings):
        window = (context + ending)[-(block_size + 1):]
        n_scored = min(len(ending), block_size)
        rows.append(pack_endings(window[:-n_scored], {k: window[-n_scored:]}))
    return rows


def pack_endings(context, endings):
    """The PackedRow of a context (ids, at least one) and of some endings, {number: ids}."""
    n = len(context)
    tokens, positions, segments, places, targets, owners = list(context), list(range(n)), [0] * n, [], [], []
    for k, ending in endings.items():
        places += [n - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]  # its first token: from the context's end
        targets += ending
        owners += [k] * len(ending)
        tokens += ending[:-1]
        positions += range(n, n + len(ending) - 1)
        segments += [k + 1] * (len(ending) - 1)
    return PackedRow(*(np.array(v, dtype=np.int32) for v in (tokens, positions, segments, places, targets, owners)))


@torch.no_grad()
def ending_losses(model, questions, n_endings, runtime, batch_tokens=0, progress=None):
    """The summed loss of each ending, in nats: (n, n_endings) in float64; and the numbers of this rank's questions.

    questions: per question its Rows. A collective: each rank scores its share, the others' losses stay zero there.
    batch_tokens: of a rank's forward pass; 0 chooses. progress: the title of a progress bar on a terminal.
    The model is the raw GPT, neither compiled nor wrapped, in eval mode. Raises StopRequested on all ranks after
    the batch during which any was signalled.
    """
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if runtime.device.type == "cpu" else BATCH_TOKENS)
    batches = list(plan_batches(questions, model.config.block_size, batch_tokens, runtime.world_size))
    bar = tqdm(batches, progress, unit="batch", leave=False, disable=None if progress and runtime.is_main else True)
    losses, owners, mine = [], [], []
    # One autocast context around all batches: it casts the weights once.
    with runtime.autocast(), attention_without_cudnn():
        for T, members in bar:
            # Every rank goes through every batch and takes its share, be it none, so that all poll equally often.
            members = members[runtime.rank::runtime.world_size]
            if members:
                arrays, batch_owners = pack(questions, members, T, n_endings)
                losses.append(token_losses(model, *(torch.from_numpy(a).to(runtime.device) for a in arrays)))
                owners.append(batch_owners)
                mine += members
            runtime.check_for_stop()
    sums = np.zeros(len(questions) * n_endings)
    if mine:  # summed on the CPU, in float64 and in one order: not every GPU has the one, and few the other
        sums = np.bincount(np.concatenate(owners), torch.cat(losses).cpu().numpy(), minlength=sums.size)
    return sums.reshape(-1, n_endings), np.array(mine, dtype=np.int64)


def plan_batches(questions, block_size, batch_tokens, world_size):
    """(T, numbers of questions) of each forward pass of all ranks together: rows of like length, few shapes.

    A rank's share takes at most batch_tokens tokens, but one question always. Longest first: what does not fit into
    memory fails at once.
    """
    groups = {}
    for i, rows in enumerate(questions):
        T = -(-max(len(row.tokens) for row in rows) // ROW_MULTIPLE) * ROW_MULTIPLE
        groups.setdefault((min(T, block_size), len(rows)), []).append(i)
    for (T, n_rows), members in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // (T * n_rows)) * world_size
        for first in range(0, len(members), size):
            yield T, members[first:first + size]


def pack(questions, members, T, n_endings):
    """The rows of some questions: (tokens, positions, segments: (B, T); places, targets: (S,)), and owners (S,).

    places count through the flattened rows, owners through the endings of all questions.
    """
    rows = [(i, row) for i in members for row in questions[i]]
    tokens, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    segments = np.full((len(rows), T), PADDING, dtype=np.int64)
    for b, (_, row) in enumerate(rows):
        n = len(row.tokens)
        tokens[b, :n], positions[b, :n], segments[b, :n] = row.tokens, row.positions, row.segments
    places = np.concatenate([b * T + row.places.astype(np.int64) for b, (_, row) in enumerate(rows)])
    targets = np.concatenate([row.targets for _, row in rows]).astype(np.int64)
    owners = np.concatenate([i * n_endings + row.owners.astype(np.int64) for i, row in rows])
    return (tokens, positions, segments, places, targets), owners


def token_losses(model, tokens, positions, segments, places, targets):
    """The loss of each scored token: (S,) in nats and fp32.

    tokens, positions, segments (B, T); places of the scored ones in B T, and targets, (S,): see pack above.
    """
    T = tokens.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    seen = segments[:, None, :]
    mask = causal & ((seen == 0) | (seen == segments[:, :, None]))            # (B, T, T): the context and one's own
    hidden = model.hidden(tokens, positions, mask[:, None])                   # (B, T, C)
    logits = model.lm_head(hidden.flatten(0, 1)[places])                      # (S, V)
    # All V columns join the softmax, the unused ones of a padded vocabulary too: they did in training, where the
    # model learned to give them next to nothing, and build-nanogpt counts so. Imported weights have no such columns.
    return F.cross_entropy(logits.float(), targets, reduction="none")
