"""The page on tasks says what the committed results say."""

import json
from pathlib import Path

from benchmarks import tasks

ROOT = Path(__file__).parents[1]


def test_the_table_is_made_of_the_committed_results() -> None:
    document = json.loads((ROOT / "benchmarks/results/tasks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    assert document["cases"]
    assert tasks.table(document) in page
    for name, found in document["cases"].items():
        counts = [sum(run["method"] == method for run in found["runs"]) for method in tasks.METHODS]
        assert len(set(counts)) == 1, name
        assert counts[0] >= 2, name
