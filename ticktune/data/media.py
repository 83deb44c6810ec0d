"""Folders of pictures or sound -> records, and the files that a row names."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ticktune.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files that list what a folder holds: a column ``file_name``, and whatever a task reads."""

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
"""Kind of file -> endings of the files that a folder of classes is read for."""


def metadata_of(folder: Path) -> Path | None:
    """The file that lists what a folder holds, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_classes(folder: Path, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields a record for each file in a folder's subfolders, whose names are the labels.

    Args:
        folder: The folder.
        column: ``image`` or ``audio``: what the record calls the file.

    Raises:
        DataError: There is no subfolder with files of this kind.
    """
    number = 0
    for label in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in sorted(label.rglob("*")):
            if file.suffix.lower() in SUFFIXES.get(column, ()) and file.is_file():
                number += 1
                yield number, {column: str(file.relative_to(folder)), "label": label.name}
    if not number:
        raise DataError(
            f"expected {' or '.join(METADATA)}, or a subfolder of {column} files for each label",
            where=str(folder),
            fix=f"{column} files end in {', '.join(SUFFIXES.get(column, ()))}",
        )


def resolve_file(name: str, folder: Path, column: str, where: str) -> str:
    """The path of a file that a row names.

    Args:
        name: As it stands in the row.
        folder: That relative names start from.
        column: The row's column.
        where: ``file:line`` of the row.

    Raises:
        DataError: There is no such file.
    """
    path = folder / name
    if not name or not os.path.isfile(path):
        raise DataError(f"there is no file {name!r} ({column})", where=where, fix=f"it was looked for at {path}")
    return str(path)


def digest_of(paths: Iterator[str], start: str) -> str:
    """SHA-256 over the bytes of files, in their order, after another digest.

    Raises:
        DataError: A file cannot be read.
    """
    found = hashlib.sha256(start.encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    return found.hexdigest()
