"""Count the peak memory of a micro-batch's forward and backward pass, and how many rows fit on a GPU.

    python -m bench.memory                                     # ten minutes; needs no GPU
    python -m bench.memory --model gpt2 --model gpt2-medium

The step runs on FakeTensors (shapes without data) under bf16 autocast with cuDNN attention, and every storage is
counted when it is allocated and freed. It runs eagerly, and compiled: as the program that torch.compile makes for a
GPU (bench/fake_cuda.py), which is what train.py runs. Not counted is the memory of cuBLAS and cuDNN and what the
allocator loses to rounding. With all models (the default) it writes bench/results/memory.json.
"""
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import describe_machine, write_results
from bench.fake_cuda import compile_for_gpu, fake_gpu
from exactgpt.config import UserError, flag, parse_config, run_script
from model import GPT, GPT2_SIZES, GPTConfig

GPUS_GB = {"16 GB": 16, "24 GB": 24, "40 GB": 40, "80 GB": 80, "141 GB": 141}
STATE_BYTES = 16        # per parameter: fp32 weight, gradient and AdamW's two moments
BUCKET_BYTES = 4        # per parameter, with several processes: DDP's buckets, besides the gradients
USABLE = 0.92           # share of the GPU's memory; CUDA, fragments and the optimizer's temporary tensors take the rest
ROWS = 13               # rows of the counted step: a prime that divides no width, so a storage whose size it divides
                        # must be proportional to the rows
MANY_ROWS = 1 << 20


@dataclass(kw_only=True)
class MemoryConfig:
    """The flags of this benchmark."""
    model: list[str] = flag(list(GPT2_SIZES), "GPT-2 size to count; may be given several times",
                            choices=tuple(GPT2_SIZES), repeat=True)
    block_size: int = flag(1024, "tokens per row", low=1)

    def check(self):
        """Raise UserError if --block_size is a multiple of ROWS, which would hide what grows with the rows."""
        if self.block_size % ROWS == 0:
            raise UserError(f"--block_size must not be a multiple of {ROWS}, but is {self.block_size}")


def main(argv=None):
    """Count the memory of every size and print the table."""
    config = parse_config(MemoryConfig, argv, __doc__.split("\n\n")[0])
    rows = [count_memory(name, GPT2_SIZES[name], config.block_size, recompute, compiled)
            for name in config.model for recompute in (False, True) for compiled in (False, True)]
    if set(config.model) == set(GPT2_SIZES):
        write_results("memory", dict(machine=describe_machine(), block_size=config.block_size, rows=rows))
    print(markdown_table(rows))


def count_memory(name, shape, block_size, recompute, compiled):
    """Return a row of the table (a dict): a model's peak memory and the micro-batch sizes that fit on each GPU."""
    n_params, counter = count_step(shape, block_size, recompute, compiled)
    at_peak = counter.peak(MANY_ROWS)
    return dict(
        model=name, recompute=recompute, compiled=compiled, state_gb=STATE_BYTES * n_params / 1e9,
        mb_per_token=at_peak.per_row / block_size / 1e6, fixed_gb=at_peak.fixed / 1e9,
        least_gb=counter.peak(0).fixed / 1e9,
        micro_batch={gpu: max_rows(gb, n_params * STATE_BYTES, counter) for gpu, gb in GPUS_GB.items()},
        micro_batch_ddp={gpu: max_rows(gb, n_params * (STATE_BYTES + BUCKET_BYTES), counter)
                         for gpu, gb in GPUS_GB.items()})


@dataclass(frozen=True)
class Bytes:
    """An amount of memory: a fixed part and a part per row."""
    fixed: int = 0
    per_row: int = 0

    def __add__(self, other):
        return Bytes(self.fixed + other.fixed, self.per_row + other.per_row)

    def __sub__(self, other):
        return Bytes(self.fixed - other.fixed, self.per_row - other.per_row)

    def total(self, rows):
        """Return the bytes for a number of rows."""
        return self.fixed + rows * self.per_row


class MemoryCounter(TorchDispatchMode):
    """A context that records the memory in use after each allocation, not counting what was allocated before it."""

    def __init__(self):
        super().__init__()
        self.now, self.storages, self.history = Bytes(), set(), [Bytes()]

    @classmethod
    def is_infra_mode(cls):
        """Return True: compiled code runs under such modes only."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor)._cdata not in given:
                self._add(_storage(tensor))
        return result

    def _add(self, storage):
        key, n = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        size = Bytes(n, 0) if n % ROWS else Bytes(0, n // ROWS)
        self.storages.add(key)
        self.now += size
        self.history.append(self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.storages.remove(key)
        self.now -= size

    def peak(self, rows):
        """Return the Bytes in use at the moment when a micro-batch of that many rows needs the most memory."""
        return max(self.history, key=lambda in_use: in_use.total(rows))


def _storage(tensor):
    return tensor.untyped_storage()


def count_step(shape, block_size, recompute, compiled):
    """Run two micro-batches of a GPT-2 shape; return (number of parameters, MemoryCounter of the second one).

    The second one adds its gradients to those of the first, as in gradient accumulation.
    """
    torch.compiler.reset()
    with fake_gpu(), FakeTensorMode():
        model = GPT(GPTConfig(block_size=block_size, **shape)).train()
        model.recompute = recompute
        forward = compile_for_gpu(model) if compiled else model
        tokens = torch.zeros(ROWS, block_size + 1, dtype=torch.long)
        counter = MemoryCounter()
        for context in (nullcontext(), counter):
            with context:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
    return model.n_params(), counter


def max_rows(gb, state_bytes, counter):
    """Return the largest power of two of rows that fit on a GPU of `gb` GB besides the training state, or 0."""
    free, rows = USABLE * gb * 1e9 - state_bytes, 0
    while counter.peak(2 * rows or 1).total(2 * rows or 1) <= free:
        rows = 2 * rows or 1
    return rows


def markdown_table(rows):
    """Return the rows as a Markdown table. In brackets: what fits with several processes, if that is less.

    "at least": with few rows the peak is not at the loss but later, at the gradients.
    """
    titles = ["model", "recompute", "step", "state GB", "MB per token", "+ GB", "at least GB", *GPUS_GB]
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
