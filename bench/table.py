"""The committed results as one table: bench/results/README.md.

    python -m bench.table
"""
import json

from bench.common import RESULTS
from exactgpt.config import atomic_write

HEAD = """# Results

Made by `python -m bench.table` from the files beside it, which hold every figure's spread, settings and versions.
Figures are medians; ratios compare two ways that took turns in one process or one run. What is not here was not
measured.

| what | ours | peer | ours / peer | machine | date |
|---|---|---|---|---|---|
"""


def main():
    """Write the table."""
    text = table()
    with atomic_write(RESULTS / "README.md", "w") as f:
        f.write(text)
    print(f"wrote {RESULTS / 'README.md'}")


def table():
    """The page's text, made of the results as they are now."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if not result.get("table"):      # nothing in it is compared
            continue
        machine = result["machine"]
        where = f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}"
        lines += [f"| {line_of(row)} | {where} | [{machine['date']}]({path.name}) |" for row in result["table"]]
    return HEAD + "\n".join(lines) + "\n"


def line_of(row):
    """The first cells of a row."""
    cells = [row["what"], number(row["ours"], row["unit"])]
    if row["theirs"] is None:
        return " | ".join([*cells, row["peer"], ""])
    return " | ".join([*cells, f"{number(row['theirs'], row['unit'])} {row['peer']}",
                       f"**{row['ours'] / row['theirs']:.2f}**"])


def number(value, unit):
    """A figure with its unit, in three digits or more."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


if __name__ == "__main__":
    main()
