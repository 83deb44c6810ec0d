"""training.gradient_checkpointing and training.compile on the command line: results, records, resume, refusals."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tests.models as models
from tests.end_to_end.support import classification
from tests.launch import launch
from tests.reliability.faults import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a recipe, and its run ``plain``."""
    found = tmp_path_factory.mktemp("fast-paths")
    (found / "base").mkdir()
    models.save_tiny_bert(found / "base")
    classification(found, found / "base", ticks={"dropout": 0.1}, training={"epochs": 1}, logging={"every": 1})
    _done(found, "plain")
    return found


def _train(folder: Path, name: str, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return launch("train", folder / "recipe.yaml", f"output=runs/{name}", *words, cwd=folder, **options)


def _done(folder: Path, name: str, *words: str) -> str:
    done = _train(folder, name, *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _adapter(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "adapter/adapter.safetensors"


def test_checkpointing_changes_no_bit_and_its_figures_are_recorded(folder: Path) -> None:
    said = " ".join(_done(folder, "checkpointed", "training.gradient_checkpointing=true").split())
    assert _adapter(folder, "checkpointed").read_bytes() == _adapter(folder, "plain").read_bytes()
    record = json.loads((folder / "runs/checkpointed/run.json").read_text())["activations"]
    assert record.keys() == {"rows", "length", "bytes", "bytes_without_checkpointing"}
    assert (record["rows"], record["length"]) == (4, 11)
    assert 0 < record["bytes"] < 0.8 * record["bytes_without_checkpointing"]
    assert f"gradient checkpointing keeps {record['bytes'] / 1000:.1f} kB of activations" in said
    assert "activations" not in json.loads((folder / "runs/plain/run.json").read_text())


def test_without_a_compiler_compiling_is_refused_before_anything_is_read(folder: Path) -> None:
    (folder / "no-compiler").mkdir(exist_ok=True)
    path = {"PATH": str(folder / "no-compiler"), "CXX": ""}
    done = _train(folder, "refused", "training.compile=true", "data.train=nothing.jsonl", env=path)
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, text
    assert "which is not installed" in text
    assert "training.compile: false" in text
    assert not (folder / "runs/refused/run.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_compiled_it_learns_the_same_and_goes_on_bit_for_bit(folder: Path) -> None:
    words = ("training.compile=true", "ticks.dropout=0", "base.dropout=off", "ticks.layers=last:1")
    _done(folder, "eager", *words[1:])
    _done(folder, "compiled", *words)
    eager, compiled = (load_file(_adapter(folder, name)) for name in ("eager", "compiled"))
    for key, tensor in eager.items():
        torch.testing.assert_close(compiled[key], tensor, rtol=1e-3, atol=1e-3, msg=key)
    killed = _train(folder, "killed", *words, env=plan("KILL@ticktune.session.Session._show#7"))
    assert killed.returncode == -signal.SIGKILL
    assert "going on after step 5 of 12" in _done(folder, "killed", *words)
    assert _adapter(folder, "killed").read_bytes() == _adapter(folder, "compiled").read_bytes()
