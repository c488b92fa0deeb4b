"""One dataclass per script is its command line: each field is a flag, its default, its help and its check.

    @dataclass
    class Config:
        max_steps: int = flag(19073, "optimizer steps", group="length", low=0)

    config = parse_config(Config)          # --max_steps 100

A user's mistake is a UserError: one line that says what to do, exit status 2 (1 for a RunFailed). `run_script` prints
it.
"""
import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys
import time
import types
import typing
from dataclasses import MISSING, dataclass, field, fields


class UserError(Exception):
    """A mistake that the user can mend; the message is one line and says how.

    Raise it where every rank sees the same fact (flags, files all ranks read): rank 0 prints it, once.
    """


class RunFailed(UserError):
    """A run that cannot go on, through no mistake in its flags: one line, exit status 1."""


def flag(default=MISSING, help="", *, group="options", choices=None, low=None, high=None, above=None,
         below=None, keep=False, repeat=False, positional=False):
    """A dataclass field that is a command-line flag.

    low <= value <= high, above < value < below. keep: a resumed run must have the same value.
    repeat: the flag may be given several times (a list). positional: takes the words that are no flag.
    """
    metadata = dict(help=help, group=group, choices=choices, low=low, high=high, above=above, below=below,
                    keep=keep, repeat=repeat, positional=positional)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TokenizerConfig:
    """The flag of every script that opens models."""
    tokenizer: str = flag("", "folder with vocab.bpe and encoder.json, for models and shards that come without a "
                          "vocabulary (default: GPT-2's)", group="system")


@dataclass(kw_only=True)
class DeviceConfig(TokenizerConfig):
    """The flags of every script that runs a model."""
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", group="system")
    dtype: str = flag("auto", "auto: bf16 where the hardware computes in it, fp16 on older CUDA cards, else fp32",
                      group="system", choices=("auto", "bf16", "fp16", "fp32"))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=min(110, int(os.environ.get("COLUMNS", 110))))


def _value_type(annotation):
    """The type of one value: int for `int | None`, str for `list[str]`."""
    if isinstance(annotation, types.UnionType):
        return next(t for t in typing.get_args(annotation) if t is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0]
    return annotation


def _read_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _check(name, value, m):
    """Raise UserError unless the value lies within the bounds of its flag."""
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
    """An argparse parser with one flag per field of the dataclass `cls`, grouped by the fields' groups."""
    prog = os.path.basename(sys.argv[0]) or "train.py"
    parser = _Parser(prog=prog, usage=f"{prog} [--flag value ...]", description=description, formatter_class=_Help,
                     allow_abbrev=False)
    groups = {}
    hints = typing.get_type_hints(cls)
    for f in sorted(fields(cls), key=lambda f: f.metadata["group"] == "system"):  # inherited, but least looked for
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
            options["type"] = _read_float if kind is float else kind
            plain = {int: "N", float: "X"}.get(kind, "TEXT")
            options["metavar"] = "|".join(map(str, m["choices"])) if m["choices"] else plain
            if m["repeat"]:
                options["action"] = "append"
            if f.default not in (MISSING, None, ""):
                options["help"] += f" (default: {f.default})"
        group.add_argument(f"--{f.name}", **options)
    return parser


def parse_config(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from the command line (or `argv`), checked field by field.

    Raises UserError for an unknown or abbreviated flag, a word of the wrong type, a value out of bounds, and
    for whatever the dataclass' own `check()` (facts across fields) refuses.
    """
    parser = make_parser(cls, description)
    known, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        word = unknown[0].split("=")[0]
        near = difflib.get_close_matches(word, [f"--{f.name}" for f in fields(cls)], n=1)
        hint = f"; did you mean {near[0]}?" if near and word.startswith("--") else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    return check_config(cls(**vars(known)))


def check_config(config):
    """The config itself, once every field lies in its bounds and `config.check()` agrees. Raises UserError."""
    for f in fields(config):
        value = getattr(config, f.name)
        for item in value if isinstance(value, list) else [value]:
            _check(f.name, item, f.metadata)
    if hasattr(config, "check"):
        config.check()
    return config


def kept_fields(cls):
    """The names of the fields that a resumed run must keep."""
    return [f.name for f in fields(cls) if f.metadata["keep"]]


def replace(config, **changes):
    """A checked copy of the config with some fields changed."""
    return check_config(dataclasses.replace(config, **changes))


def explain(build, source):
    """build(), with its ValueError as a UserError that names where the values came from."""
    try:
        return build()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def run_script(main):
    """Run a script's main(): a UserError becomes one line on standard error and an exit status on every rank."""
    try:
        main()
    except UserError as error:
        leave(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def leave(error):
    """Print the error on rank 0 and exit with status 2 (1 for a RunFailed).

    The other ranks stay until torchrun sees rank 0 end and signals them: the first exit makes torchrun
    kill the rest, and rank 0 might not have printed yet.
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
        os._exit(status)  # no interpreter exit: a living process group would abort it
    sys.exit(status)
