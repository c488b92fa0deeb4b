"""Checkpoints: plain data, written whole or not at all, checked when read; and models of any kind we know.

logs/model_{step:05d}.pt holds tensors, dicts, lists, numbers and strings and nothing else, so it is always
read with weights_only=True. `open_model` reads ours, Hugging Face's folders and names, nanoGPT's and build-nanogpt's.
"""
import hashlib
import json
import re
import shutil
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from exactgpt import lora, open_model as hf_format
from exactgpt.classifier import Classifier
from exactgpt.config import UserError
from exactgpt.files import atomic_write, find_visible
from exactgpt.human import human_bytes
from exactgpt.tokenizer import GPT2_ENTRIES, Tokenizer, confirm, from_checkpoint, from_merges, load_tokenizer
from model import GPT, GPTConfig

CHECKPOINT_NAME = re.compile(r"model_(\d{5,})\.pt")
PADDING_ROWS = 1024      # nobody pads an embedding by so many: with more spare rows the vocabulary is another one


class CheckpointError(UserError):
    """A file that is no checkpoint, or a damaged one."""


class _ForeignConfig:
    """Stands in for build-nanogpt's pickled __main__.GPTConfig: takes its fields and none of its code."""


def checkpoint_path(log_dir, step):
    """logs/model_00250.pt for step 250."""
    return Path(log_dir) / f"model_{step:05d}.pt"


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (a dict of plain data) atomically. Raises OSError (a full disk), `path` being as before."""
    needed = checkpoint_bytes(checkpoint)
    free = shutil.disk_usage(Path(path).parent).free
    if free < needed:
        raise OSError(f"{path} needs {human_bytes(needed)}, the disk has {human_bytes(free)} left")
    try:
        with atomic_write(path) as f:
            torch.save(checkpoint, f)
    except RuntimeError as error:  # torch's zip writer hides the disk's error
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def checkpoint_bytes(value):
    """The bytes that a value takes in a checkpoint, near enough: its tensors, shared ones once, and a little more."""
    storages, other = {}, 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes() + 256
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        other += len(item) if isinstance(item, str) else 64
    return sum(storages.values()) + other


def disk_bytes(config, model, max_steps):
    """The most bytes of disk that a run's checkpoints take: the newest few and the best, each while it is replaced.

    Weights and AdamW's two moments in fp32; the best holds weights alone. What is written once has nothing to replace.
    """
    def times(every):      # written at every so many steps, and at the last
        return max(0, max_steps - 1) // every + 1
    saves = min(times(config.checkpoint_every) if config.checkpoint_every else 1, config.keep_checkpoints + 1)
    bests = min(times(config.eval_every), 2) if config.eval_every and max_steps else 0
    return model.n_params() * 4 * (3 * saves + bests)


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. Raises CheckpointError in one line for whatever is wrong."""
    try:
        open(path, "rb").close()
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder; name a file in it, such as model_XXXXX.pt") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        _check_sums(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_ForeignConfig, "__main__.GPTConfig")]):
            warnings.simplefilter("ignore")  # of a pickle protocol, about to be an error of ours
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, a pickle that asks for code: torch raises many kinds, OSError too
        why = "it asks to run code" if "GLOBAL" in str(error) else "it is damaged"
        raise CheckpointError(
            f"{path} cannot be loaded as a checkpoint: {why} or not one ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("config"), _ForeignConfig):
        checkpoint["config"] = vars(checkpoint["config"])
    return checkpoint


def _check_sums(path):
    """Raise ValueError if a part of a file of torch.save differs from its checksum: torch.load does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} differs from its checksum")


def list_checkpoints(log_dir):
    """(step, path) of the numbered checkpoints in a folder, the newest step first."""
    found = [(int(m[1]), p) for p in Path(log_dir).glob("model_*.pt") if (m := CHECKPOINT_NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


def newest_valid(log_dir, check, notice=print):
    """(path, checkpoint) of the newest step that loads and that `check(checkpoint, path)` accepts, or None without
    any file.

    Falls back past damaged files with a notice. Raises CheckpointError when there are files and none is good.
    """
    problem = None
    for _, path in list_checkpoints(log_dir):
        try:
            checkpoint = read_checkpoint(path)
            check(checkpoint, path)
            return path, checkpoint
        except CheckpointError as error:
            problem = error
            notice(f"skipping a checkpoint: {error}")
    if problem:
        raise CheckpointError(f"no checkpoint in {log_dir} can be read ({problem}); move them away or choose another "
                              "--log_dir")
    return None


def delete_old(log_dir, keep, step):
    """Keep the `keep` newest numbered checkpoints up to `step`, and nothing that a killed save left half-written.

    One of a later step is a damaged one that the run has fallen back past: it must not displace what was saved since.
    """
    until_now = [path for number, path in list_checkpoints(log_dir) if number <= step]
    for path in [*until_now[keep:], *Path(log_dir).glob("model_*.pt.tmp")]:
        path.unlink(missing_ok=True)


@dataclass
class OpenedModel:
    """A model with what a script needs around it."""
    model: GPT
    tokenizer: Tokenizer | None   # None: the weights come without one (ids only)
    source: str                   # the file, folder or name
    step: int | None = None
    val_loss: float | None = None
    extra: dict = field(default_factory=dict)   # the checkpoint's other plain entries

    def with_tokenizer(self):
        """Itself, if text can be encoded for the model. Raises UserError where the weights came without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"{self.source} comes without a tokenizer for its {self.model.config.vocab_size:,} tokens, "
                            "so text cannot be encoded for it; name a folder that has its with --tokenizer")
        return self

    def describe(self):
        """One line for people: source, size, step, validation loss."""
        facts = [f"{self.model.n_params():,} parameters"]
        facts += [f"step {self.step}"] if self.step is not None else []
        facts += [f"validation loss {self.val_loss:.4f}"] if self.val_loss is not None else []
        return f"{self.source}: {', '.join(facts)}"


def open_model(source, classifiers=False, tokenizer=""):
    """The model in a checkpoint file (ours, nanoGPT's, build-nanogpt's), a Hugging Face folder or hub name, a LoRA
    adapter (merged into its base), or the newest one in the folder of a run. classifiers: a Classifier will do, too.
    tokenizer: the folder of the vocabulary where the source has none. Raises UserError naming the file and what is
    wrong with it, and where that vocabulary is not the model's.
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".pt":
        opened = _open_file(path, tokenizer)
    elif lora.is_adapter(path):
        opened = _open_adapter(path, tokenizer)
    elif path.is_dir() and not (path / "config.json").exists():
        if not list_checkpoints(path):
            raise UserError(f"{source} holds neither a model_XXXXX.pt nor a config.json; name the folder of a run, or "
                            "of a model in Hugging Face format")
        opened = _open_file(newest_model(path), tokenizer)
    else:
        folder = hf_format.local_folder(source)
        model = build_model(*hf_format.read_pretrained(folder), source)
        opened = OpenedModel(model, _folder_tokenizer(folder, model.config.vocab_size, tokenizer), str(source))
    n_rows = opened.model.config.vocab_size
    if opened.tokenizer and opened.tokenizer.n_vocab > n_rows:      # nothing that the model was trained on
        opened.tokenizer = None
    if tokenizer and opened.tokenizer is None:
        raise UserError(f"--tokenizer {tokenizer}: that is not the vocabulary of {source}, whose model has {n_rows:,} "
                        "tokens; leave it out or name the right folder")
    if isinstance(opened.model, Classifier) and not classifiers:
        raise UserError(f"{source} writes no text, it is a classifier ({', '.join(opened.model.config.labels)}): "
                        f"python finetune_classifier.py --checkpoint {source} --predict \"...\"")
    return opened


def _open_adapter(folder, tokenizer):
    """The model that a LoRA adapter belongs to, with the adapter merged into it."""
    source, sha256 = lora.base_of(folder)
    try:
        opened = open_model(source, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(f"the adapter in {folder} belongs to {source}, as seen from where it was trained: {error}"
                        ) from error
    if sha256 and weights_hash(opened.model.state_dict()) != sha256:
        raise CheckpointError(f"{source} holds other weights than those that the adapter in {folder} belongs to")
    merged = lora.merge_folder(opened.model, folder).requires_grad_(True)
    return OpenedModel(merged, opened.tokenizer, str(folder))


def weights_hash(state):
    """The sha256 of a state dict's names, shapes and numbers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _folder_tokenizer(folder, vocab_size, otherwise):
    """A Hugging Face folder's Tokenizer, else that of `otherwise`, else GPT-2's; None if it cannot be the model's."""
    stored = hf_format.read_vocabulary(folder)
    if stored is None:
        is_known = otherwise or (folder / "vocab.bpe").exists()
        return load_tokenizer(folder, otherwise) if is_known or _may_be_gpt2s(vocab_size) else None
    merges, ids = stored
    tokenizer = confirm(from_merges(merges, folder), otherwise, folder)
    ours = json.loads(tokenizer.encoder_json())
    is_ours = all(ids.get(token) == i for token, i in ours.items())     # and not special tokens first, say
    return tokenizer if is_ours else None


def _may_be_gpt2s(vocab_size):
    """Whether a model that comes without a vocabulary has about as many embedding rows as GPT-2."""
    return 0 <= vocab_size - GPT2_ENTRIES < PADDING_ROWS


def _open_file(path, folder):
    checkpoint = read_checkpoint(path)
    if "model_args" in checkpoint:
        config = _nanogpt_config(checkpoint)
        step, val_loss = checkpoint.get("iter_num"), checkpoint.get("best_val_loss")
    else:
        config, step, val_loss = checkpoint.get("config"), checkpoint.get("step"), checkpoint.get("val_loss")
    model = build_model(config, checkpoint.get("model"), path)
    stored = checkpoint.get("tokenizer")
    is_known = stored is not None or folder
    tokenizer = from_checkpoint(stored, folder) if is_known or _may_be_gpt2s(model.config.vocab_size) else None
    extra = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer", "config", "tokenizer")}
    return OpenedModel(model, tokenizer, str(path), step, _plain_number(val_loss), extra)


def build_model(config, state, source):
    """The GPT, or the Classifier, of a checkpoint's config (dict) and state dict, in fp32. Raises CheckpointError."""
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{source} holds no model: the entries 'config' and 'model' are missing or damaged")
    try:
        return (Classifier if "labels" in config else GPT).from_state(config, clean_state(state)).float()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def clean_state(state):
    """A state dict without what torch.compile and DDP put before its names, and without stored causal masks."""
    cleaned = {}
    for key, tensor in state.items():
        key = str(key)
        while key.startswith(("_orig_mod.", "module.")):
            key = key.split(".", 1)[1]
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            cleaned[key] = tensor
    return cleaned


def _nanogpt_config(checkpoint):
    """nanoGPT's model_args as our config: it computes the exact GELU."""
    args = checkpoint["model_args"]
    names = GPTConfig.__dataclass_fields__
    return {**{k: v for k, v in args.items() if k in names}, "activation": "gelu"} if isinstance(args, dict) else None


def _plain_number(value):
    is_number = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return float(value) if is_number else None


def newest_model(log_dir="logs"):
    """The language model written last anywhere below `log_dir`, but for model_best.pt. Raises UserError without one."""
    files = [p for p in find_visible(log_dir, "model_*.pt") if CHECKPOINT_NAME.fullmatch(p.name)]
    if not files:
        raise UserError(f"no model_XXXXX.pt below {log_dir}/: train one (torchrun train.py), or name one with "
                        "--checkpoint (a file, a Hugging Face folder, or gpt2)")
    return max(files, key=lambda p: p.stat().st_mtime)
