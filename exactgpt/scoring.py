"""Score texts: the loss of several endings after one context, which is computed only once.

A question is packed into one sequence (one per ending if that is too long): the context, then the endings without
their last tokens, which predict nothing. An ending attends to the context and to itself, and its positions continue
the context's, as if it stood there alone:

    tokens     c c c c | a a | b b b | d | e e
    positions  0 1 2 3 | 4 5 | 4 5 6 | 4 | 4 5

That is half the tokens of a row per ending, and the output layer runs only where a target is predicted. A window of a
long text is a question with one ending: the tokens to be scored.
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

# inputs (3, T): token ids, positions and segments, which are 0 in the context, 1, 2, ... in the endings
# targets (3, S): index in T whose logits predict the target, its token id, the number of its ending in the question
PackedSequence = namedtuple("PackedSequence", "inputs targets")


def pack_question(context, endings, block_size):
    """Return the PackedSequences of a question (lists of ids): one if it fits block_size, else one per ending."""
    # What is too long even for one ending is cut from the left, only as far as that ending needs, as
    # lm-evaluation-harness does.
    if len(endings) == 1 or len(context) + sum(len(e) - 1 for e in endings) > block_size:
        return [pack_window((context + ending)[-(block_size + 1):], min(len(ending), block_size), k)
                for k, ending in enumerate(endings)]
    n = len(context)
    inputs, targets = [(token, i, 0) for i, token in enumerate(context)], []
    for k, ending in enumerate(endings):
        predict_at = [n - 1, *range(len(inputs), len(inputs) + len(ending) - 1)]       # n - 1: the context's last token
        targets += [(i, token, k) for i, token in zip(predict_at, ending)]
        inputs += [(token, i, k + 1) for i, token in enumerate(ending[:-1], n)]
    return [PackedSequence(np.array(inputs, dtype=np.int32).T, np.array(targets, dtype=np.int32).reshape(-1, 3).T)]


def pack_window(tokens, n_scored, ending=0):
    """Return the PackedSequence of T + 1 tokens whose last n_scored are targets, of the ending with this number."""
    tokens, T = np.asarray(tokens, dtype=np.int32), len(tokens) - 1
    inputs = np.stack([tokens[:-1], np.arange(T, dtype=np.int32), np.zeros(T, dtype=np.int32)])
    predict_at = np.arange(T - n_scored, T, dtype=np.int32)
    return PackedSequence(inputs, np.stack([predict_at, tokens[predict_at + 1], np.full_like(predict_at, ending)]))


def text_windows(n_tokens, block_size):
    """Return [(start, stop, n_scored)] of the windows that score tokens 1 to n_tokens - 1 of a text, each once.

    A window is the tokens start to stop - 1, of which the last n_scored are targets. After the first it moves on by
    half of block_size at a time, so that each target has that much context at least.
    """
    windows, scored = [], 1
    for start in range(0, n_tokens, max(1, block_size // 2)):
        stop = min(start + block_size + 1, n_tokens)
        if stop > scored:
            windows.append((start, stop, stop - scored))
            scored = stop
    return windows


@torch.no_grad()
def ending_losses(model, questions, n_endings, runtime, batch_tokens=0, title="HellaSwag", greedy=False):
    """Return the summed loss in nats of all endings, in one float64 array (N,), the same on all ranks.

    questions: the PackedSequences of each. n_endings: how many endings each has, one number or a list. A collective:
    each rank scores its share. batch_tokens: per rank and forward pass (0: by device). model: the raw GPT in eval mode,
    neither compiled nor wrapped. greedy: return (losses, array of bool: each token of the ending was the likeliest).
    Raises StopRequested on all ranks after the batch during which any of them got a signal.
    """
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if runtime.device.type == "cpu" else BATCH_TOKENS)
    batches = list(batch_by_length(questions, model.config.block_size, batch_tokens, runtime.world_size))
    bar = tqdm(batches, title, unit="batch", leave=False, disable=None if runtime.is_main else True)
    first_ending = np.cumsum([0, *np.broadcast_to(n_endings, len(questions))])      # of each question
    results, ending_ids = [], []
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
                # of the batch: the index in (B T) and the ending among all, instead of those of one sequence
                targets = np.concatenate([sequence.targets + np.array([[b * T], [0], [first_ending[i]]])
                                          for b, (i, sequence) in enumerate(batch)], axis=1)      # (3, S)
                tokens, positions, segments, predict_at, tokens_there = (
                    torch.from_numpy(a).to(runtime.device) for a in (*inputs, *targets[:2]))
                packed = inputs[2].max() > 0
                results.append(target_losses(model, tokens, positions, segments if packed else None, predict_at,
                                             tokens_there, greedy))
                ending_ids.append(targets[2])
            runtime.check_for_stop()
    sums = np.zeros((2, first_ending[-1]))      # of each ending: loss, tokens that were not the likeliest
    if results:  # on the CPU: not every GPU has float64, and few sum in a fixed order
        ids = np.concatenate(ending_ids)
        for row, values in zip(sums, torch.cat(results, dim=1).cpu().numpy()):
            np.add.at(row, ids, values)
    losses, n_missed = runtime.sum_array(sums)      # an ending is scored on one rank, so nothing is rounded
    return (losses, n_missed == 0) if greedy else losses


def batch_by_length(questions, block_size, batch_tokens, world_size):
    """Yield (T, question indices) of each forward pass of all ranks; questions of a batch have similar lengths."""
    # A rank's share has at most batch_tokens tokens, but at least one question. The longest come first, so that a batch
    # that does not fit in memory fails at once. Packed sequences are apart from those that need no mask. A batch may be
    # padded up to twice the length of its shortest: that happens where questions are few, and many passes cost more.
    shapes = []      # of each question: packed or not, number of sequences, T
    for sequences in questions:
        T = -(-max(sequence.inputs.shape[1] for sequence in sequences) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        shapes.append((bool(sequences[0].inputs[2].any()), len(sequences), min(T, block_size)))
    order = sorted(range(len(questions)), key=lambda i: (shapes[i][2], shapes[i][:2]), reverse=True)
    groups = {}
    for i in order:
        groups.setdefault(shapes[i][:2], []).append(i)
    for (_, n_sequences), indices in groups.items():
        first = 0
        while first < len(indices):
            T = shapes[indices[first]][2]
            size = max(1, batch_tokens // (T * n_sequences)) * world_size
            batch = [i for i in indices[first:first + size] if 2 * shapes[i][2] >= T]
            yield T, batch
            first += len(batch)


def target_losses(model, tokens, positions, segments, predict_at, targets, greedy=False):
    """Return (2, S): the cross-entropy of each target in nats, and 1 where it is not the likeliest token.

    predict_at (S,) counts in the flattened batch (B, T). segments: None if no sequence has several endings. greedy:
    compare with the likeliest tokens; else the second row is zeros.
    """
    mask = None                                                               # causal
    if segments is not None:
        T = tokens.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        keys = segments[:, None, :]
        mask = causal & ((keys == 0) | (keys == segments[:, :, None]))        # (B, T, T): the context and own segment
        mask = mask[:, None]
    hidden = model.hidden(tokens, positions, mask)                            # (B, T, C)
    logits = model.lm_head(hidden.flatten(0, 1)[predict_at])                  # (S, V)
    # The softmax is over all V columns, including those that pad the vocabulary: they took part in training, where the
    # model learned to make them unlikely, and build-nanogpt does the same. Imported weights have no such columns.
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) != targets).float() if greedy else torch.zeros_like(losses)])
