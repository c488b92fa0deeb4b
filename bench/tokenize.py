"""Compare tokenizing speed: prepare_fineweb.py's pipeline, build-nanogpt's pool, tiktoken and Hugging Face tokenizers.

    python -m bench.tokenize [--data FILE]

The methods take turns on the same text, and the medians count: MB of text per second of wall time and of CPU time
(parent and workers together). Each turn times a part of the text and all of it. The difference gives the speed; the
rest of the part's time is the start of the workers. All methods must give the same tokens.
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
from bench.common import comparison_row, describe_machine, write_results
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.documents import find_files, python_documents, read_documents, read_texts
from exactgpt.shard_writer import encode_in_order
from exactgpt.shards import permutation
from exactgpt.tokenizer import EOT_TEXT, gpt2_tokenizer


@dataclass(kw_only=True)
class TokenizeConfig:
    """The flags of this benchmark."""
    data: str = flag("", "file of text, in any format that prepare_text.py reads (default: CPython's documentation)")
    megabytes: int = flag(40, "amount of text in MB; shorter texts are repeated with the documents reshuffled", low=1)
    repeats: int = flag(5, "number of rounds; the medians count", low=1)
    workers: int = flag(2, "processes or threads of the parallel methods", low=1)


def make_documents(config):
    """Return at least --megabytes of whole documents, in a new order at each repetition."""
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
class Corpus:
    """Documents in memory and in a parquet file, and the settings of the methods."""
    documents: list
    parquet: str
    folder: str
    workers: int

    def n_bytes(self):
        """Return the bytes of all texts in UTF-8."""
        return sum(len(text.encode()) for text in self.documents)


def make_corpus(documents, folder, workers, name):
    """Write a parquet file of the documents into a folder and return the Corpus."""
    import pyarrow
    import pyarrow.parquet
    path = os.path.join(folder, name)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=1000)     # as FineWeb-Edu's
    return Corpus(documents, path, folder, workers)


# --- the methods: each tokenizes a Corpus and returns arrays or lists of tokens; their names are in the results


def ours_one_process(corpus):
    """Tokenize with one thread of prepare_fineweb.py, from parquet to uint16."""
    documents = ((row, text, True) for row, text in read_texts(corpus.parquet, "text"))
    return [tokens for _, tokens in encode_in_order(documents, gpt2_tokenizer(), 1)]


def ours_pipeline(corpus):
    """Tokenize with prepare_fineweb.py as a user runs it, from parquet to hashed shards on disk."""
    with tempfile.TemporaryDirectory(dir=corpus.folder) as out, contextlib.redirect_stdout(io.StringIO()):
        prepare_fineweb.main(["--data_files", corpus.parquet, "--out", out, "--num_proc", str(corpus.workers),
                              "--shard_tokens", str(1 + corpus.n_bytes() // 50)])
        return [np.load(path) for path in sorted(Path(out).glob("*.npy"), key=lambda path: path.stem[-6:])]


@functools.cache
def tiktoken_encoding():
    """Return tiktoken.get_encoding("gpt2") without its download: the same vocabulary and tiktoken's pattern."""
    ours = gpt2_tokenizer()
    ranks = {ours.decode_bytes([i]): i for i in range(ours.eot)}
    return tiktoken.Encoding("gpt2", pat_str=tiktoken_ext.openai_public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT_TEXT: ours.eot})


def _nanogpt_tokenize(document):
    tokens = [50256]
    tokens.extend(tiktoken_encoding().encode_ordinary(document["text"]))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def build_nanogpt(corpus):
    """Tokenize as build-nanogpt's fineweb.py does, but write nothing.

    A pool gets 16 documents per task, and the parent copies each document's array into the shard.
    """
    shard, n = np.empty(corpus.n_bytes() + len(corpus.documents), np.uint16), 0
    with multiprocessing.get_context("fork").Pool(corpus.workers) as pool:
        for tokens in pool.imap(_nanogpt_tokenize, ({"text": t} for t in corpus.documents), chunksize=16):
            shard[n:n + len(tokens)] = tokens
            n += len(tokens)
        pool.close()
        pool.join()
    return [shard[:n]]


def tiktoken_one_thread(corpus):
    """Tokenize one text after the other with tiktoken."""
    encoding = tiktoken_encoding()
    return [encoding.encode_ordinary(text) for text in corpus.documents]


def tiktoken_batch(corpus):
    """Tokenize with tiktoken's threads."""
    return tiktoken_encoding().encode_ordinary_batch(corpus.documents, num_threads=corpus.workers)


@functools.cache
def _hugging_face_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    ours = gpt2_tokenizer()
    theirs = Tokenizer(models.BPE(vocab=json.loads(ours.encoder_json()), merges=ours.merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


def hugging_face_batch(corpus):
    """Tokenize with the threads of Hugging Face tokenizers."""
    return [encoding.ids for encoding in _hugging_face_tokenizer().encode_batch_fast(corpus.documents)]


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
    """Return a hash of all tokens except end-of-text, which only some methods add."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array, dtype="<u2")
        digest.update(array[array != 50256].tobytes())
    return digest.hexdigest()


def cpu_seconds():
    """Return the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def time_method(method, corpus):
    """Return (wall seconds, CPU seconds, tokens) of a method."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = method(corpus)
    return time.perf_counter() - wall, cpu_seconds() - cpu, tokens


def measure_methods(config, part, whole):
    """Time all methods in turn; return a row (a dict) per method and round. Raises UserError if the tokens differ.

    Its figures: MB/s, MB per CPU second, CPU seconds to start.
    """
    rows, megabytes = [], (whole.n_bytes() - part.n_bytes()) / 1e6
    hashes = {hash_tokens(method(part)) for method in METHODS}        # also a warm-up
    if len(hashes) > 1:
        raise UserError("the methods give different tokens")
    for round_ in range(config.repeats):
        for method, name in METHODS.items():
            wall_part, cpu_part, _ = time_method(method, part)
            wall, cpu, tokens = time_method(method, whole)
            if round_ == 0:
                hashes.add(hash_tokens(tokens))
            per_megabyte = (cpu - cpu_part) / megabytes
            rows.append(dict(method=method.__name__, mb_per_s=megabytes / (wall - wall_part),
                             mb_per_cpu_s=1 / per_megabyte,
                             start_cpu_s=cpu_part - per_megabyte * part.n_bytes() / 1e6))
            print(f"round {round_ + 1}: {rows[-1]['mb_per_cpu_s']:5.1f} MB per CPU second, "
                  f"{name.format(n=config.workers)}", flush=True)
    if len(hashes) > 2:
        raise UserError("the methods give different tokens")
    return rows


def main(argv=None):
    """Time all methods in turn and write the comparison. Raises UserError if their tokens differ."""
    config = parse_config(TokenizeConfig, argv, description=__doc__.split("\n\n")[0])
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)      # tokenizers' threads
    documents = make_documents(config)
    n_part = int(len(documents) * min(0.5, 5 * config.workers / config.megabytes))     # a piece for every worker
    with tempfile.TemporaryDirectory() as folder:
        part = make_corpus(documents[:n_part], folder, config.workers, "part.parquet")
        whole = make_corpus(documents, folder, config.workers, "whole.parquet")
        print(f"{whole.n_bytes() / 1e6:.1f} MB in {len(documents):,} documents, "
              f"{part.n_bytes() / 1e6:.1f} MB in the part")
        rows = measure_methods(config, part, whole)
        figures = ("mb_per_s", "mb_per_cpu_s", "start_cpu_s")
        medians = {m.__name__: {f: statistics.median(r[f] for r in rows if r["method"] == m.__name__) for f in figures}
                   for m in METHODS}
        per_core = {name: row["mb_per_cpu_s"] for name, row in medians.items()}
        ratios = {f"{ours} / {other}": per_core[ours] / per_core[other] for other in per_core
                  for ours in ("ours_one_process", "ours_pipeline") if other != ours}
        versions = {name: importlib.metadata.version(name) for name in ("tiktoken", "tokenizers", "pyarrow")}
        print_table(medians, per_core["build_nanogpt"], config.workers)
        write_results("tokenize", dict(machine=describe_machine(), versions=versions, megabytes=whole.n_bytes() / 1e6,
                                       workers=config.workers, medians=medians, ratios=ratios, rows=rows), [
            comparison_row("tokenising, pipeline of prepare_fineweb.py", "MB/CPU s", per_core["ours_pipeline"],
                           {m.__name__: title for m, title in METHODS.items()}[name].format(n=config.workers),
                           per_core[name])
            for name in per_core if not name.startswith("ours")])


def print_table(medians, reference, workers):
    """Print a table of medians, with ratios to the reference (MB per CPU second)."""
    print("\n| method | MB/s | MB per CPU second | against build-nanogpt | start, CPU s |\n|---|---|---|---|---|")
    for method, name in METHODS.items():
        m = medians[method.__name__]
        print(f"| {name.format(n=workers)} | {m['mb_per_s']:.1f} | {m['mb_per_cpu_s']:.1f} | "
              f"{m['mb_per_cpu_s'] / reference:.2f}x | {m['start_cpu_s']:.1f} |")
    print()


if __name__ == "__main__":
    run_script(main)
