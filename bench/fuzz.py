"""Damage every kind of file that the scripts read, thousands of times, and see what the user would.

    python -m bench.fuzz                                          # 2,000 mutants of each kind, 20 by the script itself
    python -m bench.fuzz --target checkpoint --mutants 100 --by_script 2

What a kind is, how it is damaged and what counts as a fault: tests/fuzz.py; tests/test_fuzz.py takes 100 of each.
Writes bench/results/fuzz.json, a row for each kind.
"""
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.common import RESULTS, machine, write_results
from exactgpt.config import UserError, flag, parse_config, read_json, run_script
from tests.fuzz import TARGETS, Bench


@dataclass(kw_only=True)
class FuzzConfig:
    """The flags of this benchmark."""
    target: list[str] = flag([], "only this kind of file; may be given several times", repeat=True)
    mutants: int = flag(2000, "of each kind, read in this process", low=1)
    by_script: int = flag(20, "of each kind, read by the script that a user would run", low=0)
    seed: int = flag(0, "of the damage", low=0)


def main(argv=None):
    """Damage and read; exits with status 1 where there was any fault."""
    config = parse_config(FuzzConfig, argv, __doc__.split("\n\n")[0])
    unknown = set(config.target) - set(TARGETS)
    if unknown:
        raise UserError(f"--target {unknown.pop()} is unknown; there are {', '.join(TARGETS)}")
    path = RESULTS / "fuzz.json"
    rows = read_json(path)["rows"] if path.exists() else {}
    for name in config.target or TARGETS:
        begun = time.monotonic()
        rows[name] = dict(fuzz(name, config), seconds=round(time.monotonic() - begun), seed=config.seed)
        write_results("fuzz", dict(machine=machine(), rows=rows))
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if any(rows[name]["faults"] for name in config.target or TARGETS):
        sys.exit(1)


def fuzz(name, config):
    """What became of the mutants of one kind: a row of the results (a dict)."""
    counts, by_script, faults = Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, Path(folder))
        for i in range(config.mutants + config.by_script):
            rng = random.Random(f"{config.seed} {name} {i}")
            outcome = bench.try_one(rng) if i < config.mutants else bench.try_script(rng)
            (counts if i < config.mutants else by_script)[outcome.split(":")[0]] += 1
            if outcome.startswith("fault"):
                faults.append(f"mutant {i}: {outcome}")
    return dict(mutants=config.mutants, in_process=counts, by_script=by_script, faults=faults)


if __name__ == "__main__":
    run_script(main)
