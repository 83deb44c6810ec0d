"""A training set that is larger than what may be held in memory: bounded memory, and the same weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.end_to_end.support import classification, write_recipe
from ticktune.console import Console
from ticktune.data import read, store
from ticktune.recipe.load import load_recipe
from ticktune.run import train

_ROWS = 2_500
_LARGE = 60  # MB
_BOUND = 90  # MB of anonymous memory more than with as many short rows; held in memory, the rows take 260 MB more

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/status is Linux's")


def _peak(folder: Path) -> int:
    """The most anonymous memory that a training run takes, in MB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ticktune", "train", "recipe.yaml"],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return peak // 1024


def _write(folder: Path, base: Path, length: int) -> Path:
    """A folder with a recipe and rows of so many bytes: a few words that matter, and one long one."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(_ROWS):
            file.write(json.dumps({"text": f"w{i % 50} " + "x" * length, "label": i % 2}) + "\n")
    write_recipe(
        folder,
        {
            "task": "text-classification",
            "base": {"model": str(base)},
            "ticks": {"dim": 8},
            "data": {"train": "train.jsonl", "validation": {"fraction": 0.1}, "max_length": 16},
            "training": {"steps": 2, "batch_size": 8, "precision": "fp32", "device": "cpu"},
            "output": "run",
        },
        {},
    )
    return folder


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_training_set(tmp_path: Path, tiny_bert: Path) -> None:
    small = _peak(_write(tmp_path / "small", tiny_bert, 10))
    large = _peak(_write(tmp_path / "large", tiny_bert, _LARGE * 1_000_000 // _ROWS))
    assert large - small < _BOUND
    kept = [path.name for path in (tmp_path / "large/cache/ticktune").iterdir()]
    assert kept == ["examples"]  # the encoded rows, to be used again; nothing of the rows


def test_the_weights_do_not_depend_on_what_is_held_in_memory(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = classification(tmp_path, tiny_bert)
    train(load_recipe(recipe, [f"output={tmp_path / 'held'}"]), Console())
    monkeypatch.setattr(store, "LIMIT", 0)
    monkeypatch.setattr(read, "PART_ROWS", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(load_recipe(recipe, [f"output={tmp_path / 'mapped'}"]), Console())
    assert list((tmp_path / "cache/ticktune").iterdir()) == []
    held, mapped = (tmp_path / name / "adapter" for name in ("held", "mapped"))
    assert (held / "adapter.safetensors").read_bytes() == (mapped / "adapter.safetensors").read_bytes()
    assert json.loads((held / "adapter.json").read_text()) == json.loads((mapped / "adapter.json").read_text())


@linux
def test_a_full_disk_ends_a_run_with_its_place(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    folder = _write(tmp_path / "full", tiny_bert, 16_000)
    (folder / "cache").write_text("a file where the cache should be")
    done = ticktune("train", "recipe.yaml", cwd=folder, env={"XDG_CACHE_HOME": str(folder / "cache")})
    assert done.returncode == 8
    assert f"{folder}/cache/ticktune: cannot write here: Not a directory" in done.stderr
    assert "set XDG_CACHE_HOME to a directory on another disk" in done.stderr
