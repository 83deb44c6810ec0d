"""What users do to a model after attach: other dtypes, no values, copies, weights read from elsewhere."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tests.models as models
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.fast import Gated, RmsNorm

FAMILIES = ["bert", "gpt2", "llama", "gemma2", "t5", "bart", "modernbert", "gpt_neox", "vit"]


def build(family: str, *, fast: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = attach(models.families()[family](), 4, norms="all", norm_layers="all", fast=fast)
    models.perturb((parameter for _, _, parameter in adapter_parameters(model)), 0.1)
    return model.eval()


def values(model: nn.Module, like: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output on one batch, and what is trained -> its gradient."""
    batch = models.inputs(like or model)
    kind = next(model.parameters())
    batch = {n: v.to(kind.device, kind.dtype if v.is_floating_point() else None) for n, v in batch.items()}
    if kind.is_meta:
        batch = {name: value for name, value in batch.items() if "mask" not in name}  # transformers looks into masks
    output = model(**batch).logits
    output.float().square().mean().backward()
    return output.detach(), {key: p.grad for key, _, p in adapter_parameters(model) if p.grad is not None}


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.to(torch.float64),
    "double and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_cast_after_attach(family: str, cast: str) -> None:
    expected, slopes = values(build(family))
    model = CASTS[cast](build(family))
    found, own = values(model, build(family))
    dtype = {"bfloat16": torch.bfloat16, "double": torch.float64}.get(cast, torch.float32)
    assert found.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert own.keys() == slopes.keys()
    if dtype != torch.bfloat16:
        for key, slope in slopes.items():
            torch.testing.assert_close(own[key].float(), slope, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_a_bfloat16_base_can_become_float32_after_attach(family: str) -> None:
    torch.manual_seed(0)
    model = attach(models.families()[family]().bfloat16(), 4, norms="all", norm_layers="all").float()
    assert values(model)[0].dtype == torch.float32


# GPT-2 and BART look into a mask of their own in transformers.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt2", "bart")])
def test_a_model_without_values_runs(family: str) -> None:
    found, slopes = values(build(family).to("meta"), build(family))
    assert found.is_meta
    assert slopes.keys() == values(build(family))[1].keys()


def _pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def _reloaded(model: nn.Module, *, assign: bool) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.fill_(0.123)
    model.load_state_dict(state, assign=assign)
    return model


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
    "load_state_dict": lambda model: _reloaded(model, assign=False),
    "load_state_dict, assigned": lambda model: _reloaded(model, assign=True),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_computes_the_same_and_is_its_own(family: str, kind: str) -> None:
    expected, slopes = values(build(family))
    original = build(family)
    model = COPIES[kind](original)
    if model is not original:
        for parameter in original.parameters():
            parameter.data.fill_(0.123)
    found, own = values(model)
    assert torch.equal(found, expected)
    assert own.keys() == slopes.keys()
    assert all(torch.equal(own[key], slope) for key, slope in slopes.items())


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_keeps_the_lean_backward_passes(kind: str) -> None:
    names = set[str]()
    output = (model := COPIES[kind](build("llama")))(**models.inputs(model)).logits
    todo, seen = [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [parent for parent, _ in node.next_functions]
    assert {f"{function.__name__}Backward" for function in (Gated, RmsNorm)} <= names
