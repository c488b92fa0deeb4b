"""Tokenising speed on one text in one run: prepare_fineweb's pipeline, build-nanogpt's way, tiktoken, Hugging Face.

    python -m bench.tokenize [--data FILE]

The methods take turns and the medians count: MB of text per second, of the clock and of CPU time (parent and workers
together). Each turn times a part of the text and all of it; the difference gives the speed, and what is left of the
part's time is the start of the workers. Every method must give the same tokens.
"""
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

import prepare_fineweb
from bench.common import compared, machine, write_results
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.documents import find_files, python_documents, read_documents, split_into_pieces
from exactgpt.shard_writer import encode_tasks
from exactgpt.shards import permutation
from exactgpt.tokenizer import EOT_TEXT, gpt2_tokenizer


@dataclass(kw_only=True)
class Config:
    """The flags of this benchmark."""
    data: str = flag("", "text to use, in any format of prepare_text.py (default: CPython's documentation)")
    megabytes: int = flag(40, "how much text; repeated, with the documents in another order, until it is enough", low=1)
    repeats: int = flag(5, "rounds", low=1)
    workers: int = flag(2, "processes and threads of the parallel methods", low=1)


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
        """Bytes of all texts in UTF-8."""
        return sum(len(text.encode()) for text in self.documents)


def make_bench(documents, folder, workers, name):
    """The Bench of some texts, with its parquet file in a folder."""
    import pyarrow
    import pyarrow.parquet
    path = os.path.join(folder, name)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=1000)     # as FineWeb-Edu's
    return Bench(documents, path, folder, workers)


# --- the methods: a Bench -> arrays or lists of tokens


def ours_one_process(bench):
    """prepare_fineweb's worker function: reads the parquet file, gives uint16."""
    tasks = ((start, *task) for start, _, *task in split_into_pieces(bench.parquet, "text"))
    return [tokens for _, tokens, _ in encode_tasks(tasks, gpt2_tokenizer(), 0)]


def ours_pipeline(bench):
    """prepare_fineweb.py as a user runs it: from parquet to hashed shards on the disk."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as out, contextlib.redirect_stdout(io.StringIO()):
        prepare_fineweb.main(["--data_files", bench.parquet, "--out", out, "--num_proc", str(bench.workers),
                              "--shard_tokens", str(1 + bench.n_bytes() // 50)])
        return [np.load(path) for path in sorted(Path(out).glob("*.npy"), key=lambda path: path.stem[-6:])]


@functools.cache
def tiktokens_own():
    """tiktoken.get_encoding("gpt2") without its download: the same vocabulary, tiktoken's pattern."""
    ours = gpt2_tokenizer()
    ranks = {ours.decode_bytes([i]): i for i in range(ours.eot)}
    return tiktoken.Encoding("gpt2", pat_str=tiktoken_ext.openai_public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT_TEXT: ours.eot})


def _nanogpt_tokenize(document):
    tokens = [50256]
    tokens.extend(tiktokens_own().encode_ordinary(document["text"]))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def build_nanogpt(bench):
    """A pool whose tasks are 16 documents; the parent fills a shard with each document's array. Nothing is written."""
    shard, n = np.empty(bench.n_bytes() + len(bench.documents), np.uint16), 0
    with multiprocessing.get_context("fork").Pool(bench.workers) as pool:
        for tokens in pool.imap(_nanogpt_tokenize, ({"text": t} for t in bench.documents), chunksize=16):
            shard[n:n + len(tokens)] = tokens
            n += len(tokens)
        pool.close()
        pool.join()
    return [shard[:n]]


def tiktoken_one_thread(bench):
    """One text after the other."""
    encoding = tiktokens_own()
    return [encoding.encode_ordinary(text) for text in bench.documents]


def tiktoken_batch(bench):
    """tiktoken's own threads."""
    return tiktokens_own().encode_ordinary_batch(bench.documents, num_threads=bench.workers)


@functools.cache
def _hugging_face_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    ours = gpt2_tokenizer()
    theirs = Tokenizer(models.BPE(vocab=json.loads(ours.encoder_json()), merges=ours.merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


def hugging_face_batch(bench):
    """tokenizers' own threads."""
    return [encoding.ids for encoding in _hugging_face_tokenizer().encode_batch_fast(bench.documents)]


METHODS = {
    tiktoken_one_thread: "tiktoken encode_ordinary, 1 thread, to lists",
    ours_one_process: "ours, 1 process, from parquet to uint16",
    ours_pipeline: "ours, {n} workers, from parquet to shards on the disk",
    build_nanogpt: "build-nanogpt's pool, {n} workers, to uint16",
    tiktoken_batch: "tiktoken encode_ordinary_batch, {n} threads, to lists",
    hugging_face_batch: "tokenizers encode_batch_fast, {n} threads, to lists",
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
    """(seconds of the clock, of CPU time, tokens)."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = method(bench)
    return time.perf_counter() - wall, cpu_seconds() - cpu, tokens


def measure(config, little, whole):
    """One row a method and round: MB/s, MB per CPU second, CPU seconds of the start."""
    rows, megabytes = [], (whole.n_bytes() - little.n_bytes()) / 1e6
    hashes = {hash_tokens(method(little)) for method in METHODS}        # also loads what each needs once
    if len(hashes) > 1:
        raise UserError("the methods give different tokens")
    for round_ in range(config.repeats):
        for method, name in METHODS.items():
            wall_little, cpu_little, _ = timed(method, little)
            wall, cpu, tokens = timed(method, whole)
            if round_ == 0:
                hashes.add(hash_tokens(tokens))
            per_megabyte = (cpu - cpu_little) / megabytes
            rows.append(dict(method=method.__name__, mb_per_s=megabytes / (wall - wall_little),
                             mb_per_cpu_s=1 / per_megabyte,
                             start_cpu_s=cpu_little - per_megabyte * little.n_bytes() / 1e6))
            print(f"round {round_ + 1}: {rows[-1]['mb_per_cpu_s']:5.1f} MB per CPU second, "
                  f"{name.format(n=config.workers)}", flush=True)
    if len(hashes) > 2:
        raise UserError("the methods give different tokens")
    return rows


def main(argv=None):
    """Time all methods by turns, check that they agree, and write the comparison."""
    config = parse_config(Config, argv, description=__doc__.split("\n\n")[0])
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)      # tokenizers' threads
    documents = make_documents(config)
    n_little = int(len(documents) * min(0.5, 5 * config.workers / config.megabytes))   # a piece for every worker
    with tempfile.TemporaryDirectory() as folder:
        little = make_bench(documents[:n_little], folder, config.workers, "little.parquet")
        whole = make_bench(documents, folder, config.workers, "whole.parquet")
        print(f"{whole.n_bytes() / 1e6:.1f} MB in {len(documents):,} documents, "
              f"{little.n_bytes() / 1e6:.1f} MB in the part")
        rows = measure(config, little, whole)
        figures = ("mb_per_s", "mb_per_cpu_s", "start_cpu_s")
        medians = {m.__name__: {f: statistics.median(r[f] for r in rows if r["method"] == m.__name__) for f in figures}
                   for m in METHODS}
        per_core = {name: row["mb_per_cpu_s"] for name, row in medians.items()}
        ratios = {f"{ours} / {other}": per_core[ours] / per_core[other] for other in per_core
                  for ours in ("ours_one_process", "ours_pipeline") if other != ours}
        versions = {name: importlib.metadata.version(name) for name in ("tiktoken", "tokenizers", "pyarrow")}
        print_table(medians, per_core["build_nanogpt"], config.workers)
        write_results("tokenize", dict(machine=machine(), versions=versions, megabytes=whole.n_bytes() / 1e6,
                                       workers=config.workers, medians=medians, ratios=ratios, rows=rows), [
            compared("tokenising, pipeline of prepare_fineweb.py", "MB/CPU s", per_core["ours_pipeline"],
                     {m.__name__: title for m, title in METHODS.items()}[name].format(n=config.workers), per_core[name])
            for name in per_core if not name.startswith("ours")])


def print_table(medians, reference, workers):
    """Print medians and ratios."""
    print("\n| method | MB/s | MB per CPU second | against build-nanogpt | start, CPU s |\n|---|---|---|---|---|")
    for method, name in METHODS.items():
        m = medians[method.__name__]
        print(f"| {name.format(n=workers)} | {m['mb_per_s']:.1f} | {m['mb_per_cpu_s']:.1f} | "
              f"{m['mb_per_cpu_s'] / reference:.2f}x | {m['start_cpu_s']:.1f} |")
    print()


if __name__ == "__main__":
    run_script(main)
