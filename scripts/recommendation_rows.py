"""MovieLens ratings -> rows for a recommender: what somebody liked before, a candidate, and whether they liked it.

    python scripts/recommendation_rows.py FOLDER OUTPUT [--history 5] [--limit 4000]

FOLDER holds movies.csv and ratings as train.csv, validation.csv and test.csv, or as one ratings.csv, with the columns
userId, movieId, rating and timestamp (ml-latest-small). OUTPUT gets train.jsonl, validation.jsonl and test.jsonl with
the columns history and candidate (titles with their genres), taste and fame (which share of the films the person
liked until then, and of people this film, in tens of per cent, or "unknown"), and liked: 1 where the rating is 4 or
more, else 0.

No row knows the future. All ratings stand in the order of time; the first 80 % of the time line are training rows, the
next 10 % validation, the last 10 % test; and a history, taste and fame know only what was rated strictly before the
candidate. Ratings without any history are left out. --limit thins the training part out to about so many
rows, evenly over time, and the other parts to an eighth as many each.
"""

import argparse
import csv
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

LIKED = 4.0


def read_movies(folder: Path) -> dict[str, str]:
    """Movie -> title and genres, such as ``Toy Story (1995), adventure, animation``."""
    with (folder / "movies.csv").open(encoding="utf-8", newline="") as file:
        return {row["movieId"]: named(row["title"], row["genres"]) for row in csv.DictReader(file)}


def named(title: str, genres: str) -> str:
    """Title and genres in one line."""
    known = [genre.lower() for genre in genres.split("|") if genre != "(no genres listed)"]
    return ", ".join([title, *known])


def read_ratings(folder: Path) -> list[tuple[int, str, str, float]]:
    """(time, user, movie, rating) of all ratings, in the order of time."""
    files = [folder / f"{name}.csv" for name in ("train", "validation", "test", "ratings")]
    found: list[tuple[int, str, str, float]] = []
    for path in filter(Path.is_file, files):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.append((int(row["timestamp"]), row["userId"], row["movieId"], float(row["rating"])))
    return sorted(found)


def rows_of(ratings: list[tuple[int, str, str, float]], movies: dict[str, str], history: int) -> list[dict[str, Any]]:
    """One row for each rating whose user liked something strictly before it; in the order of time.

    Args:
        ratings: In the order of time.
        movies: Movie -> title and genres.
        history: How many of the last liked movies a row names, the newest last.
    """
    liked: dict[str, list[str]] = defaultdict(list)
    tastes: dict[str, list[bool]] = defaultdict(list)
    fames: dict[str, list[bool]] = defaultdict(list)
    rows: list[dict[str, Any]] = []
    for time, group in itertools.groupby(ratings, key=lambda rating: rating[0]):
        # Ratings of one second are entered together: none of them is known before the others.
        together = [one for one in group if one[2] in movies]
        for _, user, movie, rating in together:
            if liked[user]:
                rows.append(
                    {
                        "time": time,
                        "history": "; ".join(movies[name] for name in liked[user][-history:]),
                        "taste": share(tastes[user]),
                        "candidate": movies[movie],
                        "fame": share(fames[movie]),
                        "liked": int(rating >= LIKED),
                    }
                )
        for _, user, movie, rating in together:
            tastes[user].append(rating >= LIKED)
            fames[movie].append(rating >= LIKED)
            if rating >= LIKED:
                liked[user].append(movie)
    return rows


def share(answers: list[bool]) -> str:
    """The share of yes, in tens of per cent; "unknown" of fewer than three."""
    return "unknown" if len(answers) < 3 else f"{round(10 * sum(answers) / len(answers)) * 10} %"


def split(ratings: list[Any], rows: list[dict[str, Any]], limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """Cuts rows at the times that 80 % and 90 % of the ratings lie before; see the top of this file."""
    first, second = (ratings[int(len(ratings) * share)][0] for share in (0.8, 0.9))
    parts = {
        "train": [row for row in rows if row["time"] < first],
        "validation": [row for row in rows if first <= row["time"] < second],
        "test": [row for row in rows if row["time"] >= second],
    }
    if limit is not None:
        kept = {"train": limit, "validation": max(1, limit // 8), "test": max(1, limit // 8)}
        parts = {name: part[:: max(1, -(-len(part) // kept[name]))] for name, part in parts.items()}
    return {name: [{k: v for k, v in row.items() if k != "time"} for row in part] for name, part in parts.items()}


def main() -> None:
    """Reads the folder and writes the rows."""
    parser = argparse.ArgumentParser(description="MovieLens ratings to rows of history, candidate and liked.")
    parser.add_argument("folder", type=Path, help="movies.csv and the ratings")
    parser.add_argument("output", type=Path, help="where train.jsonl, validation.jsonl and test.jsonl are written")
    parser.add_argument("--history", type=int, default=5, help="liked movies that a row names (default 5)")
    parser.add_argument("--limit", type=int, help="about so many training rows, an eighth as many of the others")
    asked = parser.parse_args()
    ratings = read_ratings(asked.folder)
    if not ratings:
        parser.error(f"{asked.folder} holds no train.csv, validation.csv, test.csv or ratings.csv with ratings")
    asked.output.mkdir(parents=True, exist_ok=True)
    parts = split(ratings, rows_of(ratings, read_movies(asked.folder), asked.history), asked.limit)
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (asked.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        share = sum(row["liked"] for row in rows) / max(1, len(rows))
        print(f"{name}: {len(rows)} rows, {100 * share:.1f} % liked")


if __name__ == "__main__":
    main()
