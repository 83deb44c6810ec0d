"""MovieLens ratings -> rows of next-item: what each person rated, oldest first.

    python scripts/item_rows.py FOLDER OUTPUT [--split people|time|both] [--shares 0.1 0.6 0.1 0.2] [--last N]

FOLDER holds ratings as train.csv, validation.csv and test.csv, or as one ratings.csv, with the columns userId, movieId,
rating and timestamp (ml-latest-small). OUTPUT gets base.jsonl, train.jsonl, validation.jsonl and test.jsonl; a row is
one person with the column items, film ids. The base part is for scripts/item_model.py, which makes a base of it.

A film counts as taken whatever its rating. Ratings of one second stand in a random order: their order in the file is
that of the ids, which says nothing of the person.

--split people (the default): each person is in one part, drawn at random; shares are of people. It asks how well the
  next films of people are told of whom nothing was learned, at every step of their rows.
--split time: all ratings stand in the order of time, and shares are of ratings. The parts after the base have a column
  history too: what the person rated before the part begins, which is read and not scored. No row knows the future.
--split both: each person is in one part and of each part only its own time is scored, so neither the people nor the
  future were seen; most rows are lost.

--last N scores the last N films of validation and test rows only; those before become history. With time, --last 1 is
leave-one-out: one next step for each person.
"""

import argparse
import csv
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

Rating = tuple[int, str, str]
Row = dict[str, list[str]]
PARTS = ("base", "train", "validation", "test")
SHARES = (0.1, 0.6, 0.1, 0.2)


def read_ratings(folder: Path, seed: int = 0) -> list[Rating]:
    """(time, person, film) of all ratings in the order of time, at random within a second."""
    files = [folder / f"{name}.csv" for name in ("train", "validation", "test", "ratings")]
    found: list[Rating] = []
    for path in filter(Path.is_file, files):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.append((int(row["timestamp"]), row["userId"], row["movieId"]))
    found.sort()  # so that the order does not depend on how the ratings lie in files
    random.Random(seed).shuffle(found)
    return sorted(found, key=lambda rating: rating[0])


def edges_of(count: int, shares: Sequence[float]) -> list[int]:
    """Where parts with these shares of so many things end."""
    return [round(count * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]


def parts_of_people(ratings: Sequence[Rating], shares: Sequence[float], seed: int = 0) -> dict[str, int]:
    """Person -> number of the part that they are in."""
    people = sorted({person for _, person, _ in ratings})
    random.Random(seed).shuffle(people)
    edges = edges_of(len(people), shares)
    return {person: sum(i >= edge for edge in edges[:-1]) for i, person in enumerate(people)}


def starts_of_parts(ratings: Sequence[Rating], shares: Sequence[float]) -> list[int]:
    """The second at which each part after the first begins; ratings of one second are in one part."""
    return [ratings[min(edge, len(ratings) - 1)][0] for edge in edges_of(len(ratings), shares)[:-1]]


def split(
    ratings: Sequence[Rating], kind: str, shares: Sequence[float] = SHARES, last: int | None = None
) -> list[list[Row]]:
    """Rows of each part; see the top of this file.

    Args:
        ratings: In the order of time.
        kind: ``people``, ``time`` or ``both``.
        shares: Of the parts.
        last: How many films of validation and test rows are scored; None: all.
    """
    people = parts_of_people(ratings, shares)
    starts = starts_of_parts(ratings, shares)
    histories: dict[tuple[int, str], list[str]] = defaultdict(list)
    items: dict[tuple[int, str], list[str]] = defaultdict(list)
    for time, person, film in ratings:
        part = people[person]
        if kind == "people":
            items[part, person].append(film)
            continue
        now = sum(time >= start for start in starts)
        for later in range(now + 1, len(shares)):
            histories[later, person].append(film)
        if kind == "time" or now == part:
            items[now, person].append(film)
    rows: list[list[Row]] = [[] for _ in shares]
    for (part, person), films in items.items():
        is_scored = part >= len(shares) - 2
        history = histories.get((part, person), [])
        if is_scored and last is not None:
            history, films = history + films[:-last], films[-last:]
        has_history = (kind != "people" and part > 0) or (is_scored and last is not None)
        rows[part].append({"history": history, "items": films} if has_history else {"items": films})
    return rows


def main() -> None:
    """Reads the folder and writes the rows."""
    parser = argparse.ArgumentParser(description="MovieLens ratings to rows of each person's films.")
    parser.add_argument("folder", type=Path, help="the ratings")
    parser.add_argument("output", type=Path, help="where base, train, validation and test.jsonl are written")
    parser.add_argument("--split", choices=("people", "time", "both"), default="people", help="by what (people)")
    parser.add_argument(
        "--shares", type=float, nargs=4, default=SHARES, metavar=("BASE", "TRAIN", "VALIDATION", "TEST"),
        help="of people or ratings (0.1 0.6 0.1 0.2)",
    )  # fmt: skip
    parser.add_argument("--last", type=int, metavar="N", help="score only the last N films of validation and test rows")
    asked = parser.parse_args()
    if min(asked.shares) < 0 or sum(asked.shares) == 0:
        parser.error(f"expected shares of 0 or more, and one above 0, found {asked.shares}")
    if asked.last is not None and asked.last < 1:
        parser.error(f"expected --last of 1 or more, found {asked.last}")
    ratings = read_ratings(asked.folder)
    if not ratings:
        parser.error(f"{asked.folder} holds no train.csv, validation.csv, test.csv or ratings.csv with ratings")
    asked.output.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(PARTS, split(ratings, asked.split, asked.shares, asked.last), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (asked.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} people, {sum(len(row['items']) for row in rows)} films")


if __name__ == "__main__":
    main()
