"""Command lines declared as dataclasses, and what all scripts share: errors, safe file writes, number formats.

    @dataclass
    class Config:
        max_steps: int = flag(19073, "optimizer steps", group="length", low=0)

    config = parse_config(Config)          # --max_steps 100

Each field declares a flag with its default, help and bounds. A user's mistake raises a UserError: one line that says
what to do, printed by `run_script`, exit status 2 (1 for a RunFailed). Files get their final name only when complete.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import importlib.util
import json
import math
import operator
import os
import re
import shutil
import signal
import stat
import sys
import time
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from exactgpt import formats, launch

BOUNDS = dict(low=(">=", operator.ge), high=("<=", operator.le), above=(">", operator.gt), below=("<", operator.lt))


class UserError(Exception):
    """An error that the user can fix; the message is one line and says how."""
    # Raise it where every rank sees the same fact (flags, files all ranks read), because only rank 0 prints it.


class RunFailed(UserError):
    """A run that failed although its flags are valid: one line, exit status 1."""


def flag(default=MISSING, help="", *, group="", choices=None, low=None, high=None, above=None,
         below=None, keep=False, repeat=False, positional=False):
    """Declare a dataclass field as a command-line flag. group: its heading in --help, if not that of the flag before.

    Bounds: low <= value <= high, above < value < below. keep: a resumed run must have the same value.
    repeat: the flag may be given several times (a list). positional: takes the arguments that are not flags.
    """
    metadata = dict(help=help, group=group, choices=choices, low=low, high=high, above=above, below=below,
                    keep=keep, repeat=repeat, positional=positional)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TokenizerConfig:
    """The flag of every script that opens a model."""
    tokenizer: str = flag("", "folder with the vocabulary (vocab.bpe, encoder.json) for text, and for models and "
                          "shards stored without one (default: GPT-2's)", group="system")


@dataclass(kw_only=True)
class DeviceConfig(TokenizerConfig):
    """The flags of every script that runs a model."""
    device: str = flag("auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one, else the CPU", group="system")
    dtype: str = flag("auto", "precision of matrix products; auto: bf16 on CPUs and CUDA GPUs that support it, fp16 on "
                              "older CUDA GPUs, else fp32", choices=("auto", "bf16", "fp16", "fp32"))


@dataclass(kw_only=True)
class RunConfig(DeviceConfig):
    """The flags of every script that trains a model; keep=True: a resumed run must have the same value."""
    seed: int = flag(1337, "random seed for weights, splits, data order and dropout", group="system", low=0, keep=True)
    deterministic: bool = flag(False, "bitwise repeatable on a GPU too, but slower")
    timeout: float = flag(600.0, "seconds without progress after which a run of several processes ends and names the "
                                 "one that hangs; must exceed the longest save or writing of results", above=0)
    mlflow: bool = flag(False, "also log to a local MLflow store in the run's folder")
    dry_run: bool = flag(False, "try two steps, an evaluation and a save; report what the full run takes")

    def check(self, *packages):
        """Raise UserError unless the packages that the script and its flags need are installed."""
        for package in (*packages, *["mlflow"] * self.mlflow):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"this needs {package}: pip install -r requirements-extras.txt")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def parse_config(cls, argv=None, description=None):
    """Parse the command line (or `argv`) into a checked instance of a dataclass; --help lists its flags."""
    # Raises UserError for unknown or abbreviated flags, wrong types, values out of bounds, and what check() refuses.
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    parser = _Parser(usage="%(prog)s [--flag value ...]", description=description, allow_abbrev=False,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width))
    groups, group, placed = {}, "options", []
    for f in fields(cls):
        group = f.metadata["group"] or group
        placed.append((group, f))
    for group, f in sorted(placed, key=lambda item: item[0] == "system"):  # inherited fields last
        m = f.metadata
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = (*typing.get_args(f.type), f.type)[0]        # of one value: int for `int | None`, str for `list[str]`
        options = dict(help=m["help"].replace("%", "%%"))
        if m["positional"]:
            many = typing.get_origin(f.type) is list
            groups[group].add_argument(f.name, nargs="*" if many else None, metavar=f.name.upper(), **options)
            continue
        options.update(default=argparse.SUPPRESS, required=f.default is f.default_factory is MISSING)
        if kind is bool:
            options["action"] = "store_true"
        else:
            plain = {int: "N", float: "X"}.get(kind, "TEXT")
            options.update(type=kind, metavar="|".join(map(str, m["choices"])) if m["choices"] else plain,
                           action="append" if m["repeat"] else "store")
            if f.default not in (MISSING, None, ""):
                options["help"] += f" (default: {f.default})"
        groups[group].add_argument(f"--{f.name}", **options)
    known, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in fields(cls)], n=1)
        hint = f"; did you mean {near[0]}?" if near and name.startswith("--") else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    return with_changes(cls(**vars(known)))      # checks it


def with_changes(config, **changes):
    """Return a checked copy of the config with some fields changed. Raises UserError as `parse_config` does."""
    config = dataclasses.replace(config, **changes)
    for f in fields(config):
        m, values = f.metadata, getattr(config, f.name)
        for value in values if isinstance(values, list) else [values]:
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name} must be a finite number, but is {value}")
            for bound, (sign, holds) in BOUNDS.items():
                if m[bound] is not None and not holds(value, m[bound]):
                    raise UserError(f"--{f.name} must be {sign} {m[bound]}, but is {value}")
            if m["choices"] and value not in m["choices"]:
                raise UserError(f"--{f.name} must be one of {', '.join(map(str, m['choices']))}, but is {value!r}")
    if hasattr(config, "check"):
        config.check()
    return config


class Ranks(typing.NamedTuple):
    """The place of this process among those that a launcher started together, here and on other machines."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple = ("", 0)      # (host, port) where the processes find each other


def read_ranks():
    """Return the Ranks that torchrun, or another launcher, has set in the environment. Raises UserError."""
    def read(name, default=None):
        value = os.environ.get(name) or default      # containers are given empty variables
        return value or refuse(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set")

    def number(name, low, high, default=None):
        value = read(name, default)
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            refuse(f"the environment variable {name} is {value!r}, but must be a whole number from {low} to {high}")
        return int(value)

    def refuse(problem):
        raise UserError(f"{problem}; start the processes with torchrun, or unset WORLD_SIZE to run a single one")
    world_size = number("WORLD_SIZE", 1, 10**6, "1")
    if world_size == 1:      # whatever an earlier launcher has left in the other variables
        return Ranks()
    local_world_size = number("LOCAL_WORLD_SIZE", 1, world_size, "1")
    most = local_world_size if os.environ.get("LOCAL_WORLD_SIZE") else world_size      # not every launcher sets it
    return Ranks(number("RANK", 0, world_size - 1), world_size, number("LOCAL_RANK", 0, most - 1, "0"),
                 local_world_size, (read("MASTER_ADDR"), number("MASTER_PORT", 1, 65535)))


def run_script(main):
    """Run a script's main(); report a UserError as one line on standard error, and exit every rank with its status."""
    launch.guard_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:      # set by launch.py, for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            if not launch.is_lost_output(error):
                raise
            if isinstance(error, BrokenPipeError):      # the reader, as in `... | head`, has what it wanted
                leave(0)
            raise UserError(f"cannot write to standard output: {getattr(error, 'strerror', error)}") from error
        finally:
            launch.require_output(False)      # Python flushes it once more as it ends
    except KeyboardInterrupt:
        leave(130)
    except SystemExit as error:
        leave(error.code)
    except UserError as error:
        status, rank = 1 if isinstance(error, RunFailed) else 2, 0
        with contextlib.suppress(UserError):      # `error` itself, if the environment is wrong: each process reports it
            rank = read_ranks().rank
        if rank:
            # Wait for torchrun's signal: it kills all ranks once one exits, and rank 0 might not have printed yet.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
            time.sleep(10)
            os._exit(status)
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        leave(status)


def leave(status):
    """End the process with a status."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(status or 0)      # not sys.exit: interpreter shutdown aborts while a process group exists
    sys.exit(status)


# ---- files -------------------------------------------------------------------

def sync(path):
    """Wait until a file or a folder is on the disk."""
    if os.name == "posix":               # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder):
    """Create a folder, and those above it, if it is not there, and wait until they are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextlib.contextmanager
def _whole_or_not_at_all(path, remove):
    """Yield PATH.tmp, for the block to make a file or a folder there; then rename it. Raises UserError."""
    # The order is write, fsync, rename, fsync of the parent: after kill -9 or a power cut `path` is the complete old or
    # the complete new one. The temporary name is fixed, so that the next attempt overwrites a leftover.
    temporary = path.with_name(path.name + ".tmp")
    FolderLock.check(path)
    try:
        make_folder(path.parent)
        yield temporary
        for made in (*temporary.rglob("*"), temporary):
            sync(made)
        FolderLock.check(path)           # again, since large files take minutes
        os.replace(temporary, path)      # after the fsync: a power cut must not leave the name on half of the data
        sync(path.parent)                # it holds the name
    except FolderLost:                   # with the temporary file in it
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):      # of the other kind: a foreign file or folder, which stays
            remove(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
                            ) from error
        raise


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that gets its name only when it is complete and flushed to disk. Raises UserError."""
    with (_whole_or_not_at_all(Path(path), Path.unlink) as temporary,
          open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f):
        yield f


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder that becomes `path` when it is complete. Raises UserError, also if `path` is in use."""
    FolderLock.check(path)
    path = Path(path).resolve()
    check_new(path, folder=True)
    with _whole_or_not_at_all(path, shutil.rmtree) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)       # left by an export that was killed
        temporary.mkdir()
        yield temporary


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


@contextlib.contextmanager
def reading(path):
    """Turn the errors of reading and decoding a file into UserErrors that name it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(formats.advise_not_utf8(error.object[error.start], path)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def open_file(path):
    """Open a file for reading bytes. Raises OSError, and UserError for pipes and devices, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"cannot read {path}: it is a folder, a pipe or a device; name a file")
    return open(path, "rb")


def read_text(path):
    """Return the text of a UTF-8 file (None: standard input), without a byte-order mark. Raises UserError."""
    name = path or "standard input"
    with reading(name), open_file(path) if path else contextlib.nullcontext(sys.stdin.buffer) as f:
        data = f.read()
        mismatch = formats.find_mismatch(data[:formats.HEAD], name)
        if mismatch:
            raise UserError(mismatch)
        return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_json(path, kind=dict):
    """Return the JSON value of type `kind` in a file. Raises UserError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}")
    return value


def check_new(path, folder=False):
    """Raise UserError if `path` exists already, or cannot be created. folder: it may be an empty folder."""
    path = Path(path).absolute()
    if path.exists() and not (folder and path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists and will not be overwritten; choose another name or move it away")
    here = next(parent for parent in path.parents if parent.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        raise UserError(f"cannot write {path}: {here} is not a folder that you may write in; choose another path")


def find_visible(folder, pattern):
    """Return the paths below a folder whose names match a pattern, but not in hidden folders, such as a dry run's."""
    return [Path(here, name) for here, _, names in os.walk(Path(folder)) for name in fnmatch.filter(names, pattern)
            if "/." not in here.removeprefix(str(Path(folder)))]      # os.walk follows no links


class FolderLost(RunFailed):
    """The folder that this process has locked was deleted, moved or recreated."""


class FolderLock:
    """An exclusive lock on FOLDER/.lock, until its `with` block or the process ends, even by kill -9."""

    held = []      # all of this process

    def __init__(self, folder, wait_s):
        """Create the folder if needed, and wait for its lock. Raises UserError after wait_s seconds."""
        self._folder, self._path = Path(folder).absolute(), Path(folder).absolute() / ".lock"
        self._open()
        begin, waits = time.monotonic(), False
        while not self._try_to_lock():
            if time.monotonic() > begin + wait_s:
                self._close()
                raise UserError(f"another run is using {folder} (it holds {self._path}); stop it or use another folder")
            if not waits:
                print(f"another run is using {folder}; waiting up to {wait_s:g} s for it to finish", flush=True)
            waits = True
            time.sleep(0.2)
        self.held.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.held.remove(self)
        self._close()

    def _open(self):
        try:
            with contextlib.suppress(FileExistsError):      # it may be a file: the next line says so
                make_folder(self._folder)
            self._file = open(self._path, "w")
            self._directory = os.open(self._folder, os.O_RDONLY)      # kept open, so that its inode is not used again
        except OSError as error:
            raise UserError(f"cannot write in {self._folder}: {error.strerror}") from error

    def _close(self):
        self._file.close()
        os.close(self._directory)

    def _try_to_lock(self):
        import fcntl  # Unix only
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):      # the latter on some network file systems
            return False
        except OSError as error:       # the file system has no locks
            print(f"warning: cannot lock {self._path} ({error.strerror}); make sure only one run uses {self._folder}",
                  flush=True)
        if self._is_ours():
            return True
        self._close()      # its holder was waited for, and the folder deleted meanwhile
        self._open()
        return False

    def _is_ours(self):
        def is_at(path, descriptor, if_missing):
            try:
                return os.path.samestat(os.stat(path), os.fstat(descriptor))
            except (FileNotFoundError, NotADirectoryError):
                return if_missing
            except OSError as error:      # a network file system may not answer at the moment
                return error.errno != errno.ESTALE      # NFS: deleted on another machine
        # Somebody may have deleted .lock alone, as "stale". Whoever locks the folder then makes a new one.
        return is_at(self._folder, self._directory, False) and is_at(self._path, self._file.fileno(), True)

    @classmethod
    def check(cls, path):
        """Raise FolderLost if `path` is in a folder that this process has locked, but that is not the same any more."""
        try:
            path = Path(path).absolute()
        except FileNotFoundError:      # the working directory itself was deleted
            path = None
        for lock in cls.held:
            if path is None or (lock._folder in (path, *path.parents) and not lock._is_ours()):
                raise FolderLost(f"the folder {lock._folder} was deleted, moved, or taken over by another run, so this "
                                 "run ends; nothing was written there")


def human_count(n, units=("", "k", "M", "B", "T")):
    """Format a number with three digits and a unit: 950, 2.5k, 10B."""
    while abs(n) >= 1000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{float(f'{n:.3g}'):g}{units[0]}"  # twice: 999.9 is 1000, not 1e+03


def human_time(seconds):
    """Format a duration: 5h31m, 12m05s."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def human_bytes(n):
    """Format a number of bytes: 1.54 GB."""
    return human_count(n, (" B", " kB", " MB", " GB", " TB"))
