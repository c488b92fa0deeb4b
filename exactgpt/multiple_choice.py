"""Score several endings of one context, computing the context only once.

A question is packed into one sequence (one per ending if that is too long): the context, then the endings without
their last tokens, which predict nothing. An ending attends to the context and to itself, and its positions continue
the context's, as if it stood there alone:

    tokens     c c c c | a a | b b b | d | e e
    positions  0 1 2 3 | 4 5 | 4 5 6 | 4 | 4 5

That is half the tokens of a row per ending, and the output layer runs only where a target is predicted.
Shapes: B sequences, T tokens of a sequence, S targets of all sequences, C channels, V vocabulary.
"""
from collections import namedtuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from exactgpt.device import attention_without_cudnn

PADDING = -1             # the segment of padding; the context is segment 0, its endings are 1, 2, ...
LENGTH_MULTIPLE = 16     # pad T to a multiple of this: 18 lengths for HellaSwag, 5% padding (32: 10%)
BATCH_TOKENS = 8192      # per forward pass; the logits take 3 GB, most of the memory
CPU_BATCH_TOKENS = 2048

# inputs (3, T): token ids, positions and segments, which are 0 in the context, k + 1 in ending k
# targets (3, S): index in T whose logits predict the target, its token id, the ending it is from
PackedSequence = namedtuple("PackedSequence", "inputs targets")


def pack_question(context, endings, block_size):
    """Return the PackedSequences of a question (lists of ids): one if it fits block_size, else one per ending."""
    # What is too long even for one ending is cut from the left, only as far as that ending needs, as
    # lm-evaluation-harness does.
    parts = [(context, dict(enumerate(endings)))]      # of each sequence: its context, {number: its ending}
    if len(context) + sum(len(e) - 1 for e in endings) > block_size:
        windows = [(context + ending)[-(block_size + 1):] for ending in endings]
        n_scored = [min(len(ending), block_size) for ending in endings]
        parts = [(window[:-n], {k: window[-n:]}) for k, (window, n) in enumerate(zip(windows, n_scored))]
    sequences = []
    for context, endings in parts:
        n = len(context)
        inputs, targets = [(token, i, 0) for i, token in enumerate(context)], []
        for k, ending in endings.items():
            predict_at = [n - 1, *range(len(inputs), len(inputs) + len(ending) - 1)]   # n - 1: the context's last token
            targets += [(i, token, k) for i, token in zip(predict_at, ending)]
            inputs += [(token, i, k + 1) for i, token in enumerate(ending[:-1], n)]
        sequences.append(PackedSequence(np.array(inputs, dtype=np.int32).T, np.array(targets, dtype=np.int32).T))
    return sequences


@torch.no_grad()
def ending_losses(model, questions, n_endings, runtime, batch_tokens=0):
    """Return the summed loss of each ending in nats, (n, n_endings) in float64, NaN for questions of other ranks.

    questions: the PackedSequences of each. A collective: each rank scores its share. batch_tokens: per rank and forward
    pass (0: by device). model: the raw GPT in eval mode, neither compiled nor wrapped.
    Raises StopRequested on all ranks after the batch during which any of them got a signal.
    """
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if runtime.device.type == "cpu" else BATCH_TOKENS)
    batches = list(batch_by_length(questions, model.config.block_size, batch_tokens, runtime.world_size))
    bar = tqdm(batches, "HellaSwag", unit="batch", leave=False, disable=None if runtime.is_main else True)
    losses, ending_ids = [], []
    # One autocast context around all batches, so that the weights are cast only once.
    with runtime.autocast(), attention_without_cudnn():
        for T, indices in bar:
            # Every rank loops over every batch, even with an empty share, so that all check for a stop equally often.
            indices = indices[runtime.rank::runtime.world_size]
            if indices:
                batch = [(i, sequence) for i in indices for sequence in questions[i]]
                inputs = np.zeros((3, len(batch), T), dtype=np.int64)                     # (3, B, T)
                inputs[2] = PADDING
                for b, (_, sequence) in enumerate(batch):
                    inputs[:, b, :sequence.inputs.shape[1]] = sequence.inputs
                # of the batch: the index in (B T) and question * n_endings + ending, instead of those of one sequence
                targets = np.concatenate([sequence.targets + np.array([[b * T], [0], [i * n_endings]])
                                          for b, (i, sequence) in enumerate(batch)], axis=1)      # (3, S)
                losses.append(target_losses(model, *(torch.from_numpy(a).to(runtime.device)
                                                     for a in (*inputs, *targets[:2]))))
                ending_ids.append(targets[2])
            runtime.check_for_stop()
    sums = np.full(len(questions) * n_endings, np.nan)
    if losses:  # on the CPU: not every GPU has float64, and few sum in a fixed order
        ids = np.concatenate(ending_ids)
        sums[ids] = 0
        np.add.at(sums, ids, torch.cat(losses).cpu().numpy())
    return sums.reshape(-1, n_endings)


def batch_by_length(questions, block_size, batch_tokens, world_size):
    """Yield (T, question indices) of each forward pass of all ranks; questions of a batch have similar lengths."""
    # A rank's share has at most batch_tokens tokens, but at least one question. The longest come first, so that a batch
    # that does not fit in memory fails at once.
    groups = {}
    for i, sequences in enumerate(questions):
        T = -(-max(sequence.inputs.shape[1] for sequence in sequences) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        groups.setdefault((min(T, block_size), len(sequences)), []).append(i)
    for (T, n_sequences), indices in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // (T * n_sequences)) * world_size
        for first in range(0, len(indices), size):
            yield T, indices[first:first + size]


def target_losses(model, tokens, positions, segments, predict_at, targets):
    """Return the cross-entropy of each target, (S,) in nats; predict_at (S,) counts in the flattened batch (B, T)."""
    T = tokens.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    keys = segments[:, None, :]
    mask = causal & ((keys == 0) | (keys == segments[:, :, None]))            # (B, T, T): the context and own segment
    hidden = model.hidden(tokens, positions, mask[:, None])                   # (B, T, C)
    logits = model.lm_head(hidden.flatten(0, 1)[predict_at])                  # (S, V)
    # The softmax is over all V columns, including those that pad the vocabulary: they took part in training, where the
    # model learned to make them unlikely, and build-nanogpt does the same. Imported weights have no such columns.
    return F.cross_entropy(logits.float(), targets, reduction="none")
