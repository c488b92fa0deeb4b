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
import json
import math
import os
import shutil
import signal
import sys
import time
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix; the message is one line and says how.

    Raise it where every rank sees the same fact (flags, files all ranks read), because only rank 0 prints it.
    """


class RunFailed(UserError):
    """A run that failed although its flags are valid: one line, exit status 1."""


def flag(default=MISSING, help="", *, group="options", choices=None, low=None, high=None, above=None,
         below=None, keep=False, repeat=False, positional=False):
    """Declare a dataclass field as a command-line flag.

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
    tokenizer: str = flag("", "folder with the vocabulary (vocab.bpe, encoder.json) for models and shards stored "
                          "without one (default: GPT-2's)", group="system")


@dataclass(kw_only=True)
class DeviceConfig(TokenizerConfig):
    """The flags of every script that runs a model."""
    device: str = flag("auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one, else the CPU", group="system")
    dtype: str = flag("auto", "precision of matrix products; auto: bf16 on CPUs and CUDA GPUs that support it, fp16 on "
                      "older CUDA GPUs, else fp32", group="system", choices=("auto", "bf16", "fp16", "fp32"))


@dataclass(kw_only=True)
class RunConfig(DeviceConfig):
    """The flags of every script that trains a model; keep=True: a resumed run must have the same value."""
    seed: int = flag(1337, "random seed for weights, data order and dropout", group="system", low=0, keep=True)
    deterministic: bool = flag(False, "bitwise repeatable on a GPU too, but slower", group="system")
    timeout: float = flag(600.0, "seconds without progress after which a run of several processes ends and names the "
                          "one that hangs; must exceed the longest save", group="system", above=0)
    mlflow: bool = flag(False, "also log to a local MLflow store in the run's folder", group="system")
    dry_run: bool = flag(False, "try two steps, an evaluation and a save; report what the full run takes",
                         group="system")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=min(110, int(os.environ.get("COLUMNS", 110))))


def _value_type(annotation):
    """Return the type of one value: int for `int | None`, str for `list[str]`."""
    if isinstance(annotation, types.UnionType):
        return next(t for t in typing.get_args(annotation) if t is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0]
    return annotation


def _parse_finite_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _check_value(name, value, m):
    """Raise UserError unless the value is within its flag's bounds and one of its choices."""
    if value is None:
        return
    bounds = [(m["low"], ">=", lambda v, b: v >= b), (m["high"], "<=", lambda v, b: v <= b),
              (m["above"], ">", lambda v, b: v > b), (m["below"], "<", lambda v, b: v < b)]
    for bound, sign, holds in bounds:
        if bound is not None and not holds(value, bound):
            raise UserError(f"--{name} must be {sign} {bound}, but is {value}")
    if m["choices"] and value not in m["choices"]:
        raise UserError(f"--{name} must be one of {', '.join(map(str, m['choices']))}, but is {value!r}")


def make_parser(cls, description=None):
    """Return an argparse parser with one flag per field of the dataclass `cls`, in the fields' groups."""
    prog = os.path.basename(sys.argv[0]) or "train.py"
    parser = _Parser(prog=prog, usage=f"{prog} [--flag value ...]", description=description, formatter_class=_Help,
                     allow_abbrev=False)
    groups = {}
    hints = typing.get_type_hints(cls)
    for f in sorted(fields(cls), key=lambda f: f.metadata["group"] == "system"):  # inherited fields last
        m, kind = f.metadata, _value_type(hints[f.name])
        if m["group"] not in groups:
            groups[m["group"]] = parser.add_argument_group(m["group"])
        group = groups[m["group"]]
        help_text = m["help"].replace("%", "%%")
        if m["positional"]:
            many = typing.get_origin(hints[f.name]) is list
            group.add_argument(f.name, nargs="*" if many else None, help=help_text, metavar=f.name.upper())
            continue
        options = dict(default=argparse.SUPPRESS, help=help_text, required=f.default is f.default_factory is MISSING)
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = _parse_finite_float if kind is float else kind
            plain = {int: "N", float: "X"}.get(kind, "TEXT")
            options["metavar"] = "|".join(map(str, m["choices"])) if m["choices"] else plain
            if m["repeat"]:
                options["action"] = "append"
            if f.default not in (MISSING, None, ""):
                options["help"] += f" (default: {f.default})"
        group.add_argument(f"--{f.name}", **options)
    return parser


def parse_config(cls, argv=None, description=None):
    """Parse the command line (or `argv`) into a checked instance of the dataclass `cls`.

    Raises UserError for an unknown or abbreviated flag, a value of the wrong type or out of bounds, and for flags
    that contradict each other according to the dataclass' own `check()`.
    """
    parser = make_parser(cls, description)
    known, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in fields(cls)], n=1)
        hint = f"; did you mean {near[0]}?" if near and name.startswith("--") else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    return check_config(cls(**vars(known)))


def check_config(config):
    """Check every field's bounds, then call `config.check()` if it exists; return the config. Raises UserError."""
    for f in fields(config):
        value = getattr(config, f.name)
        for item in value if isinstance(value, list) else [value]:
            _check_value(f.name, item, f.metadata)
    if hasattr(config, "check"):
        config.check()
    return config


def fields_kept_on_resume(cls):
    """Return the names of the fields that must have the same value when a run is resumed."""
    return [f.name for f in fields(cls) if f.metadata["keep"]]


def with_changes(config, **changes):
    """Return a checked copy of the config with some fields changed."""
    return check_config(dataclasses.replace(config, **changes))


def as_user_error(build, source):
    """Return build(), turning its ValueError into a UserError that names the source of the values."""
    try:
        return build()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def run_script(main):
    """Run a script's main(); report a UserError as one line on standard error and exit every rank with its status."""
    try:
        main()
    except UserError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe, as in `... | head`: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def exit_with_error(error):
    """Print the error on rank 0 and exit with status 2 (1 for a RunFailed).

    The other ranks wait for torchrun's signal: torchrun kills all ranks as soon as the first one exits, and rank 0
    might not have printed yet.
    """
    status = 1 if isinstance(error, RunFailed) else 2
    if int(os.environ.get("RANK", 0)) != 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(10)
        os._exit(status)
    script = os.path.basename(sys.argv[0])
    print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(status)  # not sys.exit: interpreter shutdown aborts while a process group exists
    sys.exit(status)


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open PATH.tmp for writing; on a clean exit, flush it to disk and rename it to `path`.

    The order is write, fsync, rename, fsync of the folder: after kill -9 or a power cut `path` is the complete old or
    the complete new file. The temporary name is fixed, so that the next attempt overwrites a leftover. Raises UserError
    if the disk refuses; a file at `path` then stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)      # after the fsync: a power cut must not leave the name on half of the data
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
                            ) from error
        raise


def sync_folder(folder):
    """Flush a folder to disk, so that a rename survives a power cut (it changes the folder, not the file)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def read_text(path):
    """Return the text of a UTF-8 file (None: standard input), without a byte-order mark. Raises UserError."""
    name = path or "standard input"
    try:
        return (Path(path).read_bytes() if path else sys.stdin.buffer.read()).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (at byte {error.start}); convert it first, for instance with iconv "
                        "-f latin1 -t utf-8") from error


def read_json(path, kind=dict):
    """Return the JSON value of type `kind` in a file. Raises UserError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}")
    return value


def check_new_file(path, name):
    """Raise UserError if `path`, given by the flag `name`, exists already or cannot be created."""
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{name} {path} already exists and will not be overwritten; choose another path")
    here = next(folder for folder in path.parents if folder.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        raise UserError(f"{name} {path}: cannot write in {here}; choose another path")


def find_visible(folder, pattern):
    """Return the paths below a folder whose file names match a pattern.

    Skips hidden folders, such as a dry run's, and folders that disappear during the search.
    """
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name) for name in fnmatch.filter(names, pattern)]
    return found


class FolderLock:
    """An exclusive lock on FOLDER/.lock, held until the `with` block or the process ends, even by kill -9."""

    def __init__(self, folder, wait_s):
        """Wait up to `wait_s` seconds for the lock. Raises UserError if another process still holds it."""
        import fcntl  # Unix only
        path = Path(folder) / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w")
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder} cannot be a folder: {error.filename} is a file") from error
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}") from error
        deadline, waits = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):    # the file system has no locks
                    print(f"warning: cannot lock {path} ({error.strerror}); make sure only one run uses {folder}",
                          flush=True)
                    return
                if time.monotonic() > deadline:
                    raise UserError(f"another run is using {folder} (it holds {path}); stop it or use another folder")
                if not waits:
                    print(f"another run is using {folder}; waiting up to {wait_s:g} s for it to finish", flush=True)
                waits = True
                time.sleep(0.2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder; rename it to `path` on a clean exit, delete it after an error.

    Raises UserError if `path` exists and is not an empty folder, or if writing fails.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another name or move it away")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)       # left by an export that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -----------------------------------------------------------------------------
# number formats

def human_bytes(n):
    """Format a number of bytes: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_time(seconds):
    """Format a duration: 5h31m, 12m05s or 42s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def human_count(n):
    """Format a count: 950, 2.5k, 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{float(f'{n / size:.3g}'):g}{unit}"  # twice: 999.9 is 1000, not 1e+03
    return f"{n:.3g}"


def human_rate(rate):
    """Format a learning rate: 6e-4, 1.5e-3."""
    digits, power = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}" if rate else "0"
