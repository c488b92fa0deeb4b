"""Going on with a run: which checkpoint, whether it is the same run, and the choices it was started with."""
import contextlib
import os
from pathlib import Path

import torch

from exactgpt.checkpoint import CheckpointError, checkpoint_path, list_checkpoints, newest_valid, read_checkpoint
from exactgpt.config import UserError, kept_fields
from exactgpt.device import choose_dtype
from exactgpt.plan import check_micro_batch_size

TRAINING_ENTRIES = {"model": dict, "config": dict, "step": int, "optimizer": dict, "scaler": dict, "train_config": dict,
                    "resolved": dict, "data": str, "best_val_loss": float, "finished": bool}


def find_checkpoint(config, notice):
    """The checkpoint (a dict) that this start goes on from, or None for a fresh run. Raises UserError.

    --resume auto: the newest valid one in log_dir; never: none, and log_dir must not hold a run; FILE: that one, or
    the newest that an earlier start with the same --resume FILE has left in log_dir.
    """
    if config.resume == "never":
        if list_checkpoints(config.log_dir) or (Path(config.log_dir) / "metrics.jsonl").exists():
            raise UserError(f"--resume never, but {config.log_dir} holds a run; choose another --log_dir, or delete it")
        return None
    if config.resume == "auto":
        found = newest_valid(config.log_dir, check_training_entries, notice)
        return found[1] if found else None
    newest = None
    with contextlib.suppress(CheckpointError):       # all of log_dir's damaged: FILE may yet be whole
        newest = (newest_valid(config.log_dir, check_training_entries, notice) or (None, None))[1]
    if newest and newest["train_config"].get("resume") == config.resume:
        return newest                                # by now FILE itself may have been deleted as an old one
    checkpoint = read_checkpoint(config.resume)
    check_training_entries(checkpoint, config.resume)
    if not newest or newest["step"] <= checkpoint["step"]:
        return checkpoint
    raise UserError(f"{config.log_dir} holds a later checkpoint, of step {newest['step']}: leave --resume out to go on "
                    f"from there, or choose another --log_dir to go on from {config.resume}")


def check_training_entries(checkpoint, path):
    """Raise CheckpointError unless the checkpoint holds all that training needs."""
    for name, kind in TRAINING_ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise CheckpointError(f"{path} cannot be trained on: its entry {name!r} is missing or damaged "
                                  f"(weights alone go in with --init_from {path})")


def check_same_run(config, checkpoint, gpt_config, fingerprint, plan):
    """Raise UserError, naming what differs, unless flags and data are those of the checkpoint's run.

    gpt_config: the shape that the flags ask for, None for what they leave open.
    """
    differing = changed_flags(config, checkpoint["train_config"])
    for name, value in gpt_config.items():
        if value is not None and value != checkpoint["config"].get(name):
            differing.append(f"--{name} {value} (it has {checkpoint['config'].get(name)})")
    if fingerprint != checkpoint["data"]:
        differing.append("other token shards in --data_dir")
    if plan.warmup_steps != checkpoint["resolved"].get("warmup_steps"):
        differing.append(f"--warmup_steps {plan.warmup_steps} (it has {checkpoint['resolved'].get('warmup_steps')})")
    if differing:
        raise UserError(f"{source(config)} holds another run, at step {checkpoint['step']}: {', '.join(differing)}. "
                        "Use its flags to continue it, or another --log_dir to start a new run")
    _check_length(config, checkpoint, plan)


def source(config):
    """Where the checkpoint that a start goes on from is, for messages."""
    return config.log_dir if config.resume == "auto" else config.resume


def advised(config, step):
    """The file to begin another run with, for messages."""
    path = checkpoint_path(config.log_dir, step)
    return path if path.exists() else source(config)


def changed_flags(config, stored):
    """The flags that a resumed run must keep and that differ from the stored ones, as ["--seed 2 (it has 1)"]."""
    return [f"--{name} {getattr(config, name)} (it has {stored[name]})" for name in kept_fields(type(config))
            if name in stored and stored[name] != getattr(config, name)]


def _check_length(config, checkpoint, plan):
    """A run keeps its length, for the schedule depends on it; a wsd run may grow before its decay has begun."""
    old, step = checkpoint["resolved"].get("max_steps"), checkpoint["step"]
    if plan.max_steps == old:
        return
    decaying = step > checkpoint["resolved"].get("decay_start", 0)
    if config.schedule != "wsd" or plan.max_steps < old or decaying:
        raise UserError(f"{source(config)} holds a run of {old} steps, now asked for {plan.max_steps}: its learning "
                        f"rates depend on its length. To train its model further: --init_from "
                        f"{advised(config, step)} --log_dir NEW")


def last_step(config, checkpoint, plan):
    """The step at which the run ends: plan.max_steps, or the checkpoint's own where its stop_loss was reached there."""
    at_end = checkpoint["finished"] or checkpoint.get("last_step") == checkpoint["step"]
    early = checkpoint["step"] < checkpoint["resolved"].get("max_steps", 0)
    reached = at_end and early and 0 < checkpoint["train_config"].get("stop_loss", 0) <= config.stop_loss
    return checkpoint["step"] if reached else plan.max_steps


def adopt_choices(config, runtime, checkpoint, local_windows):
    """Take over what "auto" chose when the run began, where this machine allows: dtype, threads, micro-batch size.

    Returns the micro-batch size (0 where it must be found anew). Raises UserError where --micro_batch_size does not
    divide local_windows.
    """
    stored = checkpoint["resolved"] if checkpoint else {}
    if config.dtype == "auto" and "dtype" in stored and stored.get("device") == runtime.device.type:
        with contextlib.suppress(UserError):  # the notice of `differences` says it
            runtime.dtype_name = choose_dtype(stored["dtype"], runtime.hardware)
    same_processes = stored.get("world_size") == runtime.world_size
    if runtime.device.type == "cpu" and same_processes and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(stored.get("threads", torch.get_num_threads()), os.cpu_count()))
    size = config.micro_batch_size or stored.get("micro_batch_size", 0)
    if size:
        try:
            check_micro_batch_size(size, local_windows)
        except UserError:
            if config.micro_batch_size:
                raise
            size = 0
    return size


def differences(stored, resolved):
    """What was resolved otherwise than when the run began, as "dtype bf16 instead of fp32"; none: bitwise the same."""
    return [f"{k} {v} instead of {stored[k]}" for k, v in resolved.items()
            if stored.get(k, v) != v and k not in ("max_steps", "decay_start")]
