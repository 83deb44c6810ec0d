"""Examples of a split, their cache, and rows without anything to learn from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.models import word_tokenizer
from ticktune import prepare
from ticktune.data import encode
from ticktune.data.encode import Encoded, encode_rows, processor_identity
from ticktune.data.read import Rows, build_rows, read_rows
from ticktune.errors import DataError
from ticktune.recipe.schema import Source
from ticktune.registry import TASKS
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import EncodingReport, Example, Row, TaskOptions


@dataclass(frozen=True)
class Counting(CausalLm):
    """Counts how often rows are tokenised."""

    calls: list[int] = field(default_factory=list)

    def encode(self, rows: Any, first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        self.calls.append(len(rows))
        return super().encode(rows, first, report, labelled=labelled)


def counting(max_length: int = 8) -> Counting:
    return Counting(TaskOptions(("prompt", "response"), max_length), word_tokenizer())


def rows_of(records: list[Row], task: str = "causal-lm") -> Rows:
    return build_rows(enumerate(records, start=1), TASKS[task], {}, "a.jsonl")


PAIRS = [{"prompt": f"w{i}", "response": "w1 w2"} for i in range(20)]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that keeps splits of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "_CACHE_FROM_ROWS", 1)
    return tmp_path / "cache" / "ticktune" / "examples"


def contents(encoded: Encoded) -> list[Example]:
    return encoded.take(list(range(len(encoded))))


def test_examples_come_in_the_order_of_the_rows_with_their_lengths() -> None:
    encoded = encode_rows(counting(), rows_of(PAIRS), None)
    assert [example["row"] for example in contents(encoded)] == list(range(20))
    assert list(encoded.lengths) == [4] * 20


def test_take_gives_the_asked_examples_in_the_asked_order() -> None:
    encoded = encode_rows(counting(), rows_of(PAIRS), None)
    assert [e["input_ids"][0] for e in encoded.take([5, 2])] == [4 + 5, 4 + 2]


def test_rows_are_tokenised_in_chunks_with_a_look_for_signals_after_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "_CHUNK", 8)
    task, polls = counting(), []
    encoded = encode_rows(task, rows_of(PAIRS), None, poll=lambda: polls.append(1))
    assert (task.calls, len(polls)) == ([8, 8, 4], 3)
    assert [example["row"] for example in contents(encoded)] == list(range(20))


def test_the_same_content_is_taken_from_the_cache(cached: Path) -> None:
    first = encode_rows(counting(), rows_of(PAIRS), ["tokenizer"])
    task = counting()
    again = encode_rows(task, rows_of(PAIRS), ["tokenizer"])
    assert task.calls == []
    assert contents(again) == contents(first)
    assert (again.lengths, again.report) == (first.lengths, first.report)


def test_the_report_of_cut_rows_comes_from_the_cache_too(cached: Path) -> None:
    for _ in range(2):
        report = encode_rows(counting(max_length=3), rows_of(PAIRS), None).report
        assert report.truncated == list(range(20))


def test_a_small_split_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encode_rows(counting(), rows_of(PAIRS), None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["identity", "values", "labelled", "order"])
def test_other_content_is_not_taken_from_the_cache(cached: Path, change: str) -> None:
    encode_rows(counting(), rows_of(PAIRS), [8])
    task = counting()
    rows = rows_of(PAIRS)
    if change == "values":
        rows = rows_of([*PAIRS[:-1], {"prompt": "w5", "response": "w3"}])
    if change == "order":
        rows = rows.select([1, 0, *range(2, 20)])
    encode_rows(task, rows, [9] if change == "identity" else [8], labelled=change != "labelled")
    assert task.calls == [20]


@pytest.mark.parametrize("change", ["max_length", "tokenizer"])
def test_another_max_length_or_tokenizer_is_not_taken_from_the_cache(cached: Path, tmp_path: Path, change: str) -> None:
    (tmp_path / "tokenizer.json").write_text("one")
    prepare.encode(counting(8), rows_of(PAIRS), tmp_path)
    task = counting(9 if change == "max_length" else 8)
    if change == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("two")
    prepare.encode(task, rows_of(PAIRS), tmp_path)
    assert task.calls == [20]


def test_the_same_task_and_tokenizer_are_taken_from_the_cache(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("one")
    prepare.encode(counting(), rows_of(PAIRS), tmp_path)
    task = counting()
    prepare.encode(task, rows_of(PAIRS), tmp_path)
    assert task.calls == []


def test_other_columns_of_the_same_file_are_not_taken_from_the_cache(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "w1", "b": "w2", "c": "w3"}\n')
    found = []
    for prompt in ("a", "b", "{a} {b}"):
        columns = {"prompt": prompt, "response": "c"}
        rows = read_rows(Source(path=str(tmp_path / "a.jsonl")), TASKS["causal-lm"], columns)
        found.append(contents(encode_rows(counting(), rows, None))[0]["input_ids"])
    assert found == [[5, 7, 3], [6, 7, 3], [5, 6, 7, 3]]


def test_a_damaged_cache_is_built_again_with_a_warning(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = encode_rows(counting(), rows_of(PAIRS), None)
    (arrow,) = cached.glob("*/examples/*.arrow")
    data = bytearray(arrow.read_bytes())
    data[len(data) // 2] ^= 1
    arrow.write_bytes(data)
    task = counting()
    again = encode_rows(task, rows_of(PAIRS), None)
    assert task.calls == [20]
    assert contents(again) == contents(first)
    assert "the file is damaged: its SHA-256 is not the recorded one; the rows are tokenised again" in (
        capsys.readouterr().err
    )


def test_a_rebuilt_cache_is_used_again(cached: Path) -> None:
    encode_rows(counting(), rows_of(PAIRS), None)
    next(cached.glob("*/report.json")).write_text("{}")
    encode_rows(counting(), rows_of(PAIRS), None)
    task = counting()
    encode_rows(task, rows_of(PAIRS), None)
    assert task.calls == []


def test_a_cache_that_cannot_be_written_is_only_a_warning(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached.parent.parent.write_text("a file where the cache should be")
    assert len(encode_rows(counting(), rows_of(PAIRS), None)) == 20
    assert "warning: the tokenised rows are not kept: " in capsys.readouterr().err


# Rows without anything to learn from: in conversations, those whose assistant's turn is cut away.


def conversations(silent: int, count: int = 100) -> tuple[CausalLm, Rows]:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w50' if m.role == 'user' else 'w51' }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}w51 {% endif %}"
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": "w1 w2 w3 w4 w5 w6" if i < silent else "w1"},
                {"role": "assistant", "content": "w7"},
            ]
        }
        for i in range(count)
    ]
    return CausalLm(TaskOptions(("messages",), 6), tokenizer), rows_of(records)


def test_a_few_rows_without_supervised_tokens_are_left_out_and_counted() -> None:
    task, rows = conversations(silent=5)
    encoded = encode_rows(task, rows, None)
    assert encoded.report.unsupervised == [0, 1, 2, 3, 4]
    assert [example["row"] for example in contents(encoded)] == list(range(5, 100))


def test_too_many_rows_without_supervised_tokens_are_refused() -> None:
    task, rows = conversations(silent=6)
    with pytest.raises(DataError) as caught:
        encode_rows(task, rows, None)
    problem = caught.value.problems[0]
    assert problem.message == (
        "6 of 100 rows (6 %) have nothing to learn from after cutting to data.max_length = 6 tokens: "
        "a.jsonl:1, a.jsonl:2, a.jsonl:3"
    )
    assert (problem.where, problem.fix) == ("a.jsonl", "raise data.max_length, or remove these rows")


def test_a_split_without_any_example_is_refused() -> None:
    task = CausalLm(TaskOptions(("text",), 8), word_tokenizer())
    with pytest.raises(DataError, match=r"1 of 1 rows \(100 %\) have nothing to learn from"):
        encode_rows(task, rows_of([{"text": ""}]), None)


# The tokenizer's identity


def test_the_identity_of_a_tokenizer_is_that_of_its_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text("x")
    before = processor_identity(tmp_path)
    assert sorted(before) == ["chat_template.jinja", "merges.txt", "tokenizer.json", "vocab.txt"]
    (tmp_path / "vocab.txt").write_text("y")
    after = processor_identity(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"vocab.txt"}
