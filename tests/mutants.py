"""Damage files at random, and make checkpoints that try to run code when they are loaded.

Damage means bits flipped, bytes dropped, inserted or repeated, the end cut off, or a JSON value replaced. All
randomness comes from a random.Random, so that each mutant can be made again.
"""
import contextlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch

TIME_LIMIT_S = 10
MEMORY_LIMIT = 2 << 30       # bytes of address space, in addition to what the process already has


class TookTooLong(BaseException):
    """The time limit is over. A BaseException, so that no `except Exception` takes it for a damaged file."""


@contextlib.contextmanager
def time_and_memory_limits():
    """Return a context that raises TookTooLong after TIME_LIMIT_S, and limits memory to MEMORY_LIMIT more.

    Beyond that an allocation raises MemoryError, or torch's RuntimeError.
    """
    def raise_took_too_long(*_):
        raise TookTooLong
    old_handler = signal.signal(signal.SIGALRM, raise_took_too_long)
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, old_limit[1]))
    signal.alarm(TIME_LIMIT_S)
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
    """Return a damaged copy of the bytes of a file. file: its name, whose suffix tells if it is JSON."""
    if file.endswith((".json", ".jsonl")) and rng.random() < 0.6:
        return mutate_json(data, rng)
    bad = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, n = random_position(len(bad), rng), rng.choice((1, 2, 8, 64, 1000))
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


def random_position(n, rng):
    """Return a position among n bytes: in the first 200, in the last 200 or anywhere, each with probability 1/3.

    File formats keep their headers and indexes at the two ends.
    """
    where = rng.randrange(3)
    first, last = (0, min(n, 200)) if where == 0 else (max(0, n - 200), n) if where == 1 else (0, n)
    return rng.randrange(first, max(last, first + 1))


def mutate_json(data, rng):
    """Return a copy of a JSON or JSON-lines file with one value replaced, dropped or added."""
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
    """An object that makes a function call when it is unpickled without weights_only."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


class AllowedClass:
    """A class with the name of the only one that read_checkpoint allows: build-nanogpt's __main__.GPTConfig."""


AllowedClass.__module__, AllowedClass.__qualname__ = "__main__", "GPTConfig"


def pickle_bomb(entries, rng, marker):
    """Return the bytes of a checkpoint that, if it ran code, would create the path `marker`. Some are also damaged.

    entries: those of a good checkpoint (a dict).
    """
    marker = str(marker)
    calls = [(os.mkdir, marker), (os.system, f"mkdir {marker}"), (exec, f"open({marker!r}, 'w')"),
             (eval, f"open({marker!r}, 'w')"), (subprocess.call, ["mkdir", marker]), (Path(marker).touch,)]
    live = Bomb(*rng.choice(calls))
    if rng.random() < 0.3:
        holder = AllowedClass()
        holder.n_layer = live
        live = holder
    entries["extra"] = {}
    holder = rng.choice([entries, entries["config"], entries["optimizer"], entries["extra"]])
    holder[rng.choice(["config", "n_layer", "state", "step", "model"])] = live
    with tempfile.NamedTemporaryFile() as f:
        main_module = sys.modules["__main__"]
        old_class = getattr(main_module, "GPTConfig", None)
        main_module.GPTConfig = AllowedClass
        try:
            torch.save(live if rng.random() < 0.2 else entries, f.name, pickle_protocol=rng.choice((2, 3, 4)),
                       _use_new_zipfile_serialization=rng.random() < 0.5)
        finally:
            del main_module.GPTConfig
            if old_class is not None:
                main_module.GPTConfig = old_class
        data = Path(f.name).read_bytes() if rng.random() < 0.9 else pickle.dumps(Bomb(os.mkdir, marker))
    return mutate(data, rng, "") if rng.random() < 0.3 else data


def odd_checkpoint(entries, rng, marker):
    """Return the bytes of a checkpoint with one tensor, list or zip part that stands for more data than is there.

    entries: those of a good checkpoint (a dict).
    """
    n = rng.choice((1, 100, 10**5))
    endless = []
    endless.append(endless)
    shared = ["x"]
    for _ in range(30):
        shared = [shared] * 10
    odd = [lambda: torch.sparse_coo_tensor([[0]], [1.0], (n * 10**5,)), lambda: torch.eye(3).to_sparse_csr(),
           lambda: torch.empty(n * 10**5, device="meta"), lambda: torch.zeros(1).expand(n * 10**5),
           lambda: torch.zeros(8).as_strided((5, 4), (1, 1)), lambda: torch.zeros(64).as_strided((3, 8), (0, 1)),
           lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8), lambda: endless, lambda: shared,
           lambda: {i: entries["model"] for i in range(9)}]
    choice = rng.randrange(len(odd) + 1)
    if choice < len(odd):
        holder = rng.choice([entries, entries["model"], entries["optimizer"]])
        with warnings.catch_warnings(action="ignore"):      # torch's, about sparse and quantized tensors
            holder[rng.choice(["extra", *holder])] = odd[choice]()
    plain = io.BytesIO()
    torch.save(entries, plain, _use_new_zipfile_serialization=choice == len(odd) or rng.random() < 0.8)
    if choice < len(odd):
        return plain.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(plain) as good, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        bad.writestr("archive/data/99", bytes(10**7))
    return packed.getvalue()
