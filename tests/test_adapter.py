"""The artefact and the library's face: saved whole, loaded strictly, on the right base only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tests.models as models
import ticktune
from tests.reliability.catalogue import case
from tests.training import bits, same, snapshot
from ticktune.adapter import FACTS, TENSORS, AdapterFacts, read_facts, read_tensors, write_adapter
from ticktune.errors import BaseModelError, CheckpointError, NumericsError, PatchError, TicktuneError
from ticktune.files import MANIFEST
from ticktune.patch.attach import adapter_parameters, adapter_state, attachment_of


def _from_memory(family: str = "bert") -> nn.Module:
    torch.manual_seed(4)
    return models.families()[family]()


def _from_directory(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    return model


def _tuned(model: nn.Module, **options: Any) -> nn.Module:
    ticktune.attach(model, **{"dim": 4, **options})
    models.perturb(p for _, _, p in adapter_parameters(model))
    return model


def _logits(model: nn.Module) -> Tensor:
    torch.manual_seed(8)
    batch = models.inputs(model)
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


@case("X10")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(value: float, tmp_path: Path) -> None:
    model = _tuned(_from_memory())
    ticktune.save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / TENSORS).read_bytes()
    with torch.no_grad():
        adapter_state(model)["encoder.1.ffn.P"][0, 0] = value
    with pytest.raises(NumericsError, match=r"the tensor encoder\.1\.ffn\.P holds NaN or infinity"):
        ticktune.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / TENSORS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@case("X2")
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "phi3"])
def test_adapter_of_a_model_in_memory_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = _tuned(_from_memory(family), layers="last:2")
    ticktune.save_adapter(model, tmp_path / "adapter")
    again = ticktune.load_adapter(_from_memory(family), tmp_path / "adapter")
    assert same(snapshot(again), snapshot(model))
    assert attachment_of(again).plan == attachment_of(model).plan
    assert bits(_logits(again)) == bits(_logits(model))


def test_adapter_of_a_model_from_a_directory_brings_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    model = _tuned(_from_directory(tiny_bert))
    ticktune.save_adapter(model, str(tmp_path / "adapter"))
    torch.manual_seed(999)
    base = _from_directory(tiny_bert)  # its fresh head has other values
    assert not torch.equal(base.classifier.weight, model.classifier.weight)
    again = ticktune.load_adapter(base, str(tmp_path / "adapter"))
    assert again is base
    assert bits(_logits(again)) == bits(_logits(model))
    facts = json.loads((tmp_path / "adapter" / FACTS).read_text())
    assert facts["base"]["name"] == tiny_bert.name  # a name, not where it lay on this machine
    assert str(tiny_bert.parent) not in json.dumps(facts)


def test_adapter_on_a_copy_of_the_base_elsewhere(tiny_bert: Path, tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_directory(tiny_bert)), tmp_path / "adapter")
    shutil.copytree(tiny_bert, tmp_path / "moved")
    ticktune.load_adapter(_from_directory(tmp_path / "moved"), tmp_path / "adapter")


def test_attach_and_detach_of_the_library() -> None:
    model = _from_memory()
    before = _logits(model)
    assert ticktune.attach(model, dim=4, layers="all", norms="all") is model
    assert torch.equal(_logits(model), before)
    models.perturb(p for _, _, p in adapter_parameters(model))
    assert not torch.equal(_logits(model), before)
    ticktune.detach(model)
    assert torch.equal(_logits(model), before)


def test_keys_in_the_file(tmp_path: Path) -> None:
    def keys(family: str, **options: Any) -> set[str]:
        ticktune.save_adapter(_tuned(_from_memory(family), **options), tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / TENSORS)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        return set(tensors)

    assert keys("bert", layers=[1]) == {
        *(f"encoder.1.ffn.{letter}" for letter in "QrP"),
        *(f"encoder.1.norm.{slot}.{part}" for slot in ("attention", "ffn") for part in ("weight", "bias")),
        "head.classifier.weight",
        "head.classifier.bias",
    }
    assert {"encoder.norm.embedding.weight", "encoder.norm.embedding.bias"} <= keys("bert")
    assert keys("llama", layers=[2]) == {
        *(f"decoder.2.ffn.{letter}" for letter in "QUP"),
        "decoder.2.norm.attention.weight",
        "decoder.2.norm.ffn.weight",
        "decoder.norm.final.weight",
    }
    assert keys("qwen3", dim=0, layers=[0], norms=["q", "k"]) == {
        "decoder.0.norm.q.weight",
        "decoder.0.norm.k.weight",
    }
    assert keys("t5", layers={"decoder": [0]}, norms=["cross_attention", "final"]) == {
        "decoder.0.ffn.Q",
        "decoder.0.ffn.P",
        "decoder.0.norm.cross_attention.weight",
        "encoder.norm.final.weight",
        "decoder.norm.final.weight",
    }


KEY = "encoder.1.ffn.Q"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != KEY}, f"{KEY} is missing"),
    "extra": (lambda t: t | {"encoder.9.ffn.Q": t[KEY]}, "encoder.9.ffn.Q has no place"),
    "misshaped": (lambda t: t | {KEY: t[KEY][:, :-1]}, r"\(4, 47\), expected \(4, 48\)"),
    "transposed": (lambda t: t | {KEY: t[KEY].T}, r"\(48, 4\), expected \(4, 48\)"),
    "bfloat16": (lambda t: t | {KEY: t[KEY].bfloat16()}, "torch.bfloat16, expected float32"),
    "float64": (lambda t: t | {KEY: t[KEY].double()}, "torch.float64, expected float32"),
}


@case("X4")
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    facts = read_facts(tmp_path / "adapter")
    write_adapter(tmp_path / "changed", change(read_tensors(tmp_path / "adapter")), facts, "")
    model = _from_memory()
    before = _logits(model)
    with pytest.raises(CheckpointError, match=message) as error:
        ticktune.load_adapter(model, tmp_path / "changed")
    assert error.value.exit_code == 6
    assert torch.equal(_logits(model), before)
    assert attachment_of(model, missing_ok=True) is None
    ticktune.load_adapter(model, tmp_path / "adapter")


@case("X5")
@pytest.mark.parametrize("file", [TENSORS, FACTS, "README.md", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_folder_is_refused(file: str, damage: str, tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-2])
    else:
        path.unlink()
    model = _from_memory()
    with pytest.raises(CheckpointError):
        ticktune.load_adapter(model, tmp_path / "adapter")
    assert attachment_of(model, missing_ok=True) is None


def test_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter.json here"):
        ticktune.load_adapter(_from_memory(), tmp_path)


def test_adapter_of_another_version_is_refused(tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    facts = read_facts(tmp_path / "adapter")
    newer = AdapterFacts(**{**vars(facts), "format": 2})
    write_adapter(tmp_path / "newer", read_tensors(tmp_path / "adapter"), newer, "")
    with pytest.raises(CheckpointError, match="the format 2, this version reads 1"):
        ticktune.load_adapter(_from_memory(), tmp_path / "newer")


def test_other_base_in_memory_is_refused(tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    other = _from_memory()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-6
    with pytest.raises(BaseModelError, match="trained on another base") as error:
        ticktune.load_adapter(other, tmp_path / "adapter")
    assert error.value.exit_code == 3
    assert attachment_of(other, missing_ok=True) is None


def test_norm_of_the_base_counts_although_it_is_trained(tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    other = _from_memory()
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.weight[0] += 1e-6
    with pytest.raises(BaseModelError, match="trained on another base"):
        ticktune.load_adapter(other, tmp_path / "adapter")


def test_other_base_on_disk_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_directory(tiny_bert)), tmp_path / "adapter")
    shutil.copytree(tiny_bert, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 1e-6
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="trained on another base"):
        ticktune.load_adapter(_from_directory(tmp_path / "other"), tmp_path / "adapter")


def test_other_config_of_the_same_weights_is_another_base(tiny_bert: Path, tmp_path: Path) -> None:
    ticktune.save_adapter(_tuned(_from_directory(tiny_bert)), tmp_path / "adapter")
    shutil.copytree(tiny_bert, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(BaseModelError, match="trained on another base"):
        ticktune.load_adapter(_from_directory(tmp_path / "other"), tmp_path / "adapter")


def test_model_without_the_head_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    ticktune.save_adapter(_tuned(_from_directory(tiny_bert)), tmp_path / "adapter")
    body = AutoModel.from_pretrained(tiny_bert)
    with pytest.raises(CheckpointError, match="no head parameter classifier.weight"):
        ticktune.load_adapter(body, tmp_path / "adapter")
    assert attachment_of(body, missing_ok=True) is None


def test_model_with_ticks_takes_no_second_adapter(tmp_path: Path) -> None:
    model = _tuned(_from_memory())
    ticktune.save_adapter(model, tmp_path / "adapter")
    before = snapshot(model)
    with pytest.raises(TicktuneError):
        ticktune.load_adapter(model, tmp_path / "adapter")
    assert same(snapshot(model), before)


def test_saving_needs_ticks_and_replaces_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="has no ticks"):
        ticktune.save_adapter(_from_memory(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    ticktune.save_adapter(_tuned(_from_memory()), tmp_path / "adapter")
    (tmp_path / "adapter" / "stale.txt").write_text("")
    model = _tuned(_from_memory(), dim=2)
    ticktune.save_adapter(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {TENSORS, FACTS, "README.md", MANIFEST}
    assert same(read_tensors(tmp_path / "adapter"), adapter_state(model))


def test_trainer_of_transformers_trains_ticks_and_not_the_base(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = _from_memory()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    ticktune.attach(model, dim=4)
    start = snapshot(model)
    rows = [{"input_ids": torch.randint(4, 64, (9,)), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    after = snapshot(model)
    # Q, r get their first gradient in the second step, once P is not zero.
    assert all(not torch.equal(after[key], start[key]) for key in start)
    ticktune.save_adapter(model, tmp_path / "adapter")
    ticktune.detach(model)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    assert same(snapshot(ticktune.load_adapter(model, tmp_path / "adapter")), after)
