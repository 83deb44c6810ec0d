"""The page on tasks says what the committed results say, of every task."""

import json
from pathlib import Path

from benchmarks import tasks
from ticktune.registry import TASKS

ROOT = Path(__file__).parents[1]


def test_the_table_is_made_of_the_committed_results() -> None:
    document = json.loads((ROOT / "benchmarks/results/tasks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    assert tasks.table(document) in page
    assert {found["task"] for found in document["cases"].values()} == set(TASKS)
    for found in document["cases"].values():
        counts = [sum(run["method"] == method for run in found["runs"]) for method in tasks.METHODS]
        assert len(set(counts)) == 1
        assert counts[0] >= 2
