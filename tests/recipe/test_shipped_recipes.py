"""Every recipe in recipes/ validates, says where its data come from, and names only files that are there."""

from pathlib import Path

import pytest

from ticktune.recipe.load import dump_recipe, load_recipe
from ticktune.registry import TASKS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

shipped = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comment at the top, without its number signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def test_there_is_a_recipe_for_every_task() -> None:
    assert {load_recipe(path).recipe.task for path in RECIPES} == set(TASKS)


@shipped
def test_it_validates(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.output == f"runs/{path.stem}"


@shipped
def test_it_is_the_same_recipe_with_every_default_spelled_out(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    (tmp_path / path.name).write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / path.name).recipe == recipe


@shipped
def test_its_header_says_what_it_does_and_where_its_data_and_base_are(path: Path) -> None:
    first, *rest = header(path).splitlines()
    assert first.endswith((".", "?", ")."))
    said = "\n".join(rest)
    assert "  data " in said
    text = path.read_text(encoding="utf-8")
    for variable in ("TICKTUNE_DATA", "TICKTUNE_MODELS"):
        if f"${{{variable}}}" in text:
            assert f"{variable} names" in said
    base = load_recipe(path).recipe.base.model
    if base.startswith("package:"):
        assert "on the Hub: " in text
    else:
        assert "  base " in said


@shipped
def test_a_file_that_it_names_is_in_the_repository_or_below_a_named_folder(path: Path) -> None:
    data = load_recipe(path).recipe.data
    for source in (data.train, data.validation, data.test):
        if source is None or source.path is None:
            continue
        if source.path.startswith("$"):
            assert source.path.startswith("${TICKTUNE_DATA}/")
        else:
            assert (path.parent / source.path).is_file()


@shipped
def test_it_holds_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert not [word for word in text.split() if word.strip("\"'").startswith(("/", "~"))]


def test_the_support_data_stay_in_the_public_domain() -> None:
    assert "CC0 1.0" in (ROOT / "recipes/support/README.md").read_text(encoding="utf-8")
    assert "CC0" in header(ROOT / "recipes/support.yaml")
