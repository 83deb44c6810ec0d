"""docs/recipe.md and docs/exit-codes.md say what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ticktune import errors
from ticktune.recipe.load import _all_keys
from ticktune.recipe.schema import Recipe
from ticktune.registry import TASKS
from ticktune.signals import _NUMBERS

ROOT = Path(__file__).parent.parent
GROUPS = {name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _script()


def rows(text: str) -> dict[str, list[str]]:
    """The first cell of each table row, without its code quotes -> the other cells."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *rest = line[2:-2].replace(r"\|", "|").split(" | ")
            found[first.strip("`")] = rest
    return found


@pytest.mark.parametrize("name", ["recipe.md", "exit-codes.md"])
def test_a_committed_page_is_up_to_date(name: str) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == reference.pages()[name], "run python scripts/reference.py"


def test_every_key_is_listed_with_its_help() -> None:
    listed = rows(reference.recipe_page())
    keys = {key for key in _all_keys() if key not in GROUPS and key not in ("evaluation.generate", "data.augment")}
    assert len(keys) > 50
    for key in keys:
        parts = key.split(".")
        is_split = parts[0] == "data" and len(parts) == 3 and parts[1] in ("train", "validation", "test")
        shown = f"data.SPLIT.{parts[2]}" if is_split else key
        assert len(listed[shown]) == 3, shown
        assert len(listed[shown][-1]) > 10, f"{shown} has no help text"


def test_a_key_without_help_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the key ticks\.dim has no help text"):
        reference._row({}, "ticks.dim", {"type": "integer", "default": 64})


def test_types_ranges_and_defaults_are_readable() -> None:
    listed = rows(reference.recipe_page())
    assert listed["ticks.dim"][:2] == ["integer (0 to 65536)", "`64`"]
    assert listed["ticks.form"][:2] == ["`auto`, `plain`, `gated`", "`auto`"]
    assert listed["optimizer.clip"][:2] == ["number (above 0) or `null`", "`1.0`"]
    assert listed["optimizer.eps"][:2] == ["number (above 0, at most 1)", "`1e-8`"]
    assert listed["optimizer.betas"][:2] == ["list of 2 numbers (at least 0, below 1)", "`[0.9, 0.999]`"]
    assert listed["training.seed"][0] == "integer (at least 0, below 2^63)"
    assert listed["data.train"][1] == listed["base.model"][1] == listed["task"][1] == "required"


def test_a_default_that_differs_for_a_task_is_named() -> None:
    listed = rows(reference.recipe_page())
    assert listed["optimizer.lr"][1] == "`2e-4`; `1e-4` (masked-lm); `1e-4` (causal-lm)"
    for task, row in TASKS.items():
        for key in row.defaults:
            section, name = key.split(".")
            own = Recipe.model_fields[section].annotation.model_fields[name].default  # type: ignore[union-attr]
            assert (f"({task})" in listed[key][1]) == (row.defaults[key] != own), key


def test_every_kind_of_error_has_its_code() -> None:
    page = reference.exit_codes_page()
    for cls in vars(errors).values():
        if not isinstance(cls, type) or not issubclass(cls, errors.TicktuneError) or cls is errors.TicktuneError:
            continue
        lines = [line for line in page.splitlines() if f"`{cls.__name__}`" in line]
        codes = {int(line[2:].split()[0]) for line in lines}
        assert codes == ({128 + n for n in _NUMBERS} if cls is errors.Interrupted else {cls.exit_code}), cls
        assert all(f"| `{cls.kind}` |" in line for line in lines)


def test_check_fails_where_a_page_differs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference.main(["--check"], tmp_path) == 1
    assert "recipe.md is not up to date" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert reference.main([], tmp_path) == 0
    assert reference.main(["--check"], tmp_path) == 0
    (tmp_path / "recipe.md").write_text("old")
    assert reference.main(["--check"], tmp_path) == 1
    assert (tmp_path / "recipe.md").read_text() == "old"


def test_the_page_on_families_is_made_from_the_committed_results() -> None:
    import json

    from benchmarks.families import page

    results = ROOT / "benchmarks/results"
    committed = [json.loads((results / name).read_text()) for name in ("families.json", "sweep.json")]
    assert (ROOT / "docs/families.md").read_text(encoding="utf-8") == page(*committed)


def test_the_committed_results_cover_every_row_and_no_merge_is_wrong() -> None:
    import json

    from ticktune.patch.layout import FAMILIES

    rows = json.loads((ROOT / "benchmarks/results/families.json").read_text())["rows"]
    assert {body for row in rows for body in row["bodies"]} >= set(FAMILIES)
    assert [row["case"] for row in rows if row["merges"] == "WRONG"] == []
    assert sum(row["merges"] in ("exactly", "written as a Llama") for row in rows) >= 54
    swept = json.loads((ROOT / "benchmarks/results/sweep.json").read_text())["types"].values()
    assert sum(result["status"] == "exact" for result in swept) >= 150
    assert not any(result["status"] == "wrong" for result in swept)
