"""Score several endings of one context, computing the context only once.

A question is packed into one sequence (one per ending if that is too long): the context, then the endings without
their last tokens, which predict nothing. An ending attends to the context and to itself, and its positions continue
the context's, as if it stood there alone:

    tokens     c c c c | a a | b b b | d | e e
    positions  0 1 2 3 | 4 5 | 4 5 6 | 4 | 4 5

That is half the tokens of a row per ending, and the output layer runs only where a target is predicted.
Shapes: B sequences, T tokens of a sequence, S targets of all sequences, C channels, V vocabulary.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from exactgpt.device import attention_without_cudnn

PADDING = -1             # the segment of padding; the context is segment 0, its endings are 1, 2, ...
LENGTH_MULTIPLE = 16     # pad T to a multiple of this: 18 lengths for HellaSwag, 5% padding (32: 10%)
BATCH_TOKENS = 8192      # per forward pass; the logits take 3 GB, most of the memory
CPU_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class PackedSequence:
    """A context with endings as the model reads it, and the tokens to score."""
    tokens: np.ndarray       # (T,) the context, then endings without their last token
    positions: np.ndarray    # (T,)
    segments: np.ndarray     # (T,) 0 in the context, k + 1 in ending k
    predict_at: np.ndarray   # (S,) index in `tokens` whose logits predict the target
    targets: np.ndarray      # (S,) token id
    ending_ids: np.ndarray   # (S,) the ending that the target belongs to


def pack_question(context, endings, block_size):
    """Return the PackedSequences of a question: one if it fits block_size, else one per ending.

    context: at least one id; endings: lists of ids. A context that is too long even for one ending is cut from the
    left, only as far as that ending needs, as lm-evaluation-harness does. An ending longer than the window is scored
    on its last block_size tokens.
    """
    if len(context) + sum(len(e) - 1 for e in endings) <= block_size:
        return [pack_endings(context, dict(enumerate(endings)))]
    sequences = []
    for k, ending in enumerate(endings):
        window = (context + ending)[-(block_size + 1):]
        n_scored = min(len(ending), block_size)
        sequences.append(pack_endings(window[:-n_scored], {k: window[-n_scored:]}))
    return sequences


def pack_endings(context, endings):
    """Pack a context (at least one id) and some of its endings, {number: ids}, into a PackedSequence."""
    n = len(context)
    tokens, positions, segments, predict_at, targets, ending_ids = list(context), list(range(n)), [0] * n, [], [], []
    for k, ending in endings.items():
        predict_at += [n - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]  # n - 1: the context's last token
        targets += ending
        ending_ids += [k] * len(ending)
        tokens += ending[:-1]
        positions += range(n, n + len(ending) - 1)
        segments += [k + 1] * (len(ending) - 1)
    arrays = (np.array(v, dtype=np.int32) for v in (tokens, positions, segments, predict_at, targets, ending_ids))
    return PackedSequence(*arrays)


@torch.no_grad()
def ending_losses(model, questions, n_endings, runtime, batch_tokens=0, progress=None):
    """Return (summed loss of each ending in nats, indices of the questions that this rank scored).

    questions: the PackedSequences of each. The losses are (n, n_endings) in float64, zero for questions of other
    ranks. A collective: each rank scores its share. batch_tokens: per rank and forward pass (0: by device).
    progress: title of a progress bar on a terminal. model: the raw GPT in eval mode, neither compiled nor wrapped.
    Raises StopRequested on all ranks after the batch during which any of them got a signal.
    """
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if runtime.device.type == "cpu" else BATCH_TOKENS)
    batches = list(batch_by_length(questions, model.config.block_size, batch_tokens, runtime.world_size))
    bar = tqdm(batches, progress, unit="batch", leave=False, disable=None if progress and runtime.is_main else True)
    losses, ending_ids, scored = [], [], []
    # One autocast context around all batches, so that the weights are cast only once.
    with runtime.autocast(), attention_without_cudnn():
        for T, indices in bar:
            # Every rank loops over every batch, even with an empty share, so that all check for a stop equally often.
            indices = indices[runtime.rank::runtime.world_size]
            if indices:
                arrays, batch_ending_ids = collate(questions, indices, T, n_endings)
                losses.append(target_losses(model, *(torch.from_numpy(a).to(runtime.device) for a in arrays)))
                ending_ids.append(batch_ending_ids)
                scored += indices
            runtime.check_for_stop()
    sums = np.zeros(len(questions) * n_endings)
    if scored:  # on the CPU: not every GPU has float64, and few sum in a fixed order
        sums = np.bincount(np.concatenate(ending_ids), torch.cat(losses).cpu().numpy(), minlength=sums.size)
    return sums.reshape(-1, n_endings), np.array(scored, dtype=np.int64)


def batch_by_length(questions, block_size, batch_tokens, world_size):
    """Yield (T, question indices) of each forward pass of all ranks; questions of a batch have similar lengths.

    A rank's share has at most batch_tokens tokens, but at least one question. The longest come first, so that a batch
    that does not fit in memory fails at once.
    """
    groups = {}
    for i, sequences in enumerate(questions):
        T = -(-max(len(sequence.tokens) for sequence in sequences) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        groups.setdefault((min(T, block_size), len(sequences)), []).append(i)
    for (T, n_sequences), indices in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // (T * n_sequences)) * world_size
        for first in range(0, len(indices), size):
            yield T, indices[first:first + size]


def collate(questions, indices, T, n_endings):
    """Collate some questions; return ((tokens, positions, segments, predict_at, targets), ending_ids).

    The first three are (B, T), the others (S,). predict_at indexes the flattened batch (B T); ending_ids are question
    index * n_endings + ending.
    """
    batch = [(i, sequence) for i in indices for sequence in questions[i]]
    tokens, positions = np.zeros((2, len(batch), T), dtype=np.int64)
    segments = np.full((len(batch), T), PADDING, dtype=np.int64)
    for b, (_, sequence) in enumerate(batch):
        n = len(sequence.tokens)
        tokens[b, :n], positions[b, :n], segments[b, :n] = sequence.tokens, sequence.positions, sequence.segments
    predict_at = np.concatenate([b * T + sequence.predict_at.astype(np.int64) for b, (_, sequence) in enumerate(batch)])
    targets = np.concatenate([sequence.targets for _, sequence in batch]).astype(np.int64)
    ending_ids = np.concatenate([i * n_endings + sequence.ending_ids.astype(np.int64) for i, sequence in batch])
    return (tokens, positions, segments, predict_at, targets), ending_ids


def target_losses(model, tokens, positions, segments, predict_at, targets):
    """Return the cross-entropy of each target: (S,) in nats and fp32. Arguments: tensors as collate() returns them."""
    T = tokens.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    keys = segments[:, None, :]
    mask = causal & ((keys == 0) | (keys == segments[:, :, None]))            # (B, T, T): the context and own segment
    hidden = model.hidden(tokens, positions, mask[:, None])                   # (B, T, C)
    logits = model.lm_head(hidden.flatten(0, 1)[predict_at])                  # (S, V)
    # The softmax is over all V columns, including those that pad the vocabulary: they took part in training, where the
    # model learned to make them unlikely, and build-nanogpt does the same. Imported weights have no such columns.
    return F.cross_entropy(logits.float(), targets, reduction="none")
