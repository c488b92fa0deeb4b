"""Define every kind of file that the scripts read, and fuzz it: make a good one, damage it, read it.

A damaged file (mutants.py) must be refused with a UserError or give the same value as the good file. If no hash or
header can reveal the damage, another value is fine too. Anything else is a fault: another exception, a read that takes
too long or too much memory, code run from the file, a changed value that a hash or header reveals; in a script a
traceback, or an exit status other than 0 and 2. test_fuzz.py tries 50 mutants of each kind, bench.fuzz thousands.
"""
import contextlib
import csv
import hashlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from exactgpt.checkpoint import read_training_checkpoint, save_checkpoint
from exactgpt.config import UserError
from exactgpt.dataloader import TokenStream
from exactgpt.documents import RESUMABLE, read_rows, read_texts
from exactgpt.finetune import add_adapter
from exactgpt.huggingface import write_pretrained
from exactgpt.open_model import open_model
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import Tokenizer
from finetune_instruct import InstructConfig, encode_item, read_items, save_adapter
from hellaswag import STYLES, load_hellaswag, tokenize_examples
from model import GPT, GPTConfig
from tests import forks
from tests.common import write_shards
from tests.folders import split_bin
from tests.mutants import TIME_LIMIT_S, TookTooLong, mutate, odd_checkpoint, pickle_bomb, time_and_memory_limits

SCRIPT_TIME_LIMIT_S = 120
TINY_MODEL = ("--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8")


@dataclass(frozen=True)
class Target:
    """A kind of file: how to make good files, which of them to damage, and how to read them."""
    make: Callable        # make(folder) writes the good files
    files: tuple          # names of the files to damage, one at a time
    read: Callable        # read(folder) -> a value to compare, read as the scripts do; raises UserError
    command: Callable     # command(folder, file) -> [script, arguments...] of a script that reads the damaged file
    detectable: Callable  # detectable(good bytes, bad bytes) -> True if a hash or header reveals the damage
    craft: Callable | None = None     # craft(entries, rng, marker) -> a bad checkpoint, instead of damage to a good one


class Fuzzer:
    """A folder of good files of one kind, in which one file at a time is damaged and read."""

    def __init__(self, name, folder):
        self.target, self.folder, self.marker = TARGETS[name], folder / "good", folder / "BOOM"
        self.folder.mkdir()
        self.target.make(self.folder)
        self.good = {file: (self.folder / file).read_bytes() for file in self.target.files}
        self.value = self.target.read(self.folder)

    @contextlib.contextmanager
    def _one_file_damaged(self, rng):
        file = rng.choice(sorted(self.good))
        good = self.good[file]
        craft = self.target.craft
        bad = craft(training_entries(), rng, self.marker) if craft else mutate(good, rng, file)
        (self.folder / file).write_bytes(bad)
        try:
            yield file, good, bad
        finally:
            (self.folder / file).write_bytes(good)

    def try_in_process(self, rng):
        """Damage a file and read it in this process; return "same", "refused", "other" or "fault: ..."."""
        with self._one_file_damaged(rng) as (_, good, bad):
            try:
                with time_and_memory_limits():
                    value = self.target.read(self.folder)
            except UserError as error:
                outcome = "refused" if str(error).strip() else "fault: refused with an empty message"
            except TookTooLong:
                outcome = f"fault: took more than {TIME_LIMIT_S} s"
            except Exception as error:
                outcome = f"fault: {type(error).__name__}: {error}"[:300]
            else:
                if value == self.value:
                    outcome = "same"
                else:
                    is_fault = self.target.detectable(good, bad)
                    outcome = "fault: the damage changed the value but was not noticed" if is_fault else "other"
        return "fault: it ran code" if self.marker.exists() else outcome

    def try_script(self, rng):
        """Damage a file and read it with the script; return "refused" (status 2), "read" (0) or "fault: ..."."""
        home = self.folder.parent / "home"
        home.mkdir()
        env = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(home)}
        with self._one_file_damaged(rng) as (file, _, _):
            script, *arguments = [str(word).replace("HOME", str(home))
                                  for word in self.target.command(self.folder, file)]
            process = forks.start(script, arguments, env, home / ".out", home / ".err")
            process.join(SCRIPT_TIME_LIMIT_S)
            process.kill()
            process.join()
        error = (home / ".err").read_text(errors="replace")
        shutil.rmtree(home)
        if process.exitcode == -signal.SIGKILL:
            return f"fault: took more than {SCRIPT_TIME_LIMIT_S} s"
        if self.marker.exists():
            return "fault: it ran code"
        if "Traceback" in error or process.exitcode not in (0, 2):
            return f"fault: status {process.exitcode}: {error[-300:]}"
        return "refused" if process.exitcode else "read"


# -----------------------------------------------------------------------------
# the kinds of files

def make_shards(folder):
    """Write a complete shard folder with a manifest and a small vocabulary, as prepare_text.py does."""
    write_shards(folder, (700, 300), (64,), tokenizer=Tokenizer([("a", "b"), ("ab", "c")], ""))


def make_bin_shards(folder):
    """Write shards in llm.c's format: no manifest, GPT-2's vocabulary."""
    for i, n in enumerate((64, 700)):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, n
        tokens = np.random.default_rng(i).integers(0, 50257, n).astype("<u2")
        (folder / f"fuzz_{'train' if i else 'val'}_{i:06d}.bin").write_bytes(header.tobytes() + tokens.tobytes())


def make_nanogpt_data(folder):
    """Write a data set of characters as nanoGPT does."""
    characters = "\n ab\u00e9"
    (folder / "meta.pkl").write_bytes(pickle.dumps(dict(
        vocab_size=5, itos=dict(enumerate(characters)), stoi={c: i for i, c in enumerate(characters)})))
    for name, n in (("train", 700), ("val", 64)):
        np.random.default_rng(n).integers(0, 5, n).astype("<u2").tofile(folder / f"{name}.bin")


def read_shards(folder):
    """Check the folder as `prepare_fineweb.py --verify` does; return a hash of all windows and the tokenizer's name."""
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
    """Return the entries of a checkpoint as train.py writes it, of a tiny byte-level model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=320, n_layer=1, n_head=2, n_embd=8))
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(8)}}, "param_groups": [{"lr": 1e-3}]}
    return dict(model=model.state_dict(), config=model.config_dict(), step=3, val_loss=2.5, best_val_loss=2.5,
                optimizer=optimizer, scaler={}, train_config={"max_lr": 1e-3}, resolved={"dtype": "fp32"},
                data="0" * 64, finished=False, tokenizer=Tokenizer([], "bytes").to_checkpoint(), provenance={})


def make_checkpoint(folder):
    """Write a checkpoint as train.py does."""
    save_checkpoint(folder / "model_00003.pt", training_entries())


def read_as_a_resumed_run(folder):
    """Read a checkpoint as a resumed run and inference.py do; return hashes of all that they use."""
    path = folder / "model_00003.pt"
    checkpoint = read_training_checkpoint(path)
    opened = open_model(path)
    return (hash_tree(checkpoint), hash_tree(opened.model.state_dict()), opened.tokenizer.name,
            hash_tree(logits_of_two_tokens(opened)))


def hash_tree(tree):
    """Return a hash of a tree of plain data and tensors."""
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


def logits_of_two_tokens(opened):
    """Return the opened model's logits for two tokens: a config that is accepted must also be usable."""
    with torch.no_grad():
        return opened.model.eval()(torch.tensor([[0, 1]]) % opened.model.config.vocab_size)


def make_pretrained(folder):
    """Write a model in Hugging Face format with a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([("a", "b"), ("ab", "c")], "")
    model = GPT(GPTConfig(8, tokenizer.n_vocab, 1, 2, 8))
    write_pretrained(folder / "hf", model.config_dict(), model.state_dict(), tokenizer)


def read_pretrained(folder):
    """Open the model; return hashes of weights, config and logits, and the tokenizer's name."""
    opened = open_model(folder / "hf")
    name = opened.tokenizer.name if opened.tokenizer else None
    return (hash_tree(opened.model.state_dict()), hash_tree(opened.model.config_dict()), name,
            hash_tree(logits_of_two_tokens(opened)))


def make_parts(folder):
    """Write such a model with its weights in two files and an index."""
    make_pretrained(folder)
    split_bin(folder / "hf")


def read_tokenizer(folder):
    """Open the model for text; return its tokenizer's name: what is accepted must have the ids of the good files."""
    return open_model(folder / "hf").with_tokenizer().tokenizer.name


def make_adapter(folder):
    """Write an adapter of a checkpoint as finetune_instruct.py does."""
    make_checkpoint(folder)
    model = open_model(folder / "model_00003.pt").model
    config = InstructConfig(data="", out="", init_from=str(folder / "model_00003.pt"), lora_r=2)
    save_adapter(add_adapter(model, config), folder / "adapter", dict(source=config.init_from, sha256=""))


def read_adapter(folder):
    """Open the model with its adapter; return a hash of the weights."""
    return hash_tree(open_model(folder / "adapter").model.state_dict())


def make_hellaswag(folder):
    """Write HellaSwag examples in the hub's format and a model to score them with."""
    make_checkpoint(folder)
    lines = [dict(ind=i, activity_label="Pets", ctx_a=f"A man has {i} cats.", ctx_b="he",
                  ctx=f"A man has {i} cats. he", endings=[f"feeds {k} [title] of them." for k in range(4)],
                  label=str(i % 4), split="val", source_id=f"activitynet~{i}") for i in range(6)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_hellaswag(folder):
    """Read the examples in both styles; return a hash of each and how many fit a small model."""
    tokenizer = Tokenizer([], "bytes")
    return [hash_tree([(e.context, e.endings, e.label) for e in examples]) + str(
        len(tokenize_examples(examples, tokenizer, 8, style).questions))
        for style in STYLES for examples in [load_hellaswag(folder / "hellaswag.jsonl", style)]]


def make_instructions(folder):
    """Write instructions in both formats and a model that is long enough for them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=320, n_layer=1, n_head=2, n_embd=8))
    save_checkpoint(folder / "model_00003.pt", dict(training_entries(), model=model.state_dict(),
                                                    config=model.config_dict()))
    items = [dict(instruction=f"Count to {i}.", input="quickly" * (i % 2), output="1, 2") for i in range(6)]
    (folder / "items.json").write_text(json.dumps(items))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def read_instructions(folder):
    """Read and encode both files; return a hash of tokens and targets, and how many examples there are."""
    tokenizer = Tokenizer([], "bytes")
    rows = [encode_item(item, tokenizer, 256) for suffix in ("json", "jsonl")
            for item in read_items(folder / f"items.{suffix}")]
    return hash_tree([(row.tokens, row.targets) for row in rows]), len(rows)


def instruct_command(folder, file):
    """Return the command that fine-tunes on the damaged file for one epoch."""
    return ["finetune_instruct.py", "--data", folder / file, "--init_from", folder / "model_00003.pt", "--out",
            "HOME/out", "--num_epochs", "1", "--responses", "0", "--device", "cpu"]


TABLES = ("a.jsonl", "a.csv", "a.parquet", "b.parquet")


def make_texts(folder):
    """Write a table of texts and labels as .jsonl, .csv and .parquet, in which two kinds of page let values repeat."""
    import pyarrow.parquet
    rows = [dict(text=f'He said "no" {i % 3} times,\nthen left' * (i % 5), label=str(i % 2)) for i in range(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "a.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=5)
    pyarrow.parquet.write_table(table, folder / "b.parquet", compression="zstd", use_dictionary=False,
                                column_encoding={"text": "DELTA_BYTE_ARRAY"})


def read_texts_and_labels(folder):
    """Return a hash of the rows of each file, read as the scripts for classifiers and for preparation do."""
    rows = [list(read_rows(folder / name, ["text", "label"])) for name in TABLES]
    return hash_tree([rows, [list(read_texts(folder / name, "text")) for name in TABLES if name.endswith(RESUMABLE)]])


def train_command(folder, _):
    """Return the command that trains on the folder for one step, including set-up, a validation and a save."""
    return ["train.py", "--data_dir", folder, "--log_dir", "HOME/logs", *TINY_MODEL, "--device", "cpu",
            "--total_batch_size", "64", "--max_steps", "1", "--hellaswag_every", "0", "--sample_every", "0"]


def inference_command(*source):
    """Return a function that returns the command to generate one token with the checkpoint at folder/source..."""
    return lambda folder, _: ["inference.py", "--checkpoint", folder.joinpath(*source), "--prompt", "ab", "--num_seq",
                              "1", "--max_tokens", "1", "--device", "cpu"]


def always(good, bad):
    """Return True: a hash covers every byte."""
    return True


def never(good, bad):
    """Return False: the format has no checksum."""
    return False


TARGETS = {
    "shard .npy": Target(make_shards, ("test_train_000001.npy", "test_val_000000.npy"), read_shards,
                         lambda folder, _: ["prepare_fineweb.py", "--verify", "--out", folder], always),
    "shard .bin": Target(make_bin_shards, ("fuzz_train_000001.bin", "fuzz_val_000000.bin"), read_shards, train_command,
                         lambda good, bad: len(good) != len(bad) or good[:12] != bad[:12]),
    "nanoGPT data": Target(make_nanogpt_data, ("meta.pkl", "train.bin", "val.bin"), read_shards, train_command,
                             never),
    "manifest": Target(make_shards, ("manifest.json",), read_shards, train_command, always),
    "vocabulary": Target(make_shards, ("vocab.bpe", "encoder.json"), read_shards, train_command, always),
    "checkpoint": Target(make_checkpoint, ("model_00003.pt",), read_as_a_resumed_run,
                         inference_command("model_00003.pt"), always),
    "pickle bomb": Target(make_checkpoint, ("model_00003.pt",), read_as_a_resumed_run,
                          inference_command("model_00003.pt"), never, pickle_bomb),
    "odd checkpoint": Target(make_checkpoint, ("model_00003.pt",), read_as_a_resumed_run,
                             inference_command("model_00003.pt"), always, odd_checkpoint),
    "config.json": Target(make_pretrained, ("hf/config.json",), read_pretrained, inference_command("hf"), never),
    "safetensors": Target(make_pretrained, ("hf/model.safetensors",), read_pretrained, inference_command("hf"), never),
    "weights in parts": Target(make_parts, ("hf/pytorch_model.bin.index.json", "hf/pytorch_model-00001-of-00002.bin"),
                               read_pretrained, inference_command("hf"), never),
    "tokenizer of a model": Target(make_pretrained, tuple(f"hf/{name}" for name in (
        "merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
        read_tokenizer, inference_command("hf"), always),
    "adapter": Target(make_adapter, ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), read_adapter,
                      inference_command("adapter"), never),
    "instructions": Target(make_instructions, ("items.json", "items.jsonl"), read_instructions, instruct_command,
                           never),
    "texts": Target(make_texts, TABLES, read_texts_and_labels,
                    lambda folder, file: ["prepare_text.py", folder / file, "--out", "HOME/out"], never),
    "HellaSwag": Target(make_hellaswag, ("hellaswag.jsonl",), read_hellaswag,
                        lambda folder, _: ["hellaswag.py", "--checkpoint", folder / "model_00003.pt", "--device",
                                           "cpu", "--data", folder / "hellaswag.jsonl"], never),
}
