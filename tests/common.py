"""Helpers that the tests share, besides the fixtures in conftest.py: paths, small runs, references in plain Python."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# Flags of train.py for a run of seconds in fp32 on the CPU, without evaluations, samples and periodic checkpoints.
TINY = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--device", "cpu", "--dtype", "fp32",
        "--hellaswag_every", 0, "--sample_every", 0, "--eval_every", 0, "--checkpoint_every", 0)
HELLASWAG_FILE = ROOT / "tests" / "data" / "hellaswag_20.jsonl"     # 20 examples of the validation split, from the hub
HELLASWAG_EXAMPLE = dict(activity_label="Topic", ctx="He sits. she", ctx_a="He sits.", ctx_b="she",
                         endings=["a one.", "b two.", "c three.", "d four."], label=1)

# -----------------------------------------------------------------------------
# runs of scripts

def script_env(home, more=None):
    """Return the environment for a script under test: the given HOME, our modules, no torchrun variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}


def torchrun(run, n, *flags, script="train.py", **options):
    """Run a script under torchrun with n processes, by the fixture `run`; return (rc, stdout, stderr)."""
    return run(*torchrun_arguments(n), ROOT / script, *flags, **options)


def start_process(tmp_path, *arguments, **env):
    """Start Python with some arguments in the background; return the Popen, whose `log` is the file of its output."""
    log = open(tmp_path / f"out_{time.monotonic_ns()}", "w+")
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                               env=script_env(tmp_path, env))
    process.log = log
    return process


def processes_with(mark):
    """Return {pid: command} of the processes whose environment has MARK=mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:      # it has ended, or is not ours
            pass
    return {pid: command for pid, command in found.items() if command}      # without those that have ended


def signalled_during(train_step):
    """Return the train_step with a stop signal that comes during each step."""
    def wrapped(run, config, runtime, *more):
        runtime.stop_signal = "SIGTERM"
        return train_step(run, config, runtime, *more)
    return wrapped


def torchrun_arguments(n, *more):
    """Return the arguments after `python` that start torchrun with n processes; more: further flags of torchrun."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *more]


def cpu_runtime(rank=0, world_size=1, dtype="fp32"):
    """Return the Runtime of a process on the CPU."""
    import torch

    from exactgpt.device import Hardware
    from exactgpt.distributed import Runtime
    return Runtime(rank, rank, world_size, torch.device("cpu"), Hardware("cpu"), dtype)


def refusal(function, *args, **options):
    """Return the words of the UserError that a call raises, which are one line."""
    import pytest

    from exactgpt.config import UserError
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def model_refusal(folder):
    """Return the words with which open_model refuses a folder, which name it."""
    from exactgpt.open_model import open_model
    message = refusal(open_model, folder)
    assert str(folder) in message
    return message


def read_metrics(log_dir):
    """Return the lines of a run's metrics.jsonl as dicts."""
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]


def logged_losses(log_dir):
    """Return the training losses that a run logged."""
    return [line["loss"] for line in read_metrics(log_dir) if "loss" in line]


def mlflow_runs(log_dir, experiment):
    """Return the mlflow runs of an experiment in log_dir, the newest first.

    Each has run, params, status, history ({metric: [(step, value)]}) and artifacts ({path: local path}).
    """
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{log_dir.resolve()}/mlflow.db")
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([number], order_by=["attributes.start_time DESC"])
    return [SimpleNamespace(
        run=run, params=run.data.params, status=run.info.status,
        history={name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                 for name in run.data.metrics},
        artifacts={a.path: client.download_artifacts(run.info.run_id, a.path)
                   for a in client.list_artifacts(run.info.run_id)}) for run in runs]


# -----------------------------------------------------------------------------
# token shards

def write_shards(folder, train_sizes, val_sizes=(64,), vocab=257, seed=0, tokens=None, tokenizer=None):
    """Write a complete shard folder of random tokens, with manifest and tokenizer files; return the folder.

    train_sizes, val_sizes: tokens per shard. The tokenizer is the one given, else GPT-2's if vocab > 257, else single
    bytes and end-of-text; the tokens are below its vocabulary size, else below `vocab`.
    tokens: the whole stream, val shards first, instead of random tokens.
    """
    from exactgpt.shard_writer import save_shard
    from exactgpt.shards import Manifest
    from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
    vocab = tokenizer.n_vocab if tokenizer else vocab
    folder.mkdir(exist_ok=True)
    (tokenizer or (gpt2_tokenizer() if vocab > 257 else Tokenizer([], "bytes"))).save(folder)
    tokenizer = load_tokenizer(folder)      # with the name that it gets when it is loaded from a folder
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


def permuted(items, *key):
    """Return the items in the order that a key gives, written from the specification alone (docs/data.md)."""
    key = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(len(items)).tolist()
    return [item for _, _, item in sorted((r, i, item) for i, (r, item) in enumerate(zip(raw, items)))]


def brute_force_order(sizes, block_size, seed, n_positions):
    """Return the window numbers at global positions 0 to n_positions - 1, written from the same specification.

    sizes: tokens per train shard in file order.
    """
    owner = [shard for shard, n in enumerate(sizes) for _ in range(n)]           # of each token
    windows = range((sum(sizes) - 1) // block_size)
    order, epoch = [], 0
    while len(order) < n_positions:
        for shard in permuted(range(len(sizes)), seed, epoch):
            order += permuted([k for k in windows if owner[k * block_size] == shard], seed, epoch, shard)
        epoch += 1
    return order[:n_positions]


# -----------------------------------------------------------------------------
# nanoGPT's files

def write_nanogpt_data(folder, text):
    """Write the folder that nanoGPT's data/shakespeare_char/prepare.py makes of a text; return its characters."""
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}
    folder.mkdir(parents=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(
        dict(vocab_size=len(characters), itos=dict(enumerate(characters)), stoi=stoi)))
    cut = int(len(text) * 0.9)
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        np.array([stoi[c] for c in part], dtype="<u2").tofile(folder / name)
    return characters


def write_nanogpt_checkpoint(path, state, dataset, **model_args):
    """Write a state dict as the ckpt.pt of nanoGPT's train.py; model_args: those that are not nanoGPT's defaults."""
    import torch
    args = dict(dict(block_size=32, bias=False, dropout=0.2), **model_args)
    path.parent.mkdir(parents=True)
    torch.save(dict(model={f"_orig_mod.{name}": tensor for name, tensor in state.items()},
                    optimizer={"state": {}, "param_groups": []}, model_args=args, iter_num=5000,
                    best_val_loss=torch.tensor(1.47), config=dict(out_dir=path.parent.name, dataset=dataset)), path)


# -----------------------------------------------------------------------------
# models

def in_our_layout(theirs, name, tensor):
    """Return a tensor of parameter `name` of a transformers model in our layout: Conv1D weights are transposed."""
    from transformers.pytorch_utils import Conv1D
    is_conv = isinstance(theirs.get_submodule(name.rpartition(".")[0]), Conv1D)
    return tensor.t() if is_conv and tensor.dim() == 2 else tensor


def gpt_from_transformers(theirs, activation="gelu_tanh"):
    """Return a GPT in eval mode with the weights of a GPT2LMHeadModel, copied without open_model.py."""
    import torch

    from model import GPT, GPTConfig
    c = theirs.config
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, activation=activation,
                          tie_word_embeddings=c.tie_word_embeddings, layer_norm_eps=c.layer_norm_epsilon))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(in_our_layout(theirs, name, theirs.get_parameter(name)))
    return model.eval()


def write_model(model, folder, tokenizer=None):
    """Write a GPT to a folder in Hugging Face format."""
    from exactgpt.huggingface import write_pretrained
    write_pretrained(folder, model.config_dict(), model.state_dict(), tokenizer)
