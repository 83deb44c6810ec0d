"""Same recipe, same weights; killed or stopped anywhere and resumed, still the same weights, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.end_to_end.support import classification
from tests.launch import Launched
from tests.reliability.catalogue import case

_FILES = ("adapter.safetensors",)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_step(process: Launched, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while steps_logged(run) < step:
        assert process.poll() is None, process.text(2)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    # Enough steps that a signal meets a running loop; dropout is on in the base, the last batch is odd.
    return classification(
        tmp_path_factory.mktemp("resume"),
        tiny_bert,
        training={"epochs": 25},
        logging={"every": 1},
        checkpoints={"every": 7},
    )


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("whole")
    # A program of its own, where the others are forks of one that has its imports done: no difference.
    words = [sys.executable, "-m", "ticktune", "train", str(recipe)]
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work / "runs/tiny"


def assert_same(run: Path, other: Path) -> None:
    for name in _FILES:
        assert (run / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    steps = [[json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other)]
    ignored = ("rows_per_second",)
    plain = [[{k: v for k, v in line.items() if k not in ignored} for line in lines] for lines in steps]
    assert plain[0] == plain[1]


@case("C3", "C4")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_weights(
    number: signal.Signals, code: int, recipe: Path, uninterrupted: Path, tmp_path: Path, ticktune: Run
) -> None:
    with Launched(["train", str(recipe)], tmp_path) as process:
        wait_for_step(process, tmp_path / "runs/tiny", 20)
        process.send_signal(number)
        stopped = process.completed(timeout=60)
    assert stopped.returncode == code, stopped.stderr
    assert f"to go on, run: ticktune train {recipe}\n" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert json.loads((tmp_path / "runs/tiny/run.json").read_text())["status"] == "interrupted"
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    assert_same(tmp_path / "runs/tiny", uninterrupted)


@case("C1")
def test_killed_several_times_and_resumed_gives_the_same_weights(
    recipe: Path, uninterrupted: Path, tmp_path: Path, ticktune: Run
) -> None:
    for step in (10, 60, 130):
        with Launched(["train", str(recipe)], tmp_path) as process:
            wait_for_step(process, tmp_path / "runs/tiny", step)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "runs/tiny", uninterrupted)


def test_the_same_recipe_twice_gives_the_same_weights(
    recipe: Path, uninterrupted: Path, tmp_path: Path, ticktune: Run
) -> None:
    assert ticktune("train", recipe, cwd=tmp_path).returncode == 0
    assert_same(tmp_path / "runs/tiny", uninterrupted)


def test_evaluating_more_often_does_not_change_the_weights(
    recipe: Path, uninterrupted: Path, tmp_path: Path, ticktune: Run
) -> None:
    done = ticktune("train", recipe, "evaluation.every=3", "evaluation.save=last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    final = sorted((tmp_path / "runs/tiny/checkpoints").glob("step-*"))[-1] / "adapter.safetensors"
    other = sorted((uninterrupted / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors"
    assert final.read_bytes() == other.read_bytes()
