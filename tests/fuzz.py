"""Every kind of file that the scripts read: how a good one is made, who reads it, and what counts as a fault.

A mutant (mutants.py) must be read as the good file, or refused by a UserError, or, where neither hash nor header can
tell, read as what it says. A fault is any other exception, a read that takes too long or too much memory, code that a
file makes run, and a value that differs though a hash or a header could tell. By the script: a traceback, or an exit
status but 0 and 2. test_fuzz.py tries 100 mutants of each kind, bench.fuzz thousands.
"""
import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from exactgpt.checkpoint import check_training_entries, read_checkpoint, save_checkpoint
from exactgpt.config import UserError
from exactgpt.dataloader import TokenStream
from exactgpt.open_model import open_model, write_pretrained
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import Tokenizer
from finetune_instruct import encode_items, read_items
from hellaswag import STYLES, load_hellaswag, tokenize_examples
from model import GPT, GPTConfig
from tests import forks
from tests.common import write_shards
from tests.mutants import SLOW_S, TookTooLong, bomb, limits, mutate

SCRIPT_SLOW_S = 120
TINY_MODEL = ("--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8")


@dataclass(frozen=True)
class Target:
    """A kind of file: how a good folder is made, what is damaged, and who reads it."""
    make: Callable        # make(folder) writes the good files
    files: tuple          # names of those to damage, one at a time
    read: Callable        # read(folder) -> a value to compare, as the scripts read; UserError
    script: Callable      # script(folder, file) -> the words of a command that reads the damaged file
    told: Callable        # told(good bytes, bad bytes): whether a hash or header can tell them apart


class Bench:
    """A folder of good files of one kind, in which one is damaged at a time."""

    def __init__(self, name, folder):
        self.target, self.folder, self.marker = TARGETS[name], folder / "good", folder / "BOOM"
        self.folder.mkdir()
        self.target.make(self.folder)
        self.good = {file: (self.folder / file).read_bytes() for file in self.target.files}
        self.value = self.target.read(self.folder)

    @contextlib.contextmanager
    def _damaged(self, rng):
        file = rng.choice(sorted(self.good))
        good = self.good[file]
        is_bomb = self.target is TARGETS["pickle bomb"]
        bad = bomb(training_entries(), rng, self.marker) if is_bomb else mutate(good, rng, file)
        (self.folder / file).write_bytes(bad)
        try:
            yield file, good, bad
        finally:
            (self.folder / file).write_bytes(good)

    def try_one(self, rng):
        """What became of a mutant read in this process: same, refused, other, or "fault: why"."""
        with self._damaged(rng) as (_, good, bad):
            try:
                with limits():
                    value = self.target.read(self.folder)
            except UserError as error:
                outcome = "refused" if str(error).strip() else "fault: refused without a word"
            except TookTooLong:
                outcome = f"fault: longer than {SLOW_S} s"
            except Exception as error:
                outcome = f"fault: {type(error).__name__}: {error}"[:300]
            else:
                told = value != self.value and self.target.told(good, bad)
                outcome = "fault: another value, unnoticed" if told else "same" if value == self.value else "other"
        return "fault: it ran code" if self.marker.exists() else outcome

    def try_script(self, rng):
        """What became of a mutant read by the script, in a process of its own: refused (status 2, one line), read (0),
        or "fault: why"."""
        home = self.folder.parent / "home"
        home.mkdir()
        env = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(home)}
        with self._damaged(rng) as (file, _, _):
            script, *words = [str(word).replace("HOME", str(home)) for word in self.target.script(self.folder, file)]
            process = forks.start(script, words, env, home / ".out", home / ".err")
            process.join(SCRIPT_SLOW_S)
            process.kill()
            process.join()
        error = (home / ".err").read_text(errors="replace")
        shutil.rmtree(home)
        if process.exitcode == -signal.SIGKILL:
            return f"fault: longer than {SCRIPT_SLOW_S} s"
        if self.marker.exists():
            return "fault: it ran code"
        if "Traceback" in error or process.exitcode not in (0, 2):
            return f"fault: status {process.exitcode}: {error[-300:]}"
        return "refused" if process.exitcode else "read"


# -----------------------------------------------------------------------------
# the kinds of files

def make_shards(folder):
    """A complete folder of token shards with a manifest and a small vocabulary, as prepare_text.py leaves it."""
    write_shards(folder, (700, 300), (64,), tokenizer=Tokenizer([("a", "b"), ("ab", "c")], ""))


def make_bin_shards(folder):
    """llm.c's shards: no manifest, GPT-2's vocabulary."""
    for i, n in enumerate((64, 700)):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, n
        tokens = np.random.default_rng(i).integers(0, 50257, n).astype("<u2")
        (folder / f"fuzz_{'train' if i else 'val'}_{i:06d}.bin").write_bytes(header.tobytes() + tokens.tobytes())


def read_shards(folder):
    """The tokens that a run would train on, whole folder checked as `prepare_fineweb.py --verify` does."""
    shards = ShardFolder(folder)
    tokenizer = shards.tokenizer()
    shards.check_vocabulary(tokenizer.n_vocab)
    shards.verify(tokenizer.n_vocab)
    digest = hashlib.sha256()
    for split in (shards.train, shards.val):
        stream = TokenStream(split, 8)
        digest.update(stream.read(range(stream.n_windows)).tobytes())
        stream.close()
    return digest.hexdigest(), tokenizer.name


def training_entries():
    """A checkpoint as train.py writes it, of a tiny model of bytes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=320, n_layer=1, n_head=2, n_embd=8))
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(8)}}, "param_groups": [{"lr": 1e-3}]}
    return dict(model=model.state_dict(), config=model.config_dict(), step=3, val_loss=2.5, best_val_loss=2.5,
                optimizer=optimizer, scaler={}, train_config={"max_lr": 1e-3}, resolved={"dtype": "fp32"},
                data="0" * 64, finished=False, tokenizer=Tokenizer([], "bytes").to_checkpoint(), provenance={})


def make_checkpoint(folder):
    """A checkpoint as train.py leaves it."""
    save_checkpoint(folder / "model_00003.pt", training_entries())


def read_training_checkpoint(folder):
    """All that a resumed run and inference.py take from a checkpoint."""
    path = folder / "model_00003.pt"
    checkpoint = read_checkpoint(path)
    check_training_entries(checkpoint, path)
    opened = open_model(path)
    return digest_of(checkpoint), digest_of(opened.model.state_dict()), opened.tokenizer.name, digest_of(logits(opened))


def digest_of(tree):
    """A hash of a tree of plain data and tensors."""
    digest = hashlib.sha256()

    def walk(value):
        if isinstance(value, torch.Tensor):
            digest.update(repr((value.dtype, value.shape)).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                digest.update(repr(key).encode())
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            digest.update(repr(value).encode("utf-8", "surrogatepass"))
    walk(tree)
    return digest.hexdigest()


def logits(opened):
    """What the model makes of two tokens: a config that can be read must be one that can be used."""
    with torch.no_grad():
        return opened.model.eval()(torch.tensor([[0, 1]]) % opened.model.config.vocab_size)


def make_pretrained(folder):
    """A folder in Hugging Face format, with a trained vocabulary."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([("a", "b"), ("ab", "c")], "")
    model = GPT(GPTConfig(8, tokenizer.n_vocab, 1, 2, 8))
    write_pretrained(folder / "hf", model.config_dict(), model.state_dict(), tokenizer)


def read_pretrained(folder):
    """What open_model takes from it."""
    opened = open_model(folder / "hf")
    name = opened.tokenizer.name if opened.tokenizer else None
    return digest_of(opened.model.state_dict()), digest_of(opened.model.config_dict()), name, digest_of(logits(opened))


def make_hellaswag(folder):
    """Examples as the hub has them, and a model to score them with."""
    make_checkpoint(folder)
    rows = [dict(ind=i, activity_label="Pets", ctx_a=f"A man has {i} cats.", ctx_b="he",
                 ctx=f"A man has {i} cats. he", endings=[f"feeds {k} [title] of them." for k in range(4)],
                 label=str(i % 4), split="val", source_id=f"activitynet~{i}") for i in range(6)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_hellaswag(folder):
    """The examples in both styles, and how many fit a small model."""
    tokenizer = Tokenizer([], "bytes")
    return [digest_of([(e.context, e.endings, e.label) for e in examples]) + str(
        len(tokenize_examples(examples, tokenizer, 8, style).questions))
        for style in STYLES for examples in [load_hellaswag(folder / "hellaswag.jsonl", style)]]


def make_instructions(folder):
    """Items in both formats, and a model with room for their prompts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=320, n_layer=1, n_head=2, n_embd=8))
    save_checkpoint(folder / "model_00003.pt", dict(training_entries(), model=model.state_dict(),
                                                    config=model.config_dict()))
    items = [dict(instruction=f"Count to {i}.", input="quickly" * (i % 2), output="1, 2") for i in range(6)]
    (folder / "items.json").write_text(json.dumps(items))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def read_instructions(folder):
    """The tokens and targets of both files' items."""
    tokenizer = Tokenizer([], "bytes")
    rows, n_left_out = zip(*(encode_items(read_items(folder / f"items.{suffix}"), tokenizer, 256)
                             for suffix in ("json", "jsonl")))
    return digest_of([(row.tokens, row.targets) for part in rows for row in part]), n_left_out


def instruct_script(folder, file):
    """finetune_instruct.py on the damaged one of the two files, for an epoch."""
    return ["finetune_instruct.py", "--data", folder / file, "--init_from", folder / "model_00003.pt", "--out",
            "HOME/out", "--num_epochs", "1", "--responses", "0", "--device", "cpu"]


def train_script(folder, _):
    """train.py on the folder, for a step: it checks data, flags and vocabulary, builds, evaluates and saves."""
    return ["train.py", "--data_dir", folder, "--log_dir", "HOME/logs", *TINY_MODEL, "--device", "cpu",
            "--total_batch_size", "64", "--max_steps", "1", "--hellaswag_every", "0", "--sample_every", "0"]


def inference_script(*source):
    """inference.py with the checkpoint at folder/source..., for one token."""
    return lambda folder, _: ["inference.py", "--checkpoint", folder.joinpath(*source), "--prompt", "ab", "--num_seq",
                              "1", "--max_tokens", "1", "--device", "cpu"]


def always(good, bad):
    """A hash covers every byte."""
    return True


def never(good, bad):
    """Nothing in the format covers its content."""
    return False


TARGETS = {
    "shard .npy": Target(make_shards, ("test_train_000001.npy", "test_val_000000.npy"), read_shards,
                         lambda folder, _: ["prepare_fineweb.py", "--verify", "--out", folder], always),
    "shard .bin": Target(make_bin_shards, ("fuzz_train_000001.bin", "fuzz_val_000000.bin"), read_shards, train_script,
                         lambda good, bad: len(good) != len(bad) or good[:12] != bad[:12]),
    "manifest": Target(make_shards, ("manifest.json",), read_shards, train_script, always),
    "vocabulary": Target(make_shards, ("vocab.bpe", "encoder.json"), read_shards, train_script, always),
    "checkpoint": Target(make_checkpoint, ("model_00003.pt",), read_training_checkpoint,
                         inference_script("model_00003.pt"), always),
    "pickle bomb": Target(make_checkpoint, ("model_00003.pt",), read_training_checkpoint,
                          inference_script("model_00003.pt"), never),
    "config.json": Target(make_pretrained, ("hf/config.json",), read_pretrained, inference_script("hf"), never),
    "safetensors": Target(make_pretrained, ("hf/model.safetensors",), read_pretrained, inference_script("hf"), never),
    "vocabulary of a model": Target(make_pretrained, ("hf/merges.txt", "hf/vocab.json"), read_pretrained,
                                    inference_script("hf"), never),
    "instructions": Target(make_instructions, ("items.json", "items.jsonl"), read_instructions, instruct_script, never),
    "HellaSwag": Target(make_hellaswag, ("hellaswag.jsonl",), read_hellaswag,
                        lambda folder, _: ["hellaswag.py", "--checkpoint", folder / "model_00003.pt", "--device",
                                           "cpu", "--data", folder / "hellaswag.jsonl"], never),
}
