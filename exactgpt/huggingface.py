"""Read and write models in Hugging Face format: config.json, model.safetensors, tokenizer files.

Hugging Face format differs from ours: Conv1D stores matrices transposed (in, out); keys may lack the prefix
"transformer."; causal masks may be stored as buffers; the tied output layer is omitted; biases are always present; the
embedding has no padding rows.
"""
import json
import sys
from pathlib import Path

import torch

from exactgpt.config import UserError, new_folder, read_json, read_text, write_json
from exactgpt.tokenizer import GPT2_ENTRIES, from_checkpoint, from_merges, load_tokenizer

PADDING_ROWS = 1024      # nobody pads an embedding by so many: with more extra rows it has another vocabulary
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
HF_CLASSIFIER = "GPT2ForSequenceClassification"       # transformers' equivalent of classifier.py
# Settings of transformers' GPT2Config that change the result, with the only values that our model supports.
FIXED_SETTINGS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def stored_tokenizer(entry, vocab_size, folder):
    """Return the Tokenizer of a checkpoint's entry, else that in --tokenizer's folder, else GPT-2's if it may fit."""
    has_gpt2_size = 0 <= vocab_size - GPT2_ENTRIES < PADDING_ROWS
    return from_checkpoint(entry, folder) if entry is not None or folder or has_gpt2_size else None


# ---- reading Hugging Face format ---------------------------------------------

def download_model(name):
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


def folder_tokenizer(folder, vocab_size, fallback):
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
            return stored_tokenizer(None, vocab_size, fallback)
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
