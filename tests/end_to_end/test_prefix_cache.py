"""training.prefix_cache on the command line: same losses, bitwise resume, and refusals before anything is written."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import tests.models as models
from tests.end_to_end.support import classification
from tests.launch import launch
from tests.reliability.faults import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("prefix-cache")
    (found / "base").mkdir()
    models.save_tiny_bert(found / "base")
    recipe = classification(
        found,
        found / "base",
        base={"model": str(found / "base"), "dropout": "off"},
        ticks={"layers": "last:1", "dropout": 0.1},
        logging={"every": 1},
    )
    for kind in ("off", "memory", "disk"):
        done = launch("train", recipe, f"training.prefix_cache={kind}", f"output=runs/{kind}", cwd=found)
        assert done.returncode == 0, done.stderr
        assert ("the lowest layer is computed for 93 rows, once" in done.stderr) == (kind != "off")
    return found


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _adapter(run: Path) -> bytes:
    return (run / "adapter/adapter.safetensors").read_bytes()


def test_losses_are_those_without_it(folder: Path) -> None:
    off, memory = (_log(folder / f"runs/{kind}") for kind in ("off", "memory"))
    losses = [[line["loss"] for line in log if "loss" in line] for log in (off, memory)]
    assert len(losses[0]) == 36
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # AdamW turns rounding of a tiny gradient into a step
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-6)
    scores = [[line["metrics"] for line in log if "metrics" in line] for log in (off, memory)]
    assert [s["accuracy"] for s in scores[1]] == [s["accuracy"] for s in scores[0]]


def test_memory_and_disk_give_the_same_weights_bit_for_bit(folder: Path) -> None:
    assert _adapter(folder / "runs/memory") == _adapter(folder / "runs/disk")


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_killed_in_a_later_epoch_it_goes_on_to_the_same_weights_bit_for_bit(kind: str, folder: Path) -> None:
    words = ("train", folder / "recipe.yaml", f"training.prefix_cache={kind}", f"output=runs/killed-{kind}")
    killed = launch(*words, cwd=folder, env=plan("KILL@ticktune.session.Session._show#18"))
    assert killed.returncode == -signal.SIGKILL
    done = launch(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "going on after step 15 of 36" in done.stderr
    assert _adapter(folder / f"runs/killed-{kind}") == _adapter(folder / f"runs/{kind}")


def test_it_is_part_of_what_a_run_is(folder: Path) -> None:
    done = launch("train", folder / "recipe.yaml", "output=runs/off", "training.prefix_cache=memory", cwd=folder)
    assert done.returncode == 7
    assert "training.prefix_cache: off -> memory" in " ".join(done.stderr.split())


@pytest.mark.parametrize("verb", ["train", "inspect"])
@pytest.mark.parametrize(
    ("words", "said", "fix"),
    [
        (("base.dropout=keep",), "the base's own dropout acts in its frozen layers", "set base.dropout: off"),
        (("norms.layers=all",), "the norm of the embeddings is trained", "set norms.layers: same"),
        (("norms.layers=[0]",), "the lowest layer is trained", "set ticks.layers: last:N"),
        (("ticks.layers=all",), "no layer is frozen whose result could be kept", "set ticks.layers: last:N"),
    ],
)
def test_what_cannot_be_kept_is_a_recipe_error_and_leaves_nothing(
    words: tuple[str, ...], said: str, fix: str, verb: str, folder: Path
) -> None:
    cached = ("training.prefix_cache=memory", "output=runs/refused")
    done = launch(verb, folder / "recipe.yaml", *cached, *words, cwd=folder)
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, text
    assert said in text
    assert fix in text
    assert "training.prefix_cache" in text
    assert not (folder / "runs/refused/run.json").exists()
