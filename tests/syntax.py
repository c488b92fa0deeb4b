"""Parse our scripts and modules, and list what they import."""
import ast

from tests.common import ROOT

# {module name: syntax tree} of the scripts, the model and the package.
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
         ast.parse(path.read_text(encoding="utf-8")) for path in [*ROOT.glob("*.py"), *ROOT.glob("exactgpt/**/*.py")]}


def imports(nodes):
    """Yield the modules that nodes of a syntax tree import: ours by full name, libraries by top-level name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name if alias.name in TREES else alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module == "exactgpt":
                yield from (f"exactgpt.{alias.name}" for alias in node.names)
            else:
                yield node.module if node.module in TREES else node.module.split(".")[0]
