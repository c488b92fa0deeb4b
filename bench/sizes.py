"""The flags for the shape of the model that a benchmark runs."""
from dataclasses import dataclass

from exactgpt.config import DeviceConfig, flag
from model import GPT2_SIZES


@dataclass(kw_only=True)
class SizeConfig(DeviceConfig):
    """The flags of a benchmark that makes a model with random weights."""
    model: str = flag("gpt2", "GPT-2 size of the randomly initialized model", choices=tuple(GPT2_SIZES))
    n_layer: int = flag(0, "number of layers, for a quick try (0: as in --model)", low=0)

    @property
    def shape(self):
        """The model's n_layer, n_head and n_embd, as a dict."""
        shape = GPT2_SIZES[self.model]
        return {**shape, "n_layer": self.n_layer or shape["n_layer"]}

    @property
    def name(self):
        """The model's name in results."""
        return self.model + (f"_{self.n_layer}_layers" if self.n_layer else "")
