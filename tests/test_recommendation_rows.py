"""Rows of a recommender: what was liked before, and nothing of what came later."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/recommendation_rows.py"
MOVIES = {str(i): f"m{i}" for i in range(20)}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recommendation_rows", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_history_holds_only_what_the_same_person_liked_strictly_before(script: ModuleType) -> None:
    ratings = [
        (1, "a", "1", 5.0),
        (1, "a", "2", 4.0),  # in the same second as the first: neither knows of the other
        (2, "b", "3", 5.0),  # somebody else
        (3, "a", "4", 2.0),  # not liked, so in no history
        (4, "a", "5", 4.0),
        (5, "a", "6", 3.5),
    ]
    assert script.rows_of(ratings, MOVIES, 2) == [
        {"time": 3, "history": "m1; m2", "taste": "unknown", "candidate": "m4", "fame": "unknown", "liked": 0},
        {"time": 4, "history": "m1; m2", "taste": "70 %", "candidate": "m5", "fame": "unknown", "liked": 1},
        {"time": 5, "history": "m2; m5", "taste": "80 %", "candidate": "m6", "fame": "unknown", "liked": 0},
    ]


def test_fame_is_what_others_said_strictly_before(script: ModuleType) -> None:
    ratings = [(1, user, "1", 5.0 if user in "abc" else 1.0) for user in "abcd"]
    ratings += [(2, "a", "1", 5.0), (2, "b", "1", 1.0), (3, "a", "1", 1.0)]
    assert [(row["time"], row["fame"]) for row in script.rows_of(ratings, MOVIES, 2)] == [
        (2, "80 %"),
        (2, "80 %"),
        (3, "70 %"),
    ]


def test_the_parts_follow_each_other_in_time(script: ModuleType) -> None:
    ratings = [(time, "a", str(time % 20), 4.0) for time in range(100)]
    rows = script.rows_of(ratings, MOVIES, 3)
    parts = script.split(ratings, rows, None)
    assert [len(part) for part in parts.values()] == [79, 10, 10]
    assert [parts[name][0]["candidate"] for name in ("train", "validation", "test")] == ["m1", "m0", "m10"]
    assert [len(part) for part in script.split(ratings, rows, 40).values()] == [40, 5, 5]


def test_ratings_of_one_moment_are_in_one_part(script: ModuleType) -> None:
    ratings = [(time // 30, "a", str(time % 20), 4.0) for time in range(100)]
    rows = script.rows_of(ratings, MOVIES, 3)
    times = [{row["time"] for row in rows if row["time"] < 2}, {row["time"] for row in rows if row["time"] >= 2}]
    assert times == [{1}, {2, 3}]
    assert [len(part) for part in script.split(ratings, rows, None).values()] == [30, 30, 10]


def test_the_program_reads_a_folder_and_writes_rows(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n1,"A, The (1990)",Drama|War\n2,B,(no genres listed)\n')
    lines = [f"7,{1 + time % 2},{5.0 if time % 3 else 1.0},{time}" for time in range(30)]
    for name, part in (("train", lines[::2]), ("test", lines[1::2])):  # the order of the files does not matter
        (tmp_path / f"{name}.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(part) + "\n")
    words = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "rows"), "--history", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "train: 22 rows, 68.2 % liked"
    first = json.loads((tmp_path / "rows/train.jsonl").read_text().splitlines()[0])
    assert first == {
        "history": "B",
        "taste": "unknown",
        "candidate": "A, The (1990), drama, war",
        "fame": "unknown",
        "liked": 1,
    }


def test_a_folder_without_ratings_is_refused(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "rows")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "with ratings" in done.stderr
