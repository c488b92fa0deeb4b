"""Pretrain GPT-2 on token shards.

    python train.py --data_dir data/demo --log_dir logs/demo ...      # one process: a GPU, or a CPU
    torchrun --nproc_per_node=8 train.py                              # GPT-2 124M on 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train.py --device cpu ...             # two CPU processes (gloo)

Killed, preempted or crashed: the same command continues from the newest checkpoint in --log_dir.
"""
import contextlib
import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from assemble import assemble
from checkpoint import checkpoint_path, delete_old, save_checkpoint
from config import DeviceConfig, UserError, flag, parse_config, run_script
from dataloader import DataOrder, TrainLoader, n_val_windows, val_batches
from files import FolderLock, human_bytes
from inference import generate
from metrics import RunLog
from model import GPT2_SIZES, IGNORED
from plan import MAX_STEPS, WARMUP_STEPS, learning_rate_factor
from runtime import StopRequested, seed_everything, start

SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48


@dataclass(kw_only=True)
class TrainConfig(DeviceConfig):
    """Every flag of train.py. The defaults are the GPT-2 124M run; keep=True: a resumed run must have the same."""
    data_dir: str = flag("data/edu_fineweb10B", "folder of token shards", group="data")

    model: str = flag(None, "GPT-2 size (default: gpt2)", group="model", choices=tuple(GPT2_SIZES))
    n_layer: int | None = flag(None, "layers, instead of a named size", group="model", low=1)
    n_head: int | None = flag(None, "attention heads", group="model", low=1)
    n_embd: int | None = flag(None, "channels", group="model", low=1)
    block_size: int | None = flag(None, "tokens that the model sees at once (default: 1024)", group="model", low=1)
    dropout: float = flag(0.0, "dropout probability", group="model", low=0.0, below=1.0, keep=True)
    init_from: str = flag("scratch", "scratch, a GPT-2 name, a Hugging Face folder, or FILE.pt: where the weights begin",
                          group="model")

    total_batch_size: int = flag(524288, "tokens per optimizer step, over all processes", group="batch", low=1, keep=True)
    micro_batch_size: int = flag(0, "rows per forward pass of a process; 0: the largest that fits", group="batch", low=0)

    max_steps: int | None = flag(None, f"optimizer steps (default: {MAX_STEPS})", group="length", low=0)
    num_epochs: float | None = flag(None, "passes over the train split, instead of --max_steps", group="length", above=0)
    stop_loss: float = flag(0.0, "stop once a step's training loss is below this; 0: never", group="length", low=0.0)

    schedule: str = flag("cosine", "cosine to min_lr, or warm-up, stable, linear decay", group="schedule",
                         choices=("cosine", "wsd"), keep=True)
    max_lr: float = flag(6e-4, "peak learning rate", group="schedule", above=0, keep=True)
    min_lr: float = flag(6e-5, "learning rate at the end", group="schedule", low=0.0, keep=True)
    warmup_steps: int | None = flag(None, f"steps of linear warm-up (default: {WARMUP_STEPS}, or a tenth of a shorter run)",
                                    group="schedule", low=0)

    optimizer: str = flag("adamw", "adamw, or muon for the matrices inside the blocks and adamw for the rest", group="optimizer",
                          choices=("adamw", "muon"), keep=True)
    muon_lr: float = flag(0.02, "Muon's peak learning rate; follows the same schedule", group="optimizer", above=0, keep=True)
    muon_weight_decay: float = flag(0.01, "Muon's", group="optimizer", low=0.0, keep=True)
    weight_decay: float = flag(0.1, "of matrices; vectors do not decay", group="optimizer", low=0.0, keep=True)
    beta1: float = flag(0.9, "AdamW's", group="optimizer", low=0.0, below=1.0, keep=True)
    beta2: float = flag(0.95, "AdamW's", group="optimizer", low=0.0, below=1.0, keep=True)
    adam_eps: float = flag(1e-8, "AdamW's", group="optimizer", above=0, keep=True)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", group="optimizer", low=0.0, keep=True)

    eval_every: int = flag(250, "steps between validations; 0: never", group="evaluation", low=0)
    val_tokens: int = flag(10485760, "tokens of a validation, always the same ones", group="evaluation", low=1)
    sample_every: int = flag(250, "steps between samples; 0: never", group="evaluation", low=0)

    log_dir: str = flag("logs", "folder of checkpoints and logs", group="checkpoints")
    checkpoint_every: int = flag(1000, "steps between checkpoints; 0: only at the end", group="checkpoints", low=0)
    keep_checkpoints: int = flag(3, "how many of the newest stay", group="checkpoints", low=1)
    resume: str = flag("auto", "auto: go on from the newest checkpoint in log_dir; never; or FILE.pt", group="checkpoints")

    compile: str = flag("auto", "torch.compile; auto: on CUDA where it works", group="system", choices=("auto", "on", "off"))
    attention: str = flag("auto", "backend of scaled_dot_product_attention", group="system",
                          choices=("auto", "flash", "cudnn", "efficient", "math"))
    seed: int = flag(1337, "of initial weights, data order, dropout", group="system", low=0, keep=True)
    deterministic: bool = flag(False, "bitwise repeatable on a GPU too, and slower", group="system")

    def check(self):
        shape = [n for n in ("n_layer", "n_head", "n_embd") if getattr(self, n) is not None]
        if self.model and shape:
            raise UserError(f"--model {self.model} and --{shape[0]} exclude each other")
        if self.max_steps is not None and self.num_epochs is not None:
            raise UserError("--max_steps and --num_epochs exclude each other")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")


def main(argv=None):
    config = parse_config(TrainConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        train(config, runtime)


def train(config, runtime):
    """At step k: evaluate, save, then train step k. The end, step max_steps, is evaluated and saved by the same lines."""
    lock = runtime.together(lambda: FolderLock(config.log_dir, wait_s=60) if runtime.is_main else None)
    run = assemble(config, runtime)
    if run is None:
        return
    last_step, stop = run.plan.max_steps, False
    log = RunLog(runtime, config.log_dir, run.first_step, last_step, run.plan.tokens_per_step, run.raw.flops_per_token())
    loader = TrainLoader(DataOrder(run.train_stream, config.seed), run.plan.windows_per_step, runtime.rank, runtime.world_size,
                         runtime.device, run.first_step, last_step)
    try:
        for step in itertools.count(run.first_step):
            if stop:
                raise StopRequested
            last = step == last_step
            if due(step, config.eval_every, last):
                with log.pause("validation", config.eval_every):
                    validate(run, config, runtime, log, step)
            if due(step, config.sample_every, last):
                with log.pause("samples", config.sample_every):
                    log.samples(step, write_samples(run, runtime, config.seed, step))
            if last or (step > run.first_step and (due(step, config.checkpoint_every, last) or run.save_failed)):
                with log.pause("checkpoint", config.checkpoint_every):
                    save(run, config, runtime, step, finished=last)
            if last:
                break
            start_time = time.perf_counter()
            tokens, data_wait_s = loader.next_step()
            lr = set_learning_rate(run, config, step)
            loss, grad_norm, stop = train_step(run, config, runtime, tokens, step)
            log.train(step, loss, lr, grad_norm, time.perf_counter() - start_time, data_wait_s)
            if step == run.first_step:
                runtime.first_step_done()
            if loss < config.stop_loss:
                last_step = log.max_steps = step + 1
        runtime.print(f"finished at step {step}: {checkpoint_path(config.log_dir, step)}\n"
                      f"next: python plot.py {config.log_dir}   or   python inference.py "
                      f"--checkpoint {checkpoint_path(config.log_dir, step)} --prompt \"...\"")
    except StopRequested:
        save(run, config, runtime, step)
        runtime.print(f"stopped before step {step}, which is saved; the same command continues")
    finally:
        loader.close()
        log.close()
    del lock


def due(step, every, last):
    """Whether something that happens every so many steps, and at the last one, happens now; every = 0: never."""
    return every > 0 and (step % every == 0 or last)


def train_step(run, config, runtime, tokens, step):
    """One optimizer step on this rank's rows, tokens (local_windows, T + 1).

    Returns (loss, grad_norm, stop): the mean loss over all ranks' tokens, the norm of the mean gradient before
    clipping, whether any rank was asked to stop.
    """
    seed_everything(config.seed, "step", step, runtime.rank)                           # dropout
    micro_batches = tokens.split(run.micro_batch_size)
    loss = 0.0
    for i, rows in enumerate(micro_batches):
        x, y = rows[:, :-1], rows[:, 1:]                                               # (B, T) each
        final = i + 1 == len(micro_batches)
        # Forward and backward both inside no_sync: DDP decides in the forward pass whether gradients will be reduced.
        with contextlib.nullcontext() if final or runtime.world_size == 1 else run.ddp.no_sync():
            with runtime.autocast():
                micro_loss = run.ddp(x, y) / len(micro_batches)
            run.scaler.scale(micro_loss).backward()
        loss = loss + micro_loss.detach()
        if run.slow and not final:
            runtime.poll()                                                             # abandons the step on all ranks
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.raw.parameters(), config.grad_clip or float("inf"))
    loss_sum, signals = runtime.sum(loss, bool(runtime.stop_signal))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return loss_sum / runtime.world_size, float(grad_norm), signals > 0


def set_learning_rate(run, config, step):
    """Set the learning rates of a step, each group's peak times one factor; returns AdamW's."""
    factor = learning_rate_factor(step, run.plan, config.schedule, config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.max_lr * factor


@torch.no_grad()
def validate(run, config, runtime, log, step):
    """Log the mean loss over the first val_tokens of the val split, and keep the best model so far."""
    n_windows = n_val_windows(run.val_stream, config.val_tokens)
    loss, count = torch.zeros((), device=runtime.device), 0
    run.raw.eval()
    for x, y in val_batches(run.val_stream, n_windows, run.micro_batch_size, runtime.rank, runtime.world_size, runtime.device):
        with runtime.autocast():
            loss = loss + run.compiled(x, y, reduction="sum")
        count += int((y != IGNORED).sum())
        runtime.poll()
    run.raw.train()
    loss, count = runtime.sum(loss, count)
    run.val = step, loss / count
    log.validation(step, loss / count, int(count))
    if loss / count < run.best_val_loss:
        run.best_val_loss = loss / count
        if step > 0:
            write_checkpoint(run, runtime, Path(config.log_dir) / "model_best.pt", model_entries(run, step))


def write_samples(run, runtime, seed, step):
    """Texts that the model writes at this step, on rank 0; the others have nothing to wait for."""
    if not runtime.is_main:
        return []
    run.raw.eval()
    with runtime.autocast():
        texts, _ = generate(run.raw, run.tokenizer, SAMPLE_PROMPTS, max_tokens=SAMPLE_TOKENS, seed=(seed, step))
    run.raw.train()
    return texts


def model_entries(run, step):
    """The part of a checkpoint that a model is used with."""
    return dict(model=run.raw.state_dict(), config=run.raw.config_dict(), tokenizer=run.tokenizer.to_checkpoint(),
                step=step, val_loss=run.val[1] if run.val[0] == step else None)


def save(run, config, runtime, step, finished=False):
    """Write model_{step}.pt with all that a run goes on from; keep the newest few."""
    path = checkpoint_path(config.log_dir, step)
    run.save_failed = not write_checkpoint(run, runtime, path, dict(
        model_entries(run, step), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        best_val_loss=run.best_val_loss, train_config=asdict(config), resolved=run.resolved,
        data=run.folder.fingerprint(), finished=finished, provenance=run.provenance))
    if runtime.is_main and not run.save_failed:
        delete_old(config.log_dir, config.keep_checkpoints)


def write_checkpoint(run, runtime, path, entries):
    """Write a checkpoint on rank 0; whether it worked, on every rank. A full disk must not end the run."""
    problem = ""
    if runtime.is_main:
        try:
            save_checkpoint(path, entries)
            print(f"step {entries['step']}: wrote {path} ({human_bytes(path.stat().st_size)})", flush=True)
        except OSError as error:
            problem = str(error)
            print(f"warning: {path} not written, training goes on, the older ones are intact: {problem}", flush=True)
    return runtime.sum(bool(problem))[0] == 0


if __name__ == "__main__":
    run_script(main)
