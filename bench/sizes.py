"""The shape of the model that a benchmark runs, as flags."""
from dataclasses import dataclass

from exactgpt.config import DeviceConfig, flag
from model import GPT2_SIZES


@dataclass(kw_only=True)
class SizeConfig(DeviceConfig):
    """The flags of a benchmark that makes a model of its own."""
    model: str = flag("gpt2", "random weights of this shape", choices=tuple(GPT2_SIZES))
    n_layer: int = flag(0, "layers, for a quick try; 0: the model's own", low=0)

    @property
    def shape(self):
        """n_layer, n_head and n_embd of the model."""
        shape = GPT2_SIZES[self.model]
        return {**shape, "n_layer": self.n_layer or shape["n_layer"]}

    @property
    def name(self):
        """The model's name in results."""
        return self.model + (f"_{self.n_layer}_layers" if self.n_layer else "")
