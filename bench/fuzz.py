"""Damage every kind of file that the scripts read, thousands of times, and count what is refused and what is not.

    python -m bench.fuzz                    # per kind 2,000 mutants read in this process and 20 by the script itself
    python -m bench.fuzz --target checkpoint --mutants 100 --by_script 2

tests/fuzz.py defines the kinds of files, how they are damaged, and what counts as a fault. Writes
bench/results/fuzz.json with a row per kind. (tests/test_fuzz.py tries 50 mutants of each.)
"""
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.common import RESULTS, describe_machine, write_results
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.files import read_json
from tests.fuzz import TARGETS, Fuzzer


@dataclass(kw_only=True)
class FuzzConfig:
    """The flags of this benchmark."""
    target: list[str] = flag([], "kind of file to damage; may be given several times (default: all)", repeat=True)
    mutants: int = flag(2000, "damaged files of each kind to read in this process", low=1)
    by_script: int = flag(20, "damaged files of each kind to read by running the script that a user would run", low=0)
    seed: int = flag(0, "random seed for the damage", low=0)


def main(argv=None):
    """Damage and read files of each kind. Exits with status 1 if there was any fault."""
    config = parse_config(FuzzConfig, argv, __doc__.split("\n\n")[0])
    unknown = set(config.target) - set(TARGETS)
    if unknown:
        raise UserError(f"--target: there is no kind {unknown.pop()!r}; the kinds are {', '.join(TARGETS)}")
    path = RESULTS / "fuzz.json"
    rows = read_json(path)["rows"] if path.exists() else {}
    for name in config.target or TARGETS:
        start_time = time.monotonic()
        rows[name] = dict(fuzz_target(name, config), seconds=round(time.monotonic() - start_time), seed=config.seed)
        write_results("fuzz", dict(machine=describe_machine(), rows=rows))
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if any(rows[name]["faults"] for name in config.target or TARGETS):
        sys.exit(1)


def fuzz_target(name, config):
    """Damage and read files of one kind; return a row of the results (a dict)."""
    counts, by_script, faults = Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(name, Path(folder))
        for i in range(config.mutants + config.by_script):
            rng = random.Random(f"{config.seed} {name} {i}")
            outcome = fuzzer.try_in_process(rng) if i < config.mutants else fuzzer.try_script(rng)
            (counts if i < config.mutants else by_script)[outcome.split(":")[0]] += 1
            if outcome.startswith("fault"):
                faults.append(f"mutant {i}: {outcome}")
    return dict(mutants=config.mutants, in_process=counts, by_script=by_script, faults=faults)


if __name__ == "__main__":
    run_script(main)
