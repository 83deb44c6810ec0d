"""What tests of refusals share: a folder with a tiny recipe, and a command that must be refused without a trace."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.launch import launch

ROWS = "".join(
    json.dumps({"text": f"w{i % 5} w{30 + i % 3}", "label": ["small", "large"][i % 2]}) + "\n" for i in range(8)
)


def recipe_text(base: Path, more: str = "") -> str:
    """A recipe of two steps; ``more`` is put below its last group, ``training``."""
    return (
        "task: text-classification\n"
        f"base: {{model: {json.dumps(str(base))}}}\n"
        "data:\n  train: rows.jsonl\n  max_length: 16\n"
        "output: runs/tiny\n"
        "ticks: {dim: 4}\n"
        "training:\n  steps: 2\n  batch_size: 4\n  precision: fp32\n  device: cpu\n"
    ) + more


def contents(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file, and where each link points, below a folder; run locks are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.name != ".lock":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(
    code: int,
    *words: object,
    cwd: Path,
    said: tuple[str, ...] = (),
    watched: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> str:
    """Runs a command that must end with this exit code, say this, show no traceback and leave every file as it was.

    Args:
        code: The exit code.
        words: The command line.
        cwd: Where it runs.
        said: What stands in its standard error.
        watched: The folder whose files stay; None: ``cwd``.
        env: Changes of the environment.
        timeout: Seconds after which it hangs.

    Returns:
        What it wrote to standard error.
    """
    before = contents(watched or cwd)
    done = launch(*words, cwd=cwd, env=env, timeout=timeout)
    assert done.returncode == code, done.stderr
    for text in said:
        assert text in done.stderr, done.stderr
    assert done.stderr.startswith(("error[", "warning:")) or "\nerror[" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert contents(watched or cwd) == before
    return done.stderr


def inspected(recipe: Path | str, *words: object, cwd: Path) -> dict[str, Any]:
    """What ``inspect`` says of a recipe, as JSON."""
    done = launch("inspect", recipe, *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document
