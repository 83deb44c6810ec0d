"""What is printed, where, and how text from outside is escaped."""

import io
import json
import sys
from typing import Any

import pytest

from ticktune.console import Console, Progress, clean, clean_lines, duration, figure, size_text, table_of
from ticktune.errors import DataError, Interrupted, Problem, RecipeError, TicktuneError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, name: str = "stdout") -> Terminal:
    # Called inside a test: between fixtures and test, pytest puts its own streams back.
    stream = Terminal()
    monkeypatch.setattr(sys, name, stream)
    return stream


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("a\x7fb\x9bc", "a\\x7fb\\x9bc"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("a\u2028b", "a\\u2028b"),
        ("é漢🙂[bold]", "é漢🙂[bold]"),
        (3, "3"),
    ],
)
def test_control_and_bidirectional_characters_are_made_visible(text: object, shown: str) -> None:
    assert clean(text) == shown


def test_line_ends_stay_in_texts_of_several_lines() -> None:
    assert clean_lines("a\nb\x1b\r") == "a\nb\\x1b\\x0d"


def test_an_error_shows_kind_place_message_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(RecipeError("unknown key", where="r.yaml:1:1 a", fix="did you mean b?"))
    shown = capsys.readouterr()
    assert shown.err == "error[recipe]: r.yaml:1:1 a: unknown key\n  fix: did you mean b?\n"
    assert shown.out == ""


def test_an_error_with_several_problems_shows_each(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(DataError([Problem("one"), Problem("two", "here")]))
    assert capsys.readouterr().err == "error[data]: one\nerror[data]: here: two\n"


def test_an_error_escapes_what_comes_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(DataError("found \x1b]0;x\x07", where="a\nb:1", fix="\u202ex"))
    assert capsys.readouterr().err == ("error[data]: a\\x0ab:1: found \\x1b]0;x\\x07\n  fix: \\u202ex\n")


def test_the_text_of_an_error_holds_every_problem() -> None:
    assert str(TicktuneError([Problem("one", "x:1"), Problem("two")])) == "x:1: one\ntwo"


def test_an_interruption_has_the_exit_code_of_its_signal() -> None:
    assert [Interrupted("x", signal_number=n).exit_code for n in (1, 2, 15)] == [129, 130, 143]


def test_notes_are_silent_under_quiet_but_warnings_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("a note")
    console.warn("a warning\x1b")
    assert capsys.readouterr().err == "warning: a warning\\x1b\n"


def test_a_result_is_json_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result({"text": "é"}, [["a"], ["b"]])
    assert capsys.readouterr().out == '{"text": "é"}\n'


def test_a_result_is_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")  # no colours
    Console().result({}, [["metric", "value"], ["[red]f1", "0.5\x1b"]], title="[b]x")
    lines = [line.strip() for line in terminal.getvalue().splitlines() if line.strip()]
    assert lines[0] == "[b]x"
    assert lines[1].split() == ["metric", "value"]
    assert lines[3].split() == ["[red]f1", "0.5\\x1b"]


def test_a_table_breaks_no_word_where_the_longest_fit_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["stack", "width field", "note"], ["text", "shared_expert_intermediate_size", "gated, merges " * 6]]
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        Console().table(rows)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        words = " ".join(lines).split()
        assert words.count("shared_expert_intermediate_size") == 1
        assert (words.count("gated,"), words.count("merges")) == (6, 6)
    # No room for the longest words: they are broken, and nothing is cut off.
    monkeypatch.setenv("COLUMNS", "30")
    Console().table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert "size" in "".join(lines)


def test_a_result_is_json_on_a_terminal_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    Console(as_json=True).result({"a": 1}, [["a"]])
    assert terminal.getvalue() == '{"a": 1}\n'


def test_json_escapes_what_a_terminal_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    text = "a\x1b\x7f\x9b\u202e\u2028é"
    Console(as_json=True).line({"text": text}, "")
    assert terminal.getvalue() == '{"text": "a\\u001b\\u007f\\u009b\\u202e\\u2028é"}\n'
    assert json.loads(terminal.getvalue()) == {"text": text}


def test_a_line_is_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    Console().line({"a": 1}, "x\x1b")
    assert terminal.getvalue() == "x\\x1b\n"


def test_a_stream_that_cannot_show_a_character_gets_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    Console().warn("é漢")
    assert raw.getvalue() == b"warning: \\xe9\\u6f22\n"


def test_half_of_a_surrogate_pair_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Console().warn("\udc80")
    assert capsys.readouterr().err == "warning: \\udc80\n"


def test_a_traceback_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("a\x1bb")
    except ValueError:
        Console().traceback()
    assert capsys.readouterr().err.endswith("ValueError: a\\x1bb\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.6, "1h00m"),
        (7800, "2h10m"),
    ],
)
def test_a_duration_is_rounded_before_it_is_split(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0000"),
        (0.91234, "0.9123"),
        (-0.5, "-0.5000"),
        (12345.678, "1.235e+04"),
        (1e-5, "1e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_a_figure_has_four_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_figures_become_rows_of_a_table() -> None:
    assert table_of([("f1", 0.5)]) == [["metric", "value"], ["f1", "0.5000"]]


def progress(**options: Any) -> Progress:
    return Progress(100, 0, **{"live": False, "quiet": False, **options})


def test_progress_without_a_terminal_is_one_line_in_ten_seconds_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("ticktune.console.time.monotonic", lambda: now[0])
    with progress() as bar:
        for step in range(1, 101):
            now[0] += 0.25
            bar.step(step, "loss 1", 100 - step)
    steps = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["1/100", "41/100", "81/100", "100/100"]


def test_progress_is_silent_under_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as bar:
        bar.step(100, "loss 1", 0)
        bar.note("x")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_does_not_read_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on_terminal(monkeypatch, "stderr")
    with progress(live=True) as bar:
        bar.step(3, "loss [red]1", 3.0)
        bar.note("[bold]x\x07")
    assert "[bold]x\\x07" in stream.getvalue()
    assert "loss [red]1" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0.0 kB"), (48_128, "48.1 kB"), (2_500_000, "2.5 MB"), (5_000_000_000, "5.0 GB")]
)
def test_bytes_are_shown_in_a_unit_of_their_size(count: int, shown: str) -> None:
    assert size_text(count) == shown
