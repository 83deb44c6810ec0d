"""Files -> rows: formats, line numbers, templates, and files that cannot be used."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ticktune.data.read import Rows, build_rows, read_rows
from ticktune.errors import DataError, Problem
from ticktune.recipe.schema import Source
from ticktune.registry import TASKS

CLASSIFY, LANGUAGE = TASKS["text-classification"], TASKS["causal-lm"]
TWO = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def read(
    folder: Path,
    name: str,
    content: str | bytes,
    columns: dict[str, str] | None = None,
    task: Any = CLASSIFY,
    limit: int | None = None,
    **options: Any,
) -> Rows:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = Source(path=name, limit=limit)
    return read_rows(source, task, columns or {}, relative_to=folder, **options)


def problem(folder: Path, name: str, content: str | bytes, *args: Any, **options: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        read(folder, name, content, *args, **options)
    assert len(caught.value.problems) == 1
    found = caught.value.problems[0]
    return Problem(found.message, found.where.replace(f"{folder}/", ""), found.fix.replace(f"{folder}/", ""))


# Formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'),
        ("a.ndjson", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'),
        ("a.JSONL", '{"text": "a", "label": "x", "more": [1]}\n{"text": "b", "label": "y"}'),
        ("a.json", '[{"text": "a", "label": "x"},\n {"text": "b", "label": "y"}]'),
        ("a.csv", "text,label\na,x\nb,y\n"),
        ("a.csv", "label, text\nx,a\ny,b"),
        ("a.tsv", "text\tlabel\na\tx\nb\ty\n"),
        ("a.csv", b"\xef\xbb\xbftext,label\r\na,x\r\nb,y\r\n"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a", "label": "x"}\r\n{"text": "b", "label": "y"}\r\n'),
        ("a.json", b'\xef\xbb\xbf[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]'),
    ],
    ids=[
        "jsonl",
        "ndjson",
        "no-final-newline",
        "json",
        "csv",
        "spaced-header",
        "tsv",
        "bom-csv",
        "bom-jsonl",
        "bom-json",
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert list(read(tmp_path, name, content).records()) == TWO


def test_parquet_gives_the_same_rows_and_their_numbers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWO), tmp_path / "b.parquet")
    rows = read(tmp_path, "a.parquet", (tmp_path / "b.parquet").read_bytes())
    assert (list(rows.records()), list(rows.lines)) == (TWO, [1, 2])


def test_a_txt_file_is_one_row_a_line_without_blank_ones(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.txt", "one\r\n\r\n  \r\n two\u2028three ", task=LANGUAGE)
    assert list(rows.records()) == [{"text": "one"}, {"text": " two\u2028three "}]
    assert list(rows.lines) == [1, 4]


def test_a_txt_file_may_be_one_row(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.txt", b"\xef\xbb\xbfone\n\ntwo\n", task=LANGUAGE, whole_text=True)
    assert list(rows.records()) == [{"text": "one\n\ntwo\n"}]


def test_u2028_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b\u0085c\x0bd", "label": "x"}\n{"text": "b", "label": "y"}\n'.replace("\x0b", "\\u000b")
    rows = read(tmp_path, "a.jsonl", content)
    assert list(rows.records())[0]["text"] == "a\u2028b\u0085c\x0bd"
    assert list(rows.lines) == [1, 2]


def test_blank_lines_keep_the_line_numbers_right(tmp_path: Path) -> None:
    content = '\n{"text": "a", "label": 1}\n \n\n{"text": "b", "label": 2}\n'
    assert list(read(tmp_path, "a.jsonl", content).lines) == [2, 5]


def test_line_ends_in_quoted_cells_keep_the_line_numbers_right(tmp_path: Path) -> None:
    content = 'text,label\r\n"a\r\nb\r\nc",x\r\n\r\n"d ""e"", f",y\r\ng,x\r\n'
    rows = read(tmp_path, "a.csv", content)
    assert [row["text"] for row in list(rows.records())] == ["a\r\nb\r\nc", 'd "e", f', "g"]
    assert list(rows.lines) == [2, 6, 7]


def test_a_quote_in_a_tsv_cell_may_hold_a_tab(tmp_path: Path) -> None:
    assert list(read(tmp_path, "a.tsv", 'text\tlabel\n"a\tb"\tx\n').records()) == [{"text": "a\tb", "label": "x"}]


def test_a_csv_cell_may_be_longer_than_128_kib(tmp_path: Path) -> None:
    assert len(list(read(tmp_path, "a.csv", f"text,label\n{'a' * 200_000},x\n").records())[0]["text"]) == 200_000


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.jsonl", '{"text": "a", "label": "x"}\nbroken\n', limit=1)
    assert list(rows.records()) == TWO[:1]


# Columns


def test_the_file_may_call_its_columns_as_it_likes(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.jsonl", '{"s": "a", "l": "x", "z": 1}\n', {"text": "s", "label": "l"})
    assert list(rows.records()) == [{"text": "a", "label": "x"}]


def test_a_template_joins_columns(tmp_path: Path) -> None:
    content = '{"question": "1 + 1?", "answer": 2, "label": "x"}\n'
    rows = read(tmp_path, "a.jsonl", content, {"text": "Q: {question}\n{answer}", "label": "label"})
    assert list(rows.records())[0]["text"] == "Q: 1 + 1?\n2"


def test_braces_in_values_are_not_expanded(tmp_path: Path) -> None:
    content = '{"question": "{answer} {0} {x", "answer": "{question}", "label": "x"}\n'
    rows = read(tmp_path, "a.jsonl", content, {"text": "{question}\n{answer}", "label": "label"})
    assert list(rows.records())[0]["text"] == "{answer} {0} {x\n{question}"


def test_the_order_of_columns_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "from ticktune.data.read import build_rows\n"
        "from ticktune.registry import TASKS\n"
        "record = {'text': 'a', 'text_pair': 'b', 'label': 1}\n"
        "print(build_rows([(1, record)], TASKS['text-classification'], {}, 'x').columns)\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "HOME": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_numbers_become_text_in_text_columns(tmp_path: Path) -> None:
    assert list(read(tmp_path, "a.jsonl", '{"text": 5, "label": 1}\n').records()) == [{"text": "5", "label": 1}]


def test_whole_and_fractional_numbers_mix(tmp_path: Path) -> None:
    content = '{"text": "a", "label": 1}\n{"text": "b", "label": 1.5}\n'
    assert [row["label"] for row in list(read(tmp_path, "a.jsonl", content).records())] == [1.0, 1.5]


def test_a_pair_is_read_where_the_file_has_one(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.jsonl", '{"text": "a", "text_pair": "b", "label": 1}\n')
    assert list(rows.records()) == [{"text": "a", "text_pair": "b", "label": 1}]


def test_prediction_needs_no_answers(tmp_path: Path) -> None:
    columns = {"text": "s", "label": "l"}
    rows = read(tmp_path, "a.jsonl", '{"s": "a"}\n', columns, labelled=False)
    assert list(rows.records()) == [{"text": "a"}]


def test_messages_stay_a_list(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = read(tmp_path, "a.jsonl", json.dumps({"messages": messages}), task=LANGUAGE)
    assert list(rows.records()) == [{"messages": messages}]


def test_rows_that_are_chosen_keep_their_lines_and_templates(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", "text,label\na,x\nb,y\n")
    chosen = rows.select([1])
    assert (list(chosen.records()), len(chosen), chosen.where(0)) == (TWO[1:], 1, f"{tmp_path / 'a.csv'}:3")
    assert chosen.templates == rows.templates == {"text": "text", "label": "label"}


def test_the_hash_is_that_of_the_bytes_of_the_file(tmp_path: Path) -> None:
    import hashlib

    content = "text,label\na,x\n"
    assert read(tmp_path, "a.csv", content).sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_rows_without_a_file_have_a_hash_of_their_values() -> None:
    hashes = [build_rows([(1, {"text": text, "label": 1})], CLASSIFY, {}, "x").sha256 for text in "aab"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_signal_is_noticed_while_reading() -> None:
    calls = []
    records = ((i, {"text": "a", "label": 1}) for i in range(10_000))
    build_rows(records, CLASSIFY, {}, "x", poll=lambda: calls.append(1))
    assert len(calls) == 2


# What cannot be used

GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            GOOD + '{"text": "a"\n',
            Problem("this is not JSON: Expecting ',' delimiter", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "a", "text": "b"}\n',
            Problem("this is not JSON: the key 'text' stands twice", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "a", "label": NaN}\n',
            Problem("this is not JSON: NaN is not a JSON number", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "a", "label": -Infinity}\n',
            Problem("this is not JSON: -Infinity is not a JSON number", "a.jsonl:2"),
        ),
        ("a.jsonl", GOOD + "[1]\n", Problem("expected an object with columns, found list", "a.jsonl:2")),
        ("a.jsonl", "[" * 100_000, Problem("the JSON is nested too deeply", "a.jsonl:1")),
        (
            "a.jsonl",
            GOOD + '{"text": "a"}\n',
            Problem("the column label is missing in this row", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": null, "label": 1}\n',
            Problem("expected text in the column text, found nothing", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": ["a"], "label": 1}\n',
            Problem("expected text in the column text, found ['a']", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "b", "label": "y"}\n',
            Problem(
                "the column label has values of several kinds: 'y' here, 1 in line 1",
                "a.jsonl:2",
                "write all of them in one way",
            ),
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["y", 1]}\n',
            Problem(
                "the column label has values of several kinds: ['y', 1] here, ['x'] in line 1",
                "a.jsonl:2",
                "write all of them in one way",
            ),
        ),
        (
            "a.jsonl",
            f'{{"text": "a", "label": {2**70}}}\n',
            Problem("a number has more than 64 bits", "a.jsonl", "write it as text"),
        ),
        (
            "a.jsonl",
            b"\xef\xbb\xbf" + GOOD.encode() + b'{"text": "\xe9", "label": 1}\n',
            Problem(f"byte {3 + len(GOOD) + 10} is not UTF-8", "a.jsonl:2", "save the file as UTF-8"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "é\0"}\n',
            Problem(f"byte {len(GOOD) + 12} is NUL: not a text file", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "\\ud83d", "label": 1}\n',
            Problem("the column text holds half of a surrogate pair, which is not text", "a.jsonl:2"),
        ),
        (
            "a.jsonl",
            GOOD + '{"text": "a", "label": 1, "more": [{"a": "\\ud83d"}]}\n',
            Problem("the column more holds half of a surrogate pair, which is not text", "a.jsonl:2"),
        ),
        ("a.jsonl", "\n \n", Problem("there are no rows", "a.jsonl")),
        (
            "a.jsonl",
            '{"sentence": "a", "label": 1}\n',
            Problem(
                "expected the columns label+text, found sentence, label",
                "a.jsonl:1",
                "say which is which, for example data.columns: {text: sentence, label: label}",
            ),
        ),
        (
            "a.json",
            '{"text": "a"}',
            Problem("expected a list of objects", "a.json", "one object a line belongs into a .jsonl file"),
        ),
        (
            "a.json",
            '[{"text": "a", "label": 1}, 3]',
            Problem("expected an object with columns, found int", "a.json:2"),
        ),
        ("a.json", '[{"text": "a"]', Problem("this is not JSON: Expecting ',' delimiter", "a.json")),
        (
            "a.csv",
            'text,label\n"a\nb",x\nc,y,z\n',
            Problem(
                "expected 2 cells as in the header, found 3",
                "a.csv:4",
                "put text that holds the separator in double quotes",
            ),
        ),
        ("a.csv", 'text,label\n"a"b,x\n', Problem("this is not CSV: ',' expected after '\"'", "a.csv:2")),
        ("a.csv", 'text,label\n"ab,x\n', Problem("this is not CSV: unexpected end of data", "a.csv:2")),
        ("a.csv", "text,text\na,b\n", Problem("the column text stands twice in the header", "a.csv:1")),
        ("a.csv", "text,label\n", Problem("there are no rows", "a.csv")),
        (
            "a.csv",
            b"text,label\n\xe9,x\n",
            Problem("byte 11 is not UTF-8", "a.csv:2", "save the file as UTF-8"),
        ),
        ("a.parquet", "no", Problem("this is not parquet: ", "a.parquet")),
        (
            "a.xlsx",
            "no",
            Problem(
                "files ending in .xlsx are not read",
                "a.xlsx",
                "use one of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet",
            ),
        ),
        (
            "README",
            "no",
            Problem(
                "files ending in nothing are not read",
                "README",
                "use one of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet",
            ),
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(
    tmp_path: Path, name: str, content: str | bytes, expected: Problem
) -> None:
    found = problem(tmp_path, name, content)
    assert found.message.startswith(expected.message)
    assert (found.where, found.fix) == (expected.where, expected.fix)


def test_a_column_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    columns = {"text": "sentense", "label": "label"}
    assert problem(tmp_path, "a.jsonl", '{"sentence": "a", "label": 1}\n', columns) == Problem(
        "there is no column sentense (data.columns.text); found sentence, label",
        "a.jsonl:1",
        "did you mean sentence?",
    )


def test_a_template_with_an_unknown_column_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, "a.jsonl", GOOD, {"text": "{text}{more}", "label": "label"})
    assert found.message == "there is no column more (data.columns.text); found text, label"


def test_a_template_with_an_empty_value_is_refused(tmp_path: Path) -> None:
    content = GOOD.replace("}", ', "a": "b"}') + '{"text": "a", "label": 1, "a": null}\n'
    found = problem(tmp_path, "a.jsonl", content, {"text": "{text}{a}", "label": "label"})
    assert (found.message, found.where) == ("expected text in the column a, found nothing", "a.jsonl:2")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match="there is no such file") as caught:
        read_rows(Source(path="trian.jsonl"), CLASSIFY, {}, relative_to=tmp_path)
    assert caught.value.problems[0].fix == f"did you mean {tmp_path / 'train.jsonl'}?"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(Source(path=str(tmp_path)), CLASSIFY, {})


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ticktune.data.read._MAX_LINE", 1 << 20)
    found = problem(tmp_path, "a.jsonl", "[" + " " * (1 << 20))
    assert (found.message, found.where) == ("the line is longer than 1 MiB", "a.jsonl:1")


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.csv", "text,label\na,x\nb\nc,y,z\nd,x\n", ["a.csv:3", "a.csv:4"]),
        ("a.json", '[{"text": "a", "label": "x"}, 5, {"text": "d", "label": "x"}, null]', ["a.json:2", "a.json:4"]),
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "label": 5}\n{\n{"text": "d", "label": "x"}\n',
            ["a.jsonl:3", "a.jsonl:2"],
        ),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_where_they_may_be(
    tmp_path: Path, name: str, content: str, places: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    source = Source(path=str(tmp_path / name))
    rows = read_rows(source, CLASSIFY, {}, max_bad=2)
    assert rows.dataset.to_dict() == {"label": ["x", "x"], "text": ["a", "d"]}
    assert [problem.where for problem in rows.bad] == [str(tmp_path / place) for place in places]
    assert [rows.find(rows.where(i)) for i in range(2)] == [0, 1]
    assert rows.find(rows.bad[0].where) is None
    with pytest.raises(DataError, match=r"2 rows cannot be used, data\.max_bad_rows allows 1"):
        read_rows(source, CLASSIFY, {}, max_bad=1)
