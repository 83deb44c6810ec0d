"""Tiny recipes, and what the cases look at after a command."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.end_to_end.support import write_recipe

Row = dict[str, Any]
CHAT = (
    "{{ bos_token }} {% for m in messages %}{{ 'w50' if m.role == 'user' else 'w51' }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
)


def jsonl(path: Path, rows: Iterable[Row]) -> Path:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(count: int, start: int = 0) -> list[Row]:
    """Rows of two classes, all of them different."""
    words = [(f"w{i % 30}", f"w{i // 30 % 30}", ("w40", "w50")[i % 2]) for i in range(start, start + count)]
    return [{"text": " ".join(row), "label": {"w40": "small", "w50": "large"}[row[2]]} for row in words]


def classifier(folder: Path, base: Path, rows: list[Row] | None = None, /, **changes: Any) -> Path:
    """A classifier on 24 rows in 3 steps, and 10 validation rows."""
    jsonl(folder / "train.jsonl", labelled(24) if rows is None else rows)
    jsonl(folder / "validation.jsonl", labelled(10, start=500))
    return _recipe(folder, base, "text-classification", changes)


def writer(folder: Path, base: Path, rows: list[Row], /, **changes: Any) -> Path:
    """A causal model on the rows, without validation."""
    jsonl(folder / "train.jsonl", rows)
    return _recipe(folder, base, "causal-lm", {**changes, "data": {"validation": None, **changes.get("data", {})}})


def _recipe(folder: Path, base: Path, task: str, changes: Row) -> Path:
    recipe = {
        "task": task,
        "base": {"model": str(base)},
        "ticks": {"dim": 4},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 16},
        "optimizer": {"lr": 1e-2},
        "training": {"epochs": 1, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        "evaluation": {"save": "last"},
        "logging": {"every": 1},
        "output": "run",
    }
    return write_recipe(folder, recipe, changes)


def changed_base(folder: Path, base: Path, change: Callable[[dict[str, Any]], None], name: str = "base") -> Path:
    """A copy of a base whose tensors, name -> tensor, were changed."""
    from safetensors.torch import load_file, save_file

    copy = folder / name
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def tokenizer_base(folder: Path, base: Path, name: str = "base", **entries: Any) -> Path:
    """A copy of a base whose tokenizer_config.json was changed; None takes an entry away."""
    copy = folder / name
    shutil.copytree(base, copy)
    path = copy / "tokenizer_config.json"
    config = {k: v for k, v in {**json.loads(path.read_text()), **entries}.items() if v is not None}
    path.write_text(json.dumps(config), encoding="utf-8")
    return copy


def refused(done: "subprocess.CompletedProcess[str]", code: int, *said: str) -> str:
    """Asserts that a command ended with a code and one clear message; returns that message."""
    error = " ".join(done.stderr.split())
    assert done.returncode == code, error
    for text in said:
        assert text in error
    assert "Traceback" not in error
    assert "this is a bug" not in error
    return error


def done_well(done: "subprocess.CompletedProcess[str]", *said: str) -> str:
    """Asserts that a command succeeded and said something; returns what it said."""
    return refused(done, 0, *said)


def record(run: Path) -> Any:
    """A run's record."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def logged(run: Path, key: str = "loss") -> list[float]:
    """What a run logged in each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[key] for line in lines if key in line]


def weights(run: Path) -> bytes:
    """A run's trained tensors, as they are in the file."""
    return (run / "adapter/adapter.safetensors").read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
