"""Find which texts share a run of 13 tokens with the training shards.

Each run of the shards is hashed. A table rules out nearly all hashes, the sorted hashes of the texts' runs nearly all
that are left, and for the rest the tokens are compared, so that equal hashes of different runs do not count.
"""
from itertools import chain

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

RUN = 13                # tokens; GPT-3's paper (appendix C) takes up to 13 words
CHUNK = 1 << 17         # tokens hashed at a time: their arrays stay in the cache
TABLE_BITS = 25         # the 340,000 runs of HellaSwag's contexts fill 1% of the table
BASE = 0x9E3779B97F4A7C15      # of the polynomial; odd, so that multiplying by it loses no bits


def find_overlaps(texts, folder):
    """Return which texts share a run of RUN tokens with the train shards of a ShardFolder: an array (n,) of bool.

    texts: lists of token ids of the shards' vocabulary. Raises UserError for a shard that cannot be read.
    """
    found = np.zeros(len(texts), dtype=bool)
    tokens = np.fromiter(chain.from_iterable(texts), dtype="<u2")          # all texts, one after the other
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    starts = np.flatnonzero(text_of[:1 - RUN] == text_of[RUN - 1:])        # of the runs that lie within one text
    if not len(starts):
        return found
    hashes, runs = hash_runs(tokens)[starts], sliding_window_view(tokens, RUN)
    order = np.argsort(hashes)
    hashes, starts = hashes[order], starts[order]
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    table[_slots(hashes)] = True
    for chunk in _chunks(folder.train):
        chunk_hashes = hash_runs(chunk)
        places = np.flatnonzero(table[_slots(chunk_hashes)])
        at = np.searchsorted(hashes, chunk_hashes[places])
        while len(places):      # once for each of the texts' runs with the same hash
            same = (at < len(hashes)) & (hashes.take(at, mode="clip") == chunk_hashes[places])
            places, at = places[same], at[same]
            equal = (sliding_window_view(chunk, RUN)[places] == runs[starts[at]]).all(axis=1)
            found[text_of[starts[at[equal]]]] = True
            at = at + 1
    return found


def hash_runs(tokens):
    """Return a 64-bit polynomial hash of each run of RUN tokens of an array (n,), n >= RUN: uint64 (n - RUN + 1,)."""
    b1, b2, b4 = (np.uint64(pow(BASE, n, 1 << 64)) for n in (1, 2, 4))
    of_1 = tokens.astype(np.uint64)
    of_2 = of_1[:-1] * b1 + of_1[1:]
    of_4 = of_2[:-2] * b2 + of_2[2:]
    of_8 = of_4[:-4] * b4 + of_4[4:]
    of_12 = of_8[:-4] * b4 + of_4[8:]
    return of_12[:-1] * b1 + of_1[12:]


def _slots(hashes):
    """Return the places of hashes in the table: their high bits, to which all bits of the tokens contribute."""
    return (hashes >> np.uint64(64 - TABLE_BITS)).view(np.int64)      # NumPy indexes five times as fast with int64


def _chunks(shards):
    """Yield the tokens of shards as one stream, in parts of an array that is reused; a run lies whole in some part."""
    buffer, kept = np.empty(RUN - 1 + CHUNK, dtype="<u2"), 0
    with tqdm(desc="overlap", total=sum(s.n_tokens for s in shards), unit="tok", unit_scale=True, disable=None,
              leave=False) as bar:
        for shard in shards:
            with shard.open() as file:
                for start in range(0, shard.n_tokens, CHUNK):
                    n = min(CHUNK, shard.n_tokens - start)
                    shard.read_tokens(file, start, buffer[kept:kept + n])
                    end = kept + n
                    if end >= RUN:
                        yield buffer[:end]
                    kept = min(end, RUN - 1)
                    buffer[:kept] = buffer[end - kept:end]
                    bar.update(n)
