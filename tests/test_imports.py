"""The three import rules; importing is silent and starts nothing; scripts run where only torch, numpy and tiktoken are.

model.py imports torch and the standard library. The package imports model.py and itself, without circles. Scripts
import both, and two of them take from another script.
"""
import ast
import json
import sys

import pytest

from tests.common import ROOT
from tests.syntax import TREES, imports

PACKAGE = {name for name in TREES if name.startswith("exactgpt")}
SCRIPTS = TREES.keys() - PACKAGE - {"model"}
BETWEEN_SCRIPTS = {"train": "hellaswag", "lr_finder": "train"}     # who takes from whom
WITHOUT_TORCH = sorted(name for name in SCRIPTS if name.startswith(("prepare_", "plot")))
STANDARD = set(sys.stdlib_module_names)
LATER = {"datasets", "transformers", "matplotlib", "pandas", "pyarrow", "tokenizers", "safetensors", "huggingface_hub",
         "mlflow", "streamlit", "sklearn", "scipy", "peft"}     # imported by the functions that need them

IMPORTED = {name: set(imports(ast.walk(tree))) for name, tree in TREES.items()}      # in functions, too


def reached(name):
    """The files of ours that a file imports, and those that they import, and so on."""
    found, pending = set(), [name]
    while pending:
        new = (IMPORTED[pending.pop()] & TREES.keys()) - found
        found |= new
        pending += new
    return found


def test_the_model_imports_torch_and_the_standard_library():
    assert IMPORTED["model"] - STANDARD == {"torch"}
    assert IMPORTED["exactgpt.launch"] <= STANDARD       # it comes before torch


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_the_package_imports_the_model_and_itself_without_circles(name):
    assert not IMPORTED[name] & (SCRIPTS | {"tests", "bench"})
    assert name not in reached(name)
    assert name.count(".") <= 1, "the package is flat"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_has_a_main_and_imports_the_package_the_model_and_at_most_one_other_script(name):
    assert IMPORTED[name] & (SCRIPTS | {"tests", "bench"}) <= {BETWEEN_SCRIPTS.get(name)}
    assert "main" in {node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef)}
    assert ast.unparse(TREES[name].body[-1]) == "if __name__ == '__main__':\n    run_script(main)"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_function_that_preparation_and_plots_can_reach_imports_torch(name):
    assert not [other for other in {name} | reached(name) if "torch" in IMPORTED[other] or other == "model"]


@pytest.mark.parametrize("name", sorted(TREES))
def test_the_top_level_only_defines(name):
    """Docstring, imports, constants, definitions, in scripts the guarded call of main(), and the death signal."""
    for node in TREES[name].body[:-1 if name == "exactgpt.launch" else None]:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'" and name in SCRIPTS, ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                                     ast.AnnAssign, ast.Expr)), ast.unparse(node)
            assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant), ast.unparse(node)


# Imports modules one after the other; prints what each printed and changed, and what is loaded then, as JSON.
PROBE = """
import importlib, json, os, signal, sys, tempfile, threading, time
names, facts = sys.argv[1].split(","), {}
handled = [s for s in signal.Signals if s not in (signal.SIGKILL, signal.SIGSTOP)]
def state():
    torch = sys.modules.get("torch") if "torch" in sys.argv else None
    return dict(environment=dict(os.environ), threads=threading.active_count(), files=os.listdir(),
                signals=[str(signal.getsignal(s)) for s in handled], torch=torch and [
                    torch.distributed.is_initialized(), torch.get_num_threads(), str(torch.get_default_dtype()),
                    torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist()])
if "torch" in sys.argv:
    import torch
for name in names:
    with tempfile.TemporaryFile("w+") as output:
        before, streams, start = state(), [os.dup(1), os.dup(2)], time.monotonic()
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        importlib.import_module(name)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(streams[0], 1), os.dup2(streams[1], 2)
        seconds, after = time.monotonic() - start, state()
        output.seek(0)
        facts[name] = dict(printed=output.read(), changed=[k for k in before if before[k] != after[k]])
        assert seconds < 30, f"{name} took {seconds} s"
print(json.dumps([facts, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def probe(run, folder, *names, torch):
    """The packages loaded after importing `names`, none of which may print or change anything."""
    rc, out, err = run("-c", PROBE, ",".join(names), *["torch"] * torch, cwd=folder)
    assert rc == 0, err
    facts, loaded = json.loads(out)
    assert facts == {name: dict(printed="", changed=[]) for name in names}
    return set(loaded)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_preparation_and_plots_import_silently_and_without_torch(run, tmp_path, name):
    """The workers of the prepare scripts stay small, and plots need no torch."""
    assert not probe(run, tmp_path, name, torch=False) & (LATER | {"torch"})


def test_modules_with_torch_import_silently_start_nothing_and_load_no_extra(run, tmp_path):
    """No process group, thread, signal handler, file, seed; inference.py, train.py and hellaswag.py need no extra."""
    lean = ["model", *sorted(PACKAGE), "hellaswag", "inference", "train"]
    assert not probe(run, tmp_path, *lean, torch=True) & LATER
    probe(run, tmp_path, *sorted(SCRIPTS - {*WITHOUT_TORCH, *lean, "app"}), torch=True)


FILES = [path for folder in (ROOT, *(ROOT / name for name in ("exactgpt", "bench", "tests")))
         for path in sorted(folder.glob("*.py"))]


def test_no_file_imports_a_test_and_what_tests_share_has_one_name():
    """A helper imported as `common` here and `tests.common` there would be two modules."""
    stems = {path.stem for path in FILES if path.parent.name == "tests"}
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        wrong = [name for name in names if name in stems or name.startswith("tests.test_")]
        assert not wrong, f"{path.name} imports {', '.join(wrong)}"


def test_the_check_of_a_config_only_checks():
    """What it filled in would be compared, logged and stored as if it had been typed."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "check":
                stored = [part.attr for part in ast.walk(node)
                          if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)]
                assert not stored, f"{path.name}: check() sets {', '.join(stored)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_public_names_have_docstrings_and_nothing_is_long(path):
    """What is longer than 520 lines a file (train.py 600, a test 450) and 60 a function is two of something."""
    def public(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node
                yield from public(node.body if isinstance(node, ast.ClassDef) else [])
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= {"train": 600, "tests": 450}.get(
        path.parent.name if path.parent != ROOT else path.stem, 520)
    assert not [node.name for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60]
    assert path.parent.name == "tests" or not [n.name for n in public(tree.body) if not ast.get_docstring(n)]
