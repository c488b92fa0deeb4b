"""A GPT that classifies texts: the output layer gives one score per label, taken at the text's last token.

Weights and arithmetic are those of transformers' GPT2ForSequenceClassification.
"""
from contextlib import nullcontext
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
        labels = self.labels if isinstance(self.labels, list) else []
        if len({label for label in labels if isinstance(label, str)}) < max(2, len(labels)):
            raise ValueError(f"labels must be a list of two or more different texts, but is {self.labels!r}")


class Classifier(GPT):
    """A GPT with a score layer, drawn as GPT-2's weights are, instead of its output layer."""
    config_class = ClassifierConfig

    def __init__(self, config, gpt=None):
        """gpt: a GPT whose embeddings and blocks this model shares; None: it gets its own."""
        with torch.device("meta") if gpt else nullcontext():      # no memory for weights that are replaced below
            super().__init__(config)
        del self.lm_head
        if gpt:
            self.transformer = gpt.transformer
        self.score = nn.Linear(config.n_embd, len(config.labels), bias=False)
        nn.init.normal_(self.score.weight, mean=0.0, std=0.02)

    @classmethod
    def from_gpt(cls, gpt, labels):
        """Build a classifier around the blocks of a GPT, which it shares, with a random score layer."""
        return cls(ClassifierConfig(**{**gpt.config_dict(), "tie_word_embeddings": False, "labels": labels}), gpt)

    def forward(self, idx):
        """Return scores (B, labels), before the softmax, of texts idx (B, T) that end at T."""
        return self.score(self.hidden(idx)[:, -1])
