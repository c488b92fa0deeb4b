"""Shared by the fine-tuning scripts: flags, set-up, the training loop, and the folder and state of a run.

The loss of a step is the mean over all its targets. Each micro-batch of each rank adds its summed loss divided by the
number of targets in the whole step, so without dropout the gradient is the same, up to rounding, for any micro-batch
size and number of processes.
Shapes: B rows of a batch, T tokens.
"""
from exactgpt.launch import command_line

import contextlib
import dataclasses
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt.checkpoint import changed_flags, read_checkpoint, restore_optimizer, save_checkpoint, weights_hash
from exactgpt.config import RunConfig, RunFailed, UserError, flag, with_changes
from exactgpt.device import find_micro_batch_size
from exactgpt.distributed import StopRequested, lock_folder, seed_everything, temporary_folder
from exactgpt.finetune_data import Example, empty_batch, evaluation_batches, hash_examples, make_batches
from exactgpt.lora import add_adapter
from exactgpt.metrics import TuneLog, require_mlflow
from exactgpt.open_model import build_model, open_model
from exactgpt.optimizer import SkippedSteps, finish_step, learning_rate_factor, parameter_groups
from exactgpt.shards import permutation
from exactgpt.tokenizer import Tokenizer, from_checkpoint
from model import IGNORED

STATE_NAME = "state.pt"  # in --out: what a run resumes from


@dataclass(kw_only=True)
class TuneConfig(RunConfig):
    """The flags shared by the fine-tuning scripts; keep=True: a resumed run must have the same value."""
    data: str = flag("", "training examples (required)", group="data")
    val_fraction: float = flag(0.1, "fraction of the examples used for validation", group="data", above=0, below=1,
                               keep=True)
    out: str = flag("", "output folder (required)", group="data")

    init_from: str = flag("", "model to fine-tune: model_XXXXX.pt, a Hugging Face folder, or a name such as gpt2 "
                              "(required)", group="model")
    block_size: int | None = flag(None, "tokens to read of each example, the rest is cut off (default: the model's "
                                        "maximum)", group="model", low=2, keep=True)
    dropout: float = flag(0.0, "dropout probability in the model", group="model", low=0.0, below=1.0, keep=True)
    lora_r: int = flag(8, "rank of the LoRA matrices", group="model", low=1, keep=True)
    lora_alpha: float = flag(16.0, "LoRA updates are scaled by lora_alpha / lora_r", group="model", above=0, keep=True)
    lora_dropout: float = flag(0.0, "dropout probability before the LoRA matrices", group="model", low=0.0, below=1.0,
                               keep=True)

    num_epochs: int = flag(3, "passes over the training examples", group="training", low=1, keep=True)
    patience: int = flag(0, "stop after this many epochs without a better validation (0: never)", group="training",
                         low=0)
    batch_size: int = flag(32, "examples per optimizer step, over all processes", group="training", low=1, keep=True)
    micro_batch_size: int = flag(0, "full-length rows per forward pass of a process, more if they are shorter (0: as "
                                    "many as fit)", group="training", low=0)
    max_lr: float | None = flag(None, "peak learning rate (default: depends on what is trained, see "
                                      "docs/finetuning.md)", group="training", above=0, keep=True)
    min_lr: float = flag(0.0, "learning rate that the cosine falls to", group="training", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, "steps of linear warm-up (default: a tenth of the run)", group="training",
                                    low=0, keep=True)
    weight_decay: float = flag(0.01, "AdamW weight decay, for matrices only", group="training", low=0.0, keep=True)
    grad_clip: float = flag(1.0, "clip the gradient to this norm (0: no clipping)", group="training", low=0.0,
                            keep=True)

    resume: str = flag("auto", "auto: resume the run in --out, if any; never", group="system",
                       choices=("auto", "never"))

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        for name in ("data", "init_from", "out"):
            if not getattr(self, name) and not (name == "out" and self.dry_run):
                raise UserError(f"--{name} is missing (--help lists the flags)")
        if self.mlflow:
            require_mlflow()
        if self.min_lr > self.peak_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.peak_lr:g}; lower it")

    @property
    def peak_lr(self):
        """--max_lr, or the default for what is trained."""
        return self.default_lr() if self.max_lr is None else self.max_lr

    def default_lr(self):
        """Return the peak learning rate to use without --max_lr."""
        raise NotImplementedError


# -----------------------------------------------------------------------------
# set-up

@dataclass(frozen=True)
class BaseModel:
    """The model that fine-tuning starts from, the same on every rank."""
    model: nn.Module
    tokenizer: Tokenizer
    record: dict[str, str]       # {"source", "sha256"}


def open_base_model(config, runtime):
    """Open --init_from, crop it to --block_size, move it to the device and print what it is. Raises UserError."""
    def read():
        opened = open_model(config.init_from, tokenizer=config.tokenizer).with_tokenizer()
        state = opened.model.state_dict()
        return dict(config=opened.model.config_dict(), model=state, tokenizer=opened.tokenizer.to_checkpoint(),
                    sha256=weights_hash(state), title=opened.summary())
    stored = runtime.broadcast(read)
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if config.block_size and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size and config.block_size > model.config.block_size:
        raise UserError(f"--block_size {config.block_size}, but {config.init_from} reads at most "
                        f"{model.config.block_size} tokens; lower it")
    model.to(runtime.device)
    runtime.print(f"{stored['title']}, weights sha256 {stored['sha256'][:12]}")
    record = dict(source=config.init_from, sha256=stored["sha256"])
    return BaseModel(model, from_checkpoint(stored["tokenizer"]), record)


def add_lora(model, config):
    """Freeze a model, add the LoRA matrices that the flags ask for, and return peft's wrapper of the model."""
    seed_everything(config.seed, "lora")
    return add_adapter(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.init_from)


class Objective(nn.Module):
    """The summed loss of a model over its targets: the module that training calls and DDP wraps."""

    def __init__(self, model, head, weights=None):
        """head: name of the model's output layer. weights (classes,): weight of each target class; None: all 1."""
        super().__init__()
        self.model, self.head = model, head
        self.register_buffer("weights", weights)

    def forward(self, x, y):
        """Return the cross-entropy in nats of x, y (B, T), summed over the targets that are not IGNORED."""
        scored = y != IGNORED
        logits = getattr(self.model, self.head)(self.model.hidden(x)[scored])          # (targets, classes)
        return F.cross_entropy(logits.float(), y[scored], weight=self.weights, reduction="sum")

    def total_weight(self, examples):
        """Return the summed weight of all targets of some examples: their number, unless classes have weights."""
        targets = np.concatenate([example.targets[example.targets != IGNORED] for example in examples])
        return float(self.weights.cpu().double()[targets].sum()) if self.weights is not None else float(len(targets))


@dataclass(frozen=True)
class Plan:
    """The numbers of steps of a run."""
    steps_per_epoch: int
    max_steps: int
    warmup_steps: int
    full_steps: int            # max_steps without --dry_run


@dataclass(frozen=True)
class Run:
    """What is fixed for a run."""
    objective: Objective
    ddp: nn.Module             # the objective, wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    examples: list[Example]    # of the training split
    plan: Plan
    micro_batch_tokens: int    # B x T of a forward pass, at most
    base: dict[str, str]       # {"source", "sha256"} of the model that it started from
    data_hash: str

    @property
    def model(self):
        """The model inside the objective."""
        return self.objective.model


@dataclass
class BestEpoch:
    """The epoch with the best validation score until now."""
    score: tuple[float, ...] = (-math.inf,)
    epoch: int = 0             # 0: none yet
    metrics: dict[str, float] = field(default_factory=dict)          # of its evaluation
    weights: dict[str, torch.Tensor] = field(default_factory=dict)   # the trained ones, on the CPU


@dataclass
class Progress:
    """What changes during a run."""
    step: int = 0              # the next one to train
    tokens: int = 0            # read in all starts
    seconds: float = 0.0       # spent in steps and evaluations, in all starts
    baseline: dict[str, float] = field(default_factory=dict)         # the metrics before training
    best: BestEpoch = field(default_factory=BestEpoch)
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


def set_up(config, runtime, base, objective, examples):
    """Return the Run that trains every parameter of the objective which requires gradients.

    base: the BaseModel inside the objective. examples: the training split; a dry run takes the first of them.
    Raises UserError if the flags contradict the number of examples or the micro-batch does not fit.
    """
    plan = make_plan(len(examples), config)
    objective.to(runtime.device)
    ddp = runtime.data_parallel(objective)
    model, block_size = objective.model, objective.model.config.block_size
    size = find_micro_batch_size(ddp, block_size, config.micro_batch_size,
                                 max(1, config.batch_size // runtime.world_size), runtime)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.peak_lr, betas=(0.9, 0.98),
                                  fused=True)
    n_trained = sum(w.numel() for w in trained_weights(model).values())
    n_all = sum(p.numel() for p in model.parameters())
    runtime.print(f"training {n_trained:,} of {n_all:,} parameters on {len(examples):,} examples: {config.num_epochs} "
                  f"epochs of {plan.steps_per_epoch} steps, on {runtime.device} in {runtime.dtype_name}, "
                  f"{runtime.world_size} process{'es' * (runtime.world_size > 1)}")
    if config.dry_run:
        n_steps = min(2, plan.steps_per_epoch)
        examples = examples[:2 * config.batch_size]
        plan = dataclasses.replace(plan, steps_per_epoch=n_steps, max_steps=n_steps)
    run = Run(objective, ddp, optimizer, runtime.grad_scaler(), examples, plan, size * block_size, base.record,
              hash_examples(examples))
    runtime.require_equal("flags", asdict(config))
    runtime.require_equal("examples", run.data_hash)
    return run


def make_plan(n_examples, config):
    """Return the Plan of a run over n_examples. Raises UserError if the warm-up is longer than the run."""
    steps_per_epoch = -(-n_examples // config.batch_size)     # an epoch's last step may have fewer examples
    n_steps = steps_per_epoch * config.num_epochs
    warmup_steps = n_steps // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps > n_steps:
        raise UserError(f"--warmup_steps {warmup_steps} exceeds the {n_steps} steps of the run; lower it")
    return Plan(steps_per_epoch, n_steps, warmup_steps, n_steps)


def trained_weights(model):
    """Return {name: tensor} of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# -----------------------------------------------------------------------------
# one training step

def train_step(run, config, runtime, step):
    """Train on this rank's examples of a step; return (StepResult, tokens read), the same on all ranks."""
    # Every step seeds the generators with (seed, step, rank): dropout repeats after a resume without any saved state.
    seed_everything(config.seed, "step", step, runtime.rank)
    indices = examples_of_step(run, config, step)
    examples = [run.examples[i] for i in indices]
    micro_batches = list(local_batches(run, runtime, indices)) or [empty_batch()]
    scale = runtime.world_size / run.objective.total_weight(examples)      # x world_size: DDP takes the mean over ranks
    loss = torch.zeros((), device=runtime.device)
    for i, (_, x, y) in enumerate(micro_batches):
        final = i + 1 == len(micro_batches)
        # Gradients are averaged over ranks once a step, in its last micro-batch. no_sync holds the forward pass too:
        # there, not in backward, DDP decides whether this backward pass will reduce.
        with contextlib.nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                # backward() adds up gradients; multiplying here by 1 / (targets of the whole step) makes the sum the
                # gradient of the mean over all targets.
                micro_loss = run.ddp(x.to(runtime.device), y.to(runtime.device)) * scale
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()             # reading it here would make the GPU wait
    result = finish_step(run.model, run.optimizer, run.scaler, config.grad_clip, loss, runtime)
    return result, sum(map(len, examples))


def examples_of_step(run, config, step):
    """Return the indices of a step's training examples, a pure function of (seed, step)."""
    epoch, place = divmod(step, run.plan.steps_per_epoch)
    order = permutation(len(run.examples), config.seed, "examples", epoch)
    return order[place * config.batch_size:(place + 1) * config.batch_size].tolist()


def local_batches(run, runtime, indices):
    """Yield this rank's micro-batches of a step. Dealing them out by length gives all ranks similar work."""
    mine = sorted(indices, key=lambda i: -len(run.examples[i]))[runtime.rank::runtime.world_size]
    return make_batches(run.examples, mine, run.micro_batch_tokens, run.model.config.block_size)


def set_learning_rate(run, config, step):
    """Set the learning rate of a step and return it."""
    lr = config.peak_lr * learning_rate_factor(step, run.plan, "cosine", config.min_lr / config.peak_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def mean_loss(run, runtime, examples):
    """Return the mean loss in nats over all targets of some examples, on every rank. Raises StopRequested."""
    loss = torch.zeros((), device=runtime.device)
    for _, x, y in evaluation_batches(examples, run.micro_batch_tokens, run.model.config.block_size, runtime):
        with runtime.autocast():
            loss = loss + run.objective(x, y)
    return runtime.sum(loss)[0] / run.objective.total_weight(examples)


def evaluate_epoch(run, progress, log, evaluate):
    """Evaluate the model, log its metrics, and keep its weights if no earlier epoch was as good."""
    epoch = progress.step // run.plan.steps_per_epoch
    log.start_clock()
    run.model.eval()
    with torch.no_grad():
        score, metrics = evaluate()
    run.model.train()
    if epoch == 0:
        progress.baseline = metrics
    better = epoch > 0 and score > progress.best.score
    if better:
        weights = {name: w.to("cpu", copy=True) for name, w in trained_weights(run.model).items()}
        progress.best = BestEpoch(score, epoch, metrics, weights)
    progress.seconds += log.stop_clock()
    log.evaluation(epoch, metrics, better)


def out_of_patience(run, progress, config):
    """Return True if the last --patience epochs brought no better evaluation."""
    epoch, best = progress.step // run.plan.steps_per_epoch, progress.best.epoch
    return bool(config.patience and best and epoch - best >= config.patience)


# -----------------------------------------------------------------------------
# the run

def loop(run, progress, config, runtime, log, evaluate):
    """Train from progress.step to the end, or until patience runs out.

    Raises StopRequested, and RunFailed if too many updates were skipped.
    """
    first_step = progress.step
    # At step k: evaluate and save if an epoch ends here, then train step k. So the loop also evaluates the untrained
    # model, as the baseline, and the final weights are evaluated and saved by the same lines as all others.
    while True:
        runtime.raise_if_stopping()                   # the last all-reduce has told all ranks
        step, last = progress.step, progress.step == run.plan.max_steps
        epoch_ends = step % run.plan.steps_per_epoch == 0

        # once an epoch: validation (all ranks take part), and the state, unless this start began with it
        if epoch_ends:
            evaluate_epoch(run, progress, log, evaluate)
            if step > first_step:
                save_state(run, progress, config, runtime)
        if last or (epoch_ends and out_of_patience(run, progress, config)):
            break

        # one training step; evaluation and saving are outside its clock
        log.start_clock()
        lr = set_learning_rate(run, config, step)
        result, n_tokens = train_step(run, config, runtime, step)
        skip_reason = progress.skipped.record(result, run.scaler)
        progress.tokens += n_tokens
        progress.seconds += log.stop_clock()
        log.train(result, lr, n_tokens, skip_reason)
        progress.skipped.check()                      # ends the run after ten in a row
        if step == first_step:
            runtime.first_step_done()                 # shortens the time-outs
        progress.step = step + 1


def train(run, progress, config, runtime, evaluate, write_results):
    """Train to the end, write the results and mark the run as finished; if stopped, save the state instead.

    evaluate() -> (score, {name: number}) on every rank. The score is a tuple, higher is better; the numbers are logged.
    write_results() is called on every rank, with the best epoch's weights in the model. Raises UserError, RunFailed.
    """
    first_step = progress.step
    with contextlib.closing(TuneLog(run, progress, config, runtime)) as log:
        try:
            runtime.setup_done()
            loop(run, progress, config, runtime, log, evaluate)
        except StopRequested:           # raised on all ranks at the same collective
            if config.dry_run:
                runtime.print("the dry run was stopped")
                return
            if progress.step > first_step:
                save_state(run, progress, config, runtime)
            runtime.print(f"stopped before step {progress.step}, nothing is lost; the same command continues:\n"
                          f"{command_line()}")
            return
    best = progress.best
    if not best.weights:
        raise RunFailed("no epoch ended with a finite loss; try a smaller --max_lr")
    if progress.step < run.plan.max_steps:
        runtime.print(f"stopped early: no better epoch in the last {config.patience}, the best was epoch {best.epoch}")
    run.model.load_state_dict(best.weights, strict=False)
    run.model.eval()
    if config.dry_run:
        runtime.print(log.forecast())
    with writing_results(config):
        write_results()
    save_state(run, progress, config, runtime, finished=True)


# -----------------------------------------------------------------------------
# the folder and the state of a run

def work_in_folder(config, runtime, finetune):
    """Call finetune(config, runtime, state) while no other run uses --out; state: that of an interrupted run, or None.

    A dry run gets a temporary folder instead. Raises UserError if --out contains another run.
    """
    config = with_changes(config, max_lr=config.peak_lr)     # state and MLflow record the rate, not "the default"
    if config.dry_run:
        with temporary_folder(runtime, config.out or ".") as folder:
            finetune(with_changes(config, out=folder, mlflow=False), runtime, None)
        return
    with lock_folder(config.out, runtime):
        state = runtime.broadcast(lambda: read_state(config))
        if state and state["finished"]:
            runtime.print(f"the run in {config.out} is finished; for a new run use another --out")
            return
        finetune(config, runtime, state)


def read_state(config):
    """Return the state of the run in --out, or None if there is no run. Raises UserError if its flags differ."""
    path = Path(config.out) / STATE_NAME
    if not path.exists():
        return None
    if config.resume == "never":
        raise UserError(f"--resume never, but {config.out} already contains a run; use another --out, or "
                        "delete it")
    state = read_checkpoint(path)
    differing = changed_flags(config, state["config"])
    if state["finished"]:       # data and model will not be opened, so only their names can be compared
        differing += [f"--{name} {getattr(config, name)} (it has {state['config'].get(name)})"
                      for name in ("data", "init_from") if getattr(config, name) != state["config"].get(name)]
    if differing:
        raise UserError(f"{config.out} contains another run: {', '.join(differing)}. Use its flags to resume it, or "
                        "another --out for a new run")
    return state


def save_state(run, progress, config, runtime, finished=False):
    """Write what the run resumes from, on rank 0; of a finished run only its flags. Raises UserError."""
    if not runtime.is_main:
        return
    entries = dict(config=asdict(config), finished=finished)
    if not finished:
        best = progress.best      # the entries "first" and "facts" keep their old names, so that older runs resume
        entries.update(step=progress.step, tokens=progress.tokens, seconds=progress.seconds, base=run.base,
                       data=run.data_hash, first=progress.baseline,
                       best=dict(score=best.score, epoch=best.epoch, facts=best.metrics, weights=best.weights),
                       trained=trained_weights(run.model), optimizer=run.optimizer.state_dict(),
                       scaler=run.scaler.state_dict())
    save_checkpoint(Path(config.out) / STATE_NAME, entries)


def resume(run, runtime, state):
    """Restore a state, if there is one, and return the run's Progress. Raises UserError if it is another run's.

    There is no warm_up as in train.py: with 3 or more processes the first step may sum in another order.
    """
    if state is None:
        return Progress()
    progress = runtime.on_all_ranks(lambda: restore(run, state))
    runtime.print(f"resuming from step {progress.step}")
    return progress


def restore(run, state):
    """Load a state into the model, optimizer and scaler, and return its Progress. Raises UserError."""
    if state["data"] != run.data_hash:
        raise UserError("the run in --out had other training examples; use another --out")
    if state["base"]["sha256"] != run.base["sha256"]:
        raise UserError(f"the run in --out started from other weights ({state['base']['source']}); use another --out")
    run.model.load_state_dict(state["trained"], strict=False)
    restore_optimizer(run, state)
    best = state["best"]
    return Progress(step=state["step"], tokens=state["tokens"], seconds=state["seconds"], baseline=state["first"],
                    best=BestEpoch(best["score"], best["epoch"], best["facts"], best["weights"]))


@contextlib.contextmanager
def writing_results(config):
    """Turn a failure to write the results into a RunFailed that says how to repeat the writing alone."""
    try:
        yield
    except RunFailed:
        raise
    except UserError as error:
        raise RunFailed(f"cannot write the results to {config.out} ({error}); make room and run the same command: it "
                        "resumes after the training") from error
