"""Open a model and its tokenizer from our checkpoints, nanoGPT's, build-nanogpt's or Hugging Face format.

`open_model` reads all of them, `write_pretrained` writes a Hugging Face folder (config.json, model.safetensors,
tokenizer files). Hugging Face format differs from ours: Conv1D stores matrices transposed (in, out); keys may lack the
prefix "transformer."; causal masks may be stored as buffers; the tied output layer is omitted; biases are always
present; the embedding has no padding rows.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.characters import META
from exactgpt.checkpoint import CheckpointError, checkpoint_step, read_checkpoint, require_finite, weights_hash
from exactgpt.config import UserError, find_visible, new_folder, read_json, read_text, write_json
from exactgpt.tokenizer import GPT2_ENTRIES, Tokenizer, from_checkpoint, from_merges, load_tokenizer
from model import GPT, GPTConfig

ADAPTER_CONFIG = "adapter_config.json"      # of a LoRA adapter in peft's format
ADAPTER_BASE = "base.json"    # beside it: {"source", "sha256"} of the weights that it was trained on
PADDING_ROWS = 1024      # nobody pads an embedding by so many: with more extra rows it has another vocabulary
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
HF_CLASSIFIER = "GPT2ForSequenceClassification"       # transformers' equivalent of classifier.py
# Settings of transformers' GPT2Config that change the result, with the only values that our model supports.
FIXED_SETTINGS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


@dataclass
class OpenedModel:
    """A model with its tokenizer and metadata."""
    model: GPT
    tokenizer: Tokenizer | None   # None: no tokenizer is known, only token ids work
    source: str                   # file, folder or hub name
    step: int | None = None
    val_loss: float | None = None
    base: dict | None = None      # the record of the model that it was fine-tuned from

    def with_tokenizer(self):
        """Return self. Raises UserError if there is no tokenizer to encode text for the model."""
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
    if path.is_file() or path.suffix == ".pt":
        opened = _open_file(path, tokenizer)
    elif (path / ADAPTER_CONFIG).is_file():
        opened = _open_adapter(path, tokenizer)
    elif path.is_dir() and not (path / "config.json").exists():
        opened = _open_file(newest_model(path), tokenizer)
    else:
        folder = path if path.is_dir() else _download_model(str(source))
        model = build_model(*read_pretrained(folder), source)
        opened = OpenedModel(model, _folder_tokenizer(folder, model.config.vocab_size, tokenizer), str(source))
    n_rows = opened.model.config.vocab_size
    if opened.tokenizer and opened.tokenizer.n_vocab > n_rows:      # the model was not trained with it
        opened.tokenizer = None
    if tokenizer and opened.tokenizer is None:
        raise UserError(f"--tokenizer {tokenizer} is not the vocabulary of {opened.source}, which has {n_rows:,} "
                        "tokens; leave it out or name the right folder")
    labels = getattr(opened.model.config, "labels", None)
    if labels and not classifiers:
        raise UserError(f"{opened.source} is a classifier ({', '.join(labels)}), not a language model; use python "
                        f"finetune_classifier.py --checkpoint {opened.source} --predict \"...\"")
    return opened


def open_weights(source, tokenizer, folder):
    """Return config and weights of a model to start training from. Raises UserError if its vocabulary differs."""
    opened = open_model(source, tokenizer=folder)
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
    source, record = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"), folder / ADAPTER_BASE
    if not source:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name the model that the adapter belongs to")
    sha256 = read_json(record).get("sha256") if record.exists() else None
    try:
        opened = open_model(source, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(f"cannot open {source}, the base model that the adapter in {folder} names: {error}") from error
    if sha256 and weights_hash(opened.model.state_dict()) != sha256:
        raise CheckpointError(f"the weights in {source} are not those that the adapter in {folder} was trained on")
    try:
        import peft
        merged = peft.PeftModel.from_pretrained(opened.model, str(folder), torch_device="cpu").merge_and_unload()
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install -r requirements-extras.txt") from error
    except Exception as error:      # peft, safetensors and torch raise many kinds of errors here
        why = " ".join(str(error).split())[:160]
        raise UserError(f"the adapter in {folder} does not fit its model ({type(error).__name__}: {why})") from error
    return OpenedModel(merged.requires_grad_(True), opened.tokenizer, str(folder))


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
    tokenizer = _stored_tokenizer(checkpoint.get("tokenizer"), model.config.vocab_size, folder)
    return OpenedModel(model, tokenizer, str(path), step, val_loss, checkpoint.get("base"))


def _stored_tokenizer(entry, vocab_size, folder):
    """Return the Tokenizer of a checkpoint's entry, else that in --tokenizer's folder, else GPT-2's if it may fit."""
    has_gpt2_size = 0 <= vocab_size - GPT2_ENTRIES < PADDING_ROWS
    tokenizer = from_checkpoint(entry, folder) if entry is not None or folder or has_gpt2_size else None
    return tokenizer if entry is not None or _may_be_its_vocabulary(tokenizer, vocab_size) else None


def _may_be_its_vocabulary(tokenizer, rows):
    """Return False if a model of so many rows that comes without a vocabulary cannot have this one."""
    # Nobody but us pads the rows of a model of characters, and our checkpoints come with their vocabulary.
    return not (tokenizer and tokenizer.eot is None and tokenizer.n_vocab != rows)


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
    state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}    # causal masks
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


# ---- reading Hugging Face format ---------------------------------------------

def _download_model(name):
    """Return the folder of a hub model's config, weights and vocabulary, downloaded now or before. Raises UserError."""
    from huggingface_hub import HfApi, hf_hub_download, logging, snapshot_download

    from exactgpt import hub
    logging.set_verbosity_error()      # it would print a line per retry
    print(f"{name} is not a local folder; looking on the Hugging Face hub", file=sys.stderr)
    files, vocabulary = ["config.json", "model.safetensors"], ["merges.txt", "vocab.json", "tokenizer.json"]
    try:
        if not hub.reachable():
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=[*files, *vocabulary]))
            if not (folder / "model.safetensors").exists():
                snapshot_download(name, local_files_only=True, allow_patterns="pytorch_model.bin")
            return folder
        there = HfApi().list_repo_files(name)
        weights = [file for file in ("model.safetensors", "pytorch_model.bin") if file in there][:1]
        for file in [*weights, *(file for file in vocabulary if file in there), "config.json"]:
            path = hf_hub_download(name, file)      # one by one, in this thread: Ctrl-C ends it at once
        return Path(path).parent
    except Exception as error:      # each version raises its own mix of exceptions
        raise UserError(f"{name} is no folder and cannot be downloaded from the Hugging Face hub ("
                        f"{type(error).__name__}); check the name and the network, or use a folder with "
                        f"{' and '.join(files)}") from error


def read_pretrained(folder):
    """Read (GPTConfig's fields as a dict, our state dict in fp32) from a Hugging Face folder. Raises UserError."""
    path = folder / "config.json"
    stored = read_json(path)
    try:
        supported = {"model_type": ["gpt2"], "activation_function": list(ACTIVATION_NAMES),
                     "n_inner": [None, 4 * stored.get("n_embd", 0)], **{k: [v] for k, v in FIXED_SETTINGS.items()}}
        for name, values in supported.items():
            if stored.setdefault(name, values[0]) not in values:
                raise UserError(f"{path}: {name} = {stored[name]!r} is not supported; only {values}")
        config = dict(block_size=stored.get("n_positions", stored.get("n_ctx", 1024)), vocab_size=stored["vocab_size"],
                      n_layer=stored["n_layer"], n_head=stored["n_head"], n_embd=stored["n_embd"], dropout=0.0,
                      bias=True, tie_word_embeddings=stored.get("tie_word_embeddings", True),
                      activation=ACTIVATION_NAMES[stored["activation_function"]],
                      layer_norm_eps=stored.get("layer_norm_epsilon", 1e-5))
        if stored.get("architectures") == [HF_CLASSIFIER]:
            names = stored.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})       # transformers' defaults
            config["labels"] = [names[str(i)] for i in range(len(names))]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a GPT-2 model ({error})") from error

    safetensors, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not safetensors.exists() and not pickled.exists():
        raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    try:
        from safetensors.torch import load_file
        theirs = (load_file(safetensors) if safetensors.exists()
                  else torch.load(pickled, map_location="cpu", weights_only=True))
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        raise UserError(f"cannot read the weights in {folder}: {type(error).__name__}: {error}") from error
    if not isinstance(theirs, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in theirs.values()):
        raise UserError(f"{pickled} holds something else than a dict of tensors; use another copy of the model")
    state = {}
    for key, tensor in theirs.items():
        if not key.startswith(("transformer.", "lm_head.", "score.")):
            key = f"transformer.{key}"
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        state[key] = tensor.to(torch.float32).contiguous()
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    has_own_head = head is not None and (embedding is None or not torch.equal(head, embedding))
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not has_own_head and "labels" not in config
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return config, state


def _folder_tokenizer(folder, vocab_size, fallback):
    """Return a folder's Tokenizer, else that of the folder `fallback`, else GPT-2's; None if it is not the model's."""
    merges, whole = folder / "merges.txt", folder / "tokenizer.json"
    try:
        if merges.exists():
            lines, ids = read_text(merges).split("\n"), read_json(folder / "vocab.json")
        elif whole.exists():
            stored = read_json(whole)
            model = stored["model"]
            if model.get("type") not in (None, "BPE") or '"ByteLevel"' not in json.dumps(stored.get("pre_tokenizer")):
                return None         # not byte-level BPE: our tokenizer cannot produce these ids
            lines, ids = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]], dict(model["vocab"])
        elif (folder / "vocab.bpe").exists():
            return load_tokenizer(folder, fallback)
        else:
            return _stored_tokenizer(None, vocab_size, fallback)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {type(error).__name__}: {error}") from error
    tokenizer = from_merges(lines, folder, fallback)
    ours = json.loads(tokenizer.encoder_json())
    return tokenizer if all(ids.get(token) == i for token, i in ours.items()) else None   # special tokens first, say


# ---- writing Hugging Face format ---------------------------------------------

def write_pretrained(folder, config, state, tokenizer=None, check=None):
    """Write a folder that transformers and lm-eval read, of GPTConfig's fields and our state dict. Raises UserError."""
    # The folder gets its name only when it is complete and check(temporary folder) has not raised.
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    n_vocab = tokenizer.n_vocab if tokenizer else config["vocab_size"]
    eot = tokenizer.eot if tokenizer else None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    dropout, head = config["dropout"], dict(architectures=["GPT2LMHeadModel"])
    if "labels" in config:     # transformers reads the label at the last token that is not padding
        head = dict(architectures=[HF_CLASSIFIER], id2label={str(i): label for i, label in enumerate(config["labels"])},
                    label2id={label: i for i, label in enumerate(config["labels"])}, pad_token_id=eot,
                    problem_type="single_label_classification")
    theirs = dict(**head, model_type="gpt2", vocab_size=n_vocab,
                  n_positions=config["block_size"], n_ctx=config["block_size"], n_embd=config["n_embd"],
                  n_layer=config["n_layer"], n_head=config["n_head"], n_inner=None,
                  activation_function=names[config["activation"]], layer_norm_epsilon=config["layer_norm_eps"],
                  attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout, initializer_range=0.02,
                  tie_word_embeddings=config["tie_word_embeddings"], use_cache=True, bos_token_id=eot,
                  eos_token_id=eot, **FIXED_SETTINGS)
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", theirs)
        if "labels" not in config:
            write_json(temporary / "generation_config.json", dict(bos_token_id=eot, eos_token_id=eot))
        files = tokenizer_files(tokenizer, config["block_size"], pads="labels" in config) if tokenizer else {}
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        try:
            weights = temporary / "model.safetensors"
            save_file(state_to_huggingface(config, state, n_vocab), weights, metadata={"format": "pt"})
            weights.chmod((temporary / "config.json").stat().st_mode)      # safetensors lets only the owner read it
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the weights in {folder}: {error}") from error
        if check:
            check(temporary)


def state_to_huggingface(config, state, n_vocab):
    """Convert our state dict to Hugging Face's layout in fp32, without rows beyond n_vocab, absent biases as zeros."""
    theirs = {}
    for key, tensor in state.items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if key in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[:n_vocab]
        if key.startswith(("transformer.h.", "transformer.ln_f.")) and key.endswith(".weight"):
            theirs.setdefault(key.removesuffix("weight") + "bias", torch.zeros(tensor.size(0)))
        if key.endswith(TRANSPOSED):
            tensor = tensor.t()
        theirs[key] = tensor.detach().to("cpu", torch.float32).contiguous()
    return theirs


def tokenizer_files(tokenizer, block_size, pads=False):
    """Return {name: text} of the files that AutoTokenizer reads. pads: use end-of-text as the padding token."""
    from tokenizers import ByteLevelBPETokenizer
    vocabulary = json.loads(tokenizer.encoder_json())
    text = next(token for token, i in vocabulary.items() if i == tokenizer.eot)
    fast = ByteLevelBPETokenizer(vocabulary, tokenizer.merges)
    fast.add_special_tokens([text])
    special = dict(bos_token=text, eos_token=text, unk_token=text) | (dict(pad_token=text) if pads else {})
    settings = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size, add_prefix_space=False,
                    clean_up_tokenization_spaces=False, **special)
    return {"merges.txt": tokenizer.vocab_bpe(), "vocab.json": json.dumps(vocabulary), "tokenizer.json": fast.to_str(),
            "tokenizer_config.json": json.dumps(settings), "special_tokens_map.json": json.dumps(special)}
