"""Open a model and its tokenizer from our checkpoints, nanoGPT's, build-nanogpt's or Hugging Face format.

`open_model` reads all of them; huggingface.py reads and writes the folders of Hugging Face format.
"""
import os
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exactgpt.characters import META
from exactgpt.checkpoint import CheckpointError, checkpoint_step, read_checkpoint, require_finite, weights_hash
from exactgpt.config import UserError, command
from exactgpt.files import find_visible, read_json
from exactgpt.huggingface import MASKS, download_model, folder_tokenizer, read_base, read_pretrained, read_tensors
from exactgpt.tokenizer import GPT2_ENTRIES, Tokenizer, default_tokenizer, from_checkpoint
from model import GPT, GPTConfig, padded_vocab

ADAPTER_CONFIG = "adapter_config.json"      # of a LoRA adapter in peft's format
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class OpenedModel:
    """A model with its tokenizer and metadata."""
    model: GPT
    tokenizer: Tokenizer | None   # None: no tokenizer is known, only token ids work
    source: str                   # file, folder or hub name
    step: int | None = None
    val_loss: float | None = None
    base: dict | None = None      # the record of the model that it was fine-tuned from
    tokenizer_problem: str = ""   # why its own tokenizer cannot be used: "it has a Lowercase normalizer"
    folder: Path | None = None    # what was read, if that is in Hugging Face format

    def without_foreign_tokenizer(self):
        """Return self. Raises UserError if the model has a tokenizer that may give other ids than ours."""
        if self.tokenizer_problem:
            raise UserError(f"the tokenizer of {self.source} cannot be used here, because {self.tokenizer_problem}; "
                            "use the model with transformers, or choose another one")
        return self

    def with_tokenizer(self):
        """Return self. Raises UserError if there is no tokenizer to encode text for the model."""
        self.without_foreign_tokenizer()
        if self.tokenizer is None:
            raise UserError(f"{self.source} has no tokenizer for its {self.model.config.vocab_size:,} tokens; name a "
                            f"folder that has one (vocab.bpe, or nanoGPT's {META}) with --tokenizer")
        return self

    def summary(self):
        """Return source, size, step and validation loss in one line."""
        step = "" if self.step is None else f", step {self.step}"
        loss = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
        return f"{self.source}: {self.model.n_params():,} parameters{step}{loss}"


def open_model(source, classifiers=False, tokenizer=""):
    """Open a checkpoint file, a Hugging Face folder or hub name, a LoRA adapter, or the newest model below a folder.

    source: "" stands for logs/. Checkpoints may be ours or nanoGPT's; an adapter is merged into its base model.
    classifiers: accept a Classifier too. tokenizer: a folder with the vocabulary, for a source without one.
    Raises UserError naming the file and what is wrong with it, or if the vocabulary is not the model's.
    """
    path = Path(source or newest_model())
    is_folder = os.path.isdir(path)      # not path.is_dir(), which raises an error for a very long name
    if os.path.isfile(path) or path.suffix == ".pt":
        opened = _open_file(path, tokenizer)
    elif os.path.isfile(path / ADAPTER_CONFIG):
        opened = _open_adapter(path, tokenizer)
    elif is_folder and not os.path.isfile(path / "config.json"):
        opened = _open_file(newest_model(path), tokenizer)
    else:
        opened = _open_folder(path if is_folder else download_model(str(source)), str(source), tokenizer)
    rows = opened.model.config.vocab_size
    if tokenizer:
        opened.without_foreign_tokenizer()
    if opened.tokenizer and opened.tokenizer.n_vocab > rows:      # the model was not trained with it
        opened.tokenizer_problem = f"it has {opened.tokenizer.n_vocab:,} entries, but the model has only {rows:,} rows"
        opened.tokenizer = None
    if tokenizer and opened.tokenizer is None:
        raise UserError(f"--tokenizer {tokenizer} is not the vocabulary of {opened.source}, which has {rows:,} "
                        "tokens; leave it out or name the right folder")
    labels = getattr(opened.model.config, "labels", None)
    if labels and not classifiers:
        raise UserError(f"{opened.source} is a classifier ({', '.join(labels)}), not a language model; use "
                        + command("finetune_classifier.py", "--checkpoint", opened.source, "--predict", "some text"))
    return opened


def open_on_device(sources, tokenizer, runtime):
    """Open language models with their tokenizers, on the device, in fp32 and eval mode; return their OpenedModels.

    Prints a line on each. sources, tokenizer: as in open_model. Raises UserError on all ranks.
    """
    models = runtime.on_all_ranks(lambda: [open_model(source, tokenizer=tokenizer).with_tokenizer()
                                           for source in sources])
    for opened in models:
        opened.model.to(runtime.device, torch.float32).eval()
        runtime.print(f"{opened.summary()}, on {runtime.world_size} x {runtime.device.type} in {runtime.dtype_name}")
    return models


def open_weights(source, tokenizer, folder):
    """Return config and weights of a model to start training from. Raises UserError if its vocabulary differs."""
    opened = open_model(source, tokenizer=folder).without_foreign_tokenizer()
    if opened.tokenizer and opened.tokenizer.name != tokenizer.name:
        raise UserError(f"{source} uses the vocabulary {opened.tokenizer.name}, but the shards use {tokenizer.name}")
    rows = opened.model.config.vocab_size
    if tokenizer.n_vocab > rows or not (opened.tokenizer or _may_be_its_vocabulary(tokenizer, rows)):
        raise UserError(f"{source} has a vocabulary of {rows}, but the shards need {tokenizer.n_vocab}")
    if opened.tokenizer is None:
        print(f"{source} does not say which vocabulary it was trained with; that of the shards, {tokenizer.name}, is "
              "assumed", file=sys.stderr)
    return dict(config=opened.model.config_dict(), model=require_finite(opened.model.state_dict(), source))


def _open_adapter(folder, tokenizer):
    """Open the base model of a LoRA adapter and merge the adapter into it."""
    stored, record = read_json(folder / ADAPTER_CONFIG), read_base(folder) or {}
    source, tensors = stored.get("base_model_name_or_path"), _read_adapter(folder, stored)
    sha256 = record.get("sha256")
    try:
        opened = open_model(source, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(f"cannot open {source}, the base model that the adapter in {folder} names: {error}") from error
    if sha256 and weights_hash(opened.model.state_dict()) != sha256:
        raise CheckpointError(f"the weights in {source} are not those that the adapter in {folder} was trained on")
    if opened.model.config.tie_word_embeddings and any(re.search(r"\.(wte|lm_head)\.", name) for name in tensors):
        raise UserError(f"the adapter in {folder} cannot be merged: it changes the embedding or the output layer, "
                        f"but in {source} the two are one")
    try:
        import peft
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # what matters in them becomes an error below
            wrapped = peft.PeftModel.from_pretrained(opened.model, str(folder), torch_device="cpu")
            expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
            merged = wrapped.merge_and_unload()
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install -r requirements-extras.txt") from error
    except Exception as error:      # peft, safetensors and torch raise many kinds of errors here
        why = " ".join(str(error).split())[:160]
        raise UserError(f"the adapter in {folder} does not fit its model ({type(error).__name__}: {why})") from error
    for names, why in ((tensors.keys() - expected, "tensors without a place there"),
                       (expected - tensors.keys(), "tensors missing that its config announces")):
        if names:
            raise UserError(f"the adapter in {folder} does not fit its model: it has {why} ({len(names)}, such as "
                            f"{min(names)})")
    own, problem = folder_tokenizer(folder)
    if own and opened.tokenizer and own.name != opened.tokenizer.name:
        problem = "it is not that of the base model"
    return replace(opened, model=merged.requires_grad_(True), source=str(folder), step=None, val_loss=None,
                   base=dict(source=source, sha256=sha256), tokenizer=None if problem else opened.tokenizer,
                   tokenizer_problem=opened.tokenizer_problem or problem)


def _read_adapter(folder, stored):
    """Return the tensors {name: tensor} of a LoRA adapter with the given config. Raises UserError."""
    path, source = folder / ADAPTER_CONFIG, stored.get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        raise UserError(f"{path} does not name the model that the adapter belongs to")
    if os.path.isfile(Path(source) / ADAPTER_CONFIG):
        raise UserError(f"{path} names {source} as its base model, which is itself an adapter; merge that one first")
    extras = [name for name in ("layer_replication", "megatron_config") if stored.get(name)]
    if stored.get("peft_type") != "LORA" or extras:
        what = extras[0] if extras else f"peft_type = {stored.get('peft_type')!r:.40}"
        raise UserError(f"{path}: {what} is not supported; only plain LORA adapters are")
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:      # peft would look for them on the hub
        raise UserError(f"{folder} has an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS[0]}; get the whole adapter")
    tensors = dict(read_tensors(file))
    largest = max((len(tensor) for name, tensor in tensors.items() if "lora_" in name and tensor.dim()), default=0)
    # With a damaged rank peft would make matrices that fill the memory, with a damaged factor numbers that are none.
    for name, pattern, kinds, lowest, highest in (("r", "rank_pattern", (int,), 1, largest),
                                                  ("lora_alpha", "alpha_pattern", (int, float), -1e6, 1e6)):
        others = stored.get(pattern) or {}
        for value in [stored.get(name), *(others.values() if isinstance(others, dict) else [others])]:
            if type(value) not in kinds or not lowest <= value <= highest:
                raise UserError(f"{path}: {name} = {value!r:.40} is not possible with the tensors in {file.name}")
    return tensors


def _open_file(path, folder):
    checkpoint = read_checkpoint(path)
    config, step, val_loss = (checkpoint.get(name) for name in ("config", "step", "val_loss"))
    if "model_args" in checkpoint:      # nanoGPT's, which uses the exact GELU
        args, names = checkpoint["model_args"], GPTConfig.__dataclass_fields__
        config = {k: args[k] for k in args if k in names} | {"activation": "gelu"} if isinstance(args, dict) else None
        step, val_loss = checkpoint.get("iter_num"), checkpoint.get("best_val_loss")
        folder = folder or _nanogpt_data(checkpoint.get("config"), path)
    if isinstance(val_loss, torch.Tensor) and val_loss.numel() == 1:
        val_loss = val_loss.item()
    val_loss = val_loss if isinstance(val_loss, (int, float)) else None
    model = build_model(config, checkpoint.get("model"), path)
    tokenizer = _stored_tokenizer(checkpoint.get("tokenizer"), model.config.vocab_size, folder, path)
    return OpenedModel(model, tokenizer, str(path), step, val_loss, checkpoint.get("base"))


def _open_folder(folder, source, fallback):
    """Open a folder in Hugging Face format. fallback: --tokenizer."""
    model = build_model(*read_pretrained(folder), source)
    tokenizer, problem = folder_tokenizer(folder)
    if tokenizer and fallback:
        default_tokenizer(fallback, tokenizer.name, source)      # raises if it is another one
    elif not problem:
        tokenizer = tokenizer or _assumed_tokenizer(model.config.vocab_size, (GPT2_ENTRIES,), fallback, source)
    return OpenedModel(model, tokenizer, source, base=read_base(folder), tokenizer_problem=problem, folder=folder)


def _stored_tokenizer(entry, rows, folder, path):
    """Return the Tokenizer of a checkpoint's entry, else that in --tokenizer's folder, else GPT-2's if it must be."""
    if entry is not None:
        return from_checkpoint(entry, folder)
    return _assumed_tokenizer(rows, (GPT2_ENTRIES, padded_vocab(GPT2_ENTRIES)), folder, path)


def _assumed_tokenizer(rows, sizes, folder, source):
    """Return the Tokenizer in --tokenizer's folder, else GPT-2's for a model of its size (in rows), else None."""
    if not folder:
        if rows not in sizes:
            return None
        print(f"{source} has no tokenizer of its own; with {rows:,} entries it gets GPT-2's", file=sys.stderr)
    tokenizer = default_tokenizer(folder)
    return tokenizer if _may_be_its_vocabulary(tokenizer, rows) else None


def _may_be_its_vocabulary(tokenizer, rows):
    """Return False if a model of so many rows that comes without a vocabulary cannot have this one."""
    # Nobody but us pads the rows of a model of characters, and our checkpoints come with their vocabulary.
    return tokenizer.eot is not None or tokenizer.n_vocab == rows


def _nanogpt_data(config, path):
    """Return the folder with the meta.pkl that a nanoGPT checkpoint was trained on, "" if it is not found."""
    name = config.get("dataset") if isinstance(config, dict) else None
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{,99}", name, re.ASCII):      # not a path that leads elsewhere
        for root in (Path(path).absolute().parent.parent, Path()):       # nanoGPT/out/ckpt.pt; the working directory
            if (root / "data" / name / META).is_file():
                print(f"{path}: the characters are those of {root / 'data' / name / META}", file=sys.stderr)
                return root / "data" / name
    return ""


def build_model(config, state, source):
    """Build the GPT or Classifier of a checkpoint's config (dict) and state dict, in fp32. Raises CheckpointError."""
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{source} holds no model: the entries 'config' and 'model' are missing or damaged")
    state = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(k)): v for k, v in state.items()}      # torch.compile's, DDP's
    state = {k: v for k, v in state.items() if not k.endswith(MASKS)}
    kind = GPT
    if "labels" in config:
        from exactgpt.classifier import Classifier as kind
    try:
        return kind.from_state(config, state).float()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def newest_model(log_dir="logs"):
    """Return the newest model_XXXXX.pt anywhere below a folder. Raises UserError if there is none."""
    files = [p for p in find_visible(log_dir, "model_*.pt") if checkpoint_step(p) is not None]
    if not files:
        raise UserError(f"no model_XXXXX.pt below {log_dir}/: train one (torchrun train.py), or name a "
                        "model (a file, a folder with a config.json, or gpt2)")
    return max(files, key=lambda p: p.stat().st_mtime)
