"""GPT-2 weights in Hugging Face format (config.json and model.safetensors), to and from our names and layout.

Theirs differ from ours in four places: Conv1D stores matrices transposed (in, out); keys may lack the prefix
"transformer."; causal masks are stored as buffers; the tied output layer is left out.
"""
from pathlib import Path

import torch

from config import UserError
from files import read_json

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Settings of transformers' GPT2Config that change the arithmetic, with the only value that our model computes.
FIXED_SETTINGS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def explain(build, source):
    """build(), with its ValueError as a UserError that names where the weights came from."""
    try:
        return build()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def read_pretrained(name_or_folder):
    """(config, state) of a folder in Hugging Face format or of a name on the hub: GPTConfig's fields as a dict,
    and a state dict in our names and layout. Raises UserError."""
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(str(name_or_folder))
    config = read_config(folder / "config.json")
    state = our_state(_read_weights(folder))
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not _has_own_head(state)
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return config, state


def _has_own_head(state):
    """Whether the file stores an output layer that differs from the token embedding."""
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    return head is not None and (embedding is None or not torch.equal(head, embedding))


def _download(name):
    """The local folder of a model on the hub: its config and its weights, nothing else. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        path = hf_hub_download(name, "config.json")
        try:
            hf_hub_download(name, "model.safetensors")
        except EntryNotFoundError:
            hf_hub_download(name, "pytorch_model.bin")
        return Path(path).parent
    except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        unreached = isinstance(error, LocalEntryNotFoundError)  # an EntryNotFoundError too: no network, not in the cache
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
        return dict(block_size=stored.get("n_positions", stored.get("n_ctx", 1024)), vocab_size=stored["vocab_size"],
                    n_layer=stored["n_layer"], n_head=stored["n_head"], n_embd=n_embd, dropout=0.0, bias=True,
                    tie_word_embeddings=stored.get("tie_word_embeddings", True),
                    activation=ACTIVATION_NAMES[activation], layer_norm_eps=stored.get("layer_norm_epsilon", 1e-5))
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
    """A state dict in Hugging Face's names and layout, in ours, fp32. Raises UserError for values that are no tensors."""
    state = {}
    for key, tensor in theirs.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a weight
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"the weights' entry {key!r} is not a tensor")
        if not key.startswith(("transformer.", "lm_head.")):
            key = f"transformer.{key}"
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        state[key] = tensor.to(torch.float32).contiguous()
    return state
