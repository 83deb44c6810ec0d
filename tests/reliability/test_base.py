"""What is wrong with a base is said before anything is trained on it, and training leaves it as it was."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.reliability.catalogue import case
from tests.reliability.recipes import (
    changed_base,
    classifier,
    done_well,
    files,
    record,
    refused,
    tokenizer_base,
    writer,
)

ROWS = [{"prompt": f"w{i}", "response": f"w{i + 1} w2"} for i in range(8)]


@case("B1")
def test_another_base_than_the_adapters(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    from ticktune.base import BaseFiles, fingerprint

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.0.output.dense.bias"][0] += 1e-3

    done_well(ticktune("train", classifier(tmp_path, tiny_bert), cwd=tmp_path))
    other = changed_base(tmp_path, tiny_bert, change)
    before = files(tmp_path)
    expected, found = record(tmp_path / "run")["base"]["fingerprint"], fingerprint(BaseFiles("", other))
    for words in (("eval", "run"), ("predict", "run/adapter", "w1"), ("export", "run", "--merge", "-o", "merged")):
        done = ticktune(words[0], *words[1:], "--base", other, cwd=tmp_path)
        error = refused(done, 3, "trained on another base", tiny_bert.name)
        assert expected[:12] in error
        assert found[:12] in error
    assert files(tmp_path) == before


@case("B2")
def test_the_base_is_as_it_was(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    from safetensors.torch import load_file

    base = changed_base(tmp_path, tiny_bert, lambda tensors: None)
    before, times = files(base), {p.name: p.stat().st_mtime_ns for p in base.iterdir()}
    done_well(ticktune("train", classifier(tmp_path, base), cwd=tmp_path))
    done_well(ticktune("export", "run", "--merge", cwd=tmp_path))
    assert files(base) == before
    assert {p.name: p.stat().st_mtime_ns for p in base.iterdir()} == times
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "run/merged/model.safetensors")
    norms = [name for name in old if "LayerNorm" in name]
    widened = [name for name in old if "intermediate.dense" in name or name.endswith("output.dense.weight")]
    for name, tensor in old.items():
        merged = new[f"bert.{name}"]
        part = merged[tuple(slice(size) for size in tensor.shape)]
        assert part.shape == tensor.shape
        assert name in norms or torch.equal(part, tensor), name
    assert all(not torch.equal(new[f"bert.{name}"], old[name]) for name in norms)
    assert any(new[f"bert.{name}"].shape != old[name].shape for name in widened)


@case("B3")
def test_a_base_that_cannot_be_found(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    for name, said in (("./typo", "no such directory"), ("nobody/nothing-here", "the Hub cannot be reached")):
        text = recipe.read_text().replace(str(tiny_bert), name)
        (tmp_path / "other.yaml").write_text(text)
        line = next(number for number, row in enumerate(text.splitlines(), start=1) if name in row)
        started = time.monotonic()
        done = ticktune("train", tmp_path / "other.yaml", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
        assert time.monotonic() - started < 10
        refused(done, 3, said, name, f"other.yaml:{line}:", "base.model")
    assert not (tmp_path / "run/run.json").exists()


def sharded(folder: Path, base: Path) -> Path:
    """The base in two files with an index."""
    from safetensors.torch import load_file, save_file

    copy = folder / "sharded"
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copy / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return copy


SECOND = "model-00002-of-00002.safetensors"


def _missing(base: Path) -> str:
    (base / SECOND).unlink()
    return f"the index names {SECOND}, for "


def _cut(base: Path) -> str:
    (base / SECOND).write_bytes((base / SECOND).read_bytes()[:-1])
    return "the weights are damaged: the file is not as long as its header says"


def _absent(base: Path) -> str:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["encoder.layer.9.output.dense.bias"] = SECOND
    path.write_text(json.dumps(index))
    return "the index puts encoder.layer.9.output.dense.bias into this file"


def _swapped(base: Path) -> str:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name, file in index["weight_map"].items() if file != SECOND)
    index["weight_map"][name] = SECOND
    path.write_text(json.dumps(index))
    return f"the index puts {name} into this file"


@case("B4")
def test_shards_that_do_not_fit(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    whole = sharded(tmp_path, tiny_bert)
    recipe = classifier(tmp_path, whole)
    damages: list[Callable[[Path], str]] = [_missing, _cut, _absent, _swapped]
    for damage in damages:
        copy = tmp_path / damage.__name__
        shutil.copytree(whole, copy)
        said = damage(copy)
        refused(ticktune("train", recipe, f"base.model={copy}", cwd=tmp_path), 3, said, SECOND)
    assert not (tmp_path / "run/run.json").exists()
    done_well(ticktune("train", recipe, cwd=tmp_path))


@case("B5")
def test_tensors_of_another_architecture(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    def less(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["encoder.layer.1.output.dense.weight"]

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.2.output.dense.weight"] = tensors["encoder.layer.1.output.dense.weight"].clone()

    recipe = classifier(tmp_path, tiny_bert)
    said = {
        less: "the checkpoint lacks the base parameter bert.encoder.layer.1.output.dense.weight",
        more: "no place for: encoder.layer.2.output.dense.weight",
    }
    for change, message in said.items():
        base = changed_base(tmp_path, tiny_bert, change, change.__name__)
        refused(ticktune("train", recipe, f"base.model={base}", cwd=tmp_path), 3, message)
    assert not (tmp_path / "run/adapter").exists()


@case("B6")
def test_a_model_without_a_place_for_ticks(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    from transformers import IBertConfig, IBertModel

    base = tmp_path / "ibert"
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    IBertModel(IBertConfig(vocab_size=64, intermediate_size=48, pad_token_id=0, **sizes)).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, base / name)
    recipe = classifier(tmp_path, tiny_bert)
    done = ticktune("train", recipe, f"base.model={base}", cwd=tmp_path)
    refused(done, 3, "no feed-forward block was found: ibert")
    done = ticktune("train", recipe, "ticks.layers=[7]", cwd=tmp_path)
    refused(done, 3, "ticks.layers", "7")
    assert not (tmp_path / "run/adapter").exists()


@case("B7")
def test_a_tokenizer_of_another_model(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["beyond"] = 64
    path.write_text(json.dumps(tokenizer))
    done = ticktune("train", classifier(tmp_path, base), cwd=tmp_path)
    refused(done, 3, "the tokenizer's token 'beyond' has the id 64, the model has 64 embeddings")
    assert not (tmp_path / "run/adapter").exists()


@case("B8")
def test_before_the_first_step_the_model_is_its_base(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = writer(tmp_path, tiny_llama, ROWS, data={"validation": "train.jsonl", "allow_training_rows": True})
    done_well(ticktune("train", recipe, cwd=tmp_path))
    tokenizer, model = (kind.from_pretrained(tiny_llama) for kind in (AutoTokenizer, AutoModelForCausalLM))
    total, count = 0.0, 0
    for row in ROWS:
        ids = torch.tensor([tokenizer(f"{row['prompt']} {row['response']}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(scores[torch.arange(3), ids[0, 1:]].sum())
        count += 3
    assert record(tmp_path / "run")["base_metrics"]["loss"] == pytest.approx(total / count, rel=1e-6)


@case("B9")
def test_a_base_with_a_value_that_is_no_number(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    name, recipe = "encoder.layer.1.attention.self.key.weight", classifier(tmp_path, tiny_bert)
    for value in ("nan", "-inf"):
        base = changed_base(tmp_path, tiny_bert, lambda t, v=value: t[name].view(-1)[5].fill_(float(v)), value)
        done = ticktune("train", recipe, f"base.model={base}", cwd=tmp_path)
        refused(done, 3, f"the tensor bert.{name} holds NaN or infinity", base.name)
    assert not (tmp_path / "run/adapter").exists()


@case("B10")
def test_a_missing_pad_or_end_token(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    base = tokenizer_base(tmp_path, tiny_llama, pad_token=None)
    done = ticktune("train", writer(tmp_path, base, ROWS), cwd=tmp_path)
    done_well(done, "its tokenizer has no pad token, so </s> fills up short rows")
    base = tokenizer_base(tmp_path, tiny_llama, "endless", eos_token=None, sep_token=None)
    done = ticktune("train", writer(tmp_path, base, ROWS), "output=other", cwd=tmp_path)
    refused(done, 3, "no end-of-text token", "eos_token")
    nothing = dict.fromkeys(("pad_token", "eos_token", "unk_token"))
    base = tokenizer_base(tmp_path, tiny_llama, "nothing", **nothing)
    refused(ticktune("train", writer(tmp_path, base, ROWS), "output=other", cwd=tmp_path), 3, "no token to pad with")
