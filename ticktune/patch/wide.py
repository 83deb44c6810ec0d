"""The wide form of ticks: their matrices lie beside the base's own, and one product computes both.

    FFN(x) + P σ(Qx + r) = [W2 P] σ([W1; Q] x + [b1; r]) + b2

While it runs, a block is as wide as the merged one will be: projections of the wide weights stand in the places of its
own, and whatever stands between them computes the tick's units with the base's. Backwards, the gradient of the input is
one product too, and of the weights only the tick's slice is computed. The base's weights become views of the wide ones,
so they are held once; the ticks stay float32 parameters of their own, and are copied in when they have changed.

Legend of shapes: ``h`` hidden size, ``f`` the block's width, ``t`` the tick's dim, ``...`` any leading dimensions.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ticktune.errors import PatchError
from ticktune.patch.attach import attachment_of
from ticktune.patch.fast import LeanUnits
from ticktune.patch.layout import Ffn, is_conv1d
from ticktune.patch.standins import StandIn, places_of, standing_in
from ticktune.patch.ticks import Tick, probability_of
from ticktune.quantize import is_coded


class _Into(torch.autograd.Function):
    """[W1; Q] x + [b1; r]; saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, Q: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``(..., h)``, ``(t, h)``, ``(t,)``, ``(f+t, h)``, ``(f+t,)`` -> ``(..., f+t)``."""
        ctx.save_for_backward(x, weight)
        ctx.dim = Q.shape[0]
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, Q and r."""
        x, weight = ctx.saved_tensors
        of_units = grad[..., -ctx.dim :].flatten(0, -2)
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_q = of_units.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_r = of_units.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_q, of_r, None, None


class _OutOf(torch.autograd.Function):
    """[W2 P] u + b2; saves the tick's units alone, as W2 has no gradient."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, P: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``(..., f+t)``, ``(h, t)``, ``(h, f+t)``, ``(h,)`` -> ``(..., h)``."""
        ctx.save_for_backward(units[..., -P.shape[1] :].clone(), weight)  # a view would keep all units
        return F.linear(units, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the units and P."""
        units, weight = ctx.saved_tensors
        of_units = grad @ weight if ctx.needs_input_grad[0] else None
        of_p = grad.flatten(0, -2).t() @ units.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_units, of_p, None, None


class _Projection(StandIn):
    """Stands in the place of a frozen projection, and holds its weight and a tick's in one.

    Args:
        own: The projection of the base.
        tick: Its tick.
        name: Which matrix of it, ``Q``, ``U`` or ``P``.
    """

    def __init__(self, own: nn.Module, tick: Tick, name: Literal["Q", "U", "P"]) -> None:
        super().__init__(own)
        # In tuples, as the projection itself: modules and parameters of a module would get a second name.
        self._tick = (tick,)
        self._name = name
        self._axis = 1 if name == "P" else 0  # along which the tick adds: inputs or outputs
        self._wide: tuple[Tensor, Tensor | None] = (torch.empty(0), None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., h)`` -> ``(..., f+t)``, or ``(..., f+t)`` -> ``(..., h)``; in the dtype of the base's weight."""
        (weight, bias), matrix, offset = self._wide, self._matrix, self._offset
        x = x.to(weight.dtype)
        result: Tensor = (
            _OutOf.apply(x, matrix, weight, bias) if self._axis else _Into.apply(x, matrix, offset, weight, bias)
        )
        return result

    @property
    def _matrix(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self._tick[0], self._name)
        return found

    @property
    def _offset(self) -> nn.Parameter | None:
        return self._tick[0].r if self._name == "Q" else None

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """(part of the wide weight or bias, what the tick has for it)."""
        if not self._is_shared():
            self._share()
        (weight, bias), matrix, offset = self._wide, self._matrix, self._offset
        dim = matrix.shape[self._axis]
        found: list[tuple[Tensor, Tensor]] = [(weight.narrow(self._axis, weight.shape[self._axis] - dim, dim), matrix)]
        if offset is not None:
            assert bias is not None
            found.append((bias[-dim:], offset))
        return found

    def release(self) -> None:
        """Gives the base a weight and bias of its own again."""
        if not self._is_shared():
            return
        own, bias = self._layer[0], _bias(self._layer[0])
        weight: Tensor = own.weight  # type: ignore[assignment]
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        if bias is not None:
            bias.data = bias.data.clone()
        self._wide = (torch.empty(0), None)

    def _is_shared(self) -> bool:
        """Whether the base's tensors are parts of the wide ones still.

        ``.to`` and ``load_state_dict(assign=True)`` give it others.
        """
        (weight, bias), own = self._wide, _bias(self._layer[0])
        return _is_part(_matrix(self._layer[0]), weight) and (own is None or _is_part(own, bias))

    def _share(self) -> None:
        own, dim = self._layer[0], self._matrix.shape[self._axis]
        matrix, bias = _matrix(own).detach(), _bias(own)
        extra = list(matrix.shape)
        extra[self._axis] = dim
        weight = torch.cat([matrix, matrix.new_zeros(extra)], self._axis)
        view = weight.narrow(self._axis, 0, matrix.shape[self._axis])
        own.weight.data = view.t() if is_conv1d(own) else view
        if self._axis == 0 and (bias is not None or self._offset is not None):
            before = matrix.new_zeros(len(matrix)) if bias is None else bias.detach()
            wide_bias = torch.cat([before, before.new_zeros(dim)])
            if bias is not None:
                bias.data = wide_bias[: len(before)]
            self._wide = weight, wide_bias
        else:
            self._wide = weight, bias


class Wide:
    """Ticks of a model in wide form, where their blocks allow it; the others run in split form.

    Args:
        model: With ticks.
        dtype: What matrix products are computed in; None: the dtype of their weights.

    Attributes:
        blocks: How many ticks are in wide form.
        obstacles: Why others are not, each reason once.

    Raises:
        PatchError: None can be.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        record = attachment_of(model)
        ticked = [ffn for ffn in record.layout.ffns if ffn.key in record.ticks]
        reasons = [_obstacle(ffn, record.ticks[ffn.key], dtype, ticked) for ffn in ticked]
        chosen = [ffn for ffn, reason in zip(ticked, reasons, strict=True) if not reason]
        self.blocks = len(chosen)
        self.obstacles = list(dict.fromkeys(filter(None, reasons)))
        if not chosen:
            raise PatchError("; ".join(self.obstacles) or "there are no ticks")
        self._stand_ins: dict[nn.Module, _Projection] = {}
        for ffn in chosen:
            self._stand_ins |= _projections(ffn, record.ticks[ffn.key])
        self._places = places_of(model, list(self._stand_ins))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the model computes these ticks in wide form, with the weights that they have at its beginning."""
        parts = [part for projection in self._stand_ins.values() for part in projection.parts()]
        with torch.no_grad():
            torch._foreach_copy_([into for into, _ in parts], [part for _, part in parts])
        with self.again():
            yield

    def release(self) -> None:
        """Gives the base weights of its own again, laid out as they were; :meth:`running` makes them views anew."""
        for projection in self._stand_ins.values():
            projection.release()

    def again(self) -> AbstractContextManager[None]:
        """As :meth:`running`, with the weights of the last time, for a second run of layers in a backward pass."""
        return standing_in(self._places, self._stand_ins)


def _projections(ffn: Ffn, tick: Tick) -> dict[nn.Module, _Projection]:
    """What stands in the places of a block's projections."""
    first, second = (ffn.up, None) if ffn.gate is None else (ffn.gate, ffn.up)
    found = {first: _Projection(first, tick, "Q"), ffn.down: _Projection(ffn.down, tick, "P")}
    if second is not None:
        found[second] = _Projection(second, tick, "U")
        LeanUnits(ffn.act, ffn.dropout, None).attach(found[second], found[ffn.down], found[first])
    return found


def _obstacle(ffn: Ffn, tick: nn.Module, dtype: torch.dtype | None, ticked: Sequence[Ffn]) -> str:
    """Why a tick is not in wide form, or an empty string."""
    if not isinstance(tick, Tick) or ffn.experts is not None:
        return "experts have no projections of their own"
    if ffn.fused is not None or ffn.conv is not None:
        return "gate and up are one projection" if ffn.fused else "a convolution stands between the projections"
    if (tick.U is not None) != ffn.is_gated:
        return "the ticks are plain and the blocks gated"
    own = _own(ffn)
    if any(is_coded(m.weight) for m in own):
        return "the base's weights are quantised"
    if any(type(m) is not nn.Linear and not is_conv1d(m) for m in own):
        return f"the projections are {', '.join(sorted({type(m).__name__ for m in own}))}"
    places = Counter(m.weight.data_ptr() for other in ticked for m in _own(other) if not m.weight.is_meta)
    if any(places[m.weight.data_ptr()] > 1 for m in own if not m.weight.is_meta):
        return "layers share their weights"
    if tick.dropout or (ffn.dropout is not None and probability_of(ffn.dropout)):
        return "hidden units are dropped out"
    if dtype is not None and any(m.weight.dtype != dtype for m in own):
        return f"the base's weights are not {str(dtype).removeprefix('torch.')}"
    return ""


def _own(ffn: Ffn) -> list[Any]:
    """The base's projections of a block that has no experts."""
    return [] if ffn.experts is not None else [m for m in (ffn.gate, ffn.up, ffn.down) if m is not None]


def _matrix(own: nn.Module) -> Tensor:
    """A projection's weight as (outputs, inputs)."""
    weight: Tensor = own.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(own) else weight


def _bias(own: nn.Module) -> nn.Parameter | None:
    bias: nn.Parameter | None = own.bias  # type: ignore[assignment]
    return bias


def _is_part(part: Tensor, whole: Tensor | None) -> bool:
    return (
        whole is not None
        and (part.data_ptr(), part.dtype, part.device) == (whole.data_ptr(), whole.dtype, whole.device)
        and part.stride() == whole.stride()
    )
