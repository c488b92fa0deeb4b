"""Shared by the fine-tuning scripts: flags, examples, set-up, the training loop, the folder and state of a run.

The loss of a step is the mean over all its targets: without dropout the gradient is the same, up to rounding, for any
micro-batch size and number of processes. Shapes: B rows of a batch, T tokens.
"""
import hashlib
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt import checkpoint
from exactgpt.config import RunConfig, RunFailed, UserError, counted, flag, with_changes
from exactgpt.device import find_micro_batch_size
from exactgpt.distributed import StopRequested, lock_folder, seed_everything, temporary_folder
from exactgpt.files import FolderLock, write_json
from exactgpt.metrics import RunLog
from exactgpt.open_model import build_model, open_model
from exactgpt.optimizer import SkippedSteps, finish_step, learning_rate_factor, parameter_groups
from exactgpt.shards import permutation
from exactgpt.tokenizer import Tokenizer, from_checkpoint
from model import IGNORED

RUN_FILES = ("metrics.jsonl", "metrics.json", "responses.json", "adapter", "classifier.pt", "confusion.png")
OLD_STATE = "state.pt"   # what runs of earlier versions resume from; now it is state_00012.pt
STATE_ENTRIES = dict(config=dict, finished=bool, step=int, tokens=int, seconds=float, first=dict, best=dict, base=dict,
                     data=str, trained=dict, optimizer=dict, scaler=dict)
LENGTH_MULTIPLE = 16     # sequences are padded to a multiple of this, so that few shapes occur
N_SHOWN = 3              # examples that a dry run prints


@dataclass(kw_only=True)
class TuneConfig(RunConfig):
    """The flags shared by the fine-tuning scripts; keep=True: a resumed run must have the same value."""
    data: str = flag("", "training examples (required)", group="data")
    val_fraction: float = flag(0.1, "share of the examples for validation", above=0, below=1, keep=True)
    out: str = flag("", "output folder (required)")

    init_from: str = flag("", "model to fine-tune: a checkpoint, a Hugging Face folder, or a name like gpt2 (required)",
                          group="model")
    block_size: int | None = flag(None, "tokens to read of each example, the rest is cut off (default: the model's "
                                        "maximum)", low=2, keep=True)
    dropout: float = flag(0.0, "dropout probability in the model", low=0.0, below=1.0, keep=True)
    lora_r: int = flag(8, "rank of the LoRA matrices", low=1, keep=True)
    lora_alpha: float = flag(16.0, "LoRA updates are scaled by lora_alpha / lora_r", above=0, keep=True)
    lora_dropout: float = flag(0.0, "dropout before the LoRA matrices", low=0.0, below=1.0, keep=True)

    num_epochs: int = flag(3, "passes over the training examples", group="training", low=1, keep=True)
    patience: int = flag(0, "stop after so many epochs without a better one (0: never)", low=0)
    batch_size: int = flag(32, "examples per optimizer step, over all processes", low=1, keep=True)
    micro_batch_size: int = flag(0, "full-length rows per forward pass of a process, more if they are shorter (0: as "
                                    "many as fit)", low=0)
    max_lr: float | None = flag(None, "peak learning rate (default: see docs/finetuning.md)", above=0, keep=True)
    min_lr: float = flag(0.0, "learning rate that the cosine falls to", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, "steps of linear warm-up (default: a tenth of the run)", low=0, keep=True)
    weight_decay: float = flag(0.01, "AdamW weight decay, for matrices only", low=0.0, keep=True)
    grad_clip: float = flag(1.0, "clip the gradient to this norm (0: off)", low=0.0, keep=True)

    resume: str = flag("auto", "resume the run in --out, if any", group="system", choices=("auto", "never"))

    def check(self, *packages):
        """Raise UserError for flags that are missing or contradict each other, or packages that are missing."""
        for name in ("data", "init_from", "out"):
            if not getattr(self, name) and not (name == "out" and self.dry_run):
                raise UserError(f"--{name} is missing (--help lists the flags)")
        super().check(*packages)
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")


# ---- tokenized examples ------------------------------------------------------

class Example:
    """One tokenized example: `tokens` and `targets`, (T,) int32; targets are IGNORED where there is no loss."""

    def __init__(self, tokens, targets):
        self.tokens, self.targets = (np.array(ids, dtype=np.int32) for ids in (tokens, targets))

    def __len__(self):
        return len(self.tokens)


def make_batches(examples, micro_batch_tokens, block_size):
    """Yield (indices, x, y) of micro-batches, longest first; x, y: (B, T) with B T <= micro_batch_tokens or B = 1."""
    indices = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    while indices:
        T = min(-(-len(examples[indices[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, block_size)
        B = max(1, micro_batch_tokens // T)
        members, indices = indices[:B], indices[B:]
        x = torch.zeros(len(members), T, dtype=torch.long)   # padded on the right: no real token attends to it
        y = torch.full((len(members), T), IGNORED, dtype=torch.long)
        for b, i in enumerate(members):
            x[b, :len(examples[i])] = torch.from_numpy(examples[i].tokens)
            y[b, :len(examples[i])] = torch.from_numpy(examples[i].targets)
        yield members, x, y


def evaluation_batches(examples, micro_batch_tokens, block_size, runtime):
    """Yield (indices, x, y) of this rank's share of all examples, on its device. Raises StopRequested."""
    # Every rank visits every batch, even if its share of it is empty, so that all ranks check for a stop equally often.
    share = slice(runtime.rank, None, runtime.world_size)
    for members, x, y in make_batches(examples, micro_batch_tokens * runtime.world_size, block_size):
        if members[share]:
            yield members[share], x[share].to(runtime.device), y[share].to(runtime.device)
        runtime.check_for_stop()


def print_examples(examples, tokenizer, target_text, print):
    """Print the first examples: "masked" text is only read; "learned" is target_text(their targets, a list)."""
    for i, example in enumerate(examples[:N_SHOWN], 1):
        start = int((example.targets == IGNORED).sum())
        masked, learned = example.tokens[:start + 1].tolist(), example.targets[start:].tolist()
        print(f"example {i}: {counted(len(example), 'token')}, {counted(len(learned), 'target')}\n"
              f"  masked  | {tokenizer.decode(masked)!r}\n  learned | {target_text(learned)!r}")


# ---- set-up ------------------------------------------------------------------

def open_base_model(config, runtime):
    """Return (GPT on the device, Tokenizer, {"source", "sha256"}) of --init_from, cropped. Raises UserError."""
    def read():
        opened = open_model(config.init_from, tokenizer=config.tokenizer).with_tokenizer()
        state = checkpoint.require_finite(opened.model.state_dict(), config.init_from)
        return dict(config=opened.model.config_dict(), model=state, tokenizer=opened.tokenizer.to_checkpoint(),
                    sha256=checkpoint.weights_hash(state), title=opened.summary())
    stored = runtime.broadcast(read)
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if config.block_size:
        try:
            model.crop_block_size(config.block_size)
        except ValueError as error:
            raise UserError(f"{config.init_from}: {error}") from error
    runtime.print(f"{stored['title']}, weights sha256 {stored['sha256'][:12]}")
    return (model.to(runtime.device), from_checkpoint(stored["tokenizer"]),
            dict(source=config.init_from, sha256=stored["sha256"]))


def add_adapter(model, config):
    """Freeze a GPT, add LoRA matrices (arXiv:2106.09685) to the layers in its blocks; return peft's wrapper of it."""
    import peft
    settings = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                               target_modules=["c_attn", "c_proj", "c_fc"])
    seed_everything(config.seed, "lora")
    wrapped = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = config.init_from      # set it last: get_peft_model overwrites it
    return wrapped


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
class Run:
    """The objects and numbers of a run, made once by set_up."""
    objective: Objective
    model: nn.Module           # the one inside the objective
    ddp: nn.Module             # the objective, wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    examples: list[Example]    # of the training split
    micro_batch_tokens: int    # B x T of a forward pass, at most
    steps_per_epoch: int       # the last one of an epoch may have fewer examples
    max_steps: int
    warmup_steps: int
    data_hash: str
    base: dict                 # {"source", "sha256"} of the model that it started from
    provenance: dict           # commit, versions, command


@dataclass
class Progress:
    """What changes during a run. The state stores the fields in STORED under their names."""
    last_step: int             # the loop ends here: max_steps, or earlier if patience runs out
    step: int = 0              # the next one to train
    tokens: int = 0            # read in all starts
    seconds: float = 0.0       # of training, in all starts
    first: dict = field(default_factory=dict)      # the metrics before training
    # The epoch with the best score (0: none yet), its metrics, and the trained weights after it, on the CPU.
    best: dict = field(default_factory=lambda: dict(score=(-math.inf,), epoch=0, facts={}, weights={}))
    save_failed: bool = False  # the disk was full: try again soon
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


STORED = ("step", "tokens", "seconds", "first", "best")


def set_up(config, runtime, objective, examples, tokenizer, base, state):
    """Return (Run, Progress) of a run that trains what requires gradients, resumed from `state`. Raises UserError."""
    steps_per_epoch = -(-len(examples) // config.batch_size)
    max_steps = steps_per_epoch * config.num_epochs
    warmup_steps = max_steps // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps > max_steps:
        raise UserError(f"--warmup_steps {warmup_steps} exceeds the {counted(max_steps, 'step')} of the run; lower it")
    model, block_size = objective.model, objective.model.config.block_size
    n_trained = sum(w.numel() for w in trained_weights(model).values())
    n_all = sum(p.numel() for p in model.parameters())
    runtime.print(f"training {n_trained:,} of {n_all:,} parameters on {counted(len(examples), 'example')}: "
                  f"{counted(config.num_epochs, 'epoch')} of {counted(steps_per_epoch, 'step')}, on {runtime.device} "
                  f"in {runtime.dtype_name}, {counted(runtime.world_size, 'process')}")
    ddp = runtime.data_parallel(objective.to(runtime.device))
    rows = find_micro_batch_size(ddp, block_size, config.micro_batch_size,
                                 max(1, config.batch_size // runtime.world_size), runtime)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.max_lr, betas=(0.9, 0.98),
                                  fused=True)
    digest = hashlib.sha256()      # must be equal on all ranks, and when the run is resumed
    for example in examples:
        digest.update(len(example).to_bytes(4, "little") + example.tokens.tobytes() + example.targets.tobytes())
    run = Run(objective, model, ddp, optimizer, runtime.grad_scaler(), tokenizer, examples, rows * block_size,
              steps_per_epoch, max_steps, warmup_steps, digest.hexdigest(), base, checkpoint.provenance())
    runtime.require_equal("flags", asdict(config))
    runtime.require_equal("examples", run.data_hash)
    progress = Progress(last_step=min(2, max_steps) if config.dry_run else max_steps)
    if state:      # there is no warm_up as in train.py: with 3 or more processes the first step may sum differently
        if state["data"] != run.data_hash:
            raise UserError("the run in --out had other training examples; use another --out")
        if state["base"]["sha256"] != base["sha256"]:
            raise UserError(f"the run in --out began with other weights ({state['base']['source']}); use another --out")
        model.load_state_dict(state["trained"], strict=False)
        checkpoint.restore_optimizer(run, state)
        for name in STORED:
            setattr(progress, name, state[name])
        runtime.print(f"resuming from step {progress.step}")
    return run, progress


def trained_weights(model):
    """Return {name: tensor} of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# ---- training ----------------------------------------------------------------

def train_step(run, config, runtime, step):
    """Train on this rank's examples of a step; return (StepResult, tokens read), the same on all ranks."""
    # Every step seeds the generators with (seed, step, rank): dropout repeats after a resume without any saved state.
    seed_everything(config.seed, "step", step, runtime.rank)
    # The examples of a step are a function of (seed, step). Dealing them out by length gives all ranks similar work.
    epoch, place = divmod(step, run.steps_per_epoch)
    order = permutation(len(run.examples), config.seed, "examples", epoch)
    examples = [run.examples[i] for i in order[place * config.batch_size:(place + 1) * config.batch_size]]
    mine = sorted(examples, key=len, reverse=True)[runtime.rank::runtime.world_size]
    mine = mine or [Example([0], [IGNORED])]                               # DDP needs a backward pass on every rank
    micro_batches = list(make_batches(mine, run.micro_batch_tokens, run.model.config.block_size))
    scale = runtime.world_size / run.objective.total_weight(examples)      # x world_size: DDP takes the mean over ranks
    loss = torch.zeros((), device=runtime.device)
    for i, (_, x, y) in enumerate(micro_batches):
        final = i + 1 == len(micro_batches)
        # Gradients are averaged over ranks once a step, in its last micro-batch. no_sync holds the forward pass too:
        # there, not in backward, DDP decides whether this backward pass will reduce.
        with nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                # backward() adds up gradients; multiplying here by 1 / (targets of the whole step) makes the sum the
                # gradient of the mean over all targets.
                micro_loss = run.ddp(x.to(runtime.device), y.to(runtime.device)) * scale
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()             # reading it here would make the GPU wait
    result = finish_step(run.model, run.optimizer, run.scaler, config.grad_clip, loss, runtime)
    return result, sum(map(len, examples))


def loop(run, progress, config, runtime, log, evaluate):
    """Train to progress.last_step, or until patience runs out. Raises StopRequested, RunFailed (updates skipped)."""
    first_step, start_time = progress.step, time.perf_counter() - progress.seconds
    # At step k: evaluate and save if an epoch ends here, then train step k. So the loop also evaluates the untrained
    # model, and the final weights are evaluated and saved by the same lines as all others.
    while True:
        runtime.raise_if_stopping()                   # the last all-reduce has told all ranks
        step, last = progress.step, progress.step == progress.last_step

        # once an epoch: validation (all ranks take part)
        if step % run.steps_per_epoch == 0 or last:
            epoch = -(-step // run.steps_per_epoch)   # a dry run ends within the first
            run.model.eval()
            with log.timed("validation", run.steps_per_epoch), torch.no_grad():
                score, metrics = evaluate()
            run.model.train()
            if epoch == 0:
                progress.first = metrics
            # A loss that is not finite is never better, however high the other metrics are.
            better = epoch > 0 and score > progress.best["score"] and all(map(math.isfinite, score))
            if better:
                weights = {name: w.to("cpu", copy=True) for name, w in trained_weights(run.model).items()}
                progress.best = dict(score=score, epoch=epoch, facts=metrics, weights=weights)
            words = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) + " (the best so far)" * better
            log.note(step, f"epoch {epoch}/{config.num_epochs}: {words}", epoch=epoch, **metrics)
            progress.seconds = time.perf_counter() - start_time
            best = progress.best["epoch"]
            if not last and config.patience and best and epoch - best >= config.patience:
                runtime.print(f"stopped early: no better epoch in the last {config.patience}, the best was {best}")
                progress.last_step, last = step, True

        # once an epoch: the state, unless this start began with it; sooner again if the disk was full
        epoch_ends = step % run.steps_per_epoch == 0 or last
        if step > first_step and (epoch_ends or (progress.save_failed and step % checkpoint.RETRY_STEPS == 0)):
            save_state(run, progress, config, runtime)
        if last:
            break

        # one training step; evaluation and saving are outside its clock
        log.start_clock()
        lr = config.max_lr * learning_rate_factor(step, run, "cosine", config.min_lr / config.max_lr)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        result, n_tokens = train_step(run, config, runtime, step)
        log.train(step, result, lr, n_tokens)
        skip_reason = progress.skipped.record(result, run.scaler)
        if skip_reason:
            runtime.print(f"step {step}: update skipped on all ranks, {skip_reason}")
        progress.skipped.check()                      # ends the run after ten in a row
        if step == first_step:
            runtime.first_step_done()                 # shortens the time-outs
        progress.step, progress.tokens = step + 1, progress.tokens + n_tokens
        progress.seconds = time.perf_counter() - start_time


def train(run, progress, config, runtime, evaluate, write_results):
    """Train to the end, write the results and mark the run as finished; if stopped, save the state instead.

    evaluate() -> (score, {name: number}) on every rank. The score is a tuple, higher is better; the numbers are logged.
    write_results() is called on every rank, with the best epoch's weights in the model; on rank 0 it returns (entries
    of metrics.json, the paths it wrote, the model's first, the next command). Raises UserError, RunFailed.
    """
    first_step = progress.step
    with closing(RunLog(progress, config, runtime, config.out, "fine-tuning", progress.tokens)) as log:
        try:
            runtime.setup_done()
            loop(run, progress, config, runtime, log, evaluate)
        except StopRequested:           # raised on all ranks at the same collective
            if config.dry_run:
                runtime.print("the dry run was stopped")
                raise SystemExit(130)
            if progress.step > first_step:
                save_state(run, progress, config, runtime)
            runtime.print(checkpoint.stop_message(progress))
            return
        best = progress.best
        if not best["weights"]:
            raise RunFailed("no epoch ended with a finite loss; try a smaller --max_lr")
        run.model.load_state_dict(best["weights"], strict=False)
        run.model.eval()
        if config.dry_run:
            runtime.print(log.forecast(run.max_steps))
        try:
            results = write_results()
            if runtime.is_main:
                report, (model, *files), command = results
                files.append(Path(config.out) / "metrics.json")
                write_json(files[-1], dict(report, best_epoch=best["epoch"], steps=progress.step,
                                           seconds=round(progress.seconds, 1), base=run.base,
                                           provenance=run.provenance))
                for path in files:
                    if path.suffix != ".pt":      # weights would be copied: their path is enough
                        log.tracker.artifact(path)
                log.tracker.text("best_checkpoint.txt", f"{model.resolve()}\n")
                if not config.dry_run:
                    print(f"wrote {', '.join(map(str, [model, *files]))}\nnext: {command}", flush=True)
            finish_state(progress, config, runtime)
        except RunFailed:
            raise
        except UserError as error:
            lost = "The last state could not be written, so the same command repeats the steps since the newest"
            kept = "The training is not lost: the same command resumes after it, and writes the results again"
            raise RunFailed(f"{error}. {lost if progress.save_failed else kept}") from error


# ---- the folder and the state of a run ---------------------------------------

def work_in_folder(config, runtime, finetune):
    """Call finetune(config, runtime, state of an interrupted run or None) while no other run uses --out."""
    if config.dry_run:
        with temporary_folder(runtime, config.out or ".") as folder:
            finetune(with_changes(config, out=folder, mlflow=False), runtime, None)
        return
    with lock_folder(config.out, runtime):
        state = runtime.broadcast(lambda: read_state(config, runtime.print))
        if state and state["finished"]:
            runtime.print(f"the run in {config.out} is finished; for a new run use another --out")
            return
        finetune(config, runtime, state)


def read_state(config, notice):
    """Return the newest state of the run in --out that can be resumed, None if there is no run. Raises UserError."""
    paths = [path for _, path in checkpoint.list_checkpoints(config.out, "state")]
    paths += [path for path in [Path(config.out) / OLD_STATE] if path.is_file()]
    if paths and config.resume == "never":
        raise UserError(f"--resume never, but {config.out} already contains a run; delete it or use another --out")

    def read(path):
        state = checkpoint.read_checkpoint(path)
        names = ("config", "finished") if state.get("finished") else STATE_ENTRIES
        return checkpoint.check_entries(state, {name: STATE_ENTRIES[name] for name in names}, path)
    state = checkpoint.first_valid(paths, read, notice)
    checkpoint.claim_folder(config.out, state, RUN_FILES)
    if not state:
        return None
    differing = checkpoint.changed_flags(config, state["config"])
    if state["finished"]:       # data and model will not be opened, so only their names can be compared
        differing += [f"--{name} {getattr(config, name)} (it has {state['config'].get(name)})"
                      for name in ("data", "init_from") if getattr(config, name) != state["config"].get(name)]
    if differing:
        raise UserError(f"{config.out} contains another run: {', '.join(differing)}. Use its flags to resume it, or "
                        "another --out for a new run")
    return state


def save_state(run, progress, config, runtime):
    """Write what the run resumes from, and keep the state before it, in case this one is damaged."""
    checkpoint.write_and_rotate(runtime, progress, config.out, 2, dict(
        {name: getattr(progress, name) for name in STORED}, base=run.base, data=run.data_hash, config=asdict(config),
        trained=trained_weights(run.model), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        finished=False), kind="state")


def finish_state(progress, config, runtime):
    """Replace the states by the flags of the finished run, on rank 0. Raises UserError."""
    if runtime.is_main:
        path = checkpoint.checkpoint_path(config.out, progress.step, "state")
        checkpoint.save_checkpoint(path, dict(config=asdict(config), finished=True))
        checkpoint.delete_old_checkpoints(config.out, 1, progress.step, "state")
        old = Path(config.out) / OLD_STATE
        if checkpoint.is_ours(old, FolderLock.mark_of(config.out)):
            old.unlink()


def save_model(path, run, progress):
    """Write a checkpoint of the best epoch's weights, which the model holds. Raises UserError."""
    best = progress.best
    checkpoint.save_checkpoint(path, dict(
        model=run.model.state_dict(), config=run.model.config_dict(), step=best["epoch"] * run.steps_per_epoch,
        val_loss=best["facts"]["val_loss"], tokenizer=run.tokenizer.to_checkpoint(), base=run.base,
        provenance=run.provenance))
