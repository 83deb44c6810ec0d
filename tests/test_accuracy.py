"""benchmarks/accuracy.py: which learning rate is taken, and when a threshold counts as reached."""

from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.clock import go_on
from benchmarks.peers import Job, Study

FIRST, SECOND, *_ = accuracy.GRID


def run(contender: str, lr: float, seed: int, *found: tuple[int, float, float]) -> dict[str, Any]:
    return {"contender": contender, "lr": lr, "seed": seed, "evaluations": list(found), "trained": 1234}


def thrice(step: int, seconds: float, accuracy: float) -> list[tuple[int, float, float]]:
    """Three evaluations that end so."""
    return [(step, seconds, accuracy)] * 3


def test_a_threshold_is_reached_when_the_median_of_three_evaluations_is_as_good() -> None:
    one = run(FIRST, 1e-3, 1, (10, 5.0, 0.70), (20, 9.0, 0.80), (30, 14.0, 0.79), (40, 20.0, 0.84), (50, 25.0, 0.82))
    assert accuracy.reached(one, 0.79) == (30, 14.0)
    assert accuracy.seconds_to(one, 0.80) == 20.0
    assert accuracy.seconds_to(one, 0.82) == 25.0
    assert accuracy.seconds_to(one, 0.84) is None  # once is chance


def test_results_of_another_machine_or_setting_are_not_gone_on_with() -> None:
    document: dict[str, Any] = {}
    go_on(document, machine={"name": "a"}, settings={"epochs": 2})
    go_on(document, machine={"name": "a"}, settings={"epochs": 2})
    assert document["settings"] == {"epochs": 2}
    with pytest.raises(SystemExit, match="of other settings"):
        go_on(document, machine={"name": "a"}, settings={"epochs": 3})


def test_the_better_rate_gets_further_and_then_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "THRESHOLDS", (0.80, 0.83, 0.85))
    far = run(FIRST, 1e-3, 0, *thrice(10, 50.0, 0.84))
    soon = run(FIRST, 2e-3, 0, *thrice(10, 5.0, 0.81))
    sooner = run(FIRST, 3e-3, 0, *thrice(10, 40.0, 0.83))
    assert accuracy.better([far, soon]) == 1e-3
    assert accuracy.better([far, soon, sooner]) == 3e-3
    assert accuracy.better([run(FIRST, 4e-3, 0, *thrice(10, 1.0, 0.5)), soon]) == 2e-3


def test_rates_are_chosen_with_a_seed_of_their_own() -> None:
    runs: list[dict[str, Any]] = []
    asked = []
    for contender, lr, seed in accuracy.planned(runs, 2):
        asked.append((contender, lr, seed))
        runs.append(run(contender, lr, seed, *thrice(10, 5.0, 0.85 if lr == max(accuracy.GRID[contender]) else 0.80)))
    choosing = [entry for entry in asked if entry[2] == accuracy.CHOOSING_SEED]
    assert choosing == asked[: 2 * len(accuracy.GRID)]
    assert {(contender, lr) for contender, lr, seed in asked if seed != accuracy.CHOOSING_SEED} == {
        (contender, max(rates)) for contender, rates in accuracy.GRID.items()
    }
    assert len(asked) == 4 * len(accuracy.GRID)


def test_the_table_says_what_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "THRESHOLDS", (0.80, 0.83, 0.85))
    runs = [
        run(FIRST, 1e-3, 0, *thrice(10, 1.0, 0.9)),  # chosen by: not told
        run(FIRST, 1e-3, 1, *thrice(10, 20.0, 0.82), *thrice(20, 40.0, 0.86)),
        run(FIRST, 1e-3, 2, *thrice(10, 22.0, 0.82), *thrice(20, 44.0, 0.84)),
        run(FIRST, 1e-3, 3, *thrice(10, 24.0, 0.82), *thrice(20, 48.0, 0.84)),
        run(SECOND, 1e-3, 1, *thrice(10, 20.0, 0.5)),
    ]
    _, _, first, second = accuracy.table({"runs": runs}).splitlines()
    assert first.startswith(f"| {FIRST} | 0.001 | 1,234 | 22 (20 to 24) | 44 (40 to 48) | - (40 to 40; 2 of 3 not) |")
    assert first.endswith("| - (20 to 20; 2 of 3 not) |")
    assert second.count("not reached") == 4


def test_a_peer_is_given_the_validation_rows_and_ticktune_reads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def run_job(who: str, python: str, module: str, job: dict[str, Any], *words: str) -> dict[str, Any]:
        given.append({"module": module, **job})
        return {"evaluations": [], "trained": 1}

    monkeypatch.setattr(accuracy, "run_job", run_job)
    job = Job("", 0.0, [], 1, 0, "", None, {}, "", 0)
    rows = [{"input_ids": [1], "labels": 0}]
    peer = "Trainer, full fine-tuning, best"
    found = accuracy.run_one(peer, 1e-4, 3, job, rows)
    accuracy.run_one(FIRST, 2e-4, 3, job, rows)
    assert (found["contender"], found["lr"], found["seed"]) == (peer, 1e-4, 3)
    assert given[0]["contender"] == peer
    assert Study(**given[0]["study"]).validation == rows
    assert given[1]["module"] == "benchmarks.accuracy"
    assert Study(**given[1]["study"]).validation == []
