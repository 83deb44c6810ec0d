"""The wide form of ticks: the same function and gradients, weights held once, and whatever happens to a model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tests.models as models
from benchmarks.counting import flops, saved_bytes
from tests.quantized import load_int8
from tests.training import causal_lm, classification, optimizer_of, snapshot, steps
from ticktune.errors import PatchError
from ticktune.patch import standins
from ticktune.patch.attach import adapter_parameters, attach, attachment_of
from ticktune.patch.standins import Checkpointed, Compiled, layers_of, places_of, standing_in
from ticktune.patch.wide import Wide

DIM = 6
SPLIT_ONLY = {
    "falcon": "the projections are FalconLinear",
    "mixtral": "experts have no projections of their own",
    "segformer": "a convolution stands between the projections",
}
IN_PART = {"qwen2_moe": 3, "qwen3_moe": 1}
"""Experts beside blocks of the usual kind, and how many of these there are."""


def _build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model that drops no hidden units."""
    torch.manual_seed(1)
    model = models.families()[family]().to(dtype)
    for module in model.modules():
        for name in ("activation_dropout", "dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _ticked(model: nn.Module, **options: Any) -> nn.Module:
    """Puts ticks on a model that do something."""
    attach(model, DIM, **options)
    torch.manual_seed(2)
    models.perturb([p for _, _, p in adapter_parameters(model)], 0.05)
    return model


def _gradients(
    model: nn.Module, around: AbstractContextManager[Any], kind: str = ""
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of the model on the same inputs, and the gradients of everything trained."""
    model.zero_grad()
    torch.manual_seed(3)
    batch = models.inputs(model, kind)
    with around:
        value = models.result(model(**batch))
    value.double().square().mean().backward()
    return value.detach().double(), {k: p.grad.double() for k, _, p in adapter_parameters(model) if p.grad is not None}


def _agree(model: nn.Module, wide: Wide, kind: str = "", allowed: float = 1e-5) -> None:
    """Asserts that both forms have the same result and gradients."""
    value, plain = _gradients(model, nullcontext(), kind)
    found, ours = _gradients(model, wide.running(), kind)
    assert (found - value).norm() <= allowed * value.norm()
    assert plain.keys() == ours.keys()
    scale = max(gradient.norm() for gradient in plain.values())
    for key, gradient in plain.items():
        assert (gradient - ours[key]).norm() <= allowed * (gradient.norm() + 1e-3 * scale), key


@pytest.mark.parametrize("family", sorted(models.families()))
def test_function_and_gradients_are_those_of_the_split_form(family: str) -> None:
    # Grouped products of experts know no float64.
    model = _ticked(_build(family, torch.float32 if family in IN_PART else torch.float64))
    is_fused = any(ffn.fused for ffn in attachment_of(model).layout.ffns)  # of a DINOv2, versions differ
    reason = SPLIT_ONLY.get(family, "gate and up are one projection" if is_fused else None)
    if reason is not None:
        with pytest.raises(PatchError, match=reason):
            Wide(model)
        return
    wide = Wide(model)
    assert bool(wide.obstacles) == (family in IN_PART)
    if family in IN_PART:
        assert wide.blocks == IN_PART[family]
    _agree(model, wide, models.table()[family].kind)


def test_the_units_of_a_tick_stand_beside_those_of_the_base() -> None:
    model = _ticked(_build("bert"))
    sizes: list[int] = []
    act = model.get_submodule("bert.encoder.layer.0.intermediate.intermediate_act_fn")
    act.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    wide = Wide(model)
    with wide.running():
        model(**models.inputs(model))
    model(**models.inputs(model))
    # The activation is asked three times in split form: for the block, and for the tick of each layer that shares it.
    assert sizes[0] == models.WIDTH + DIM
    assert models.WIDTH + DIM not in sizes[1:]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "llama-mlp-bias", "t5"])
def test_weights_are_held_once_and_are_as_they_were(family: str) -> None:
    model = _ticked(_build(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = _held(model)
    wide = Wide(model)
    with wide.running():
        pass
    ticks = sum(
        p.numel() * p.element_size() for _, role, p in adapter_parameters(model) if role in ("Q", "U", "P", "r")
    )
    biases = wide.blocks * DIM * 4 * 2  # of units without an r of their own
    assert held < _held(model) <= held + ticks + biases
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _held(model: nn.Module) -> int:
    """Bytes of the storages that the model's parameters lie in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_the_model_is_as_it_was_outside() -> None:
    model = _ticked(_build("llama"))
    value, _ = _gradients(model, nullcontext())
    wide = Wide(model)
    modules = dict(model.named_modules())
    _gradients(model, wide.running())
    assert dict(model.named_modules()) == modules
    again, _ = _gradients(model, nullcontext())
    assert torch.equal(value, again)


def _trained(model: nn.Module, wide: Wide) -> None:
    optimizer = torch.optim.AdamW([p for _, _, p in adapter_parameters(model)], lr=0.1)
    _gradients(model, wide.running())
    optimizer.step()


def _loaded(model: nn.Module, wide: Wide) -> None:
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def _assigned(model: nn.Module, wide: Wide) -> None:
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CHANGES: dict[str, Callable[[nn.Module, Wide], Any]] = {
    "an update": _trained,
    "a state dict": _loaded,
    "an assigned state dict": _assigned,
    "another dtype": lambda model, wide: model.double(),
    "another dtype and back": lambda model, wide: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_changed_is_taken_over(family: str, change: str) -> None:
    model = _ticked(_build(family), norms="none", head=False)
    wide = Wide(model)
    value, _ = _gradients(model, wide.running())
    CHANGES[change](model, wide)
    _agree(model, wide)
    if "dtype" not in change:
        assert not torch.allclose(_gradients(model, wide.running())[0], value, rtol=1e-9)


def test_a_deep_copy_is_another_model() -> None:
    model = _ticked(_build("gpt2"))
    wide = Wide(model)
    value, _ = _gradients(model, wide.running())
    other = copy.deepcopy(model)
    models.perturb([p for _, _, p in adapter_parameters(other)])
    _agree(other, Wide(other))
    assert torch.equal(_gradients(model, wide.running())[0], value)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_under_autocast_it_is_as_near_to_float32_as_the_split_form(family: str) -> None:
    plain = _build(family)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.bfloat16())
    exact, half = _ticked(plain), _ticked(_build(family))
    half = _ticked(_rounded(family))
    _, reference = _gradients(exact, nullcontext())

    def errors(around: Any) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            _, found = _gradients(half, around)
        return {key: float((found[key] - reference[key]).norm() / reference[key].norm()) for key in reference}

    split, wide = errors(nullcontext()), errors(Wide(half, torch.bfloat16).running())
    assert all(wide[key] < 0.1 for key in wide)
    assert sum(wide.values()) < 1.3 * sum(split.values())


def _rounded(family: str) -> nn.Module:
    return _build(family).to(torch.bfloat16)


def test_it_multiplies_as_much_and_keeps_no_more() -> None:
    def step(model: nn.Module, around: Any) -> Callable[[], Any]:
        return lambda: _gradients(model, around())

    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = _ticked(transformers.BertForSequenceClassification(config).eval())
    wide = Wide(model)
    assert flops(step(model, wide.running)) == flops(step(model, nullcontext))

    def kept(around: Any) -> int:
        def forward() -> Tensor:
            with around():
                return models.result(model(**models.inputs(model)))

        return saved_bytes(model, forward)

    assert kept(wide.running) <= kept(nullcontext)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["checkpointed", "compiled", "checkpointed and compiled"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_with_checkpointed_and_compiled_layers(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    model = _ticked(_build(family))
    wide, layers = Wide(model), layers_of(model)
    found: dict[nn.Module, nn.Module] = {layer: layer for layer in layers}
    if "compiled" in kind:
        found = {layer: Compiled(layer) for layer in layers}
    if "checkpointed" in kind:
        found = {layer: Checkpointed(inner, wide.again) for layer, inner in found.items()}
    value, plain = _gradients(model, wide.running())
    again, ours = _gradients(model, _both(wide.running(), standing_in(places_of(model, layers), found)))
    assert torch.allclose(value, again, rtol=1e-5, atol=1e-6)
    for key, gradient in plain.items():
        assert torch.allclose(gradient, ours[key], rtol=1e-3, atol=1e-6), key
    torch._dynamo.reset()


def test_a_second_run_of_a_checkpointed_layer_is_wide_too() -> None:
    """Else what the two runs keep would differ, which torch refuses."""
    model = _ticked(_build("bert"))
    wide, layers = Wide(model), layers_of(model)
    found = {layer: Checkpointed(layer) for layer in layers}
    with pytest.raises(RuntimeError, match="different number of tensors|different metadata"):
        _gradients(model, _both(wide.running(), standing_in(places_of(model, layers), found)))


@pytest.mark.parametrize("maker", [classification, causal_lm])
def test_training_has_the_losses_of_the_split_form(maker: Any, tiny_bert: Path, tiny_llama: Path) -> None:
    found = []
    for is_wide in (False, True):
        torch.manual_seed(5)
        work = maker(tiny_bert if maker is classification else tiny_llama)
        attach(work.model, DIM, fresh=())
        wide = Wide(work.model) if is_wide else None
        optimizer = optimizer_of(work.model, lr=1e-2, eps=1e-2)  # else AdamW's step is the sign of rounding errors
        around = {"around": lambda batch, wide=wide: wide.running()} if wide else {}
        reports = list(steps(work, work.batches(12, 5), optimizer, base_dropout=False, **around))
        found.append(([r.loss for r in reports], snapshot(work.model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert any(not torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])  # it is another way


OBSTACLES: dict[str, tuple[str, dict[str, Any], torch.dtype | None]] = {
    "hidden units are dropped out": ("bert", {"dropout": 0.1}, None),
    "the ticks are plain and the blocks gated": ("llama", {"form": "plain"}, None),
    "the base's weights are not bfloat16": ("bert", {}, torch.bfloat16),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_cannot_be_wide_is_said(reason: str) -> None:
    family, options, dtype = OBSTACLES[reason]
    with pytest.raises(PatchError, match=reason):
        Wide(_ticked(_build(family), **options), dtype)


def test_dropout_of_hidden_units_is_an_obstacle() -> None:
    torch.manual_seed(1)
    model = attach(models.families()["bart"](), DIM)
    with pytest.raises(PatchError, match="hidden units are dropped out"):
        Wide(model)


def test_quantised_weights_stay_as_they_are(tiny_bert: Path) -> None:
    model = attach(load_int8(tiny_bert), DIM)
    with pytest.raises(PatchError, match="the base's weights are quantised"):
        Wide(model)


def test_weights_that_layers_share_are_an_obstacle() -> None:
    model = _build("bert")
    layers = model.get_submodule("bert.encoder.layer")
    layers[1].output.dense.weight = layers[0].output.dense.weight  # type: ignore[index,union-attr]
    wide = Wide(_ticked(model))
    assert (wide.blocks, wide.obstacles) == (1, ["layers share their weights"])
    _agree(model, wide)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-mlp-bias"])
def test_released_weights_are_laid_out_as_they_were(family: str) -> None:
    model = _ticked(_build(family))
    before = {name: (p.stride(), p.untyped_storage().nbytes(), p.clone()) for name, p in model.named_parameters()}
    wide = Wide(model)
    with wide.running():
        pass
    assert any(p.stride() != before[name][0] for name, p in model.named_parameters())
    wide.release()
    for name, parameter in model.named_parameters():
        assert (parameter.stride(), parameter.untyped_storage().nbytes()) == before[name][:2], name
        assert torch.equal(parameter, before[name][2]), name
    _agree(model, wide)


def test_a_model_without_ticks_has_no_wide_form() -> None:
    with pytest.raises(PatchError, match="there are no ticks"):
        Wide(attach(_build("bert"), 0))
