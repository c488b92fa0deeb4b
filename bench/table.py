"""Make one table of the committed results: bench/results/README.md.

    python -m bench.table
"""
import json

from bench.common import RESULTS
from exactgpt.files import atomic_write

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
    """Return the text of the page, made from the result files."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if not result.get("table"):      # a benchmark that compares nothing
            continue
        machine = result["machine"]
        where = f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}"
        lines += [f"| {format_comparison(row)} | {where} | [{machine['date']}]({path.name}) |"
                  for row in result["table"]]
    return HEAD + "\n".join(lines) + "\n"


def format_comparison(row):
    """Return the first four cells of a row: what was measured, ours, the peer's, the ratio."""
    cells = [row["what"], format_figure(row["ours"], row["unit"])]
    if row["theirs"] is None:
        return " | ".join([*cells, row["peer"], ""])
    return " | ".join([*cells, f"{format_figure(row['theirs'], row['unit'])} {row['peer']}",
                       f"**{row['ours'] / row['theirs']:.2f}**"])


def format_figure(value, unit):
    """Return a figure with its unit, rounded to three significant digits, or to a whole number from 100 up."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


if __name__ == "__main__":
    main()
