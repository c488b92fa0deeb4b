"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) through the peft library: small trained matrices beside frozen ones.

An adapter is a folder in peft's format (adapter_config.json, adapter_model.safetensors), which transformers also loads
onto an exported model, plus base.json, which names the weights that it was trained on.
"""
from pathlib import Path

from exactgpt.config import UserError, new_folder, read_json, write_json

LINEAR_LAYERS = ["c_attn", "c_proj", "c_fc"]     # every linear layer inside the blocks
CONFIG_NAME, BASE_NAME = "adapter_config.json", "base.json"


def add_adapter(model, r, alpha, dropout, base):
    """Freeze a GPT and add trainable matrices of rank r to its linear layers, scaled by alpha / r.

    Changes the model in place and returns peft's wrapper, which can save and merge. base: the source that the model
    was opened from. The new matrices are drawn from torch's generator. Raises UserError if peft is not installed.
    """
    peft = _import_peft()
    settings = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LINEAR_LAYERS)
    wrapped = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = str(base)      # set it last: get_peft_model overwrites it
    return wrapped


def save_adapter(wrapped, folder, base):
    """Write the adapter of a wrapped model to a new folder, with the record of its base ({"source", "sha256"}).

    Raises UserError.
    """
    from safetensors import SafetensorError
    with new_folder(folder) as temporary:
        try:
            wrapped.save_pretrained(temporary, save_embedding_layers=False)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the adapter in {folder}: {error}") from error
        (temporary / "README.md").unlink(missing_ok=True)      # peft's model card, an empty template
        write_json(temporary / BASE_NAME, base)
        mode = (temporary / BASE_NAME).stat().st_mode
        (temporary / "adapter_model.safetensors").chmod(mode)  # safetensors makes it readable by the owner only


def merge_adapter(wrapped):
    """Merge a wrapped model's adapter into its weights, W + alpha / r B A, and return the plain model."""
    return wrapped.merge_and_unload()


def is_adapter(folder):
    """Return True if a folder holds an adapter."""
    return (Path(folder) / CONFIG_NAME).is_file()


def read_adapter_base(folder):
    """Return (source, hash of the weights or None) of the model that an adapter was trained on. Raises UserError."""
    source = read_json(Path(folder) / CONFIG_NAME).get("base_model_name_or_path")
    if not source:
        raise UserError(f"{Path(folder) / CONFIG_NAME} does not name the model that the adapter belongs to")
    record = Path(folder) / BASE_NAME
    return source, read_json(record).get("sha256") if record.exists() else None


def merge_saved_adapter(model, folder):
    """Merge the adapter in a folder into a model and return the model. Raises UserError if it does not fit."""
    peft = _import_peft()
    try:
        return merge_adapter(peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu"))
    except Exception as error:      # peft, safetensors and torch raise many kinds of errors here
        why = " ".join(str(error).split())[:160]
        raise UserError(f"the adapter in {folder} does not fit its model ({type(error).__name__}: {why})") from error


def _import_peft():
    try:
        import peft
        return peft
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install -r requirements-extras.txt") from error
