"""Writes the table of docs/consumers.md from benchmarks/results/consumers.json.

python scripts/consumers.py           # writes
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/consumers.json"
PAGE = ROOT / "docs/consumers.md"
BEGIN, END = "<!-- Written by scripts/consumers.py: -->", "<!-- End of the table. -->"
HEAD = "consumer | version | model | weights | compared | largest difference | allowed | effect of the ticks | to pass"


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [HEAD.split(" | "), ["---"] * len(HEAD.split(" | "))]
    for row in results["rows"]:
        numbers = [f"{row['difference']:.1e}", f"{row['tolerance']:.1e}", f"{row['effect']:.2g}"]
        words = [row[key] for key in ("consumer", "version", "model", "weights", "compared")]
        lines.append([*words, *numbers, row.get("say", "")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table in its place.

    Raises:
        ValueError: It lacks one of the two marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(
        page(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8"
    )
