"""Every documented exit code that training, evaluating and exporting can end with; one clear message each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.support import classification
from tests.reliability.catalogue import case
from ticktune.cli import entry


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return classification(tmp_path, tiny_bert)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = classification(folder, tiny_bert, training={"epochs": 1})
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert entry(["train", str(recipe)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run that a test may damage."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy/runs/tiny"


def expect(code: int, words: list[object], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    capsys.readouterr()
    assert entry([str(word) for word in words]) == code
    error = capsys.readouterr().err
    for text in said:
        assert text in error
    assert "Traceback" not in error


def test_2_unknown_key(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["train", recipe, "ticks.dimm=3"], capsys, "command line", "did you mean ticks.dim?")
    assert not (recipe.parent / "runs").exists()


def test_2_unknown_option(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["train", recipe, "--restrat"], capsys, "error[usage]", "--restrat")


def test_2_missing_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["train", "recipes.yaml"], capsys, "did you mean recipe.yaml?")


def test_2_device_that_is_not_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["train", recipe, "training.device=cuda:99"], capsys, "training.device", "CUDA devices")


def test_2_precision_that_the_device_cannot_do(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["train", recipe, "training.precision=fp16"], capsys, "training.precision", "no float16 arithmetic")


def test_2_several_processes(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect(2, ["train", recipe], capsys, "WORLD_SIZE is 2", "several come later")
    assert not (recipe.parent / "runs").exists()


def test_2_no_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(2, ["eval"], capsys, "there is no complete run")


def test_2_overrides_of_a_model(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[object] = ["inspect", tiny_bert, "ticks.dim=3", "base.revision=main", "foo=bar"]
    expect(2, words, capsys, "error[usage]: inspect foo=bar: overrides are for a recipe", "say --dim 3 instead")
    expect(2, words, capsys, "say --revision main instead", "leave it out, or name a recipe (a .yaml or .yml file)")


def test_2_draw_of_a_model(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", tiny_bert, "--draw", tmp_path / "drawn"]
    expect(2, words, capsys, "error[usage]: inspect --draw: it is for a recipe", "or name a recipe")


@pytest.mark.parametrize(
    ("option", "value", "key"), [("--dim", "4", "ticks.dim"), ("--revision", "a", "base.revision")]
)
def test_2_options_of_a_model_on_a_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, key: str
) -> None:
    said = (f"error[usage]: inspect {option}: it is for a MODEL", f"fix: say {key}={value} instead")
    expect(2, ["inspect", recipe, option, value], capsys, *said)
    if option == "--dim":  # also when it is the default
        expect(2, ["inspect", recipe, option, "64"], capsys, "ticks.dim=64")


def test_3_base_that_is_not_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(3, ["train", recipe, "base.model=./nothing"], capsys, "error[base]", "no such directory")


def test_3_base_package_that_is_not_installed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(3, ["train", recipe, "base.model=package:no_such_thing"], capsys, "pip install no-such-thing")


def test_3_base_that_is_a_file(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ("it is a file, expected the directory that holds the model", f"fix: name {tiny_bert}")
    expect(3, ["inspect", tiny_bert / "config.json"], capsys, *said)


def test_3_damaged_index_of_a_base_that_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors.index.json").write_text("[")
    expect(3, ["inspect", tmp_path], capsys, "model.safetensors.index.json: the index of the weights is damaged")


def test_3_family_without_a_provable_ffn(recipe: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import IBertConfig, IBertModel

    folder = recipe.parent / "ibert"
    torch.manual_seed(0)
    IBertModel(
        IBertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, folder / name)
    expect(3, ["train", recipe, f"base.model={folder}"], capsys, "no feed-forward block was found: ibert", "no pair")
    expect(3, ["inspect", folder], capsys, "fix: choose another base; docs/families.md lists those that take ticks")
    assert not (recipe.parent / "runs/tiny/adapter").exists()


def test_3_pickled_weights(recipe: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "pickled"
    shutil.copytree(tiny_bert, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    expect(3, ["train", recipe, f"base.model={folder}"], capsys, "pickled", "convert them to safetensors")


def test_3_cut_weights(recipe: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "cut"
    shutil.copytree(tiny_bert, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    expect(3, ["train", recipe, f"base.model={folder}"], capsys, "damaged", "model.safetensors")


def test_3_another_base_than_the_adapters(run: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.parent / "other"
    shutil.copytree(tiny_bert, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    expect(3, ["eval", run / "adapter", "--base", folder], capsys, "trained on another base")


def test_4_missing_column(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(
        4,
        ["train", recipe, "data.columns={text: txet, label: label}"],
        capsys,
        "train.jsonl:1",
        "did you mean text?",
    )


def test_4_broken_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.parent / "train.jsonl"
    path.write_text(path.read_text() + '{"text": "w1", "label"\n')
    expect(4, ["train", recipe], capsys, "train.jsonl:94", "data.train", "not JSON")


def test_4_unknown_label_in_validation(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.parent / "validation.jsonl"
    path.write_text(path.read_text() + '{"text": "w1", "label": "medium"}\n')
    expect(4, ["train", recipe], capsys, "validation.jsonl:41", "'medium'")


def test_5_loss_that_is_not_finite(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(5, ["train", recipe, "optimizer.lr=1e30", "optimizer.norm_lr=1e30"], capsys, "error[numerics]", "step")
    assert not (recipe.parent / "runs/tiny/adapter").exists()


@case("X5")
def test_6_damaged_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "adapter/adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    expect(6, ["eval", run], capsys, "damaged", "adapter.safetensors")


def test_6_architecture_that_cannot_merge(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    monkeypatch.chdir(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)).save_pretrained("bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / "bloom" / name)
    (tmp_path / "train.txt").write_text(" ".join(f"w{i % 60}" for i in range(400)))
    (tmp_path / "validation.txt").write_text(" ".join(f"w{i % 60}" for i in range(90)))
    (tmp_path / "recipe.yaml").write_text(
        "task: causal-lm\nbase: {model: bloom}\nticks: {dim: 4}\n"
        "data: {train: train.txt, validation: validation.txt, max_length: 16}\n"
        "training: {steps: 2, precision: fp32}\noutput: runs/bloom\n"
    )
    assert entry(["train", "recipe.yaml"]) == 0
    assert "will train, but not merge" in capsys.readouterr().err
    expect(6, ["export", "runs/bloom", "--merge"], capsys, "cannot be merged", "fixes the width")
    assert not (tmp_path / "runs/bloom/merged").exists()


@case("C7")
def test_7_changed_recipe(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run.parent.parent / "recipe.yaml"
    expect(7, ["train", recipe, "ticks.dim=4"], capsys, "ticks.dim: 8 -> 4", "--restart")


@case("C8")
def test_7_busy_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    recipe = run.parent.parent / "recipe.yaml"
    with (run / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        expect(7, ["train", recipe], capsys, "another process")


@case("C13")
def test_7_foreign_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = recipe.parent / "runs/tiny/thesis.tex"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    expect(7, ["train", recipe], capsys, "thesis.tex")
    assert other.read_text() == "mine"


@case("C10")
def test_7_changed_rows_of_an_interrupted_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.parent.parent
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("w1 ", "w2 ", 1))
    expect(7, ["train", folder / "recipe.yaml"], capsys, "data.train changed")


@case("C16")
def test_8_output_that_cannot_be_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "file").write_text("")
    expect(8, ["train", recipe, "output=file/run"], capsys, "error[resources]", "cannot write here")


def test_9_minimum_missed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(9, ["eval", run, "--min", "accuracy=1.01"], capsys, "expected at least 1.01")
    expect(9, ["eval", run, "--max", "loss=0"], capsys, "expected at most 0")


def test_141_reader_of_the_pipe_is_gone(run: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "ticktune", "schema"]
    done = subprocess.run(words, cwd=run, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


def test_debug_shows_the_traceback(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["train", "nothing.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_called_a_bug(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ticktune.run

    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(ticktune.run, "train", broken)
    expect(1, ["train", recipe], capsys, "this is a bug in ticktune: ZeroDivisionError: oh", "--debug")
