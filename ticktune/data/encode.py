"""Rows -> examples, tokenised once and kept in a cache whose key is the content."""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ticktune.console import Console
from ticktune.data.read import Rows
from ticktune.data.store import Store, cache_directory, parts
from ticktune.errors import CheckpointError, DataError, ResourceError
from ticktune.files import MANIFEST, new_directory, sha256_json, verify_directory, write_json
from ticktune.tasks.task import EncodingReport, Example, Task

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1024  # rows
_CACHE_FROM_ROWS = 2000  # fewer are tokenised faster than a cache is verified
_MAX_UNSUPERVISED = 0.05
_FORMAT = 3


@dataclass(frozen=True)
class Encoded:
    """Examples of one split.

    Args:
        dataset: One row for each example: row, length, and what the task needs.
        lengths: Length of each example in tokens.
        report: What was cut or left out.
        source: Rows that they come from.
    """

    dataset: "Dataset"
    lengths: Sequence[int]
    report: EncodingReport
    source: Rows

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, numbers: list[int]) -> list[Example]:
        """The examples with these numbers."""
        columns = self.dataset[numbers]
        return [{name: columns[name][i] for name in columns} for i in range(len(numbers))]


def encode_rows(
    task: Task, rows: Rows, identity: Any, *, labelled: bool = True, poll: Callable[[], None] = lambda: None
) -> Encoded:
    """Tokenises a split, or takes it from the cache.

    Args:
        task: The task, configured.
        rows: The rows.
        identity: Whatever else decides the result, as JSON: processor files, task options and state.
        labelled: Whether the rows have their answers.
        poll: Called after each chunk, so that a signal is noticed.

    Raises:
        DataError: No row, or too few, has something to learn from.
    """
    cached = len(rows) >= _CACHE_FROM_ROWS and not rows.files  # of files only the names are kept, which is soon done
    lines = hashlib.sha256(rows.lines).hexdigest()
    key = sha256_json([_FORMAT, rows.sha256, rows.templates, lines, identity, labelled])
    found = _load(_directory(key), rows) if cached else None
    if found is None:
        report, count = EncodingReport(), 0
        names: list[str] = []  # those of the first example
        with Store() as store:
            for start, part in parts(rows.dataset, _CHUNK):
                examples = task.encode(part, start, report, labelled=labelled)
                if examples:
                    names = names or list(examples[0])
                    store.add({name: [e.get(name) for e in examples] for name in names})
                count += len(examples)
                poll()
            _check_report(report, rows, count, task.limit())
            dataset = store.dataset()
        found = Encoded(dataset, _lengths(dataset), report, rows)
        if cached:
            _save(_directory(key), found)
    return found


def processor_identity(directory: Path) -> dict[str, str]:
    """SHA-256 of each file that a tokenizer, image processor or feature extractor is made of."""
    from ticktune.files import sha256_file

    names = (
        "tokenizer*",
        "*processor_config.json",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "*.spm",
        "*.jinja",
    )
    files = {path for name in names for path in directory.glob(name) if path.is_file()}
    return {path.name: sha256_file(path) for path in sorted(files)}


def _check_report(report: EncodingReport, rows: Rows, examples: int, limit: str) -> None:
    count = len(report.unsupervised)
    if examples and count <= _MAX_UNSUPERVISED * len(rows):
        return
    places = ", ".join(rows.where(i) for i in report.unsupervised[:3])
    reason = f"({report.why})" if report.why else f"after cutting to {limit}"
    raise DataError(
        f"{count} of {len(rows)} rows ({100 * count / len(rows):.0f} %) have nothing to learn from {reason}"
        f"{': ' + places if places else ''}",
        where=rows.source,
        fix="remove these rows" if report.why else f"raise {limit.partition(' =')[0]}, or remove these rows",
    )


def _lengths(dataset: "Dataset") -> Sequence[int]:
    column = dataset.data.column("length").to_numpy()
    return array("q", column.astype("int64").tobytes())


def _directory(key: str) -> Path:
    return cache_directory() / "examples" / key


def _load(directory: Path, rows: Rows) -> Encoded | None:
    import datasets

    if not (directory / MANIFEST).exists():
        return None
    try:
        verify_directory(directory)
    except CheckpointError as error:
        Console().warn(f"{error}; the rows are tokenised again")
        shutil.rmtree(directory, ignore_errors=True)
        return None
    facts = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    dataset = datasets.load_from_disk(directory / "examples")
    return Encoded(dataset, _lengths(dataset), EncodingReport(**facts), rows)


def _save(directory: Path, encoded: Encoded) -> None:
    try:
        with new_directory(directory, replace=True, needed=encoded.dataset.data.nbytes) as temporary:
            encoded.dataset.save_to_disk(temporary / "examples")
            write_json(temporary / "report.json", asdict(encoded.report))
    except ResourceError as error:
        Console().warn(f"the tokenised rows are not kept: {error}")
