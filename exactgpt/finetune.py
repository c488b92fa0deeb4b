"""What the fine-tuning scripts share: flags, examples as rows with targets, the loop, the folder and state of a run.

The loss of a step is the mean over all its targets: each micro-batch of each rank adds its sum over the number in the
whole step, so that the gradient is the same for any micro-batch size and any number of processes. Shapes: B rows, T
tokens.
"""
import contextlib
import hashlib
import itertools
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt.checkpoint import changed_flags, read_checkpoint, save_checkpoint, weights_hash
from exactgpt.config import DeviceConfig, RunFailed, UserError, flag, replace
from exactgpt.device import find_micro_batch_size
from exactgpt.distributed import STEADY_TIMEOUT_S, StopRequested, lock_folder, seed_everything, temporary_folder
from exactgpt.launch import command_line
from exactgpt.lora import add_adapter
from exactgpt.metrics import TuneLog, require_mlflow
from exactgpt.open_model import build_model, open_model
from exactgpt.optimizer import Skipped, finish_step, learning_rate_factor, parameter_groups
from exactgpt.shards import permutation
from exactgpt.tokenizer import Tokenizer, from_checkpoint
from model import IGNORED

STATE_NAME = "state.pt"  # in --out: what a run goes on from
LENGTH_MULTIPLE = 16        # rows are padded to a multiple of this: few shapes
N_SHOWN = 3                # examples that a dry run prints


@dataclass(kw_only=True)
class TuneConfig(DeviceConfig):
    """The flags that the fine-tuning scripts share; keep=True: a resumed run must have the same."""
    data: str = flag("", "the examples (required)", group="data")
    val_fraction: float = flag(0.1, "share of the examples for validation", group="data", above=0, below=1, keep=True)
    out: str = flag("", "folder of the result (required)", group="data")

    init_from: str = flag("", "the model to tune: model_XXXXX.pt, a Hugging Face folder, or a name such as gpt2 "
                              "(required)", group="model")
    block_size: int | None = flag(None, "tokens that are read at most, the rest is cut off (default: all that the "
                                        "model can)", group="model", low=2, keep=True)
    dropout: float = flag(0.0, "dropout probability in the model", group="model", low=0.0, below=1.0, keep=True)
    lora_r: int = flag(8, "rank of the LoRA matrices", group="model", low=1, keep=True)
    lora_alpha: float = flag(16.0, "LoRA's scale is lora_alpha / lora_r", group="model", above=0, keep=True)
    lora_dropout: float = flag(0.0, "dropout before the LoRA matrices", group="model", low=0.0, below=1.0, keep=True)

    num_epochs: int = flag(3, "passes over the training examples", group="training", low=1, keep=True)
    patience: int = flag(0, "stop after so many epochs without a better validation; 0: never", group="training", low=0)
    batch_size: int = flag(32, "examples per optimizer step, all processes together", group="training", low=1,
                           keep=True)
    micro_batch_size: int = flag(0, "full rows per forward pass of a process, of shorter ones as many more; 0: as many "
                                    "as fit", group="training", low=0)
    max_lr: float | None = flag(None, "peak learning rate (default: by what is trained, see docs/finetuning.md)",
                                group="training", above=0, keep=True)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", group="training", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, "steps of linear warm-up (default: a tenth)", group="training", low=0,
                                    keep=True)
    weight_decay: float = flag(0.01, "of matrices; vectors do not decay", group="training", low=0.0, keep=True)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", group="training", low=0.0, keep=True)

    resume: str = flag("auto", "auto: go on with the run in --out; never", group="system", choices=("auto", "never"))
    seed: int = flag(1337, "of the split, the order, new weights, dropout", group="system", low=0, keep=True)
    deterministic: bool = flag(False, "bitwise repeatable on a GPU too, and slower", group="system")
    timeout: float = flag(float(STEADY_TIMEOUT_S), "seconds without progress after which several processes end and say "
                          "which of them hangs; more than writing the results takes", group="system", above=0)
    mlflow: bool = flag(False, "mirror the run in a local MLflow store in --out", group="system")
    dry_run: bool = flag(False, "show the first examples, what counts in them, try two steps and write the results, "
                        "which are not kept", group="system")

    def check(self):
        """Raise UserError for flags that are missing or contradict each other; choose what is left open."""
        for name in ("data", "init_from", "out"):
            if not getattr(self, name) and not (name == "out" and self.dry_run):
                raise UserError(f"--{name} is missing (--help lists the flags)")
        if self.mlflow:
            require_mlflow()
        if self.max_lr is None:
            self.max_lr = self.default_lr()
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")

    def default_lr(self):
        """The peak learning rate where none is given."""
        raise NotImplementedError


# -----------------------------------------------------------------------------
# examples as rows

@dataclass(frozen=True)
class Example:
    """One example: what the model reads, and what counts."""
    tokens: np.ndarray     # (T,) int32
    targets: np.ndarray    # (T,) int32, IGNORED where nothing counts

    def __len__(self):
        return len(self.tokens)


def make_example(tokens, targets):
    """The Example of two lists."""
    return Example(np.array(tokens, dtype=np.int32), np.array(targets, dtype=np.int32))


def make_batches(rows, indices, budget, block_size):
    """Yield (indices, x, y), x and y (B, T) int64: rows of like length, the longest first, B x T <= budget if B > 1."""
    indices = sorted(indices, key=lambda i: -len(rows[i]))
    first = 0
    while first < len(indices):
        T = min(-(-len(rows[indices[first]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, block_size)
        members = indices[first:first + max(1, budget // T)]
        x = torch.zeros(len(members), T, dtype=torch.long)     # padding lies behind a row: no token of it looks there
        y = torch.full((len(members), T), IGNORED, dtype=torch.long)
        for b, i in enumerate(members):
            x[b, :len(rows[i])] = torch.from_numpy(rows[i].tokens)
            y[b, :len(rows[i])] = torch.from_numpy(rows[i].targets)
        yield members, x, y
        first += len(members)


def format_example(row, tokenizer, target_text):
    """Lines that show a row as the loss sees it: "masked" is only read, "learned" is what counts.

    target_text(targets) -> the text of a list of targets.
    """
    pieces = [(False, int(row.tokens[0]))]
    for i, target in enumerate(row.targets):
        if target != IGNORED:
            pieces.append((True, int(target)))
        elif i + 1 < len(row):
            pieces.append((False, int(row.tokens[i + 1])))
    lines = []
    for learned, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
        ids = [piece[1] for piece in run]
        lines.append(f"  learned | {target_text(ids)!r}" if learned else f"  masked  | {tokenizer.decode(ids)!r}")
    return "\n".join(lines)


def print_examples(rows, tokenizer, target_text, print):
    """Print the first rows as the loss sees them."""
    for i, row in enumerate(rows[:N_SHOWN], 1):
        counting = int((row.targets != IGNORED).sum())
        print(f"example {i}: {len(row)} tokens are read, {counting} target{'s' * (counting > 1)}\n"
              f"{format_example(row, tokenizer, target_text)}")


def hash_examples(rows):
    """A hash of the tokens and targets of rows: a resumed run must have the same."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(4, "little") + row.tokens.tobytes() + row.targets.tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# the model to begin with

@dataclass(frozen=True)
class BaseModel:
    """An opened model to begin with, the same on every rank."""
    model: nn.Module
    tokenizer: Tokenizer
    record: dict       # {"source", "sha256"}


def open_base_model(config, runtime):
    """The BaseModel that --init_from names, cut to --block_size, on its device; says which it is. Raises UserError."""
    def read():
        opened = open_model(config.init_from, tokenizer=config.tokenizer).with_tokenizer()
        state = opened.model.state_dict()
        return dict(config=opened.model.config_dict(), model=state, tokenizer=opened.tokenizer.to_checkpoint(),
                    sha256=weights_hash(state), title=opened.describe())
    stored = runtime.broadcast(read)
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if config.block_size and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size and config.block_size > model.config.block_size:
        raise UserError(f"--block_size {config.block_size}, but {config.init_from} reads {model.config.block_size}")
    model.to(runtime.device)
    runtime.print(f"{stored['title']}, weights sha256 {stored['sha256'][:12]}")
    record = dict(source=config.init_from, sha256=stored["sha256"])
    return BaseModel(model, from_checkpoint(stored["tokenizer"]), record)


def add_lora(model, config):
    """Freeze a model and add LoRA matrices as the flags say; peft's wrapper of it."""
    seed_everything(config.seed, "lora")
    return add_adapter(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.init_from)


class Objective(nn.Module):
    """The summed loss of a model over its targets: what the loop calls, wrapped by DDP where there are processes."""

    def __init__(self, model, head, weights=None):
        """head: the name of the model's output layer. weights (classes,): how much each target counts; None: 1."""
        super().__init__()
        self.model, self.head = model, head
        self.register_buffer("weights", weights)

    def forward(self, x, y):
        """x, y (B, T) -> cross-entropy, in nats, summed over the places whose target is not IGNORED."""
        scored = y != IGNORED
        logits = getattr(self.model, self.head)(self.model.hidden(x)[scored])          # (targets, classes)
        return F.cross_entropy(logits.float(), y[scored], weight=self.weights, reduction="sum")

    def total_weight(self, rows):
        """What the targets of some rows count together."""
        targets = np.concatenate([row.targets[row.targets != IGNORED] for row in rows])
        return float(self.weights.cpu().double()[targets].sum()) if self.weights is not None else float(len(targets))


@dataclass
class BestEpoch:
    """The best epoch so far, by the score of its evaluation."""
    score: tuple = (-math.inf,)
    epoch: int = 0
    facts: dict = field(default_factory=dict)    # what the evaluation measured
    weights: dict = field(default_factory=dict)  # the trained ones, on the CPU


@dataclass
class Tuning:
    """What the loop works with."""
    model: nn.Module
    objective: Objective
    ddp: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rows: list                 # of the training split
    base: dict                 # {"source", "sha256"} of the model that it began with
    data_hash: str
    budget: int                # tokens of a micro-batch
    steps_per_epoch: int
    max_steps: int
    warmup_steps: int
    full_steps: int            # max_steps, if this were no dry run
    step: int = 0
    tokens: int = 0            # read so far
    seconds: float = 0.0       # in steps and evaluations so far, of all starts
    best: BestEpoch = field(default_factory=BestEpoch)
    first: dict = field(default_factory=dict)    # the facts before training
    skipped: Skipped = field(default_factory=Skipped)


def trained_weights(model):
    """{name: tensor} of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def set_up(config, runtime, state, base, model, head, rows, weights=None):
    """The Tuning of a model that trains what requires gradients, at the state it was left in; says what that is.

    base: the BaseModel that the model was made of. state: what read_state found. rows: of the training split; a dry run
    takes two steps of them. weights: Objective's. Raises UserError for the state of another run, and for micro-batches
    that do not fit.
    """
    objective = Objective(model, head, weights).to(runtime.device)
    ddp = runtime.data_parallel(objective)
    block_size = model.config.block_size
    size = find_micro_batch_size(ddp, block_size, config.micro_batch_size,
                                 max(1, config.batch_size // runtime.world_size), runtime)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.max_lr, betas=(0.9, 0.98),
                                  fused=True)
    epoch = -(-len(rows) // config.batch_size)
    full_steps = epoch * config.num_epochs
    trained = sum(w.numel() for w in trained_weights(model).values())
    every = sum(p.numel() for p in model.parameters())
    runtime.print(f"training {trained:,} of {every:,} parameters on {len(rows):,} examples: {config.num_epochs} epochs "
                  f"of {epoch} steps, on {runtime.device} in {runtime.dtype_name}, {runtime.world_size} "
                  f"process{'es' * (runtime.world_size > 1)}")
    if config.dry_run:
        rows, epoch = rows[:2 * config.batch_size], min(2, epoch)
    warmup_steps = full_steps // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps > full_steps:
        raise UserError(f"--warmup_steps {warmup_steps} is longer than the run of {full_steps} steps")
    run = Tuning(model, objective, ddp, optimizer, runtime.grad_scaler(), rows,
                 base=base.record, data_hash=hash_examples(rows), budget=size * block_size, steps_per_epoch=epoch,
                 max_steps=epoch if config.dry_run else full_steps, warmup_steps=warmup_steps, full_steps=full_steps)
    runtime.require_equal("flags", asdict(config))
    runtime.require_equal("examples", run.data_hash)
    if state:
        runtime.on_all_ranks(lambda: restore(run, state))
        runtime.print(f"going on from step {run.step}")
    return run


# -----------------------------------------------------------------------------
# the loop

def train(run, config, runtime, evaluate):
    """Train to the end, or until patience is over: whether it came so far, and has the weights of its best epoch now.

    evaluate() -> (score, a tuple, the higher the better; {name: number}), on every rank. At step k: evaluate if an
    epoch ends (or begins the run), save, then train step k.
    """
    log = TuneLog(runtime, config, run)
    first_step = run.step
    try:
        runtime.setup_done()
        while True:
            runtime.raise_if_stopping()
            if run.step % run.steps_per_epoch == 0:
                over = end_epoch(run, config, runtime, log, evaluate)
                if run.step > first_step:
                    save_state(run, config, runtime)
                if over:
                    break
            start_time = time.perf_counter()
            rate = set_learning_rate(run, config)
            result, n_tokens = train_step(run, config, runtime)
            run.tokens += n_tokens
            skipped = run.skipped.count(result, run.scaler)
            seconds = time.perf_counter() - start_time
            run.seconds += seconds
            log.train(result, rate, n_tokens, seconds, skipped)
            run.skipped.check()
            if run.step == first_step:
                runtime.first_step_done()
            run.step += 1
        if not run.best.weights:
            raise RunFailed("no epoch ended with a finite loss; try a smaller --max_lr")
        run.model.load_state_dict(run.best.weights, strict=False)
        run.model.eval()
        if config.dry_run:
            log.forecast()
        return True
    except StopRequested:
        if config.dry_run:
            runtime.print("the dry run was stopped")
            return False
        if run.step > first_step:
            save_state(run, config, runtime)
        runtime.print(f"stopped before step {run.step}, nothing is lost; the same command continues:\n{command_line()}")
        return False
    finally:
        log.close()


def end_epoch(run, config, runtime, log, evaluate):
    """Evaluate, and keep the weights if they are the best so far; whether the run is over."""
    epoch = run.step // run.steps_per_epoch
    start_time = time.perf_counter()
    run.model.eval()
    with torch.no_grad():
        score, facts = evaluate()
    run.model.train()
    if run.step == 0:
        run.first = facts
    better = score > run.best.score and epoch > 0
    if better:
        weights = {name: w.to("cpu", copy=True) for name, w in trained_weights(run.model).items()}
        run.best = BestEpoch(score, epoch, facts, weights)
    seconds = time.perf_counter() - start_time
    run.seconds += seconds
    log.evaluation(epoch, facts, better, seconds)
    if run.step >= run.max_steps:
        return True
    if config.patience and run.best.epoch and epoch - run.best.epoch >= config.patience:
        runtime.print(f"no better epoch for {config.patience}: stopping early, epoch {run.best.epoch} was the best")
        return True
    return False


def train_step(run, config, runtime):
    """One optimizer step on this rank's share of the rows: its StepResult, and the tokens that all ranks read."""
    seed_everything(config.seed, "step", run.step, runtime.rank)                       # dropout
    indices = examples_of_step(run, config)
    rows = [run.rows[i] for i in indices]
    share = runtime.world_size / run.objective.total_weight(rows)                            # DDP divides by world_size
    batches = list(local_batches(run, runtime, indices)) or [empty_batch()]
    loss = torch.zeros((), device=runtime.device)
    for i, (_, x, y) in enumerate(batches):
        # Forward and backward both inside no_sync: DDP decides in the forward pass whether gradients are reduced.
        final = i + 1 == len(batches)
        with contextlib.nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                micro_loss = run.ddp(x.to(runtime.device), y.to(runtime.device)) * share
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()
    result = finish_step(run.model, run.optimizer, run.scaler, config.grad_clip, loss, runtime)
    return result, sum(map(len, rows))


def examples_of_step(run, config):
    """The numbers of the training rows of this step: a pure function of (seed, step)."""
    epoch, place = divmod(run.step, run.steps_per_epoch)
    order = permutation(len(run.rows), config.seed, "examples", epoch)
    return order[place * config.batch_size:(place + 1) * config.batch_size].tolist()


def local_batches(run, runtime, indices):
    """This rank's share of some training rows as make_batches yields it; ranks get rows of like lengths."""
    mine = sorted(indices, key=lambda i: -len(run.rows[i]))[runtime.rank::runtime.world_size]
    return make_batches(run.rows, mine, run.budget, run.model.config.block_size)


def evaluation_batches(rows, budget, block_size, runtime):
    """Yield this rank's share of all rows as make_batches does, on its device.

    A stop is looked for after each batch: every rank goes through every batch and takes its share, be it none, so that
    all look equally often. Raises StopRequested.
    """
    share = slice(runtime.rank, None, runtime.world_size)
    for members, x, y in make_batches(rows, range(len(rows)), budget * runtime.world_size, block_size):
        if members[share]:
            yield members[share], x[share].to(runtime.device), y[share].to(runtime.device)
        runtime.check_for_stop()


def empty_batch():
    """A batch without targets, for a rank that has no row of an epoch's last step: DDP waits for every rank."""
    return [], torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED)


@torch.no_grad()
def mean_loss(run, runtime, rows):
    """The mean loss over the targets of some rows, in nats, on every rank. Raises StopRequested."""
    loss = torch.zeros((), device=runtime.device)
    for _, x, y in evaluation_batches(rows, run.budget, run.model.config.block_size, runtime):
        with runtime.autocast():
            loss = loss + run.objective(x, y)
    return runtime.sum(loss)[0] / run.objective.total_weight(rows)


def set_learning_rate(run, config):
    """Set the learning rate of this step and return it; a Tuning has the fields of a Plan that count here."""
    rate = config.max_lr * learning_rate_factor(run.step, run, "cosine", config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


# -----------------------------------------------------------------------------
# the folder and the state of a run

def work_in_folder(config, runtime, work):
    """work(config, state) with --out to itself: state is what an earlier start left, None for a fresh run.

    --dry_run: in a temporary folder, which is removed. Raises UserError where --out holds another run.
    """
    if config.dry_run:
        with temporary_folder(runtime, config.out or ".") as folder:
            work(replace(config, out=folder, mlflow=False), None)
        return
    with lock_folder(config.out, runtime):
        state = runtime.broadcast(lambda: read_state(config))
        if state and state["finished"]:
            runtime.print(f"the run in {config.out} is finished; for another one choose another --out")
            return
        work(config, state)


def read_state(config):
    """The state that a run in --out goes on from, None for a fresh one. Raises UserError for one with other flags."""
    path = Path(config.out) / STATE_NAME
    if not path.exists():
        return None
    if config.resume == "never":
        raise UserError(f"--resume never, but {config.out} holds a run; choose another --out, or delete it")
    state = read_checkpoint(path)
    differing = changed_flags(config, state["config"])
    if state["finished"]:       # the loop, which compares the data and the base themselves, will not begin
        differing += [f"--{name} {getattr(config, name)} (it has {state['config'].get(name)})"
                      for name in ("data", "init_from") if getattr(config, name) != state["config"].get(name)]
    if differing:
        raise UserError(f"{config.out} holds another run: {', '.join(differing)}. Use its flags to continue it, or "
                        "another --out")
    return state


def save_state(run, config, runtime, finished=False):
    """Write all that the run goes on from; of a finished one only that it is."""
    if not runtime.is_main:
        return
    entries = dict(config=asdict(config), finished=finished)
    if not finished:
        entries.update(step=run.step, tokens=run.tokens, seconds=run.seconds, base=run.base, data=run.data_hash,
                       first=run.first, best=vars(run.best), trained=trained_weights(run.model),
                       optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict())
    try:
        save_checkpoint(Path(config.out) / STATE_NAME, entries)
    except OSError as error:
        raise UserError(f"cannot write the run's state: {error}; make room and run the same command") from error


def restore(run, state):
    """Put a state back into a fresh Tuning. Raises UserError if it belongs to other examples or weights."""
    if state["data"] != run.data_hash:
        raise UserError("the run in --out had other training examples; choose another --out")
    if state["base"]["sha256"] != run.base["sha256"]:
        raise UserError(f"the run in --out began with other weights ({state['base']['source']}); choose another --out")
    run.model.load_state_dict(state["trained"], strict=False)
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
    run.first, run.best = state["first"], BestEpoch(**state["best"])


@contextlib.contextmanager
def writing_results(config):
    """Around the writing of results: what the disk refuses becomes a RunFailed that says how to get them yet."""
    try:
        yield
    except RunFailed:
        raise
    except (OSError, UserError) as error:
        raise RunFailed(f"the results in {config.out} could not be written ({error}); make room and run the same "
                        "command: it goes on from the end of the training") from error
