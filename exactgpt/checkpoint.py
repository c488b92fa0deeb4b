"""Checkpoints: write them whole or not at all, check them when they are read, and resume a run from one.

logs/model_{step:05d}.pt holds only tensors and plain Python values, no objects of our classes, and is always read with
weights_only=True. A run saves with `save`; it resumes with `find_checkpoint`, `check_same_run`, `adopt_resolved` and
`restore_optimizer`, which train.py's set_up calls in this order. open_model.py opens a checkpoint to use the model.

A resumed run is bitwise equal to one that was never killed (on a GPU with --deterministic), because
1. weights, optimizer and scaler are restored;
2. the tokens of step s depend on (seed, s) alone (dataloader.py);
3. each step seeds its own generators (train_step);
4. dtype, threads and micro-batch are taken over, and what cannot be is reported;
5. warm_up settles the order of DDP's sums.
Only the count of updates skipped in a row starts again at 0.
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
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from exactgpt import launch
from exactgpt.config import RunFailed, UserError, counted, human_bytes
from exactgpt.device import check_micro_batch_size, choose_dtype
from exactgpt.files import FolderLock, atomic_write

MAX_VALUES = 200_000       # in a checkpoint: numbers, texts and tensors; there are some thousands, once 50,000
RUN_FILES = ("log.txt", "metrics.jsonl", "model_best.pt", "lr_finder.csv", "lr_finder.png")     # written in --log_dir
RETRY_STEPS = 10           # steps between attempts to write a checkpoint that did not fit on the disk
TRAINING_ENTRIES = {"model": dict, "config": dict, "step": int, "optimizer": dict, "scaler": dict, "train_config": dict,
                    "resolved": dict, "data": str, "best_val_loss": float, "finished": bool}


class CheckpointError(UserError):
    """A file is not a checkpoint, or is damaged."""


class Untrusted(ValueError):
    """A file describes more data than it has."""


class AlreadyFinished(Exception):
    """The run in --log_dir has reached its last step: there is nothing to train. Raised on all ranks."""


class _ForeignConfig:
    """Stand-in for the __main__.GPTConfig that build-nanogpt pickles: it takes the fields and runs no code."""


def checkpoint_path(log_dir, step, kind="model"):
    """Return the path of a step's checkpoint: logs/model_00250.pt for step 250."""
    return Path(log_dir) / f"{kind}_{step:05d}.pt"


def save_checkpoint(path, checkpoint):
    """Write a dict of plain data to a file, whole or not at all. Raises UserError if the disk refuses.

    In a folder that this process has locked it gets the folder's mark, and replaces only a checkpoint that has it, too.
    """
    mark = FolderLock.mark_of(Path(path).parent)
    if mark:
        checkpoint = {"run_id": mark, **checkpoint}
        if os.path.lexists(path) and not is_ours(path, mark):
            raise UserError(f"{path} exists, and another run or tool has written it; move it away")
    tensors = {t.data_ptr(): t.nbytes for t in tree_leaves(checkpoint) if isinstance(t, torch.Tensor)}
    needed = sum(tensors.values())
    try:
        with atomic_write(path) as f:
            free = shutil.disk_usage(Path(path).parent).free
            if needed > free:      # before anything is written: logs and other programs need the disk, too
                raise UserError(f"{path} needs {human_bytes(needed)}, the disk has {human_bytes(free)} left; free some "
                                "space")
            torch.save(checkpoint, f)
    except RuntimeError as error:      # torch's zip writer hides the disk's own error
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; free some space") from error


def is_ours(path, mark):
    """Return True if a file is a checkpoint that has the mark of this folder's runs; None: it is not locked."""
    if mark is None or path.is_symlink():
        return False
    try:
        with open(path, "rb") as f:
            start = f.read(1000)      # the mark is the first entry, so that a damaged file has it, too
    except OSError:
        return False
    # Checkpoints of earlier versions have no mark. A run that resumed from one counts all of those as its own.
    return mark.encode() in start or (mark.startswith("old-") and b"run_id" not in start)


def is_finite(entries):
    """Return True if no tensor in a checkpoint's entries contains inf or NaN."""
    # A sum is finite only if all its terms are, and on a CPU takes a twentieth of the time. It may overflow, however.
    return all(tensor.sum().isfinite() or tensor.isfinite().all() for tensor in tree_leaves(entries)
               if isinstance(tensor, torch.Tensor))


def require_finite(state, source):
    """Return a state dict to train from. Raises CheckpointError if it contains inf or NaN."""
    if not is_finite(state):
        raise CheckpointError(f"the weights in {source} contain inf or NaN: they cannot be trained; use an older "
                              "checkpoint or another model")
    return state


def write_checkpoint(runtime, path, entries):
    """Write a checkpoint on rank 0; return on every rank "", or why it could not be written: the disk may be full.

    Raises RunFailed on every rank if it contains inf or NaN, or if the folder is not this run's any more.
    """
    error = None
    if runtime.is_main:
        try:
            if not is_finite(entries):      # it must not take the place of one that can be resumed
                raise RunFailed(f"at step {entries['step']} the weights or the optimizer's state contain inf or NaN. "
                                "They were not saved, and older checkpoints are intact; start a new run in another "
                                "folder, with a lower --max_lr or another --seed")
            save_checkpoint(path, entries)
            print(f"step {entries['step']}: wrote {path} ({human_bytes(path.stat().st_size)})", flush=True)
        except UserError as problem:
            error = problem
            if not isinstance(error, RunFailed):
                print(f"warning: checkpoint not written (older ones are intact): {error}", flush=True)
    failed, ends = runtime.sum(error is not None, isinstance(error, RunFailed))
    if ends:
        raise error or RunFailed("rank 0 says why")
    return str(error or "rank 0 could not write it") if failed else ""


def write_and_rotate(runtime, progress, folder, keep, entries, kind="model"):
    """Write the numbered checkpoint of progress.step and keep the newest few; return as `write_checkpoint` does."""
    problem = write_checkpoint(runtime, checkpoint_path(folder, progress.step, kind), entries)
    progress.save_failed = bool(problem)
    # While updates are being skipped, something is wrong, and an older checkpoint may be the last good one.
    if runtime.is_main and not problem and not progress.skipped.in_a_row:
        delete_old_checkpoints(folder, keep, progress.step, kind)
    return problem


def stop_message(progress):
    """Return what to print after a stop: what is lost, and the command that continues."""
    lost = ("the checkpoint could not be written, so the steps since the last one will be repeated"
            if progress.save_failed else "nothing is lost")
    return f"stopped before step {progress.step}, {lost}; the same command continues:\n{launch.command_line()}"


def model_entries(run, progress):
    """Return the entries of a checkpoint that using the model needs."""
    return dict(model=run.raw_model.state_dict(), config=run.raw_model.config_dict(),
                tokenizer=run.tokenizer.to_checkpoint(), step=progress.step, val_loss=progress.val_loss)


def save(run, progress, config, runtime, finished=False):
    """Write model_XXXXX.pt, to resume from; keep the newest few. Raises RunFailed if the last one cannot be written."""
    problem = write_and_rotate(runtime, progress, config.log_dir, config.keep_checkpoints, dict(
        model_entries(run, progress), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        best_val_loss=progress.best_val_loss, last_step=progress.last_step, train_config=asdict(config),
        resolved=run.resolved, **run.fingerprint, finished=finished, provenance=run.provenance))
    if finished and problem:
        raise RunFailed(f"the last checkpoint could not be written: {problem}. The same command repeats the steps "
                        "since the newest one")


def save_best(run, progress, config, runtime):
    """Write model_best.pt if the model has just had its lowest validation loss."""
    if progress.val_loss < progress.best_val_loss:          # NaN is never the best
        path = Path(config.log_dir) / "model_best.pt"
        initial = progress.step == 0                        # random weights, or those of another file
        if initial or not write_checkpoint(runtime, path, model_entries(run, progress)):
            progress.best_val_loss = progress.val_loss      # else the next validation below it tries again


def disk_bytes(config, n_params, max_steps):
    """Return the most disk space, in bytes, that the checkpoints of a run take at any moment."""
    # A checkpoint holds the weights and AdamW's two moments in fp32, model_best.pt the weights alone. While a file is
    # replaced, the old and the new one both take space; one that is written only once replaces nothing.
    def times(every):      # how often something is written every `every` steps and at the end
        return max(0, max_steps - 1) // every + 1
    saves = min(times(config.checkpoint_every) if config.checkpoint_every else 1, config.keep_checkpoints + 1)
    bests = min(times(config.eval_every), 2) if config.eval_every and max_steps else 0
    return n_params * 4 * (3 * saves + bests)


def check_disk(config, n_params, max_steps, runtime):
    """Raise UserError on every rank if the checkpoints of the run will not fit on the disk."""
    def check():
        free, folder = shutil.disk_usage(config.log_dir).free, Path(config.log_dir)
        present = [*(path for _, path in list_checkpoints(folder)), *folder.glob("model_best.pt")]
        needed = disk_bytes(config, n_params, max_steps) - sum(path.lstat().st_size for path in present)
        if free < needed:
            raise UserError(f"the checkpoints need {human_bytes(needed)} more, but the disk that holds "
                            f"{config.log_dir} has {human_bytes(free)} free; free some space, use another --log_dir, "
                            "or a smaller --keep_checkpoints")
    runtime.broadcast(check)


def read_checkpoint(path):
    """Load the dict in a checkpoint file to the CPU. Raises CheckpointError, in one line, if anything is wrong."""
    try:
        open(path, "rb").close()
        size = os.stat(path).st_size
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else contextlib.nullcontext() as archive:
            # torch.save compresses nothing, so what it writes cannot unpack to more than the file has.
            if archive and (any(part.compress_type for part in archive.infolist())
                            or sum(part.file_size for part in archive.infolist()) > size):
                raise Untrusted("it unpacks to more than its size")
            # torch.load does not compare a part with its checksum, and reads nothing of one that is marked as a folder.
            if archive and (archive.testzip() or any(part.external_attr & 0x10 for part in archive.infolist())):
                raise ValueError("a part differs from its checksum, or is a folder")
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_ForeignConfig, "__main__.GPTConfig")]):
            warnings.simplefilter("ignore")      # about a pickle protocol; what matters becomes an error below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint.get("config"), _ForeignConfig):
            checkpoint["config"] = vars(checkpoint["config"])
        require_plain(checkpoint, size)
        return checkpoint
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Untrusted as error:
        raise CheckpointError(f"{path} will not be loaded: {error}; use another copy of it") from error
    except Exception as error:      # a damaged zip, a pickle that asks for code: torch raises many types
        why = "it would run code" if "GLOBAL" in str(error) else "it is damaged"
        raise CheckpointError(
            f"cannot load {path}: {why}, or it is not a checkpoint ({type(error).__name__})") from error


def require_plain(value, size):
    """Raise Untrusted unless a loaded value holds only dense tensors on the CPU, no larger than its file of `size`."""
    # A few bytes can describe a tensor of many: one that is sparse, without data, or whose elements share memory.
    # Using it would take the memory. In the same way a few lists can contain each other a million times.
    left, n_values, n_bytes = [value], 0, 0
    while left:
        value = left.pop()
        n_values += 1
        if n_values > MAX_VALUES:
            raise Untrusted(f"it contains more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            left += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise Untrusted("it contains a tensor that is sparse, quantized or without data")
            n_bytes += value.nbytes
            reach = 0      # of the dimensions so far: the next must step over it
            for stride, length in sorted(zip(value.stride(), value.shape)):
                if length > 1 and stride <= reach:
                    raise Untrusted("it contains a tensor whose elements share memory")
                reach += stride * (length - 1)
    if n_bytes > 2 * size:      # twice, because the output layer may be the token embedding
        raise Untrusted(f"its tensors take {human_bytes(n_bytes)}, but it has only {human_bytes(size)}")


def list_checkpoints(log_dir, kind="model"):
    """Return [(step, path)] of the numbered checkpoints in a folder, the newest step first."""
    return sorted(((step, path) for path in Path(log_dir).glob(f"{kind}_*.pt")
                   if (step := checkpoint_step(path, kind)) is not None), reverse=True)


def checkpoint_step(path, kind="model"):
    """Return the step in the name of a numbered checkpoint, None for whatever else has such a name."""
    match = re.fullmatch(rf"{kind}_([0-9]{{5,18}})\.pt", path.name)
    return int(match[1]) if match and path.is_file() else None


def read_training_checkpoint(path):
    """Load a checkpoint that a run can resume from. Raises CheckpointError if it cannot."""
    return check_entries(read_checkpoint(path), TRAINING_ENTRIES, path)


def check_entries(checkpoint, entries, path):
    """Return the checkpoint if it has the entries {name: type} and finite numbers. Raises CheckpointError."""
    for name, kind in entries.items():
        if not isinstance(checkpoint.get(name), kind):
            advice = f"; to use its weights alone: --init_from {path}" if "model" in entries else ""
            raise CheckpointError(f"{path} cannot be resumed: its entry {name!r} is missing or damaged{advice}")
    if not is_finite(checkpoint):      # every later checkpoint would contain them, too
        raise CheckpointError(f"{path} cannot be resumed: its weights or its optimizer's state contain inf or NaN")
    return checkpoint


def newest_valid(log_dir, notice=print):
    """Return the newest checkpoint that can be resumed, None if there is none. Raises CheckpointError if none can."""
    return first_valid([path for _, path in list_checkpoints(log_dir)], read_training_checkpoint, notice)


def first_valid(paths, read, notice):
    """Return read(path) of the first path that read() accepts, None if there are no paths. Raises CheckpointError."""
    problem = None
    for path in paths:
        try:
            return read(path)
        except CheckpointError as error:
            problem = error
            notice(f"skipping a checkpoint: {error}")
    if problem:
        raise CheckpointError(f"no checkpoint in {paths[0].parent} can be resumed ({problem}); move them away or use "
                              "another folder for a new run")
    return None


def delete_old_checkpoints(log_dir, keep, step, kind="model"):
    """Delete all numbered checkpoints of this folder's runs up to `step` but the `keep` newest."""
    # Files of later steps do not count: they were damaged, and must not push out what has been saved since. And files
    # that others have put there are not ours to delete.
    mark = FolderLock.mark_of(log_dir)
    ours = [path for number, path in list_checkpoints(log_dir, kind) if number <= step and is_ours(path, mark)]
    for path in ours[keep:]:
        path.unlink(missing_ok=True)


def weights_hash(state):
    """Return the sha256, in hexadecimal, of a state dict's names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- resume: find the checkpoint, check that it is this run's, restore -----------

def find_checkpoint(config, notice):
    """Return the checkpoint (a dict) that --resume asks for, or None for a new run. Raises UserError.

    Claims --log_dir for the run, if this process has locked it, and refuses one with another program's logs.
    """
    found = _find_checkpoint(config, notice)
    claim_folder(config.log_dir, found if list_checkpoints(config.log_dir) else None, RUN_FILES)
    return found


def claim_folder(folder, found, names):
    """Claim a locked folder for the run of a checkpoint that was found in it, or for a new one. Raises UserError."""
    # names: the files that it writes
    lock = FolderLock.of(folder)
    if lock and found:
        lock.claim(mark=found.get("run_id", f"old-{lock.mark}"))
    elif lock:
        lock.claim(names)


def _find_checkpoint(config, notice):
    if config.resume == "never":
        if list_checkpoints(config.log_dir) or (Path(config.log_dir) / "metrics.jsonl").exists():
            raise UserError(f"--resume never, but {config.log_dir} already contains a run; use another --log_dir, or "
                            "delete it")
        return None
    if config.resume == "auto":
        return newest_valid(config.log_dir, notice)
    # --resume FILE: that one, or the newest that an earlier start with the same --resume FILE has left in log_dir
    newest = None
    with contextlib.suppress(CheckpointError):       # all checkpoints in log_dir are damaged: FILE may be intact
        newest = newest_valid(config.log_dir, notice)
    if newest and newest["train_config"].get("resume") == config.resume:
        return newest                                # FILE itself may have been deleted as an old checkpoint by now
    checkpoint = read_training_checkpoint(config.resume)
    if not newest or newest["step"] <= checkpoint["step"]:
        return checkpoint
    raise UserError(f"{config.log_dir} contains a later checkpoint, of step {newest['step']}: leave out --resume to "
                    f"resume from it, or use another --log_dir to resume from {config.resume}")


def check_same_run(config, checkpoint, requested_shape, fingerprint, plan):
    """Raise UserError, naming what differs, unless the flags and the data are those of the checkpoint's run."""
    # requested_shape: of the model, as the flags ask for it; None stands for what they leave open.
    source, step, resolved = resume_source(config), checkpoint["step"], checkpoint["resolved"]
    differing = changed_flags(config, checkpoint["train_config"])
    for name, value in requested_shape.items():
        if value is not None and value != checkpoint["config"].get(name):
            differing.append(f"--{name} {value} (it has {checkpoint['config'].get(name)})")
    if any(checkpoint.get(name, value) != value for name, value in fingerprint.items()):      # old ones have fewer
        differing.append("other token shards in --data_dir")
    if plan.warmup_steps != resolved.get("warmup_steps"):
        differing.append(f"--warmup_steps {plan.warmup_steps} (it has {resolved.get('warmup_steps')})")
    if differing:
        raise UserError(f"{source} contains another run, at step {step}: {', '.join(differing)}. Use its flags to "
                        "resume it, or another --log_dir for a new run")
    old = resolved.get("max_steps", 0)       # the schedule depends on it, but wsd's only once the decay begins
    longer = config.schedule == "wsd" and plan.max_steps > old and step <= resolved.get("decay_start", 0)
    if plan.max_steps != old and not longer:
        raise UserError(f"{source} contains a run of {counted(old, 'step')}, not {plan.max_steps}: its learning rates "
                        f"depend on its length; {advice_to_train_further(config, step)}")


def resume_source(config):
    """Return the folder or file that the run resumes from, for messages."""
    return config.log_dir if config.resume == "auto" else config.resume


def advice_to_train_further(config, step):
    """Return how to train the model of a step further, for messages."""
    path = checkpoint_path(config.log_dir, step)      # not the folder: a newer run may lie below it
    source = path if path.exists() else resume_source(config)
    return f"to train its model further: --init_from {source} --log_dir NEW"


def changed_flags(config, stored):
    """Return the flags that a resumed run must keep but that differ from the stored ones: ["--seed 2 (it has 1)"]."""
    return [f"--{f.name} {getattr(config, f.name)} (it has {stored[f.name]})" for f in fields(config)
            if f.metadata["keep"] and stored.get(f.name, getattr(config, f.name)) != getattr(config, f.name)]


def final_step(config, checkpoint, plan):
    """Return the step at which a resumed run ends: max_steps, or where it met --stop_loss. Raises AlreadyFinished."""
    step = checkpoint["step"]
    # True if --stop_loss ended the run here, before max_steps, and has not been lowered since.
    at_end = checkpoint["finished"] or checkpoint.get("last_step") == step
    reached = (at_end and step < checkpoint["resolved"].get("max_steps", 0)
               and 0 < checkpoint["train_config"].get("stop_loss", 0) <= config.stop_loss)
    last_step = step if reached else plan.max_steps
    if checkpoint["finished"] and step >= last_step:
        raise AlreadyFinished(f"the run in {resume_source(config)} is finished, at step {step}; "
                              + advice_to_train_further(config, step))
    return last_step


def adopt_resolved(config, runtime, checkpoint, local_windows):
    """Take over the checkpoint's dtype, threads and micro-batch if this machine can; return its rows (0: search)."""
    stored = checkpoint["resolved"] if checkpoint else {}
    if config.dtype == "auto" and "dtype" in stored and stored.get("device") == runtime.device.type:
        with contextlib.suppress(UserError):      # this machine cannot; the banner reports the difference
            runtime.dtype_name = choose_dtype(stored["dtype"], runtime.hardware)
    same_processes = stored.get("world_size") == runtime.world_size
    if runtime.device.type == "cpu" and same_processes and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(stored.get("threads", torch.get_num_threads()), os.cpu_count()))
    if config.micro_batch_size:
        check_micro_batch_size(config.micro_batch_size, local_windows)
        return config.micro_batch_size
    size = stored.get("micro_batch_size", 0)
    return size if size and local_windows % size == 0 else 0


def restore_optimizer(run, state):
    """Load the states of a run's optimizer and scaler. Raises UserError if one does not fit the model."""
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if run.scaler.is_enabled() and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit the model ({error}); start a new run "
                        "from its weights alone (--init_from), in another folder") from error


def resolved_differences(stored, resolved):
    """Return what "auto" chose differently this time: ["dtype bf16 instead of fp32"]."""
    return [f"{k} {v} instead of {stored[k]}" for k, v in resolved.items()
            if stored.get(k, v) != v and k not in ("max_steps", "decay_start", "hellaswag_every")]


# ---- provenance: where results come from -------------------------------------

def code_hash():
    """Return a hash of the scripts and of this package, which must be equal on all machines."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted([*root.glob("*.py"), *root.glob("exactgpt/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def provenance():
    """Return the commit, versions, machine and command of this process, as plain values."""
    def git(*words):
        try:
            command = ["git", "-C", str(Path(__file__).parent), *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""
    return dict(git_commit=git("rev-parse", "HEAD"),
                git_dirty=bool(git("status", "--porcelain", "--untracked-files=no")), host=socket.gethostname(),
                torch=str(torch.__version__), python=platform.python_version(), cuda=torch.version.cuda or "",
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                argv=" ".join(sys.argv))
