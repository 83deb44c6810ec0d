"""Attention and dropout on a CPU: the same function and gradients as torch's, by any road to them."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tests.models as models
from benchmarks.counting import saved_bytes
from ticktune.patch import cpu
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.cpu import NAME, OnCpu, attend, attention, noise
from ticktune.patch.standins import Checkpointed, layers_of, places_of, standing_in
from ticktune.patch.ticks import drop_probability

QUERIES, KEYS = 9, 9
HEADS = [(4, 4), (4, 2), (3, 1)]
BY_NAME = {"falcon"}
"""Families that ask what their attention is called."""
MASKS = ["none", "causal", "rows", "heads", "of all", "blind"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our attention even where torch's is as fast, so that it can be compared in float64 and float32."""
    monkeypatch.setattr(cpu, "_is_worth_it", lambda *_: True)


def _states(heads: int, groups: int, dtype: torch.dtype, count: int = KEYS, size: int = 8) -> list[Tensor]:
    """Queries, keys and values ``(3, heads, count, size)`` as projections leave them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, size), (groups, size), (groups, size + 2)
    made = (torch.randn(3, count, *each, generator=generator) for each in sizes)
    return [states.to(dtype).transpose(1, 2).requires_grad_(True) for states in made]


def _mask(kind: str, heads: int, count: int = KEYS) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind in ("none", "causal"):
        return None
    shape = {"rows": (3, 1), "heads": (3, heads), "of all": (), "blind": (3, 1)}[kind]
    mask = torch.rand(*shape, count, count, generator=generator) > 0.4
    mask[..., 0] = True
    if kind == "blind":
        mask[1, :, 2:4] = False
    return mask


def _plain(states: list[Tensor], mask: Tensor | None, *, causal: bool, scale: float, drop: Tensor | None) -> Tensor:
    """In float64, as it is written down."""
    query, key, value = (each.double() for each in states)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scale * query @ key.transpose(2, 3)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights if drop is None else weights * drop.double()) @ value


def _gradients(found: Tensor, states: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(found.shape, generator=generator).to(found.dtype)
    return list(torch.autograd.grad((found * weights).sum(), states))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("at_once", [1, 200, 1 << 18])
@pytest.mark.parametrize("count", [KEYS, 17])  # both kinds of softmax
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_it_is_attention(
    heads: int, groups: int, kind: str, count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SCORES", at_once)
    states, mask = _states(heads, groups, torch.float64, count), _mask(kind, heads, count)
    found = attend(*states, mask, scale=0.3, is_causal=kind == "causal")
    expected = _plain(states, mask, causal=kind == "causal", scale=0.3, drop=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(_gradients(found, states), _gradients(expected, states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 1 << 18])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_dropout_leaves_weights_out_and_scales_the_others(
    heads: int, groups: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SCORES", at_once)
    states, p = _states(heads, groups, torch.float64), 0.25
    torch.manual_seed(5)
    found = attend(*states, dropout=p)
    # What was dropped shows where each value says whose it is.
    torch.manual_seed(5)
    ones = torch.eye(KEYS, dtype=torch.float64).expand(3, groups, KEYS, KEYS)
    used = attend(*states[:2], ones, dropout=p)
    weights = _plain([*states[:2], ones], None, causal=False, scale=8**-0.5, drop=None)
    drop = (used / weights).detach()
    assert {round(value, 6) for value in drop.flatten().tolist()} == {0.0, round(1 / (1 - p), 6)}
    expected = _plain(states, None, causal=False, scale=8**-0.5, drop=drop)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(_gradients(found, states), _gradients(expected, states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [8, 40, 130])
def test_in_bfloat16_it_is_as_near_as_the_eager_attention_of_transformers(count: int) -> None:
    states = _states(4, 4, torch.bfloat16, count)
    expected = _plain(states, None, causal=False, scale=8**-0.5, drop=None)
    plain = _gradients(expected, states)
    query, key, value = states
    theirs = ((query @ key.transpose(2, 3) * 8**-0.5).softmax(-1, dtype=torch.float32).bfloat16()) @ value
    found = attend(*states)
    assert (found - expected).norm() <= 1.1 * (theirs - expected).norm()
    for ours, other, each in zip(_gradients(found, states), _gradients(theirs, states), plain, strict=True):
        assert (ours - each).norm() <= 1.1 * (other - each).norm()


def test_what_all_keys_have_in_common_costs_no_digits() -> None:
    states = _states(4, 2, torch.bfloat16, 40, 16)
    with torch.no_grad():
        for each in states[:2]:
            each[..., 0] += 30  # scores of 200
    expected = _plain(states, None, causal=False, scale=16**-0.5, drop=None)
    found = attend(*states)
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    for ours, theirs in zip(_gradients(found, states), _gradients(expected, states), strict=True):
        assert (ours - theirs).norm() <= 3e-2 * theirs.norm()


def test_a_query_that_sees_no_key_hides_no_other_that_is_not_a_number() -> None:
    states, mask = _states(4, 2, torch.bfloat16), _mask("blind", 4)
    with torch.no_grad():
        states[0][0, :, 5] = math.nan
    found = attend(*states, mask)
    assert found[0, :, 5].isnan().all()
    assert not found[1, :, 2:4].any()
    (grad,) = torch.autograd.grad(found.float().sum(), states[1])
    assert grad[0].isnan().all()
    assert grad[1:].isfinite().all()


@pytest.mark.parametrize("case", ["no rows", "no tokens", "all drop out", "broadcast", "long"])
def test_what_torch_does_as_well_or_better_is_left_to_it(case: str) -> None:
    states = _states(4, 4, torch.bfloat16, 513 if case in ("long", "all drop out") else KEYS)
    p = 1.0 if case == "all drop out" else 0.0
    if case == "no rows":
        states = [each[:0] for each in states]
    if case == "no tokens":
        states = [each[:, :, :0] for each in states]
    if case == "broadcast":
        states[0] = states[0][:1]
    expected = F.scaled_dot_product_attention(*states, None, p)
    found = attend(*states, dropout=p)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("count", "size", "is_ours"), [(256, 8, True), (257, 8, False), (257, 32, True)])
def test_how_long_it_is_the_faster_one_depends_on_the_size_of_heads(count: int, size: int, is_ours: bool) -> None:
    states = _states(2, 2, torch.bfloat16, count, size)
    assert torch.equal(attend(*states), F.scaled_dot_product_attention(*states)) != is_ours


def test_only_queries_keys_and_values_are_kept() -> None:
    states = _states(4, 4, torch.bfloat16, 64)
    size = sum(each.numel() for each in states) * 2
    assert saved_bytes(nn.Identity(), lambda: attend(*states, dropout=0.1).sum()) <= size
    assert saved_bytes(nn.Identity(), lambda: F.scaled_dot_product_attention(*states, None, 0.1).sum()) > 2 * size


def test_a_mask_and_causal_attention_exclude_each_other() -> None:
    states = _states(4, 4, torch.bfloat16)
    with pytest.raises(RuntimeError, match="a mask and is causal too"):
        attend(*states, _mask("rows", 4), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_is_zero_as_often_as_it_shall_be_and_one_on_average(dtype: torch.dtype) -> None:
    found = noise((1001, 333), 0.1, dtype, torch.Generator().manual_seed(0))
    assert found.shape == (1001, 333)
    assert found.dtype == dtype
    zero = (found == 0).double().mean().item()
    error = math.sqrt(0.1 * 0.9 / found.numel())
    assert zero == pytest.approx(0.1, abs=4 * error)
    none, other = found.unique().tolist()
    assert none == 0
    assert other == pytest.approx(1 / 0.9, rel=5e-3 if dtype == torch.bfloat16 else 1e-4)
    # Neighbours, among them the four elements of one drawn number, and rows are independent.
    dropped = (found == 0).double()
    for one, other in (
        (dropped[:, :-1], dropped[:, 1:]),
        (dropped[:-1], dropped[1:]),
        (dropped[:, :-2], dropped[:, 2:]),
        (dropped[:, :-3], dropped[:, 3:]),
    ):
        assert (one * other).mean().item() == pytest.approx(0.01, abs=6 * math.sqrt(0.01 / found.numel()))


def test_noise_is_drawn_anew_and_again_from_the_same_seed() -> None:
    torch.manual_seed(3)
    first, second = noise((50,), 0.5, torch.float32), noise((50,), 0.5, torch.float32)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(noise((50,), 0.5, torch.float32), first)
    assert noise((), 0.0, torch.float32) == 1
    assert noise((3, 0), 0.5, torch.float32).shape == (3, 0)
    assert noise((99,), 1 - 1e-9, torch.float32).isfinite().all()


def _layer(**entries: Any) -> nn.Module:
    layer = nn.Module()
    for name, value in entries.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", ["none", "rows"])
def test_layers_get_what_the_attention_of_transformers_gives_them(kind: str, groups: int, causal: bool) -> None:
    states, mask = _states(4, groups, torch.bfloat16), _mask(kind, 4)
    layer = _layer(is_causal=causal, num_key_value_groups=4 // groups)
    expected, _ = sdpa_attention_forward(layer, *states, mask, scaling=0.2)
    # Some layers say that no weights are asked for.
    found, weights = attention(layer, *states, mask, scaling=0.2, output_attentions=False)
    assert weights is None
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert not torch.equal(found, expected)  # in another way
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["added", "bias", "float32", "fewer keys", "traced"])
def test_what_it_does_not_know_is_left_to_the_attention_of_transformers(case: str) -> None:
    states = _states(4, 4, torch.float32 if case == "float32" else torch.bfloat16)
    layer, mask, options = _layer(is_causal=False), None, {}
    if case == "added":
        mask = torch.randn(3, 1, QUERIES, KEYS).bfloat16()
    if case == "bias":
        options = {"position_bias": torch.randn(1, 4, QUERIES, KEYS).bfloat16()}
    if case == "fewer keys":
        states[1:] = [each[:, :, :5] for each in states[1:]]
    expected, _ = sdpa_attention_forward(layer, *states, mask, **options)
    run: Any = attention if case != "traced" else torch.compile(attention, backend="eager")
    assert torch.equal(run(layer, *states, mask, **options)[0], expected)


def test_under_autocast_it_multiplies_in_bfloat16() -> None:
    states = _states(4, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(_layer(is_causal=False), *states, None)
    assert found.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in _gradients(found, states))


def _model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    model = models.families()[family]().to(dtype)
    attach(model, 6)
    torch.manual_seed(2)
    models.perturb([p for _, _, p in adapter_parameters(model)], 0.05)
    return model


def _learned(model: nn.Module, around: Any, family: str) -> tuple[Tensor, list[Tensor]]:
    """The result of a model for the same inputs and seed, and its gradients."""
    for _, _, parameter in adapter_parameters(model):
        parameter.grad = None
    torch.manual_seed(3)
    batch = models.inputs(model, models.table()[family].kind)
    with around:
        value = models.result(model(**batch))
    value.double().square().mean().backward()
    return value.detach(), [p.grad.clone() for _, _, p in adapter_parameters(model) if p.grad is not None]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", sorted(models.families()))
def test_a_model_computes_the_same(family: str) -> None:
    model = _model(family).eval()
    value, gradients = _learned(model, nullcontext(), family)
    renamed, _ = _learned(model, OnCpu(model).renamed(), family)
    assert torch.equal(renamed, value) == (family not in BY_NAME)
    if family in BY_NAME:
        return
    found, ours = _learned(model, OnCpu(model).running(), family)
    assert (found - value).norm() <= 1e-5 * value.norm()
    scale = max(gradient.norm() for gradient in gradients)
    for gradient, other in zip(gradients, ours, strict=True):
        assert (gradient - other).norm() <= 1e-5 * (gradient.norm() + 1e-2 * scale)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_model_that_drops_out_is_as_it_was_afterwards(family: str) -> None:
    model = _model(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before = [type(module) for module in model.modules()]
    on_cpu, calls = OnCpu(model), []
    with on_cpu.running():
        inside = [type(module) for module in model.modules()]
        calls += [module for module in model.modules() if isinstance(module, cpu.Dropout)]
        with pytest.raises(ZeroDivisionError), on_cpu.running():
            raise ZeroDivisionError
        assert [type(module) for module in model.modules()] == inside
        assert model.config._attn_implementation == NAME
    assert calls
    assert [type(module) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    copy.deepcopy(model)
    model.eval()
    value, _ = _learned(model, nullcontext(), family)
    assert torch.equal(_learned(model, on_cpu.running(), family)[0], value)  # nothing drops out
    model.train()
    first, _ = _learned(model, on_cpu.running(), family)
    assert not torch.allclose(first, value)
    assert torch.equal(_learned(model, on_cpu.running(), family)[0], first)  # by the seed


def test_layers_that_are_computed_again_drop_out_the_same() -> None:
    model = _model("bert")
    on_cpu, layers = OnCpu(model), layers_of(model)
    expected, gradients = _learned(model, on_cpu.running(), "bert")
    stand_ins = {layer: Checkpointed(layer, on_cpu.running) for layer in layers}
    with standing_in(places_of(model, layers), stand_ins):
        found, again = _learned(model, on_cpu.running(), "bert")
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))


def test_ticks_know_with_which_probability_units_drop_out() -> None:
    block = _layer(own=nn.Dropout(0.3))
    assert drop_probability((block, "own")) == 0.3
    with OnCpu(block).running():
        assert type(block.own) is cpu.Dropout
        assert drop_probability((block, "own")) == 0.3
    assert drop_probability((_layer(own=0.2), "own")) == 0.2


def test_eager_attention_stays() -> None:
    model = _model("bert")
    model.config._attn_implementation = "eager"
    with OnCpu(model).running():
        assert model.config._attn_implementation == "eager"
