"""Fixtures that the tests share: shard folders, tiny transformers models, scripts run as a user runs them.

Everything else that tests and benchmarks share is imported from the root: `from tests.common import ROOT`.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"      # before torch is imported: two xdist workers share two cores
os.environ["HF_HUB_OFFLINE"] = "1"       # no test may reach the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import csv
import random
import subprocess
import sys

import pytest

from tests import forks
from tests.common import ROOT, SHARED_DATA, script_env, write_shards


@pytest.fixture
def run(tmp_path_factory):
    """Return run(script, *flags, cwd=ROOT, env={}, input=None, timeout=240) -> (rc, stdout, stderr).

    It runs a script in an empty HOME. script: a file of the repository, "-c" with code as the first flag, or "-m". env:
    more environment variables. Scripts that import torch are forks of a process that has already imported it, unless
    env changes what torch reads at import.
    """
    def run_script(script, *flags, cwd=ROOT, env=None, input=None, timeout=240):
        home = tmp_path_factory.mktemp("home")
        slow_to_import = not script.startswith(("-", "prepare_", "plot"))
        if slow_to_import and not any(name.startswith(("PYTHON", "OMP_", "TORCH", "PATH")) for name in env or {}):
            return run_forked(script, flags, script_env(home, env), home, cwd, input, timeout)
        command = [sys.executable, script if script.startswith("-") else str(ROOT / script), *map(str, flags)]
        result = subprocess.run(command, cwd=cwd, env=script_env(home, env), input=input, capture_output=True,
                                text=True, timeout=timeout)
        return result.returncode, result.stdout, result.stderr
    return run_script


def run_forked(script, flags, env, folder, cwd, input, timeout):
    """Run a script as a fork (forks.py); return (rc, stdout, stderr). folder: for the files of its streams."""
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


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """Return run_ranks(n, script, *flags, env={}, timeout=120) -> (exit codes, output).

    It runs a script in n forked processes that form a process group.
    """
    def run_group(n, script, *flags, env=None, timeout=120):
        home = tmp_path_factory.mktemp("home")
        codes = forks.run_ranks(n, script, flags, script_env(home, env), home / ".out", timeout)
        output = (home / ".out").read_text(encoding="utf-8")
        assert None not in codes, f"some ranks did not exit: {codes}\n{output}"
        return codes, output
    return run_group


@pytest.fixture(scope="session")
def train_ranks(run_ranks):
    """Return train_ranks(n, *flags, **env) -> (exit codes, output).

    It runs a tiny train.py in n processes, with an accident if env contains ACCIDENT (accidents.py).
    """
    from tests import killed_runs
    return lambda n, *flags, **env: run_ranks(n, killed_runs.SCRIPT, *killed_runs.FLAGS, *flags, env=env)


@pytest.fixture(scope="module")
def undisturbed(train_ranks, tmp_path_factory):
    """Return undisturbed(folder, n, *flags) -> log_dir of a finished train_ranks run; repeated calls reuse the run.

    folder: of token shards, the same in all calls of a module.
    """
    done = {}

    def log_dir_of(folder, n, *flags):
        if (n, flags) not in done:
            log_dir = tmp_path_factory.mktemp("undisturbed")
            codes, out = train_ranks(n, *flags, "--data_dir", folder, "--log_dir", log_dir)
            assert codes == [0] * n, out
            done[n, flags] = log_dir
        return done[n, flags]
    return log_dir_of


@pytest.fixture
def make_shards(tmp_path):
    """Return make_shards(train_sizes, val_sizes=(64,), name="shards", ...) -> folder that write_shards has written."""
    return lambda *sizes, name="shards", **options: write_shards(tmp_path / name, *sizes, **options)


@pytest.fixture
def tiny_gpt2():
    """Return tiny_gpt2(seed=0, **GPT2Config fields) -> GPT2LMHeadModel in eval mode with random weights.

    Biases and LayerNorms are random too, so that a forgotten one shows. The matrices are large enough that every path
    matters and greedy text does not repeat one token. Defaults: 2 layers, 3 heads, 24 channels, 32 positions, 65
    tokens, no dropout.
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
def byte_model(tmp_path):
    """Return (path, model) of a checkpoint: an untrained byte-level language model with 32 positions."""
    import torch

    from exactgpt.checkpoint import save_checkpoint
    from exactgpt.tokenizer import Tokenizer
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig(32, 320, 2, 2, 32)), Tokenizer([], "bytes")
    save_checkpoint(tmp_path / "base.pt", dict(model=model.state_dict(), config=model.config_dict(), step=3,
                                               val_loss=5.0, tokenizer=tokenizer.to_checkpoint()))
    return tmp_path / "base.pt", model


@pytest.fixture
def reviews(tmp_path):
    """Return a .csv file of 160 reviews with columns review, sentiment, stars; one word decides the sentiment."""
    rng = random.Random(0)
    with open(tmp_path / "reviews.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["review", "sentiment", "stars"])
        for i in range(160):
            words = ["great", "lovely", "fine"] if i % 4 else ["awful", "boring", "poor"]
            beginning = rng.choice(["A", 'One, "what a"', "So"])
            text = f"{beginning} {rng.choice(words)} {rng.choice('abcdef')}"
            table.writerow([text, "good" if i % 4 else "bad", i % 5])
    return tmp_path / "reviews.csv"


@pytest.fixture
def classifier_flags(reviews, byte_model):
    """Return classifier_flags(out, data=reviews) -> flags of finetune_classifier.py to train byte_model in seconds."""
    tiny = ("--device", "cpu", "--dtype", "fp32", "--num_epochs", 6, "--batch_size", 16, "--max_lr", 3e-3, "--dropout",
            0, "--text_column", "review", "--label_column", "sentiment", "--init_from", byte_model[0])
    return lambda out, data=reviews: (*tiny, "--data", data, "--out", out)


@pytest.fixture
def gpt_nano():
    """Return the folder of a small trained GPT-2 in Hugging Face format (untied head, 11 positions, 3 tokens)."""
    folder = SHARED_DATA / "gpt_nano"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder
