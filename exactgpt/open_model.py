"""GPT-2 in Hugging Face format (config.json, model.safetensors, tokenizer files), to and from our names and layout.

Theirs differs from ours in these places: Conv1D stores matrices transposed (in, out); keys may lack the prefix
"transformer."; causal masks may be stored as buffers; the tied output layer is left out; biases are always there;
the embedding has no padding rows.
"""
import contextlib
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from exactgpt import hub
from exactgpt.config import UserError
from exactgpt.files import atomic_write, read_json, sync_folder, write_json

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
CLASSIFIER = "GPT2ForSequenceClassification"       # the name of classifier.py's model there
# Settings of transformers' GPT2Config that change the arithmetic, with the only value that our model computes.
FIXED_SETTINGS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def read_pretrained(name_or_folder):
    """(config, state) of a folder in Hugging Face format or of a name on the hub: GPTConfig's fields as a dict,
    and a state dict in our names and layout. Raises UserError."""
    folder = local_folder(name_or_folder)
    config = read_config(folder / "config.json")
    state = our_state(_read_weights(folder))
    tied = config["tie_word_embeddings"] and not _has_own_head(state) and "labels" not in config
    config["tie_word_embeddings"] = tied
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return config, state


def local_folder(name_or_folder):
    """The folder on this disk of a folder or a name on the hub, downloaded on first use. Raises UserError."""
    folder = Path(name_or_folder)
    return folder if folder.is_dir() else _download(str(name_or_folder))


def _has_own_head(state):
    """Whether the file stores an output layer that differs from the token embedding."""
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    return head is not None and (embedding is None or not torch.equal(head, embedding))


def _download(name):
    """The local folder of a model on the hub: config, weights, vocabulary, nothing else. Raises UserError.

    Where the hub cannot be reached it is the one downloaded before, if any.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, logging, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    logging.set_verbosity_error()      # a line for each retry
    print(f"{name} is no folder here; asking the Hugging Face hub", file=sys.stderr)
    online = hub.reachable()
    fetch = functools.partial(hf_hub_download, name, local_files_only=not online)
    try:
        path = fetch("config.json")
        try:
            fetch("model.safetensors")
        except EntryNotFoundError:
            fetch("pytorch_model.bin")
        for vocabulary in (("merges.txt", "vocab.json"), ("tokenizer.json",)):      # or neither
            try:
                for file in vocabulary:
                    fetch(file)
                break
            except EntryNotFoundError as error:
                known_absent = try_to_load_from_cache(name, file) is _CACHED_NO_EXIST
                if isinstance(error, LocalEntryNotFoundError) and online and not known_absent:
                    raise                                                           # the network is gone
        return Path(path).parent
    except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        unreached = isinstance(error, LocalEntryNotFoundError)  # an EntryNotFoundError too: no network, not cached
        if isinstance(error, (HFValidationError, EntryNotFoundError)) and not unreached:
            raise UserError(f"{name} is neither a folder nor a model with weights on the Hugging Face hub") from error
        raise UserError(f"cannot get {name} from the Hugging Face hub ({type(error).__name__}); check the name and the "
                        "network, or give a folder with config.json and model.safetensors") from error


def read_config(path):
    """GPTConfig's fields, as a dict, of a Hugging Face config.json. Raises UserError for what is not GPT-2."""
    stored = read_json(path)
    if stored.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path} describes a {stored['model_type']!r} model; only gpt2 is read")
    for name, value in FIXED_SETTINGS.items():
        if stored.get(name, value) != value:
            raise UserError(f"{path}: {name} = {stored[name]} is not supported")
    try:
        n_embd, activation = stored["n_embd"], stored.get("activation_function", "gelu_new")
        if stored.get("n_inner") not in (None, 4 * n_embd):
            raise UserError(f"{path}: n_inner = {stored['n_inner']} is not supported (only 4 n_embd)")
        if activation not in ACTIVATION_NAMES:
            raise UserError(f"{path}: activation_function {activation!r} is not supported")
        config = dict(block_size=stored.get("n_positions", stored.get("n_ctx", 1024)), vocab_size=stored["vocab_size"],
                      n_layer=stored["n_layer"], n_head=stored["n_head"], n_embd=n_embd, dropout=0.0, bias=True,
                      tie_word_embeddings=stored.get("tie_word_embeddings", True),
                      activation=ACTIVATION_NAMES[activation], layer_norm_eps=stored.get("layer_norm_epsilon", 1e-5))
        if stored.get("architectures") == [CLASSIFIER]:
            names = stored.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})       # transformers' defaults
            config["labels"] = [names[str(i)] for i in range(len(names))]
        return config
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a GPT-2 model ({error})") from error


def _read_weights(folder):
    """The tensors of model.safetensors or pytorch_model.bin, as stored."""
    safetensors, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safetensors.exists():
            from safetensors.torch import load_file
            return load_file(safetensors)
        if pickled.exists():
            weights = torch.load(pickled, map_location="cpu", weights_only=True)
            if not isinstance(weights, dict):
                raise TypeError(f"pytorch_model.bin holds a {type(weights).__name__}, not a dict of weights")
            return weights
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        raise UserError(f"cannot read the weights in {folder}: {type(error).__name__}: {error}") from error
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def our_state(theirs):
    """A state dict in Hugging Face's names and layout, in ours, fp32. Raises UserError for what is no tensor."""
    state = {}
    for key, tensor in theirs.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a weight
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"the weights' entry {key!r} is not a tensor")
        if not key.startswith(("transformer.", "lm_head.", "score.")):
            key = f"transformer.{key}"
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        state[key] = tensor.to(torch.float32).contiguous()
    return state


def read_vocabulary(folder):
    """(lines, {token: id}) of a folder's byte-pair vocabulary, its merges "a b" in order; None where it has none.

    From merges.txt and vocab.json, else from tokenizer.json. Raises UserError for damaged ones.
    """
    merges, whole = Path(folder) / "merges.txt", Path(folder) / "tokenizer.json"
    try:
        if merges.exists():
            return merges.read_text(encoding="utf-8").split("\n"), read_json(Path(folder) / "vocab.json")
        if whole.exists():
            stored = read_json(whole)
            model = stored["model"]
            if model.get("type") not in (None, "BPE") or '"ByteLevel"' not in json.dumps(stored.get("pre_tokenizer")):
                return [], {}       # words, pieces, or pairs of other letters: no vocabulary of ours has these ids
            return [m if isinstance(m, str) else " ".join(m) for m in model["merges"]], dict(model["vocab"])
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {type(error).__name__}: {error}") from error
    return None


# -----------------------------------------------------------------------------
# writing

def write_pretrained(folder, config, state, tokenizer=None, check=None):
    """Write a folder that transformers and lm-evaluation-harness read: weights in fp32 and, with a Tokenizer, its
    files. The rows beyond its vocabulary are left out.

    config: GPTConfig's fields; state: a state dict of ours. The folder has its name only when it is complete and
    check(temporary folder) has not raised. Raises UserError for a folder that holds something, and where the disk
    refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    n_vocab = tokenizer.n_vocab if tokenizer else config["vocab_size"]
    eot = tokenizer.eot if tokenizer else None
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", their_config(config, n_vocab, eot))
        if "labels" not in config:
            write_json(temporary / "generation_config.json", dict(bos_token_id=eot, eos_token_id=eot))
        files = tokenizer_files(tokenizer, config["block_size"], pads="labels" in config) if tokenizer else {}
        for name, text in files.items():
            with atomic_write(temporary / name, "w") as f:
                f.write(text)
        try:
            weights = temporary / "model.safetensors"
            save_file(their_state(config, state, n_vocab), weights, metadata={"format": "pt"})
            weights.chmod((temporary / "config.json").stat().st_mode)      # safetensors lets only the owner read
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the weights in {folder}: {error}") from error
        if check:
            check(temporary)


@contextlib.contextmanager
def new_folder(path):
    """A temporary folder beside `path`, which gets its name on a clean exit and is removed after an error.

    Raises UserError if `path` is there and not an empty folder, and where the disk refuses.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another name or move it away")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)       # of an export that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def their_config(config, n_vocab, eot):
    """GPTConfig's fields (or ClassifierConfig's) as a Hugging Face config.json; eot: the id of the end-of-text token,
    None without one."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    dropout, head = config["dropout"], dict(architectures=["GPT2LMHeadModel"])
    if "labels" in config:     # padding is what stands behind a text's last other token
        head = dict(architectures=[CLASSIFIER], id2label={str(i): label for i, label in enumerate(config["labels"])},
                    label2id={label: i for i, label in enumerate(config["labels"])}, pad_token_id=eot,
                    problem_type="single_label_classification")
    return dict(**head, model_type="gpt2", vocab_size=n_vocab,
                n_positions=config["block_size"], n_ctx=config["block_size"], n_embd=config["n_embd"],
                n_layer=config["n_layer"], n_head=config["n_head"], n_inner=None,
                activation_function=names[config["activation"]], layer_norm_epsilon=config["layer_norm_eps"],
                attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout, initializer_range=0.02,
                tie_word_embeddings=config["tie_word_embeddings"], use_cache=True, bos_token_id=eot, eos_token_id=eot,
                **FIXED_SETTINGS)


def their_state(config, state, n_vocab):
    """A state dict of ours in Hugging Face's layout, fp32: rows beyond n_vocab left out, absent biases as zeros."""
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
    """{name: text} of the files that AutoTokenizer reads, the slow way (vocab.json, merges.txt) and the fast one.

    pads: end-of-text pads batches.
    """
    vocabulary = json.loads(tokenizer.encoder_json())
    text = next(token for token, i in vocabulary.items() if i == tokenizer.eot)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    added = dict(id=tokenizer.eot, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False,
                 special=True)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="",
                 fuse_unk=False, byte_fallback=False, vocab=vocabulary,
                 merges=[f"{a} {b}" for a, b in tokenizer.merges])
    fast = dict(version="1.0", truncation=None, padding=None, added_tokens=[added], normalizer=None,
                pre_tokenizer=byte_level, post_processor={**byte_level, "trim_offsets": False}, decoder=byte_level,
                model=model)
    special = dict(bos_token=text, eos_token=text, unk_token=text) | (dict(pad_token=text) if pads else {})
    settings = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size, add_prefix_space=False,
                    clean_up_tokenization_spaces=False, **special)
    texts = {"vocab.json": vocabulary, "tokenizer.json": fast, "tokenizer_config.json": settings,
             "special_tokens_map.json": special}
    return {"merges.txt": tokenizer.vocab_bpe(), **{name: json.dumps(value) for name, value in texts.items()}}
