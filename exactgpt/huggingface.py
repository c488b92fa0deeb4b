"""Read and write models in Hugging Face format: config.json, model.safetensors, tokenizer files.

Hugging Face format differs from ours: Conv1D stores matrices transposed (in, out); keys may lack the prefix
"transformer."; causal masks may be stored as buffers; the tied output layer is omitted; biases are always present; the
embedding has no padding rows. A folder's tokenizer is used only if it cannot give other ids than ours.
"""
import fnmatch
import json
import re
import sys
from pathlib import Path

import torch

from exactgpt.checkpoint import read_checkpoint
from exactgpt.config import UserError
from exactgpt.files import new_folder, read_json, read_text, reading, write_json
from exactgpt.tokenizer import EOT_TEXT, from_merges, load_tokenizer
from model import padded_vocab

INDEX = ".index.json"        # of weights in several files: which tensor is in which
WEIGHTS = [name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", INDEX)]
MASKS = (".attn.bias", ".attn.masked_bias")      # causal masks, which are not weights
BASE = "base.json"           # {"source", "sha256"} of the weights that a model or a LoRA adapter was fine-tuned from
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
HF_CLASSIFIER = "GPT2ForSequenceClassification"       # transformers' equivalent of classifier.py
# Settings of transformers' GPT2Config that change the result, with the only values that our model supports.
FIXED_SETTINGS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# The files of a byte-pair vocabulary, and those of other kinds of tokenizers.
VOCABULARY = ("tokenizer.json", "merges.txt", "vocab.json", "vocab.bpe", "encoder.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FOREIGN_VOCABULARY = ("vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "tokenizer.*.json", "*.codes",
                      "bpecodes", "dict.txt", "tokenization_*.py")
TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Settings that change no id, whatever their value. Others may only be off.
NEUTRAL_SETTINGS = {"_commit_hash", "backend", "chat_template", "clean_up_tokenization_spaces", "errors", "is_local",
                    "local_files_only", "max_len", "max_length", "model_input_names", "model_max_length",
                    "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding_side", "processor_class",
                    "special_tokens_map_file", "stride", "tokenizer_file", "transformers_version", "trim_offsets",
                    "truncation_side", "truncation_strategy", "use_fast", "verbose"}
ADDED_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
NEUTRAL_IN_MODEL = {"type", "vocab", "merges", "unk_token", "fuse_unk"}      # every byte is known


# ---- the hub -----------------------------------------------------------------

def download_model(name):
    """Return the folder of a hub model's config, weights and vocabulary, downloaded now or before. Raises UserError."""
    from huggingface_hub import HfApi, hf_hub_download, logging

    from exactgpt import hub
    logging.set_verbosity_error()      # it would print a line per retry
    print(f"{name} is not a local folder; looking on the Hugging Face hub", file=sys.stderr)
    try:
        if not hub.reachable():
            return Path(hf_hub_download(name, "config.json", local_files_only=True)).parent
        there = HfApi().list_repo_files(name)
        weights = Path(hf_hub_download(name, next((file for file in WEIGHTS if file in there), "model.safetensors")))
        parts = sorted(set(read_index(weights).values())) if weights.name.endswith(INDEX) else []
        # One by one, in this thread: Ctrl-C ends it at once. The config last: without it nothing of them is used.
        for file in [*parts, *(file for file in there if is_tokenizer_file(file)), "config.json"]:
            hf_hub_download(name, file)
        return weights.parent
    except UserError:
        raise
    except Exception as error:      # each version raises its own mix of exceptions
        raise UserError(f"{name} is no folder and cannot be downloaded from the Hugging Face hub ("
                        f"{type(error).__name__}); check the name and the network, or use a folder with config.json "
                        "and model.safetensors") from error


# ---- reading: the model ------------------------------------------------------

def read_pretrained(folder):
    """Read (GPTConfig's fields as a dict, our state dict in fp32) from a Hugging Face folder. Raises UserError."""
    config = _read_config(folder / "config.json")
    state = {}
    for key, tensor in _read_weights(folder):
        if key.endswith(MASKS):
            continue
        if not key.startswith(("transformer.", "lm_head.", "score.")):
            key = f"transformer.{key}"
        if key in state or tensor.dtype not in FLOATS:
            why = "is there twice" if key in state else f"holds {str(tensor.dtype)[6:]}, not floating-point numbers"
            raise UserError(f"{folder}: the weight {key} {why}; use another copy of the model")
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        state[key] = tensor.to(torch.float32).contiguous()
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    has_own_head = head is not None and (embedding is None or not torch.equal(head, embedding))
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not has_own_head and "labels" not in config
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return config, state


def _read_config(path):
    """Return GPTConfig's fields as a dict from a config.json. Raises UserError."""
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
                      layer_norm_eps=stored.get("layer_norm_epsilon", 1e-5), padded=False)
        if stored.get("architectures") == [HF_CLASSIFIER]:
            names = stored.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})       # transformers' defaults
            config["labels"] = [names[str(i)] for i in range(len(names))]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a GPT-2 model ({error})") from error
    return config


def _read_weights(folder):
    """Yield (name, tensor) of all weights in a folder, in one file or in several with an index. Raises UserError."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index of their parts")
    if not first.name.endswith(INDEX):
        yield from read_tensors(first)
        return
    index = read_index(first)
    files = sorted(set(index.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} of the "
                        f"{len(files)} files that {first.name} lists; get the rest of the model")
    for file in files:
        listed = {name for name, place in index.items() if place == file}
        for name, tensor in read_tensors(folder / file):
            if name not in listed:
                raise UserError(f"{folder / file} contains {name}, but {first.name} does not list it there; use "
                                "another copy of the model")
            listed.remove(name)
            yield name, tensor
        if listed:
            raise UserError(f"{folder / file} lacks {min(listed)}, which {first.name} lists; use another copy of the "
                            "model")


def read_index(path):
    """Return {name of a tensor: name of its file} from an index of weights in several files. Raises UserError."""
    index, suffix = read_json(path).get("weight_map"), path.name.removesuffix(INDEX).rpartition(".")[2]
    if not (isinstance(index, dict) and index and all(
            name.isprintable() and isinstance(file, str) and re.fullmatch(rf"\w[\w.-]{{0,99}}\.{suffix}", file)
            for name, file in index.items())):
        raise UserError(f"{path} does not list which .{suffix} file beside it holds which weight; use another copy of "
                        "the model")
    return index


def read_tensors(path):
    """Yield (name, tensor) of a .safetensors or .bin file, in any order. Raises UserError."""
    for name, tensor in (_read_bin if path.suffix == ".bin" else _read_safetensors)(path):
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} holds something else than a dict of tensors; use another copy of it")
        yield name, tensor


def _read_bin(path):
    tensors = read_checkpoint(path)
    while tensors:      # each is let go, because what is made of it takes memory, too
        yield tensors.popitem()


def _read_safetensors(path):
    with reading(path), open(path, "rb") as f:
        while f.read(1 << 24):      # what the disk cannot read is an error here; in mapped memory it kills the process
            pass
    try:
        from safetensors import safe_open
        with safe_open(path, "pt") as f:
            names = f.keys()
            for name in names:
                yield name, f.get_tensor(name)
    except Exception as error:      # safetensors raises many kinds for damaged files
        raise UserError(f"cannot read the weights in {path}: {type(error).__name__}: {error}") from error


# ---- reading: the tokenizer --------------------------------------------------

def is_tokenizer_file(name):
    """Return True for the name of a file that belongs to a tokenizer of any kind."""
    return name in VOCABULARY + TOKENIZER_SETTINGS or _is_foreign(name)


def _is_foreign(name):
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in FOREIGN_VOCABULARY)


def folder_tokenizer(folder):
    """Return (Tokenizer, "") of a folder, or (None, why its ids may differ from ours), or (None, "") without one.

    The reason is a clause such as "it has a Lowercase normalizer". Raises UserError for a damaged file.
    """
    with reading(folder):
        names = {path.name for path in folder.iterdir()
                 if (is_tokenizer_file(path.name) or path.name == "config.json") and path.is_file()}
    files = {name: read_json(folder / name) for name in names if name.endswith(".json") and not _is_foreign(name)}
    try:
        reason = next(_differences(names, files), "")
        vocabularies = [] if reason else list(_vocabularies(folder, names, files))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {type(error).__name__}: {error}") from error
    reason, found = "".join(letter for letter in reason if letter.isprintable())[:160], {}
    for file, lines, ids in vocabularies:
        try:
            tokenizer = found[file] = from_merges(lines, file)
        except UserError as error:
            return None, f"its {error}"
        if ids != json.loads(tokenizer.encoder_json()):
            return None, f"its {file} has other ids than 256 bytes, merges and {EOT_TEXT}, in this order"
    if len({tokenizer.name for tokenizer in found.values()}) > 1:
        return None, f"its {' and '.join(found)} disagree"
    return next(iter(found.values()), None), reason


def _vocabularies(folder, names, files):
    """Yield (file, lines of merges, {token: id}) of each vocabulary in a folder."""
    if "tokenizer.json" in names:
        model, added = files["tokenizer.json"]["model"], files["tokenizer.json"].get("added_tokens") or []
        yield ("tokenizer.json", [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
               {**model["vocab"], **{token["content"]: token["id"] for token in added}})
    if {"merges.txt", "vocab.json"} <= names:
        added = files.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
        yield ("merges.txt", read_text(folder / "merges.txt").split("\n"), {
            **files["vocab.json"], **files.get("added_tokens.json", {}),
            **{token["content"]: int(i) for i, token in added.items()}})
    if "vocab.bpe" in names:
        tokenizer = load_tokenizer(folder)
        yield "vocab.bpe", list(map(" ".join, tokenizer.merges)), json.loads(tokenizer.encoder_json())


def _differences(names, files):
    """Yield in words what may make the ids of a folder's tokenizer differ from those of its merges and <|endoftext|>.

    names: of its files. files: {name: value} of those in JSON.
    """
    yield from (f"it has a {name}, another kind of vocabulary than GPT-2's"
                for name in sorted(names) if _is_foreign(name))
    yield from (f"it has a {one} without a {other}" for one, other in (
        ("vocab.json", "merges.txt"), ("merges.txt", "vocab.json"), ("encoder.json", "vocab.bpe"))
        if one in names and other not in names and "tokenizer.json" not in names)
    yield from (f"it has {name} without a vocabulary" for name in TOKENIZER_SETTINGS
                if name in names and names.isdisjoint(VOCABULARY))
    config, added = files.get("config.json", {}), [*files.get("added_tokens.json", {})]
    settings = {"config.json": dict(tokenizer_class=config.get("tokenizer_class"),
                                    auto_map=(config.get("auto_map") or {}).get("AutoTokenizer")),
                **{file: files.get(file, {}) for file in ("tokenizer_config.json", "special_tokens_map.json")}}
    for file, stored in settings.items():
        for key, value in stored.items():
            if key in ADDED_TOKENS or (key.endswith("_token") and not key.startswith("add_")):
                added += _texts(value)
            elif key == "tokenizer_class":
                if value not in (None, *TOKENIZER_CLASSES):
                    yield f"its class is {value}"
            elif value and key not in NEUTRAL_SETTINGS:
                yield f"its {file} sets {key}"
    whole = files.get("tokenizer.json")
    added += _texts(whole and whole.get("added_tokens"))
    added = [repr(text)[1:-1] for text in dict.fromkeys(added) if text != EOT_TEXT]
    if added:
        yield f"it has the added token{'s' * (len(added) > 1)} {', '.join(added[:4])}{', ...' * (len(added) > 4)}"
    if whole:
        yield from _differences_in_json(whole)


def _texts(value):
    """Return the texts of the tokens in a setting: a token (a text, or a dict with its content), or several."""
    if not value or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        return [value["content"]] if "content" in value else _texts(list(value.values()))
    return [text for item in value for text in _texts(item)]


def _differences_in_json(whole):
    """Yield in words what in a tokenizer.json makes its ids differ from those of plain byte-pair encoding."""
    def kinds(part):      # "NFC + Lowercase" of a sequence of the two
        parts = [p for key in ("normalizers", "pretokenizers", "processors", "decoders") for p in part.get(key, ())]
        return " + ".join(map(kinds, parts)) or part["type"]
    model = whole["model"]
    normalizer, splitter, after, decoder = (
        whole.get(name) or {} for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    if model.get("type", "BPE") != "BPE":
        yield f"its model is {model['type']}, not byte-pair encoding"
    yield from (f"its model sets {key}" for key, value in model.items() if value and key not in NEUTRAL_IN_MODEL)
    if normalizer:
        yield f"it has a {kinds(normalizer)} normalizer"
    if splitter.get("type") != "ByteLevel" or splitter.get("use_regex", True) is not True:
        yield f"it splits texts by {kinds(splitter) if splitter else 'nothing'}, not as GPT-2 does"
    if splitter.get("add_prefix_space", True):
        yield "it adds a space before a text"
    nothing = [{"Sequence": {"id": "A", "type_id": 0}}]      # the template of transformers that adds no token
    if after.get("type", "ByteLevel") != "ByteLevel" and after.get("single") != nothing:
        yield f"it adds tokens by {kinds(after)}"
    if decoder.get("type", "ByteLevel") != "ByteLevel":
        yield f"it decodes by {kinds(decoder)}"


# ---- writing Hugging Face format ---------------------------------------------

def read_base(folder):
    """Return the record of the model that a folder's model or adapter was fine-tuned from, None if there is none."""
    return read_json(folder / BASE) if (folder / BASE).is_file() else None


def write_pretrained(folder, config, state, tokenizer=None, base=None, check=None):
    """Write a folder that transformers and lm-eval read, of GPTConfig's fields and our state dict. Raises UserError."""
    # The folder gets its name only when it is complete and check(temporary folder) has not raised. base: of read_base.
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    rows = exported_rows(config, tokenizer)
    eot = tokenizer.eot if tokenizer else None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    dropout, head = config["dropout"], dict(architectures=["GPT2LMHeadModel"])
    if "labels" in config:     # transformers reads the label at the last token that is not padding
        head = dict(architectures=[HF_CLASSIFIER], id2label={str(i): label for i, label in enumerate(config["labels"])},
                    label2id={label: i for i, label in enumerate(config["labels"])}, pad_token_id=eot,
                    problem_type="single_label_classification")
    theirs = dict(**head, model_type="gpt2", vocab_size=rows,
                  n_positions=config["block_size"], n_ctx=config["block_size"], n_embd=config["n_embd"],
                  n_layer=config["n_layer"], n_head=config["n_head"], n_inner=None,
                  activation_function=names[config["activation"]], layer_norm_epsilon=config["layer_norm_eps"],
                  attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout, initializer_range=0.02,
                  tie_word_embeddings=config["tie_word_embeddings"], use_cache=True, bos_token_id=eot,
                  eos_token_id=eot, **FIXED_SETTINGS)
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", theirs)
        if base:
            write_json(temporary / BASE, base)
        if "labels" not in config:
            write_json(temporary / "generation_config.json", dict(bos_token_id=eot, eos_token_id=eot))
        files = tokenizer_files(tokenizer, config["block_size"], pads="labels" in config) if tokenizer else {}
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        try:
            weights = temporary / "model.safetensors"
            save_file(state_to_huggingface(config, state, rows), weights, metadata={"format": "pt"})
            weights.chmod((temporary / "config.json").stat().st_mode)      # safetensors lets only the owner read it
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the weights in {folder}: {error}") from error
        if check:
            check(temporary)


def exported_rows(config, tokenizer):
    """Return how many rows of the embedding are exported: all that are not known to be padding."""
    padding = tokenizer and config["padded"] and config["vocab_size"] == padded_vocab(tokenizer.n_vocab)
    return tokenizer.n_vocab if padding else config["vocab_size"]


def state_to_huggingface(config, state, rows):
    """Convert our state dict to Hugging Face's layout in fp32, with the first rows alone, absent biases as zeros."""
    theirs = {}
    for key, tensor in state.items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if key in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[:rows]
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
