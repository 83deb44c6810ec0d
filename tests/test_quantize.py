import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.models as models
import ticktune
from tests.quantized import codes, int8_copy, load_int8
from tests.training import bits
from ticktune.adapter import read_facts
from ticktune.base import BaseFiles, fingerprint_in_memory, load_model, stored_dtype, stored_quantization
from ticktune.errors import BaseModelError, ExportError, PatchError, RecipeError
from ticktune.patch.attach import adapter_parameters, attachment_of, unquantized_modules
from ticktune.quantize import check_possible, is_coded, is_quantized, loading_arguments, plain_parts, saved_bytes

CPU = torch.device("cpu")
torchao = pytest.mark.skipif(
    not pytest.importorskip("transformers.utils").is_torchao_available(), reason="torchao is not installed"
)


def _bitsandbytes_is_here() -> bool:
    from transformers.utils import is_bitsandbytes_available

    return bool(is_bitsandbytes_available())


# Recipes are held to CUDA; these tests run on its CPU kernels.
bitsandbytes = pytest.mark.skipif(
    not _bitsandbytes_is_here(), reason="bitsandbytes is not installed: pip install bitsandbytes"
)


@pytest.fixture
def quantized(tiny_bert: Path) -> nn.Module:
    return load_int8(tiny_bert)


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).logits.square().sum().backward()
        optimizer.step()


@torchao
def test_heads_norms_and_embeddings_are_no_codes(quantized: nn.Module) -> None:
    plain = {name for name, p in quantized.named_parameters() if not is_coded(p)}
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"} <= plain
    assert set(codes(quantized)) == {
        f"bert.encoder.layer.{i}.{part}.weight"
        for i in range(2)
        for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip


def test_a_head_of_several_layers_and_a_language_head_stay_as_they_are() -> None:
    families = models.families()
    kept = {name: unquantized_modules(families[name]()) for name in ("roberta", "distilbert", "llama", "t5")}
    assert kept["roberta"] == ["classifier.dense", "classifier.out_proj"]
    assert kept["distilbert"] == ["classifier", "pre_classifier"]
    assert kept["llama"] == ["lm_head"]
    assert kept["t5"] == ["lm_head"]


@torchao
def test_step_0_is_the_quantised_base_bit_for_bit(quantized: nn.Module) -> None:
    batch = models.inputs(quantized)
    before = _logits(quantized, batch)
    ticktune.attach(quantized, dim=8)
    assert bits(_logits(quantized, batch)) == bits(before)


@torchao
def test_gradients_pass_the_codes_and_the_codes_stay(quantized: nn.Module) -> None:
    batch = models.inputs(quantized)
    before = codes(quantized)
    ticktune.attach(quantized, dim=8)
    models.perturb(p for _, role, p in adapter_parameters(quantized) if role == "P")
    quantized(**batch).logits.square().sum().backward()
    for key, _, parameter in adapter_parameters(quantized):
        assert parameter.dtype == torch.float32, key
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    for name, parameter in quantized.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name
    _step(quantized, batch)
    assert codes(quantized) == before


@torchao
def test_gradients_are_those_of_the_numbers_that_the_codes_stand_for(quantized: nn.Module, tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            whole = parameter.dequantize() if is_coded(parameter) else parameter
            plain.get_parameter(name).copy_(whole)
    batch = models.inputs(plain)
    found = []
    for model in (quantized, plain):
        ticktune.attach(model, dim=8, seed=3)
        torch.manual_seed(9)
        models.perturb(p for _, _, p in adapter_parameters(model))
        model(**batch).logits.square().sum().backward()
        found.append({key: p.grad for key, _, p in adapter_parameters(model)})
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-4, atol=1e-6)


@torchao
def test_a_copy_computes_alike_and_detaching_returns_the_base(quantized: nn.Module) -> None:
    batch = models.inputs(quantized)
    base, before = _logits(quantized, batch), codes(quantized)
    ticktune.attach(quantized, dim=8)
    models.perturb(p for _, _, p in adapter_parameters(quantized))
    twin = copy.deepcopy(quantized)
    assert bits(_logits(twin, batch)) == bits(_logits(quantized, batch))
    assert not torch.equal(_logits(twin, batch), base)
    ticktune.detach(quantized)
    assert bits(_logits(quantized, batch)) == bits(base)
    assert codes(quantized) == before


@torchao
@pytest.mark.parametrize("family", ["llama", "t5", "phi3", "roformer"])
def test_other_families_and_detected_ones_take_ticks_beside_codes(family: str, tmp_path: Path) -> None:
    import transformers as t

    if family == "roformer":  # in no table: its blocks are found by proof
        config = t.RoFormerConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=82, vocab_size=64
        )
        model: Any = t.AutoModelForSequenceClassification.from_config(config)
    else:
        model = models.families()[family]()
    model.save_pretrained(tmp_path)
    auto = "AutoModelForSequenceClassification" if family == "roformer" else models.table()[family].auto
    quantized = load_int8(tmp_path, auto)
    assert codes(quantized)
    batch = models.inputs(quantized)
    before = _logits(quantized, batch)
    ticktune.attach(quantized, dim=4)
    assert attachment_of(quantized).ticks
    by_proof = any("numerical proof" in note for note in attachment_of(quantized).layout.notes)
    assert by_proof == (family == "roformer")
    assert bits(_logits(quantized, batch)) == bits(before)
    models.perturb(p for _, role, p in adapter_parameters(quantized) if role == "P")
    quantized(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for _, role, p in adapter_parameters(quantized) if role != "head")


@torchao
def test_a_value_that_is_not_finite_is_found_in_the_scales(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(tiny_bert)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    loading = loading_arguments("int8", keep=["classifier"], dtype=torch.float32, device=CPU)
    with pytest.raises(BaseModelError, match=r"layer\.1\.output\.dense\.weight holds NaN"):
        load_model(BaseFiles("x", tmp_path), "AutoModelForSequenceClassification", loading=loading)


@torchao
def test_the_fingerprint_in_memory_sees_codes_and_scales(quantized: nn.Module) -> None:
    def found() -> str:
        return fingerprint_in_memory({n: p.detach() for n, p in quantized.named_parameters()})

    weight: Any = quantized.get_parameter("bert.encoder.layer.0.output.dense.weight")
    first = found()
    assert found() == first
    weight.qdata[0, 0] += 1
    second = found()
    weight.scale[0] *= 2
    assert len({first, second, found()}) == 3


@torchao
def test_files_of_codes_say_their_method_and_the_dtype_of_the_rest(tiny_bert: Path, tmp_path: Path) -> None:
    int8_copy(tiny_bert, tmp_path)
    full, int8 = BaseFiles("full", tmp_path / "full"), BaseFiles("int8", tmp_path / "int8")
    assert (stored_quantization(full), stored_quantization(int8)) == (None, "torchao")
    assert stored_dtype(int8) == "float32"


@torchao
def test_a_body_saved_as_codes_says_which_class_opens_it(tiny_bert: Path, tmp_path: Path) -> None:
    load_int8(tiny_bert, "AutoModel").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        load_model(BaseFiles("x", tmp_path), "AutoModelForSequenceClassification")
    assert "the class that saved them" in caught.value.problems[0].fix


@torchao
def test_merging_a_quantised_model_in_memory_is_refused_and_the_way_out_works(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    int8_copy(tiny_bert, tmp_path)
    model = ticktune.attach(Auto.from_pretrained(tmp_path / "int8").eval(), dim=8)
    models.perturb(p for _, _, p in adapter_parameters(model))
    with pytest.raises(ExportError, match=r"quantised \(by torchao\)") as caught:
        ticktune.merge(model, tmp_path / "merged")
    assert "full_precision=True" in caught.value.problems[0].fix
    assert not (tmp_path / "merged").exists()

    ticktune.save_adapter(model, tmp_path / "adapter")
    assert read_facts(tmp_path / "adapter").base["stored_quantization"] == "torchao"
    full = Auto.from_pretrained(tmp_path / "full").eval()
    with pytest.raises(BaseModelError, match="another base"):
        ticktune.load_adapter(full, tmp_path / "adapter")
    ticktune.load_adapter(full, tmp_path / "adapter", full_precision=True)
    assert ticktune.merge(full, tmp_path / "merged").max_difference < 1e-5


@torchao
def test_an_adapter_of_codes_made_while_reading_fits_the_same_files(tiny_bert: Path, tmp_path: Path) -> None:
    int8_copy(tiny_bert, tmp_path)
    model = ticktune.attach(load_int8(tmp_path / "full"), dim=8)
    models.perturb(p for _, _, p in adapter_parameters(model))
    ticktune.save_adapter(model, tmp_path / "adapter")
    again = ticktune.load_adapter(load_int8(tmp_path / "full"), tmp_path / "adapter")
    batch = models.inputs(model)
    assert bits(_logits(again, batch)) == bits(_logits(model, batch))


@torchao
def test_full_precision_is_no_key_to_any_other_base(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    int8_copy(tiny_bert, tmp_path)
    model = ticktune.attach(Auto.from_pretrained(tmp_path / "full"), dim=8)
    ticktune.save_adapter(model, tmp_path / "adapter")
    other = Auto.from_pretrained(tiny_bert)
    torch.nn.init.normal_(other.bert.embeddings.word_embeddings.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelError, match="another base"):
        ticktune.load_adapter(Auto.from_pretrained(tmp_path / "other"), tmp_path / "adapter", full_precision=True)


@torchao
def test_a_quantised_head_is_refused_where_it_would_be_trained(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    int8_copy(tiny_bert, tmp_path)
    loading = loading_arguments("int8", keep=["bert.pooler"], dtype=torch.float32, device=CPU)
    model = Auto.from_pretrained(tmp_path / "full", **loading)
    assert is_coded(model.classifier.weight)
    with pytest.raises(PatchError, match=r"classifier\.weight is quantised") as caught:
        ticktune.attach(model, dim=8)
    assert "head.train: false" in caught.value.problems[0].fix
    ticktune.attach(model, dim=8, head=False)


@torchao
def test_int8_leaves_the_settings_of_the_compiler_alone() -> None:
    import torch._inductor.config as inductor

    before = inductor.shallow_copy_dict()
    loading_arguments("int8", keep=[], dtype=torch.float32, device=CPU)
    config = loading_arguments("int8", keep=["b", "a"], dtype=torch.float32, device=CPU)["quantization_config"]
    assert config.modules_to_not_convert == ["a", "b"]
    assert config.quant_type.set_inductor_config is False
    assert inductor.shallow_copy_dict() == before


def test_what_bitsandbytes_is_asked_for() -> None:
    device = torch.device("cuda:1")
    eight = loading_arguments("bnb-8bit", keep=["head"], dtype=torch.bfloat16, device=device)
    four = loading_arguments("bnb-4bit", keep=["head"], dtype=torch.bfloat16, device=device)
    assert eight["device_map"] == four["device_map"] == {"": "cuda:1"}
    assert eight["quantization_config"].load_in_8bit
    assert four["quantization_config"].load_in_4bit
    assert four["quantization_config"].bnb_4bit_quant_type == "nf4"
    assert four["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    for found in (eight, four):
        assert found["quantization_config"].llm_int8_skip_modules == ["head"]
    assert loading_arguments("none", keep=["head"], dtype=torch.float32, device=device) == {}


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes_needs_cuda(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"{kind} needs a CUDA device"):
        check_possible(kind, CPU)


def test_files_of_bitsandbytes_need_cuda_too() -> None:
    with pytest.raises(RecipeError, match="a base quantised by bitsandbytes needs a CUDA device"):
        check_possible("none", CPU, stored="bitsandbytes", where="base.model x")
    check_possible("none", CPU, stored=None)


@pytest.mark.parametrize(
    ("kind", "device", "command"),
    [("int8", "cpu", "install --upgrade torchao"), ("bnb-4bit", "cuda", "install --upgrade bitsandbytes accelerate")],
)
def test_a_missing_package_is_named_with_its_command(
    kind: str, device: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torchao", "bitsandbytes"):
        monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda: False)
    with pytest.raises(RecipeError, match="missing here") as caught:
        check_possible(kind, torch.device(device))
    assert command in caught.value.problems[0].fix
    assert caught.value.exit_code == 2


def test_4_bit_codes_save_more_than_8_bit_ones() -> None:
    linear = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 2))
    assert saved_bytes(linear, ["1"], "none", 4) == 0
    assert saved_bytes(linear, ["1"], "int8", 4) == 128 * 64 * 3 - 64 * 4
    assert saved_bytes(linear, ["1"], "bnb-4bit", 4) == 128 * 64 * 3.5 - 128 * 64 // 64 * 4


def test_a_plain_model_is_not_quantised() -> None:
    model = models.families()["bert"]()
    assert not is_quantized(model)
    assert [t is p for p in model.parameters() for t in plain_parts(p)] == [True] * len(list(model.parameters()))


@bitsandbytes
@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
@pytest.mark.filterwarnings("ignore")
def test_ticks_train_beside_bitsandbytes_codes(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    name = "AutoModelForSequenceClassification"
    loading = loading_arguments(kind, keep=["classifier", "bert.pooler.dense"], dtype=torch.float32, device=CPU)
    model, fresh = load_model(BaseFiles("x", tiny_bert), name, dtype="float32", loading=loading)
    assert fresh == ["classifier.bias", "classifier.weight"]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else a CPU repacks 4-bit codes, which CUDA never does
    batch = models.inputs(model)
    base, before = _logits(model, batch), codes(model)
    assert len(before) == 12
    ticktune.attach(model, dim=8, fresh=fresh)
    assert bits(_logits(model, batch)) == bits(base)
    _step(model, batch)
    assert codes(model) == before
    assert not torch.equal(_logits(model, batch), base)
    assert all(p.dtype == torch.float32 and p.grad is not None for _, _, p in adapter_parameters(model))
    with pytest.raises(ExportError, match=r"quantised \(by bitsandbytes\)"):
        ticktune.merge(model, tmp_path / "merged")


@bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_a_fresh_head_on_bitsandbytes_files_is_no_codes(tmp_path: Path) -> None:
    import transformers as t

    config = t.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64
    )
    t.RobertaModel(config).save_pretrained(tmp_path / "full")
    loading = loading_arguments("bnb-4bit", keep=[], dtype=torch.float32, device=CPU)
    t.AutoModel.from_pretrained(tmp_path / "full", **loading).save_pretrained(tmp_path / "codes")
    name = "AutoModelForSequenceClassification"
    files = BaseFiles("x", tmp_path / "codes")
    keep = ["classifier.dense", "classifier.out_proj"]
    model, fresh = load_model(files, name, dtype="float32", keep=keep, loading={"device_map": {"": "cpu"}})
    assert len(codes(model)) == 12
    assert sorted(fresh) == [f"classifier.{part}.{p}" for part in ("dense", "out_proj") for p in ("bias", "weight")]
    ticktune.attach(model, dim=8, fresh=fresh)
    assert model.get_parameter("classifier.dense.weight").dtype == torch.float32
