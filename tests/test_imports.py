"""Importing is silent and starts nothing; imports point down; scripts run where only torch, numpy and tiktoken are."""
import ast
import json

import pytest
from conftest import ROOT

# Leaves define things; each imports only leaves listed above it. A new leaf gets its place here.
LEAVES = ["config", "files", "human", "plan", "hub", "hf_format", "model", "tokenizer", "shards", "documents", "encode",
          "python_docs", "dataloader", "device", "lora", "classifier", "checkpoint", "peers", "runtime", "decoding",
          "template", "resume", "optimizer", "update", "memory", "choices", "history", "figures", "tracking", "metrics",
          "assemble", "rows", "tuning", "finetuning"]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES}
SCRIPTS = [name for name in MODULES
           if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in TREES[name].body)]
WITHOUT_TORCH = [name for name in MODULES if name.startswith("prepare_") or name in (
    "config", "files", "human", "plan", "tokenizer", "shards", "hub", "history", "figures", "plot")]
LATER = {"datasets", "transformers", "matplotlib", "pandas", "pyarrow", "tokenizers", "safetensors", "huggingface_hub",
         "mlflow", "streamlit", "sklearn", "scipy", "peft"}     # imported by the functions that need them


def imports(tree):
    """(module, names) of every import in a file, in functions too; names is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import in a flat repository"
            yield node.module.split(".")[0], {alias.name for alias in node.names}


def allowed(importer, module, names):
    """Whether a script may import names from another script."""
    return ((module == "inference" and names <= {"generate", "stream"})
            or (importer == "train" and module == "hellaswag")
            or (importer.startswith(("lr_finder", "finetune_")) and module == "train"))


def test_every_module_is_a_script_with_a_main_or_a_listed_leaf():
    leaves = set(MODULES) - set(SCRIPTS) - {"app"}
    assert leaves == set(LEAVES), f"give LEAVES of this test its {leaves ^ set(LEAVES)}"


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf in MODULES])
def test_a_leaf_imports_only_leaves_above_it(leaf):
    below = {module for module, _ in imports(TREES[leaf])} & set(MODULES) - set(LEAVES[:LEAVES.index(leaf)])
    assert not below


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_leaves_and_few_other_scripts(script):
    crossing = [(module, names) for module, names in imports(TREES[script]) if module in SCRIPTS]
    assert all(allowed(script, module, names) for module, names in crossing), crossing


@pytest.mark.parametrize("name", MODULES)
def test_the_top_level_only_defines(name):
    """Docstring, imports, constants, definitions, and in scripts the guarded call of main()."""
    for node in TREES[name].body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'" and name in SCRIPTS, ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                                     ast.AnnAssign, ast.Expr)), ast.unparse(node)
            assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant), ast.unparse(node)


# Imports modules one after the other; prints what each printed and changed, and what is loaded then, as JSON.
PROBE = """
import json, os, signal, sys, tempfile, threading, time
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
        __import__(name)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(streams[0], 1), os.dup2(streams[1], 2)
        seconds, after = time.monotonic() - start, state()
        output.seek(0)
        facts[name] = dict(printed=output.read(), changed=[k for k in before if before[k] != after[k]])
        assert seconds < 30, f"{name} took {seconds} s"
print(json.dumps([facts, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def probe(run, folder, *names, torch):
    """The third-party and own modules loaded after importing `names`, none of which may print or change anything."""
    rc, out, err = run("-c", PROBE, ",".join(names), *["torch"] * torch, cwd=folder)
    assert rc == 0, err
    facts, loaded = json.loads(out)
    assert facts == {name: dict(printed="", changed=[]) for name in names}
    return set(loaded)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_data_and_plot_modules_import_silently_and_without_torch(run, tmp_path, name):
    """The workers of the prepare scripts stay small, and plots need no torch."""
    assert not probe(run, tmp_path, name, torch=False) & (LATER | {"torch"})


def test_modules_with_torch_import_silently_start_nothing_and_load_no_extra(run, tmp_path):
    """No process group, thread, signal handler, file, seed; inference.py, train.py and hellaswag.py need no extra."""
    names = [name for name in MODULES if name not in WITHOUT_TORCH and name != "app"]
    lean = [name for name in names if name in LEAVES or name in ("train", "hellaswag", "inference")]
    assert not probe(run, tmp_path, *lean, torch=True) & LATER
    others = [name for name in names if name not in lean]
    if others:
        probe(run, tmp_path, *others, torch=True)


FILES = [path for folder in (ROOT, ROOT / "bench", ROOT / "tests") for path in sorted(folder.glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_public_names_have_docstrings_and_nothing_is_long(path):
    """450 lines a file, below 60 a function: what is longer is two of something."""
    def public(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node
                yield from public(node.body if isinstance(node, ast.ClassDef) else [])
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 450
    assert not [node.name for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60]
    assert path.parent.name == "tests" or not [n.name for n in public(tree.body) if not ast.get_docstring(n)]
