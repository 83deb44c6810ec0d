"""Rows and examples in memory up to a limit, and beyond it in a file without a name that is mapped into memory."""

import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ticktune.errors import ResourceError
from ticktune.files import FULL, full_disk

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

LIMIT = 32 * 1024 * 1024
"""Bytes, as Arrow counts them, that a store holds in memory."""

PART_ROWS = 4096
PART_BYTES = 1024 * 1024
"""A part is full with so many rows or bytes: few enough to be Python objects, enough to be worth a record batch."""


class _Place(NamedTuple):
    """Where a part stands in the file, in bytes."""

    offset: int
    size: int


class Store:
    """Takes rows part by part, and gives them back as one data set; a context manager, which closes its file.

    The types of the columns are those that all values together have: whole numbers become floats where a later part
    has floats, and an object gets the keys of all. The file that holds what is above :data:`LIMIT` never has a name,
    so that nothing is left of it however the process ends.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[pyarrow.Schema, pyarrow.Table | _Place]] = []
        self._schema: Any = None
        self._held = 0
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, columns: dict[str, list[Any]]) -> None:
        """Adds rows, column by column; the names are the same in every part.

        Raises:
            OverflowError: A number has more than 64 bits.
            pyarrow.ArrowException: A column has values of several kinds.
            ResourceError: The file cannot be written.
        """
        import datasets
        import pyarrow

        table = datasets.Dataset.from_dict(columns).data.table.replace_schema_metadata(None)
        known = [table.schema] if self._schema is None else [self._schema, table.schema]
        self._schema = pyarrow.unify_schemas(known, promote_options="permissive")
        self._parts.append((table.schema, table))
        self._held += table.nbytes
        if self._file is not None:
            self._parts[-1] = (table.schema, self._written(table))
        elif self._held > LIMIT:
            for number, (schema, part) in enumerate(self._parts):
                self._parts[number] = (schema, self._written(part))
            pyarrow.default_memory_pool().release_unused()  # else the allocator keeps what the parts took

    def dataset(self) -> "Dataset":
        """All rows, in the order in which they came; nothing can be added any more.

        Raises:
            pyarrow.ArrowException: A number is too large for the column's type, float64.
            ResourceError: The file cannot be written.
        """
        import datasets
        import pyarrow
        from datasets.table import InMemoryTable

        typed = [part if schema == self._schema else self._retyped(part) for schema, part in self._parts]
        if self._file is not None:
            # The mapping keeps a descriptor of its own.
            whole = pyarrow.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        tables = [_read(whole.slice(*part)) if isinstance(part, _Place) else part for part in typed]
        # The default fingerprint is a hash of all rows, for which they would be copied into memory.
        return datasets.Dataset(InMemoryTable(pyarrow.concat_tables(tables)), fingerprint=secrets.token_hex(8))

    def _retyped(self, part: "pyarrow.Table | _Place") -> "pyarrow.Table | _Place":
        """The part with the types that all parts together have, as if its values had been read with theirs."""
        import pyarrow

        table: Any = part
        if isinstance(part, _Place):
            assert self._file is not None
            table = _read(pyarrow.py_buffer(os.pread(self._file.fileno(), part.size, part.offset)))
        columns = [
            pyarrow.array(column.to_pylist(), type=field.type)
            for column, field in zip(table.columns, self._schema, strict=True)
        ]
        table = pyarrow.table(columns, schema=self._schema)
        return self._written(table) if isinstance(part, _Place) else table

    def _written(self, part: "pyarrow.Table | _Place") -> "_Place":
        import pyarrow

        if isinstance(part, _Place):
            return part
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)
        data = memoryview(sink.getvalue())
        place = _Place(self._end, len(data))
        folder = cache_directory()
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
            self._file.seek(self._end)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _refused(error, folder, place.size) from error
        self._end += place.size
        return place


class Records(Sequence[dict[str, Any]]):
    """The rows of a data set as dicts that are made when they are asked for.

    Args:
        dataset: The rows.
    """

    def __init__(self, dataset: "Dataset") -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return self._dataset[number]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, part in parts(self._dataset):
            yield from part


def parts(
    dataset: "Dataset", rows: int = PART_ROWS, size: int = PART_BYTES
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields (number of the first row, rows as dicts) of stretches of a data set.

    Args:
        dataset: The rows.
        rows: The most rows in a part.
        size: The most bytes in a part of several rows.
    """
    tables = dataset.with_format("arrow")
    average = dataset.data.nbytes // max(1, dataset.data.num_rows)
    rows = max(1, min(rows, size // max(1, average)))
    for start in range(0, len(dataset), rows):
        first = start
        for table in _cut(tables[start : start + rows], size):
            yield first, table.to_pylist()
            first += len(table)


def size_of(value: Any) -> int:
    """About how many bytes a value takes in Arrow."""
    if isinstance(value, str | bytes):
        return len(value) + 4
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8


def cache_directory() -> Path:
    """Where ticktune keeps what it can make again: ``$XDG_CACHE_HOME/ticktune``.

    Raises:
        ResourceError: There is no home directory.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "ticktune"
    except RuntimeError as error:
        raise ResourceError(
            "there is no home directory for the cache", fix="set XDG_CACHE_HOME to a directory"
        ) from error


def _cut(table: "pyarrow.Table", size: int) -> "Iterator[pyarrow.Table]":
    if len(table) <= 1 or table.nbytes <= size:
        yield table
        return
    middle = len(table) // 2
    yield from _cut(table.slice(0, middle), size)
    yield from _cut(table.slice(middle), size)


def _read(data: "pyarrow.Buffer") -> "pyarrow.Table":
    import pyarrow

    return pyarrow.ipc.open_stream(data).read_all()


def _refused(error: OSError, folder: Path, needed: int) -> ResourceError:
    message = f"cannot write here: {error.strerror}"
    if error.errno in FULL:
        message = full_disk(error.errno, folder, needed)
    return ResourceError(
        message,
        where=str(folder),
        fix=f"rows above {LIMIT >> 20} MiB are kept here while a command runs: make room, or set XDG_CACHE_HOME to a "
        "directory on another disk",
    )
