"""benchmarks/speed.py: contenders are compared by rounds, on the same rows, and a peer runs without ticktune."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import speed
from benchmarks.curves import moving_median
from benchmarks.peers import ADAPTERHUB, PEERS, SORTED, Job, middle

FULL = "Trainer, full fine-tuning, default"


def run(seconds: float, tokens: int = 100) -> dict[str, Any]:
    return {
        "seconds": [seconds / 2, seconds / 2],
        "tokens": tokens,
        "losses": [1.0, 0.5],
        "trained": 12345,
        "first_step": 4.0,
        "peak_bytes": 1_500_000_000,
        "kept_bytes": 678.4,
    }


@pytest.fixture
def found() -> dict[str, Any]:
    """A case whose second round fell into a noisy hour: all take twice as long."""
    return {
        "title": "some model",
        "rows": 64,
        "batch": 32,
        "tokens": 100,
        "runs": {speed.OURS: [run(1.0), run(2.0)], FULL: [run(3.0), run(6.0)], "ticktune: norms": [run(0.5)]},
    }


def test_a_rate_is_all_tokens_by_all_seconds() -> None:
    assert speed.rate({"seconds": [1.0, 3.0], "tokens": 60}) == 15.0


def test_runs_are_compared_within_their_round(found: dict[str, Any]) -> None:
    assert speed.ratios(found, FULL) == [3.0, 3.0]
    assert speed.ratios(found, "ticktune: norms") == [0.5]


def test_the_table_says_rates_with_their_spread_and_what_is_compared(found: dict[str, Any]) -> None:
    head, _, mine, norms, full = speed.table(found).splitlines()
    assert head.count("|") == full.count("|")
    assert mine.startswith(f"| {speed.OURS} | 12,345 | 75 (50 to 100) |  | 678 | 1.50 GB | 4.0 s |")
    assert "| 0.50 × (0.50 to 0.50) |" in norms
    assert "| 25 (17 to 33) | 3.00 × (3.00 to 3.00) |" in full


def test_what_is_faster_than_ticktune_is_named(found: dict[str, Any]) -> None:
    assert speed.faster(found) == ["ticktune: norms"]


def test_the_section_says_whether_adapterhub_ran(found: dict[str, Any]) -> None:
    document = {
        "command": "measure",
        "machine": {"name": "CPU", "cores": 2, "threads": 1, "flags": ["avx512_bf16"]},
        "versions": dict.fromkeys(("torch", "transformers", "peft", "accelerate"), "1"),
        "cases": {"some": found},
    }
    assert "AdapterHub was not measured" in speed.section(document)
    hub = {"adapters": "1.3", "transformers": "4.57", "torch": "2"}
    text = speed.section({**document, "adapterhub": hub})
    assert "adapters 1.3, transformers 4.57" in text
    assert "2-core CPU with avx512_bf16, one thread" in text
    assert speed.table(found) in text


def test_curves_are_drawn_over_steps_with_a_key(found: dict[str, Any]) -> None:
    svg = ElementTree.fromstring(speed.curves(found))
    names = {"svg": "http://www.w3.org/2000/svg"}
    lines = svg.findall(".//svg:polyline", names)
    assert len(lines) == 2
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]
    texts = [text.text for text in svg.findall(".//svg:text", names)]
    assert {speed.OURS, FULL, "loss", "optimizer step"} <= set(texts)


def test_a_moving_median_leaves_out_a_spike() -> None:
    assert moving_median([3.0, 2.0, 9.0, 1.0]) == [2.5, 3.0, 2.0, 5.0]


def test_contenders_that_lack_an_environment_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_one(name: str, *_: Any) -> dict[str, Any]:
        asked.append(name)
        return run(1.0)

    monkeypatch.setattr(speed, "subject_of", lambda case: None)
    monkeypatch.setattr(speed, "job_of", lambda name, subject: Job(name, 0.0, [], 1, 1, "", None, {}, "", 0))
    monkeypatch.setattr(speed, "run_one", run_one)
    case = next(iter(speed.CASES.values()))
    before: dict[str, Any] = {"runs": {FULL: [run(1.0)]}}
    ran = list(speed.take_turns(before, case, 2, {}))
    assert ran == asked
    assert ADAPTERHUB not in ran
    assert ran[0] == speed.OURS
    assert ran.count(FULL) == 1  # one more than it had
    assert {name: len(runs) for name, runs in before["runs"].items()} == dict.fromkeys(
        [name for name in speed.CONTENDERS if name != ADAPTERHUB], 2
    )
    assert list(speed.take_turns({}, case, 1, {ADAPTERHUB: "python"})) == speed.CONTENDERS


def test_the_rows_of_middle_length() -> None:
    assert middle([5, 1, 9, 3, 7, 2], 2) == [3, 0]


def test_a_short_epoch_has_the_lengths_and_the_padding_of_a_long_one() -> None:
    lengths = [1 + 7 * row % 160 for row in range(4 * SORTED)]
    rows = speed.like_a_long_epoch(lengths, 4, 10)
    assert rows == sorted(set(rows))
    assert len(rows) == 40
    chosen = sorted(lengths[row] for row in rows)
    assert sum(chosen) / 40 == pytest.approx(sum(lengths) / len(lengths), rel=0.03)
    whole = sorted(lengths)
    batches = [whole[start : start + 4] for start in range(0, len(whole), 4)]
    assert all(chosen[start : start + 4] in batches for start in range(0, 40, 4))


def test_default_and_best_are_both_there() -> None:
    for method in {peer.method for peer in PEERS.values()} - {"ParBn"}:
        assert sorted(peer.is_best for peer in PEERS.values() if peer.method == method) == [False, True]


@pytest.mark.slow
def test_two_contenders_see_the_same_rows(tiny_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = tmp_path / "rows.jsonl"
    texts = [("w1 " * (1 + i % 3), i % 2) for i in range(2 * SORTED)]
    rows.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    recipe = {
        "task": "text-classification",
        "base": {"model": str(tiny_bert)},
        "data": {"train": {"path": str(rows)}, "columns": {"text": "text", "label": "label"}},
    }
    case = speed.Case("tiny", batch=2, steps=4, config=None, recipe=recipe)
    job = speed.job_of("", speed.subject_of(case))
    assert job.budget > 0
    assert len(job.rows) == case.batch * case.steps
    runs = {name: speed.run_one(name, case, job, {}) for name in (speed.OURS, FULL)}
    for found in runs.values():
        assert len(found["losses"]) == len(found["seconds"]) == case.steps
        assert found["tokens"] == sum(len(row["input_ids"]) for row in job.rows)
        assert found["first_step"] > 0
        assert found["kept_bytes"] > 0
    assert runs[speed.OURS]["trained"] < runs[FULL]["trained"]
