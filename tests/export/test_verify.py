"""Invariant 4: stock transformers, in a process without ticktune, computes what base + adapter computed."""

import json
import math
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tests.models as models
from tests.reliability.catalogue import case
from ticktune.adapter import describe_adapter
from ticktune.errors import ExportError, OutputError, ResourceError
from ticktune.export import verify
from ticktune.export.save import Evidence, existing_export, verification_of, write_merged
from ticktune.export.stock_forward import main_tensor
from ticktune.export.verify import check_loading, compare, stock_logits
from ticktune.export.widen import widen
from ticktune.patch.attach import adapter_parameters, adapter_state, attach, attachment_of, detach
from ticktune.patch.detect import find_layout

DIM = 5
TABLE = {name: row for name, row in models.table().items() if name not in models.FIXED_WIDTH}


@dataclass
class Case:
    """Logits of one family, of base + adapter here and of the merged folder in a fresh process."""

    ours: dict[str, Tensor]
    base: dict[str, Tensor]
    merged: dict[str, Tensor]
    control: dict[str, Tensor]


@dataclass
class Reloaded:
    cases: dict[str, Case]
    broken: Tensor
    said: list[dict[str, Any]]


def _decide(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.topk(2, dim=-1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        return models.result(model(**cast))


def _zero_one_column(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.2.output.dense.weight"][:, -1] = 0  # the last unit is of a tick
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Reloaded:
    """Merges every family and reloads all of them: one fresh process for each kind of input."""
    import transformers

    folder = tmp_path_factory.mktemp("merged")
    torch.manual_seed(0)
    batches: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Case] = {}
    auto: dict[str, str] = {}
    for name, row in TABLE.items():
        model = models.families()[name]()
        models.perturb(p for key, p in model.named_parameters() if "classifier" in key)
        auto[name] = row.auto
        batch = batches.setdefault(row.kind, models.inputs(model, row.kind))
        model.save_pretrained(folder / "control" / name)
        found[name] = Case({}, {}, {}, {})
        tensors: dict[str, Tensor] = {}
        for dtype in ("float32", "float64"):
            # Loaded in this dtype, not cast to it: Gemma computes a constant in the dtype of loading.
            loader = getattr(transformers, auto[name])
            model = loader.from_pretrained(folder / "control" / name, dtype=getattr(torch, dtype)).eval()
            if dtype == "float64" and hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the grouped kernels take no float64
            found[name].base[dtype] = _logits(model, batch)
            # Not in every layer, so that the others get zero units.
            attach(model, DIM, {s: [0, n - 1] for s, n in find_layout(model).sizes.items()}, head=False)
            if not tensors:
                models.perturb(p for _, _, p in adapter_parameters(model))
                tensors = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
            for key, _, parameter in adapter_parameters(model):
                parameter.data = tensors[key].to(getattr(torch, dtype))
            found[name].ours[dtype] = _logits(model, batch)
        plan = attachment_of(model).plan
        widen(detach(model), plan, tensors, pad_to="none")
        model.save_pretrained(folder / "merged" / name)
    shutil.copytree(folder / "merged" / "bert", folder / "broken")
    _zero_one_column(folder / "broken")

    said: list[dict[str, Any]] = []
    broken = torch.zeros(())
    run = verify.subprocess.run
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any, **options: Any) -> Any:
            done = run(*args, **options)
            said.extend(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
            return done

        patch.setattr(verify.subprocess, "run", spy)
        for kind, batch in batches.items():
            names = [name for name in found if TABLE[name].kind == kind]
            wanted = [
                (folder / which / name, auto[name], dtype)
                for name in names
                for which in ("merged", "control")
                for dtype in ("float32", "float64")
            ]
            if kind == "text":
                wanted.append((folder / "broken", auto["bert"], "float64"))
            answers = [logits for [logits] in stock_logits(wanted, [batch])]
            if kind == "text":
                broken = answers.pop()
            for name in names:
                for which in (found[name].merged, found[name].control):
                    which["float32"], which["float64"] = answers.pop(0), answers.pop(0)
    return Reloaded(found, broken, said)


def _compare(case: Case, dtype: str, tolerance: float) -> verify.Verification:
    lists = [[which[dtype]] for which in (case.ours, case.merged, case.base, case.control)]
    return compare(*lists, [None], _decide, tolerance=tolerance)


@case("C5")
def test_a_full_disk_in_the_fresh_process_is_a_full_disk(tiny_llama: Path, tmp_path: Path) -> None:
    ids = {"input_ids": torch.ones(4, 16, dtype=torch.long)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # between inputs and logits
    try:
        with pytest.raises(ResourceError, match=r"the disk is full \(File too large\)") as caught:
            stock_logits([(tiny_llama, "AutoModelForCausalLM", "float32")], [ids], folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.problems[0].where == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


@case("X1")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("family", list(TABLE))
def test_merged_folder_equals_adapter_in_a_fresh_process(
    reloaded: Reloaded, family: str, dtype: str, tolerance: float
) -> None:
    case = reloaded.cases[family]
    assert case.merged[dtype].dtype == getattr(torch, dtype)
    scale = max(1.0, float(case.ours[dtype].abs().max()))
    assert float((case.merged[dtype] - case.ours[dtype]).abs().max()) <= tolerance * scale
    found = _compare(case, dtype, tolerance)
    assert found.is_conclusive
    assert found.changed <= found.near_ties
    assert found.tolerance == pytest.approx(tolerance * scale)


def test_fresh_process_does_not_know_ticktune(reloaded: Reloaded) -> None:
    assert len(reloaded.said) == 4 * len(TABLE) + 1
    assert all(found["ticktune"] == [] for found in reloaded.said)
    with pytest.raises(ExportError, match=r"ticktune ticktune\.patch"):
        check_loading({"ticktune": ["ticktune.patch"]}, Path("merged"))


def test_folder_with_one_tick_zeroed_is_refused(reloaded: Reloaded) -> None:
    case = reloaded.cases["bert"]
    with pytest.raises(ExportError, match="differs from base"):
        compare(
            [case.ours["float64"]],
            [reloaded.broken],
            [case.base["float64"]],
            [case.control["float64"]],
            [None],
            _decide,
        )


def test_folder_that_does_not_load_exactly_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    ids = {"input_ids": torch.tensor([[4, 5, 6]])}
    for name in ("extra", "missing"):
        shutil.copytree(tiny_bert, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        key = "encoder.layer.1.output.dense.bias"
        if name == "extra":
            weights["encoder.layer.1.output.tick.P"] = torch.ones(2)
        else:
            del weights[key]
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"unexpected_keys .*layer\.1\.output\.tick\.P"):
        stock_logits([(tiny_bert, "AutoModel", "float32"), (tmp_path / "extra", "AutoModel", "float32")], [ids])
    with pytest.raises(ExportError, match=r"missing_keys .*layer\.1\.output\.dense\.bias"):
        stock_logits([(tmp_path / "missing", "AutoModel", "float32")], [ids])


def _four(ours: Tensor) -> list[list[Tensor]]:
    """Ours, merged, base, control: all well."""
    return [[ours], [ours.clone()], [ours + 1], [ours + 1]]


OURS = torch.tensor([[3.0, 1.0], [-2.0, 5.0], [0.5, 0.1]])


def test_equal_logits_pass() -> None:
    found = compare(*_four(OURS), [None], _decide)
    assert found.is_conclusive
    assert (found.rows, found.decisions, found.changed, found.near_ties) == (3, 3, 0, 0)
    assert found.max_difference == found.control_difference == 0
    assert found.effect == pytest.approx(1)
    assert found.tolerance == pytest.approx(5e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["ours", "merged", "both", "control", "all"])
def test_logits_that_are_not_finite_fail(which: str, value: float) -> None:
    ours, merged, base, control = _four(OURS.clone())
    for name, logits in (("ours", ours), ("merged", merged), ("base", base), ("control", control)):
        if which in (name, "all") or (which == "both" and name in ("ours", "merged")):
            logits[0][1, 1] = value
    with pytest.raises(ExportError):
        compare(ours, merged, base, control, [None], _decide)


@pytest.mark.parametrize("batch", [0, 1])
def test_difference_in_any_batch_fails(batch: int) -> None:
    lists = [[part.clone() for part in (*which, *which)] for which in _four(OURS)]
    lists[1][batch][0, 0] += 1e-4
    with pytest.raises(ExportError, match="the merged folder differs from base"):
        compare(*lists, [None, None], _decide)


def test_difference_of_the_control_fails() -> None:
    ours, merged, base, control = _four(OURS)
    control[0][2, 0] += 1e-4
    with pytest.raises(ExportError, match=r"the unticked base differs .* after saving and reloading"):
        compare(ours, merged, base, control, [None], _decide)


def test_tolerance_grows_with_the_largest_logit_only_above_one() -> None:
    for scale, allowed in ((100.0, 5e-3), (0.01, 1e-5)):
        ours, merged, base, control = _four(OURS * scale)
        assert compare(ours, merged, base, control, [None], _decide).tolerance == pytest.approx(allowed)
        merged[0][0, 0] += 2 * allowed
        with pytest.raises(ExportError):
            compare(ours, merged, base, control, [None], _decide)


@pytest.mark.parametrize(("effect", "is_conclusive"), [(0.0, False), (0.04, False), (0.06, True)])
def test_small_effect_proves_nothing(effect: float, is_conclusive: bool) -> None:
    # The tolerance is 5e-5 here; 1000 times that is 0.05.
    found = compare([OURS], [OURS], [OURS + effect], [OURS + effect], [None], _decide)
    assert found.is_conclusive == is_conclusive


def test_near_tie_may_change_and_is_counted() -> None:
    ours = torch.tensor([[1.0, 1.0 + 1e-6], [4.0, 0.0]])
    merged = torch.tensor([[1.0 + 2e-6, 1.0], [4.0, 0.0]])
    found = compare([ours], [merged], [ours + 1], [ours + 1], [None], _decide)
    assert (found.changed, found.near_ties, found.decisions) == (1, 1, 2)


def test_changed_prediction_that_is_no_near_tie_fails() -> None:
    def always_other(logits: Tensor) -> tuple[Tensor, Tensor]:
        decisions, margins = _decide(logits)
        return decisions + (0 if logits is OURS else 1), margins

    ours, merged, base, control = _four(OURS)
    with pytest.raises(ExportError, match="a prediction of the merged folder differs"):
        compare([OURS], merged, base, control, [None], always_other)


def test_padding_does_not_count() -> None:
    ours = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ours[0, 2] = math.nan
    merged = ours.clone()
    merged[0, 2] = 7.0
    four = [[ours], [merged], [ours + 1], [ours + 1]]
    found = compare(*four, [mask], _decide)
    assert found.decisions == 5
    assert found.max_difference == 0
    assert found.tolerance == pytest.approx(1e-5 * max(1.0, float(ours[mask].abs().max())))
    merged[1, 2, 0] += 0.1
    with pytest.raises(ExportError):
        compare(*four, [mask], _decide)


def test_logits_of_another_shape_fail() -> None:
    ours, _, base, control = _four(OURS)
    with pytest.raises(ExportError, match=r"the shape \(3, 1\), expected \(3, 2\)"):
        compare(ours, [OURS[:, :1]], base, control, [None], _decide)


@dataclass
class Parts:
    """What write_merged takes."""

    stock: nn.Module
    tensors: dict[str, Tensor]
    facts: Any
    evidence: Evidence


def _parts(scale: float = 0.3) -> Parts:
    torch.manual_seed(2)
    model = models.families()["bert"]()
    stock = models.families()["bert"]()
    stock.load_state_dict(model.state_dict())
    batch = models.inputs(model)
    attach(model, DIM, [1])
    models.perturb((p for _, role, p in adapter_parameters(model) if role == "head"), 0.3)
    with torch.no_grad():
        base = [model(**batch).logits]
    models.perturb((p for _, role, p in adapter_parameters(model) if role != "head"), scale)
    with torch.no_grad():
        ours = [model(**batch).logits]
    facts = describe_adapter(
        model,
        {"name": "tiny", "commit": None, "fingerprint": "0" * 64},
        model_class="AutoModelForSequenceClassification",
    )
    evidence = Evidence([batch], [None], ours, base, main_tensor, _decide, lambda logits: {})
    return Parts(stock, {k: v.clone() for k, v in adapter_state(model).items()}, facts, evidence)


def _write(target: Path, parts: Parts, **options: Any) -> dict[str, Any]:
    return write_merged(
        target,
        parts.stock,
        None,
        parts.tensors,
        parts.facts,
        parts.evidence,
        **{"dtype": "float32", "adapter_sha256": "a" * 64, **options},
    )


def test_written_folder_is_verified_and_known_again(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    parts = _parts()
    document = _write(tmp_path / "merged", parts, dtype="bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    found = verification_of(document)
    assert found.is_conclusive
    assert found.max_difference <= found.tolerance
    assert document["widths"] == {"intermediate_size": 82 + DIM + 1}  # even, as 82 is
    assert 0 < document["cast"]["max_difference"] < 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert existing_export(tmp_path / "merged", "a" * 64, "bfloat16") == document
    assert existing_export(tmp_path / "merged", "b" * 64, "bfloat16") is None
    assert existing_export(tmp_path / "merged", "a" * 64, "float32") is None
    assert existing_export(tmp_path, "a" * 64, "float32") is None
    with pytest.raises(OutputError, match="exists already"):
        _write(tmp_path / "merged", _parts())


def test_ticks_that_ran_are_recorded_and_older_records_load(tmp_path: Path) -> None:
    parts = _parts()
    parts.evidence = replace(parts.evidence, ran={"encoder.0.ffn": True, "encoder.1.ffn": False})
    document = _write(tmp_path / "merged", parts)
    found = verification_of(document)
    assert (found.ticks, found.ticks_run, found.idle_ticks) == (2, 1, ["encoder.1.ffn"])
    assert "ticks exercised | 1/2" in (tmp_path / "merged" / "README.md").read_text()
    assert "1 of 2 ticks got no input" in found.idle_text()
    for name in ("ticks", "ticks_run", "idle_ticks"):
        del document["verification"][name]
    older = verification_of(document)
    assert older.idle_text() == ""
    assert not any("exercised" in name for name, _ in older.lines())


def test_a_base_in_float64_is_merged_in_float64(tmp_path: Path) -> None:
    parts = _parts()
    parts.stock.double()
    parts.stock.get_parameter("bert.embeddings.word_embeddings.weight").data += 1e-12
    kept = parts.stock.get_parameter("bert.embeddings.word_embeddings.weight").detach().clone()
    _write(tmp_path / "merged", parts, dtype="float64")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(weights["bert.embeddings.word_embeddings.weight"], kept)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float64}


def test_folder_that_fails_the_comparison_does_not_appear(tmp_path: Path) -> None:
    parts = _parts()
    parts.tensors["encoder.1.ffn.P"][:, 0] = 0  # not what the logits of base + adapter were computed with
    with pytest.raises(ExportError, match="differs from base"):
        _write(tmp_path / "merged", parts)
    assert list(tmp_path.iterdir()) == []


@case("X10")
def test_tensors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    parts = _parts()
    parts.tensors["encoder.1.ffn.Q"][0, 0] = math.nan
    with pytest.raises(ExportError, match=r"encoder\.1\.ffn\.Q holds NaN"):
        _write(tmp_path / "merged", parts)
    assert list(tmp_path.iterdir()) == []


@case("X10")
def test_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    parts = _parts()
    parts.tensors["head.classifier.bias"][0] += 1e6  # beyond float16
    for logits in (parts.evidence.ours, parts.evidence.base):
        logits[0][:, 0] += 1e6
    with pytest.raises(ExportError, match="in float16 the logits are not finite"):
        _write(tmp_path / "merged", parts, dtype="float16")
    assert list(tmp_path.iterdir()) == []
