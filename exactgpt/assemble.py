"""Everything that a run needs before its first step: data, plan, model, optimizer, from flags or a checkpoint.

`assemble(config, runtime)` makes the Run that train.py's loop works with, `warm_up(run, runtime)` compiles it.
"""
import contextlib
import dataclasses
import gc
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from exactgpt.checkpoint import build_model, disk_bytes, open_model
from exactgpt.config import UserError, explain
from exactgpt.dataloader import TokenStream, n_val_windows
from exactgpt.device import attention_backend, choose_compile, keep_freed_memory
from exactgpt.distributed import code_hash, provenance, seed_everything
from exactgpt.human import human_bytes
from exactgpt.memory import CompilationFailed, dummy_rows, find_micro_batch_size
from exactgpt.optimizer import make_optimizer
from exactgpt.plan import Plan, decay_start, make_plan
from exactgpt.resume import adopt_choices, advised, check_same_run, differences, find_checkpoint, last_step, source
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import Tokenizer
from exactgpt.update import Skipped
from model import GPT, GPT2_SIZES, GPTConfig, padded_vocab

SLOW_STEP_S = 5   # in a longer step a stop is looked for after each micro-batch


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
    folder = runtime.together(lambda: ShardFolder(config.data_dir))
    tokenizer = runtime.together(lambda: folder.tokenizer(config.tokenizer))
    runtime.together(lambda: folder.check_vocabulary(tokenizer.n_vocab))
    runtime.agree("flags", asdict(config))
    runtime.agree("code", code_hash())
    runtime.agree("token shards", folder.fingerprint())
    found = runtime.together(lambda: find_checkpoint(config, runtime.print) if runtime.is_main else None)
    checkpoint = runtime.from_main(lambda: found and {**found, "optimizer": None}, on_device=True)
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
        restore(run, runtime.from_main(lambda: state_to_restore(found), on_device=True))
    describe(run, config, runtime, checkpoint, saves)
    return run


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
        return explain(lambda: GPT(GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **shape)),
                       "the model's flags")
    stored = runtime.from_main(lambda: open_weights(config.init_from, tokenizer, config.tokenizer))
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if shape["block_size"] and shape["block_size"] < model.config.block_size:
        model.crop_block_size(shape["block_size"])
    for name, value in shape.items():
        if value not in (None, getattr(model.config, name)):
            raise UserError(f"--{name} {value}, but {config.init_from} has {getattr(model.config, name)}; leave it out")
    return model


def open_weights(source, tokenizer, folder):
    """Config and weights of a model to start from, as plain data. Raises UserError if its vocabulary is another one."""
    opened = open_model(source, tokenizer=folder)
    if opened.tokenizer and opened.tokenizer.name != tokenizer.name:
        raise UserError(f"{source} speaks the vocabulary {opened.tokenizer.name}, the shards are in {tokenizer.name}")
    rows = opened.model.config.vocab_size
    if tokenizer.n_vocab > rows:
        raise UserError(f"{source} has {rows} vocabulary rows, the shards need {tokenizer.n_vocab}")
    return dict(config=opened.model.config_dict(), model=opened.model.state_dict())


def check_disk(config, run, runtime):
    """Raise UserError on every rank if the checkpoints of the run will not fit on the disk."""
    def check():
        free = shutil.disk_usage(config.log_dir).free
        needed = disk_bytes(config, run.raw, run.plan.max_steps)
        needed -= sum(p.stat().st_size for p in Path(config.log_dir).glob("model_*.pt"))
        if free < needed:
            raise UserError(f"the checkpoints need {human_bytes(needed)} more, the disk of {config.log_dir} has "
                            f"{human_bytes(free)}; make room, choose another --log_dir, or fewer --keep_checkpoints")
    runtime.together(check if runtime.is_main else lambda: None)


def build(run, config, runtime):
    """Attention, compilation, DDP, the micro-batch that fits what then runs; optimizer and scaler.

    Raises UserError where --compile on or --attention asks for what the device lacks, or no micro-batch fits.
    """
    shape = run.raw.config
    attention = runtime.together(lambda: attention_backend(config.attention, runtime.device, runtime.dtype, shape))
    compile, notice = runtime.together(lambda: choose_compile(config.compile, runtime.hardware, runtime.device))
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


def describe(run, config, runtime, checkpoint, saves):
    """The banner: what this start will do."""
    c, plan, resolved = run.raw.config, run.plan, run.resolved
    accum = plan.local_windows // run.micro_batch_size
    lines = {
        "model": f"GPT-2, {run.raw.n_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels",
        "tokens": f"block_size {c.block_size}, vocabulary {run.tokenizer.name} of {run.tokenizer.n_vocab:,}"
                  + f" (padded to {c.vocab_size:,})" * (c.vocab_size > run.tokenizer.n_vocab),
        "data": f"{config.data_dir}: {run.train_stream.n_tokens:,} train and {run.val_stream.n_tokens:,} val tokens in "
                f"{len(run.folder.shards)} shards",
        "step": f"{plan.tokens_per_step:,} tokens = {runtime.world_size} process{'es' * (runtime.world_size > 1)} x "
                f"{accum} micro-batch{'es' * (accum > 1)} x {run.micro_batch_size} rows x {c.block_size}",
        "length": f"{plan.max_steps:,} steps, {plan.epochs:.2f} epochs; {config.optimizer}, {config.schedule} schedule "
                  f"with {plan.warmup_steps} steps of warm-up",
        "machine": f"{runtime.hardware.name} ({runtime.device}), {resolved['dtype']}, {resolved['attention']} "
                   f"attention, compile {'on' if resolved['compile'] else 'off'}, torch {torch.__version__}",
    }
    if saves:
        lines["disk"] = (f"{human_bytes(disk_bytes(config, run.raw, plan.max_steps))} in {config.log_dir} for "
                         f"{config.keep_checkpoints} checkpoints")
    runtime.print_banner(lines)
    if checkpoint:
        runtime.print(f"going on from step {run.first_step}")
        changed = differences(checkpoint["resolved"], resolved)
        if changed:
            runtime.print(f"same tokens, not bitwise the same run: {', '.join(changed)}")


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
        with contextlib.nullcontext() if sync or runtime.alone else run.ddp.no_sync():
            with runtime.autocast():
                loss = run.ddp(x, y)
            run.scaler.scale(loss).backward()
        loss.item()
    run.optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - start_time) * run.plan.local_windows / run.micro_batch_size
    run.slow = runtime.sum(seconds)[0] / runtime.world_size > SLOW_STEP_S
