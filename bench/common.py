"""What every benchmark says about itself, and where its results go."""
import datetime
import json
import os
import platform
import socket
import statistics
from pathlib import Path

from exactgpt.config import write_json

RESULTS = Path(__file__).parent / "results"                  # what is committed
OUT = Path(os.environ.get("OUT", RESULTS / "gpu"))            # what bench.gpu leaves to be copied from the machine
WRITTEN_TO = Path(os.environ.get("BENCH_RESULTS", RESULTS))  # bench.gpu collects its stages' elsewhere


def machine():
    """Hardware and versions, as plain strings: without them a figure says nothing."""
    import numpy
    import torch

    from exactgpt.device import cpu_name
    return dict(date=datetime.date.today().isoformat(), cpu=f"{cpu_name()} x {os.cpu_count()}",
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "", python=platform.python_version(),
                torch=str(torch.__version__), numpy=numpy.__version__, system=platform.platform())


def record(**facts):
    """Add a line to OUT/results.jsonl, and print it."""
    line = json.dumps(facts)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "results.jsonl", "a", encoding="utf-8") as f:
        f.write(line + "\n")
    print(line, flush=True)


def choose_meeting_point():
    """Name a free port of this machine, as torchrun would, for a process group of this process alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))


def spread(values):
    """The median, and with it the spread: (median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def compared(what, unit, ours, peer="", theirs=None):
    """A row of bench/results/README.md: our figure, and the peer's of the same run."""
    return dict(what=what, unit=unit, ours=ours, peer=peer, theirs=theirs)


def write_results(name, result, table=()):
    """Write a dict of plain values to bench/results/NAME.json (or $BENCH_RESULTS), and print where and its beginning.

    table: the rows (see `compared`) by which bench.table shows it.
    """
    path = WRITTEN_TO / f"{name}.json"
    write_json(path, dict(result, table=list(table)))
    print(f"wrote {path}: {json.dumps(result)[:200]}")
