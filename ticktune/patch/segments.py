"""Attention inside of segments: examples of packed rows one after the other, without a mask over all their tokens.

How layers attend, transformers looks up by a name in their config at every forward pass. In :meth:`Segments.running`
that name is ours, masks are not built, and layers are told where segments end, as flash attention is told it. On CUDA,
in half precision, one kernel of torch attends in all segments; elsewhere attention is called once for each run of
segments of equal length.

Legend of shapes: ``b`` batch, ``s`` sequence, ``h`` heads, ``g`` heads of keys and values, ``d`` head size, ``n`` how
many segments.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.device import Compute
from ticktune.errors import PatchError
from ticktune.patch.cpu import NOT_KNOWN, attend
from ticktune.tasks.batch import SEGMENTS, Batch

NAME = "ticktune_segments"
"""What attention inside of segments is called in transformers' registry."""

_ON_CPU = "ticktune_segments_cpu"  # the same, each segment by our own attention for CPUs

_HALF = (torch.float16, torch.bfloat16)
_LAYERS = {"full_attention", "sliding_attention"}


class DropoutError(ValueError):
    """A layer wants dropout in its attention, which the kernel does not have."""


Window = tuple[int, int]
"""How far a token sees to the left and to the right; -1: as far as its segment goes."""


class Segments:
    """A model whose attention can stay inside of segments.

    Args:
        model: With or without ticks, on its device.

    Raises:
        PatchError: Its attention is not one that transformers looks up, or knows more than windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        self._configs = list({id(c): c for c in found if getattr(c, "_attn_implementation_internal", None)}.values())
        if not self._configs:
            raise PatchError("its attention is not one of transformers' own")
        kinds = {kind for config in self._configs for kind in getattr(config, "layer_types", None) or ()}
        if kinds - _LAYERS:
            raise PatchError(f"it has layers of the kind {', '.join(sorted(kinds - _LAYERS))}")
        self._name = NAME
        _register(with_kernel=self._device.type == "cuda")

    def attend_on_cpu(self) -> None:
        """From now on segments attend by :func:`ticktune.patch.cpu.attend`, where torch's kernel does not."""
        self._name = _ON_CPU

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Within it the model attends inside of the segments of a batch; one without changes nothing.

        Args:
            batch: On the device.
        """
        lengths = batch.get(SEGMENTS)
        if lengths is None:
            yield
            return
        keywords = layer_keywords(lengths, self._device)

        def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | keywords

        handle = self._model.register_forward_pre_hook(put, with_kwargs=True)
        try:
            with self.again():
                yield
        finally:
            handle.remove()

    @contextmanager
    def again(self) -> Iterator[None]:
        """As :meth:`running`, for a second run of layers in a backward pass, which get the arguments that they had."""
        before = [config._attn_implementation_internal for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation_internal = self._name
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name


def has_kernel(compute: Compute) -> bool:
    """Whether one kernel attends in all segments, so that layers can be compiled without a graph for each batch."""
    return compute.device.type == "cuda" and compute.dtype in _HALF


def layer_keywords(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What layers are told of segments, by the names that transformers has for flash attention.

    Args:
        lengths: Of the segments.
        device: Where they are.

    Returns:
        The ends, ``(n+1,)`` int32 from 0, and a length that none exceeds: a power of two, so that compiled layers see
        few of them.
    """
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = 1 << (max(lengths, default=1) - 1).bit_length()
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    on_cpu: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends inside of segments, as transformers calls attention; no mask is looked at.

    Args:
        module: The attention layer.
        query: ``(b, h, s, d)``.
        key: ``(b, g, s, d)``.
        value: ``(b, g, s, d)``.
        attention_mask: Not looked at.
        scaling: Of the scores; None: one over the root of d.
        dropout: Probability; 0 where one kernel attends in all segments.
        cu_seq_lens_q: Ends of the segments, ``(n+1,)`` int32.
        max_length_q: A length that no segment exceeds.
        sliding_window: How many tokens a token sees on a side, itself counted.
        is_causal: Whether a token sees only those before it; None: as the layer says.
        on_cpu: Whether our own attention for CPUs is taken instead of torch's.
        kwargs: What else the layer says.

    Returns:
        ``(b, s, h, d)``, and no weights.

    Raises:
        ValueError: The layer wants what attention inside of segments does not have.
    """
    if cu_seq_lens_q is None:
        raise ValueError("the layers are not told where segments end")
    unknown = [name for name in NOT_KNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"it knows no {', '.join(unknown)}")
    if sliding_window is None and getattr(module, "sliding_window", None) is not None:
        raise ValueError("a layer does not say which window it has")
    if key.shape[2] != query.shape[2]:
        raise ValueError("a layer attends to other tokens than its own")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    side = -1 if sliding_window is None else sliding_window - 1
    window = (side, 0 if is_causal else side)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as torch's own attention would be
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, length = query.shape[0], query.shape[2]
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if q.is_cuda and q.dtype in _HALF:
        found = _kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window, dropout)
    else:
        found = by_length(q, k, v, cu_seq_lens_q.diff().tolist(), scaling, window, dropout, on_cpu=on_cpu)
    return found.unflatten(0, (rows, length)), None


def by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float | None,
    window: Window,
    dropout: float = 0.0,
    *,
    on_cpu: bool = False,
) -> Tensor:
    """Attention in one call for each run of segments of equal length.

    Args:
        query: ``(tokens, h, d)``.
        key: ``(tokens, g, d)``.
        value: ``(tokens, g, d)``.
        lengths: Of the segments.
        scale: Of the scores; None: one over the root of d.
        window: How far a token sees.
        dropout: Probability.
        on_cpu: As :func:`attention`.

    Returns:
        ``(tokens, h, d)``.
    """
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    parts = (states.split([length * count for length, count in runs]) for states in (query, key, value))
    plain = {"enable_gqa": query.shape[1] != key.shape[1]}
    found = []
    for (length, count), *states in zip(runs, *parts, strict=True):
        q, k, v = (each.unflatten(0, (count, length)).transpose(1, 2) for each in states)
        mask, is_causal = _seen(length, window, q.device)
        if on_cpu:
            out = attend(q, k, v, mask, scale=scale, is_causal=is_causal, dropout=dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, **plain)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _seen(length: int, window: Window, device: torch.device) -> tuple[Tensor | None, bool]:
    """The mask of a segment ``(length, length)``, where it needs one, and whether it is causal without."""
    left, right = window
    if left < 0 or left >= length - 1:  # a window on the right is as wide
        return None, right == 0
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return (distance <= left) & (distance >= -right), False


def kernel_of(varlen: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of torch as :func:`attention` calls it.

    Args:
        varlen: ``torch.nn.attention.varlen.varlen_attn``. Versions differ: that of torch 2.10 has no windows, that of
            2.13 wants to be told of fewer heads of keys.
    """
    known = inspect.signature(varlen).parameters
    has_windows, is_told_of_heads = "window_size" in known, "enable_gqa" in known

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: Window,
        dropout: float,
    ) -> Tensor:
        if dropout:
            raise DropoutError("the kernel has no dropout")
        options: dict[str, Any] = {"scale": scale}
        if has_windows:
            options["window_size"] = window
        elif window[0] < 0:
            options["is_causal"] = window[1] == 0
        else:
            raise ValueError("this torch has no windows in attention inside of segments")
        if is_told_of_heads:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        found: Tensor = varlen(query, key, value, ends, ends, longest, longest, **options)
        return found

    return run


def _no_kernel(*args: Any) -> Tensor:
    raise ValueError("this torch has no attention inside of segments")


_kernel: Callable[..., Tensor] = _no_kernel  # what it calls is read once: compiled layers cannot ask for a signature


@functools.cache
def _register(*, with_kernel: bool) -> None:
    """Tells transformers of our attention; looks for torch's kernel, which takes a second, where it is of use."""
    global _kernel
    from transformers import AttentionInterface

    if with_kernel:
        with suppress(ImportError):  # said where half precision would need it
            from torch.nn.attention.varlen import varlen_attn

            _kernel = kernel_of(varlen_attn)
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(_ON_CPU, functools.partial(attention, on_cpu=True))
