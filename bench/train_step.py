"""Tokens per second of whole training steps, ours and the peers' by turns in one process.

    python -m bench.train_step                                         # CPU: GPT-2 124M, 4 x 256 tokens a step
    python -m bench.train_step --block_size 1024 --micro_batch_size 0 --total_batch_size 524288       # one GPU
    torchrun --nproc_per_node=2 -m bench.train_step --peers ours,apart --total_batch_size 2048     # communication

ours: train.py's own loader, step and optimizer. apart: the same, but no process learns of the others' gradients, so
that the difference is what communication costs. transformers: GPT2LMHeadModel, torch.compile, 16-bit autocast, fused
AdamW. plain: the loop as nanoGPT (CPU: eager fp32, plain AdamW) or build-nanogpt (GPU: eager bf16 autocast, fused
AdamW) runs it. Each figure counts data, forward, backward, clipping and optimizer. The machine's own limits are
measured in the same run: a large 16-bit matrix product and a copy in memory. On a CPU the peers run in processes of
their own, one at a time, since ours sets how the C library keeps memory. A peer that fails, for want of memory say,
drops out. --profile shows where a step of ours goes. Writes bench/results/train_step_*.json.
"""
import contextlib
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from bench.common import choose_meeting_point, compared, machine, spread, write_results
from bench.sizes import SizeConfig
from exactgpt.config import UserError, flag, parse_config, replace, run_script
from exactgpt.dataloader import DataOrder, TrainLoader
from exactgpt.device import choose_device, choose_dtype, is_out_of_memory, probe_hardware
from exactgpt.distributed import Runtime, start, temporary_folder
from exactgpt.optimizer import parameter_groups
from exactgpt.shard_writer import save_shard
from model import GPT, GPTConfig
from train import TrainConfig, set_learning_rate, set_up, train_step, warm_up

PEERS = ("ours", "apart", "transformers", "plain")
PROFILED = 0.95    # of a step's time is shown kernel by kernel


@dataclass(kw_only=True)
class TrainStepConfig(SizeConfig):
    """The flags of this benchmark."""
    block_size: int = flag(256, "tokens of a row", low=1)
    micro_batch_size: int = flag(4, "rows of a forward pass; 0: what train.py finds, for every way", low=0)
    total_batch_size: int = flag(1024, "tokens of a step", low=1)
    compile: str = flag("on", "torch.compile, for ours and transformers", choices=("auto", "on", "off"))
    attention: str = flag("auto", "train.py's, for every way", choices=("auto", "flash", "cudnn", "efficient", "math"))
    optimizer: str = flag("adamw", "of ours", choices=("adamw", "muon"))
    recompute: bool = flag(False, "ours recomputes activations")
    process_group: bool = flag(False, "ours in DDP even if it is one process: what the cut graph costs")
    profile: bool = flag(False, f"show which kernels take {PROFILED:.0%} of one step of ours")
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


@dataclass
class Peer:
    """A way to train, with what was measured of it."""
    step: object                    # makes one step
    resident: int = 0               # bytes that it holds on the card between its turns
    peak: int = 0                   # the most that it held, what others hold left out
    tokens_per_s: list = field(default_factory=list)
    problem: str = ""               # why it dropped out


def main(argv=None):
    """Time all by turns, and the limits of the machine between."""
    config = parse_config(TrainStepConfig, argv, __doc__.split("\n\n")[0])
    if config.process_group and "RANK" not in os.environ:
        choose_meeting_point()
    with start(config) as runtime, temporary_folder(runtime, tempfile.gettempdir()) as data:
        runtime.broadcast(lambda: save_tokens(config, data))
        run, step = ours(config, runtime, data)
        config = replace(config, micro_batch_size=run.micro_batch_size)
        peers = {"ours": Peer(step, resident=allocated(runtime))}
        for name in config.peers.split(","):
            if name != "ours":
                peers[name] = made(MAKERS[name], config, runtime, data)
        limits = dict(matmul_tflops=[], copy_gb_per_s=[])
        for i in range(config.rounds + 1):          # the first turn compiles and allocates
            for name, peer in peers.items():
                with contextlib.nullcontext() if name == "ours" else dropping_out(peer, runtime):
                    take_turn(peer, config, runtime, measured=i > 0, alone=len(peers) == 1)
            if i:
                limits["matmul_tflops"].append(matmul_flops(runtime) / 1e12)
                limits["copy_gb_per_s"].append(copy_bytes(runtime) / 1e9)
        kernels = profiled(peers["ours"].step, runtime) if config.profile else None
        if runtime.is_main:
            report(config, runtime, peers, limits, kernels)
        del run, step, peers        # DDP must not outlive its process group


def made(maker, config, runtime, data):
    """A Peer."""
    if runtime.device.type == "cpu" and maker is not MAKERS["apart"]:
        return Peer(in_own_process(maker, config))
    before, peer = allocated(runtime), Peer(None)
    with dropping_out(peer, runtime):
        peer.step = maker(config, runtime, data)
    peer.resident = allocated(runtime) - before
    return peer


def take_turn(peer, config, runtime, measured, alone=True):
    """Make the steps of a turn, and keep how fast they were and the most memory that they took."""
    if peer.problem:
        return
    on_card = runtime.device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    before = allocated(runtime)
    if on_card and measured and not alone:     # the memory that others have freed, but not given back, in other pieces
        torch.cuda.empty_cache()
        peer.step()
    seconds = timed(lambda: [peer.step() for _ in range(config.steps)], runtime.device)
    if measured:
        peer.tokens_per_s.append(config.steps * config.total_batch_size / seconds)
    else:
        peer.resident += allocated(runtime) - before       # the optimizer's state was made
    if on_card:
        peer.peak = torch.cuda.max_memory_allocated() - (allocated(runtime) - peer.resident)


@contextlib.contextmanager
def dropping_out(peer, runtime):
    """Around a peer's work: where it fails it drops out, and gives back what it held; the others go on."""
    try:
        yield
    except Exception as error:      # its memory, its compilation, another version of its library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        peer.problem = "out of memory" if is_out_of_memory(error) else reason
        peer.step, peer.tokens_per_s = None, []
    if peer.problem and runtime.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def allocated(runtime):
    """The bytes of the card that hold tensors."""
    return torch.cuda.memory_allocated() if runtime.device.type == "cuda" else 0


def report(config, runtime, peers, limits, kernels):
    """Print and write medians, ratios, memory and the shares of the machine's limits."""
    shape = GPTConfig(block_size=config.block_size, **config.shape)
    with torch.device("meta"):
        flops = GPT(shape).flops_per_token()
    left = {name: peer for name, peer in peers.items() if peer.tokens_per_s}
    median = {name: statistics.median(peer.tokens_per_s) for name, peer in left.items()}
    limit = statistics.median(limits["matmul_tflops"]) * 1e12 / flops * runtime.world_size
    ratios = {f"ours / {name}": statistics.median(np.divide(peers["ours"].tokens_per_s, peer.tokens_per_s))
              for name, peer in left.items() if name != "ours"}
    card_peak = runtime.hardware.peak_flops()
    memory = {name: peer.peak / 1e9 for name, peer in left.items()} if runtime.device.type == "cuda" else None
    kind = "_ddp" * config.process_group + "_profile" * config.profile
    write_results(f"train_step_{runtime.device.type}_{config.name}_{runtime.world_size}{kind}", dict(
        machine=machine(), config=vars(config), processes=runtime.world_size, dtype=runtime.dtype_name,
        tokens_per_s={name: spread(peer.tokens_per_s) for name, peer in left.items()}, ratios=ratios,
        limits={name: spread(values) for name, values in limits.items()}, matmul_limit_tokens_per_s=limit,
        share_of_matmul_limit={name: value / limit for name, value in median.items()},
        mfu={name: v * flops / card_peak / runtime.world_size for name, v in median.items()} if card_peak else None,
        peak_memory_gb=memory, dropped_out={n: p.problem for n, p in peers.items() if p.problem}, kernels=kernels),
        [] if config.profile else rows(config, runtime, {**median, "matmul limit": limit}))
    print("| | tokens/s | ours / it | of the matmul limit | memory, GB |\n|---|---|---|---|---|")
    for name, peer in peers.items():
        if peer.problem:
            print(f"| {name} | {peer.problem} | | | |")
        else:
            print(f"| {name} | {median[name]:,.0f} | {ratios.get(f'ours / {name}', 1):.2f} | "
                  f"{100 * median[name] / limit:.0f}% | {f'{memory[name]:.1f}' if memory else ''} |")
    print(f"| matmul limit | {limit:,.0f} | | 100% | |")


def rows(config, runtime, tokens_per_s):
    """The rows of bench/results/README.md: ours beside each of the others."""
    what = f"training step, {config.name}, {config.total_batch_size:,} tokens, {runtime.world_size} " \
           f"process{'es' * (runtime.world_size > 1)}{' in DDP' * config.process_group}"
    return [compared(what, "tokens/s", tokens_per_s["ours"], name, value)
            for name, value in tokens_per_s.items() if name != "ours"]


def profiled(step, runtime):
    """[(kernel, calls, ms)] of one step, the longest first; prints those that make up PROFILED of its time."""
    on_card = runtime.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_card
    with torch.profiler.profile(activities=activities) as profile:
        seconds = timed(step, runtime.device)
    name = "self_device_time_total" if on_card else "self_cpu_time_total"
    kernels = [(event.key, event.count, getattr(event, name) / 1000) for event in profile.key_averages()
               if not on_card or (event.device_type == torch.autograd.DeviceType.CUDA
                                  and not event.is_user_annotation)]       # those span kernels that count themselves
    kernels.sort(key=lambda kernel: -kernel[2])
    busy = sum(ms for _, _, ms in kernels)
    runtime.print(f"one step under the profiler: {1000 * seconds:.0f} ms, {'kernels' if on_card else 'operators'} "
                  f"{busy:.0f} ms\n| ms | share | so far | calls | |\n|---|---|---|---|---|")
    so_far = 0.0
    for key, calls, ms in kernels:
        if so_far >= PROFILED * busy:
            break
        so_far += ms
        runtime.print(f"| {ms:.1f} | {ms / busy:.1%} | {so_far / busy:.0%} | {calls} | {key[:100]} |")
    return kernels


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
    hardware = probe_hardware(device)
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
    """(the Run, a function that makes one step as train.py makes it). reduce=False: but for the reduction."""
    training = TrainConfig(data_dir=data, log_dir=data, tokenizer=config.tokenizer, **config.shape,
                           block_size=config.block_size, total_batch_size=config.total_batch_size,
                           micro_batch_size=config.micro_batch_size, compile=config.compile,
                           attention=config.attention, optimizer=config.optimizer, recompute=config.recompute,
                           device=config.device, dtype=config.dtype, eval_every=0, max_steps=10 ** 6)
    run, _ = set_up(training, runtime, saves=False)
    warm_up(run, runtime)
    loader = TrainLoader(DataOrder(run.train_stream, 0), run.plan.windows_per_step, runtime, 0, 10 ** 6)
    counter = iter(range(10 ** 6))

    def step():
        number = next(counter)
        batch, _ = loader.next_step()
        set_learning_rate(run, training, number)
        with contextlib.nullcontext() if reduce or runtime.alone else run.ddp.no_sync():
            train_step(run, training, runtime, batch, number)
    return run, step


def apart(config, runtime, data):
    """A function that makes one step of ours without the reduction of gradients."""
    return ours(config, runtime, data, reduce=False)[1]


def transformers_loop(config, runtime, data):
    """A function that makes one step of Hugging Face's model, compiled, with 16-bit autocast and fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(**config.shape, n_positions=config.block_size, resid_pdrop=0, embd_pdrop=0,
                                       attn_pdrop=0, use_cache=False)).to(runtime.device).train()
    compiled = model if config.compile == "off" else torch.compile(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(x):
        with runtime.autocast():
            return compiled(x, labels=x).loss
    return accumulating(config, runtime, model, optimizer, loss_of)


def plain_loop(config, runtime, data):
    """A function that makes one step of the loop as nanoGPT (CPU) or build-nanogpt (GPU) ships it: not compiled."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=config.block_size, **config.shape)).to(runtime.device).train()
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


MAKERS = dict(apart=apart, transformers=transformers_loop, plain=plain_loop)


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
