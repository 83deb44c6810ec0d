"""The tables of docs/performance.md are those of the committed results."""

import json
from pathlib import Path

from benchmarks import startup, steps

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_the_table_of_steps_is_the_committed_one() -> None:
    results = json.loads((ROOT / "benchmarks/results/steps.json").read_text())["results"]
    assert steps.table(results) in PAGE
    for found in results.values():
        # Rounding alone; later steps also differ by what AdamW makes of it.
        kept = found["variants"]["upper half, prefix kept"]
        assert kept["of_the_first_step"] <= 1e-6 or found is not results["fp32"]
        assert found["speedup_of_a_kept_prefix"]["over all layers"] > 1.9


def test_the_table_of_the_start_is_the_committed_one() -> None:
    seconds = json.loads((ROOT / "benchmarks/results/startup.json").read_text())["seconds"]
    assert startup.table(seconds) in PAGE
    assert max(seconds["help"]["cpu_seconds"], seconds["recipe error"]["cpu_seconds"]) < 1
