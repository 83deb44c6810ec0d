"""What torch computes slowly on a CPU, in another way: attention in bfloat16 or with dropout, and dropout itself.

torch's own attention is slow in bfloat16 in its backward pass (benchmarks/attention.py), and multiplies in float32
where there is dropout (torch 2.13, native/transformers/attention.cpp). Here it is matrix products, of a few rows or
heads at once; what lies between them is computed again in the backward pass, and only queries, keys and values are
kept. torch's dropout draws two numbers for each element, one after the other; here one number of 64 bits is drawn for
four elements. So other elements are dropped than torch would drop, equally many.

Layers look their attention up by a name in their config, and call their dropout modules: in :meth:`OnCpu.running`
that name is ours, and modules of ours stand in the places of those. Between two passes the model is as it was.

Legend of shapes: ``b`` batch, ``h`` heads, ``g`` heads of keys and values, ``s`` queries, ``t`` keys, ``d`` head size,
``e`` size of a value; ``n`` heads of keys and values of some rows, one after the other, and ``m`` the queries of each.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ticktune.patch.fast import can_replace
from ticktune.patch.standins import StandIn, places_of

NAME = "ticktune_cpu"
"""What our attention is called in transformers' registry."""

_PLAIN = "sdpa"
_RENAMED = "ticktune_renamed"  # the same function as _PLAIN
_STEPS = 1 << 15  # probabilities of dropout are multiples of 1 / _STEPS
_SCORES = 1 << 18  # about how many are computed at once: they stay in the cache
_REGISTER = 16  # float32 in a register of 512 bits
# Keys up to which bfloat16 without dropout is faster than torch's, which keeps no row of scores whole.
_MOST_KEYS = 512
_MOST_KEYS_OF_SMALL_HEADS = 256  # of fewer than 32 numbers, whose products are small beside the softmax

NOT_KNOWN = ("softcap", "s_aux", "position_bias", "cache")
"""What layers may ask of attention that is neither in ours nor in torch's."""


def noise(shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p); p is rounded to a multiple of 1 / 32768.

    Args:
        shape: Of the result.
        p: At least 0, less than 1.
        dtype: Of the result.
        generator: Draws; None: torch's own for CPUs.
    """
    dropped = min(round(p * _STEPS), _STEPS - 1)
    count = math.prod(shape)
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    values = drawn.view(torch.int16)[:count].view(shape).bitwise_and_(_STEPS - 1)
    # The difference is negative where it is dropped: shifted by 15 bits, -1 there and 0 elsewhere.
    kept = values.sub_(dropped).bitwise_right_shift_(15).add_(1)
    return kept.to(dtype).mul_(_STEPS / (_STEPS - dropped))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention, in the way that is fastest on the device of its arguments.

    Args:
        query: ``(b, h, s, d)``.
        key: ``(b, g, t, d)``; g divides h, and each head of keys serves as many heads of queries as follow each other.
        value: ``(b, g, t, e)``.
        mask: True where a query sees a key; shape that ``(b, h, s, t)`` is broadcast from. None: all see all.
        scale: Of the scores; None: one over the root of d.
        is_causal: Whether a query sees only keys that do not come after it; not beside a mask.
        dropout: Probability with which a query does not use a key that it sees.

    Returns:
        ``(b, h, s, e)``; zero where a query sees no key.

    Raises:
        RuntimeError: There is a mask, and is_causal too.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not _is_worth_it(query, key, dropout):
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1], "is_causal": is_causal}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, **options)
    if is_causal:
        if mask is not None:
            raise RuntimeError("attention has a mask and is causal too")
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    result: Tensor = _Attention.apply(query, key, value, mask, scale, dropout)
    return result


def _is_worth_it(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether our attention is faster than torch's; where other code traces or transforms, torch's is left alone.

    So it is where there is nothing to compute, or rows are broadcast.
    """
    if query.device.type != "cpu" or not can_replace() or not query.numel() * key.numel() or len(query) != len(key):
        return False
    if dropout:
        return dropout < 1
    most = _MOST_KEYS if query.shape[-1] >= 32 else _MOST_KEYS_OF_SMALL_HEADS
    return query.dtype == torch.bfloat16 and key.shape[2] <= most


class _How(NamedTuple):
    """How weights are made of scores.

    Args:
        scale: Of the scores.
        dropout: Probability.
        seed: Of what is dropped.
    """

    scale: float
    dropout: float
    seed: int


class _Part(NamedTuple):
    """Some heads of some rows, of which all scores are computed at once."""

    rows: slice
    heads: slice  # of keys and values

    def of(self, states: Tensor) -> Tensor:
        """``(b, g, m, d)`` -> ``(n, m, d)``, without a copy."""
        return states[self.rows, self.heads].flatten(0, 1)


class _Attention(torch.autograd.Function):
    """softmax(scale q kᵀ, where the mask lets it) v; saves q, k and v.

    With P the softmax, D what dropout multiplies with, and G the gradient of the result, V has the gradient (P ⊙ D)ᵀ G,
    and the scores P ⊙ (A - rows' sums of A ⊙ P) with A = G Vᵀ ⊙ D.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        """Arguments and result as :func:`attend`."""
        (b, h, s, _), g = query.shape, key.shape[1]
        with torch.autocast("cpu", enabled=False):
            # Queries that share keys lie one after the other.
            q, v = query.reshape(b, g, h // g * s, -1).contiguous(), value.contiguous()
            # The softmax does not see what all scores of a query have in common; rounded with them, it would be lost.
            k = (key - key.mean(2, keepdim=True)).contiguous()
            how = _How(scale, dropout, int(torch.randint(2**32, ())) if dropout else 0)
            ctx.save_for_backward(q, k, v, mask)
            ctx.how, ctx.heads = how, h
            found = q.new_empty(b, g, q.shape[2], v.shape[-1])
            for part, p, dropped in _weights(how, h, q, k, mask):
                used = (p if dropped is None else p.mul_(dropped)).to(q.dtype)
                torch.bmm(used, part.of(v), out=part.of(found))
        return found.view(b, h, s, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        q, k, v, mask = ctx.saved_tensors
        how, h = ctx.how, ctx.heads
        grad = grad.reshape(*q.shape[:3], -1).contiguous()
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part, p, dropped in _weights(how, h, q, k, mask):
            g = part.of(grad)
            of_p = torch.bmm(g, part.of(v).transpose(1, 2)).to(p.dtype)
            if dropped is not None:
                of_p.mul_(dropped)
            used = (p if dropped is None else dropped.mul_(p)).to(g.dtype)
            torch.bmm(used.transpose(1, 2), g, out=part.of(of_v))
            of_scores = _softmax_back(of_p, p).mul_(how.scale).to(g.dtype)
            torch.bmm(of_scores, part.of(k), out=part.of(of_q))
            torch.bmm(of_scores.transpose(1, 2), part.of(q), out=part.of(of_k))
        return of_q.view(q.shape[0], h, -1, q.shape[-1]), of_k, of_v, None, None, None


def _weights(
    how: _How, h: int, q: Tensor, k: Tensor, mask: Tensor | None
) -> Iterator[tuple[_Part, Tensor, Tensor | None]]:
    """Computes the weights of keys, a few rows or heads at once, the same each time.

    Args:
        how: Scale and dropout.
        h: Heads of queries.
        q: ``(b, g, m, d)``.
        k: ``(b, g, t, d)``.
        mask: As :func:`attend`.

    Yields:
        A part, its weights ``(n, m, t)``, and what dropout multiplies them with, or None.
    """
    (b, g, m, _), t = q.shape, k.shape[2]
    generator = torch.Generator().manual_seed(how.seed) if how.dropout else None
    wide = torch.promote_types(q.dtype, torch.float32)
    bias, blind = None, None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=wide).masked_fill_(~mask, -math.inf)
        bias = bias.expand(b, h, m * g // h, t).unflatten(1, (g, h // g))
        seeing = mask.any(-1, keepdim=True)
        if not seeing.all():
            blind = (~seeing).expand(b, h, m * g // h, 1).unflatten(1, (g, h // g))
    at_once = max(1, _SCORES // (m * t))  # heads
    steps = (at_once // g, g) if at_once >= g else (1, at_once)
    for row in range(0, b, steps[0]):
        for head in range(0, g, steps[1]):
            part = _Part(slice(row, row + steps[0]), slice(head, head + steps[1]))
            # Scores are rounded once, as eager attention has it; torch's own kernels keep them in float32.
            scores = torch.bmm(part.of(q), part.of(k).transpose(1, 2)).to(wide).mul_(how.scale)
            if bias is not None:
                hidden = bias[part.rows, part.heads]
                scores.view(hidden.shape).add_(hidden)
            p = _softmax(scores)
            if blind is not None:  # only there: what is not finite elsewhere shall be seen in the loss
                unseen = blind[part.rows, part.heads]
                p.view(*unseen.shape[:-1], t).masked_fill_(unseen, 0.0)
            yield part, p, None if generator is None else noise(tuple(p.shape), how.dropout, wide, generator)


def _softmax(scores: Tensor) -> Tensor:
    """``(n, m, t)``, twice; torch's own goes one element after the other where a row does not fill a register."""
    if scores.shape[-1] >= _REGISTER:
        return scores.softmax(-1)
    found = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return found.div_(found.sum(-1, keepdim=True))


def _softmax_back(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient of the scores, from that of their softmax p; ``(n, m, t)``, three times."""
    if p.shape[-1] >= _REGISTER:
        return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)  # type: ignore[no-any-return]
    found = grad.mul_(p)
    return found.sub_(p * found.sum(-1, keepdim=True))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as transformers' ``sdpa`` does, and by it where :func:`attend` has no other way.

    Args:
        module: The attention layer.
        query: ``(b, h, s, d)``.
        key: ``(b, g, t, d)``.
        value: ``(b, g, t, e)``.
        attention_mask: As ``sdpa`` has it: True where a query sees a key, what is added to scores, or None.
        dropout: Probability.
        scaling: Of the scores; None: one over the root of d.
        is_causal: Whether a query sees only keys that do not come after it, if there is no mask; None: as the layer is.
        kwargs: What else the layer says.

    Returns:
        ``(b, s, h, e)``, and no weights.
    """
    states = query, key, value
    if torch.is_autocast_enabled("cpu"):  # as torch's own attention would be
        states = tuple(each.to(torch.get_autocast_dtype("cpu")) for each in states)  # type: ignore[assignment]
    is_known = attention_mask is None or attention_mask.dtype == torch.bool
    is_known &= not any(kwargs.get(name) is not None for name in NOT_KNOWN) and not kwargs.get("output_attentions")
    if not is_known or query.shape[2] != key.shape[2] or not _is_worth_it(*states[:2], dropout):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return plain
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    found = attend(*states, attention_mask, scale=scaling, is_causal=causal, dropout=dropout)
    return found.transpose(1, 2).contiguous(), None


class Dropout(StandIn):
    """Drops out as its layer does, by other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        layer: Any = self._layer[0]
        if not (layer.training and 0 < layer.p < 1 and x.is_floating_point() and x.device.type == "cpu"):
            found: Tensor = layer(x)
            return found
        return x * noise(tuple(x.shape), layer.p, x.dtype)


class OnCpu:
    """A model on a CPU that attends and drops out in our way.

    Args:
        model: With ticks.
    """

    def __init__(self, model: nn.Module) -> None:
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        named = {id(c): c for c in configs if getattr(c, "_attn_implementation_internal", None) == _PLAIN}
        self._configs = list(named.values())
        dropouts = [module for module in model.modules() if type(module) is nn.Dropout and not module.inplace]
        self._places = places_of(model, dropouts)
        self._stand_ins: dict[nn.Module, nn.Module] = {module: Dropout(module) for module in dropouts}
        if self._configs:
            _register()

    @property
    def attends(self) -> bool:
        """Whether there is attention that transformers looks up by a name."""
        return bool(self._configs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the model attends and drops out in our way; a layer that is computed again must do so too."""
        modules = [owner._modules[name] for owner, name, _ in self._places]
        try:
            for owner, name, dropout in self._places:
                owner._modules[name] = self._stand_ins[dropout]
            with self._attending_by(NAME):
                yield
        finally:
            for (owner, name, _), module in zip(self._places, modules, strict=True):
                owner._modules[name] = module

    def renamed(self) -> AbstractContextManager[None]:
        """Within it the model attends as ever, by another name: it computes the same, unless it asks for the name."""
        return self._attending_by(_RENAMED)

    @contextmanager
    def _attending_by(self, name: str) -> Iterator[None]:
        before = [config._attn_implementation_internal for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, other in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = other


@functools.cache
def _register() -> None:
    """Tells transformers of our attention, and that it wants the masks of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    for name, function in ((NAME, attention), (_RENAMED, sdpa_attention_forward)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
