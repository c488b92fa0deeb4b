"""The largest micro-batch that fits, found by trying."""
import torch

from config import UserError
from plan import divisors

CPU_TOKENS = 4096      # tokens of a micro-batch where memory is not what limits it: more is not faster
CUDA_TOKENS = 65536    # the same on a card: 64 rows of 1024 already fill it with work
SMALLER = "use a smaller --block_size or model (train.py also has --recompute)"


def find_micro_batch_size(module, block_size, wanted, local_windows, runtime, insist=True):
    """Rows per micro-batch: `wanted` if it fits, else the first smaller divisor of local_windows that does, halving.

    Of the divisors those count that make up at most CUDA_TOKENS, on a CPU CPU_TOKENS; there that is all. On CUDA a
    size is tried with the module, module(x, x) being a loss, on the device: forward, backward and an optimizer step
    whose rate is zero. Every rank finds its own, the smallest counts. Raises UserError where nothing fits, and with
    `insist` where `wanted` does not, naming the next smaller valid size.
    """
    most = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    sizes = [d for d in divisors(local_windows) if d == 1 or d * block_size <= most]
    if runtime.device.type != "cuda":
        return wanted or sizes[0]
    if wanted and runtime.minimum(fits(module, block_size, wanted, runtime)):
        return wanted
    if wanted and insist:
        smaller = next((d for d in divisors(local_windows) if d < wanted), None)
        advice = f"use --micro_batch_size {smaller}, or 0" if smaller else SMALLER
        raise UserError(f"--micro_batch_size {wanted} does not fit into the memory of the card; {advice}")
    size = next((d for d in sizes if d < wanted), 0) if wanted else sizes[0]
    while size and not fits(module, block_size, size, runtime):
        size = next((d for d in sizes if d <= size // 2), 0)
    size = int(runtime.minimum(size))
    if size == 0:
        raise UserError(f"not one row fits into the card's memory; {SMALLER}")
    return size


def fits(module, block_size, size, runtime):
    """Whether a training step of `size` rows fits; leaves the weights as they are."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    x = torch.zeros(size, block_size, dtype=torch.long, device=runtime.device)
    try:
        with runtime.autocast():
            loss = 0.0 * module(x, x)      # zero gradients: those of a sum overflow fp16
        loss.backward()
        optimizer.step()
        loss.item()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        module.zero_grad(set_to_none=True)
        del optimizer, x
        loss = None
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
