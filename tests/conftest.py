"""Fixtures that the tests share: shard folders, tiny models of transformers, scripts run as a user runs them."""
import os

os.environ["OMP_NUM_THREADS"] = "1"      # before torch is imported: two xdist workers share two cores
os.environ["HF_HUB_OFFLINE"] = "1"       # no test may reach the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
import time

import numpy as np
import pytest
from common import ROOT, SHARED_DATA, script_env

from bench import forks


@pytest.fixture
def run(tmp_path_factory):
    """run(script, *flags, cwd=ROOT, env={}, input=None, timeout=240) -> (rc, stdout, stderr), in an empty HOME.

    script: a file of the repository, or "-c" with code as the first flag, or "-m". env is added to the environment.
    Scripts with torch are forks of a process that has imported it, unless env changes what torch reads on import.
    """
    def run_script(script, *flags, cwd=ROOT, env=None, input=None, timeout=240):
        home = tmp_path_factory.mktemp("home")
        slow_to_import = not script.startswith(("-", "prepare_", "plot"))
        if slow_to_import and not any(name.startswith(("PYTHON", "OMP_", "TORCH", "PATH")) for name in env or {}):
            return run_fork(script, flags, script_env(home, env), home, cwd, input, timeout)
        command = [sys.executable, script if script.startswith("-") else str(ROOT / script), *map(str, flags)]
        result = subprocess.run(command, cwd=cwd, env=script_env(home, env), input=input, capture_output=True,
                                text=True, timeout=timeout)
        return result.returncode, result.stdout, result.stderr
    return run_script


def run_fork(script, flags, env, folder, cwd, input, timeout):
    """subprocess.run of a script, by bench.forks: (rc, stdout, stderr). folder: for its streams."""
    files = {name: folder / f".{name}" for name in ("in", "out", "err")}
    for file in files.values():
        file.touch()
    files["in"].write_text(input or "", encoding="utf-8")
    process = forks.start(script, flags, env, files["out"], files["err"], files["in"], cwd)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(script, timeout, files["out"].read_text(), files["err"].read_text())
    return process.exitcode, files["out"].read_text(encoding="utf-8"), files["err"].read_text(encoding="utf-8")


@pytest.fixture
def run_ranks(tmp_path_factory):
    """run_ranks(n, script, *flags, env={}, timeout=120) -> (exit codes, output) of n forked processes of one group."""
    def run_group(n, script, *flags, env=None, timeout=120):
        home = tmp_path_factory.mktemp("home")
        ranks = forks.start_ranks(n, script, flags, script_env(home, env), home / ".out")
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        output = (home / ".out").read_text(encoding="utf-8")
        assert None not in codes, f"ranks that did not end: {codes}\n{output}"
        return codes, output
    return run_group


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(train_sizes, val_sizes=(64,), vocab=257, seed=0, tokens=None, name="shards") -> a folder.

    Random tokens of a vocabulary of single bytes and end-of-text (257), or below `vocab` where that is given;
    `tokens` instead: the whole stream, val shards first. With a complete manifest and the tokenizer's files,
    as prepare_text.py leaves a folder: train.py trains on it.
    """
    def make(train_sizes, val_sizes=(64,), vocab=257, seed=0, tokens=None, name="shards"):
        from exactgpt.shard_writer import save_shard
        from exactgpt.shards import Manifest
        from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
        folder = tmp_path / name
        folder.mkdir()
        (gpt2_tokenizer() if vocab > 257 else Tokenizer([], "bytes")).save(folder)
        tokenizer = load_tokenizer(folder)
        manifest = Manifest("test", tokenizer.name, tokenizer.n_vocab, tokenizer.eot, complete=True)
        sizes = [*((n, "val") for n in val_sizes), *((n, "train") for n in train_sizes)]
        if tokens is None:
            tokens = np.random.default_rng(seed).integers(0, vocab, sum(n for n, _ in sizes))
        start = 0
        for i, (n, split) in enumerate(sizes):
            part = np.asarray(tokens[start:start + n], dtype="<u2")
            manifest.shards.append(save_shard(folder, "test", split, i, part))
            start += n
        manifest.save(folder)
        return folder
    return make


@pytest.fixture
def tiny_gpt2():
    """tiny_gpt2(**GPT2Config fields) -> a GPT2LMHeadModel of transformers in eval mode, its weights all random.

    Biases and LayerNorms too, so that a forgotten one shows; matrices so large that every path matters and greedy text
    wanders. Defaults: 2 layers, 3 heads, 24 channels, 32 positions, 65 tokens, no dropout.
    """
    def make(seed=0, **options):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        shape = dict(n_layer=2, n_head=3, n_embd=24, n_positions=32, vocab_size=65, embd_pdrop=0.0, attn_pdrop=0.0,
                     resid_pdrop=0.0, bos_token_id=0, eos_token_id=None)
        model = GPT2LMHeadModel(GPT2Config(**{**shape, **options}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                random = torch.randn(p.shape, generator=generator)
                if p.dim() == 1:
                    p.add_(0.1 * random)
                else:
                    p.copy_(random if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
                            else 2 * random / p.size(0) ** 0.5)
        return model.eval()
    return make


@pytest.fixture
def gpt_nano():
    """The folder of a small trained GPT-2 in Hugging Face format (untied head, 11 positions, 3 tokens)."""
    folder = SHARED_DATA / "gpt_nano"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder
