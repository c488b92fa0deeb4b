"""Put one mistake at a time into a copy of the code, and see whether the tests notice.

    python -m bench.mutations                                    # every mutation of bench/mutations_table.py
    python -m bench.mutations --only model.py --only train.py    # those of some files

The copy has what git tracks, in a temporary folder. Its tests pass before anything is changed, so a test that fails
afterwards fails because of the mistake. Writes bench/results/mutations.json with a row per mutation.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench.common import RESULTS, comparison_row, describe_machine, write_results
from bench.mutations_table import MUTATIONS
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.files import read_json

ROOT = Path(__file__).parents[1]


@dataclass(kw_only=True)
class MutationsConfig:
    """The flags of this benchmark."""
    only: list[str] = flag([], "file whose mutations to try; may be given several times (default: all)", repeat=True)


def main(argv=None):
    """Try the mutations. Exits with status 1 if one survives. Raises UserError for a mutation that cannot be tried."""
    config = parse_config(MutationsConfig, argv, __doc__.split("\n\n")[0])
    chosen = [mutation for mutation in MUTATIONS if not config.only or mutation[0] in config.only]
    unknown = set(config.only) - {file for file, *_ in MUTATIONS}
    if unknown:
        raise UserError(f"--only: there is no mutation of {min(unknown)}; see bench/mutations_table.py")
    for file, old, new, _ in chosen:
        mutated(file, old, new)      # raises now rather than after hours
    path = RESULTS / "mutations.json"
    rows = {(row["file"], row["change"]): row for row in (read_json(path)["rows"] if path.exists() else [])}
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_repository(Path(folder) / "copy")
        failed, output = run_tests(copy, sorted({name for *_, tests in chosen for name in tests.split()}))
        if failed:
            raise UserError(f"{failed} fails without any mutation; repair it first: {' '.join(output[-400:].split())}")
        for file, old, new, tests in tqdm(chosen, "mutations", unit="mutation"):
            row = try_mutation(copy, file, old, new, tests)
            rows[file, row["change"]] = row
            if not row["killed"]:
                tqdm.write(f"survived: {file}: {row['change']}")
    keys = [(file, change(old, new)) for file, old, new, _ in MUTATIONS]
    rows = [rows[key] for key in keys if key in rows]      # in the table's order, without those that it has no longer
    killed = sum(row["killed"] for row in rows)
    write_results("mutations", dict(machine=describe_machine(), mutations=len(rows), killed=killed, rows=rows), [
        comparison_row("mistakes put into the code one at a time that a test notices", f"of {len(rows)}", killed)])
    if killed < len(rows):
        sys.exit(1)


def mutated(file, old, new):
    """Return the text of a file with `new` in the place of `old`. Raises UserError if `old` does not occur once."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(old) != 1 or old == new:
        raise UserError(f"bench/mutations_table.py: the first text of {change(old, new)!r} must occur once in {file}, "
                        f"but occurs {text.count(old)} times")
    return text.replace(old, new)


def change(old, new):
    """Return a mutation as one line."""
    return " -> ".join(" ".join(text.split()) or "nothing" for text in (old, new))


def copy_repository(folder):
    """Copy the files that git tracks to a new folder, and return it."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def try_mutation(copy, file, old, new, tests):
    """Run the tests named for a mutation on the mutated copy; return a row of the results (a dict)."""
    path = copy / file
    try:
        path.write_text(mutated(file, old, new), encoding="utf-8")
        failed, _ = run_tests(copy, tests.split())
    finally:
        shutil.copy2(ROOT / file, path)
    return dict(file=file, change=change(old, new), tests=tests, killed=bool(failed), by=failed)


def run_tests(folder, tests):
    """Run tests in a folder up to the first that fails; return (its name or "", pytest's output)."""
    # No caches: a .pyc of the unchanged file would be taken for the mutated one's if both have the same size and time.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cwd=folder,
                            env=env, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", result.stdout, re.MULTILINE)
    if result.returncode > 1 or (result.returncode and not failed):      # 1: tests failed; 2: a file cannot be imported
        said = " ".join((result.stdout + result.stderr)[-400:].split())
        raise UserError(f"pytest could not run {' '.join(tests)}: {said}")
    return failed[1] if failed else "", result.stdout


if __name__ == "__main__":
    run_script(main)
