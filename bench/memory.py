"""What a micro-batch's forward and backward hold in memory at their peak, and the rows that therefore fit on a card.

    python -m bench.memory                                     # ten minutes; no card
    python -m bench.memory --model gpt2 --model gpt2-medium

The step runs on FakeTensors (shapes without data), under bf16 autocast and with cuDNN's attention, while its storages
are counted as they come and go: once as Python runs the model (eager), once as the program that torch.compile makes
for a card (compiled; bench/fake_cuda.py), which is what train.py runs. What libraries take for themselves is not
counted: cuBLAS, cuDNN, the allocator's rounding. Given all models, it writes bench/results/memory.json.
"""
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import machine, write_results
from bench.fake_cuda import compile_for_card, pretend_card
from exactgpt.config import UserError, flag, parse_config, run_script
from model import GPT, GPT2_SIZES, GPTConfig

CARDS_GB = {"16 GB": 16, "24 GB": 24, "40 GB": 40, "80 GB": 80, "141 GB": 141}
STATE_BYTES = 16        # per parameter: fp32 weight, gradient and AdamW's two moments
BUCKET_BYTES = 4        # per parameter, where there are several processes: DDP's buckets beside the gradients
RESERVED = 0.92         # of a card: the rest is CUDA's, fragments and the optimizer's temporary tensors
ROWS = 13               # a prime that no width of a model has: what it divides grows with the rows
MANY_ROWS = 1 << 20


@dataclass(kw_only=True)
class MemoryConfig:
    """The flags of this benchmark."""
    model: list[str] = flag(list(GPT2_SIZES), "a GPT-2 size; may be repeated", choices=tuple(GPT2_SIZES), repeat=True)
    block_size: int = flag(1024, "tokens of a row", low=1)

    def check(self):
        """Tell sizes that grow with the rows from those that do not."""
        if self.block_size % ROWS == 0:
            raise UserError(f"--block_size must not be a multiple of {ROWS}, but is {self.block_size}")


def main(argv=None):
    """Count for every size, and write the table."""
    config = parse_config(MemoryConfig, argv, __doc__.split("\n\n")[0])
    rows = [count(name, GPT2_SIZES[name], config.block_size, recompute, compiled)
            for name in config.model for recompute in (False, True) for compiled in (False, True)]
    if set(config.model) == set(GPT2_SIZES):
        write_results("memory", dict(machine=machine(), block_size=config.block_size, rows=rows))
    print(table(rows))


def count(name, shape, block_size, recompute, compiled):
    """A row of the table: a model's peak, and the micro-batches that fit on the cards."""
    n_params, step = run_step(shape, block_size, recompute, compiled)
    at_peak = step.peak(MANY_ROWS)
    return dict(
        model=name, recompute=recompute, compiled=compiled, state_gb=STATE_BYTES * n_params / 1e9,
        mb_per_token=at_peak.per_row / block_size / 1e6, fixed_gb=at_peak.fixed / 1e9,
        least_gb=step.peak(0).fixed / 1e9,
        micro_batch={card: fitting_rows(gb, n_params * STATE_BYTES, step) for card, gb in CARDS_GB.items()},
        micro_batch_ddp={card: fitting_rows(gb, n_params * (STATE_BYTES + BUCKET_BYTES), step)
                         for card, gb in CARDS_GB.items()})


@dataclass(frozen=True)
class Bytes:
    """An amount of memory: some of it is there whatever the rows."""
    fixed: int = 0
    per_row: int = 0

    def __add__(self, other):
        return Bytes(self.fixed + other.fixed, self.per_row + other.per_row)

    def __sub__(self, other):
        return Bytes(self.fixed - other.fixed, self.per_row - other.per_row)

    def of(self, rows):
        """The bytes of so many rows."""
        return self.fixed + rows * self.per_row


class Held(TorchDispatchMode):
    """A context that notes how much memory is held after each new storage, less what was there before it."""

    def __init__(self):
        super().__init__()
        self.now, self.storages, self.history = Bytes(), set(), [Bytes()]

    @classmethod
    def is_infra_mode(cls):
        """Compiled code runs in such modes only."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor)._cdata not in given:
                self._hold(_storage(tensor))
        return result

    def _hold(self, storage):
        key, n = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        size = Bytes(n, 0) if n % ROWS else Bytes(0, n // ROWS)
        self.storages.add(key)
        self.now += size
        self.history.append(self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.storages.remove(key)
        self.now -= size

    def peak(self, rows):
        """The Bytes held at the moment when a micro-batch of so many rows holds most."""
        return max(self.history, key=lambda held: held.of(rows))


def _storage(tensor):
    return tensor.untyped_storage()


def run_step(shape, block_size, recompute, compiled):
    """(parameters, Held) of a GPT-2 shape's second micro-batch, which adds to the gradients of the first."""
    torch.compiler.reset()
    with pretend_card(), FakeTensorMode():
        model = GPT(GPTConfig(block_size=block_size, **shape)).train()
        model.recompute = recompute
        forward = compile_for_card(model) if compiled else model
        tokens = torch.zeros(ROWS, block_size + 1, dtype=torch.long)
        held = Held()
        for noting in (nullcontext(), held):
            with noting:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
    return model.n_params(), held


def fitting_rows(gb, state_bytes, step):
    """The rows, a power of two, that a card of so many GB holds beside the training state; 0: none."""
    free, rows = RESERVED * gb * 1e9 - state_bytes, 0
    while step.peak(2 * rows or 1).of(2 * rows or 1) <= free:
        rows = 2 * rows or 1
    return rows


def table(rows):
    """The rows as Markdown; in brackets what fits with several processes, where that is less.

    With few rows the peak is not that of the loss but a later one, of the gradients: "at least".
    """
    titles = ["model", "recompute", "step", "state GB", "MB per token", "+ GB", "at least GB", *CARDS_GB]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in rows:
        fits = [str(n or "-") + (f" ({m or '-'})" if m < n else "")
                for n, m in zip(r["micro_batch"].values(), r["micro_batch_ddp"].values())]
        lines.append(f"| {r['model']} | {'yes' if r['recompute'] else ''} | {'compiled' if r['compiled'] else 'eager'} "
                     f"| {r['state_gb']:.1f} | {r['mb_per_token']:.3f} | {r['fixed_gb']:.2f} | {r['least_gb']:.2f} "
                     f"| {' | '.join(fits)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
