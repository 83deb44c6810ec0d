"""Rows in memory up to a limit, beyond it in a file without a name; types over all parts; what cannot be written."""

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from tests.models import word_tokenizer
from ticktune.data import encode, read, store
from ticktune.data.encode import encode_rows
from ticktune.data.read import Rows, build_rows, read_rows
from ticktune.data.store import Records, Store, parts, size_of
from ticktune.errors import DataError, ResourceError
from ticktune.recipe.schema import Source
from ticktune.registry import TASKS
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import EncodingReport, Example, TaskOptions

CLASSIFY = TASKS["text-classification"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ticktune"


@pytest.fixture(params=[0, 400, store.LIMIT], ids=["nothing", "some", "all"])
def held(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is held in memory, in parts of three rows."""
    monkeypatch.setattr(store, "LIMIT", request.param)
    monkeypatch.setattr(read, "PART_ROWS", 3)
    return int(request.param)


@pytest.fixture
def on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is held in memory."""
    monkeypatch.setattr(store, "LIMIT", 0)
    return cache


def stored(*columns: list[Any]) -> datasets.Dataset:
    """A data set of one column, from its parts."""
    with Store() as made:
        for column in columns:
            made.add({"x": column})
        return made.dataset()


def mappings(folder: Path) -> list[str]:
    """The files below a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.partition("/")[2] for line in lines if f"{folder}/" in line]


def sentences(count: int) -> list[dict[str, Any]]:
    return [{"text": f"w{i} w{i % 7}", "label": ["a", "b"][i % 2]} for i in range(count)]


# Memory and file


def test_what_fits_is_in_memory_and_no_directory_is_made(cache: Path) -> None:
    assert list(stored([1, 2], [3])["x"]) == [1, 2, 3]
    assert not cache.exists()


def test_what_does_not_fit_is_mapped_from_a_file_without_a_name(on_disk: Path) -> None:
    dataset = stored([1, 2], [3])
    assert list(on_disk.iterdir()) == []
    (name,) = mappings(on_disk)
    assert name.endswith(" (deleted)")
    assert list(dataset["x"]) == [1, 2, 3]
    del dataset
    assert mappings(on_disk) == []


def test_a_part_stays_in_memory_until_the_limit_is_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LIMIT", 100)
    with Store() as made:
        made.add({"x": [0] * 12})
        assert not cache.exists()
        made.add({"x": [1] * 12})
        assert cache.exists()
        made.add({"x": [2] * 12})
        assert list(made.dataset()["x"]) == [0] * 12 + [1] * 12 + [2] * 12


@pytest.mark.skipif(sys.platform != "linux", reason="files that never have a name are Linux's")
def test_nothing_is_left_of_a_process_that_was_killed(cache: Path) -> None:
    program = (
        "import sys, time; from ticktune.data import store; store.LIMIT = 0; made = store.Store()\n"
        "made.add({'x': ['a' * 1000] * 1000}); print(made._end, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 1_000_000
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert list(cache.iterdir()) == []


# Types: those of all values together, wherever a part ends


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, 4],
        [1, 2, 3.5, 4],
        [None, None, "a", "b"],
        ["a", "b", None, None],
        [None, None, None, None],
        [[], [], ["a"], ["b", "c"]],
        [[1], [2], [0.5], None],
        [{"a": 1}, {"a": 2}, {"b": "x"}, {"a": 1.5, "b": "y"}],
        [{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"b": 5, "a": 6}, {"b": 7, "a": 8}],
        [[{"role": "u", "content": "x"}], [], [{"content": "y", "role": "u", "name": "n"}], [{"role": "s"}]],
        [True, False, None, True],
        [Decimal("1.5"), Decimal("22.5"), Decimal("1.25"), Decimal("333.125")],
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [0, store.LIMIT], ids=["file", "memory"])
def test_rows_come_back_as_if_they_had_been_read_in_one_part(
    cache: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], limit: int
) -> None:
    monkeypatch.setattr(store, "LIMIT", limit)
    whole, cut = datasets.Dataset.from_dict({"x": values}), stored(values[:2], values[2:])
    assert cut.features == whole.features
    assert repr(cut.to_list()) == repr(whole.to_list())


@pytest.mark.parametrize("limit", [0, store.LIMIT], ids=["file", "memory"])
def test_a_whole_number_that_no_float_can_be_is_refused_beside_floats(
    cache: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(store, "LIMIT", limit)
    with pytest.raises(pyarrow.ArrowInvalid, match="outside of the range"):
        stored([2**53 + 1], [0.5])


def test_a_number_of_more_than_64_bits_is_an_overflow() -> None:
    with pytest.raises(OverflowError):
        stored([1], [2**64])


# Reading


def test_any_row_is_read_by_its_number(held: int) -> None:
    rows = build_rows(enumerate(sentences(100), start=1), CLASSIFY, {}, "a.jsonl")
    assert rows.dataset[[7, 99, 7, 0]]["text"] == ["w7 w0", "w99 w1", "w7 w0", "w0 w0"]
    records = rows.records()
    assert (len(records), records[99], records[2:4]) == (100, sentences(100)[99], sentences(100)[2:4])
    assert list(rows.select([50, 3]).records()) == [sentences(100)[50], sentences(100)[3]]


def test_rows_lines_and_hash_do_not_depend_on_what_is_held(held: int, tmp_path: Path) -> None:
    lines = [f'{{"text": "w{i}", "label": {i % 2}}}\n' + "\n" * (i % 3) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    rows = read_rows(Source(path=str(tmp_path / "a.jsonl"), limit=40), CLASSIFY, {})
    assert list(rows.records()) == [{"label": i % 2, "text": f"w{i}"} for i in range(40)]
    assert rows.lines[:5].tolist() == [1, 2, 4, 7, 8]
    assert rows.where(39) == f"{tmp_path / 'a.jsonl'}:{rows.lines[39]}"
    assert rows.sha256 == read._sha256(tmp_path / "a.jsonl")


def test_the_hash_of_values_is_that_of_their_text(held: int) -> None:
    import hashlib

    rows = build_rows(enumerate(sentences(20), start=1), CLASSIFY, {}, "a.jsonl")
    columns = {name: [row[name] for row in sentences(20)] for name in ("label", "text")}
    assert rows.sha256 == hashlib.sha256(repr(columns).encode()).hexdigest()


@pytest.mark.parametrize(
    ("labels", "message", "where"),
    [
        ([*range(7), "x"], "the column label has values of several kinds: 'x' here, 0 in line 1", "a.jsonl:8"),
        ([2**53 + 1, 1, 2, 0.5], "a column has values of several kinds: Integer value 9007199254740993", "a.jsonl"),
        ([1, 1, 1, 2**70], "a number has more than 64 bits", "a.jsonl"),
    ],
    ids=["text", "large", "larger"],
)
def test_values_of_several_kinds_in_different_parts_are_refused(
    held: int, labels: list[Any], message: str, where: str
) -> None:
    records = [(line, {"text": "w1", "label": label}) for line, label in enumerate(labels, start=1)]
    with pytest.raises(DataError) as caught:
        build_rows(records, CLASSIFY, {}, "a.jsonl")
    problem = caught.value.problems[0]
    assert (problem.message[: len(message)], problem.where) == (message, where)


def test_a_csv_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(b"text,label\n" + b"w1,a\n" * 10 + b'"w2\rw3\r\nw4",b\r')
        file.write(b"w5,c\r\n" * 100_000 + b"\xff,d\n")
    seen: list[int] = []
    rows = read._read_csv(path, ",", read.BadRows())
    for _, (line, record) in zip(range(12), rows, strict=False):
        seen.append(line)
        last = record
    assert seen == [*range(2, 13), 15]
    assert last == {"text": "w5", "label": "c"}  # the byte at the end is not reached
    with pytest.raises(DataError, match="is not UTF-8"):
        list(rows)


def test_parts_have_no_more_rows_and_bytes_than_asked_for() -> None:
    lengths = [5, 5, 5, 5, 5, 5, 900, 900, 5]
    dataset = datasets.Dataset.from_dict({"text": ["a" * n for n in lengths]})
    assert [(first, len(rows)) for first, rows in parts(dataset, rows=4)] == [(0, 4), (4, 4), (8, 1)]
    cut = list(parts(dataset, rows=100, size=1000))
    sizes = [len(rows) for _, rows in cut]
    assert [(first, len(rows)) for first, rows in cut] == list(zip(accumulate([0, *sizes]), sizes, strict=False))
    assert [len(row["text"]) for _, rows in cut for row in rows] == lengths
    assert max(sum(len(row["text"]) for row in rows) for _, rows in cut) <= 1000


@pytest.mark.parametrize("value", ["some text", 3, 1.5, None, [1, 2, 3], ["ab", "c"], {"a": "text", "b": [1, 2]}])
def test_the_size_of_a_value_is_about_that_in_arrow(value: Any) -> None:
    size = datasets.Dataset.from_dict({"x": [value] * 1000}).data.nbytes / 1000
    assert size_of(value) <= size * 1.5 + 8
    assert size_of(value) >= size / 3


# Examples


def test_examples_do_not_depend_on_what_is_held(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_CHUNK", 8)
    task = CausalLm(TaskOptions(("prompt", "response"), 5), word_tokenizer())
    records = [{"prompt": f"w{i} w3" * (i % 3), "response": "w1 w2"} for i in range(40)]
    rows: Rows = build_rows(enumerate(records, start=1), TASKS["causal-lm"], {}, "a.jsonl")
    encoded = encode_rows(task, rows, None)
    expected = task.encode(records, 0, type(encoded.report)(), labelled=True)
    assert encoded.take(list(range(40))) == expected
    assert list(encoded.lengths) == [example["length"] for example in expected]


@dataclass(frozen=True)
class Uneven(CausalLm):
    """Examples that do not all have the same keys."""

    def encode(self, rows: Any, first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        examples = super().encode(rows, first, report, labelled=labelled)
        return [{**e, "note": "n"} if e["row"] % 2 else {"other": 1, **e} for e in examples]


def test_examples_have_the_keys_of_the_first_one(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_CHUNK", 1)
    rows = build_rows(enumerate([{"text": "w1"}] * 4, start=1), TASKS["causal-lm"], {}, "a.jsonl")
    encoded = encode_rows(Uneven(TaskOptions(("text",), 5), word_tokenizer()), rows, None)
    assert [example["other"] for example in encoded.take([0, 1, 2, 3])] == [1, None, 1, None]
    assert "note" not in encoded.take([1])[0]


# What cannot be written


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Sets how large a file may become, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_with_the_place_and_what_to_do(on_disk: Path, small_files: Callable[[int], None]) -> None:
    small_files(100_000)
    with Store() as made, pytest.raises(ResourceError) as caught:
        made.add({"x": ["a" * 1000] * 1000})
    problem = caught.value.problems[0]
    assert problem.message.startswith("the disk is full (")
    assert problem.where == str(on_disk)
    assert "set XDG_CACHE_HOME to a directory on another disk" in problem.fix
    assert list(on_disk.iterdir()) == []


def test_a_cache_directory_that_cannot_be_made_is_said(on_disk: Path) -> None:
    on_disk.parent.write_text("a file where the cache should be")
    with pytest.raises(ResourceError) as caught:
        stored([1])
    problem = caught.value.problems[0]
    assert (problem.message, problem.where) == ("cannot write here: Not a directory", str(on_disk))


def test_a_missing_home_directory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(store, "LIMIT", 0)
    with pytest.raises(ResourceError) as caught:
        stored([1])
    assert caught.value.problems[0].fix == "set XDG_CACHE_HOME to a directory"


def test_records_are_no_list_that_is_held(on_disk: Path) -> None:
    records = Records(stored(list(range(10))))
    assert not any(isinstance(value, list) for value in vars(records).values())
    assert [row["x"] for row in records] == list(range(10))
