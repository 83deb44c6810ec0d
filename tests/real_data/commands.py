"""The command line as the real-data tests use it, and programs that know nothing of ticktune."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Run


def trained(ticktune: Run, recipe: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains in a folder and returns what the command printed."""
    return document(ticktune("train", recipe, *words, cwd=folder))


def predicted(ticktune: Run, run: str, rows: Path | str, folder: Path) -> list[dict[str, Any]]:
    """A run's prediction of each row of a file."""
    done = ticktune("predict", run, rows, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(ticktune: Run, run: str, folder: Path) -> Path:
    """Merges a run and returns the merged folder, whose outputs were compared."""
    found = document(ticktune("export", run, "--merge", cwd=folder))["verification"]
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
    program += "\nassert not any(name.partition('.')[0] == 'ticktune' for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
