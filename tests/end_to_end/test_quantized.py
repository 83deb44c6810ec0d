"""Quantised bases through the real command line, on a CPU with torchao's int8."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.end_to_end.support import classification
from tests.launch import Launched, launch
from tests.quantized import codes, int8_copy
from tests.training import same
from ticktune.folder import find_target
from ticktune.prepare import load_target

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

INT8 = {"quantize": "int8"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with a complete run on a base that was quantised while it was read."""
    return _train(tmp_path_factory.mktemp("int8"), tiny_bert, quantize="int8")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with a full-precision base, its int8 copy on disk, and a complete run on that copy."""
    folder = tmp_path_factory.mktemp("stored")
    int8_copy(tiny_bert, folder)
    return _train(folder, folder / "int8")


def _train(folder: Path, base: Path, **options: Any) -> Path:
    recipe = classification(folder, base, base={"model": str(base), **options})
    done = launch("train", recipe, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "train.err").write_text(done.stderr)
    return folder


def test_training_learns_and_says_what_it_stands_on(trained: Path) -> None:
    record = json.loads((trained / "runs/tiny/run.json").read_text())
    assert record["metrics"]["accuracy"] > record["base_metrics"]["accuracy"] + 0.1
    assert record["base"]["quantize"] == "int8"
    assert record["base"]["stored_quantization"] is None
    assert "torchao" in record["versions"]
    facts = json.loads((trained / "runs/tiny/adapter/adapter.json").read_text())
    assert facts["base"]["quantize"] == "int8"


def test_training_prints_nothing_of_torchao(trained: Path) -> None:
    text = (trained / "train.err").read_text()
    assert "step 36" in text
    for word in ("torchao", "pytree", "Failed to load", "warning"):
        assert word not in text


def test_eval_and_predict_use_the_quantised_base(trained: Path, ticktune: Run) -> None:
    recorded = json.loads((trained / "runs/tiny/run.json").read_text())["metrics"]
    for target in ("runs/tiny", "runs/tiny/adapter"):
        found = json.loads(ticktune("eval", target, "--split", "validation", cwd=trained).stdout)
        assert found["metrics"] == recorded
    answer = json.loads(ticktune("predict", "runs/tiny", "w31 w33", cwd=trained).stdout)
    assert answer["label"] == "large"


def test_a_copied_adapter_needs_no_recipe_to_quantise_alike(trained: Path, tmp_path: Path, tiny_bert: Path) -> None:
    shutil.copytree(trained / "runs/tiny/adapter", tmp_path / "copy")
    used = load_target(find_target(str(tmp_path / "copy")), base=str(tiny_bert))
    full = load_target(find_target(str(tmp_path / "copy")), base=str(tiny_bert), full_precision=True)
    assert codes(used.model)
    assert not codes(full.model)


def test_merging_goes_into_the_full_precision_base_and_says_so(trained: Path, ticktune: Run) -> None:
    done = ticktune("export", "--merge", cwd=trained)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verification"]["max_difference"] <= document["verification"]["tolerance"]
    assert document["verification"]["is_conclusive"]
    # The codes are not the numbers that they stand for: no drift would mean that nothing was quantised.
    drift = document["trained_on"]["drift"]
    assert 10 * document["verification"]["max_difference"] < drift["max_difference"] < 1
    assert set(drift["metrics_before"]) == set(drift["metrics_after"]) >= {"accuracy"}
    card = (trained / "runs/tiny/merged/README.md").read_text()
    assert "quantised by int8, merged into the full-precision base" in card
    assert "quantization_config" not in json.loads((trained / "runs/tiny/merged/config.json").read_text())
    again = ticktune("export", "--merge", cwd=trained)
    assert again.returncode == 0
    assert json.loads(again.stdout)["trained_on"] == document["trained_on"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    trained: Path, tmp_path: Path, tiny_bert: Path, ticktune: Run
) -> None:
    recipe = classification(tmp_path, tiny_bert, base={"model": str(tiny_bert), **INT8})
    with Launched(["train", str(recipe)], tmp_path) as process:
        checkpoints = tmp_path / "runs/tiny/checkpoints"
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = json.loads((tmp_path / "runs/tiny/run.json").read_text())["status"]
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("going on after step" in done.stderr) == (status == "running")
    assert same(*(_tensors(folder / "runs/tiny/adapter") for folder in (trained, tmp_path)))


def test_another_kind_is_another_run(trained: Path, ticktune: Run) -> None:
    done = ticktune("train", "recipe.yaml", "base.quantize=none", cwd=trained)
    assert done.returncode == 7
    assert "base.quantize: int8 -> none" in done.stderr


def test_inspect_counts_codes_as_bytes(trained: Path, ticktune: Run) -> None:
    documents = [
        json.loads(ticktune("inspect", "recipe.yaml", f"base.quantize={kind}", cwd=trained).stdout)
        for kind in ("none", "int8")
    ]
    # Two layers of 32 hidden and 48 wide units: four attention and two feed-forward matrices, 3 bytes saved a value
    # and 4 spent a row. The pooler belongs to the head and stays.
    saved = 2 * (4 * 32 * 32 + 2 * 32 * 48) * 3 - 2 * (4 * 32 + 32 + 48) * 4
    assert documents[0]["memory_bytes"] - documents[1]["memory_bytes"] == saved
    assert [d["quantized"] for d in documents] == [None, "int8"]
    assert documents[1]["merges"]


def test_a_base_quantised_on_disk_trains_and_is_warned_about(stored: Path) -> None:
    record = json.loads((stored / "runs/tiny/run.json").read_text())
    assert record["metrics"]["accuracy"] > record["base_metrics"]["accuracy"] + 0.1
    assert record["base"]["stored_quantization"] == "torchao"
    assert record["compute"]["base_dtype"] == "float32"
    text = " ".join((stored / "train.err").read_text().split())
    assert "will train, but not merge into this base" in text
    assert "export --merge --base DIR" in text


def test_eval_on_a_base_quantised_on_disk_needs_no_option(stored: Path, ticktune: Run) -> None:
    done = ticktune("eval", "runs/tiny", "--split", "validation", cwd=stored)
    assert json.loads(done.stdout)["metrics"] == json.loads((stored / "runs/tiny/run.json").read_text())["metrics"]


def test_merging_into_codes_is_refused_with_the_way_out(stored: Path, ticktune: Run) -> None:
    done = ticktune("export", "runs/tiny", "--merge", "-o", "refused", cwd=stored)
    assert done.returncode == 6
    assert "quantised (by torchao)" in done.stderr
    assert "--base DIR" in done.stderr
    assert not (stored / "refused").exists()


def test_merging_into_the_full_precision_model_is_possible_with_a_warning(stored: Path, ticktune: Run) -> None:
    done = ticktune("export", "runs/tiny", "--merge", "--base", "full", cwd=stored)
    assert done.returncode == 0, done.stderr
    assert "full stands in for it" in " ".join(done.stderr.split())
    document = json.loads(done.stdout)
    assert document["verification"]["changed"] == 0
    assert document["trained_on"]["quantization"] == "torchao"
    assert document["trained_on"]["drift"]["max_difference"] > 10 * document["verification"]["max_difference"]


def test_another_full_precision_model_is_refused(stored: Path, ticktune: Run, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    import tests.models as models

    entries = json.loads((stored / "full/config.json").read_text())
    config = BertConfig.from_dict({**entries, "intermediate_size": entries["intermediate_size"] + 16})
    BertModel(config).save_pretrained(tmp_path / "other")
    models.word_tokenizer().save_pretrained(tmp_path / "other")
    done = ticktune("export", "runs/tiny", "--merge", "--base", tmp_path / "other", "-o", "other", cwd=stored)
    assert done.returncode == 3
    assert "other shapes" in done.stderr


def test_quantising_codes_again_is_refused(stored: Path, ticktune: Run) -> None:
    done = ticktune("train", "recipe.yaml", "base.quantize=int8", "output=runs/twice", cwd=stored)
    assert done.returncode == 2
    assert "quantised already (by torchao)" in done.stderr


def test_a_head_of_other_labels_is_drawn_anew(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    int8_copy(tiny_bert, tmp_path, labels=3)
    recipe = classification(tmp_path, tmp_path / "int8", training={"epochs": None, "steps": 1})
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "runs/tiny/adapter/adapter.json").read_text())
    assert facts["plan"]["head"] == ["classifier.weight", "classifier.bias"]
    assert _tensors(tmp_path / "runs/tiny/adapter")["head.classifier.weight"].shape == (2, 32)


def test_a_model_without_linear_projections_is_refused(tmp_path: Path, ticktune: Run) -> None:
    from transformers import GPT2Config, GPT2Model

    import tests.models as models

    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, **ids)).save_pretrained(tmp_path / "base")
    models.word_tokenizer().save_pretrained(tmp_path / "base")
    recipe = classification(tmp_path, tmp_path / "base", base={"model": str(tmp_path / "base"), **INT8})
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "int8 quantises linear projections" in " ".join(done.stderr.split())


def test_bitsandbytes_on_a_cpu_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_bert: Path, ticktune: Run
) -> None:
    recipe = classification(tmp_path, tiny_bert, base={"model": str(tiny_bert), "quantize": "bnb-4bit"})
    done = ticktune("train", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "bnb-4bit needs a CUDA device" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_torchao_is_named_with_its_command(tmp_path: Path, tiny_bert: Path) -> None:
    recipe = classification(tmp_path, tiny_bert, base={"model": str(tiny_bert), **INT8})
    (tmp_path / "hide").mkdir()
    hide = "import transformers.utils as u; u.is_torchao_available = lambda *a: False"
    (tmp_path / "hide/sitecustomize.py").write_text(hide)
    paths = os.pathsep.join([str(tmp_path / "hide"), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "ticktune", "train", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install --upgrade torchao" in done.stderr


def _tensors(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(adapter / "adapter.safetensors"))
