"""Tokens per second of whole training steps, ours and the peers' by turns in one process.

    python -m bench.train_step                                         # CPU: GPT-2 124M, 4 x 256 tokens a step
    python -m bench.train_step --block_size 1024 --micro_batch_size 64 --total_batch_size 524288      # one GPU
    torchrun --nproc_per_node=2 -m bench.train_step --peers ours,apart --total_batch_size 2048     # communication

ours: train.py's own loader, step and optimizer. apart: the same, but no process learns of the others' gradients, so
that the difference is what communication costs. transformers: GPT2LMHeadModel, torch.compile, 16-bit autocast, fused
AdamW. plain: the loop as nanoGPT (CPU: eager fp32, plain AdamW) or build-nanogpt (GPU: eager bf16 autocast, fused
AdamW) runs it. Each figure counts data, forward, backward, clipping and optimizer. The machine's own limits are
measured in the same run: a large 16-bit matrix product and a copy in memory. On a CPU the peers run in processes of
their own, one at a time, since ours sets how the C library keeps memory. Writes bench/results/train_step_*.json.
"""
import contextlib
import functools
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from assemble import assemble, warm_up
from bench.common import compared, machine, spread, write_results
from config import DeviceConfig, UserError, flag, parse_config, run_script
from dataloader import DataOrder, TrainLoader
from device import choose_device, choose_dtype, probe
from model import GPT, GPT2_SIZES, GPTConfig, parameter_groups
from runtime import Runtime, start, temporary_folder
from shards import save_shard
from train import TrainConfig, set_learning_rate, train_step

PEERS = ("ours", "apart", "transformers", "plain")


@dataclass(kw_only=True)
class TrainStepConfig(DeviceConfig):
    """The flags of this benchmark."""
    model: str = flag("gpt2", "GPT-2 size", choices=tuple(GPT2_SIZES))
    block_size: int = flag(256, "tokens of a row", low=1)
    micro_batch_size: int = flag(4, "rows of a forward pass", low=1)
    total_batch_size: int = flag(1024, "tokens of a step", low=1)
    compile: str = flag("on", "torch.compile for ours", choices=("auto", "on", "off"))
    optimizer: str = flag("adamw", "of ours", choices=("adamw", "muon"))
    recompute: bool = flag(False, "ours recomputes activations")
    peers: str = flag("ours,transformers,plain", f"which to run, separated by commas: {', '.join(PEERS)}")
    rounds: int = flag(5, "turns of each", low=1)
    steps: int = flag(2, "steps of a turn", low=1)

    def check(self):
        """Raise UserError for a peer that is none."""
        unknown = set(self.peers.split(",")) - set(PEERS)
        if unknown:
            raise UserError(f"--peers knows {', '.join(PEERS)}, not {sorted(unknown)[0]}")
        if "ours" not in self.peers.split(","):
            raise UserError("--peers must have ours: everything is compared with it")


def main(argv=None):
    """Time all by turns, and the limits of the machine between."""
    config = parse_config(TrainStepConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime, temporary_folder(runtime, tempfile.gettempdir()) as data:
        runtime.from_main(lambda: save_tokens(config, data))
        makers = dict(ours=ours, apart=functools.partial(ours, reduce=False), transformers=transformers_loop,
                      plain=plain_loop)
        here = makers if runtime.device.type != "cpu" else ("ours", "apart")
        steps = {name: makers[name](config, runtime, data) if name in here else in_own_process(makers[name], config)
                 for name in config.peers.split(",")}
        for step in steps.values():   # compile, allocate
            step()
            step()
        tokens_per_s = {name: [] for name in steps}
        limits = dict(matmul_tflops=[], copy_gb_per_s=[])
        for _ in range(config.rounds):
            for name, step in steps.items():
                seconds = timed(lambda step=step: [step() for _ in range(config.steps)], runtime.device)
                tokens_per_s[name].append(config.steps * config.total_batch_size / seconds)
            limits["matmul_tflops"].append(matmul_flops(runtime) / 1e12)
            limits["copy_gb_per_s"].append(copy_bytes(runtime) / 1e9)
        if runtime.is_main:
            report(config, runtime, tokens_per_s, limits)


def report(config, runtime, tokens_per_s, limits):
    """Print and write medians, ratios and the shares of the machine's limits."""
    shape = GPTConfig(block_size=config.block_size, **GPT2_SIZES[config.model])
    with torch.device("meta"):
        flops = GPT(shape).flops_per_token()
    median = {name: statistics.median(values) for name, values in tokens_per_s.items()}
    limit = statistics.median(limits["matmul_tflops"]) * 1e12 / flops * runtime.world_size
    ratios = {f"ours / {name}": statistics.median(np.divide(tokens_per_s["ours"], tokens_per_s[name]))
              for name in median if name != "ours"}
    peak = runtime.hardware.peak_flops()
    memory = torch.cuda.max_memory_allocated() / 1e9 if runtime.device.type == "cuda" else None
    write_results(f"train_step_{runtime.device.type}_{config.model}_{runtime.world_size}", dict(
        machine=machine(), config=vars(config), processes=runtime.world_size, dtype=runtime.dtype_name,
        tokens_per_s={name: spread(values) for name, values in tokens_per_s.items()}, ratios=ratios,
        limits={name: spread(values) for name, values in limits.items()}, matmul_limit_tokens_per_s=limit,
        share_of_matmul_limit={name: value / limit for name, value in median.items()},
        mfu={name: value * flops / peak / runtime.world_size for name, value in median.items()} if peak else None,
        peak_memory_gb=memory), [
            compared(f"training step, {config.model}, {config.total_batch_size:,} tokens, {runtime.world_size} "
                     f"process{'es' * (runtime.world_size > 1)}", "tokens/s", median["ours"], name, value)
            for name, value in [*median.items(), ("matmul limit", limit)] if name != "ours"])
    print("| | tokens/s | ours / it | of the matmul limit |\n|---|---|---|---|")
    for name, value in median.items():
        print(f"| {name} | {value:,.0f} | {ratios.get(f'ours / {name}', 1):.2f} | {100 * value / limit:.0f}% |")
    print(f"| matmul limit | {limit:,.0f} | | 100% |")


def timed(action, device):
    """The seconds that an action takes on the device."""
    synchronize(device)
    begun = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_own_process(maker, config):
    """A function that makes one step of a peer in a process without our settings of the C library."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve_steps, args=(maker, config, there), daemon=True).start()

    def step():
        here.send("step")
        here.recv()
    return step


def serve_steps(maker, config, connection):
    """Make a step each time that one is asked for."""
    device = choose_device(config.device)
    hardware = probe(device)
    step = maker(config, Runtime(0, 0, 1, device, hardware, choose_dtype(config.dtype, hardware)), None)
    with contextlib.suppress(EOFError):    # the benchmark is over
        while connection.recv():
            step()
            connection.send("done")


def save_tokens(config, folder):
    """Write shards of random tokens into a folder."""
    tokens = np.random.default_rng(0)
    for i, n in enumerate((config.block_size + 1, max(4 * config.total_batch_size, 100_000))):
        save_shard(folder, "random", "train" if i else "val", i, tokens.integers(0, 50257, n))


def ours(config, runtime, data, reduce=True):
    """A function that makes one step as train.py makes it. reduce=False: but for the reduction of gradients."""
    training = TrainConfig(data_dir=data, log_dir=data, model=config.model, block_size=config.block_size,
                           total_batch_size=config.total_batch_size, micro_batch_size=config.micro_batch_size,
                           compile=config.compile, optimizer=config.optimizer, recompute=config.recompute,
                           device=config.device, dtype=config.dtype, eval_every=0, max_steps=10 ** 6)
    run = assemble(training, runtime)
    warm_up(run, runtime)
    loader = TrainLoader(DataOrder(run.train_stream, 0), run.plan.windows_per_step, runtime, 0, 10 ** 6)
    counter = iter(range(10 ** 6))

    def step():
        number = next(counter)
        batch, _ = loader.next_step()
        set_learning_rate(run, training, number)
        with contextlib.nullcontext() if reduce or runtime.world_size == 1 else run.ddp.no_sync():
            train_step(run, training, runtime, batch, number)
    return step


def transformers_loop(config, runtime, data):
    """A function that makes one step of Hugging Face's model, compiled, with 16-bit autocast and fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = GPT2_SIZES[config.model]
    model = GPT2LMHeadModel(GPT2Config(n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"],
                                       n_positions=config.block_size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                       use_cache=False)).to(runtime.device).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(x):
        with runtime.autocast():
            return compiled(x, labels=x).loss
    return accumulating(config, runtime, model, optimizer, loss_of)


def plain_loop(config, runtime, data):
    """A function that makes one step of the loop as nanoGPT (CPU) or build-nanogpt (GPU) ships it: not compiled."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=config.block_size, **GPT2_SIZES[config.model])).to(runtime.device).train()
    on_gpu = runtime.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), fused=on_gpu)

    def loss_of(x):
        with torch.autocast(runtime.device.type, dtype=runtime.dtype, enabled=on_gpu):
            return model(x, x)
    return accumulating(config, runtime, model, optimizer, loss_of)


def accumulating(config, runtime, model, optimizer, loss_of):
    """A function that makes one step of a peer on random tokens: accumulate, clip, update."""
    n = config.total_batch_size // (config.micro_batch_size * config.block_size)

    def step():
        for _ in range(n):
            x = torch.randint(50257, (config.micro_batch_size, config.block_size)).to(runtime.device)
            (loss_of(x) / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def matmul_flops(runtime):
    """Floating-point operations per second of a large matrix product in the run's dtype."""
    n = 8192 if runtime.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    a @ b
    return 5 * 2 * n ** 3 / timed(lambda: [a @ b for _ in range(5)], runtime.device)


def copy_bytes(runtime):
    """Bytes per second, read and written, of a copy within the device's memory."""
    n = 2 ** 30 if runtime.device.type == "cuda" else 2 ** 27
    source = torch.empty(n, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 5 * 2 * source.numel() / timed(lambda: [target.copy_(source) for _ in range(5)], runtime.device)


if __name__ == "__main__":
    run_script(main)
