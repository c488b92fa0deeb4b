"""Helpers for the tests of the prepare scripts: sample texts, build-nanogpt's shards of them, killed commands."""
import itertools
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from exactgpt.tokenizer import gpt2_tokenizer

EOT = 50256


def random_texts(n, seed=0):
    """Return n texts of up to 300 words."""
    rng = np.random.default_rng(seed)
    words = ["the", "of", "data", "model", "learn,", "17", "is\n\nwhich", "é", "日本", "<|endoftext|>", "Loss"]
    return [" ".join(rng.choice(words, rng.integers(0, 300))) for _ in range(n)]


def parquet_bytes(texts, row_group_size=10, **columns):
    """Return the bytes of a parquet file with the columns id, text and those given."""
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(len(texts)), "text": texts, **columns})
    pyarrow.parquet.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


def write_corpus(folder):
    """Write three parquet files into a folder and return their texts in order."""
    texts = random_texts(250)
    for i, (a, b) in enumerate(itertools.pairwise([0, 100, 101, 250])):
        (folder / f"{i:03d}.parquet").write_bytes(parquet_bytes(texts[a:b]))
    return texts


def build_nanogpt_shards(texts, shard_tokens, val_tokens=None):
    """Return {file: tokens} as build-nanogpt's fineweb.py writes them: 50256 before each document, in order."""
    shards, shard = [], []
    for text in texts:
        for token in [EOT, *gpt2_tokenizer().encode(text)]:
            shard.append(token)
            if len(shard) == (shard_tokens if shards or not val_tokens else val_tokens):
                shards.append(shard)
                shard = []
    shards += [shard] if shard else []
    return {f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy": tokens for i, tokens in enumerate(shards)}


def load_shards(folder):
    """Return {file name: tokens} of the .npy files in a folder."""
    return {p.name: np.load(p).tolist() for p in sorted(Path(folder).glob("*.npy"))}


def read_files(folder):
    """Return {relative path: bytes} of all files below a folder except locks."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.name != ".lock"
            and p.is_file()}


def kill_when(command, env, when):
    """Start a command and SIGKILL it as soon as when() is true; return True if it was still running."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not when():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL
