"""The largest micro-batch that fits, found by trying what training runs."""
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from exactgpt.config import UserError
from exactgpt.plan import divisors

CPU_TOKENS = 4096      # tokens of a micro-batch where memory is not what limits it: more is not faster
CUDA_TOKENS = 65536    # the same on a card: 64 rows of 1024 already fill it with work
FULL = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")      # as CUDA, Triton; cuBLAS; cuDNN say it
SMALLER = "use a smaller --block_size or model (train.py also has --recompute)"


class CompilationFailed(Exception):
    """torch.compile could not compile the model; the message is one line. Raised on every rank."""


def dummy_rows(size, block_size, device):
    """A batch (x, y) of zeros, (size, T) each, laid out as training's are: two views of rows of T + 1 tokens.

    Compiled code is made for one layout; a batch laid out otherwise would be compiled for itself, and then once more.
    """
    rows = torch.zeros(size, block_size + 1, dtype=torch.long, device=device)
    return rows[:, :-1], rows[:, 1:]


def least_bytes(model, n_tokens):
    """A bound on the memory of a GPT's training step with micro-batches of n_tokens: what no step does without.

    A parameter's weight, gradient and two moments in fp32; for a token its logits in 16 bits, and of each layer, in
    units of C, two normalised inputs in fp32 (8 bytes), what the LayerNorms give (4), queries, keys, values and what
    attention gives (8), the MLP's hidden units before the GELU (8) and after it (8); with --recompute the block's
    input alone. Within a percent it is what the compiled step keeps (bench.memory counts that).
    """
    c = model.config
    layer = 4 if model.recompute else 36 if "gelu" in c.activation else 28
    return 16 * model.n_params() + n_tokens * (2 * c.vocab_size + layer * c.n_layer * c.n_embd)


def find_micro_batch_size(module, block_size, wanted, local_windows, runtime, insist=True, gpt=None):
    """Rows per micro-batch: `wanted` if it fits, else the first smaller divisor of local_windows that does, halving.

    Of the divisors those count that make up at most CUDA_TOKENS, on a CPU CPU_TOKENS; there that is all. On CUDA a
    size is tried with the module itself, as it will train: compiled, in DDP, on its device; module(x, y) is a loss. The
    ranks try the same sizes, and one fits where it fits on all. gpt: the GPT inside, if all of it is trained: then a
    size that its least_bytes rule out costs no try, which may be minutes of compilation. Raises UserError where nothing
    fits, and with `insist` where `wanted` does not, naming the next smaller valid size; CompilationFailed.
    """
    most = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    sizes = [d for d in divisors(local_windows) if d == 1 or d * block_size <= most]
    if runtime.device.type != "cuda":
        return wanted or sizes[0]
    card = runtime.minimum(torch.cuda.mem_get_info(runtime.device)[1]) if gpt else 0
    size = wanted or sizes[0]
    while size and ((gpt and least_bytes(gpt, size * block_size) > card)
                    or not fits_everywhere(module, block_size, size, runtime)):
        if wanted and insist:
            smaller = next((d for d in divisors(local_windows) if d < wanted), None)
            advice = f"use --micro_batch_size {smaller}, or 0" if smaller else SMALLER
            raise UserError(f"--micro_batch_size {wanted} does not fit into the memory of the card; {advice}")
        size = next((d for d in sizes if d <= size // 2), 0)
    if size == 0:
        raise UserError(f"not one row fits into the card's memory; {SMALLER}")
    return size


def fits_everywhere(module, block_size, size, runtime):
    """Whether `size` rows fit on every rank. Raises CompilationFailed on every rank if the model compiles not on all.

    An answer costs one collective, which every rank reaches however its own try ended.
    """
    problem = "on another rank"
    try:
        answer = int(fits(module, block_size, size, runtime))
    except torch._dynamo.exc.TorchDynamoException as error:
        answer, problem = -1, " ".join(str(error).split())[:160]
    answer = runtime.minimum(answer)
    if answer < 0:
        raise CompilationFailed(problem)
    return answer > 0


def fits(module, block_size, size, runtime):
    """Whether training on micro-batches of `size` rows fits; leaves the weights as they are.

    The most that a step holds at once is held here: AdamW's state, two micro-batches, the second of which adds to the
    gradients of the first, DDP's buckets beside those (no_sync: then nothing is reduced, and no rank waits for another
    that has run out of memory), and an update, whose rate is zero.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = loss = None
    try:
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()                   # makes its state, as a resumed run has it from the start
        optimizer.zero_grad(set_to_none=True)
        with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
            for _ in range(2):
                x, y = dummy_rows(size, block_size, runtime.device)
                with runtime.autocast():
                    loss = 0.0 * module(x, y)      # zero gradients: those of a sum overflow fp16
                loss.backward()
        optimizer.step()
        loss.item()
        return True
    except RuntimeError as error:          # torch.OutOfMemoryError is one; cuBLAS and cuDNN have others
        if not out_of_memory(error):
            raise
        torch._dynamo.reset()              # what was compiled for this size; after eight sizes torch would give up
        return False
    finally:
        module.zero_grad(set_to_none=True)
        del optimizer, loss
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def out_of_memory(error):
    """Whether an error says that memory is full, or wraps one that does, as the compiler's do."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False
