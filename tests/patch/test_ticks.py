"""The mathematics of ticks, against numpy, closed forms, and the parallel adapter's formula."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.models as models
from tests.training import bits
from ticktune.patch.attach import adapter_parameters, attach, attachment_of, detach, set_training
from ticktune.patch.detect import find_layout
from ticktune.patch.ticks import Tick, gated_tick, plain_tick

Array = np.ndarray[Any, Any]
_erf = np.vectorize(math.erf)


def _gelu(z: Array) -> Array:
    return z * 0.5 * (1 + _erf(z / math.sqrt(2)))


def _gelu_slope(z: Array) -> Array:
    return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


# Name -> torch module, the same in numpy, its derivative in numpy.
ACTIVATIONS: dict[str, tuple[nn.Module, Callable[[Array], Array], Callable[[Array], Array]]] = {
    "gelu": (nn.GELU(), _gelu, _gelu_slope),
    "silu": (
        nn.SiLU(),
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    ),
    "relu": (nn.ReLU(), lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
}
H, WIDE, T = 7, 11, 5


class PlainFfn(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(H, WIDE), nn.Linear(WIDE, H), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class GatedFfn(PlainFfn):
    def __init__(self, act: nn.Module) -> None:
        super().__init__(act)
        self.gate = nn.Linear(H, WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def _ticked(act: nn.Module, form: Any, **options: Any) -> tuple[PlainFfn, Tick]:
    ffn = (GatedFfn(act) if form == "gated" else PlainFfn(act)).double()
    tick = Tick(H, T, form=form, bias=True, act=act, **options).double()
    models.perturb(tick.parameters())
    tick.attach(ffn.gate if isinstance(ffn, GatedFfn) else ffn.up, ffn.down)
    return ffn, tick


def _numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["plain", "gated"])
def test_ffn_with_tick_is_the_written_formula(form: str, name: str) -> None:
    module, act, _ = ACTIVATIONS[name]
    ffn, tick = _ticked(module, form)
    x = torch.randn(2, 3, H, dtype=torch.float64)
    z = x.numpy()
    up = z @ _numpy(ffn.up.weight).T + _numpy(ffn.up.bias)
    if isinstance(ffn, GatedFfn):
        wide = act(z @ _numpy(ffn.gate.weight).T) * up
        a = act(z @ _numpy(tick.Q).T) * (z @ _numpy(tick.U).T)
        assert tick.r is None
    else:
        wide = act(up)
        a = act(z @ _numpy(tick.Q).T + _numpy(tick.r))
        assert tick.U is None
    expected = wide @ _numpy(ffn.down.weight).T + _numpy(ffn.down.bias) + a @ _numpy(tick.P).T
    np.testing.assert_allclose(_numpy(ffn(x)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_a_plain_tick_are_the_closed_forms(name: str) -> None:
    module, act, slope = ACTIVATIONS[name]
    ffn, tick = _ticked(module, "plain")
    x, delta = (torch.randn(6, H, dtype=torch.float64) for _ in range(2))
    (ffn(x) * delta).sum().backward()  # so that dL/dy is delta
    z, d, P = x.numpy(), delta.numpy(), _numpy(tick.P)
    s = z @ _numpy(tick.Q).T + _numpy(tick.r)
    back = (d @ P) * slope(s)
    assert tick.P.grad is not None
    np.testing.assert_allclose(_numpy(tick.P.grad), d.T @ act(s), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(_numpy(tick.Q.grad), back.T @ z, rtol=1e-11, atol=1e-12)
    assert tick.r is not None
    np.testing.assert_allclose(_numpy(tick.r.grad), back.sum(0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_a_gated_tick_are_the_closed_forms(name: str) -> None:
    module, act, slope = ACTIVATIONS[name]
    ffn, tick = _ticked(module, "gated")
    x, delta = (torch.randn(6, H, dtype=torch.float64) for _ in range(2))
    (ffn(x) * delta).sum().backward()
    z, d, P = x.numpy(), delta.numpy(), _numpy(tick.P)
    q, u = z @ _numpy(tick.Q).T, z @ _numpy(tick.U).T
    np.testing.assert_allclose(_numpy(tick.P.grad), d.T @ (act(q) * u), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(_numpy(tick.Q.grad), ((d @ P) * slope(q) * u).T @ z, rtol=1e-11, atol=1e-12)
    assert tick.U is not None
    np.testing.assert_allclose(_numpy(tick.U.grad), ((d @ P) * act(q)).T @ z, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["plain", "gated"])
def test_gradients_pass_gradcheck(form: str, name: str) -> None:
    act = ACTIVATIONS[name][0]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, P, Q = leaf(3, H), leaf(H, T), leaf(T, H)
    if form == "plain":
        assert torch.autograd.gradcheck(lambda x, P, Q, r: plain_tick(x, P, Q, r, act, lambda h: h), (x, P, Q, leaf(T)))
    else:
        assert torch.autograd.gradcheck(
            lambda x, P, Q, U: gated_tick(x, P, Q, U, act, lambda h: h), (x, P, Q, leaf(T, H))
        )


def test_fresh_tick_adds_nothing_and_draws_q_within_the_kaiming_bound() -> None:
    tick = Tick(48, 64, form="plain", bias=True, act=nn.GELU(), generator=torch.Generator().manual_seed(1))
    assert tick.r is not None
    assert not tick.P.any()
    assert not tick.r.any()
    bound = 1 / math.sqrt(48)
    assert bound * 0.98 < tick.Q.abs().max() <= bound
    # A uniform value on +-b has the standard deviation b/sqrt(3); 3072 draws give it to about 1 %.
    assert float(tick.Q.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not tick(torch.randn(4, 48)).any()


def test_tick_dropout_acts_on_hidden_units_while_training_only() -> None:
    act = nn.GELU()
    tick = _ticked(act, "plain", dropout=0.4)[1]
    x = torch.randn(4, H, dtype=torch.float64)
    a = act(F.linear(x, tick.Q, tick.r))
    torch.manual_seed(5)
    expected = F.linear(F.dropout(a, 0.4, training=True), tick.P)
    torch.manual_seed(5)
    assert torch.equal(tick(x), expected)
    assert not torch.allclose(expected, F.linear(a, tick.P))
    assert torch.equal(tick.eval()(x), F.linear(a, tick.P))


def _with_hidden_dropout(family: str, p: float) -> tuple[nn.Module, Tick]:
    """A ticked model whose base drops hidden units with this probability, and its first tick."""
    model = models.families()[family]()
    attach(model, T, norms="none", head=False)
    models.perturb(p for _, _, p in adapter_parameters(model))
    if family == "bart":
        model.get_submodule("model.encoder.layers.0").activation_dropout = p  # a plain number
    else:
        model.get_submodule("encoder.block.0.layer.1.DenseReluDense.dropout").p = p
    return model, attachment_of(model).ticks["encoder.0.ffn"]


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart"])
def test_base_dropout_drops_tick_units_while_the_base_trains(family: str) -> None:
    model, tick = _with_hidden_dropout(family, 1.0)
    x = torch.randn(2, 5, 48)
    set_training(model, True)
    assert not tick(x).any()
    set_training(model, True, base_dropout=False)
    assert tick.training
    assert tick(x).any()
    set_training(model, False)
    assert tick(x).any()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_base_dropout_rescales_the_tick_units_that_it_keeps(family: str) -> None:
    model, tick = _with_hidden_dropout(family, 0.3)
    act = find_layout(model).ffns[0].act
    x = torch.randn(2, 5, 48)
    set_training(model, True)
    torch.manual_seed(11)
    expected = F.linear(F.dropout(act(F.linear(x, tick.Q, tick.r)), 0.3, training=True), tick.P)
    torch.manual_seed(11)
    assert torch.equal(tick(x), expected)


def test_t5_block_with_all_units_dropped_gives_nothing() -> None:
    model, _ = _with_hidden_dropout("t5", 1.0)
    set_training(model, True)
    assert not model.get_submodule("encoder.block.0.layer.1.DenseReluDense")(torch.randn(2, 5, 48)).any()


def test_ticks_on_bert_are_the_parallel_adapter() -> None:
    """AdapterHub's ParBn with s = 1, gelu and no output bias, on a post-LN model, written out by hand.

    LN_out(dropout(FFN(x)) + A(x) + x), A(z) = W_u gelu(W_d z + b_d), x the output of the attention's norm.
    """
    model = models.families()["bert"]()
    attach(model, T, norms="none", head=False)
    ticks = {k: p for k, _, p in adapter_parameters(model)}
    models.perturb(ticks.values())
    seen: dict[str, Tensor] = {}
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(lambda m, a, out, i=i: seen.update({f"x{i}": out[0]}))
        layer.output.register_forward_hook(lambda m, a, out, i=i: seen.update({f"y{i}": out}))
    with torch.no_grad():
        model(**models.inputs(model))
        for i, layer in enumerate(model.bert.encoder.layer):
            x = seen[f"x{i}"]
            w1, b1 = layer.intermediate.dense.weight, layer.intermediate.dense.bias
            w2, b2 = layer.output.dense.weight, layer.output.dense.bias
            ffn = F.gelu(x @ w1.T + b1) @ w2.T + b2
            adapter = F.gelu(x @ ticks[f"encoder.{i}.ffn.Q"].T + ticks[f"encoder.{i}.ffn.r"])
            adapter = adapter @ ticks[f"encoder.{i}.ffn.P"].T
            total = ffn + adapter + x
            norm = layer.output.LayerNorm
            mean, var = total.mean(-1, keepdim=True), total.var(-1, keepdim=True, unbiased=False)
            expected = (total - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias
            assert adapter.abs().max() > 0.1  # otherwise equality would say nothing
            torch.testing.assert_close(seen[f"y{i}"], expected, rtol=1e-5, atol=5e-6)


def test_deep_copy_has_ticks_of_its_own() -> None:
    model = attach(models.families()["bert"](), T, norms="none", head=False)
    models.perturb(p for _, _, p in adapter_parameters(model))
    batch = models.inputs(model)
    with torch.no_grad():
        before = model(**batch).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, before)
        models.perturb(p for _, _, p in adapter_parameters(twin))
        changed = twin(**batch).logits
        assert not torch.equal(changed, before)
        assert torch.equal(model(**batch).logits, before)
        detach(twin)
        assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(twin(**batch).logits, changed)
    assert not any(".tick." in name for name in twin.state_dict())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5", "bart"])
def test_state_dict_keeps_the_names_of_the_base(family: str) -> None:
    model = models.families()[family]()
    before = model.state_dict().keys()
    attach(model, T)
    after = model.state_dict().keys()
    assert before <= after
    assert after > before
    assert all(".tick." in name for name in after - before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma", "t5", "bart"])
def test_detach_gives_the_base_back(family: str, dtype: torch.dtype) -> None:
    model = models.families()[family]().to(dtype)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    wanted = {name: (tensor.dtype, bits(tensor)) for name, tensor in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    batch = models.inputs(model)
    with torch.no_grad():
        before = model(**batch).logits
    attach(model, T)
    models.perturb(p for _, _, p in adapter_parameters(model))
    assert detach(model) is model
    assert {name: (tensor.dtype, bits(tensor)) for name, tensor in model.state_dict().items()} == wanted
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
