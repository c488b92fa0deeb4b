"""Pretrain GPT-2 on token shards.

    python train.py --data_dir data/demo --log_dir logs/demo ...      # one process: a GPU, or a CPU
    torchrun --nproc_per_node=8 train.py                              # GPT-2 124M on 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train.py --device cpu ...             # two CPU processes (gloo)

Killed, preempted or crashed: the same command continues from the newest checkpoint in --log_dir.
"""
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from exactgpt.assemble import assemble, restore, state_to_restore, warm_up
from exactgpt.checkpoint import checkpoint_path, delete_old, save_checkpoint
from exactgpt.config import DeviceConfig, RunFailed, UserError, flag, parse_config, replace, run_script
from exactgpt.dataloader import DataOrder, TrainLoader, n_val_windows, val_batches
from exactgpt.device import returning_freed_memory
from exactgpt.distributed import (
    STEADY_TIMEOUT_S,
    StopRequested,
    command_line,
    lock_folder,
    seed_everything,
    start,
    temporary_folder,
)
from exactgpt.human import human_bytes
from exactgpt.metrics import RunLog
from exactgpt.plan import MAX_STEPS, TOKENS_PER_STEP, WARMUP_STEPS, learning_rate_factor
from exactgpt.resume import find_checkpoint
from exactgpt.tracking import require_mlflow
from exactgpt.update import update
from hellaswag import N_EXAMPLES, evaluate_hellaswag, prepare_hellaswag
from inference import generate
from model import GPT2_SIZES, IGNORED

SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48
HELLASWAG_TOKENS = 8192    # of a batch, at most
DRY_RUN_ITEMS = 200        # of HellaSwag's 10,042
RETRY_STEPS = 10           # between tries to write a checkpoint that a full disk refused


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


def main(argv=None):
    """Train as the flags (sys.argv, or argv) say, or try it with --dry_run. Raises UserError for user mistakes."""
    config = parse_config(TrainConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        if config.dry_run:
            dry_run(config, runtime)
        else:
            train(config, runtime)


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
            runtime.started()
        except StopRequested:
            runtime.print("stopped before the first step; there was nothing to save")
            return None
        return run, loop(run, config, runtime)


def loop(run, config, runtime):
    """At step k: evaluate, save, then train step k; the end is evaluated and saved by the same lines.

    A stop that was asked for saves state k, untrained. Returns the RunLog, None where a dry run was stopped. Raises
    RunFailed where too many steps were skipped, or the last checkpoint could not be written.
    """
    log = RunLog(runtime, config, run)
    loader = TrainLoader(DataOrder(run.train_stream, config.seed), run.plan.windows_per_step, runtime, run.first_step,
                         run.last_step)
    step, stop = run.first_step, False
    try:
        while True:
            if stop:
                raise StopRequested
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
            step, stop = step + 1, result.stop
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
            runtime.poll()                                                             # a stop abandons the step
    return update(run.raw, run.optimizer, run.scaler, config.grad_clip, loss, runtime)


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
        runtime.poll()
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


def write_samples(run, config, runtime, step):
    """Texts that the model writes at this step, on rank 0; the others have nothing to wait for."""
    if not runtime.is_main:
        return []
    run.raw.eval()
    with runtime.autocast():
        texts, _ = generate(run.raw, run.tokenizer, SAMPLE_PROMPTS, max_tokens=SAMPLE_TOKENS, seed=(config.seed, step))
    run.raw.train()
    return texts


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


def write_checkpoint(runtime, path, entries):
    """Write a checkpoint on rank 0; whether it worked, on every rank. A full disk must not end the run."""
    problem = ""
    if runtime.is_main:
        try:
            save_checkpoint(path, entries)
            print(f"step {entries['step']}: wrote {path} ({human_bytes(path.stat().st_size)})", flush=True)
        except OSError as error:
            problem = str(error)
            print(f"warning: not written, the older checkpoints are intact: {problem}", flush=True)
    return runtime.sum(bool(problem))[0] == 0


def dry_run(config, runtime):
    """Two steps, an evaluation, a save and a load in a temporary folder: what the full run would take."""
    with temporary_folder(runtime, config.log_dir) as folder:
        small = replace(config, max_steps=2, num_epochs=None, warmup_steps=None, stop_loss=0.0, resume="auto",
                        log_dir=folder, checkpoint_every=1, mlflow=False,
                        val_tokens=min(config.val_tokens, config.total_batch_size))
        run, log = train(small, runtime, DRY_RUN_ITEMS) or (None, None)
        if log:
            restore(run, runtime.from_main(lambda: state_to_restore(find_checkpoint(small, runtime.print)),
                                           on_device=True))
            shares = dict(HellaSwag=DRY_RUN_ITEMS / N_EXAMPLES)
            if config.eval_every:
                here, there = (n_val_windows(run.val_stream, c.val_tokens) for c in (small, config))
                shares["validation"] = here / there
            runtime.print(log.forecast(config, shares))


if __name__ == "__main__":
    run_script(main)
