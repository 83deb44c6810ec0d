"""The command line as the real-data tests use it, and programs that know nothing of ticktune."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import Run
from tests.real_data.bootstrap import interval
from tests.real_data.cases import Case, Row, write_rows


def trained(ticktune: Run, recipe: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains in a folder and returns what the command printed."""
    return document(ticktune("train", recipe, *words, cwd=folder))


def predicted(ticktune: Run, run: str, rows: Path | str, folder: Path) -> list[dict[str, Any]]:
    """A run's prediction of each row of a file, in full precision as the stock programs have it."""
    done = ticktune("predict", run, rows, "--precision", "fp32", cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(ticktune: Run, case: Case, run: str, folder: Path) -> Path:
    """Merges a run and returns the merged folder, whose outputs were compared on some of the rows."""
    few = write_rows(folder / "few.jsonl", case.rows[:32])
    found = document(ticktune("export", run, "--merge", "--data", few, cwd=folder))["verification"]
    assert found["is_conclusive"]
    assert found["changed"] == 0
    assert found["max_difference"] <= found["tolerance"]
    return folder / run / "merged"


def document(done: "subprocess.CompletedProcess[str]") -> Any:
    """The JSON that a command printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stock(program: str, *words: Path | str, lines: list[Any]) -> list[Any]:
    """What a program without ticktune says, in a process of its own: JSON lines for the JSON lines that it is given."""
    server = _stock_server()
    assert server.stdin
    assert server.stdout
    request = {"program": program, "words": [*map(str, words)], "lines": [json.dumps(line) for line in lines]}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    assert answer["status"] == 0, answer["error"]
    return [json.loads(line) for line in answer["output"].splitlines()]


@functools.cache
def _stock_server() -> "subprocess.Popen[str]":
    """A process that has transformers imported, and not ticktune; programs run in forks of it."""
    words = [sys.executable, "-P", str(Path(__file__).with_name("stock_server.py"))]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=outside)


def better_than_the_head(case: Case, ticktune: Run, folder: Path) -> list[Row]:
    """Trains ours, and the head alone on the same rows; ours must be better on the test rows, whose answers it returns.

    That is: the 95 % interval of the gain, by a paired bootstrap over the rows, excludes 0.
    """
    rows = case.file(folder)
    ours, alone = case.ours(), case.alone()
    trained(ticktune, case.path, [*ours, "data.validation=null", "output=ours"], folder)
    answers = predicted(ticktune, "ours", rows, folder)
    trained(ticktune, case.path, [*alone, "data.validation=null", "output=head"], folder)
    assert_better(case, predicted(ticktune, "head", rows, folder), answers)
    return answers


def assert_better(case: Case, before: Sequence[Row], after: Sequence[Row]) -> None:
    """The second answers are better than the first ones, by more than chance."""
    first, second = case.scores(before), case.scores(after)
    gain, low, high = interval(first, second, case.measure)
    means = [float(case.measure(np.reshape(scores, (len(scores), -1)).mean(0))) for scores in (first, second)]
    sys.stderr.write(f"{case.recipe}: {means[0]:.3f} -> {means[1]:.3f}, {gain:+.3f} [{low:.3f}, {high:.3f}]\n")
    assert low > 0, (case.recipe, means, gain, low, high)
