"""Fixtures that the tests share: shard folders, tiny models of transformers, scripts run as a user runs them."""
import os

os.environ["OMP_NUM_THREADS"] = "1"      # before torch is imported: two xdist workers share two cores
os.environ["HF_HUB_OFFLINE"] = "1"       # no test may reach the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import forks

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


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


def script_env(home, more=None):
    """The environment of a script under test: an empty HOME, this repository's modules, nothing of torchrun's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(train_sizes, val_sizes=(64,), vocab=257, seed=0, tokens=None, name="shards") -> a folder.

    Random tokens of a vocabulary of single bytes and end-of-text (257), or below `vocab` where that is given;
    `tokens` instead: the whole stream, val shards first. With a complete manifest and the tokenizer's files,
    as prepare_text.py leaves a folder: train.py trains on it.
    """
    def make(train_sizes, val_sizes=(64,), vocab=257, seed=0, tokens=None, name="shards"):
        from exactgpt.shards import Manifest, save_shard
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


def brute_force_order(sizes, block_size, seed, n_positions):
    """The window numbers at global positions 0..n_positions - 1, by the words of DESIGN.md ("Data order") alone.

    sizes: tokens of the train shards in file order.
    """
    def permuted(items, *key):
        key = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")
        raw = np.random.Philox(key=key).random_raw(len(items)).tolist()
        return [item for _, _, item in sorted((r, i, item) for i, (r, item) in enumerate(zip(raw, items)))]
    owner = [shard for shard, n in enumerate(sizes) for _ in range(n)]           # of each token
    windows = range((sum(sizes) - 1) // block_size)
    order, epoch = [], 0
    while len(order) < n_positions:
        for shard in permuted(range(len(sizes)), seed, epoch):
            order += permuted([k for k in windows if owner[k * block_size] == shard], seed, epoch, shard)
        epoch += 1
    return order[:n_positions]


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


def in_our_layout(theirs, name, tensor):
    """A tensor shaped like parameter `name` of a transformers model, as nn.Linear stores it: Conv1D's transposed."""
    from transformers.pytorch_utils import Conv1D
    is_conv = isinstance(theirs.get_submodule(name.rpartition(".")[0]), Conv1D)
    return tensor.t() if is_conv and tensor.dim() == 2 else tensor


def as_ours(theirs, activation="gelu_tanh"):
    """A GPT of ours in eval mode with the weights of a GPT2LMHeadModel, copied without hf_format."""
    import torch

    from model import GPT, GPTConfig
    c = theirs.config
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, activation=activation,
                          tie_word_embeddings=c.tie_word_embeddings, layer_norm_eps=c.layer_norm_epsilon))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(in_our_layout(theirs, name, theirs.get_parameter(name)))
    return model.eval()


@pytest.fixture
def gpt_nano():
    """The folder of a small trained GPT-2 in Hugging Face format (untied head, 11 positions, 3 tokens)."""
    folder = SHARED_DATA / "gpt_nano"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder
