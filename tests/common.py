"""What the tests share beside the fixtures of conftest.py: places, environments, references in plain Python."""
import ast
import hashlib
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
# The product's files, {name of the module: its syntax tree}: what people type, the model, the package.
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
         for path in [*ROOT.glob("*.py"), *ROOT.glob("exactgpt/[a-z]*.py")]}


def script_env(home, more=None):
    """The environment of a script under test: an empty HOME, this repository's modules, nothing of torchrun's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}


def brute_force_order(sizes, block_size, seed, n_positions):
    """The window numbers at global positions 0..n_positions - 1, by the words of DESIGN.md ("Data order") alone.

    sizes: tokens of the train shards in file order.
    """
    def permuted(items, *key):
        key = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")
        raw = np.random.Philox(key=key).random_raw(len(items)).tolist()
        return [item for _, _, item in sorted((r, i, item) for i, (r, item) in enumerate(zip(raw, items)))]
    owner = [shard for shard, n in enumerate(sizes) for _ in range(n)]           # of each token
    windows = range((sum(sizes) - 1) // block_size)
    order, epoch = [], 0
    while len(order) < n_positions:
        for shard in permuted(range(len(sizes)), seed, epoch):
            order += permuted([k for k in windows if owner[k * block_size] == shard], seed, epoch, shard)
        epoch += 1
    return order[:n_positions]


def in_our_layout(theirs, name, tensor):
    """A tensor shaped like parameter `name` of a transformers model, as nn.Linear stores it: Conv1D's transposed."""
    from transformers.pytorch_utils import Conv1D
    is_conv = isinstance(theirs.get_submodule(name.rpartition(".")[0]), Conv1D)
    return tensor.t() if is_conv and tensor.dim() == 2 else tensor


def as_ours(theirs, activation="gelu_tanh"):
    """A GPT of ours in eval mode with the weights of a GPT2LMHeadModel, copied without hf_format."""
    import torch

    from model import GPT, GPTConfig
    c = theirs.config
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, activation=activation,
                          tie_word_embeddings=c.tie_word_embeddings, layer_norm_eps=c.layer_norm_epsilon))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(in_our_layout(theirs, name, theirs.get_parameter(name)))
    return model.eval()


def write_model(model, folder, tokenizer=None):
    """Write a GPT as a folder in Hugging Face format."""
    from exactgpt.open_model import write_pretrained
    write_pretrained(folder, model.config_dict(), model.state_dict(), tokenizer)


def imports(nodes):
    """The modules that some nodes of a syntax tree import: ours by their full name, others' by their first word."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name if alias.name in TREES else alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module == "exactgpt":
                yield from (f"exactgpt.{alias.name}" for alias in node.names)
            else:
                yield node.module if node.module in TREES else node.module.split(".")[0]
