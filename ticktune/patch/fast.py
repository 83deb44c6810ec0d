"""Backward passes of our own: the same functions, with fewer tensors kept for them.

Autograd keeps, of ``act(gate(x)) * up(x)``, of an activation written in steps and of a norm without mean, tensors that
the formulas do not need. Each function here keeps its inputs alone and computes the rest again. What autograd recorded
first is freed as soon as the function has taken its place. While torch.compile traces, none of this is used: the
compiler decides itself what to compute again.

Ticks themselves have autograd's backward pass: see docs/performance.md for what else was measured.

Legend of shapes: ``h`` hidden size, ``f`` the block's width, ``...`` any leading dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ticktune.errors import PatchError
from ticktune.patch.ticks import drop_probability

Act = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]

# What transformers computes in steps, all of which autograd keeps: the tanh approximation of GELU,
_TANH_GELUS = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")
# and others.
_IN_STEPS = (*_TANH_GELUS, "QuickGELUActivation", "ReLUSquaredActivation", "LaplaceActivation")

_MOST_NODES = 64  # that an activation in steps and a product leave behind


def slope_of(act: Act) -> Slope:
    """Returns the backward pass of an activation: (gradient of σ(z), z) -> gradient of z.

    Known activations have one kernel; of any other, autograd computes it on a copy of z.
    """
    name = type(act).__name__
    if name in (*_TANH_GELUS, "GELUTanh"):
        return lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    if isinstance(act, nn.GELU):
        kind = act.approximate
        return lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate=kind)
    if name == "GELUActivation" and getattr(act, "act", None) is F.gelu:
        return lambda grad, z: torch.ops.aten.gelu_backward(grad, z)
    if isinstance(act, nn.SiLU) or name == "SiLUActivation" or act is F.silu:
        return torch.ops.aten.silu_backward
    if isinstance(act, nn.ReLU) or act is F.relu:
        return lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0)
    if name == "QuickGELUActivation":  # x sigmoid(ax) is silu(ax) / a
        return lambda grad, z: torch.ops.aten.silu_backward(grad, 1.702 * z)

    def slope(grad: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = act(leaf)
            (found,) = torch.autograd.grad(value, leaf, grad.to(value.dtype))
        return found

    return slope


def is_in_steps(act: Act) -> bool:
    """Whether autograd keeps more of an activation than its input."""
    return type(act).__name__ in _IN_STEPS


def nodes_between(value: Tensor, ends: Sequence[Tensor]) -> tuple[str, ...] | None:
    """Names of what autograd recorded of a value behind some tensors.

    Returns:
        None where the value depends on anything else that has a gradient, on a function of others (such as that of a
        backward hook), or on more than 64 nodes.
    """
    stops = {end.grad_fn for end in ends}
    names, seen, todo = list[str](), set[Any](), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen or node in stops:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a node that collects a leaf's gradient
        if variable is not None:
            if any(variable is end for end in ends):
                continue
            return None
        if isinstance(node, torch.autograd.function.BackwardCFunction) or len(names) == _MOST_NODES:
            return None
        names.append(node.name())
        todo += [parent for parent, _ in node.next_functions]
    return tuple(names)


def can_replace() -> bool:
    """Whether functions of our own may stand in for what autograd records: not under torch.compile, nor torch.func."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


class Activation(torch.autograd.Function):
    """The value of σ(z) that was computed already; saves z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: Slope) -> Tensor:
        """``(..., f)``, twice -> ``(..., f)``."""
        ctx.save_for_backward(z)
        ctx.slope = slope
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of z."""
        (z,) = ctx.saved_tensors
        return ctx.slope(grad.to(z.dtype), z), None, None


class Gated(torch.autograd.Function):
    """The value of σ(g) ⊙ u that was computed already; saves g and u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, value: Tensor, act: Act, slope: Slope) -> Tensor:
        """``(..., f)``, three times -> ``(..., f)``."""
        ctx.save_for_backward(g, u)
        ctx.parts = act, slope
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of g and u."""
        g, u = ctx.saved_tensors
        act, slope = ctx.parts
        # Not in place: an activation may return its input.
        return slope(grad * u, g), act(g.detach()) * grad, None, None, None


class GatedHalves(torch.autograd.Function):
    """As :class:`Gated`, where one projection gave g and u side by side; saves what it gave."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, act: Act, slope: Slope, gate_first: bool) -> Tensor:
        """``(..., 2f)``, ``(..., f)`` -> ``(..., f)``."""
        ctx.save_for_backward(z)
        ctx.parts = act, slope, gate_first
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of z."""
        (z,) = ctx.saved_tensors
        act, slope, gate_first = ctx.parts
        return _gated_back(z, grad, act, slope, gate_first=gate_first), None, None, None, None


def _gated_back(z: Tensor, grad: Tensor, act: Act, slope: Slope, *, gate_first: bool) -> Tensor:
    z, result = z.detach(), torch.empty_like(z)
    halves, results = z.chunk(2, dim=-1), result.chunk(2, dim=-1)
    (g, u), (of_g, of_u) = (halves, results) if gate_first else (halves[::-1], results[::-1])
    of_g.copy_(slope(grad * u, g))
    torch.mul(act(g), grad, out=of_u)
    return result


class RmsNorm(torch.autograd.Function):
    """The value of x / √(mean(x²) + ε) ⊙ (w + c) that was computed already; saves x.

    With y = x / √(mean(x²) + ε) and g = gradient ⊙ (w + c), the gradient of x is (g - y mean(g ⊙ y)) / √(mean(x²) + ε).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor, eps: float, offset: int) -> Tensor:
        """``(..., h)``, ``(h,)``, ``(..., h)`` -> ``(..., h)``."""
        ctx.save_for_backward(x, weight)
        ctx.parts = eps, offset
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight, computed in float32 at least."""
        x, weight = ctx.saved_tensors
        eps, offset = ctx.parts
        wide = torch.promote_types(x.dtype, torch.float32)
        z, back = x.to(wide), grad.to(wide)
        scale = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
        y = z * scale
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (back * y).sum(tuple(range(y.ndim - 1))).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            back = back * (weight + offset)
            of_x = y.mul_((back * y).mean(-1, keepdim=True)).sub_(back).mul_(-scale).to(x.dtype)
        return of_x, of_weight, None, None, None


def rms_form(norm: nn.Module) -> tuple[float, int] | None:
    """Returns (ε, c) of a norm that computes x / √(mean(x²) + ε) ⊙ (w + c), None where it computes anything else.

    It is tried on a few rows, the smallest of which ε decides.
    """
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.is_meta or not isinstance(eps, float):
        return None
    if getattr(norm, "bias", None) is not None or isinstance(norm, nn.LayerNorm):
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    x = x * x.new_tensor([[1e-3], [0.1], [1.0], [30.0]])
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    with torch.no_grad():
        value = norm(x)
        for offset in (0, 1):
            expected = y * (weight + offset)
            if value.shape == x.shape and torch.allclose(value.float(), expected.float(), rtol=1e-4, atol=1e-6):
                return eps, offset
    return None


class LeanUnits:
    """Hooks one block so that autograd keeps the least of its hidden units.

    The block runs as it is written. Then a function of ours takes the place of what autograd recorded between the
    projections, and that record is freed with all it kept. Whether the units are what the function stands for,
    σ(gate x) ⊙ up x, is compared at the first call, and again where the record is another one. Where others have put
    something with a gradient between the projections (a LoRA beside one, a hook), the record stays.

    Args:
        act: σ.
        dropout: Module and attribute of the dropout on the units, or None. While it acts, the record stays.
        fused: Which half of ``up`` is the gate, where one projection is both.
    """

    def __init__(self, act: Act, dropout: tuple[nn.Module, str] | None, fused: str | None) -> None:
        # In a tuple: where this object is part of a module, it is not registered a second time.
        self._act, self._dropout, self._fused = (act,), dropout, fused
        self._gate: Tensor | None = None
        self._up: Tensor | None = None
        self._checked = set[tuple[str, ...]]()  # records whose values were compared

    def attach(self, up: nn.Module, down: nn.Module, gate: nn.Module | None) -> list[Any]:
        """Hooks a block; returns the handles that undo it, none where autograd keeps no more than it must."""
        act = self._act[0]
        if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
            return []
        if gate is None and self._fused is None:
            if not (is_in_steps(act) and isinstance(act, nn.Module)) or act._forward_hooks:
                return []
            return [act.register_forward_hook(self._after_act)]
        handles = [up.register_forward_hook(self._take_up), down.register_forward_pre_hook(self._before_down)]
        return handles if gate is None else [gate.register_forward_hook(self._take_gate), *handles]

    def _after_act(self, module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
        if not value.requires_grad or not can_replace():
            return None
        result: Tensor = Activation.apply(args[0], value.detach(), slope_of(self._act[0]))
        return result

    def _take_gate(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._gate = output

    def _take_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._up = output

    def _before_down(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gate, up, self._gate, self._up = self._gate, self._up, None, None
        if up is None or not args[0].requires_grad or not can_replace() or drop_probability(self._dropout):
            return None
        if args[0].is_meta:  # without values nothing can be compared
            return None
        nodes = nodes_between(args[0], [up] if gate is None else [gate, up])
        if nodes is None:
            return None
        act, value = self._act[0], args[0].detach()
        slope = slope_of(act)
        if nodes not in self._checked:
            self._check(gate, up, value)
            self._checked.add(nodes)
        if gate is not None:
            units = Gated.apply(gate, up, value, act, slope)
        else:
            units = GatedHalves.apply(up, value, act, slope, self._fused == "gate first")
        return (units, *args[1:])

    def _check(self, gate: Tensor | None, up: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            if gate is None:
                first, second = up.chunk(2, dim=-1)
                gate, up = (first, second) if self._fused == "gate first" else (second, first)
            expected = (self._act[0](gate) * up).float()
        # Far above any rounding, and far below what another formula gives; NaN is for the loop to name.
        if value.shape != expected.shape or (value.float() - expected).abs().max() > 0.02 * expected.abs().max():
            raise PatchError(
                "a feed-forward block of this model computes more than down(act(gate x) * up x)",
                fix="set training.fast: false, in Python attach(..., fast=False)",
            )
