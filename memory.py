"""The largest micro-batch that fits, found by trying."""
import torch

from config import UserError
from plan import divisors

CPU_TOKENS = 4096      # tokens of a micro-batch where memory is not what limits it: more is not faster
CUDA_TOKENS = 65536    # the same on a card: 64 rows of 1024 already fill it with work


def find_micro_batch_size(raw, wanted, local_windows, runtime):
    """Rows per micro-batch: `wanted` if it fits, or for 0 the largest divisor of local_windows that does.

    On CUDA a size is tried with the raw model on the device: forward, backward and an optimizer step whose rate is
    zero. Every rank finds its own, the smallest counts. Raises UserError where nothing fits, or not `wanted`,
    naming the next smaller valid size.
    """
    most = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    sizes = [d for d in divisors(local_windows) if d == 1 or d * raw.config.block_size <= most]
    if runtime.device.type != "cuda":
        return wanted or sizes[0]
    if wanted:
        smaller = next((d for d in divisors(local_windows) if d <= wanted // 2), None)
        advice = f"use --micro_batch_size {smaller}, or 0" if smaller else "use --recompute or a smaller model"
        if runtime.minimum(fits(raw, wanted, runtime)) < 1:
            raise UserError(f"--micro_batch_size {wanted} does not fit into the memory of the card; {advice}")
        return wanted
    size = sizes[0]
    while not fits(raw, size, runtime):
        size = next((d for d in sizes if d <= size // 2), 0)
        if size == 0:
            break
    size = int(runtime.minimum(size))
    if size == 0:
        raise UserError("not one row fits into the card's memory; use --recompute, a smaller --block_size or model")
    return size


def fits(raw, size, runtime):
    """Whether a training step of `size` rows fits; leaves the weights as they are."""
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    x = torch.zeros(size, raw.config.block_size, dtype=torch.long, device=runtime.device)
    try:
        with runtime.autocast():
            loss = raw(x, x)
        loss.backward()
        optimizer.step()
        loss.item()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        raw.zero_grad(set_to_none=True)
        del optimizer, x
        loss = None
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
