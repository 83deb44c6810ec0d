"""Rows of films: what is near is told by who saw it, and shows the genres of training films alone."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/genre_rows.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("genre_rows", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_near_is_the_largest_cosine_of_the_viewers(script: ModuleType) -> None:
    viewers = {"a": {"1", "2", "3"}, "b": {"1", "2"}, "c": {"1", "2", "3", *"456789"}, "d": {"9"}, "e": {"1", "2"}}
    among = {who: [film for film in "abcde" if who in viewers[film]] for who in "123456789"}
    # Cosines with a: b and e 2 / sqrt(3 x 2) = 0.82, c 3 / sqrt(3 x 9) = 0.58, d 0.
    assert script.nearest("a", among, viewers, 5) == ["b", "e", "c"]
    assert script.nearest("a", among, viewers, 1) == ["b"]


def test_genres_that_are_shown_are_those_of_training_films(script: ModuleType) -> None:
    films = {str(i): (f"film {i}", f"G{i}|H") for i in range(30)}
    viewers = {name: {"1", "2", name} for name in films}
    parts = script.split(list(films))
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "validation": 3, "test": 3}
    training = {f"g{name}, h" for name in parts["train"]}
    for part, rows in script.rows_of(films, viewers, 4).items():
        assert [row["title"] for row in rows] == [f"film {name}" for name in parts[part]]
        for row in rows:
            near = row["near"].split("; ")
            assert len(set(near)) == 4
            assert set(near) <= training
            assert row["genres"].lower().replace("|", ", ") not in near


def test_the_program_reads_a_folder_and_writes_rows(tmp_path: Path) -> None:
    films = [f'{i},"Film, The {i} (1990)",{"(no genres listed)" if i == 3 else "Drama|IMAX"}' for i in range(10)]
    (tmp_path / "movies.csv").write_text("\n".join(["movieId,title,genres", *films]) + "\n")
    ratings = [f"{who},{film},3.0,1" for film in range(10) for who in range(2)]
    (tmp_path / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    words = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "rows"), "--seen-by", "2", "--near", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        "train: 8 films", "validation: 1 films", "test: 1 films"
    ]  # fmt: skip
    found = []
    for name in ("train", "validation", "test"):
        with (tmp_path / f"rows/{name}.csv").open(newline="") as file:
            found += list(csv.DictReader(file))
    assert {row["title"]: row["genres"] for row in found}["Film, The 3 (1990)"] == ""
    assert {row["genres"] for row in found} == {"", "Drama"}
    refused = subprocess.run(words[:4], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no ratings of a film by 10 people or more" in refused.stderr
