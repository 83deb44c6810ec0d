"""Files and Hub sets -> rows with the task's columns; every row knows its file and line."""

import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ticktune.data.media import METADATA, digest_of, metadata_of, read_classes, resolve_file
from ticktune.data.store import PART_BYTES, PART_ROWS, Records, Store, parts, size_of
from ticktune.errors import DataError, Problem
from ticktune.files import input_path
from ticktune.recipe.schema import Source
from ticktune.registry import TaskRow

if TYPE_CHECKING:
    from datasets import Dataset

_FIELD = re.compile(r"\{([^{}]+)\}")
_SURROGATE = re.compile("[\ud800-\udfff]")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
_MAX_LINE = 64 * 1024 * 1024  # bytes; one longer line is a file that is not JSON Lines


@dataclass(frozen=True)
class Rows:
    """Rows of one split, with the task's columns only.

    Args:
        dataset: One column for each of the task's columns that the rows have.
        lines: The line in the file where each row starts, from 1.
        source: The file, or the Hub set, as the recipe calls it.
        sha256: Of the file's bytes, or of the values where there is no file.
        templates: Task column -> the file's column or template that it was made from.
        files: Columns that hold paths of files.
        by_file: Whether a row is told by its file, as there is no file of rows.
        bad: What is wrong with each row that was left out.
        max_bad: How many rows may be left out because they cannot be used.
    """

    dataset: "Dataset"
    lines: "array[int]"
    source: str
    sha256: str
    templates: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    by_file: bool = False
    bad: tuple[Problem, ...] = ()
    max_bad: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The task's columns."""
        return tuple(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """``file:line`` of a row, or its own file."""
        if self.by_file:
            return str(self.dataset[row][self.files[0]])
        return f"{self.source}:{self.lines[row]}"

    def find(self, where: str) -> int | None:
        """The number of the row of which :meth:`where` says this; None: of none."""
        if self.by_file:
            names = self.dataset[self.files[0]]
            return next((number for number, name in enumerate(names) if name == where), None)
        source, _, line = where.rpartition(":")
        if source != self.source or not line.isdecimal() or int(line) not in self.lines:
            return None
        return self.lines.index(int(line))

    def records(self) -> Records:
        """All rows as dicts, which are not held together in memory."""
        return Records(self.dataset)

    def select(self, numbers: Sequence[int]) -> "Rows":
        """The rows with these numbers, in this order."""
        return replace(self, dataset=self.dataset.select(numbers), lines=array("q", (self.lines[i] for i in numbers)))


class BadRows:
    """Rows that cannot be used: the first that is too many is an error.

    Args:
        most: How many may be left out.
        found: Those that were left out already.
    """

    def __init__(self, most: int = 0, found: Sequence[Problem] = ()) -> None:
        self.most = most
        self.found = list(found)

    def leave_out(self, error: DataError) -> None:
        """Notes a row that cannot be used.

        Raises:
            DataError: Of the row, where none may be left out, or saying that there are too many.
        """
        if not self.most:
            raise error
        self.found += error.problems
        if len(self.found) > self.most:
            last = self.found[-1]
            raise DataError(
                f"{len(self.found)} rows cannot be used, data.max_bad_rows allows {self.most}; of the last one: "
                f"{last.message}",
                where=last.where,
                fix="mend them, or raise data.max_bad_rows",
            ) from error


def read_rows(
    source: Source,
    task: TaskRow,
    columns: dict[str, str],
    *,
    relative_to: Path = Path(),
    split: str = "train",
    whole_text: bool = False,
    labelled: bool = True,
    max_bad: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Rows:
    """Reads one split.

    Args:
        source: Its section of the recipe.
        task: The task's row in the registry.
        columns: Task column -> file column or template; empty: the file's columns have the task's names.
        relative_to: Directory that a relative path starts from.
        split: Default split of a Hub set.
        whole_text: Whether a txt file is one row; else each line is.
        labelled: Whether the columns that hold the answer must be there.
        max_bad: How many rows may be left out because they cannot be used.
        poll: Called now and then, so that a signal is noticed.

    Raises:
        DataError: The file is missing, damaged, lacks a column or value, or changed while it was read.
    """
    bad = BadRows(max_bad)
    if source.hub is not None:
        name, records, digest = source.hub, _read_hub(source, split), ""
    else:
        assert source.path is not None
        path = input_path(source.path, relative_to)
        folder, by_file = path.parent, False
        if os.path.isdir(path) and task.file_columns:
            folder, by_file = path, metadata_of(path) is None
            path = metadata_of(path) or path
        name = os.path.normpath(path)
        digest = "" if by_file else _sha256(path)
        main = next((c for c in ("image", "audio") if c in task.file_columns), "")
        records = read_classes(path, main) if by_file else _read_file(path, whole_text, bad)
        if not by_file and path.name in METADATA:
            records = ((line, {main: record.get("file_name"), **record}) for line, record in records)
        rows = build_rows(
            records, task, columns, name, digest, limit=source.limit, labelled=labelled, folder=folder,
            by_file=by_file, bad=bad, poll=poll,
        )  # fmt: skip
        if digest and _sha256(path) != digest:
            raise DataError("the file changed while it was read", where=name, fix="run the command again")
        return rows
    return build_rows(records, task, columns, name, digest, limit=source.limit, labelled=labelled, bad=bad, poll=poll)


def build_rows(
    records: Iterable[tuple[int, dict[str, Any]]],
    task: TaskRow,
    columns: dict[str, str],
    name: str,
    digest: str = "",
    *,
    limit: int | None = None,
    labelled: bool = True,
    folder: Path = Path(),
    by_file: bool = False,
    bad: BadRows | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Rows:
    """Keeps the task's columns of records; see :func:`read_rows`.

    Files that the rows name are looked for from ``folder`` on; their bytes are part of the digest.
    """
    import datasets

    datasets.disable_progress_bars()
    bad = bad or BadRows()
    lines = array("q")
    values: dict[str, list[Any]] = {}
    first: dict[str, Any] = {}
    templates: dict[str, str] = {}
    size = 0
    with Store() as store:
        for line, record in itertools.islice(records, limit):
            try:
                if not lines:
                    templates = _templates(task, columns, record, f"{name}:{line}", labelled)
                    values = {column: [] for column in templates}
                row = _row(templates, record, task, folder, f"{name}:{line}")
            except DataError as error:
                bad.leave_out(error)
                continue
            for column, value in row.items():
                values[column].append(value)
                size += size_of(value)
            lines.append(line)
            first = first or row
            if len(values[next(iter(values))]) >= PART_ROWS or size > PART_BYTES:
                _keep(store, values, first, lines, name, bad)
                values, size = {column: [] for column in templates}, 0
                poll()
        if not lines:
            raise DataError(bad.found[:1]) if bad.found else DataError("there are no rows", where=name)
        if any(values.values()):
            _keep(store, values, first, lines, name, bad)
        dataset = _finished(store, name)
    files = tuple(column for column in templates if column in task.file_columns)
    # Of files their bytes count, not where they lie.
    digest = digest or _digest_of_values(dataset.remove_columns(files))
    if files:
        digest = digest_of((row[column] for column in files for row in Records(dataset)), digest)
    return Rows(dataset, lines, name, digest, templates, files, by_file, tuple(bad.found), bad.most)


def _row(templates: dict[str, str], record: dict[str, Any], task: TaskRow, folder: Path, where: str) -> dict[str, Any]:
    """The task's columns of a record."""
    row = {}
    for column, template in templates.items():
        value = _value(template, record, column, task, where)
        if column in task.file_columns:
            value = resolve_file(str(value or ""), folder, column, where)
        row[column] = value
    return row


def _keep(
    store: Store, values: dict[str, list[Any]], first: dict[str, Any], lines: "array[int]", name: str, bad: BadRows
) -> None:
    """Adds the last of the rows to the store, without those of another kind than ``first``, the first row of all."""
    while True:
        try:
            _add(store, values, first, lines, name)
            return
        except _OtherKind as error:
            bad.leave_out(error)
            del lines[error.row - len(values[next(iter(values))])]
            for items in values.values():
                del items[error.row]


class _OtherKind(DataError):
    """A value of another kind than the first row's.

    Args:
        row: Its place among the rows that are added.
    """

    def __init__(self, message: str, row: int, *, where: str) -> None:
        super().__init__(message, where=where, fix="write all of them in one way")
        self.row = row


def _add(store: Store, values: dict[str, list[Any]], first: dict[str, Any], lines: "array[int]", name: str) -> None:
    import pyarrow

    try:
        store.add(values)
    except UnicodeEncodeError as error:
        raise DataError("a text holds half of a surrogate pair, which is not UTF-8", where=name) from error
    except OverflowError as error:
        raise DataError("a number has more than 64 bits", where=name, fix="write it as text") from error
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        column, i = _mixed(values, first)
        raise _OtherKind(
            f"the column {column} has values of several kinds: {values[column][i]!r} here, {first[column]!r} in "
            f"line {lines[0]}",
            i,
            where=f"{name}:{lines[i - len(values[column])]}",
        ) from error


def _finished(store: Store, name: str) -> "Dataset":
    import pyarrow

    try:
        return store.dataset()
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"a column has values of several kinds: {error}", where=name, fix="write all of them in one way"
        ) from error


def _digest_of_values(dataset: "Dataset") -> str:
    """SHA-256 of what ``repr`` gives for a dict of all columns."""
    found = hashlib.sha256()
    for number, column in enumerate(dataset.column_names):
        found.update(f"{', ' if number else '{'}{column!r}: [".encode())
        for start, rows in parts(dataset.select_columns(column)):
            found.update(((", " if start else "") + ", ".join(repr(row[column]) for row in rows)).encode())
        found.update(b"]")
    found.update(b"}" if dataset.column_names else b"{}")
    return found.hexdigest()


def text_lines(data: bytes, name: str) -> list[str]:
    """Splits text into lines, blank ones included; a last line end starts no further line.

    Raises:
        DataError: It is not UTF-8.
    """
    lines = _decode(data.removeprefix(b"\xef\xbb\xbf"), name, 0).split("\n")
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _templates(
    task: TaskRow, columns: dict[str, str], record: dict[str, Any], where: str, labelled: bool
) -> dict[str, str]:
    known = frozenset().union(*task.columns) | task.optional_columns
    if not columns:
        columns = {name: name for name in sorted(known) if name in record}
    answers = task.label_columns
    fits = [s for s in task.columns if (s if labelled else s - answers) <= columns.keys()]
    if not fits:
        sets = " or ".join("+".join(sorted(s)) for s in task.columns)
        raise DataError(
            f"expected the columns {sets}, found {', '.join(map(str, record)) or 'none'}",
            where=where,
            fix="say which is which, for example data.columns: {text: sentence, label: label}",
        )
    chosen = {}
    for name, template in columns.items():
        fields = _FIELD.findall(template) or [template]
        missing = [f for f in fields if f not in record]
        if missing and name in answers and not labelled:
            continue
        if missing:
            near = difflib.get_close_matches(missing[0], [str(key) for key in record], 1, cutoff=0.5)
            raise DataError(
                f"there is no column {missing[0]} (data.columns.{name}); found {', '.join(map(str, record))}",
                where=where,
                fix=f"did you mean {near[0]}?" if near else "",
            )
        if name in fits[0] | task.optional_columns:
            chosen[name] = template
    return chosen


def _value(template: str, record: dict[str, Any], column: str, task: TaskRow, where: str) -> Any:
    fields = _FIELD.findall(template)
    for name in fields or [template]:
        if name not in record:
            raise DataError(f"the column {name} is missing in this row", where=where)
    if fields:
        return _FIELD.sub(lambda m: _text(record[m[1]], m[1], where), template)
    value = record[template]
    return _text(value, template, where) if column in task.text_columns else value


def _text(value: Any, column: str, where: str) -> str:
    if value is None or isinstance(value, list | dict):
        raise DataError(
            f"expected text in the column {column}, found {'nothing' if value is None else repr(value)}",
            where=where,
        )
    return str(value)


def _mixed(values: dict[str, list[Any]], first: dict[str, Any]) -> tuple[str, int]:
    """The column and the place of the first value that is of another kind than the first row's."""
    for column, items in values.items():
        for i, item in enumerate(items):
            if not _is_one_kind(_kind(item), _kind(first[column])):
                return column, i
    return next(iter(values)), 0


def _is_one_kind(one: set[str], other: set[str]) -> bool:
    """Whether values of these kinds stand in one column; an empty list goes with every list, nothing with all."""
    empty = (set[str](), {"list"}) if "list" in one & other else (set[str](),)
    return one == other or one in empty or other in empty


def _kind(value: Any) -> set[str]:
    """The kinds of a value and its items, where all numbers are of one, and nothing is of none."""
    kinds = [type(item) for item in (value, *value)] if isinstance(value, list) else [type(value)]
    return {"number" if kind in (int, float) else kind.__name__ for kind in kinds if kind is not type(None)}


def _read_file(path: Path, whole_text: bool, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": lambda p: _read_jsonl(p, bad),
        ".ndjson": lambda p: _read_jsonl(p, bad),
        ".json": lambda p: _read_json(p, bad),
        ".csv": lambda p: _read_csv(p, ",", bad),
        ".tsv": lambda p: _read_csv(p, "\t", bad),
        ".txt": lambda p: _read_txt(p, whole_text),
        ".parquet": _read_parquet,
    }
    if suffix not in readers:
        raise DataError(
            f"files ending in {suffix or 'nothing'} are not read",
            where=str(path),
            fix=f"use one of {', '.join(readers)}",
        )
    return readers[suffix](path)


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = _record(_json(line, f"{path}:{number}"), f"{path}:{number}")
        except DataError as error:
            bad.leave_out(error)
            continue
        yield number, record


def _read_json(path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    document = _json(_text_of(path), str(path))
    if not isinstance(document, list):
        raise DataError(
            "expected a list of objects", where=str(path), fix="one object a line belongs into a .jsonl file"
        )
    for number, item in enumerate(document, start=1):
        try:
            record = _record(item, f"{path}:{number}")
        except DataError as error:
            bad.leave_out(error)
            continue
        yield number, record


def _read_csv(path: Path, delimiter: str, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_MAX_LINE)  # the default, 128 KiB, is less than a long document
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise DataError(f"the column {sorted(twice)[0]} stands twice in the header", where=f"{path}:1")
                continue
            if len(cells) != len(header):
                bad.leave_out(
                    DataError(
                        f"expected {len(header)} cells as in the header, found {len(cells)}",
                        where=f"{path}:{start}",
                        fix="put text that holds the separator in double quotes",
                    )
                )
                continue
            yield start, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"this is not CSV: {error}", where=f"{path}:{line}") from error


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, of which a carriage return alone is one too."""
    try:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            for line in text:
                if "\0" in line:
                    break
                yield line
            else:
                return
    except UnicodeDecodeError:
        pass
    for _ in _lines(path):  # raises, with the place
        continue


def _read_txt(path: Path, whole: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    if whole:
        text = _text_of(path)
        if text.strip():
            yield 1, {"text": text}
        return
    for number, line in _lines(path):
        if line.strip():
            yield number, {"text": line}


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"this is not parquet: {error}", where=str(path)) from error


def _read_hub(source: Source, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(
            source.hub, source.config, split=source.split or split, revision=source.revision
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the Hub set cannot be read: {reason}", where=f"hub {source.hub}") from error
    yield from enumerate(dataset, start=1)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Split on \n alone: U+2028 and its like may stand inside a JSON string.
    with _open(path) as file:
        offset = 0
        for number in range(1, 2**62):
            data = file.readline(_MAX_LINE + 1)
            if not data:
                return
            if len(data) > _MAX_LINE:
                raise DataError(f"the line is longer than {_MAX_LINE >> 20} MiB", where=f"{path}:{number}")
            yield number, _decode(data, f"{path}:{number}", offset).rstrip("\r\n")
            offset += len(data)


def _text_of(path: Path) -> str:
    with _open(path) as file:
        return _decode(file.read(), str(path), 0)


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        return DataError(
            "there is no such file",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "",
        )
    return DataError(f"cannot be read: {error.strerror}", where=str(path))


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {offset + error.start} is not UTF-8", where=where, fix="save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"byte {offset + data.index(0)} is NUL: not a text file", where=where)
    return text.removeprefix("\ufeff") if offset == 0 else text


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise DataError("the JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise DataError(f"this is not JSON: {error}", where=where) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands twice")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"expected an object with columns, found {type(value).__name__}", where=where)
    for key, item in value.items():
        if _has_surrogate(item):
            raise DataError(f"the column {key} holds half of a surrogate pair, which is not text", where=where)
    return value


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_surrogate(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(_has_surrogate(item) for item in value)
    return isinstance(value, str) and _SURROGATE.search(value) is not None
