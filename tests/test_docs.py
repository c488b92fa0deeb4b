"""The pages against the code: the files and names that they name are there, quotes are the code, links lead somewhere.

A page says that a file has a name in one form, `name` in `folder/file.py`, or `one`, `two` and `three` in `file.py`. A
block of python begins with "# folder/file.py" and quotes lines that stand there together. Paths go from the root, or
from the page's folder; test_NAME.py is in tests/. A file of somebody else stands after "'s" or "its": build-nanogpt's
fineweb.py.
"""
import ast
import re
import textwrap
from types import SimpleNamespace

import pytest

from bench.common import RESULTS
from bench.table import table
from tests.common import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", ROOT / "logs" / "README.md",
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FOLDERS = ("exactgpt", "tests", "bench", "docs", "examples")
CODE = {path: path.read_text(encoding="utf-8")
        for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]}

NAMED = re.compile(r"(?P<names>(?:`[^`\n]+`(?:,\s+|\s+and\s+))*`[^`\n]+`)\s+in\s+`(?P<file>[\w./-]+\.py)`")
OTHER_FORM = re.compile(r"(?P<name>`[^`\n]+`)\s+\((?:in\s+)?(?P<file>`[\w./-]+\.py`)\)")
FILE = re.compile(r"https?://\S+|(?P<peers>(?:'s|\bits)\s+)?(?P<path>[\w./-]+\.py)\b(?P<line>:\d+)?"
                  rf"|`(?P<other>(?:{'|'.join(FOLDERS)})/[^`\s]*)`|-m (?P<module>(?:bench|tests)\.\w+)")
BLOCK = re.compile(r"^```python\n(?:# (?P<file>\S+\.py)\n)?(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)(?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


def find(path, page):
    """The file or folder that a page means by a path; None where there is none."""
    places = [ROOT / path, page.parent / path, *[ROOT / "tests" / path] * path.startswith("test_")]
    return next((place for place in places if place.exists()), None)


def wrong_names(text, page):
    """Each name is defined in its file, or, where none of our files defines it, stands there; in one form."""
    yield from (f"{m[0]}: write {m['name']} in {m['file']}" for m in OTHER_FORM.finditer(text))
    for m in NAMED.finditer(text):
        path = find(m["file"], page)
        for name in re.findall(r"`([^`]+)`", m["names"]) if path else ():      # wrong_files() names a missing file
            word = re.findall(r"\w+", name)[-1]
            definition = rf"(?m)^\s*(?:def|class) {word}\b|^(?:\s*self\.)?{word}\b(?:: [^=\n]+)? = "
            defined_in = [p for p, code in CODE.items() if re.search(definition, code)]
            if path not in defined_in and (defined_in or not re.search(rf"\b{word}\b", CODE[path])):
                places = ", ".join(str(p.relative_to(ROOT)) for p in defined_in)
                yield f"{name} is not in {m['file']}" + f", but in {places}" * bool(places)


def wrong_files(text, page):
    """Each .py file of ours is there, and so is each `folder/...` of ours and what python -m runs."""
    for m in FILE.finditer(text):
        if m["line"]:
            yield f"{m[0]}: name what stands there, not the line"
        path = m["module"].replace(".", "/") + ".py" if m["module"] else m["path"] or m["other"]
        if path and not m["peers"] and not find(path, page):
            yield f"{path} does not exist"


def wrong_quotes(text, page):
    """Each block of python is lines of a file, together and in order, but for their indentation."""
    for m in BLOCK.finditer(text):
        code, n = m["code"].rstrip("\n"), len(m["code"].splitlines())
        if not m["file"]:
            yield f"{code.splitlines()[0]!r}: a block of python begins with # FILE.py"
        elif path := find(m["file"], page):
            lines = CODE[path].splitlines()
            if code not in (textwrap.dedent("\n".join(lines[i:i + n])) for i in range(len(lines))):
                yield f"{code.splitlines()[0]!r} is not in {m['file']}"


def wrong_links(text, page):
    """Each link leads to a file, and to a heading of it where it names one."""
    for m in LINK.finditer(text):
        path = page.parent / m["target"] if m["target"] else page
        if not path.exists():
            yield f"the link to {m['target']} leads nowhere"
        elif m["anchor"] and m["anchor"] not in anchors(text if path == page else path.read_text(encoding="utf-8")):
            yield f"{path.name} has no heading #{m['anchor']}"


def anchors(text):
    """The names that GitHub gives the headings of a page: small letters, spaces to hyphens, no other signs."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def table_of_files():
    """README's table: each file that people type or that the scripts share, and the first sentence of its docstring."""
    first = [ROOT / "train.py", ROOT / "model.py"]
    paths = [*first, *sorted(set(ROOT.glob("*.py")) - set(first)), *sorted(ROOT.glob("exactgpt/[a-z]*.py"))]
    rows = ["| file | what |", "|---|---|"]
    for path in paths:
        sentence = re.match(r".*?(?<!et al)[.?](?=\s|$)", ast.get_docstring(ast.parse(CODE[path])), re.DOTALL)[0]
        name = path.relative_to(ROOT)
        rows.append(f"| [{name}]({name}) | {' '.join(sentence.removesuffix('.').split())} |")
    return "\n".join(rows)


def check(text, page):
    """What is wrong with a page, a line each."""
    return [line for look in (wrong_names, wrong_files, wrong_quotes, wrong_links) for line in look(text, page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    wrong = check(page.read_text(encoding="utf-8"), page)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-extras.txt"])
def test_what_a_package_is_for_is_there(name):
    assert not list(wrong_files((ROOT / name).read_text(encoding="utf-8"), ROOT / name))


def test_the_readmes_table_of_files_is_what_the_files_say():
    assert f"\n## Files\n\n{table_of_files()}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8"), table_of_files()


@pytest.mark.parametrize("text, message", [
    ("`GPTX` in `model.py`", "GPTX is not in model.py"),
    ("`Block` and\n`GPTX` in `model.py`", "GPTX is not in model.py"),
    ("`DataOrder` in `train.py`", "DataOrder is not in train.py, but in exactgpt/dataloader.py"),     # it imports it
    ("`GPT` (`model.py`)", "`GPT` (`model.py`): write `GPT` in `model.py`"),
    ("`forward` in `modell.py`", "modell.py does not exist"),
    ("see `dataloader.py`", "dataloader.py does not exist"),          # it has moved into the package
    ("see test_modell.py", "test_modell.py does not exist"),
    ("see `bench/results/no.json`", "bench/results/no.json does not exist"),
    ("run `python -m bench.no --all`", "bench/no.py does not exist"),
    ("`GPT` (`model.py:30`)", "model.py:30: name what stands there, not the line"),
    ("```python\n# model.py\nimport maths\n```\n", "'import maths' is not in model.py"),
    ("```python\n# model.py\nimport math\n\nimport torch\n```\n", "'import math' is not in model.py"),   # not together
    ("```python\nimport math\n```\n", "'import math': a block of python begins with # FILE.py"),
    ("[here](docs/no.md)", "the link to docs/no.md leads nowhere"),
    ("[here](CONTRIBUTING.md#nowhere)", "CONTRIBUTING.md has no heading #nowhere"),
    ("# One\n[here](#two)", "README.md has no heading #two"),
])
def test_what_is_wrong_is_found(text, message):
    assert check(text, ROOT / "README.md") == [message]


@pytest.mark.parametrize("text", [
    "`GPT` in `model.py`, `Block` and\n`model.MLP`\nin `model.py`, `cross_entropy` in `model.py`",
    "build-nanogpt's fineweb.py and its hellaswagg.py, https://github.com/karpathy/nanoGPT/blob/master/sample.py",
    "test_model.py, `tests/test_model.py`, a `.py` file, `python train.py --help`",
    "```python\n# model.py\nself.apply(self._init_weights)\n```\n",
    "# One: the `first`\n[here](#one-the-first), [there](CONTRIBUTING.md#where-things-live), `bench/results/`",
])
def test_what_is_right_is_accepted(text):
    assert not check(text, ROOT / "README.md")


def test_the_table_of_results_is_what_the_results_give():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == table(), "run python -m bench.table"


def test_the_worked_example_of_the_data_order_is_what_the_loader_does():
    from exactgpt.dataloader import DataOrder, TokenStream
    stream = TokenStream([SimpleNamespace(n_tokens=21), SimpleNamespace(n_tokens=13)], block_size=4)
    order = DataOrder(stream, seed=1337).windows(0, 24).tolist()
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for step in range(4):
        rows = order[6 * step:6 * step + 6]
        line = f"step {step}   {' '.join(map(str, rows[:3]))}   {' '.join(map(str, rows[3:]))}"
        assert line in page, f"docs/data.md lacks {line!r}"
    assert (stream.n_tokens, stream.n_windows, stream.first_window.tolist()) == (34, 8, [0, 6])
