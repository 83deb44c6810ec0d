"""Each backward pass of our own, against the one that autograd records."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tests.models as models
from ticktune.errors import PatchError
from ticktune.folder import result_relevant
from ticktune.patch.attach import adapter_parameters, attach, attachment_of, detach, set_training
from ticktune.patch.fast import (
    Activation,
    Gated,
    GatedHalves,
    LeanUnits,
    RmsNorm,
    rms_form,
    slope_of,
)
from ticktune.recipe.schema import Recipe
from ticktune.run import attach_as

H, F = 7, 6

# One of each kind: plain and gated blocks, gates in a module of their own and in a fused one, Conv1D, activations
# in steps, norms with and without mean, blocks that layers share, two stacks, inputs of two dimensions.
FAMILIES = [
    "bert", "albert", "modernbert", "gpt2", "bloom", "llama", "phi3", "gemma", "qwen3", "t5", "t5-gated", "bart",
    "dinov2-swiglu", "clip_vision_model",
]  # fmt: skip


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _activations() -> dict[str, Any]:
    from transformers.activations import ACT2FN

    # relu6 and its like have kinks where a finite difference and a gradient differ; xielu computes in bfloat16.
    names = ("gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "silu",
             "swish", "relu", "relu2", "mish", "tanh", "sigmoid", "laplace", "linear")  # fmt: skip
    return {name: ACT2FN[name] for name in names} | {"nn.GELU tanh": nn.GELU("tanh")}


@pytest.mark.parametrize("name", list(_activations()))
def test_slope_of_an_activation_is_the_one_of_autograd(name: str) -> None:
    act = _activations()[name]
    z, grad = leaf(50), torch.randn(50, dtype=torch.float64)
    (expected,) = torch.autograd.grad(act(z), z, grad)
    # The steps of gelu_fast have 10 digits of the square root of 2/pi.
    torch.testing.assert_close(slope_of(act)(grad, z.detach()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Tanh()], ids=lambda act: type(act).__name__)
def test_functions_pass_gradcheck(act: nn.Module) -> None:
    slope = slope_of(act)
    rows = (2, 3)
    assert torch.autograd.gradcheck(lambda z: Activation.apply(z, act(z).detach(), slope), (leaf(*rows, F),))
    assert torch.autograd.gradcheck(
        lambda g, u: Gated.apply(g, u, (act(g) * u).detach(), act, slope), (leaf(*rows, F), leaf(*rows, F))
    )

    def halves(z: Tensor, gate_first: bool) -> Tensor:
        g, u = z.chunk(2, dim=-1) if gate_first else z.chunk(2, dim=-1)[::-1]
        return GatedHalves.apply(z, (act(g) * u).detach(), act, slope, gate_first)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(lambda z: halves(z, True), (leaf(*rows, 2 * F),))
    assert torch.autograd.gradcheck(lambda z: halves(z, False), (leaf(*rows, 2 * F),))


@pytest.mark.parametrize("offset", [0, 1])
def test_norm_without_mean_passes_gradcheck(offset: int) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        value = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (w + offset)
        return RmsNorm.apply(x, w, value.detach(), 1e-3, offset)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(norm, (leaf(2, 3, H), leaf(H)))
    assert torch.autograd.gradcheck(lambda x: norm(x.transpose(0, 1), torch.ones(H)), (leaf(2, 3, H),))


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", (1e-6, 0)), ("gemma", (1e-6, 1)), ("t5", (1e-6, 0)), ("gpt2", None), ("bert", None)],
)
def test_form_of_a_norm_is_found_by_what_it_computes(family: str, expected: tuple[float, int] | None) -> None:
    record = attachment_of(attach(models.families()[family](), 0))
    assert {rms_form(norm) for norm in record.norms.values()} == {expected}


def test_a_norm_that_computes_something_else_keeps_the_record_of_autograd() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)

    assert rms_form(Odd()) is None


def _run(
    model: nn.Module, batch: dict[str, Tensor], *, autocast: bool = False, call: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass; twice, as the first pass of a block also compares its units."""
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = models.result((model if call is None else call)(**batch)).float()
        loss = (logits - torch.linspace(-1, 1, logits.numel()).view_as(logits)).square().mean()
        loss.backward()
    return loss.detach(), {key: p.grad for key, _, p in adapter_parameters(model) if p.grad is not None}


def _pair(family: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same ticked model twice, in autograd's form and in ours; the ticks are no longer zero."""
    plain = models.families()[family]().to(dtype)
    fast = copy.deepcopy(plain)
    for model, is_fast in ((plain, False), (fast, True)):
        attach(model, 4, fast=is_fast, **options)
        torch.manual_seed(1)
        models.perturb(p for _, _, p in adapter_parameters(model))
        if dtype == torch.float64:
            for _, _, parameter in adapter_parameters(model):
                parameter.data = parameter.data.double()
        set_training(model, True, base_dropout=False)
    return plain, fast


def _close(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], share: float) -> None:
    """Losses and gradients agree to a share of the largest entry of each."""
    torch.testing.assert_close(one[0], two[0], rtol=share, atol=0)
    assert one[1].keys() == two[1].keys()
    for key, expected in one[1].items():
        assert expected.dtype == two[1][key].dtype
        difference = float((two[1][key] - expected).abs().max())
        assert difference <= share * float(expected.abs().max()), key


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_autograd(family: str) -> None:
    plain, fast = _pair(family)
    batch = models.inputs(plain)
    one, two = float(_run(plain, batch)[0]), float(_run(fast, batch)[0])
    assert abs(one - two) <= 1e-6 * abs(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family: str) -> None:
    plain, fast = _pair(family, dtype=torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in models.inputs(plain).items()}
    # transformers computes norms without mean in float32, whatever the model's dtype.
    is_rough = any(rms_form(norm) for norm in attachment_of(fast).norms.values())
    _close(_run(plain, batch), _run(fast, batch), 1e-5 if is_rough else 1e-10)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5-gated"])
def test_under_autocast_too(family: str) -> None:
    plain, fast = _pair(family, dtype=torch.bfloat16)
    batch = models.inputs(plain)
    # bfloat16 has 8 bits, and GPT-2's activation rounds to them in each of its steps.
    _close(_run(plain, batch, autocast=True), _run(fast, batch, autocast=True), 0.1)


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart"])
def test_hidden_dropout_draws_the_same_numbers(family: str) -> None:
    """While units are dropped, autograd's own record is used."""
    plain, fast = _pair(family, norms="none")
    for model in (plain, fast):
        set_training(model, True)
    batch = models.inputs(plain)
    _close(_run(plain, batch), _run(fast, batch), 1e-4)


def test_dropout_of_the_ticks_draws_the_same_numbers() -> None:
    plain, fast = _pair("llama", dropout=0.4)
    batch = models.inputs(plain)
    _close(_run(plain, batch), _run(fast, batch), 1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_base_weight_that_is_trained_after_all_gets_its_gradient(family: str) -> None:
    found = []
    pair = _pair(family)
    batch = models.inputs(pair[0])
    for model in pair:
        ffn = attachment_of(model).layout.ffns[0]
        weights = [
            p for part in (ffn.up, ffn.down, ffn.gate) if part is not None for p in part.parameters(recurse=False)
        ]
        for weight in weights:
            weight.requires_grad_(True)
        _run(model, batch)
        found.append([weight.grad for weight in weights])
    assert len(found[0]) > 1
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_recomputed_layers_give_the_same_bits(family: str) -> None:
    _, model = _pair(family)
    model.config.use_cache = False
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    batch = models.inputs(model)
    expected = _run(model, batch)
    for layer in layers:
        own = layer.forward
        layer.forward = lambda *a, own=own, **k: checkpoint(own, *a, use_reentrant=False, **k)
    found = _run(model, batch)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiler_sees_one_whole_graph(family: str) -> None:
    _, model = _pair(family)
    batch = models.inputs(model)
    expected = _run(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _close(expected, _run(model, batch, call=compiled), 2e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_and_loaded_states_go_on_with_their_own_tensors(family: str) -> None:
    _, model = _pair(family, head=False)
    batch = models.inputs(model)
    expected = _run(model, batch)
    twin = copy.deepcopy(model)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    models.perturb(p for _, _, p in adapter_parameters(twin))
    assert not torch.equal(_run(twin, batch)[0], expected[0])
    twin.load_state_dict(state, assign=True)
    for _, _, parameter in adapter_parameters(twin):
        parameter.requires_grad_(True)
    _close(expected, _run(twin, batch), 1e-7)
    assert torch.equal(_run(model, batch)[0], expected[0])


def test_detach_takes_every_hook_off() -> None:
    for family in ("bert", "gpt2", "llama", "phi3"):
        model = models.families()[family]()
        detach(attach(model, 4))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fast", [True, False])
def test_recipe_key_decides(fast: bool) -> None:
    recipe = Recipe.model_validate(
        {
            "task": "causal-lm",
            "base": {"model": "anything"},
            "data": {"train": "rows.jsonl"},
            "training": {"fast": fast},
            "output": "run",
        }
    )
    assert result_relevant(recipe)["training.fast"] is fast
    model = models.families()["llama"]()
    attach_as(recipe, model, ())
    loss = models.result(model(**models.inputs(model))).sum()
    assert _has_own_functions(loss) is fast


def _has_own_functions(loss: Tensor) -> bool:
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


class _Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, F), nn.Linear(H, F), nn.Linear(F, H)
        self.act, self.scale = nn.SiLU(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x) * self.scale)  # type: ignore[no-any-return]


def test_a_block_that_computes_more_is_refused_with_the_way_out() -> None:
    for scale in (1.0, 2.0):
        block = _Block(scale)
        LeanUnits(block.act, None, None).attach(block.up, block.down, block.gate)
        if math.isclose(scale, 1.0):
            block(torch.randn(2, H)).sum().backward()
            continue
        with pytest.raises(PatchError, match="computes more than") as caught:
            block(torch.randn(2, H))
        assert "training.fast: false" in str(caught.value.problems[0].fix)


def test_another_use_of_the_units_keeps_its_gradient() -> None:
    """What else reads what went into ``down`` has the record of autograd."""
    block = _Block(1.0)
    x = torch.randn(2, H)
    found = []
    for lean in (False, True):
        block.zero_grad()
        if lean:
            LeanUnits(block.act, None, None).attach(block.up, block.down, block.gate)
        seen: list[Tensor] = []
        handle = block.act.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        (block(x).sum() + seen[0].square().sum()).backward()
        handle.remove()
        assert block.gate.weight.grad is not None
        found.append(block.gate.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("place", ["beside up", "beside gate", "hook on up", "hook on down", "hook on a norm"])
def test_what_others_put_on_a_block_gets_its_gradient(place: str) -> None:
    """A LoRA that is zero at first, or a hook that scales by one, changes no value but has a gradient."""
    found = []
    plain = models.families()["llama"]()
    batch = models.inputs(plain)
    for fast, model in ((False, plain), (True, copy.deepcopy(plain))):
        block, norm = model.model.layers[1].mlp, model.model.layers[1].post_attention_layernorm
        size = norm.weight.numel() if place == "hook on a norm" else block.up_proj.out_features
        added = nn.Parameter(torch.ones(size))
        if place == "hook on down":
            block.down_proj.register_forward_pre_hook(lambda m, args, added=added: (args[0] * added,))
        if place == "hook on a norm":
            norm.register_forward_hook(lambda m, args, output, added=added: output * added)
        attach(model, 4, fast=fast)
        if place == "hook on up":
            block.up_proj.register_forward_hook(lambda m, args, output, added=added: output * added)
        for name in ("up", "gate") if place.startswith("beside") else ():
            if place.endswith(name):
                setattr(block, f"{name}_proj", _Beside(getattr(block, f"{name}_proj"), added))
        models.result(model(**batch)).square().mean().backward()
        assert added.grad is not None
        found.append([added.grad, *(p.grad for _, _, p in adapter_parameters(model))])
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class _Beside(nn.Module):
    """A projection with something beside it, as PEFT wraps one."""

    def __init__(self, inner: nn.Module, scale: nn.Parameter) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.sum(-1, keepdim=True) * (self.scale - 1)  # type: ignore[no-any-return]


def test_backward_hooks_of_others_run() -> None:
    model = attach(models.families()["llama"](), 4)
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_full_backward_hook(lambda *args: calls.append(1))
    models.result(model(**models.inputs(model))).sum().backward()
    assert len(calls) == len(model.model.layers)
