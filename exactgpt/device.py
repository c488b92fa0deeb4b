"""What the hardware can do, and what "auto" therefore means for device, dtype, compile and attention."""
import contextlib
import ctypes
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from exactgpt.config import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Dense bf16 (fp16 before Ampere) peak in TFLOP/s, from the vendors' data sheets. The first name that stands
# in the card's name as whole words counts, so longer names stand first. A card that is not here has no MFU rather
# than a wrong one.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A30": 165, "A10G": 70,
    "A10": 125, "RTX A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71,
    "RTX 3080": 60, "V100": 125, "T4": 65,
}


@dataclass(frozen=True)
class Hardware:
    """The facts that the policies below decide on; tests write their own."""
    type: str                              # "cuda", "mps" or "cpu"
    name: str = "CPU"
    capability: tuple = (0, 0)             # CUDA compute capability, (9, 0) for an H100
    cpu_bf16: bool = False                 # AVX512-bf16 or AMX

    def peak_flops(self):
        """Dense 16-bit floating-point operations per second, or None for a card we do not know."""
        if self.type != "cuda":
            return None
        known = [tflops for name, tflops in PEAK_TFLOPS.items()
                 if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D)\b)", self.name)]
        return known[0] * 1e12 if known else None


def choose_device(requested, local_rank=0, local_world_size=1):
    """The torch.device of this process. Raises UserError for one that this machine lacks."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, but is {requested!r}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, but is {requested!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; use --device auto")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError("--device cuda: torch sees no CUDA device here; use --device auto, or check nvidia-smi")
        if local_world_size > count:
            raise UserError(f"{local_world_size} processes but {count} CUDA device{'s' * (count > 1)} on this machine; "
                            f"use --nproc_per_node={count}")
        if device.index is None or local_world_size > 1:
            device = torch.device("cuda", local_rank)
        if device.index >= count:
            raise UserError(f"--device {requested}: this machine has the CUDA devices 0 to {count - 1}")
    return device


def probe(device):
    """The Hardware behind a torch.device."""
    if device.type == "cuda":
        return Hardware("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if device.type == "mps":
        return Hardware("mps", "Apple GPU")
    has_bf16 = [getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile")]
    return Hardware("cpu", cpu_name(), cpu_bf16=any(has_bf16))


def cpu_name():
    """The model of the CPU, as Linux or else Python has it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def choose_dtype(requested, hardware):
    """The dtype name ("bf16", "fp16", "fp32") of matrix products. Raises UserError for what the hardware lacks."""
    bf16_card = hardware.type == "cuda" and hardware.capability >= (8, 0)
    if requested == "auto":
        if hardware.type == "cuda":
            return "bf16" if bf16_card else "fp16"
        return "bf16" if hardware.type == "cpu" and hardware.cpu_bf16 else "fp32"
    if requested == "bf16" and hardware.type == "cuda" and not bf16_card:
        raise UserError(f"--dtype bf16: {hardware.name} would only emulate it; use --dtype fp16 or auto")
    if requested == "fp16" and hardware.type == "mps":
        raise UserError("--dtype fp16 is not supported on mps; use fp32 (auto) or bf16")
    return requested


def choose_compile(requested, hardware, device):
    """(whether to torch.compile, a line of notice or None). Raises UserError where "on" cannot be had."""
    if requested == "off" or (requested == "auto" and hardware.type != "cuda"):
        return False, None
    if requested == "auto" and hardware.capability < (7, 0):
        return False, f"torch.compile is off: {hardware.name} is older than compute capability 7.0, which Triton needs"
    problem = compile_problem(device)
    if problem is None:
        return True, None
    if requested == "on":
        raise UserError(f"--compile on: a compiled function does not run here ({problem}); install a C compiler, or "
                        "use --compile off")
    return False, f"torch.compile is off: a compiled function does not run here ({problem})"


def compile_problem(device):
    """None if a compiled function runs on the device, else one line that says why not (it fails at the first call)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(_probe_function)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, a broken cache folder: any of torch's many errors
        return " ".join(str(error).split())[:160] or type(error).__name__
    return None


def _probe_function(x):
    return (x * 2 + 1).sum()


def enable_attention(backend):
    """Let scaled_dot_product_attention use one backend alone, or any ("auto")."""
    switches = dict(flash=torch.backends.cuda.enable_flash_sdp, cudnn=torch.backends.cuda.enable_cudnn_sdp,
                    efficient=torch.backends.cuda.enable_mem_efficient_sdp, math=torch.backends.cuda.enable_math_sdp)
    for name, switch in switches.items():
        switch(backend in ("auto", name))


def unplanned_attention():
    """A context for attention of ever new shapes, without cuDNN's backend, which plans for 30 ms at each of them.

    torch prefers cuDNN's on Hopper. The flash backend counts where --attention lets it; it takes no masks on a card, so
    the other two are always there.
    """
    flash = [SDPBackend.FLASH_ATTENTION] * torch.backends.cuda.flash_sdp_enabled()
    return sdpa_kernel([*flash, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention_backend(requested, device, dtype, shape):
    """The backend that attention of a model's shape (a GPTConfig) runs on, once only what was requested is enabled.

    Raises UserError for a backend that this device lacks.
    """
    enable_attention(requested)
    if device.type == "mps":
        if requested not in ("auto", "math"):
            raise UserError(f"--attention {requested}: mps has no such backend; use auto or math")
        return "mps"
    head_size = shape.n_embd // shape.n_head
    q = torch.zeros(1, shape.n_head, shape.block_size, head_size, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of each reason against each backend
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
    except RuntimeError as error:
        enable_attention("auto")
        raise UserError(f"--attention {requested}: {device.type} has no such backend for {str(dtype)[6:]} and heads of "
                        f"{head_size}; use --attention auto") from error
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(choice, "unknown")


def set_deterministic():
    """Deterministic algorithms everywhere: slower, and bitwise repeatable on one kind of GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    import torch._inductor.config as inductor
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def keep_freed_memory(device):
    """Have the C library keep what is freed on a CPU, where it has this setting (glibc): for work of equal shapes.

    By default large blocks go back to the system, and the next step's tensors fault them in again page by page: a
    fifth of a training step, and on some virtual machines nine tenths of writing a token.
    """
    _malloc_options(device, M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1, M_TOP_PAD=64 * 2**20)


@contextlib.contextmanager
def returning_freed_memory(device):
    """Around work of ever other shapes in a process that keeps freed memory: give large blocks back meanwhile.

    What one shape has freed does not fit the next: all of HellaSwag would leave 39 GB of holes.
    """
    _malloc_options(device, M_MMAP_MAX=65536, M_MMAP_THRESHOLD=32 * 2**20)
    try:
        yield
    finally:
        keep_freed_memory(device)


def _malloc_options(device, **options):
    numbers = dict(M_TRIM_THRESHOLD=-1, M_TOP_PAD=-2, M_MMAP_THRESHOLD=-3, M_MMAP_MAX=-4)    # of glibc's malloc.h
    if device.type == "cpu" and sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):      # another C library
            for name, value in options.items():
                ctypes.CDLL(None).mallopt(numbers[name], value)
