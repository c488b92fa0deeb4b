"""Checkpoints: plain data, written whole or not at all, checked when read; how a run goes on from one, and provenance.

logs/model_{step:05d}.pt holds tensors, dicts, lists, numbers and strings and nothing else, so it is always read with
weights_only=True. open_model.py makes a model of it.
"""
import contextlib
import datetime
import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from exactgpt.config import UserError, atomic_write, fields_kept_on_resume, human_bytes
from exactgpt.device import check_micro_batch_size, choose_dtype

CHECKPOINT_NAME = re.compile(r"model_(\d{5,})\.pt")
TRAINING_ENTRIES = {"model": dict, "config": dict, "step": int, "optimizer": dict, "scaler": dict, "train_config": dict,
                    "resolved": dict, "data": str, "best_val_loss": float, "finished": bool}


class CheckpointError(UserError):
    """A file that is no checkpoint, or a damaged one."""


class _ForeignConfig:
    """Stands in for build-nanogpt's pickled __main__.GPTConfig: takes its fields and none of its code."""


def checkpoint_path(log_dir, step):
    """logs/model_00250.pt for step 250."""
    return Path(log_dir) / f"model_{step:05d}.pt"


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (a dict of plain data) atomically. Raises OSError (a full disk), `path` being as before."""
    needed = checkpoint_bytes(checkpoint)
    free = shutil.disk_usage(Path(path).parent).free
    if free < needed:
        raise OSError(f"{path} needs {human_bytes(needed)}, the disk has {human_bytes(free)} left")
    try:
        with atomic_write(path) as f:
            torch.save(checkpoint, f)
    except RuntimeError as error:  # torch's zip writer hides the disk's error
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


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


def checkpoint_bytes(value):
    """The bytes that a value takes in a checkpoint, near enough: its tensors, shared ones once, and a little more."""
    storages, other = {}, 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes() + 256
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        other += len(item) if isinstance(item, str) else 64
    return sum(storages.values()) + other


def disk_bytes(config, model, max_steps):
    """The most bytes of disk that a run's checkpoints take: the newest few and the best, each while it is replaced.

    Weights and AdamW's two moments in fp32; the best holds weights alone. What is written once has nothing to replace.
    """
    def times(every):      # written at every so many steps, and at the last
        return max(0, max_steps - 1) // every + 1
    saves = min(times(config.checkpoint_every) if config.checkpoint_every else 1, config.keep_checkpoints + 1)
    bests = min(times(config.eval_every), 2) if config.eval_every and max_steps else 0
    return model.n_params() * 4 * (3 * saves + bests)


def check_disk(config, run, runtime):
    """Raise UserError on every rank if the checkpoints of the run will not fit on the disk."""
    def check():
        free = shutil.disk_usage(config.log_dir).free
        needed = disk_bytes(config, run.raw, run.plan.max_steps)
        needed -= sum(p.stat().st_size for p in Path(config.log_dir).glob("model_*.pt"))
        if free < needed:
            raise UserError(f"the checkpoints need {human_bytes(needed)} more, the disk of {config.log_dir} has "
                            f"{human_bytes(free)}; make room, choose another --log_dir, or fewer --keep_checkpoints")
    runtime.on_all_ranks(check if runtime.is_main else lambda: None)


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. Raises CheckpointError in one line for whatever is wrong."""
    try:
        open(path, "rb").close()
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder; name a file in it, such as model_XXXXX.pt") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        _check_sums(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_ForeignConfig, "__main__.GPTConfig")]):
            warnings.simplefilter("ignore")  # of a pickle protocol, about to be an error of ours
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, a pickle that asks for code: torch raises many kinds, OSError too
        why = "it asks to run code" if "GLOBAL" in str(error) else "it is damaged"
        raise CheckpointError(
            f"{path} cannot be loaded as a checkpoint: {why} or not one ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("config"), _ForeignConfig):
        checkpoint["config"] = vars(checkpoint["config"])
    return checkpoint


def _check_sums(path):
    """Raise ValueError if a part of a file of torch.save differs from its checksum: torch.load does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} differs from its checksum")


def list_checkpoints(log_dir):
    """(step, path) of the numbered checkpoints in a folder, the newest step first."""
    found = [(int(m[1]), p) for p in Path(log_dir).glob("model_*.pt") if (m := CHECKPOINT_NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


def newest_valid(log_dir, check, notice=print):
    """(path, checkpoint) of the newest step that loads and that `check(checkpoint, path)` accepts, or None without
    any file.

    Falls back past damaged files with a notice. Raises CheckpointError when there are files and none is good.
    """
    problem = None
    for _, path in list_checkpoints(log_dir):
        try:
            checkpoint = read_checkpoint(path)
            check(checkpoint, path)
            return path, checkpoint
        except CheckpointError as error:
            problem = error
            notice(f"skipping a checkpoint: {error}")
    if problem:
        raise CheckpointError(f"no checkpoint in {log_dir} can be read ({problem}); move them away or choose another "
                              "--log_dir")
    return None


def delete_old(log_dir, keep, step):
    """Keep the `keep` newest numbered checkpoints up to `step`, and nothing that a killed save left half-written.

    One of a later step is a damaged one that the run has fallen back past: it must not displace what was saved since.
    """
    until_now = [path for number, path in list_checkpoints(log_dir) if number <= step]
    for path in [*until_now[keep:], *Path(log_dir).glob("model_*.pt.tmp")]:
        path.unlink(missing_ok=True)


def weights_hash(state):
    """The sha256 of a state dict's names, shapes and numbers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# going on with a run: which checkpoint, whether it is the same run, and the choices it was started with

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
    return [f"--{name} {getattr(config, name)} (it has {stored[name]})" for name in fields_kept_on_resume(type(config))
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

    Returns the micro-batch size (0 where it must be searched for again). Raises UserError where --micro_batch_size
    does not divide local_windows.
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


# -----------------------------------------------------------------------------
# where results come from

def code_hash():
    """A hash of the scripts and of this package: ranks on several machines must run the same."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted([*root.glob("*.py"), *root.glob("exactgpt/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def provenance():
    """Where this process' results come from: commit, versions, the machine's GPU, command; plain values."""
    here = Path(__file__).parent

    def git(*words):
        try:
            return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True,
                                  timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""
    return dict(git_commit=git("rev-parse", "HEAD"),
                git_dirty=bool(git("status", "--porcelain", "--untracked-files=no")),
                torch=str(torch.__version__), python=platform.python_version(), cuda=torch.version.cuda or "",
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                host=socket.gethostname(),
                time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                argv=" ".join(sys.argv))
