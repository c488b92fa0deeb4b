"""The loop of the fine-tuning scripts over rows with targets, its state and its log.

The loss of a step is the mean over all its targets: each micro-batch of each rank adds its sum over the number in the
whole step, so that the gradient is the same for any micro-batch size and any number of processes.
"""
import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import RunFailed, UserError
from exactgpt.distributed import StopRequested, command_line, seed_everything
from exactgpt.human import human_time
from exactgpt.metrics import AppendFile, cut_back
from exactgpt.plan import learning_rate_factor
from exactgpt.rows import make_batches
from exactgpt.shards import permutation
from exactgpt.tracking import Tracker
from exactgpt.update import Skipped, update
from model import IGNORED

STATE_NAME = "state.pt"  # in --out: what a run goes on from


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

    def amount(self, rows):
        """What the targets of some rows count together."""
        targets = np.concatenate([row.targets[row.targets != IGNORED] for row in rows])
        return float(self.weights.cpu().double()[targets].sum()) if self.weights is not None else float(len(targets))


@dataclass
class Best:
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
    best: Best = field(default_factory=Best)
    first: dict = field(default_factory=dict)    # the facts before training
    skipped: Skipped = field(default_factory=Skipped)


def trained_weights(model):
    """{name: tensor} of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def rows_of_step(run, config):
    """The numbers of the training rows of this step: a pure function of (seed, step)."""
    epoch, place = divmod(run.step, run.steps_per_epoch)
    order = permutation(len(run.rows), config.seed, "examples", epoch)
    return order[place * config.batch_size:(place + 1) * config.batch_size].tolist()


# -----------------------------------------------------------------------------
# the loop

def tune(run, config, runtime, evaluate):
    """Train to the end, or until patience is over: whether it came so far, and has the weights of its best epoch now.

    evaluate() -> (score, a tuple, the higher the better; {name: number}), on every rank. At step k: evaluate if an
    epoch ends (or begins the run), save, then train step k.
    """
    log = TuneLog(runtime, config, run)
    first_step, stop = run.step, False
    try:
        runtime.started()
        while True:
            if stop:
                raise StopRequested
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
            run.step, stop = run.step + 1, result.stop
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
        run.best = Best(score, epoch, facts, {k: w.to("cpu", copy=True) for k, w in trained_weights(run.model).items()})
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
    indices = rows_of_step(run, config)
    rows = [run.rows[i] for i in indices]
    share = runtime.world_size / run.objective.amount(rows)                            # DDP divides by world_size
    batches = list(my_batches(run, runtime, indices)) or [nothing()]
    loss = torch.zeros((), device=runtime.device)
    for i, (_, x, y) in enumerate(batches):
        # Forward and backward both inside no_sync: DDP decides in the forward pass whether gradients are reduced.
        final = i + 1 == len(batches)
        with contextlib.nullcontext() if final or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                micro_loss = run.ddp(x.to(runtime.device), y.to(runtime.device)) * share
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()
    result = update(run.model, run.optimizer, run.scaler, config.grad_clip, loss, runtime)
    return result, sum(map(len, rows))


def my_batches(run, runtime, indices):
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
        runtime.poll()


def nothing():
    """A batch without targets, for a rank that has no row of an epoch's last step: DDP waits for every rank."""
    return [], torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED)


@torch.no_grad()
def mean_loss(run, runtime, rows):
    """The mean loss over the targets of some rows, in nats, on every rank. Raises StopRequested."""
    loss = torch.zeros((), device=runtime.device)
    for _, x, y in evaluation_batches(rows, run.budget, run.model.config.block_size, runtime):
        with runtime.autocast():
            loss = loss + run.objective(x, y)
    return runtime.sum(loss)[0] / run.objective.amount(rows)


def set_learning_rate(run, config):
    """Set the learning rate of this step and return it; a Tuning has the fields of a Plan that count here."""
    rate = config.max_lr * learning_rate_factor(run.step, run, "cosine", config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


# -----------------------------------------------------------------------------
# state and log

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
    run.first, run.best = state["first"], Best(**state["best"])


class TuneLog:
    """Step lines, and metrics.jsonl in --out with train.py's names; rank 0 writes and prints."""

    def __init__(self, runtime, config, run):
        self._runtime, self._config, self._run = runtime, config, run
        self._step_s, self._evaluation_s = [], []
        if runtime.is_main:
            path = Path(config.out) / "metrics.jsonl"
            cut_back(path, run.step, lambda line: int(json.loads(line)["step"]))
            self._file = AppendFile(path)
            self._tracker = Tracker(config, config.out, "fine-tuning", resumed=run.step > 0)

    def train(self, result, rate, n_tokens, seconds, skipped):
        """Log one step; n_tokens: that it read, all ranks together; skipped: why it was no update, "" where it was."""
        run = self._run
        self._step_s.append(seconds)
        if not self._runtime.is_main:
            return
        tok_per_sec = n_tokens / seconds
        self._row(loss=result.loss, lr=rate, grad_norm=result.grad_norm, ms=1000 * seconds, tok_per_sec=tok_per_sec)
        recent = self._step_s[-50:]
        eta = (run.max_steps - run.step - 1) * sum(recent) / len(recent)
        print(f"step {run.step:>{len(str(run.max_steps))}}/{run.max_steps} | loss {result.loss:.4f} | lr {rate:.2e} | "
              f"norm {result.grad_norm:.3f} | {1000 * seconds:.0f} ms | {tok_per_sec:,.0f} tok/s | "
              f"eta {human_time(eta)}{skipped and f' | update skipped: {skipped}'}", flush=True)

    def evaluation(self, epoch, facts, better, seconds):
        """Log what an evaluation measured, {name: number}."""
        self._evaluation_s.append(seconds)
        if self._runtime.is_main:
            self._row(epoch=epoch, **facts)
            words = ", ".join(f"{name} {value:.4f}" for name, value in facts.items())
            print(f"epoch {epoch}/{self._config.num_epochs}: {words}{' (the best so far)' * better}", flush=True)

    def _row(self, **values):
        plain = {k: None if not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(dict(step=self._run.step, tokens=self._run.tokens, **plain)) + "\n")
        self._tracker.log(self._run.step, tokens=self._run.tokens, **plain)

    def forecast(self):
        """What the full run takes, after a dry run."""
        n, every = self._run.full_steps, self._config.num_epochs + 1
        seconds = n * self._step_s[-1] + every * self._evaluation_s[-1]
        self._runtime.print(f"dry run: {1000 * self._step_s[-1]:.0f} ms a step; the full run of {n} steps takes about "
                            f"{human_time(seconds)}. Nothing was kept.")

    def close(self):
        """Close the files."""
        if self._runtime.is_main:
            self._file.close()
            self._tracker.close(finished=False)      # the script adds the results


def track_results(config, best_checkpoint, files):
    """Add to the run in MLflow what came of it, on rank 0."""
    tracker = Tracker(config, config.out, "fine-tuning", resumed=True)
    for path in files:
        tracker.artifact(path)
    tracker.text("best_checkpoint.txt", f"{best_checkpoint.resolve()}\n")
    tracker.close()
