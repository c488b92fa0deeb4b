"""What a training step keeps in memory, counted without running it: bytes per token and the micro-batch that fits.

    python -m bench.memory

Runs forward passes on fake tensors (shapes without data) under bf16 autocast and adds up what autograd keeps for the
backward pass, and the logits' gradient on top of it: the eager step; a compiled one keeps less. Writes
bench/results/memory.json and prints a table.
"""
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.common import machine, write_results
from config import flag, parse_config, run_script
from model import GPT, GPT2_SIZES, GPTConfig

CARDS_GB = {"16 GB": 16, "24 GB": 24, "40 GB": 40, "80 GB": 80, "141 GB": 141}
STATE_BYTES = 16        # per parameter: fp32 weight, gradient and AdamW's two moments
LOGIT_BYTES = 6         # per vocabulary row and token, as the backward pass begins: the logits' gradient, fp32 and bf16
RESERVED = 0.92         # of a card: the rest is CUDA's, fragments and the optimizer's temporary tensors


@dataclass(kw_only=True)
class MemoryConfig:
    """The flags of this benchmark."""
    block_size: int = flag(1024, "tokens of a row", low=1)


def main(argv=None):
    """Count for every size, and write the table."""
    config = parse_config(MemoryConfig, argv, __doc__.split("\n\n")[0])
    rows = []
    for name, shape in GPT2_SIZES.items():
        for recompute in (False, True):
            n_params, per_token = kept_bytes(shape, config.block_size, recompute)
            rows.append(dict(model=name, recompute=recompute, state_gb=STATE_BYTES * n_params / 1e9,
                             mb_per_token=per_token / 1e6, micro_batch={
                                 card: fitting_rows(gb, n_params, per_token, config.block_size)
                                 for card, gb in CARDS_GB.items()}))
    write_results("memory", dict(machine=machine(), block_size=config.block_size, rows=rows))
    print(table(rows))


def kept_bytes(shape, block_size, recompute):
    """(parameters, bytes that one token keeps for the backward pass) of a GPT-2 shape.

    Two rows less one row: what does not grow with the rows, autocast's copies of the weights, drops out.
    """
    with FakeTensorMode():
        model = GPT(GPTConfig(block_size=block_size, **shape)).train()
        model.recompute = recompute
        sizes = []
        for n_rows in (1, 2):
            kept = {}

            def keep(tensor, kept=kept):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage   # held, so that its id stays its own
                return tensor
            idx = torch.zeros(n_rows, block_size, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
                model(idx, idx)
            sizes.append(sum(storage.nbytes() for storage in kept.values()))
        return model.n_params(), (sizes[1] - sizes[0]) / block_size + LOGIT_BYTES * model.config.vocab_size


def fitting_rows(gb, n_params, per_token, block_size):
    """The rows that a card of so many GB holds beside the training state and autocast's weights, a power of two."""
    free = RESERVED * gb * 1e9 - (STATE_BYTES + 2) * n_params
    rows = int(free // (per_token * block_size)) if free > 0 else 0
    return 1 << rows.bit_length() - 1 if rows else 0


def table(rows):
    """The rows as Markdown."""
    lines = ["| model | recompute | state GB | MB per token | " + " | ".join(CARDS_GB) + " |",
             "|---|---|---|---|" + "---|" * len(CARDS_GB)]
    for r in rows:
        sizes = " | ".join(str(n or "-") for n in r["micro_batch"].values())
        recompute = "yes" if r["recompute"] else ""
        lines.append(f"| {r['model']} | {recompute} | {r['state_gb']:.1f} | {r['mb_per_token']:.2f} | {sizes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
