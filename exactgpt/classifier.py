"""A GPT that classifies texts: the output layer gives one score per label, taken at the text's last token.

Weights and arithmetic are those of transformers' GPT2ForSequenceClassification.
"""
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from model import GPT, GPTConfig


@dataclass
class ClassifierConfig(GPTConfig):
    """The shape of a classifier. Raises ValueError if no classifier can have it."""
    tie_word_embeddings: bool = False      # there is no output layer over tokens to tie
    labels: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be a list of texts, but is {self.labels!r}")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"a classifier needs two labels or more, all different, but has {self.labels}")


class Classifier(GPT):
    """A GPT with a score layer instead of its output layer."""
    config_class = ClassifierConfig

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head
        self.score = new_score_layer(config)

    @classmethod
    def from_gpt(cls, gpt, labels):
        """Build a classifier around the blocks of a GPT, which it shares, with a random score layer."""
        config = ClassifierConfig(**{**gpt.config_dict(), "tie_word_embeddings": False}, labels=list(labels))
        with torch.device("meta"):      # no memory for weights that are replaced below
            model = cls(config)
        model.transformer, model.score = gpt.transformer, new_score_layer(config)
        return model

    def forward(self, idx):
        """Return scores (B, labels), before the softmax, of texts idx (B, T) that end at T."""
        return self.score(self.hidden(idx)[:, -1])


def new_score_layer(config):
    """Build a score layer with GPT-2's initialisation."""
    score = nn.Linear(config.n_embd, len(config.labels), bias=False)
    nn.init.normal_(score.weight, mean=0.0, std=0.02)
    return score
