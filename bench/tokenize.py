"""Tokenising speed on one text in one run: prepare_fineweb's pipeline, build-nanogpt's way, tiktoken, Hugging Face.

    python -m bench.tokenize [--data FILE]

The methods take turns and the medians count: MB of text per second, of the clock and of CPU time (parent and workers
together). Pools are timed twice, with the text and with next to none, and the difference counts: what starting the
workers costs is a row of its own. Every method must give the same tokens.
"""
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import prepare_fineweb
from config import UserError, flag, parse_config, run_script
from documents import find_files, plan_reads, read_documents
from encode import encode_tasks
from files import write_json
from python_docs import python_documents
from shards import permutation
from tokenizer import gpt2_tokenizer


@dataclass(kw_only=True)
class Config:
    data: str = flag("", "text to use, in any format of prepare_text.py (default: CPython's documentation)")
    megabytes: int = flag(40, "how much text; repeated, with the documents in another order, until it is enough", low=1)
    repeats: int = flag(5, "rounds", low=1)
    workers: int = flag(2, "processes and threads of the parallel methods", low=1)
    out: str = flag("bench/results/tokenize.json", "where the figures go")


def make_documents(config):
    """The texts: whole documents, shuffled anew each time they are repeated."""
    if config.data:
        texts = [text for path in find_files([config.data]) for text, _ in read_documents(path)]
    else:
        texts = list(python_documents())
    documents, size, round_ = [], 0, 0
    while size < config.megabytes * 1_000_000:
        for i in permutation(len(texts), round_):
            documents.append(texts[i])
            size += len(texts[i].encode())
        round_ += 1
    return documents


@dataclass
class Bench:
    """The documents in memory, and the same in a parquet file."""
    documents: list
    parquet: str
    folder: str
    workers: int

    def n_bytes(self):
        return sum(len(text.encode()) for text in self.documents)


def make_bench(documents, folder, workers, name):
    import pyarrow
    import pyarrow.parquet
    path = os.path.join(folder, name)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=1000)     # as FineWeb-Edu's
    return Bench(documents, path, folder, workers)


# --- the methods: a Bench -> arrays or lists of tokens


def ours_one_process(bench):
    """prepare_fineweb's worker function: reads the parquet file, gives uint16."""
    tasks = ((start, *task) for start, _, *task in plan_reads(bench.parquet, "text"))
    return [tokens for _, tokens, _ in encode_tasks(tasks, gpt2_tokenizer(), 0)]


def ours_pipeline(bench):
    """prepare_fineweb.py as a user runs it: from parquet to hashed shards on the disk."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as out, contextlib.redirect_stdout(io.StringIO()):
        prepare_fineweb.main(["--data_files", bench.parquet, "--out", out, "--num_proc", str(bench.workers),
                              "--shard_tokens", str(1 + bench.n_bytes() // 50)])
        return [np.load(path) for path in sorted(Path(out).glob("*.npy"), key=lambda path: path.stem[-6:])]


_encoding = {}


def _start_nanogpt_worker():
    _encoding["gpt2"] = gpt2_tokenizer()._encoding


def _nanogpt_tokenize(document):
    tokens = [50256]
    tokens.extend(_encoding["gpt2"].encode_ordinary(document["text"]))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def build_nanogpt(bench):
    """A pool whose tasks are 16 documents; the parent fills a shard with each document's array. Nothing is written."""
    shard, n = np.empty(bench.n_bytes() + len(bench.documents), np.uint16), 0
    with multiprocessing.get_context("fork").Pool(bench.workers, _start_nanogpt_worker) as pool:
        for tokens in pool.imap(_nanogpt_tokenize, ({"text": t} for t in bench.documents), chunksize=16):
            shard[n:n + len(tokens)] = tokens
            n += len(tokens)
        pool.close()
        pool.join()
    return [shard[:n]]


def tiktoken_one_thread(bench):
    encoding = gpt2_tokenizer()._encoding
    return [encoding.encode_ordinary(text) for text in bench.documents]


def tiktoken_batch(bench):
    return gpt2_tokenizer()._encoding.encode_ordinary_batch(bench.documents, num_threads=bench.workers)


@functools.cache
def _hugging_face_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    ours = gpt2_tokenizer()
    theirs = Tokenizer(models.BPE(vocab=json.loads(ours.encoder_json()), merges=ours.merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


def hugging_face_batch(bench):
    return [encoding.ids for encoding in _hugging_face_tokenizer().encode_batch_fast(bench.documents)]


# method -> (its name in the table, whether it starts processes)
METHODS = {
    tiktoken_one_thread: ("tiktoken encode_ordinary, 1 thread, lists", False),
    ours_one_process: ("ours, 1 process, parquet to uint16", False),
    ours_pipeline: ("ours, {n} workers, parquet to shards on disk", True),
    build_nanogpt: ("build-nanogpt's pool, {n} workers, memory to uint16", True),
    tiktoken_batch: ("tiktoken encode_ordinary_batch, {n} threads, lists", False),
    hugging_face_batch: ("tokenizers encode_batch_fast, {n} threads, lists", False),
}


# --- the measurement


def hash_tokens(arrays):
    """A hash of all tokens but end-of-text, which some methods add."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array, dtype="<u2")
        digest.update(array[array != 50256].tobytes())
    return digest.hexdigest()


def cpu_seconds():
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(method, bench):
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = method(bench)
    return time.perf_counter() - wall, cpu_seconds() - cpu, tokens


def measure(config, whole, little):
    """[{method, wall_s, cpu_s, start_wall_s, start_cpu_s}], one row a method and round."""
    rows, expected = [], None
    for method in METHODS:
        method(little)          # loads what it needs once
    for round_ in range(config.repeats):
        for method, (name, starts_processes) in METHODS.items():
            start_wall, start_cpu = timed(method, little)[:2] if starts_processes else (0.0, 0.0)
            wall, cpu, tokens = timed(method, whole)
            expected = expected or hash_tokens(tokens)
            if round_ == 0 and hash_tokens(tokens) != expected:
                raise UserError(f"{method.__name__} gives other tokens than the method before it")
            rows.append(dict(method=method.__name__, wall_s=wall - start_wall, cpu_s=cpu - start_cpu,
                             start_wall_s=start_wall, start_cpu_s=start_cpu))
            print(f"round {round_ + 1}: {name.format(n=config.workers)}: {wall:.2f} s, {cpu:.2f} CPU s", flush=True)
    return rows


def summarise(rows, megabytes):
    """{method: {figure: median}}."""
    medians = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method.__name__]
        medians[method.__name__] = {
            "mb_per_s": statistics.median(megabytes / row["wall_s"] for row in own),
            "mb_per_cpu_s": statistics.median(megabytes / row["cpu_s"] for row in own),
            "start_cpu_s": statistics.median(row["start_cpu_s"] for row in own)}
    return medians


def main(argv=None):
    config = parse_config(Config, argv, description=__doc__.split("\n\n")[0])
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)      # tokenizers' threads
    documents = make_documents(config)
    with tempfile.TemporaryDirectory() as folder:
        whole = make_bench(documents, folder, config.workers, "whole.parquet")
        little = make_bench(documents[:2 * config.workers], folder, config.workers, "little.parquet")
        megabytes = (whole.n_bytes() - little.n_bytes()) / 1e6
        print(f"{whole.n_bytes() / 1e6:.1f} MB in {len(documents):,} documents")
        rows = measure(config, whole, little)
    medians = summarise(rows, megabytes)
    per_core = {name: figures["mb_per_cpu_s"] for name, figures in medians.items()}
    ratios = {f"{ours} / {theirs}": per_core[ours] / per_core[theirs] for ours in ("ours_one_process", "ours_pipeline")
              for theirs in ("build_nanogpt", "tiktoken_one_thread", "tiktoken_batch", "hugging_face_batch")}
    versions = {name: importlib.metadata.version(name) for name in ("tiktoken", "tokenizers", "pyarrow", "numpy")}
    write_json(config.out, dict(
        date=datetime.date.today().isoformat(), machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions={"python": platform.python_version(), **versions}, megabytes=megabytes, documents=len(documents),
        workers=config.workers, rows=rows, medians=medians, ratios=ratios))
    print("\n| method | MB/s | MB per CPU second | against build-nanogpt | start, CPU s |\n|---|---|---|---|---|")
    for method, (name, _) in METHODS.items():
        m = medians[method.__name__]
        print(f"| {name.format(n=config.workers)} | {m['mb_per_s']:.1f} | {m['mb_per_cpu_s']:.1f} | "
              f"{m['mb_per_cpu_s'] / per_core['build_nanogpt']:.2f}x | {m['start_cpu_s']:.1f} |")
    print(f"\nwritten: {config.out}")


if __name__ == "__main__":
    run_script(main)
