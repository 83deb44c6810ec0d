"""docs/consumers.md holds what was measured, and what was measured is about the versions that are installed."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("consumers", ROOT / "scripts/consumers.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _results() -> Any:
    return json.loads((ROOT / "benchmarks/results/consumers.json").read_text(encoding="utf-8"))


def test_the_table_is_the_committed_result() -> None:
    text = (ROOT / "docs/consumers.md").read_text(encoding="utf-8")
    assert _script().page(text, _results()) == text, "run python scripts/consumers.py"


def test_what_stands_around_the_table_stays() -> None:
    script = _script()
    marks = f"above\n{script.BEGIN}\n{script.END}\nbelow\n"
    assert script.page(marks, {"rows": []}).startswith("above\n")
    assert script.page(marks, {"rows": []}).endswith("\nbelow\n")
    with pytest.raises(ValueError, match="must hold the lines"):
        script.page(f"above\n{script.BEGIN}\nbelow", {"rows": []})


def test_every_consumer_was_measured_and_every_row_proves_something() -> None:
    rows = _results()["rows"]
    assert {row["consumer"] for row in rows} == {
        "CTranslate2",
        "ONNX Runtime",
        "sentence-transformers",
        "transformers pipeline",
    }
    assert len({row["model"] for row in rows if row["consumer"] == "transformers pipeline"}) >= 6
    assert len(rows) >= 28
    for row in rows:
        assert row["difference"] <= row["tolerance"]
        assert row["effect"] >= 1000 * row["tolerance"]


def test_the_versions_are_the_tested_ones() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    results = _results()
    assert {name: version.partition("+")[0] for name, version in results["versions"].items()} == {
        name: pins[name] for name in results["versions"]
    }
    names = {"CTranslate2": "ctranslate2", "ONNX Runtime": "onnxruntime", "transformers pipeline": "transformers"}
    for row in results["rows"]:
        assert row["version"] == pins[names.get(row["consumer"], row["consumer"])]
