"""GPT-2: the model of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), exactly.

Learned positions, LayerNorm before attention and MLP, tanh GELU, biases, output layer tied to the token embedding.
Parameters have the names of nanoGPT and Hugging Face (transformer.h.0.attn.c_attn.weight); matrices are (out, in), as
nn.Linear stores them. Comments give shapes where they change:

    B batch    T time (tokens)    C channels = n_embd    nh heads    hs head size = C / nh    V vocabulary (padded)
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),           # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),   # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),    # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),       # 1558M
}
ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),      # GPT-2
    "gelu": F.gelu,                                            # exact: nanoGPT's checkpoints
    "relu": F.relu,
}
IGNORED = -1  # target of a token that has no loss


def padded_vocab(n_vocab):
    """Return the embedding rows of a new model: the next multiple of 64, for which matrix products are faster."""
    return -(-n_vocab // 64) * 64


@dataclass
class GPTConfig:
    """Shape of a model. Raises ValueError for one that cannot be built."""
    block_size: int = 1024
    vocab_size: int = 50304            # rows of the embedding; 50257 in GPT-2's weights
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                  # in linear layers and LayerNorms
    tie_word_embeddings: bool = True   # the output layer is the token embedding
    activation: str = "gelu_tanh"
    layer_norm_eps: float = 1e-5
    padded: bool = True                # rows that no token needs are padding (not in imported weights)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, but is {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, but is {self.dropout!r}")
        for name in ("bias", "tie_word_embeddings", "padded"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, but is {getattr(self, name)!r}")
        if type(self.layer_norm_eps) not in (int, float) or not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps must be > 0 and < 1, but is {self.layer_norm_eps!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but is {self.activation!r}")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token attends to itself and to the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, attn_mask=None, cache=None):
        """Map x (B, T, C) to (B, T, C).

        attn_mask: bool, broadcast to (B, nh, T, keys), True where a token may attend; None means causal. With a KVCache
        it is a float mask that is added to the scores.
        """
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)     # each (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            y = cache.attend(q, k, v, attn_mask)                                       # (B, nh, T, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=attn_mask is None,
                                               dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Feed-forward layers: to four times the width, activation, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout

    def forward(self, x):
        """Map x (B, T, C) to (B, T, C)."""
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, attn_mask=None, cache=None):
        """Map x (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), attn_mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model: token and position embeddings, n_layer blocks, a final LayerNorm, the output layer."""
    config_class = GPTConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False      # True: recompute each block's activations in the backward pass
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """Draw weights from N(0, 0.02); those that add to the residual stream are scaled by 1/sqrt(2 n_layer)."""
        # As in nanoGPT and Hugging Face, so that the variance of the stream does not grow with depth.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):     # after its children: replaces c_proj's draw
            nn.init.normal_(module.c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, positions=None, attn_mask=None, cache=None):
        """Return the final LayerNorm's output (B, T, C) for token ids idx (B, T) int64.

        positions (T) or (B, T) and attn_mask (see CausalSelfAttention) are for packed sequences; with a KVCache both
        come from the cache. Raises ValueError if T exceeds block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size {self.config.block_size}")
        if cache is not None:
            positions, attn_mask = cache.begin(T)
        elif positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)               # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            if self.recompute and self.training:
                x = checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask, cache.layers[i] if cache is not None else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, reduction="mean", positions=None, attn_mask=None, cache=None):
        """Return logits (B, T, V) for token ids idx (B, T), or the cross-entropy in nats if targets (B, T) are given.

        Tokens with the target IGNORED do not count. reduction: "mean" or "sum" over tokens, or "none": (B, T).
        """
        logits = self.lm_head(self.hidden(idx, positions, attn_mask, cache))
        if targets is None:
            return logits
        # fp32, because sums of exponentials over 50,000 entries are too coarse in bf16
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1),
                               ignore_index=IGNORED, reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def n_params(self):
        """Return the number of parameters. A tied output layer counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Return the floating-point operations of training on one token (PaLM paper, appendix B)."""
        c = self.config      # for each parameter 2 forward and 4 backward; the rest is attention
        return 6 * self.n_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Shorten the context to block_size. Raises ValueError if the model has fewer positions."""
        if block_size > self.config.block_size:
            raise ValueError(f"the weights have {self.config.block_size} positions, block_size {block_size} needs more")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
        self.transformer.wpe.num_embeddings = block_size

    @classmethod
    def from_state(cls, config, state):
        """Make a model of a config (a dict) and a state dict, whose tensors it uses. Raises ValueError."""
        try:
            shape = cls.config_class(**config)
            if shape.n_layer > len(state):    # with a damaged number it would build blocks for hours
                raise ValueError(f"missing weights: n_layer is {shape.n_layer}, there are {len(state)} in all")
            with torch.device("meta"):        # no memory and no initialisation: the tensors come from `state`
                model = cls(shape)
        except (TypeError, OverflowError, RuntimeError) as error:      # the last two if sizes overflow
            raise ValueError(f"not a GPT-2 config ({str(error).splitlines()[0]})") from error
        if model.config.tie_word_embeddings:
            state = {**state, "lm_head.weight": state.get("transformer.wte.weight")}
        expected = model.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in expected or not isinstance(state.get(key), torch.Tensor):
                raise ValueError(f"{'unknown' if key not in expected else 'missing'} weight {key}")
            if state[key].shape != expected[key].shape:
                shapes = tuple(state[key].shape), tuple(expected[key].shape)
                raise ValueError(f"weight {key} has shape {shapes[0]}, expected {shapes[1]}")
            if not state[key].is_floating_point():
                raise ValueError(f"weight {key} holds {str(state[key].dtype)[6:]}, not floating-point numbers")
        model.load_state_dict(state, assign=True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def config_dict(self):
        """Return the config as a dict of plain values, for checkpoints."""
        return asdict(self.config)
