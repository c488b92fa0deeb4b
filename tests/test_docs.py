"""The pages against the code: every file.py:N holds the name beside it, every quote is the code, every link leads on.

`name` in `file.py` says that the file has it. Two forms point at a line: `name` (file.py:12) or (file.py:12-15), where
the name must be defined (or, where the file does not define it, stand), and a block of python that begins with
"# file.py:12-15", whose other lines are those lines.
"""
import os
import re
import textwrap
from types import SimpleNamespace

import pytest
from common import ROOT

from bench.common import RESULTS
from bench.table import table

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").glob("*.md"))]
PLACE = r"(?P<file>[\w/]+\.py):(?P<first>\d+)(?:-(?P<last>\d+))?"
NAMED = re.compile(rf"`(?P<name>[^`\n]+)`\s+\({PLACE}\)")
QUOTE = re.compile(rf"^```python\n# {PLACE}\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED_IN_FILE = re.compile(r"`([^`\n]+)`\s+in\s+`([\w/]+\.py)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def lines_of(name, lines):
    """The numbers of the lines where a name is defined, or of all that have it where none defines it."""
    word = re.findall(r"[A-Za-z0-9_]+", name)[-1]
    definition = re.compile(rf"\s*(?:def|class) {word}\b|{word}\b(?:: [^=]+)? = ")
    return ([number for number, line in enumerate(lines, 1) if definition.match(line)]
            or [number for number, line in enumerate(lines, 1) if re.search(rf"\b{word}\b", line)])


def lines_of_quote(code, lines):
    """The numbers of the first lines of what is quoted."""
    n = len(code.splitlines())
    return [i + 1 for i in range(len(lines)) if textwrap.dedent("\n".join(lines[i:i + n])) == code.rstrip("\n")]


def check(text):
    """(what is wrong with the places that a page names, one line each; the page with what has moved put right)."""
    found, moved, known = [], [], [*NAMED.finditer(text), *QUOTE.finditer(text)]
    for m in known:
        path, first, last = ROOT / m["file"], int(m["first"]), int(m["last"] or m["first"])
        if not path.is_file():
            found.append(f"{m['file']} is not a file")
            continue
        lines, quoted = path.read_text(encoding="utf-8").splitlines(), "code" in m.groupdict()
        if quoted:
            size, right = len(m["code"].splitlines()), lines_of_quote(m["code"], lines)
        else:
            size, right = last - first + 1, lines_of(m["name"], lines)
        is_right = last - first + 1 == size and (first in right if quoted else any(first <= n <= last for n in right))
        if not is_right or last > len(lines):
            what = repr(m["code"].splitlines()[0]) if quoted else m["name"]
            found.append(f"{what} is not in {m['file']}:{first}, but in lines {right}")
            if right:
                nearest = min(right, key=lambda n: abs(n - first))
                range_ = f"{nearest}-{nearest + size - 1}" if 1 < size < len(lines) else str(nearest)
                moved.append((m.start("first"), m.end("last" if m["last"] else "first"), range_))
    for name, file in NAMED_IN_FILE.findall(text):
        if not (ROOT / file).is_file() or not lines_of(name, (ROOT / file).read_text(encoding="utf-8").splitlines()):
            found.append(f"{name} is not in {file}")
    places = {m.start("file") for m in known}
    found += [f"{m[0]} names nothing: write `name` ({m[0]})" for m in re.finditer(PLACE, text)
              if m.start() not in places]
    for begin, end, range_ in sorted(moved, reverse=True):
        text = text[:begin] + range_ + text[end:]
    return found, text


def test_the_table_of_results_is_what_the_results_give():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == table(), "python -m bench.table makes it anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_stands_in_the_code(page):
    """With MEND_DOCS=1 in the environment the numbers of what has moved are put right; look at them with git diff."""
    wrong, mended = check(page.read_text(encoding="utf-8"))
    if wrong and os.environ.get("MEND_DOCS"):
        page.write_text(mended, encoding="utf-8")
        wrong, _ = check(mended)
    assert not wrong, "\n".join([*wrong, "MEND_DOCS=1 python -m pytest tests/test_docs.py puts numbers right"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("text, message", [
    ("`GPT` (model.py:1)", "GPT is not in model.py:1, but in lines"),      # a mention, not the definition
    ("`GPT` (model.py:1-100000)", "GPT is not in model.py:1, but in lines"),
    ("`GPT` (modell.py:1)", "modell.py is not a file"),
    ("`GPTX` in `model.py`", "GPTX is not in model.py"),
    ("see model.py:30", "names nothing"),
    ("```python\n# model.py:9\nimport maths\n```\n", "'import maths' is not in model.py:9, but in lines []"),
])
def test_wrong_places_are_found(text, message):
    found, mended = check(text)
    assert len(found) == 1 and message in found[0]
    assert not check(mended)[0] or text == mended


def test_right_places_are_accepted_and_moved_ones_found_again():
    number = (ROOT / "model.py").read_text(encoding="utf-8").splitlines().index("class GPT(nn.Module):") + 1
    page = f"`GPT` (model.py:{number}) and\n`model.GPT`\n(model.py:1-{number})\n"
    page += f"```python\n# model.py:{number}\nclass GPT(nn.Module):\n```\n"
    assert check(page) == ([], page)
    shifted = page.replace(f":{number}", f":{number + 3}")
    found, mended = check(shifted)
    assert len(found) == 2 and mended == page


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
