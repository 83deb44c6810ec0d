"""A training set that is larger than what may be held in memory: bounded memory, and the same weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.support import classification, write_recipe
from ticktune.console import Console
from ticktune.data import read, store
from ticktune.errors import ResourceError
from ticktune.recipe.load import load_recipe
from ticktune.run import train

_ROWS = 1_200
_LARGE = 40_000_000  # bytes
_BOUND = 150  # MB of anonymous memory more than of few bytes; it is 70, and 300 where the rows are held in memory
_TRAIN = """
import sys
from ticktune.cli import program
for recipe in sys.argv[1:]:
    sys.argv[1:] = ["train", recipe]
    try:
        program()
    except SystemExit as end:
        if end.code:
            raise
    print("done", flush=True)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/status is Linux's")


def _write(folder: Path, base: Path, size: int) -> Path:
    """A recipe, and rows of so many bytes in all: a word that matters, and a long one of few characters."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(_ROWS):
            text = f"w{i % 50} " + "\N{SNOWBOARDER}" * (size // _ROWS // 4)
            file.write(json.dumps({"text": text, "label": i % 2}, ensure_ascii=False) + "\n")
    return write_recipe(
        folder,
        {
            "task": "text-classification",
            "base": {"model": str(base)},
            "ticks": {"dim": 8},
            "data": {"train": "train.jsonl", "validation": {"fraction": 0.1}, "max_length": 16},
            "training": {"steps": 2, "batch_size": 8, "precision": "fp32", "device": "cpu"},
            "output": str(folder / "run"),
        },
        {},
    )


@linux
def test_memory_does_not_grow_with_the_training_set(tmp_path: Path, tiny_bert: Path) -> None:
    recipes = [_write(tmp_path / "small", tiny_bert, 0), _write(tmp_path / "large", tiny_bert, _LARGE)]
    command = [sys.executable, "-c", _TRAIN, *map(str, recipes)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with (
        (tmp_path / "out").open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as run,
    ):
        peaks = [0, 0]
        while run.poll() is None:
            lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
            found = [int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")]
            phase = (tmp_path / "out").read_text().count("done")
            peaks[min(phase, 1)] = max(peaks[min(phase, 1)], *found, 0)
            time.sleep(0.01)
    output = (tmp_path / "out").read_text()
    assert (run.returncode, output.count("done")) == (0, 2), output
    assert peaks[0] > 50
    assert peaks[1] - peaks[0] < _BOUND
    assert list((tmp_path / "cache/ticktune").iterdir()) == []


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


def test_a_run_whose_rows_cannot_be_kept_says_where_and_what_to_do(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = classification(tmp_path, tiny_bert)
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setattr(store, "LIMIT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ResourceError) as caught:
        train(load_recipe(recipe, [f"output={tmp_path / 'run'}"]), Console())
    problem = caught.value.problems[0]
    assert (problem.message, problem.where) == ("cannot write here: Not a directory", str(tmp_path / "cache/ticktune"))
    assert "set XDG_CACHE_HOME to a directory on another disk" in problem.fix
