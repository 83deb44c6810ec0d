"""training.ffn on the command line: the wide form, the trial, bitwise resume, and what is refused beforehand."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import tests.models as models
from tests.end_to_end.support import classification
from tests.launch import launch
from tests.reliability.faults import plan
from ticktune.train.ffn import Trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ffn-form")
    (found / "base").mkdir()
    models.save_tiny_bert(found / "base")
    recipe = classification(
        found, found / "base", logging={"every": 1}, training={"precision": "fp32", "gradient_checkpointing": True}
    )
    for form in ("split", "wide", "auto"):
        done = launch("train", recipe, f"training.ffn={form}", f"output=runs/{form}", cwd=found)
        assert done.returncode == 0, done.stderr
    return found


def _record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def _losses(run: Path) -> list[float]:
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log if "loss" in line]


def _adapter(run: Path) -> bytes:
    return (run / "adapter/adapter.safetensors").read_bytes()


def test_losses_are_those_of_the_split_form(folder: Path) -> None:
    split, wide = _losses(folder / "runs/split"), _losses(folder / "runs/wide")
    assert wide[:3] == pytest.approx(split[:3], rel=1e-5)
    assert wide == pytest.approx(split, rel=2e-2)  # AdamW turns rounding of a tiny gradient into a step
    assert _adapter(folder / "runs/split") != _adapter(folder / "runs/wide")


def test_the_form_is_recorded_in_the_run_and_its_checkpoints(folder: Path) -> None:
    for form in ("split", "wide"):
        assert _record(folder / f"runs/{form}")["ffn"] == form
        [*_, newest] = sorted((folder / f"runs/{form}/checkpoints").glob("step-*"))
        assert json.loads((newest / "state.json").read_text())["progress"]["ffn"] == form


def test_a_trial_chooses_and_says_what_it_saw(folder: Path) -> None:
    record = _record(folder / "runs/auto")
    trial = record["ffn_trial"]
    assert record["ffn"] == Trial(**trial).choice
    assert trial["split"] > 0
    assert trial["wide"] > 0
    assert 3 <= trial["rounds"] <= 9
    assert _adapter(folder / "runs/auto") == _adapter(folder / f"runs/{record['ffn']}")


@pytest.mark.parametrize("form", ["wide", "auto"])
def test_killed_it_goes_on_as_it_began_to_the_same_weights_bit_for_bit(form: str, folder: Path) -> None:
    """After the first checkpoint, and before it: what a trial chose is chosen once."""
    for name, step in (("late", 18), ("early", 2)):
        run = folder / f"runs/{form}-{name}"
        words = ("train", folder / "recipe.yaml", f"training.ffn={form}", f"output=runs/{form}-{name}")
        killed = launch(*words, cwd=folder, env=plan(f"KILL@ticktune.session.Session._show#{step}"))
        assert killed.returncode == -signal.SIGKILL
        before = _record(run)
        done = launch(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        # A second trial would find other seconds.
        assert [_record(run).get(key) for key in ("ffn", "ffn_trial")] == [before["ffn"], before.get("ffn_trial")]
        assert _adapter(run) == _adapter(folder / f"runs/{before['ffn']}")


def test_a_signal_in_the_trial_puts_it_off(folder: Path) -> None:
    """The fifth use of the wide form is in the trial: the first is its proof."""
    run, words = folder / "runs/tried", ("train", folder / "recipe.yaml", "training.ffn=auto", "output=runs/tried")
    stopped = launch(*words, cwd=folder, env=plan("TERM@ticktune.patch.wide.Wide.running#5"))
    assert stopped.returncode == 143, stopped.stderr
    assert "ffn" not in _record(run)
    done = launch(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert Trial(**_record(run)["ffn_trial"]).choice == _record(run)["ffn"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("training.ffn=wide", "ticks.dropout=0.1"), "ticks cannot be wide: hidden units are dropped out"),
        (("training.ffn=wide", "ticks.dim=0"), "ticks cannot be wide: there are no ticks"),
        (("training.ffn=wide", "training.fast=false"), "training.fast: false switches off"),
        (("training.ffn=narrow",), "training.ffn"),
    ],
)
def test_what_cannot_be_wide_is_a_recipe_error_and_leaves_nothing(
    words: tuple[str, ...], said: str, folder: Path
) -> None:
    done = launch("train", folder / "recipe.yaml", "output=runs/refused", *words, cwd=folder)
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, text
    assert said in text
    assert not (folder / "runs/refused/run.json").exists()
    looked = launch("inspect", folder / "recipe.yaml", *words, cwd=folder)
    assert looked.returncode == 2
    assert said in " ".join(looked.stderr.split())


def test_auto_takes_the_split_form_where_there_is_no_other_and_says_why(folder: Path) -> None:
    words = ("training.ffn=auto", "ticks.dropout=0.1", "training.epochs=1", "output=runs/auto-split")
    done = launch("train", folder / "recipe.yaml", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "the split form is used, as hidden units are dropped out" in " ".join(done.stderr.split())
    assert _record(folder / "runs/auto-split")["ffn"] == "split"


def test_scores_are_those_of_the_adapter_on_its_own(folder: Path) -> None:
    """Evaluation has the split form, in the run as by ``eval``."""
    done = launch("eval", folder / "runs/wide", "--split", "validation", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == _record(folder / "runs/wide")["metrics"]
