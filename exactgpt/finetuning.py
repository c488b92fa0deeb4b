"""What the fine-tuning scripts share around their loop: flags, the model that they begin with, the folder of a run."""
import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn

from exactgpt.checkpoint import build_model, open_model, read_checkpoint, weights_hash
from exactgpt.config import DeviceConfig, RunFailed, UserError, flag, replace
from exactgpt.distributed import STEADY_TIMEOUT_S, lock_folder, seed_everything, temporary_folder
from exactgpt.finetune import STATE_NAME, Objective, Tuning, restore, trained_weights
from exactgpt.lora import add_adapter
from exactgpt.memory import find_micro_batch_size
from exactgpt.resume import changed_flags
from exactgpt.rows import hash_rows
from exactgpt.tokenizer import Tokenizer, from_checkpoint
from exactgpt.tracking import require_mlflow
from model import parameter_groups


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
            self.max_lr = self.usual_lr()
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}; lower it")

    def usual_lr(self):
        """The peak learning rate where none is given."""
        raise NotImplementedError


@dataclass(frozen=True)
class Base:
    """An opened model to begin with, the same on every rank."""
    model: nn.Module
    tokenizer: Tokenizer
    record: dict       # {"source", "sha256"}


def open_base(config, runtime):
    """The Base that --init_from names, cut to --block_size, on its device; says which it is. Raises UserError."""
    def read():
        opened = open_model(config.init_from, tokenizer=config.tokenizer).with_tokenizer()
        state = opened.model.state_dict()
        return dict(config=opened.model.config_dict(), model=state, tokenizer=opened.tokenizer.to_checkpoint(),
                    sha256=weights_hash(state), title=opened.describe())
    stored = runtime.from_main(read)
    model = build_model({**stored["config"], "dropout": config.dropout}, stored["model"], config.init_from)
    if config.block_size and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size and config.block_size > model.config.block_size:
        raise UserError(f"--block_size {config.block_size}, but {config.init_from} reads {model.config.block_size}")
    model.to(runtime.device)
    runtime.print(f"{stored['title']}, weights sha256 {stored['sha256'][:12]}")
    return Base(model, from_checkpoint(stored["tokenizer"]), dict(source=config.init_from, sha256=stored["sha256"]))


def add_lora(model, config):
    """Freeze a model and add LoRA matrices as the flags say; peft's wrapper of it."""
    seed_everything(config.seed, "lora")
    return add_adapter(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.init_from)


def build(config, runtime, state, base, model, head, rows, weights=None):
    """The Tuning of a model that trains what requires gradients, at the state it was left in; says what that is.

    base: the Base that the model was made of. state: what find_state found. rows: of the training split; a dry run
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
                 base=base.record, data_hash=hash_rows(rows), budget=size * block_size, steps_per_epoch=epoch,
                 max_steps=epoch if config.dry_run else full_steps, warmup_steps=warmup_steps, full_steps=full_steps)
    runtime.agree("flags", asdict(config))
    runtime.agree("examples", run.data_hash)
    if state:
        runtime.together(lambda: restore(run, state))
        runtime.print(f"going on from step {run.step}")
    return run


def work_in_folder(config, runtime, work):
    """work(config, state) with --out to itself: state is what an earlier start left, None for a fresh run.

    --dry_run: in a temporary folder, which is removed. Raises UserError where --out holds another run.
    """
    if config.dry_run:
        with temporary_folder(runtime, config.out or ".") as folder:
            work(replace(config, out=folder, mlflow=False), None)
        return
    with lock_folder(config.out, runtime):
        state = runtime.from_main(lambda: find_state(config))
        if state and state["finished"]:
            runtime.print(f"the run in {config.out} is finished; for another one choose another --out")
            return
        work(config, state)


def find_state(config):
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
