"""Measure tokens per second of whole training steps: ours and those of other training loops, taking turns.

    python -m bench.train_step                                         # CPU: GPT-2 124M, 4 x 256 tokens a step
    python -m bench.train_step --block_size 1024 --micro_batch_size 0 --total_batch_size 524288       # one GPU
    torchrun --nproc_per_node=2 -m bench.train_step --peers ours,apart --total_batch_size 2048     # communication

The peers: ours is train.py's loader, step and optimizer. apart is the same without the reduction of gradients, so the
difference to ours is the cost of communication. transformers is GPT2LMHeadModel with torch.compile, 16-bit autocast
and fused AdamW. plain is the loop of nanoGPT (CPU: eager fp32, plain AdamW) or build-nanogpt (GPU: eager bf16 autocast,
fused AdamW).

The time includes data, forward, backward, clipping and optimizer. The same run measures the machine's limits: a large
16-bit matrix product and a copy in memory. On a CPU transformers and plain run in separate processes, because ours
changes how the C library keeps freed memory. A peer that fails, because of memory for example, is left out from then
on. --profile shows where the time of one of our steps goes. Writes bench/results/train_step_*.json.
"""
import contextlib
import gc
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bench.common import comparison_row, describe_machine, median_and_range, write_results
from bench.sizes import SizeConfig
from exactgpt.config import UserError, counted, flag, parse_config, run_script
from exactgpt.dataloader import DataOrder, TrainLoader
from exactgpt.device import choose_device, choose_dtype, is_out_of_memory, probe_hardware
from exactgpt.distributed import Runtime, start, temporary_folder
from exactgpt.optimizer import parameter_groups
from exactgpt.shard_writer import save_shard
from model import GPT, GPTConfig
from train import TrainConfig, set_learning_rate, set_up, train_step, warm_up

PEERS = ("ours", "apart", "transformers", "plain")
PROFILED = 0.95    # share of a step's time that the profile lists kernel by kernel


@dataclass(kw_only=True)
class TrainStepConfig(SizeConfig):
    """The flags of this benchmark."""
    block_size: int = flag(256, "tokens per row", low=1)
    micro_batch_size: int = flag(4, "rows per forward pass, for all peers (0: the size that train.py finds)", low=0)
    total_batch_size: int = flag(1024, "tokens per step", low=1)
    compile: str = flag("on", "torch.compile, for ours, apart and transformers", choices=("auto", "on", "off"))
    attention: str = flag("auto", "attention backend, for all peers",
                          choices=("auto", "flash", "cudnn", "efficient", "math"))
    optimizer: str = flag("adamw", "optimizer of ours and apart", choices=("adamw", "muon"))
    recompute: bool = flag(False, "recompute activations in ours and apart")
    process_group: bool = flag(False, "use DDP even with one process, to see what cutting the compiled graph costs")
    profile: bool = flag(False, f"profile one of our steps and list the kernels that take {PROFILED:.0%} of its time")
    peers: str = flag("ours,transformers,plain", f"training loops to time, separated by commas: {', '.join(PEERS)}")
    rounds: int = flag(5, "turns of each peer; the medians count", low=1)
    steps: int = flag(2, "steps per turn", low=1)

    def check(self):
        """Raise UserError if --peers has an unknown name or lacks ours."""
        unknown = set(self.peers.split(",")) - set(PEERS)
        if unknown:
            raise UserError(f"--peers: there is no {sorted(unknown)[0]}; the peers are {', '.join(PEERS)}")
        if "ours" not in self.peers.split(","):
            raise UserError("--peers must include ours: everything is compared with it")


@dataclass
class Peer:
    """A training loop and its measurements."""
    step: object                    # function that runs one step
    resident: int = 0               # bytes that it keeps allocated on the GPU between its turns
    peak: int = 0                   # its peak memory on the GPU in bytes, without what the others keep
    tokens_per_s: list = field(default_factory=list)
    problem: str = ""               # why it was left out


def main(argv=None):
    """Time all peers and the machine's limits in turn, and write the results."""
    config = parse_config(TrainStepConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime, temporary_folder(runtime, tempfile.gettempdir()) as data:
        runtime.broadcast(lambda: save_tokens(config, data))
        run, step = make_our_step(config, runtime, data)
        config = replace(config, micro_batch_size=run.micro_batch_size)
        peers = {"ours": Peer(step, resident=allocated_bytes(runtime))}
        for name in config.peers.split(","):
            if name != "ours":
                peers[name] = make_peer(STEP_MAKERS[name], config, runtime, data)
        limits = dict(matmul_tflops=[], copy_gb_per_s=[])
        for i in range(config.rounds + 1):          # the first turn, which compiles and allocates, does not count
            for name, peer in peers.items():
                with contextlib.nullcontext() if name == "ours" else leave_out_on_error(peer, runtime):
                    take_turn(peer, config, runtime, measured=i > 0, alone=len(peers) == 1)
            if i:
                limits["matmul_tflops"].append(measure_matmul(runtime) / 1e12)
                limits["copy_gb_per_s"].append(measure_copy(runtime) / 1e9)
        kernels = profile_step(peers["ours"].step, runtime) if config.profile else None
        if runtime.is_main:
            report(config, runtime, peers, limits, kernels)
        del run, step, peers        # DDP must not outlive its process group


def make_peer(make_step, config, runtime, data):
    """Return the Peer of a step maker; on a CPU, except for apart, its steps run in a separate process."""
    if runtime.device.type == "cpu" and make_step is not STEP_MAKERS["apart"]:
        return Peer(step_in_own_process(make_step, config))
    before, peer = allocated_bytes(runtime), Peer(None)
    with leave_out_on_error(peer, runtime):
        peer.step = make_step(config, runtime, data)
    peer.resident = allocated_bytes(runtime) - before
    return peer


def take_turn(peer, config, runtime, measured, alone=True):
    """Run the steps of a peer's turn and record their speed, if `measured`, and peak memory.

    alone: no other peer has run since its last turn.
    """
    if peer.problem:
        return
    on_gpu = runtime.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = allocated_bytes(runtime)
    if on_gpu and measured and not alone:      # the allocator caches blocks in the other peers' sizes
        torch.cuda.empty_cache()
        peer.step()
    seconds = time_action(lambda: [peer.step() for _ in range(config.steps)], runtime.device)
    if measured:
        peer.tokens_per_s.append(config.steps * config.total_batch_size / seconds)
    else:
        peer.resident += allocated_bytes(runtime) - before       # the first step allocates the optimizer's state
    if on_gpu:
        peer.peak = torch.cuda.max_memory_allocated() - (allocated_bytes(runtime) - peer.resident)


@contextlib.contextmanager
def leave_out_on_error(peer, runtime):
    """Return a context for a peer's work: if it raises, record the problem, free its memory, and leave it out."""
    try:
        yield
    except Exception as error:      # out of memory, a failed compilation, another version of its library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        peer.problem = "out of memory" if is_out_of_memory(error) else reason
        peer.step, peer.tokens_per_s = None, []
    if peer.problem and runtime.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def allocated_bytes(runtime):
    """Return the bytes of the GPU's memory that tensors take, 0 on a CPU."""
    return torch.cuda.memory_allocated() if runtime.device.type == "cuda" else 0


def report(config, runtime, peers, limits, kernels):
    """Print and write medians, ratios, memory and shares of the machine's limits."""
    shape = GPTConfig(block_size=config.block_size, **config.shape)
    with torch.device("meta"):
        flops = GPT(shape).flops_per_token()
    measured = {name: peer for name, peer in peers.items() if peer.tokens_per_s}
    median = {name: statistics.median(peer.tokens_per_s) for name, peer in measured.items()}
    limit = statistics.median(limits["matmul_tflops"]) * 1e12 / flops * runtime.world_size
    ratios = {f"ours / {name}": statistics.median(np.divide(peers["ours"].tokens_per_s, peer.tokens_per_s))
              for name, peer in measured.items() if name != "ours"}
    gpu_peak = runtime.hardware.peak_flops()
    memory = {name: peer.peak / 1e9 for name, peer in measured.items()} if runtime.device.type == "cuda" else None
    kind = "_ddp" * config.process_group + "_profile" * config.profile
    write_results(f"train_step_{runtime.device.type}_{config.name}_{runtime.world_size}{kind}", dict(
        machine=describe_machine(), config=vars(config), processes=runtime.world_size, dtype=runtime.dtype_name,
        tokens_per_s={name: median_and_range(peer.tokens_per_s) for name, peer in measured.items()}, ratios=ratios,
        limits={name: median_and_range(values) for name, values in limits.items()}, matmul_limit_tokens_per_s=limit,
        share_of_matmul_limit={name: value / limit for name, value in median.items()},
        mfu={name: v * flops / gpu_peak / runtime.world_size for name, v in median.items()} if gpu_peak else None,
        peak_memory_gb=memory, dropped_out={n: p.problem for n, p in peers.items() if p.problem}, kernels=kernels),
        [] if config.profile else comparison_rows(config, runtime, {**median, "matmul limit": limit}))
    print("| | tokens/s | ours / peer | of the matmul limit | memory, GB |\n|---|---|---|---|---|")
    for name, peer in peers.items():
        if peer.problem:
            print(f"| {name} | {peer.problem} | | | |")
        else:
            print(f"| {name} | {median[name]:,.0f} | {ratios.get(f'ours / {name}', 1):.2f} | "
                  f"{100 * median[name] / limit:.0f}% | {f'{memory[name]:.1f}' if memory else ''} |")
    print(f"| matmul limit | {limit:,.0f} | | 100% | |")


def comparison_rows(config, runtime, tokens_per_s):
    """Return the rows for bench/results/README.md: ours against each of the others."""
    what = f"training step, {config.name}, {config.total_batch_size:,} tokens, " \
           f"{counted(runtime.world_size, 'process')}{' in DDP' * config.process_group}"
    return [comparison_row(what, "tokens/s", tokens_per_s["ours"], name, value)
            for name, value in tokens_per_s.items() if name != "ours"]


def profile_step(step, runtime):
    """Profile one step and print the kernels that make up PROFILED of its time.

    Returns [(kernel, calls, ms)] of all kernels (on a CPU: operators), the longest first.
    """
    on_gpu = runtime.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        seconds = time_action(step, runtime.device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [(event.key, event.count, getattr(event, name) / 1000) for event in profile.key_averages()
               if not on_gpu or (event.device_type == torch.autograd.DeviceType.CUDA
                                 and not event.is_user_annotation)]       # annotations span kernels that are counted
    kernels.sort(key=lambda kernel: -kernel[2])
    busy = sum(ms for _, _, ms in kernels)
    runtime.print(f"one step under the profiler: {1000 * seconds:.0f} ms, {'kernels' if on_gpu else 'operators'} "
                  f"{busy:.0f} ms\n| ms | share | cumulative | calls | |\n|---|---|---|---|---|")
    cumulative = 0.0
    for key, calls, ms in kernels:
        if cumulative >= PROFILED * busy:
            break
        cumulative += ms
        runtime.print(f"| {ms:.1f} | {ms / busy:.1%} | {cumulative / busy:.0%} | {calls} | {key[:100]} |")
    return kernels


def time_action(action, device):
    """Return the seconds that an action takes on the device."""
    synchronize(device)
    start_time = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start_time


def synchronize(device):
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_in_own_process(make_step, config):
    """Return a function that runs one step of a peer in a new process, where the C library has its default settings."""
    context = multiprocessing.get_context("spawn")
    connection, worker_connection = context.Pipe()
    context.Process(target=serve_steps, args=(make_step, config, worker_connection), daemon=True).start()

    def step():
        connection.send("step")
        connection.recv()
    return step


def serve_steps(make_step, config, connection):
    """Run a step for each message that arrives."""
    device = choose_device(config.device)
    hardware = probe_hardware(device)
    step = make_step(config, Runtime(0, 0, 1, device, hardware, choose_dtype(config.dtype, hardware)), None)
    with contextlib.suppress(EOFError):    # the benchmark has ended
        while connection.recv():
            step()
            connection.send("done")


def save_tokens(config, folder):
    """Write a val and a train shard of random tokens into a folder."""
    random_tokens = np.random.default_rng(0)
    for i, n in enumerate((config.block_size + 1, max(4 * config.total_batch_size, 100_000))):
        save_shard(folder, "random", "train" if i else "val", i, random_tokens.integers(0, 50257, n))


def make_our_step(config, runtime, data, reduce=True):
    """Return (Run, function that runs one step of train.py). reduce=False: without the reduction of gradients."""
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


def make_step_without_reduction(config, runtime, data):
    """Return a function that runs one step of train.py without the reduction of gradients."""
    return make_our_step(config, runtime, data, reduce=False)[1]


def make_transformers_step(config, runtime, data):
    """Return a function that runs one step of Hugging Face's model: compiled, 16-bit autocast, fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(**config.shape, n_positions=config.block_size, resid_pdrop=0, embd_pdrop=0,
                                       attn_pdrop=0, use_cache=False)).to(runtime.device).train()
    compiled = model if config.compile == "off" else torch.compile(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(x):
        with runtime.autocast():
            return compiled(x, labels=x).loss
    return accumulation_step(config, runtime, model, optimizer, loss_of)


def make_plain_step(config, runtime, data):
    """Return a function that runs one step of the loop as nanoGPT (CPU) or build-nanogpt (GPU) ships it: eager."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=config.block_size, **config.shape)).to(runtime.device).train()
    on_gpu = runtime.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), fused=on_gpu)

    def loss_of(x):
        with torch.autocast(runtime.device.type, dtype=runtime.dtype, enabled=on_gpu):
            return model(x, x)
    return accumulation_step(config, runtime, model, optimizer, loss_of)


def accumulation_step(config, runtime, model, optimizer, loss_of):
    """Return a function that runs one step on random tokens: accumulate the gradients of loss_of(x), clip, update."""
    n = config.total_batch_size // (config.micro_batch_size * config.block_size)

    def step():
        for _ in range(n):
            x = torch.randint(50257, (config.micro_batch_size, config.block_size)).to(runtime.device)
            (loss_of(x) / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


STEP_MAKERS = dict(apart=make_step_without_reduction, transformers=make_transformers_step, plain=make_plain_step)


def measure_matmul(runtime):
    """Return the floating-point operations per second of a large matrix product in the run's dtype."""
    n = 8192 if runtime.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    a @ b
    return 5 * 2 * n ** 3 / time_action(lambda: [a @ b for _ in range(5)], runtime.device)


def measure_copy(runtime):
    """Return the bytes per second, read and written, of a copy within the device's memory."""
    n = 2 ** 30 if runtime.device.type == "cuda" else 2 ** 27
    source = torch.empty(n, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 5 * 2 * source.numel() / time_action(lambda: [target.copy_(source) for _ in range(5)], runtime.device)


if __name__ == "__main__":
    run_script(main)
