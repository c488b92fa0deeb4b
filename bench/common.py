"""What the benchmarks share: where results go, the machine's description, and how results are written."""
import datetime
import json
import os
import platform
import statistics
from pathlib import Path

from exactgpt.files import write_json

RESULTS = Path(__file__).parent / "results"                   # the committed results
OUT = Path(os.environ.get("OUT", RESULTS / "gpu"))            # what bench.gpu leaves to be copied from the machine
WRITE_TO = Path(os.environ.get("BENCH_RESULTS", RESULTS))     # bench.gpu has its stages write to another folder


def describe_machine():
    """Return the date, hardware and versions as a dict of strings: a figure means nothing without them."""
    import numpy
    import torch

    from exactgpt.device import cpu_name
    return dict(date=datetime.date.today().isoformat(), cpu=f"{cpu_name()} x {os.cpu_count()}",
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "", python=platform.python_version(),
                torch=str(torch.__version__), numpy=numpy.__version__, system=platform.platform())


def append_result(**facts):
    """Append a line to OUT/results.jsonl and print it."""
    line = json.dumps(facts)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "results.jsonl", "a", encoding="utf-8") as f:
        f.write(line + "\n")
    print(line, flush=True)


def median_and_range(values):
    """Return (median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def comparison_row(what, unit, ours, peer="", theirs=None):
    """Return a row of the table in bench/results/README.md: our figure and the peer's from the same run."""
    return dict(what=what, unit=unit, ours=ours, peer=peer, theirs=theirs)


def write_results(name, result, table=()):
    """Write a dict of plain values to bench/results/NAME.json (or $BENCH_RESULTS) and print the path and its start.

    table: the rows (see `comparison_row`) that bench.table makes of it.
    """
    path = WRITE_TO / f"{name}.json"
    write_json(path, dict(result, table=list(table)))
    print(f"wrote {path}: {json.dumps(result)[:200]}")
