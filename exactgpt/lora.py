"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) through the peft library: small trained matrices beside frozen ones.

An adapter is a folder in peft's format (adapter_config.json, adapter_model.safetensors), which transformers also loads
onto an exported model, plus base.json, which names the weights that it was trained on.
"""
from pathlib import Path

from exactgpt.config import UserError, new_folder, read_json, write_json
from exactgpt.distributed import seed_everything

LINEAR_LAYERS = ["c_attn", "c_proj", "c_fc"]     # every linear layer inside the blocks
CONFIG_NAME, BASE_NAME = "adapter_config.json", "base.json"


def add_adapter(model, config):
    """Freeze a GPT and add trainable matrices of rank --lora_r to its linear layers, scaled by lora_alpha / lora_r.

    Changes the model in place and returns peft's wrapper, which can save and merge.
    """
    import peft
    settings = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                               target_modules=LINEAR_LAYERS)
    seed_everything(config.seed, "lora")
    wrapped = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = config.init_from      # set it last: get_peft_model overwrites it
    return wrapped


def save_adapter(wrapped, folder, base):
    """Write the adapter of a wrapped model to a new folder, with the record of its base ({"source", "sha256"}).

    Raises UserError.
    """
    from safetensors import SafetensorError
    with new_folder(folder) as temporary:
        try:
            wrapped.save_pretrained(temporary, save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(f"{error}") from error               # new_folder makes a UserError of it
        (temporary / "README.md").unlink(missing_ok=True)      # peft's model card, an empty template
        write_json(temporary / BASE_NAME, base)
        mode = (temporary / BASE_NAME).stat().st_mode
        (temporary / "adapter_model.safetensors").chmod(mode)  # safetensors makes it readable by the owner only


def read_adapter_base(folder):
    """Return (source, hash of the weights or None) of the model that an adapter was trained on. Raises UserError."""
    source = read_json(Path(folder) / CONFIG_NAME).get("base_model_name_or_path")
    if not source:
        raise UserError(f"{Path(folder) / CONFIG_NAME} does not name the model that the adapter belongs to")
    record = Path(folder) / BASE_NAME
    return source, read_json(record).get("sha256") if record.exists() else None


def merge_saved_adapter(model, folder):
    """Merge the adapter in a folder into a model and return the model. Raises UserError if it does not fit."""
    try:
        import peft
        return peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu").merge_and_unload()
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install -r requirements-extras.txt") from error
    except Exception as error:      # peft, safetensors and torch raise many kinds of errors here
        why = " ".join(str(error).split())[:160]
        raise UserError(f"the adapter in {folder} does not fit its model ({type(error).__name__}: {why})") from error
