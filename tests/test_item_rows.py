"""Rows of what people take next, and the base that is made of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHARES = (0.4, 0.3, 0.1, 0.2)
TIMES = [(time, f"u{time % 7}", f"m{time}") for time in range(100)]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("item_rows")


def write_ratings(folder: Path, ratings: list[tuple[int, str, str]], name: str = "ratings") -> Path:
    lines = [f"{person},{film},4.0,{time}" for time, person, film in ratings]
    (folder / f"{name}.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    return folder


def test_ratings_stand_in_the_order_of_time_whatever_file_they_are_in(script: ModuleType, tmp_path: Path) -> None:
    write_ratings(tmp_path, TIMES[::2], "train")
    write_ratings(tmp_path, TIMES[:0:-2], "test")
    assert script.read_ratings(tmp_path) == TIMES


def test_the_order_within_a_second_is_not_that_of_the_ids(script: ModuleType, tmp_path: Path) -> None:
    ratings = [(second, "u", f"{second}{i:02}") for second in (1, 2) for i in range(50)]
    found = script.read_ratings(write_ratings(tmp_path, ratings))
    assert sorted(found) == ratings
    assert [time for time, _, _ in found] == [1] * 50 + [2] * 50
    assert found != ratings
    assert found == script.read_ratings(write_ratings(tmp_path, ratings[::-1]))


def test_by_people_each_person_is_whole_in_one_part(script: ModuleType) -> None:
    ratings = [(time, f"u{time % 20}", f"m{time}") for time in range(200)]
    parts = script.split(ratings, "people", SHARES)
    assert [len(part) for part in parts] == [8, 6, 2, 4]
    rows = [row["items"] for part in parts for row in part]
    assert sorted(rows) == sorted([[f"m{time}" for time in range(u, 200, 20)] for u in range(20)])
    assert all(row.keys() == {"items"} for part in parts for row in part)


def test_by_time_no_part_knows_what_came_later_and_each_rating_is_scored_once(script: ModuleType) -> None:
    parts = script.split(TIMES, "time", SHARES)
    scored = [sorted(int(film[1:]) for row in part for film in row["items"]) for part in parts]
    assert scored == [list(range(40)), list(range(40, 70)), list(range(70, 80)), list(range(80, 100))]
    for part, start in zip(parts[1:], (40, 70, 80), strict=True):
        for row in part:
            person = int(row["items"][0][1:]) % 7
            assert row["history"] == [f"m{time}" for time in range(start) if time % 7 == person]
    assert all("history" not in row for row in parts[0])


def test_by_time_somebody_new_has_an_empty_history(script: ModuleType) -> None:
    ratings = [*TIMES[:95], *((time, "new", f"m{time}") for time in range(95, 100))]
    assert {"history": [], "items": [f"m{time}" for time in range(95, 100)]} in script.split(ratings, "time", SHARES)[3]


def test_ratings_of_one_second_are_in_one_part(script: ModuleType) -> None:
    ratings = [(time // 30, "u", f"m{time}") for time in range(100)]
    parts = script.split(ratings, "time", SHARES)
    assert [[len(row["items"]) for row in part] for part in parts] == [[30], [30], [], [40]]


def test_by_both_neither_the_people_nor_the_future_were_seen(script: ModuleType) -> None:
    ratings = [(time, f"u{time % 20}", f"m{time}") for time in range(400)]
    parts = script.split(ratings, "both", SHARES)
    people = [{int(row["items"][0][1:]) % 20 for row in part} for part in parts]
    assert [len(one) for one in people] == [8, 6, 2, 4]
    assert len(set.union(*people)) == 20
    for part, (start, end) in zip(parts, ((0, 160), (160, 280), (280, 320), (320, 400)), strict=True):
        for row in part:
            assert all(start <= int(film[1:]) < end for film in row["items"])
            assert all(int(film[1:]) < start for film in row.get("history", []))


@pytest.mark.parametrize("kind", ["people", "time", "both"])
def test_only_the_last_of_each_tested_row_are_scored(script: ModuleType, kind: str) -> None:
    whole, last = (script.split(TIMES, kind, SHARES, last=n) for n in (None, 1))
    assert whole[:2] == last[:2]
    for before, after in zip(whole[2:], last[2:], strict=True):
        for one, other in zip(before, after, strict=True):
            assert len(other["items"]) == 1
            assert other["history"] + other["items"] == one.get("history", []) + one["items"]


def test_the_program_reads_a_folder_and_writes_four_files(tmp_path: Path) -> None:
    write_ratings(tmp_path, TIMES)
    words = [sys.executable, str(SCRIPTS / "item_rows.py"), str(tmp_path), str(tmp_path / "rows"), "--split", "time"]
    words += ["--shares", *map(str, SHARES)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "base: 7 people, 40 films",
        "train: 7 people, 30 films",
        "validation: 7 people, 10 films",
        "test: 7 people, 20 films",
    ]
    first = json.loads((tmp_path / "rows/test.jsonl").read_text().splitlines()[0])
    assert first["items"] == ["m80", "m87", "m94"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "with ratings"),
        (["--last", "0"], "expected --last of 1 or more, found 0"),
        (["--shares", "0", "0", "0", "0"], "expected shares of 0 or more, and one above 0"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    program = [sys.executable, str(SCRIPTS / "item_rows.py"), str(tmp_path), str(tmp_path / "rows"), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_base_is_a_plain_folder_that_learned_what_follows_what(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"items": [f"m{(start + i) % 12}" for i in range(10)]} for start in range(12)] * 3
    rows += [{"items": ["rare", "m1"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--steps", "60", "--hidden", "32", "--layers", "1", "--context", "8"]
    program = [sys.executable, str(SCRIPTS / "item_model.py"), str(tmp_path / "rows.jsonl"), str(tmp_path / "base")]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("12 items, ")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    inputs = tokenizer("m3 m4 m5", return_tensors="pt")
    best = model(input_ids=inputs.input_ids).logits[0, -1].argmax()
    assert tokenizer.convert_ids_to_tokens(int(best)) == "m6"
    assert tokenizer.convert_tokens_to_ids("rare") == tokenizer.unk_token_id
