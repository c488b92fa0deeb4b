"""Pretrain GPT-2 on token shards.

    python train.py --data_dir data/demo --log_dir logs/demo ...      # one process: a GPU, or a CPU
    torchrun --nproc_per_node=8 train.py                              # GPT-2 124M on 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train.py --device cpu ...             # two CPU processes (gloo)

Killed, preempted or crashed: the same command continues from the newest checkpoint in --log_dir.
"""
import contextlib
import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import build_model, checkpoint_path, delete_old, open_model, save_checkpoint
from config import DeviceConfig, UserError, flag, parse_config, run_script
from dataloader import DataOrder, TokenStream, TrainLoader, n_val_windows, val_batches
from device import attention_backend, choose_compile
from files import FolderLock, human_bytes
from hf_format import explain
from inference import generate
from metrics import RunLog
from model import GPT, GPT2_SIZES, IGNORED, GPTConfig, padded_vocab, parameter_groups
from plan import CPU_TOKENS, MAX_STEPS, WARMUP_STEPS, Plan, decay_start, divisors, learning_rate_factor, make_plan
from resume import adopt_choices, check_same_run, differences, find_checkpoint, is_finished
from runtime import StopRequested, provenance, seed_everything, start
from shards import ShardFolder
from tokenizer import Tokenizer

SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48
SLOW_STEP_S = 5           # a longer step is asked for a stop after each micro-batch


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
    compiled: object = None           # raw, compiled or not: validation
    ddp: object = None                # compiled, wrapped where there are several processes: training
    optimizer: object = None
    scaler: object = None
    micro_batch_size: int = 0
    first_step: int = 0
    best_val_loss: float = float("inf")
    val: tuple = (None, None)         # step and loss of the newest validation
    save_failed: bool = False         # the newest checkpoint could not be written: try again at the next step
    slow: bool = False                # a step lasts so long that a stop is looked for after each micro-batch


def set_up(config, runtime):
    """Everything that the loop needs, checked, before the first step; None where the run is finished already."""
    folder = runtime.together(lambda: ShardFolder(config.data_dir))
    tokenizer = runtime.together(folder.tokenizer)
    runtime.together(lambda: folder.check_vocabulary(tokenizer.n_vocab))
    checkpoint = runtime.from_main(lambda: find_checkpoint(config, runtime.print))
    raw = make_model(config, runtime, tokenizer, checkpoint)
    block_size = raw.config.block_size
    train_stream, val_stream = TokenStream(folder.train, block_size), TokenStream(folder.val, block_size)
    if config.eval_every:
        n_val_windows(val_stream, config.val_tokens)
    plan = make_plan(config, block_size, train_stream.n_windows, runtime.world_size)
    run = Run(plan, folder, tokenizer, train_stream, val_stream, raw, provenance=provenance())
    if checkpoint:
        check_same_run(config, checkpoint, requested_shape(config), folder.fingerprint(), plan)
        if is_finished(config, checkpoint, plan):
            runtime.print(f"the run in {config.log_dir} is finished, at step {checkpoint['step']}; to train its model further: "
                          f"--init_from {checkpoint_path(config.log_dir, checkpoint['step'])} --log_dir NEW")
            return None
        run.first_step, run.best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
    run.micro_batch_size = adopt_choices(config, runtime, checkpoint, plan.local_windows)
    if not run.micro_batch_size:
        run.micro_batch_size = next(d for d in divisors(plan.local_windows) if d == 1 or d * block_size <= CPU_TOKENS)
    build(run, config, runtime, checkpoint)
    describe(run, config, runtime, checkpoint)
    warm_up(run, runtime)
    return run


def requested_shape(config):
    """The shape that the flags ask for; None stands for what they leave to the weights of --init_from."""
    named = GPT2_SIZES[config.model] if config.model else {n: getattr(config, n) for n in ("n_layer", "n_head", "n_embd")}
    shape = dict(named, block_size=config.block_size)
    if config.init_from == "scratch":
        defaults = dict(GPT2_SIZES["gpt2"], block_size=1024)
        shape = {name: defaults[name] if value is None else value for name, value in shape.items()}
    return shape


def make_model(config, runtime, tokenizer, checkpoint):
    """The model on the CPU: the checkpoint's, or fresh, or from the weights that --init_from names."""
    if checkpoint:
        return build_model(checkpoint["config"], checkpoint["model"], f"the checkpoint in {config.log_dir}")
    shape = requested_shape(config)
    if config.init_from == "scratch":
        seed_everything(config.seed, "initial weights")
        return explain(lambda: GPT(GPTConfig(vocab_size=padded_vocab(tokenizer.n_vocab), dropout=config.dropout, **shape)), "flags")
    stored = runtime.from_main(lambda: open_weights(config.init_from, tokenizer))
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if shape["block_size"] and shape["block_size"] < model.config.block_size:
        model.crop_block_size(shape["block_size"])
    for name, value in shape.items():
        if value not in (None, getattr(model.config, name)):
            raise UserError(f"--{name} {value}, but {config.init_from} has {getattr(model.config, name)}; leave the flag out")
    return model


def open_weights(source, tokenizer):
    """Config and weights of a model to start from, as plain data. Raises UserError if its vocabulary is another one."""
    opened = open_model(source)
    if opened.tokenizer and opened.tokenizer.name != tokenizer.name:
        raise UserError(f"{source} speaks the vocabulary {opened.tokenizer.name!r}, the shards are in {tokenizer.name!r}")
    if tokenizer.n_vocab > opened.model.config.vocab_size:
        raise UserError(f"{source} has {opened.model.config.vocab_size} vocabulary rows, the shards need {tokenizer.n_vocab}")
    return dict(config=opened.model.config_dict(), model=opened.model.state_dict())


def build(run, config, runtime, checkpoint):
    """Model on its device, compiled and wrapped; optimizer and scaler; their states from the checkpoint."""
    shape = run.raw.config
    attention = attention_backend(config.attention, runtime.device, runtime.dtype, shape.n_head, shape.n_embd // shape.n_head,
                                  shape.block_size)
    compile, notice = runtime.together(lambda: choose_compile(config.compile, runtime.hardware, runtime.device))
    if notice:
        runtime.print(notice)
    run.raw.to(runtime.device).train()
    run.compiled = torch.compile(run.raw, dynamic=False) if compile else run.raw
    run.ddp = run.compiled
    if runtime.world_size > 1:
        run.ddp = DistributedDataParallel(run.compiled, gradient_as_bucket_view=True, broadcast_buffers=False,
                                          device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None)
    run.optimizer = torch.optim.AdamW(parameter_groups(run.raw, config.weight_decay), lr=config.max_lr,
                                      betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    run.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype_name == "fp16")
    if checkpoint:
        restore(run, checkpoint)
    run.resolved = dict(device=runtime.device.type, dtype=runtime.dtype_name, compile=compile, attention=attention,
                        micro_batch_size=run.micro_batch_size, world_size=runtime.world_size, threads=torch.get_num_threads(),
                        max_steps=run.plan.max_steps, warmup_steps=run.plan.warmup_steps, decay_start=decay_start(run.plan))


def restore(run, checkpoint):
    """Put the optimizer's and scaler's state back. Raises UserError for states that do not fit the model."""
    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if run.scaler.is_enabled() and checkpoint["scaler"]:
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit the model ({error})") from error


def warm_up(run, runtime):
    """Two forward/backwards on dummy tokens through the final model, the first one synchronised.

    Compiles, proves that the micro-batch fits, and lets DDP rebuild its buckets: after that the order of its sums
    stays, so that a resumed run adds up as the first one did.
    """
    x = torch.zeros(run.micro_batch_size, run.raw.config.block_size, dtype=torch.long, device=runtime.device)
    for sync in (True, False):
        start_time = time.perf_counter()
        with contextlib.nullcontext() if sync or runtime.world_size == 1 else run.ddp.no_sync():
            with runtime.autocast():
                loss = run.ddp(x, x)
            run.scaler.scale(loss).backward()
        loss.item()
    run.optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - start_time) * run.plan.local_windows / run.micro_batch_size
    run.slow = runtime.sum(seconds)[0] / runtime.world_size > SLOW_STEP_S
    runtime.poll()


def describe(run, config, runtime, checkpoint):
    """The banner: what this start will do."""
    c, plan, resolved = run.raw.config, run.plan, run.resolved
    accum = plan.local_windows // run.micro_batch_size
    runtime.print_banner({
        "model": f"GPT-2, {run.raw.n_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
                 f"block_size {c.block_size}, vocabulary {c.vocab_size} ({run.tokenizer.name}, {run.tokenizer.n_vocab})",
        "data": f"{config.data_dir}: {run.train_stream.n_tokens:,} train and {run.val_stream.n_tokens:,} val tokens in "
                f"{len(run.folder.shards)} shards",
        "step": f"{plan.tokens_per_step:,} tokens = {runtime.world_size} process(es) x {accum} micro-batches x "
                f"{run.micro_batch_size} x {c.block_size}",
        "length": f"{plan.max_steps} steps, {plan.epochs:.2f} epochs; {config.schedule} schedule, warm-up {plan.warmup_steps}",
        "machine": f"{runtime.hardware.name} ({runtime.device}), {resolved['dtype']}, attention {resolved['attention']}, compile "
                   f"{'on' if resolved['compile'] else 'off'}, {resolved['threads']} threads, torch {torch.__version__}",
        "files": f"{config.log_dir}: up to {config.keep_checkpoints} checkpoints of {human_bytes(16 * run.raw.n_params() * 0.75)}",
    })
    if checkpoint:
        runtime.print(f"going on from step {run.first_step}")
        changed = differences(checkpoint["resolved"], resolved)
        if changed:
            runtime.print(f"same tokens, not bitwise the same run: {', '.join(changed)}")


def train(config, runtime):
    """At step k: evaluate, save, then train step k. The end, step max_steps, is evaluated and saved by the same lines."""
    lock = runtime.together(lambda: FolderLock(config.log_dir, wait_s=60) if runtime.is_main else None)
    run = set_up(config, runtime)
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
    """Set the learning rate of a step in all parameter groups; returns it."""
    lr = config.max_lr * learning_rate_factor(step, run.plan, config.schedule, config.min_lr / config.max_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


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
