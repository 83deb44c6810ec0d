"""The figures in README.md and in the recipes' headers are those of committed result files."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quickstarts_output_is_the_committed_one() -> None:
    shown = README.split("```text\n$ ticktune train", 1)[1].split("```", 1)[0]
    committed = {line.rstrip() for line in (ROOT / "benchmarks/results/quickstart.txt").read_text().splitlines()}
    lines = [line for line in shown.splitlines()[1:] if line.strip() and line != "..."]
    assert len(lines) > 30
    assert [line for line in lines if line not in committed] == []


def test_the_table_of_methods_is_the_committed_one() -> None:
    results = json.loads((ROOT / "benchmarks/results/methods.json").read_text())
    for row in results["summary"]:
        runs = [100 * r["metrics"]["accuracy"] for r in results["runs"] if r["method"] == row["method"]]
        assert len(runs) >= 3
        mean = sum(runs) / len(runs)
        deviation = (sum((value - mean) ** 2 for value in runs) / (len(runs) - 1)) ** 0.5
        cells = [row["method"], f"{row['trained_parameters']:,}", f"{row['lr']:g}", f"{mean:.1f} ± {deviation:.1f}"]
        assert "| " + " | ".join(cells) + " |" in README


def test_the_scores_in_the_recipes_are_the_committed_ones() -> None:
    stories = json.loads((ROOT / "benchmarks/results/stories.json").read_text())
    header = (ROOT / "recipes/stories.yaml").read_text()
    before, after = stories["base_metrics"]["perplexity"], stories["metrics"]["perplexity"]
    assert f"perplexity {before:.1f} before, {after:.1f} after" in header
    quickstart = (ROOT / "benchmarks/results/quickstart.txt").read_text()
    header = (ROOT / "recipes/support.yaml").read_text()
    scores = re.findall(r"^(head alone|ticks \+ norms) +accuracy ([0-9.]+)", quickstart, re.MULTILINE)
    assert len(scores) == 2
    assert all(score in header for _, score in scores)


def test_every_command_that_the_readme_names_exists() -> None:
    from ticktune.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"^ticktune ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= known
