"""Pretrain GPT-2 on token shards.

    python train.py --data_dir data/demo --log_dir logs/demo ...      # one process: a GPU, or a CPU
    torchrun --nproc_per_node=8 train.py                              # GPT-2 124M on 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train.py --device cpu ...             # two CPU processes (gloo)

Killed, preempted or crashed: the same command resumes from the newest checkpoint in --log_dir.

To understand one training step read four files: this one, exactgpt/dataloader.py (which tokens), model.py (the loss),
exactgpt/optimizer.py (the update, the schedules); sums over ranks and stops are in exactgpt/distributed.py.
"""
import exactgpt.launch  # noqa: F401  first, see there

import gc
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction

import torch
from torch import nn
from tqdm import tqdm

from exactgpt import checkpoint, device
from exactgpt.config import RunConfig, UserError, command, counted, flag, parse_config, run_script, with_changes
from exactgpt.dataloader import DataOrder, TokenStream, TrainLoader, n_val_windows, val_batches
from exactgpt.distributed import StopRequested, lock_folder, seed_everything, start, temporary_folder
from exactgpt.generation import example_prompt, write_samples
from exactgpt.metrics import RunLog, print_banner
from exactgpt.open_model import build_model, open_weights
from exactgpt.optimizer import SkippedSteps, decay_start, finish_step, learning_rate_factor, make_optimizer
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import Tokenizer
from hellaswag import DATA_FILE, N_EXAMPLES, evaluate_hellaswag, fetch_hellaswag, prepare_hellaswag
from model import GPT, GPT2_SIZES, IGNORED, GPTConfig, padded_vocab

HELLASWAG_EVERY = 250      # steps, unless the flag says otherwise
HELLASWAG_TOKENS = 8192    # tokens in the largest HellaSwag batch, if training's micro-batches have as many
DRY_RUN_ITEMS = 200        # HellaSwag items in a dry run, of 10,042
SLOW_STEP_S = 5            # in longer steps check for a stop after each micro-batch: SIGTERM gives us 30 s in torchrun
TOKENS_PER_STEP = 524288   # 2^19: the 0.5M of the GPT-3 paper's smallest model
MAX_STEPS = 19073          # 10B tokens in such steps
WARMUP_STEPS = 715         # 375M tokens (GPT-3 paper)


# ---- flags -------------------------------------------------------------------

@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """The flags of train.py. The defaults are the GPT-2 124M run."""
    # keep=True: a resumed run must have the same value; check_same_run also compares the model's shape, length, data.
    data_dir: str = flag("data/edu_fineweb10B", "folder of token shards", group="data")

    model: str | None = flag(None, "GPT-2 size (default: gpt2)", group="model", choices=tuple(GPT2_SIZES))
    n_layer: int | None = flag(None, "number of layers, instead of --model", low=1)
    n_head: int | None = flag(None, "number of attention heads, instead of --model", low=1)
    n_embd: int | None = flag(None, "number of channels, instead of --model", low=1)
    block_size: int | None = flag(None, "context length in tokens (default: 1024)", low=1)
    dropout: float = flag(0.0, "dropout probability", low=0.0, below=1.0, keep=True)
    init_from: str = flag("scratch", "initial weights: scratch, FILE.pt, a run's folder, a LoRA adapter, a Hugging "
                                     "Face folder, or a hub name such as gpt2")

    total_batch_size: int = flag(TOKENS_PER_STEP, "tokens per optimizer step, summed over all processes",
                                 group="batch", low=1, keep=True)
    micro_batch_size: int = flag(0, "rows per forward pass of a process (0: as many as fit, up to 65,536 tokens on a "
                                    "GPU; 4,096 tokens on a CPU)", low=0)

    max_steps: int | None = flag(None, f"number of optimizer steps (default: {MAX_STEPS})", group="length", low=0)
    num_epochs: float | None = flag(None, "epochs, instead of --max_steps", above=0)
    stop_loss: float = flag(0.0, "stop once a step's training loss is below this (0: never)", low=0.0)

    schedule: str = flag("cosine", "learning-rate schedule: cosine to min_lr, or warmup-stable-decay",
                         group="schedule", choices=("cosine", "wsd"), keep=True)
    max_lr: float = flag(6e-4, "peak learning rate", above=0, keep=True)
    min_lr: float = flag(6e-5, "learning rate that the schedule falls to", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, f"steps of linear warm-up (default: {WARMUP_STEPS}, or a tenth of a short "
                                    "run)", low=0)

    optimizer: str = flag("adamw", "adamw, or muon for the matrices inside the blocks and adamw for the rest",
                          group="optimizer", choices=("adamw", "muon"), keep=True)
    muon_lr: float = flag(0.02, "Muon peak learning rate (same schedule)", above=0, keep=True)
    muon_weight_decay: float = flag(0.01, "Muon weight decay", low=0.0, keep=True)
    weight_decay: float = flag(0.1, "AdamW weight decay, for matrices only", low=0.0, keep=True)
    beta1: float = flag(0.9, "AdamW beta1", low=0.0, below=1.0, keep=True)
    beta2: float = flag(0.95, "AdamW beta2", low=0.0, below=1.0, keep=True)
    adam_eps: float = flag(1e-8, "AdamW epsilon", above=0, keep=True)
    grad_clip: float = flag(1.0, "clip the gradient to this norm (0: off)", low=0.0, keep=True)

    eval_every: int = flag(250, "steps between validations (0: never)", group="evaluation", low=0)
    val_tokens: int = flag(10485760, "tokens per validation, the same ones each time", low=1)
    hellaswag_every: int | None = flag(None, "steps between HellaSwag evaluations, 0: never (default: "
                                             f"{HELLASWAG_EVERY} with GPT-2's vocabulary where the data is there or "
                                             "can be downloaded, else 0)", low=0)
    sample_every: int = flag(250, "steps between text samples (0: never)", low=0)

    log_dir: str = flag("logs", "folder for checkpoints and logs", group="checkpoints")
    checkpoint_every: int = flag(1000, "steps between checkpoints (0: only at the end)", low=0)
    keep_checkpoints: int = flag(3, "number of newest checkpoints to keep", low=1)
    resume: str = flag("auto", "auto: from the newest checkpoint in --log_dir, if any; never; or FILE.pt")

    compile: str = flag("auto", "torch.compile (auto: on CUDA, where it works)", group="system",
                        choices=("auto", "on", "off"))
    attention: str = flag("auto", "backend of scaled_dot_product_attention",
                          choices=("auto", "flash", "cudnn", "efficient", "math"))
    recompute: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    dollars_per_hour: float = flag(0.0, "price of the machine: --dry_run then says what the run costs", low=0.0)

    def check(self):
        """Raise UserError for flags that contradict each other."""
        shape = [n for n in ("n_layer", "n_head", "n_embd") if getattr(self, n) is not None]
        if self.model and shape:
            raise UserError(f"--model {self.model} and --{shape[0]} cannot be combined; use one of them")
        if self.max_steps is not None and self.num_epochs is not None:
            raise UserError("--max_steps and --num_epochs cannot be combined; use one of them")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")
        super().check()


# ---- data and batch arithmetic -----------------------------------------------

@dataclass(frozen=True)
class Plan:
    """The numbers of a run. A window is block_size tokens and their targets; a row of a batch is one window."""
    max_steps: int
    warmup_steps: int
    windows_per_step: int      # n, over all ranks
    local_windows: int         # of one rank in a step: n / world_size
    tokens_per_step: int
    epochs: float              # passes over the train split in max_steps


def make_plan(config, block_size, n_windows, world_size):
    """Return the Plan for a train split of n_windows. Raises UserError that names numbers that work."""
    unit = block_size * world_size
    total = config.total_batch_size
    if total % unit:      # a remainder would make the tokens of a step depend on the number of processes
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(f"--total_batch_size {total} is not a multiple of block_size x processes = {block_size} x "
                        f"{world_size}; use {nearest}")
    if n_windows < 1:
        raise UserError(f"the train split is shorter than one window of {counted(block_size, 'token')}; use more text, "
                        "or a smaller --block_size")
    n = total // block_size
    max_steps = config.max_steps if config.max_steps is not None else MAX_STEPS
    if config.num_epochs is not None:
        exact = Fraction(str(config.num_epochs)) * n_windows      # exact: in floats 0.29 * 100 is 28.999...
        max_steps = math.floor(exact / n)
        if max_steps < 1:
            largest = math.floor(exact / world_size) * unit
            advice = f"use --total_batch_size {largest} at most" if largest else "use more text or more epochs"
            raise UserError(f"--num_epochs {config.num_epochs:g} of {counted(n_windows * block_size, 'token')} is less "
                            f"than one step of {total:,} tokens; {advice}")
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(WARMUP_STEPS, max_steps // 10)
    elif max_steps and warmup_steps > max_steps:
        raise UserError(f"--warmup_steps {warmup_steps} exceeds the {counted(max_steps, 'step')} of the run; lower it")
    return Plan(max_steps=max_steps, warmup_steps=warmup_steps, windows_per_step=n, local_windows=n // world_size,
                tokens_per_step=total, epochs=max_steps * n / n_windows)


# ---- learning rate -----------------------------------------------------------

def set_learning_rate(run, config, step):
    """Set each parameter group's learning rate to its peak rate times the schedule's factor; return AdamW's."""
    factor = learning_rate_factor(step, run.plan, config.schedule, config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor       # the peak is --max_lr for AdamW, --muon_lr for Muon
    return config.max_lr * factor


# ---- set-up -----------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """The objects of a run, made once by set_up. The weights and the optimizer's state change in place."""
    plan: Plan
    shards: ShardFolder
    fingerprint: dict                         # of the shards: hashes, by their names in a checkpoint
    tokenizer: Tokenizer
    train_stream: TokenStream
    val_stream: TokenStream
    raw_model: GPT                            # checkpoints, HellaSwag, samples
    compiled: nn.Module                       # raw_model, or its compiled form: validation
    ddp: nn.Module                            # compiled, or its DDP wrapper: training
    optimizer: torch.optim.Optimizer          # or an OptimizerPair
    scaler: torch.amp.GradScaler              # does nothing except in fp16
    micro_batch_size: int                     # rows
    resolved: dict                            # what "auto" became, and hardware and length, for a resumed run
    provenance: dict                          # commit, versions, command


@dataclass
class Progress:
    """The numbers that change from step to step."""
    step: int                                 # the next one to train
    last_step: int                            # the loop ends here: max_steps, or earlier after --stop_loss
    best_val_loss: float = math.inf
    val_loss: float | None = None             # of the weights as they are now, if they have been validated
    save_failed: bool = False                 # the disk was full: try again soon
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


def set_up(config, runtime, saves=True):
    """Return (Run, Progress) of a new or a resumed run; `warm_up` comes next. saves: it will write checkpoints.

    Raises UserError for data, flags, weights or checkpoints that do not fit together, AlreadyFinished.
    """
    # data, flags and code, the same on all ranks
    shards = runtime.on_all_ranks(lambda: ShardFolder(config.data_dir))
    tokenizer = runtime.on_all_ranks(lambda: shards.tokenizer(config.tokenizer))
    fingerprint = shards.fingerprint(runtime.on_all_ranks(lambda: shards.check_vocabulary(tokenizer.n_vocab)))
    for what, value in (("flags", asdict(config)), ("code", checkpoint.code_hash()),
                        ("token shards", fingerprint)):
        runtime.require_equal(what, value)

    # weights. Rank 0 alone reads the checkpoint, since other machines may not see its disk (full_checkpoint is None on
    # other ranks). Every rank gets it without the optimizer's state, which follows at the end.
    full_checkpoint = runtime.on_all_ranks(
        lambda: checkpoint.find_checkpoint(config, runtime.print) if runtime.is_main else None)
    stored = runtime.broadcast(lambda: full_checkpoint and {**full_checkpoint, "optimizer": None}, on_device=True)
    model = make_model(config, runtime, tokenizer, stored)

    # plan and progress
    block_size = model.config.block_size
    train_stream, val_stream = TokenStream(shards.train, block_size), TokenStream(shards.val, block_size)
    if config.eval_every:
        n_val_windows(val_stream, config.val_tokens)      # raises now rather than at the first validation
    plan = make_plan(config, block_size, train_stream.n_windows, runtime.world_size)
    if stored and config.warmup_steps is None:        # its default depends on max_steps, which wsd may raise
        plan = replace(plan, warmup_steps=stored["resolved"].get("warmup_steps", plan.warmup_steps))
    progress = Progress(step=0, last_step=plan.max_steps)
    if stored:
        checkpoint.check_same_run(config, stored, requested_shape(config), fingerprint, plan)
        progress = Progress(stored["step"], checkpoint.final_step(config, stored, plan), stored["best_val_loss"])
    if saves:
        checkpoint.check_disk(config, model.n_params(), plan.max_steps, runtime)

    # micro-batch, compile, DDP, optimizer
    wanted_rows = checkpoint.adopt_resolved(config, runtime, stored, plan.local_windows)   # sets dtype and threads
    model.to(runtime.device).train()
    model.recompute = config.recompute
    compiled, ddp, choices = compile_and_wrap(model, plan, config, runtime, wanted_rows)
    optimizer, scaler = make_optimizer(model, config, runtime), runtime.grad_scaler()
    resolved = dict(choices, device=runtime.device.type, hardware=runtime.hardware.name, torch=str(torch.__version__),
                    dtype=runtime.dtype_name, world_size=runtime.world_size, threads=torch.get_num_threads(),
                    max_steps=plan.max_steps, warmup_steps=plan.warmup_steps, decay_start=decay_start(plan),
                    hellaswag_every=choose_hellaswag(config, runtime, tokenizer, stored))
    run = Run(plan, shards, fingerprint, tokenizer, train_stream, val_stream, model, compiled, ddp, optimizer, scaler,
              choices["micro_batch_size"], resolved, checkpoint.provenance())
    if stored:
        # Load the optimizer's state last, so that it does not take up GPU memory during the micro-batch search. It
        # goes straight to the devices, because a node's RAM may not hold one copy per rank.
        checkpoint.restore_optimizer(run, runtime.broadcast(lambda: {**full_checkpoint, "model": None}, on_device=True))
    print_banner(run, config, runtime, stored, saves)
    return run, progress


def requested_shape(config):
    """Return the model shape that the flags ask for; None stands for what --init_from decides."""
    named = GPT2_SIZES.get(config.model) or {n: getattr(config, n) for n in ("n_layer", "n_head", "n_embd")}
    shape = dict(named, block_size=config.block_size)
    if config.init_from == "scratch":
        shape = {name: getattr(GPTConfig, name) if value is None else value for name, value in shape.items()}
    return shape


def make_model(config, runtime, tokenizer, stored):
    """Return the GPT: that of the stored checkpoint, a new one, or --init_from's. Raises UserError for the flags."""
    if stored:
        return build_model(stored["config"], stored["model"], f"the checkpoint in {checkpoint.resume_source(config)}")
    shape = requested_shape(config)
    if config.init_from == "scratch":
        seed_everything(config.seed, "initial weights")
        vocab_size = padded_vocab(tokenizer.n_vocab)
        try:
            return GPT(GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **shape))
        except ValueError as error:
            raise UserError(f"the model's flags: {error}") from error
    initial = runtime.broadcast(lambda: open_weights(config.init_from, tokenizer, config.tokenizer))
    model = build_model({**initial["config"], "dropout": config.dropout}, initial["model"], config.init_from)
    if shape["block_size"] and shape["block_size"] < model.config.block_size:
        model.crop_block_size(shape["block_size"])
    for name, value in shape.items():
        if value not in (None, getattr(model.config, name)):
            raise UserError(f"--{name} {value}, but {config.init_from} has {getattr(model.config, name)}; leave it out")
    return model


def choose_hellaswag(config, runtime, tokenizer, stored):
    """Return the steps between HellaSwag evaluations: as the flag says, as the run began, or what is possible here."""
    if config.hellaswag_every is not None:
        return config.hellaswag_every
    every = stored["resolved"].get("hellaswag_every", HELLASWAG_EVERY) if stored else HELLASWAG_EVERY
    if every and tokenizer.name != "gpt2":
        runtime.print(f"no HellaSwag: its published scores are for GPT-2's vocabulary, not for {tokenizer.name} "
                      "(--hellaswag_every N evaluates it all the same)")
        return 0
    try:
        if every:
            runtime.broadcast(fetch_hellaswag)
    except UserError:
        runtime.print(f"no HellaSwag: {DATA_FILE} is missing and cannot be downloaded now")
        return 0
    return every


def compile_and_wrap(model, plan, config, runtime, wanted_rows):
    """Choose attention and compilation, wrap the model in DDP, find its micro-batch: return (compiled, ddp, choices).

    wanted_rows: rows per micro-batch, 0 to search for them. Raises UserError if none fits or the device lacks a thing.
    """
    attention = runtime.on_all_ranks(
        lambda: device.attention_backend(config.attention, runtime.device, runtime.dtype, model.config))
    compile, notice = runtime.on_all_ranks(
        lambda: device.choose_compile(config.compile, runtime.hardware, runtime.device))
    if notice:
        runtime.print(notice)
    if runtime.sum(compile)[0] < runtime.world_size:      # all ranks must enter the same collectives
        if compile:
            runtime.print("torch.compile is off: it does not work on another rank")
        compile = False

    def validate_zeros(compiled, size):
        x, y = (torch.zeros(size, model.config.block_size, dtype=torch.long, device=runtime.device) for _ in range(2))
        model.eval()
        try:
            with torch.no_grad(), runtime.autocast():
                compiled(x, y, reduction="sum")
        finally:
            model.train()

    def wrap(compile):
        compiled = torch.compile(model, dynamic=False) if compile else model
        # The compiled model must first run inside DDP. DDP splits the graph at its bucket boundaries, so that gradients
        # are reduced while earlier layers are still in their backward pass, but it can split only a graph that is
        # compiled during DDP's own forward pass.
        ddp = runtime.data_parallel(compiled)
        size = device.find_micro_batch_size(ddp, model.config.block_size, wanted_rows, plan.local_windows, runtime,
                                            insist=bool(config.micro_batch_size), compiled=compile)
        if compile and config.eval_every:      # validation has a graph of its own
            device.check_compilation(lambda: validate_zeros(compiled, size), runtime)
        return compiled, ddp, dict(attention=attention, compile=compile, micro_batch_size=size)
    if compile:
        runtime.print("compiling: a minute or two, unless it is in the cache")
    if compile and runtime.device.type == "cpu":      # inductor's C++ adds up this gradient token by token: slow
        model.transformer.wte.forward = torch.compiler.disable(model.transformer.wte.forward)
    try:
        return wrap(compile)
    except device.CompilationFailed as error:
        if config.compile == "on":
            raise UserError(f"--compile on: the model cannot be compiled here ({error}); use --compile off") from error
        runtime.print(f"torch.compile is off: the model cannot be compiled here ({error})")
    # Outside of the except block, where the traceback would keep the first DDP and its buckets, 4 bytes a parameter.
    gc.collect()
    return wrap(compile=False)


def warm_up(run, runtime):
    """Run two forward and backward passes on dummy tokens, and set runtime.slow_steps."""
    device.keep_freed_memory(runtime.device)
    x, y = device.dummy_rows(run.micro_batch_size, run.raw_model.config.block_size, runtime.device)    # (B, T) each
    # The first pass compiles and reduces gradients. DDP then rebuilds its buckets, once, at the start of the next
    # forward pass, and from then on sums in another order: a resumed run must not take its first step in the old one.
    # The second pass runs with the new buckets. It is timed, since it does not compile, and reduces nothing, so that
    # its time does not include waiting for other ranks.
    for reduced in (True, False):
        start_time = time.perf_counter()
        with nullcontext() if reduced or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                loss = run.ddp(x, y)
            run.scaler.scale(loss).backward()
        loss.item()                                   # wait for the device
    run.optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - start_time) * run.plan.local_windows / run.micro_batch_size
    # The mean over ranks, since all of them must decide alike: check_for_stop is a collective.
    runtime.slow_steps = runtime.sum(seconds)[0] / runtime.world_size > SLOW_STEP_S


# ---- one training step -------------------------------------------------------

def train_step(run, config, runtime, tokens, step):
    """Train on this rank's tokens (local_windows, T + 1) of a step; return a StepResult, the same on all ranks.

    Raises StopRequested with the weights untouched if steps are slow and a rank was asked to stop.
    """
    # Every step seeds the generators with (seed, step, rank): dropout repeats after a resume without any saved state.
    seed_everything(config.seed, "step", step, runtime.rank)
    micro_batches = tokens.split(run.micro_batch_size)
    loss = 0.0
    for i, rows in enumerate(micro_batches):
        x, y = rows[:, :-1], rows[:, 1:]                                               # (B, T) each
        final = i + 1 == len(micro_batches)
        # Gradients are averaged over ranks once a step, in its last micro-batch. no_sync holds the forward pass too:
        # there, not in backward, DDP decides whether this backward pass will reduce.
        with nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                # backward() adds up gradients; dividing here makes the sum the gradient of the mean over the step.
                micro_loss = run.ddp(x, y) / len(micro_batches)
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()             # reading it here would make the GPU wait
        if runtime.slow_steps and not final:
            runtime.check_for_stop()                  # a stop abandons the step: no weight has changed yet
    # Clip, update the weights or skip, zero the gradients. Its one all-reduce shares the loss and any stop signal.
    return finish_step(run.raw_model, run.optimizer, run.scaler, config.grad_clip, loss, runtime)


# ---- evaluation ---------------------------------------------------------

@torch.no_grad()
def validate(run, config, runtime):
    """Return (mean loss in nats, tokens, their bytes) over the first val_tokens of the val split. Raises StopRequested.

    The end-of-text token counts as a token of 0 bytes.
    """
    n_windows = n_val_windows(run.val_stream, config.val_tokens)
    lengths, n_rows = torch.from_numpy(run.tokenizer.byte_lengths), run.raw_model.config.vocab_size
    # 0 for rows of padding, and last for IGNORED
    byte_lengths = nn.functional.pad(lengths, (0, n_rows + 1 - len(lengths))).to(runtime.device)
    loss, n_tokens, n_bytes = torch.zeros((), device=runtime.device), 0, 0
    run.raw_model.eval()
    batches = val_batches(run.val_stream, n_windows, run.micro_batch_size, runtime)
    for x, y in tqdm(batches, "validation", unit="batch", leave=False, disable=None if runtime.is_main else True):
        with runtime.autocast():
            loss = loss + run.compiled(x, y, reduction="sum")
        n_tokens += int((y != IGNORED).sum())
        n_bytes += int(byte_lengths[y].sum())
        runtime.check_for_stop()
    run.raw_model.train()
    # Sum over ranks, then divide: a mean of means would give too much weight to ranks whose last batch is padding.
    loss, n_tokens, n_bytes = runtime.sum(loss, n_tokens, n_bytes)
    return loss / n_tokens, int(n_tokens), int(n_bytes)


def due(step, every, last=False):
    """Return True at every multiple of `every` (0: never) and, if `last`, at the last step."""
    return every > 0 and (step % every == 0 or last)


# ---- the loop ----------------------------------------------------------------

def loop(run, progress, config, runtime, log, hellaswag):
    """Train from progress.step to progress.last_step. hellaswag: its prepared questions, None if it is never due.

    Raises StopRequested, and RunFailed if too many updates were skipped or the last checkpoint cannot be written.
    """
    first_step = progress.step
    # The tokens of step s are a function of (seed, s), so the loader has no state to save: it can start at any step.
    loader = TrainLoader(DataOrder(run.train_stream, config.seed), run.plan.windows_per_step, runtime, first_step,
                         progress.last_step)
    hellaswag_tokens = min(HELLASWAG_TOKENS, run.micro_batch_size * run.raw_model.config.block_size)
    with closing(loader):
        # Iteration k evaluates and saves the weights after k steps, then trains step k. One more, k = last_step, only
        # evaluates and saves: a new run makes max_steps + 1 iterations, and the same lines take care of the final
        # weights. Evaluation comes before the step, so that a resumed run, whose logs are cut back to step k, measures
        # exactly what the checkpoint holds.
        while True:
            runtime.raise_if_stopping()               # the last all-reduce has told all ranks
            step, last = progress.step, progress.step == progress.last_step

            # once in a while: validation loss (all ranks take part)
            if due(step, config.eval_every, last):
                with log.timed("validation", config.eval_every):
                    progress.val_loss, n_tokens, n_bytes = validate(run, config, runtime)
                    log.validation(step, progress.val_loss, n_tokens, n_bytes)
                    checkpoint.save_best(run, progress, config, runtime)

            # once in a while: HellaSwag (all ranks take part), with raw_model, not compiled: lengths vary here and in
            # samples, and the compiled model would compile for each.
            if due(step, run.resolved["hellaswag_every"], last):
                with log.timed("HellaSwag", run.resolved["hellaswag_every"]):
                    log.hellaswag(step, evaluate_hellaswag(run.raw_model, hellaswag, runtime, hellaswag_tokens))

            # once in a while: sample text (rank 0 only; the others wait for it in their next collective)
            if due(step, config.sample_every, last):
                with log.timed("samples", config.sample_every):
                    log.samples(step, write_samples(run, config, runtime, step))

            # once in a while: a checkpoint, but not of the weights we started from, unless there is nothing to train
            retry = progress.save_failed and step % checkpoint.RETRY_STEPS == 0
            if last or (step > first_step and (due(step, config.checkpoint_every) or retry)):
                with log.timed("checkpoint", config.checkpoint_every):
                    checkpoint.save(run, progress, config, runtime, finished=last)
            if last:
                break

            # one training step; evaluation and saving are outside its clock
            log.start_clock()
            tokens, data_wait_s = loader.next_step()  # of this step: the loader, too, has started at first_step
            lr = set_learning_rate(run, config, step)
            result = train_step(run, config, runtime, tokens, step)
            log.train(step, result, lr, run.plan.tokens_per_step, data_wait_s)
            skip_reason = progress.skipped.record(result, run.scaler)
            if skip_reason:
                log.skipped(step, skip_reason, loader.windows_of_step(step))
            progress.skipped.check()                  # ends the run after ten in a row
            if result.finite and result.loss < config.stop_loss:
                progress.last_step = step + 1         # evaluate and save once more, then end
            if step == first_step:
                runtime.first_step_done()             # the slow start is over: shorten the time-outs
            progress.step, progress.val_loss = step + 1, None      # val_loss was that of the weights before the step


# ---- main --------------------------------------------------------------------

def prepare(run, progress, config, runtime, limit=0):
    """Warm up; return (HellaSwag or None if it is never due, the RunLog of this start). limit: HellaSwag items."""
    hellaswag = None
    if run.resolved["hellaswag_every"]:
        try:
            hellaswag = prepare_hellaswag(runtime, run.tokenizer, run.raw_model.config.block_size, limit=limit)
        except UserError as error:
            raise UserError(f"{error}, or use --hellaswag_every 0") from error
    warm_up(run, runtime)
    runtime.setup_done()
    tokens = progress.step * run.plan.tokens_per_step    # the log, opened last, cuts its files back to this step
    log = RunLog(progress, config, runtime, config.log_dir, "train", tokens, run.raw_model.flops_per_token())
    return hellaswag, log


def train(config, runtime):
    """Start a run, or resume it from a checkpoint; train to its end, or until a stop. Raises UserError, RunFailed."""
    with lock_folder(config.log_dir, runtime):
        try:
            run, progress = set_up(config, runtime)
        except checkpoint.AlreadyFinished as notice:
            runtime.print(notice)
            return
        first_step = progress.step
        try:
            hellaswag, log = prepare(run, progress, config, runtime)
            with closing(log):
                try:
                    loop(run, progress, config, runtime, log, hellaswag)
                except StopRequested:       # all ranks take part in the save; closing the log may wait for MLflow
                    if progress.step > first_step:
                        checkpoint.save(run, progress, config, runtime)
                    raise
            path = checkpoint.checkpoint_path(config.log_dir, progress.step)
            prompt = example_prompt(run.tokenizer)
            runtime.print(f"finished: {path}\nnext: {command('plot.py', config.log_dir)}\n"
                          f"      {command('inference.py', '--checkpoint', path, '--prompt', prompt)}")
        except StopRequested:
            runtime.print(checkpoint.stop_message(progress))


def dry_run(config, runtime):
    """Try two steps, an evaluation, a save and a load in a temporary folder; report what the full run would take."""
    with temporary_folder(runtime, config.log_dir) as folder:
        small = with_changes(config, max_steps=2, num_epochs=None, warmup_steps=None, stop_loss=0.0, resume="auto",
                             log_dir=folder, mlflow=False, val_tokens=min(config.val_tokens, config.total_batch_size))
        run, progress = set_up(small, runtime)
        try:
            hellaswag, log = prepare(run, progress, small, runtime, DRY_RUN_ITEMS)
            with closing(log):
                loop(run, progress, small, runtime, log, hellaswag)
        except StopRequested:
            runtime.print("the dry run was stopped")
            raise SystemExit(130)
        checkpoint.restore_optimizer(
            run, runtime.broadcast(lambda: checkpoint.find_checkpoint(small, runtime.print), on_device=True))
        shares = dict(HellaSwag=DRY_RUN_ITEMS / N_EXAMPLES)      # of a full evaluation that were done here
        if config.eval_every:
            n_small, n_full = (n_val_windows(run.val_stream, c.val_tokens) for c in (small, config))
            shares["validation"] = n_small / n_full
        plan = make_plan(config, run.raw_model.config.block_size, run.train_stream.n_windows, runtime.world_size)
        disk = checkpoint.disk_bytes(config, run.raw_model.n_params(), plan.max_steps)
        runtime.print(log.forecast(plan.max_steps, disk, config.dollars_per_hour, **shares))


def main(argv=None):
    """Train as the flags (sys.argv, or argv) say, or try it with --dry_run. Raises UserError for user mistakes."""
    config = parse_config(TrainConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        if config.dry_run:
            dry_run(config, runtime)
        else:
            train(config, runtime)


if __name__ == "__main__":
    run_script(main)
