import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from ticktune.report.chart import Line, line_chart, smooth
from ticktune.report.page import report_page

DASH = "\u2013"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></pre></svg><script>alert(1)</script>",
    "<!-- ",
    "]]><![CDATA[",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "\x00\x1b[31m\u202e\ud800",
]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed in the wrong order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            assert tag not in self._open, f"</{tag}> while {self._open} are open"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
        if self.cells and {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        found = [cells for cells in self.cells if cells[: len(start)] == list(start)]
        assert found, f"no row {start} in {self.cells}"
        return found[0]


def record(**changes: Any) -> dict[str, Any]:
    return {
        "status": "complete",
        "started_at": "2026-01-02T03:04:05+0000",
        "finished_at": "2026-01-02T03:05:05+0000",
        "recipe": {"task": "text-classification", "training.seed": 42, "evaluation.save": "best"},
        "hashes": {"base": "ab" * 32, "data": {"train": "cd" * 32}, "tokenizer": "ef" * 32},
        "base": {"name": "org/model", "commit": None, "fingerprint": "ab" * 32},
        "rows": {"train": 1234, "validation": 80},
        "trained_parameters": 100,
        "base_parameters": 9900,
        "compute": {"device": "cpu", "name": "Some CPU", "precision": "fp32", "threads": 2},
        "versions": {"ticktune": "9.8.7", "torch": "6.5.4"},
        "steps": 20,
        "chosen_step": 10,
        "metric": "accuracy",
        "metrics": {"accuracy": 0.75, "loss": 0.5},
        "base_metrics": {"accuracy": 0.1, "loss": 2.0},
        "skipped_steps": 0,
        "training_seconds": 75.4,
        "rows_per_second": 136.41,
    } | changes


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {"step": number, "loss": 2 - number / 20, "lr": 2e-4, "grad_norm": 1.0} | changes


def evaluation(number: int, **metrics: Any) -> dict[str, Any]:
    return {"step": number, "split": "validation", "metrics": metrics}


ENTRIES = [
    evaluation(0, accuracy=0.1, loss=2.0),
    step(1),
    step(10),
    evaluation(10, accuracy=0.75, loss=0.5),
    step(20),
    evaluation(20, accuracy=0.7, loss=0.6),
]


def coordinates(page: str) -> Iterator[list[tuple[float, float]]]:
    for points in re.findall(r'<polyline[^>]* points="([^"]*)"', page):
        pairs = [point.split(",") for point in points.split()]
        yield [(float(x), float(y)) for x, y in pairs]


def with_value_everywhere(value: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Every text of the record, every key that a user or a file can name, every entry."""

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: replaced(inner) for key, inner in part.items()}
        return value if isinstance(part, str) or part is None else part

    hostile = replaced(record(metric=value, metrics={value: 0.75}, base_metrics={value: 0.1}))
    hostile["versions"][value] = value
    hostile["rows"][value] = value
    hostile["hashes"]["data"][value] = value * 3
    entries = [evaluation(0, **{value: 0.1}), step(1), evaluation(10, **{value: 0.75}), step(2, step=value)]
    return hostile, entries, f"task: {value}\nbase: {value}"


def test_shows_the_facts_of_the_run() -> None:
    page = Page(report_page(record(), ENTRIES, "task: text-classification\n"))
    for fact in (
        "text-classification",
        "on org/model",
        "Chosen step10best accuracy",
        "1m15s",
        "75.4 s",
        "1.00 % of all parameters",
        "136.4rows/s",
        "Some CPUcpu, fp32",
        "task: text-classification\n",
    ):
        assert fact in page.text
    assert page.row("metric") == ["metric", "before", "after", "change"]
    assert page.row("accuracy") == ["accuracy", "0.1000", "0.7500", "+0.6500"]
    assert page.row("loss") == ["loss", "2.0000", "0.5000", "\u22121.5000"]
    assert page.row("20") == ["20", "0.7000", "0.6000"]
    assert page.row("torch") == ["torch", "6.5.4"]
    assert page.row("train rows") == ["train rows", "1,234"]


def test_hashes_are_short_and_whole_in_the_title() -> None:
    page = Page(report_page(record(), ENTRIES, ""))
    assert page.row("base files") == ["base files", "abababababab\u2026"]
    assert ("code", "title", "ab" * 32) in page.attributes


def test_page_loads_and_runs_nothing() -> None:
    text = report_page(record(), ENTRIES, "")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use", "image", "a"} & set(page.tags)
    assert not {name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "href")}
    assert not re.search(r"url\(|@import|https?:", text)


@pytest.mark.parametrize("value", HOSTILE)
def test_values_cannot_inject_markup(value: str) -> None:
    hostile = Page(report_page(*with_value_everywhere(value)))
    tame = Page(report_page(*with_value_everywhere("a" * len(value))))
    assert hostile.tags == tame.tags
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in tame.attributes]


@pytest.mark.parametrize("value", HOSTILE[:-1])
def test_values_are_shown_as_they_are(value: str) -> None:
    page = Page(report_page(record(metrics={value: 0.5}, base_metrics={}), ENTRIES, value))
    assert page.row(value) == [value, DASH, "0.5000", DASH]
    assert value in page.text


def test_control_characters_and_lone_surrogates_become_visible() -> None:
    page = report_page(record(), [], "a\x1b[31m\u202e\ud800\tb")
    assert r"a\x1b[31m\u202e\ud800" in page
    page.encode("utf-8")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_entries(count: int) -> None:
    page = Page(report_page(record(), ENTRIES[:count], ""))
    assert page.tags.count("figure") == 4
    assert ("Nothing was logged." in page.text) == (count < 2)


def test_one_point_is_a_dot() -> None:
    assert '<circle class="main"' in report_page(record(), [step(1)], "")


def test_a_run_without_validation() -> None:
    steps = [step(1), step(10)]
    page = Page(report_page(record(metrics={}, base_metrics={}, chosen_step=20), steps, ""))
    assert "There are no validation metrics." in page.text
    assert "There was no evaluation." in page.text
    assert "Chosen step20the last" in page.text
    assert "went from" not in page.text


@pytest.mark.parametrize("empty", [{}, {"metrics": None, "versions": None, "compute": [], "hashes": "x"}])
def test_a_record_without_anything(empty: dict[str, Any]) -> None:
    page = Page(report_page(empty, [], ""))
    assert page.row("threads") == ["threads", DASH]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, True, "0.5", [1], 10**400, 1e300])
def test_what_is_no_finite_number_is_a_dash_and_not_drawn(value: Any) -> None:
    entries = [*ENTRIES, step(15, loss=value, lr=value, grad_norm=value), evaluation(15, accuracy=value)]
    changed = record(metrics={"accuracy": value}, steps=value, training_seconds=value, trained_parameters=value)
    text = report_page(changed, entries, "")
    page = Page(text)
    assert page.row("accuracy") == ["accuracy", "0.1000", DASH, DASH]
    assert page.row("15") == ["15", DASH, DASH]
    assert list(coordinates(text)) == list(coordinates(report_page(record(), ENTRIES, "")))


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0],
        [-1e99, 0.0, 1e99],
        [5e-324, 0.0, 1e-300],
        [1e15, 1e15 + 1, 1e15 + 2],
        [-3.0, -2.0, -1.0],
        [123456.7, 123456.8, 123456.9],
    ],
)
def test_curves_stay_inside_their_chart(losses: list[float]) -> None:
    entries = [step(number, loss=loss) for number, loss in enumerate(losses, start=1)]
    found = list(coordinates(report_page(record(), entries, "")))
    assert len(found) == 4
    for x, y in (point for line in found for point in line):
        assert 0 <= x <= 460
        assert 0 <= y <= 252


def test_long_runs_are_thinned_but_keep_their_spikes() -> None:
    entries = [step(number, loss=9.0 if number == 33_333 else 1.0 + number % 2) for number in range(1, 50_001)]
    text = report_page(record(), entries, "")
    raw, smoothed, *_ = coordinates(text)
    assert 700 <= len(raw) <= 800
    assert len(smoothed) <= 800
    assert raw == sorted(raw, key=lambda point: point[0])
    top = min(y for _, y in raw)
    assert sum(y == top for _, y in raw) == 1
    assert len(text) < 120_000


def test_thousands_of_evaluations_have_no_dots() -> None:
    entries = [evaluation(number, accuracy=0.5, loss=1.0) for number in range(3000)]
    page = Page(report_page(record(chosen_step=2000), entries, ""))
    assert page.tags.count("circle") == 1  # the chosen one
    assert len(page.cells) > 3000


def test_the_chosen_step_is_marked_in_the_curve_and_in_the_table() -> None:
    text = report_page(record(), ENTRIES, "")
    assert text.count("chosen: step 10<") == 1
    assert '<tr class="chosen"><th scope="row">10</th>' in text


def test_axes_have_ticks_labels_and_units() -> None:
    page = Page(line_chart("Learning rate", "lr", [Line([(0.0, 0.0), (100.0, 2e-4)], "main")], 100.0))
    for label in ("2e\u22124", "1e\u22124", "100", "lr", "optimizer step"):
        assert label in page.text


def test_smoothing_keeps_a_constant_and_damps_noise() -> None:
    assert smooth([(float(x), 2.0) for x in range(7)]) == [(float(x), 2.0) for x in range(7)]
    noisy = smooth([(float(x), float(x % 2)) for x in range(1000)])
    assert all(abs(y - 0.5) < 0.05 for _, y in noisy)
    assert smooth([]) == []


def test_is_the_same_for_a_record_read_from_json() -> None:
    again = json.loads(json.dumps(record()))
    assert report_page(again, json.loads(json.dumps(ENTRIES)), "a: 1") == report_page(record(), ENTRIES, "a: 1")
