"""Pretrain GPT-2 on token shards.

    python train.py --data_dir data/demo --log_dir logs/demo ...      # one process: a GPU, or a CPU
    torchrun --nproc_per_node=8 train.py                              # GPT-2 124M on 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train.py --device cpu ...             # two CPU processes (gloo)

Killed, preempted or crashed: the same command continues from the newest checkpoint in --log_dir.
"""
import dataclasses
import gc
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from exactgpt.checkpoint import (
    adopt_choices,
    advised,
    check_disk,
    check_same_run,
    checkpoint_path,
    code_hash,
    delete_old,
    find_checkpoint,
    last_step,
    provenance,
    source,
    write_checkpoint,
)
from exactgpt.config import DeviceConfig, RunFailed, UserError, as_user_error, flag, parse_config, replace, run_script
from exactgpt.dataloader import DataOrder, TokenStream, TrainLoader, n_val_windows, val_batches
from exactgpt.device import (
    CompilationFailed,
    attention_backend,
    choose_compile,
    dummy_rows,
    find_micro_batch_size,
    keep_freed_memory,
    returning_freed_memory,
)
from exactgpt.distributed import STEADY_TIMEOUT_S, StopRequested, lock_folder, seed_everything, start, temporary_folder
from exactgpt.generation import write_samples
from exactgpt.launch import command_line
from exactgpt.metrics import RunLog, describe, require_mlflow
from exactgpt.open_model import build_model, open_weights
from exactgpt.optimizer import Skipped, decay_start, finish_step, learning_rate_factor, make_optimizer
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import Tokenizer
from hellaswag import N_EXAMPLES, evaluate_hellaswag, prepare_hellaswag
from model import GPT, GPT2_SIZES, IGNORED, GPTConfig, padded_vocab

HELLASWAG_TOKENS = 8192    # of a batch, at most
DRY_RUN_ITEMS = 200        # of HellaSwag's 10,042
RETRY_STEPS = 10           # between tries to write a checkpoint that a full disk refused
SLOW_STEP_S = 5            # in a longer step a stop is looked for after each micro-batch
TOKENS_PER_STEP = 524288   # 2^19: the 0.5M of the GPT-3 paper's smallest model
MAX_STEPS = 19073          # 10B tokens in such steps
WARMUP_STEPS = 715         # 375M tokens (GPT-3 paper)


@dataclass(kw_only=True)
class TrainConfig(DeviceConfig):
    """Every flag of train.py. The defaults are the GPT-2 124M run; keep=True: a resumed run must have the same."""
    data_dir: str = flag("data/edu_fineweb10B", "folder of token shards", group="data")

    model: str | None = flag(None, "GPT-2 size (default: gpt2)", group="model", choices=tuple(GPT2_SIZES))
    n_layer: int | None = flag(None, "layers, instead of a named size", group="model", low=1)
    n_head: int | None = flag(None, "attention heads", group="model", low=1)
    n_embd: int | None = flag(None, "channels", group="model", low=1)
    block_size: int | None = flag(None, "tokens that the model sees at once (default: 1024)", group="model", low=1)
    dropout: float = flag(0.0, "dropout probability", group="model", low=0.0, below=1.0, keep=True)
    init_from: str = flag("scratch", "where the weights begin: scratch, a GPT-2 name, a Hugging Face folder, FILE.pt",
                          group="model")

    total_batch_size: int = flag(TOKENS_PER_STEP, "tokens per optimizer step, all processes together", group="batch",
                                 low=1, keep=True)
    micro_batch_size: int = flag(0, "rows per forward pass of a process; 0: as many as fit", group="batch", low=0)

    max_steps: int | None = flag(None, f"optimizer steps (default: {MAX_STEPS})", group="length", low=0)
    num_epochs: float | None = flag(None, "passes over the train split, instead of max_steps", group="length", above=0)
    stop_loss: float = flag(0.0, "stop once a step's training loss is below this; 0: never", group="length", low=0.0)

    schedule: str = flag("cosine", "cosine to min_lr, or warm-up, stable, linear decay", group="schedule",
                         choices=("cosine", "wsd"), keep=True)
    max_lr: float = flag(6e-4, "peak learning rate", group="schedule", above=0, keep=True)
    min_lr: float = flag(6e-5, "learning rate at the end", group="schedule", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, f"steps of linear warm-up (default: {WARMUP_STEPS}, or a tenth of a short "
                                    "run)", group="schedule", low=0)

    optimizer: str = flag("adamw", "adamw, or muon for the matrices inside the blocks and adamw for the rest",
                          group="optimizer", choices=("adamw", "muon"), keep=True)
    muon_lr: float = flag(0.02, "Muon's peak learning rate, same schedule", group="optimizer", above=0, keep=True)
    muon_weight_decay: float = flag(0.01, "Muon's", group="optimizer", low=0.0, keep=True)
    weight_decay: float = flag(0.1, "of matrices; vectors do not decay", group="optimizer", low=0.0, keep=True)
    beta1: float = flag(0.9, "AdamW's", group="optimizer", low=0.0, below=1.0, keep=True)
    beta2: float = flag(0.95, "AdamW's", group="optimizer", low=0.0, below=1.0, keep=True)
    adam_eps: float = flag(1e-8, "AdamW's", group="optimizer", above=0, keep=True)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", group="optimizer", low=0.0, keep=True)

    eval_every: int = flag(250, "steps between validations; 0: never", group="evaluation", low=0)
    val_tokens: int = flag(10485760, "tokens of a validation, always the same ones", group="evaluation", low=1)
    hellaswag_every: int = flag(250, "steps between HellaSwags; 0: never", group="evaluation", low=0)
    sample_every: int = flag(250, "steps between samples; 0: never", group="evaluation", low=0)

    log_dir: str = flag("logs", "folder of checkpoints and logs", group="checkpoints")
    checkpoint_every: int = flag(1000, "steps between checkpoints; 0: only at the end", group="checkpoints", low=0)
    keep_checkpoints: int = flag(3, "how many of the newest stay", group="checkpoints", low=1)
    resume: str = flag("auto", "auto: go on from the newest checkpoint in log_dir; never; or FILE.pt",
                       group="checkpoints")

    compile: str = flag("auto", "torch.compile; auto: on CUDA where it works", group="system",
                        choices=("auto", "on", "off"))
    attention: str = flag("auto", "backend of scaled_dot_product_attention", group="system",
                          choices=("auto", "flash", "cudnn", "efficient", "math"))
    seed: int = flag(1337, "of initial weights, data order, dropout", group="system", low=0, keep=True)
    recompute: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time",
                           group="system")
    deterministic: bool = flag(False, "bitwise repeatable on a GPU too, and slower", group="system")
    timeout: float = flag(float(STEADY_TIMEOUT_S), "seconds without progress after which several processes end and say "
                          "which of them hangs; more than the longest save", group="system", above=0)
    mlflow: bool = flag(False, "mirror the run in a local MLflow store in log_dir", group="system")
    dry_run: bool = flag(False, "try two steps, an evaluation, a save and a load; say what the full run takes",
                         group="system")

    def check(self):
        """Raise UserError for flags that contradict each other."""
        shape = [n for n in ("n_layer", "n_head", "n_embd") if getattr(self, n) is not None]
        if self.model and shape:
            raise UserError(f"--model {self.model} and --{shape[0]} exclude each other")
        if self.max_steps is not None and self.num_epochs is not None:
            raise UserError("--max_steps and --num_epochs exclude each other")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")
        if self.mlflow:
            require_mlflow()


# -----------------------------------------------------------------------------
# set-up

@dataclass(frozen=True)
class Plan:
    """How many of what. A window is a row of block_size tokens with its targets."""
    max_steps: int
    warmup_steps: int
    windows_per_step: int      # n, over all ranks
    local_windows: int         # n / world_size
    tokens_per_step: int
    epochs: float              # passes over the train split in max_steps


@dataclass
class Run:
    """What the loop works with."""
    plan: Plan
    folder: ShardFolder
    tokenizer: Tokenizer
    train_stream: TokenStream
    val_stream: TokenStream
    raw: GPT                          # the module itself: checkpoints, samples
    provenance: dict
    resolved: dict = field(default_factory=dict)   # what "auto" became
    hellaswag: object = None          # the prepared questions, where it is asked for
    compiled: object = None           # raw, compiled or not: validation
    ddp: object = None                # compiled, wrapped where there are several processes: training
    optimizer: object = None
    scaler: object = None
    micro_batch_size: int = 0
    first_step: int = 0
    last_step: int = 0                # max_steps, or sooner once stop_loss is reached
    best_val_loss: float = float("inf")
    val: tuple = (None, None)         # step and loss of the newest validation
    save_failed: bool = False         # the newest checkpoint could not be written: try again at the next step
    skipped: Skipped = field(default_factory=Skipped)
    slow: bool = False                # a step lasts so long that a stop is looked for after each micro-batch


def assemble(config, runtime, saves=True):
    """The Run that the loop needs, checked; None where it is finished already. `warm_up` comes next.

    saves: checkpoints will be written, for which the disk must have room. Raises UserError for data, flags,
    checkpoints, weights or disks that do not go together.
    """
    folder = runtime.on_all_ranks(lambda: ShardFolder(config.data_dir))
    tokenizer = runtime.on_all_ranks(lambda: folder.tokenizer(config.tokenizer))
    runtime.on_all_ranks(lambda: folder.check_vocabulary(tokenizer.n_vocab))
    runtime.require_equal("flags", asdict(config))
    runtime.require_equal("code", code_hash())
    runtime.require_equal("token shards", folder.fingerprint())
    found = runtime.on_all_ranks(lambda: find_checkpoint(config, runtime.print) if runtime.is_main else None)
    checkpoint = runtime.broadcast(lambda: found and {**found, "optimizer": None}, on_device=True)
    raw = make_model(config, runtime, tokenizer, checkpoint)
    block_size = raw.config.block_size
    train_stream, val_stream = TokenStream(folder.train, block_size), TokenStream(folder.val, block_size)
    if config.eval_every:
        n_val_windows(val_stream, config.val_tokens)      # a split without one full window is an error now
    plan = make_plan(config, block_size, train_stream.n_windows, runtime.world_size)
    if checkpoint and config.warmup_steps is None:  # derived from the length, which a wsd run may change
        plan = dataclasses.replace(plan, warmup_steps=checkpoint["resolved"].get("warmup_steps", plan.warmup_steps))
    run = Run(plan, folder, tokenizer, train_stream, val_stream, raw, provenance(), last_step=plan.max_steps)
    if checkpoint:
        check_same_run(config, checkpoint, requested_shape(config), folder.fingerprint(), plan)
        run.last_step = last_step(config, checkpoint, plan)
        if checkpoint["finished"] and checkpoint["step"] >= run.last_step:
            runtime.print(f"the run in {source(config)} is finished, at step {checkpoint['step']}; to train its model "
                          f"further: --init_from {advised(config, checkpoint['step'])} --log_dir NEW")
            return None
        run.first_step, run.best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
    if saves:
        check_disk(config, run, runtime)
    run.micro_batch_size = adopt_choices(config, runtime, checkpoint, plan.local_windows)
    raw.to(runtime.device).train()
    raw.recompute = config.recompute
    build(run, config, runtime)
    if checkpoint:
        # Rank 0's copy is the only one in host memory: the others get tensor after tensor on their cards, and the
        # optimizer's only now, so that they did not lie there while the micro-batch was sought.
        restore(run, runtime.broadcast(lambda: state_to_restore(found), on_device=True))
    describe(run, config, runtime, checkpoint, saves)
    return run


def make_plan(config, block_size, n_windows, world_size):
    """The Plan of a run over a train split of n_windows. Raises UserError that names numbers that work."""
    unit = block_size * world_size
    total = config.total_batch_size
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = " or ".join(f"{v:,}".replace(",", "") for v in (below, above) if v)
        raise UserError(f"--total_batch_size {total} is not a multiple of block_size x processes = {block_size} x "
                        f"{world_size}; use {nearest}")
    if n_windows < 1:
        raise UserError(f"the train split holds no full window of {block_size} tokens; use more text, or a smaller "
                        "--block_size")
    n = total // block_size
    max_steps = config.max_steps if config.max_steps is not None else MAX_STEPS
    if config.num_epochs is not None:
        exact = Fraction(str(config.num_epochs)) * n_windows  # as typed: in floating point 0.29 of 100 is less than 29
        max_steps = math.floor(exact / n)
        if max_steps < 1:
            largest = math.floor(exact / world_size) * unit
            advice = f"the largest --total_batch_size is {largest}" if largest else "use more text or more epochs"
            raise UserError(f"--num_epochs {config.num_epochs:g} of {n_windows * block_size:,} tokens holds no step of "
                            f"{total:,} tokens; {advice}")
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(WARMUP_STEPS, max_steps // 10)
    elif max_steps and warmup_steps > max_steps:
        raise UserError(f"--warmup_steps {warmup_steps} is longer than the run of {max_steps} steps")
    return Plan(max_steps, warmup_steps, n, n // world_size, total, max_steps * n / n_windows)


def requested_shape(config):
    """The shape that the flags ask for; None stands for what they leave to the weights of --init_from."""
    named = GPT2_SIZES.get(config.model) or {n: getattr(config, n) for n in ("n_layer", "n_head", "n_embd")}
    shape = dict(named, block_size=config.block_size)
    if config.init_from == "scratch":
        shape = {name: getattr(GPTConfig, name) if value is None else value for name, value in shape.items()}
    return shape


def make_model(config, runtime, tokenizer, checkpoint):
    """The checkpoint's model, on the device of a rank that did not read it; or on the CPU a fresh one, or that of
    --init_from.

    Raises UserError for a shape that cannot be, or that those weights do not have.
    """
    if checkpoint:
        return build_model(checkpoint["config"], checkpoint["model"], f"the checkpoint in {source(config)}")
    shape = requested_shape(config)
    if config.init_from == "scratch":
        seed_everything(config.seed, "initial weights")
        vocab_size = padded_vocab(tokenizer.n_vocab)
        return as_user_error(lambda: GPT(GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **shape)),
                       "the model's flags")
    stored = runtime.broadcast(lambda: open_weights(config.init_from, tokenizer, config.tokenizer))
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if shape["block_size"] and shape["block_size"] < model.config.block_size:
        model.crop_block_size(shape["block_size"])
    for name, value in shape.items():
        if value not in (None, getattr(model.config, name)):
            raise UserError(f"--{name} {value}, but {config.init_from} has {getattr(model.config, name)}; leave it out")
    return model


def build(run, config, runtime):
    """Attention, compilation, DDP, the micro-batch that fits what then runs; optimizer and scaler.

    Raises UserError where --compile on or --attention asks for what the device lacks, or no micro-batch fits.
    """
    shape = run.raw.config
    attention = runtime.on_all_ranks(lambda: attention_backend(config.attention, runtime.device, runtime.dtype, shape))
    compile, notice = runtime.on_all_ranks(lambda: choose_compile(config.compile, runtime.hardware, runtime.device))
    if notice:
        runtime.print(notice)
    try:
        wrap(run, config, runtime, compile)
    except CompilationFailed as error:
        if config.compile == "on":
            raise UserError(f"--compile on: the model cannot be compiled here ({error}); use --compile off") from error
        runtime.print(f"torch.compile is off: the model cannot be compiled here ({error})")
        compile, run.compiled, run.ddp = False, None, None
    if run.ddp is None:
        gc.collect()      # the first DDP and its buckets, 4 bytes a parameter
        wrap(run, config, runtime, compile)
    run.optimizer = make_optimizer(run.raw, config, runtime)
    run.scaler = runtime.grad_scaler()
    run.resolved = dict(device=runtime.device.type, hardware=runtime.hardware.name, torch=str(torch.__version__),
                        dtype=runtime.dtype_name, compile=compile, attention=attention,
                        micro_batch_size=run.micro_batch_size, world_size=runtime.world_size,
                        threads=torch.get_num_threads(), max_steps=run.plan.max_steps,
                        warmup_steps=run.plan.warmup_steps, decay_start=decay_start(run.plan))


def wrap(run, config, runtime, compile):
    """The model compiled, or not, and in DDP, and the micro-batch that fits it. Raises CompilationFailed, UserError.

    Nothing runs the compiled model before DDP does: torch cuts its graph where DDP's buckets end, so that gradients
    are reduced while the layers before them still compute, but only if DDP's first forward pass is what compiles it.
    """
    if compile and runtime.device.type == "cpu":  # inductor's C++ adds its gradient up word by word: a fifth of a step
        run.raw.transformer.wte.forward = torch.compiler.disable(run.raw.transformer.wte.forward)
    run.compiled = torch.compile(run.raw, dynamic=False) if compile else run.raw
    run.ddp = runtime.data_parallel(run.compiled)
    run.micro_batch_size = find_micro_batch_size(
        run.ddp, run.raw.config.block_size, run.micro_batch_size, run.plan.local_windows, runtime,
        insist=bool(config.micro_batch_size), gpt=run.raw)


def state_to_restore(checkpoint):
    """What `restore` needs of a checkpoint."""
    return {name: checkpoint[name] for name in ("optimizer", "scaler")}


def restore(run, state):
    """Put the optimizer's and scaler's state back. Raises UserError for states that do not fit the model."""
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if run.scaler.is_enabled() and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit the model ({error})") from error


def warm_up(run, runtime):
    """Two forward/backwards on dummy tokens through the final model, the first one synchronised.

    Compiles, proves that the micro-batch fits, and lets DDP rebuild its buckets: after that the order of its sums
    stays, so that a resumed run adds up as the first one did. The second one tells whether steps are slow.
    """
    keep_freed_memory(runtime.device)
    if run.resolved["compile"]:
        runtime.print("compiling: a minute or two, where it is not in the cache")
    x, y = dummy_rows(run.micro_batch_size, run.raw.config.block_size, runtime.device)    # (B, T) each
    for sync in (True, False):
        start_time = time.perf_counter()
        with nullcontext() if sync or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                loss = run.ddp(x, y)
            run.scaler.scale(loss).backward()
        loss.item()
    run.optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - start_time) * run.plan.local_windows / run.micro_batch_size
    run.slow = runtime.sum(seconds)[0] / runtime.world_size > SLOW_STEP_S


# -----------------------------------------------------------------------------
# one training step

def train_step(run, config, runtime, tokens, step):
    """One optimizer step on this rank's rows, tokens (local_windows, T + 1): a StepResult, the same on all ranks.

    Raises StopRequested, with the weights untouched, where steps are slow and a rank was asked to stop.
    """
    seed_everything(config.seed, "step", step, runtime.rank)                           # dropout
    micro_batches = tokens.split(run.micro_batch_size)
    loss = 0.0
    for i, rows in enumerate(micro_batches):
        x, y = rows[:, :-1], rows[:, 1:]                                               # (B, T) each
        final = i + 1 == len(micro_batches)
        # Forward and backward both inside no_sync: DDP decides in the forward pass whether gradients are reduced.
        with nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                micro_loss = run.ddp(x, y) / len(micro_batches)
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()
        if run.slow and not final:
            runtime.check_for_stop()                                                   # a stop abandons the step
    return finish_step(run.raw, run.optimizer, run.scaler, config.grad_clip, loss, runtime)


def set_learning_rate(run, config, step):
    """Set the learning rates of a step, each group's peak times one factor; returns AdamW's."""
    factor = learning_rate_factor(step, run.plan, config.schedule, config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.max_lr * factor


def check_finite(run, log, result, step, loader):
    """Log a step whose update was skipped. Raises RunFailed after too many in a row."""
    reason = run.skipped.count(result, run.scaler)
    if reason:
        log.skipped(step, reason, loader.windows_of_step(step))
    run.skipped.check()


# -----------------------------------------------------------------------------
# evaluation and checkpoints

@torch.no_grad()
def validate(run, config, runtime, log, step):
    """Log the mean loss over the first val_tokens of the val split, and keep the best model so far.

    Raises StopRequested if a rank was asked to stop meanwhile.
    """
    n_windows = n_val_windows(run.val_stream, config.val_tokens)
    loss, count = torch.zeros((), device=runtime.device), 0
    run.raw.eval()
    batches = val_batches(run.val_stream, n_windows, run.micro_batch_size, runtime)
    for x, y in tqdm(batches, "validation", unit="batch", leave=False, disable=None if runtime.is_main else True):
        with runtime.autocast():
            loss = loss + run.compiled(x, y, reduction="sum")
        count += int((y != IGNORED).sum())
        runtime.check_for_stop()
    run.raw.train()
    loss, count = runtime.sum(loss, count)
    mean = loss / count
    run.val = step, mean
    log.validation(step, mean, int(count))
    best = Path(config.log_dir) / "model_best.pt"
    if mean < run.best_val_loss and (step == 0 or write_checkpoint(runtime, best, model_entries(run, step))):
        run.best_val_loss = mean


def hellaswag_tokens(run):
    """Tokens of a HellaSwag batch: no more than a training step's, so that it needs less memory."""
    return min(HELLASWAG_TOKENS, run.micro_batch_size * run.raw.config.block_size)


def model_entries(run, step):
    """The part of a checkpoint that a model is used with."""
    return dict(model=run.raw.state_dict(), config=run.raw.config_dict(), tokenizer=run.tokenizer.to_checkpoint(),
                step=step, val_loss=run.val[1] if run.val[0] == step else None)


def save(run, config, runtime, step, finished=False):
    """Write model_{step}.pt with all that a run goes on from; keep the newest few.

    Raises RunFailed where the last one of a run cannot be written; an earlier one is tried again later.
    """
    run.save_failed = not write_checkpoint(runtime, checkpoint_path(config.log_dir, step), dict(
        model_entries(run, step), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        best_val_loss=run.best_val_loss, last_step=run.last_step, train_config=asdict(config), resolved=run.resolved,
        data=run.folder.fingerprint(), finished=finished, provenance=run.provenance))
    if runtime.is_main and not run.save_failed:
        delete_old(config.log_dir, config.keep_checkpoints, step)
    if finished and run.save_failed:
        raise RunFailed(f"the last checkpoint could not be written; make room on the disk of {config.log_dir} and run "
                        "the same command: it repeats the steps since the newest checkpoint")


# -----------------------------------------------------------------------------
# the run

def loop(run, config, runtime):
    """At step k: evaluate, save, then train step k; the end is evaluated and saved by the same lines.

    A stop that was asked for saves state k, untrained. Returns the RunLog, None where a dry run was stopped. Raises
    RunFailed where too many steps were skipped, or the last checkpoint could not be written.
    """
    log = RunLog(runtime, config, run)
    loader = TrainLoader(DataOrder(run.train_stream, config.seed), run.plan.windows_per_step, runtime, run.first_step,
                         run.last_step)
    step = run.first_step
    try:
        while True:
            runtime.raise_if_stopping()
            last = step == run.last_step
            if due(step, config.eval_every, last):
                with log.pause("validation", config.eval_every):
                    validate(run, config, runtime, log, step)
            if due(step, config.hellaswag_every, last):
                with log.pause("HellaSwag", config.hellaswag_every), returning_freed_memory(runtime.device):
                    log.hellaswag(step, evaluate_hellaswag(run.raw, run.hellaswag, runtime, hellaswag_tokens(run),
                                                           progress="HellaSwag"))
            if due(step, config.sample_every, last):
                with log.pause("samples", config.sample_every):
                    log.samples(step, write_samples(run, config, runtime, step))
            if last or (step > run.first_step and save_due(run, config, step)):
                with log.pause("checkpoint", config.checkpoint_every):
                    save(run, config, runtime, step, finished=last)
            if last:
                break
            log.start_clock()
            tokens, data_wait_s = loader.next_step()
            lr = set_learning_rate(run, config, step)
            result = train_step(run, config, runtime, tokens, step)
            log.train(step, result, lr, data_wait_s)
            check_finite(run, log, result, step, loader)
            if step == run.first_step:
                runtime.first_step_done()
            if result.finite and result.loss < config.stop_loss:
                run.last_step = step + 1
            step += 1
        if not config.dry_run:
            path = checkpoint_path(config.log_dir, step)
            runtime.print(f"finished: {path}\nnext: python plot.py {config.log_dir}\n"
                          f"      python inference.py --checkpoint {path} --prompt \"...\"")
    except StopRequested:
        if config.dry_run:
            runtime.print("the dry run was stopped")
            return None
        if step > run.first_step:
            save(run, config, runtime, step)
        saved = "this step could not be saved" if run.save_failed else "nothing is lost"
        runtime.print(f"stopped before step {step}, {saved}; the same command continues:\n{command_line()}")
    finally:
        loader.close()
        log.close()
    return log


def due(step, every, last=False):
    """Whether something that happens every so many steps, and at the last one, happens now; every = 0: never."""
    return every > 0 and (step % every == 0 or last)


def save_due(run, config, step):
    """Whether a checkpoint is due, or one that a full disk refused is to be tried again."""
    return due(step, config.checkpoint_every) or (run.save_failed and step % RETRY_STEPS == 0)


def train(config, runtime, hellaswag_items=0):
    """One run, from its first step or from where it was left: (Run, RunLog); None where it was finished already or was
    stopped before its first step.

    hellaswag_items: score that many only (a dry run). Raises UserError for what does not go together, RunFailed.
    """
    with lock_folder(config.log_dir, runtime):
        run = assemble(config, runtime)
        if run is None:
            return None
        try:
            if config.hellaswag_every:
                run.hellaswag = prepare_hellaswag(runtime, run.tokenizer, run.raw.config.block_size,
                                                  limit=hellaswag_items)
            warm_up(run, runtime)
            runtime.setup_done()
        except StopRequested:
            runtime.print("stopped before the first step; there was nothing to save")
            return None
        return run, loop(run, config, runtime)


def dry_run(config, runtime):
    """Two steps, an evaluation, a save and a load in a temporary folder: what the full run would take."""
    with temporary_folder(runtime, config.log_dir) as folder:
        small = replace(config, max_steps=2, num_epochs=None, warmup_steps=None, stop_loss=0.0, resume="auto",
                        log_dir=folder, checkpoint_every=1, mlflow=False,
                        val_tokens=min(config.val_tokens, config.total_batch_size))
        run, log = train(small, runtime, DRY_RUN_ITEMS) or (None, None)
        if log:
            restore(run, runtime.broadcast(lambda: state_to_restore(find_checkpoint(small, runtime.print)),
                                           on_device=True))
            shares = dict(HellaSwag=DRY_RUN_ITEMS / N_EXAMPLES)
            if config.eval_every:
                here, there = (n_val_windows(run.val_stream, c.val_tokens) for c in (small, config))
                shares["validation"] = here / there
            plan = make_plan(config, run.raw.config.block_size, run.train_stream.n_windows, runtime.world_size)
            runtime.print(log.forecast(config, plan, shares))


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
