"""Mutants: files with bits flipped, bytes dropped, inserted or repeated, their end cut off, a JSON value replaced; and
checkpoints that ask to run code. All from a random.Random, so that a mutant can be made again.
"""
import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SLOW_S = 10
SPARE_MEMORY = 2 << 30       # bytes of address space, beyond what the process has


class TookTooLong(BaseException):
    """No `except Exception` of ours may take it for a damaged file."""


@contextlib.contextmanager
def limits():
    """SLOW_S seconds and SPARE_MEMORY for what is inside: beyond, TookTooLong and a MemoryError or torch's own."""
    def ring(*_):
        raise TookTooLong
    old_handler = signal.signal(signal.SIGALRM, ring)
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_MEMORY, old_limit[1]))
    signal.alarm(SLOW_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)
        signal.signal(signal.SIGALRM, old_handler)


NUMBERS = [0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
JSON_VALUES = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "",
               "x", "é\ud800", "../../x", "a" * 10_000, [], [[]], {}, {"": None}, [1] * 1000]
TEXTS = [b"\0", b"\xff\xfe", b"\n", b"{", b"[" * 5000, b'"', b"\\u0000", b"0" * 400, b"null", b"-", b"e999", b"\r\n"]


def mutate(data, rng, file):
    """A damaged copy of the bytes of a file."""
    if file.endswith((".json", ".jsonl")) and rng.random() < 0.6:
        return mutate_json(data, rng)
    bad = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, n = place(len(bad), rng), rng.choice((1, 2, 8, 64, 1000))
        damage = rng.choice(("flip", "byte", "cut", "drop", "insert", "zero", "repeat", "number"))
        if damage == "flip" and at < len(bad):
            bad[at] ^= 1 << rng.randrange(8)
        elif damage == "byte" and at < len(bad):
            bad[at] = rng.randrange(256)
        elif damage == "cut":
            del bad[at:]
        elif damage == "drop":
            del bad[at:at + n]
        elif damage == "insert":
            bad[at:at] = rng.choice(TEXTS)
        elif damage == "zero":
            bad[at:at + n] = bytes(len(bad[at:at + n]))
        elif damage == "repeat":
            bad[at:at] = bad[at:at + n]
        elif damage == "number":
            bad[at:at + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
    return bytes(bad)


def place(n, rng):
    """A place among n bytes: as often in the first or the last 200 as anywhere, for headers stand there."""
    where = rng.randrange(3)
    first, last = (0, min(n, 200)) if where == 0 else (max(0, n - 200), n) if where == 1 else (0, n)
    return rng.randrange(first, max(last, first + 1))


def mutate_json(data, rng):
    """A copy of a JSON file, or of one line of JSON, with an entry replaced, dropped, or added."""
    lines = data.split(b"\n")
    is_lines = len(lines) > 2 and lines[0].startswith(b"{") and lines[0].endswith(b"}")
    i = rng.randrange(len(lines) - 1) if is_lines else 0
    value = json.loads(lines[i] if is_lines else data)
    parent, keys = value, []
    while isinstance(parent, (dict, list)) and len(parent):
        keys = [(parent, k) for k in (parent if isinstance(parent, dict) else range(len(parent)))]
        holder, key = rng.choice(keys)
        parent = holder[key]
        if rng.random() < 0.4:
            break
    damage = rng.randrange(4)
    if damage == 0:
        del holder[key]
    elif damage == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "format", "n_layer"])] = rng.choice(JSON_VALUES)
    else:
        holder[key] = rng.choice(JSON_VALUES)
    bad = json.dumps(value).encode("utf-8", "surrogatepass")
    return b"\n".join([*lines[:i], bad, *lines[i + 1:]]) if is_lines else bad


class Bomb:
    """Unpickled without care, it makes the marker."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


class FieldOfAnAllowedClass:
    """Pickled under the name of the one class that read_checkpoint lets in, build-nanogpt's config."""


FieldOfAnAllowedClass.__module__, FieldOfAnAllowedClass.__qualname__ = "__main__", "GPTConfig"


def bomb(entries, rng, marker):
    """The bytes of a checkpoint (its entries a dict) that asks to make the path `marker`; some damaged besides."""
    marker = str(marker)
    calls = [(os.mkdir, marker), (os.system, f"mkdir {marker}"), (exec, f"open({marker!r}, 'w')"),
             (eval, f"open({marker!r}, 'w')"), (subprocess.call, ["mkdir", marker]), (Path(marker).touch,)]
    live = Bomb(*rng.choice(calls))
    if rng.random() < 0.3:
        holder = FieldOfAnAllowedClass()
        holder.n_layer = live
        live = holder
    entries["extra"] = {}
    holder = rng.choice([entries, entries["config"], entries["optimizer"], entries["extra"]])
    holder[rng.choice(["config", "n_layer", "state", "step", "model"])] = live
    with tempfile.NamedTemporaryFile() as f:
        main_module = sys.modules["__main__"]
        had = getattr(main_module, "GPTConfig", None)
        main_module.GPTConfig = FieldOfAnAllowedClass
        try:
            torch.save(live if rng.random() < 0.2 else entries, f.name, pickle_protocol=rng.choice((2, 3, 4)),
                       _use_new_zipfile_serialization=rng.random() < 0.5)
        finally:
            del main_module.GPTConfig
            if had is not None:
                main_module.GPTConfig = had
        data = Path(f.name).read_bytes() if rng.random() < 0.9 else pickle.dumps(Bomb(os.mkdir, marker))
    return mutate(data, rng, "") if rng.random() < 0.3 else data
