"""MovieLens ratings -> rows of a film: its title, the genres of films that the same people saw, and its own.

    python scripts/genre_rows.py FOLDER OUTPUT [--near 4] [--seen-by 10]

FOLDER holds movies.csv and ratings as train.csv, validation.csv and test.csv, or as one ratings.csv (ml-latest-small).
OUTPUT gets train.csv, validation.csv and test.csv with the columns title, near (the genres of the nearest
films, the nearest first) and genres, such as Comedy|Drama; a film without known genres has an empty cell.

Near are the films with the largest cosine of who rated them. They are training films only, so a row never shows the
genres of a film that is asked for elsewhere, and never its own. Films that fewer people rated than --seen-by are left
out: too few to say what is near.
"""

import argparse
import csv
import heapq
import random
from collections import Counter, defaultdict
from pathlib import Path

Film = tuple[str, str]
"""Title, and genres with | between them."""


def read_films(folder: Path) -> dict[str, Film]:
    """Film -> title and genres."""
    with (folder / "movies.csv").open(encoding="utf-8", newline="") as file:
        return {row["movieId"]: (row["title"], known(row["genres"])) for row in csv.DictReader(file)}


def known(genres: str) -> str:
    """The genres; none where none are listed. IMAX, which the set lists too, is a format."""
    return "|".join(genre for genre in genres.split("|") if genre not in ("(no genres listed)", "IMAX"))


def read_viewers(folder: Path) -> dict[str, set[str]]:
    """Film -> who rated it."""
    viewers: dict[str, set[str]] = defaultdict(set)
    for name in ("train", "validation", "test", "ratings"):
        path = folder / f"{name}.csv"
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    viewers[row["movieId"]].add(row["userId"])
    return viewers


def split(names: list[str]) -> dict[str, list[str]]:
    """Cuts films into ten parts by chance, always the same: eight for training, one for each of the others."""
    names = sorted(names)
    random.Random(0).shuffle(names)
    first, second = len(names) * 8 // 10, len(names) * 9 // 10
    return {"train": names[:first], "validation": names[first:second], "test": names[second:]}


def nearest(name: str, among: dict[str, list[str]], viewers: dict[str, set[str]], count: int) -> list[str]:
    """The films that most of the same people rated, by cosine; never the film itself.

    Args:
        name: The film.
        among: Viewer -> films that may be near.
        viewers: Film -> who rated it.
        count: How many at most.
    """
    both = Counter(other for viewer in viewers[name] for other in among.get(viewer, ()) if other != name)
    # The film's own number of viewers divides all alike. Equals stand in the order of their names.
    return heapq.nsmallest(count, both, key=lambda other: (-both[other] / len(viewers[other]) ** 0.5, other))


def rows_of(films: dict[str, Film], viewers: dict[str, set[str]], near: int) -> dict[str, list[dict[str, str]]]:
    """The rows of each part."""
    parts = split([name for name in films if name in viewers])
    among: dict[str, list[str]] = defaultdict(list)
    for name in parts["train"]:
        for viewer in viewers[name]:
            among[viewer].append(name)
    return {
        part: [
            {
                "title": films[name][0],
                "near": "; ".join(in_words(films[other][1]) for other in nearest(name, among, viewers, near)),
                "genres": films[name][1],
            }
            for name in names
        ]
        for part, names in parts.items()
    }


def in_words(genres: str) -> str:
    """Genres as a line of text."""
    return genres.lower().replace("|", ", ") or "none"


def main() -> None:
    """Reads the folder and writes the rows."""
    parser = argparse.ArgumentParser(description="MovieLens to rows of a film, what is near it, and its genres.")
    parser.add_argument("folder", type=Path, help="movies.csv and the ratings")
    parser.add_argument("output", type=Path, help="where train.csv, validation.csv and test.csv are written")
    parser.add_argument("--near", type=int, default=4, help="near films that a row names (default 4)")
    parser.add_argument("--seen-by", type=int, default=10, help="fewest people who rated a film (default 10)")
    asked = parser.parse_args()
    viewers = {name: who for name, who in read_viewers(asked.folder).items() if len(who) >= asked.seen_by}
    if not viewers:
        parser.error(f"{asked.folder} holds no ratings of a film by {asked.seen_by} people or more")
    asked.output.mkdir(parents=True, exist_ok=True)
    for part, rows in rows_of(read_films(asked.folder), viewers, asked.near).items():
        with (asked.output / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["title", "near", "genres"])
            writer.writeheader()
            writer.writerows(rows)
        count = sum(len(list(filter(None, row["genres"].split("|")))) for row in rows)
        print(f"{part}: {len(rows)} films, {count / max(1, len(rows)):.1f} genres each")


if __name__ == "__main__":
    main()
