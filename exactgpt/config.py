"""Command lines declared as dataclasses, and what all scripts share: errors, how they end, number formats.

    @dataclass
    class Config:
        max_steps: int = flag(19073, "optimizer steps", group="length", low=0)

    config = parse_config(Config)          # --max_steps 100

Each field declares a flag with its default, help and bounds. A user's mistake raises a UserError: one line that says
what to do, printed by `run_script`, exit status 2 (1 for a RunFailed).
"""
import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import time
import typing
from dataclasses import MISSING, dataclass, field, fields

from exactgpt import launch

BOUNDS = dict(low=(">=", operator.ge), high=("<=", operator.le), above=(">", operator.gt), below=("<", operator.lt))


class UserError(Exception):
    """An error that the user can fix; the message is one line and says how."""
    # Raise it where every rank sees the same fact (flags, files all ranks read), because only rank 0 prints it.


class RunFailed(UserError):
    """A run that failed although its flags are valid: one line, exit status 1."""


def flag(default=MISSING, help="", *, group="", choices=None, low=None, high=None, above=None,
         below=None, keep=False, repeat=False, many=False, positional=False):
    """Declare a dataclass field as a command-line flag. group: its heading in --help, if not that of the flag before.

    Bounds: low <= value <= high, above < value < below. keep: a resumed run must have the same value.
    repeat: the flag may be given several times (a list); many: also with several values at a time. positional: takes
    the arguments that are not flags.
    """
    metadata = dict(help=help, group=group, choices=choices, low=low, high=high, above=above, below=below,
                    keep=keep, repeat=repeat, many=many, positional=positional)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TokenizerConfig:
    """The flag of every script that opens a model."""
    tokenizer: str = flag("", "folder with the vocabulary (vocab.bpe, encoder.json, or nanoGPT's meta.pkl) for text, "
                          "and for models and shards stored without one (default: GPT-2's)", group="system")


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
        require_packages(*packages, *["mlflow"] * self.mlflow)


def require_packages(*packages):
    """Raise UserError unless packages of requirements-extras.txt are installed."""
    for package in packages:
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
        if f.name in getattr(cls, "UNLISTED", ()):      # accepted, but not in --help
            options["help"] = argparse.SUPPRESS
        options.update(default=argparse.SUPPRESS, required=f.default is f.default_factory is MISSING)
        if kind is bool:
            options["action"] = "store_true"
        else:
            plain = {int: "N", float: "X"}.get(kind, "TEXT")
            options.update(type=kind, metavar="|".join(map(str, m["choices"])) if m["choices"] else plain,
                           action="append" if m["repeat"] else "store")
            if m["many"]:
                options.update(action="extend", nargs="+")
            if f.default not in (MISSING, None, "") and options["help"] != argparse.SUPPRESS:
                options["help"] += f" (default: {f.default})"
        groups[group].add_argument(f"--{f.name}", **options)
    known, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        name = unknown[0].split("=")[0]
        flags = [f"--{f.name}" for f in fields(cls) if not f.metadata["positional"]]
        near = [f for f in flags if f.startswith(name) or f.endswith(f"_{name[2:]}")]      # --temp, --lr
        near = near or difflib.get_close_matches(name, flags, n=1)
        hint = f"; did you mean {' or '.join(near)}?" if name.startswith("--") and 0 < len(near) <= 3 else ""
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
            if value == "" and f.default not in ("", None) and not isinstance(values, list):
                raise UserError(f"--{f.name} must not be empty")
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
                raise file_error(error) or error
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


def file_error(error):
    """Return the UserError for a file that the system could not open, read or write; None for other errors."""
    if isinstance(error, OSError) and error.filename:
        return UserError(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
    return None


def leave(status):
    """End the process with a status."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(status or 0)      # not sys.exit: interpreter shutdown aborts while a process group exists
    sys.exit(status)


def command(script, *words):
    """Return a command that starts a script, as it can be pasted into a shell."""
    return f"python {shlex.join(map(str, (script, *words)))}"


def one_line(text):
    """Return a text as the value of a flag: on one line, and not beginning as a flag does."""
    return " ".join(text.split()).lstrip("- ") or "?"


# ---- numbers -----------------------------------------------------------------

def counted(n, noun):
    """Return a number with its noun: "1 document", "2,000 documents", "8 processes"."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith(('s', 'ch')) else 's'}"


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
