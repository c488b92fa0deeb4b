"""The documentation inside CPython itself, a corpus that every machine with Python already has: about 2 MB of English.

The language reference's topics (pydoc_data) and the standard library's docstrings, read with `ast`, never imported.
"""
import ast
import sysconfig
import warnings
from pathlib import Path

from exactgpt.config import UserError

# Not documentation: tests, the bundled editor and its turtles, code page tables, other people's packages.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
            "pydoc_data", "encodings", "__pycache__", "__phello__", "_pyrepl"}


def python_documents():
    """Yield the documents (str) in a fixed order: one for each topic, one for each module. Raises UserError."""
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.exists():
        raise UserError(f"this Python came without its documentation ({topics} is missing); use one from python.org, "
                        "or bring your own text: prepare_text.py FILE_OR_DIR... --out data/NAME")
    dictionary = next(node.value for node in _parse(topics).body if isinstance(node, ast.Assign))
    for _, text in sorted(ast.literal_eval(dictionary).items()):
        yield text.strip() + "\n"
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            text = _module_text(".".join(p for p in parts if p != "__init__"), _parse(path))
            if text:
                yield text


def _parse(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in old docstrings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):       # a template, or a file of another Python
            return ast.Module([], [])


def _module_text(name, module):
    """The docstrings of a module, its classes and functions as pydoc lays them out; "" where there are none."""
    text = ast.get_docstring(module) or ""
    sections = [f"Help on module {name}:\n\n{text}"] if text else []
    sections += _definitions(module, name + ".", "")
    return "\n\n".join(sections) + "\n" if sections else ""


def _definitions(node, prefix, indent):
    sections = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(child)
        is_class = isinstance(child, ast.ClassDef)
        if text:
            head = f"class {prefix}{child.name}" if is_class else f"{prefix}{child.name}({ast.unparse(child.args)})"
            body = "\n".join(f"{indent}    {line}".rstrip() for line in text.splitlines())
            sections.append(f"{indent}{head}\n{body}")
        if is_class:
            sections += _definitions(child, "", indent + "    ")
    return sections
