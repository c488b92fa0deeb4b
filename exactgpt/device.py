"""Detect the hardware and resolve "auto" for device, dtype, compile, attention and micro-batch size."""
import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from exactgpt.config import UserError, counted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Dense bf16 (fp16 before Ampere) peak in TFLOP/s, from the vendors' data sheets. The first key that occurs in the GPU's
# name as whole words wins, so longer keys come first. A GPU that is not listed gets no MFU rather than a wrong one.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A30": 165, "A10G": 70,
    "A10": 125, "RTX A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71,
    "RTX 3080": 60, "V100": 125, "T4": 65,
}


@dataclass(frozen=True)
class Hardware:
    """The facts about a device that the choices below depend on; tests make up their own."""
    type: str                              # "cuda", "mps" or "cpu"
    name: str = "CPU"
    capability: tuple = (0, 0)             # CUDA compute capability, (9, 0) for an H100
    cpu_bf16: bool = False                 # AVX512-bf16 or AMX

    def peak_flops(self):
        """Return the peak of dense 16-bit floating-point operations per second, or None if it is not known."""
        for name, tflops in PEAK_TFLOPS.items():
            if self.type == "cuda" and re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D)\b)", self.name):
                return tflops * 1e12
        return None


def choose_device(requested, local_rank=0, local_world_size=1):
    """Return the torch.device of this process. Raises UserError if this machine does not have it."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|mps)(:0)?|cuda(:\d|:[1-9]\d)?", requested):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, but is {requested!r}")
    device = torch.device(requested)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; use --device auto")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is None or local_world_size > 1:
            device = torch.device("cuda", local_rank)
        needed = max(local_world_size, device.index + 1)
        if needed > count:
            raise UserError(f"--device {requested} needs {needed} CUDA devices (processes: {local_world_size}), but "
                            f"torch sees {count} here; use --device auto or fewer processes, or check nvidia-smi")
    return device


def probe_hardware(device):
    """Return the Hardware of a torch.device."""
    if device.type == "cuda":
        return Hardware("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if device.type == "mps":
        return Hardware("mps", "Apple GPU")
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Hardware("cpu", cpu_name(), cpu_bf16=has_bf16)


def cpu_name():
    """Return the CPU's model name, from Linux if possible, else from Python."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def choose_dtype(requested, hardware):
    """Return the dtype of matrix products, "bf16", "fp16" or "fp32". Raises UserError if the hardware lacks it."""
    best = "bf16" if hardware.cpu_bf16 else "fp32"
    if hardware.type == "cuda":
        best = "bf16" if hardware.capability >= (8, 0) else "fp16"
    if requested == "auto":
        return best
    if requested == "bf16" and best == "fp16":
        raise UserError(f"--dtype bf16: {hardware.name} would only emulate it; use --dtype fp16 or auto")
    if requested == "fp16" and hardware.type == "mps":
        raise UserError("--dtype fp16 is not supported on mps; use fp32 (auto) or bf16")
    return requested


def choose_compile(requested, hardware, device):
    """Return (True to use torch.compile, a notice or None). Raises UserError if "on" is requested but fails here."""
    if requested == "off" or (requested == "auto" and hardware.type != "cuda"):
        return False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x * 2 + 1).sum())(torch.ones(8, device=device))      # compiles at the first call
        return True, None
    except Exception as error:  # no compiler, no Triton, an old GPU, a broken cache folder: torch raises many kinds
        problem = " ".join(str(error).split())[:160] or type(error).__name__
        if requested == "on":
            raise UserError(f"--compile on: torch.compile does not work here ({problem}); install a C compiler, or use "
                            "--compile off") from error
        return False, f"torch.compile is off: it does not work here ({problem})"


def enable_attention(backend):
    """Let scaled_dot_product_attention use only the given backend, or any of them ("auto")."""
    for name in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(backend in ("auto", name.removeprefix("mem_")))


def attention_without_cudnn():
    """Return a context for attention of varying shapes that avoids cuDNN, which plans for 30 ms at each new shape."""
    # torch prefers cuDNN on Hopper. Flash attention is used if --attention allows it, but on CUDA it takes no masks, so
    # the other two are always enabled.
    flash = [SDPBackend.FLASH_ATTENTION] * torch.backends.cuda.flash_sdp_enabled()
    return sdpa_kernel([*flash, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention_backend(requested, device, dtype, shape):
    """Enable an attention backend; return the one that torch picks for a shape (a GPTConfig). Raises UserError."""
    enable_attention(requested)
    if device.type == "mps":
        if requested not in ("auto", "math"):
            raise UserError(f"--attention {requested}: mps has no such backend; use auto or math")
        return "mps"
    head_size = shape.n_embd // shape.n_head
    q = torch.zeros(1, shape.n_head, shape.block_size, head_size, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns for each backend that it cannot use
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
    except RuntimeError as error:
        enable_attention("auto")
        raise UserError(f"--attention {requested}: {device.type} has no such backend for {str(dtype)[6:]} and heads of "
                        f"{head_size}; use --attention auto") from error
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(choice, "unknown")


def set_deterministic():
    """Use deterministic algorithms everywhere: slower, but bitwise repeatable on the same kind of GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    import torch._inductor.config as inductor
    inductor.deterministic = True


def keep_freed_memory(device, keep=True):
    """Make the C library keep freed CPU memory for reuse, or not (glibc only)."""
    # By default large blocks go back to the OS, and the next step faults them in again page by page: a fifth of a
    # training step, and on some virtual machines nine tenths of the time to generate a token. But while shapes vary, a
    # block freed by one does not fit the next: a full HellaSwag evaluation would leave 39 GB of holes.
    mmap_max, mmap_threshold, top_pad, trim_threshold = -4, -3, -2, -1       # mallopt's options, from glibc's malloc.h
    options = ({mmap_max: 0, trim_threshold: -1, top_pad: 64 * 2**20} if keep else
               {mmap_max: 65536, mmap_threshold: 32 * 2**20})
    if device.type == "cpu" and sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):      # another C library
            for option, value in options.items():
                ctypes.CDLL(None).mallopt(option, value)


# ---- the largest micro-batch that fits, found by trial steps -----------------

CPU_TOKENS = 4096      # most tokens in a micro-batch on a CPU: memory allows more, but it is not faster
CUDA_TOKENS = 65536    # the same on a GPU: 64 rows of 1024 already keep it busy
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")    # the last: cuBLAS, cuDNN
ADVICE_FOR_LESS_MEMORY = "use a smaller --block_size or model (train.py also has --recompute)"


class CompilationFailed(Exception):
    """torch.compile could not compile the model; the message is one line. Raised on every rank."""


def divisors(n):
    """Return the divisors of n, largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def check_micro_batch_size(micro_batch_size, local_windows):
    """Raise UserError unless the micro-batch size divides a rank's rows per step."""
    if local_windows % micro_batch_size:
        valid = ", ".join(map(str, divisors(local_windows)[:12]))
        raise UserError(f"--micro_batch_size {micro_batch_size} does not divide the {counted(local_windows, 'row')} "
                        f"that a process has per step (total_batch_size / block_size / processes); use one of {valid}, "
                        "or 0")


def dummy_rows(size, block_size, device):
    """Return a batch (x, y) of zeros, (B, T) each, with the strides of training: two views of rows of T + 1 tokens."""
    # Compiled code is specialised to the strides: after a trial with others, training would compile again.
    rows = torch.zeros(size, block_size + 1, dtype=torch.long, device=device)
    return rows[:, :-1], rows[:, 1:]


def find_micro_batch_size(module, block_size, wanted, local_windows, runtime, insist=True, compiled=False):
    """Return the rows per micro-batch: `wanted` (0: the maximum) if it fits, else the first divisor found by halving.

    module(x, y) returns a loss; compiled: it has been given to torch.compile. Raises UserError if nothing fits, or with
    `insist` if `wanted` does not, naming the next smaller valid size; CompilationFailed.
    """
    # Candidates are the divisors of local_windows of at most CUDA_TOKENS tokens (CPU_TOKENS on a CPU, where only
    # compiled code is tried). A trial uses the module as it will train: compiled, in DDP, on its device. All ranks try
    # the same sizes, and a size fits if it fits on all.
    most = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    sizes = [d for d in divisors(local_windows) if d == 1 or d * block_size <= most]
    size = wanted or sizes[0]
    if runtime.device.type != "cuda" and not compiled:
        return size
    while size:
        trial = functools.partial(fits_in_memory, module, block_size, size, runtime)
        fits = check_compilation(trial, runtime) if compiled else trial()
        if not runtime.sum(not fits)[0]:
            return size
        if wanted and insist:
            smaller = next((d for d in divisors(local_windows) if d < wanted), None)
            advice = f"use --micro_batch_size {smaller}, or 0" if smaller else ADVICE_FOR_LESS_MEMORY
            raise UserError(f"--micro_batch_size {wanted} does not fit in the GPU's memory; {advice}")
        size = next((d for d in sizes if d <= size // 2), 0)
    raise UserError(f"not even one row fits in the GPU's memory; {ADVICE_FOR_LESS_MEMORY}")


def check_compilation(action, runtime):
    """Return action(), which makes torch.compile compile. Raises CompilationFailed on all ranks if it fails on one."""
    # Every rank comes to the sum, since `action` has no collectives. torch raises many kinds of error, in forward and
    # in backward: no compiler, a fault in it, a full cache folder. If compilation is not the cause, eager code fails
    # with the same error, and not in one line.
    result, problem = None, ""
    try:
        result = action()
    except Exception as error:
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    if runtime.sum(bool(problem))[0]:
        raise CompilationFailed(problem or "on another rank")
    return result


def fits_in_memory(module, block_size, size, runtime):
    """Return True if training on micro-batches of `size` rows fits in memory; leave the weights unchanged."""
    # The trial reaches a real step's peak: AdamW's state, two micro-batches, the second adding to the first's
    # gradients, DDP's buckets next to those (no_sync reduces nothing, so no rank waits for one that ran out of memory),
    # and an update with learning rate 0.
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = loss = None
    try:
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()                   # allocates its state, which a resumed run has from the start
        optimizer.zero_grad(set_to_none=True)
        with module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
            for _ in range(2):
                x, y = dummy_rows(size, block_size, runtime.device)
                with runtime.autocast():
                    loss = 0.0 * module(x, y)      # zero gradients, because those of a summed loss would overflow fp16
                loss.backward()
        optimizer.step()
        loss.item()
        return True
    except RuntimeError as error:          # the base of torch.OutOfMemoryError; cuBLAS and cuDNN raise others
        if not is_out_of_memory(error):
            raise
        torch._dynamo.reset()              # drop the code for this size: torch gives up after eight sizes
        return False
    finally:
        module.zero_grad(set_to_none=True)
        del optimizer, loss
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error):
    """Return True if the error, or one that it wraps as the compiler's do, says that memory is full."""
    text = f"{type(error).__name__}: {error}"        # the compiler quotes the error that it wraps in this form
    return any(phrase in text for phrase in OUT_OF_MEMORY)
