"""The loss of a language-model head without its logits: cross entropy of hidden states, chunk by chunk.

Positions without a target are dropped before the head's matrix product, at most :data:`CHUNK_BYTES` of logits exist at
a time, and the frozen head gets no gradient. What it computes is :func:`ticktune.tasks.task.token_loss`, to rounding.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ticktune.device import Compute
from ticktune.errors import first_line
from ticktune.patch import standins
from ticktune.tasks.batch import IGNORED, Batch, Example

if TYPE_CHECKING:
    from ticktune.tasks.task import Task

LossOf = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, summed over what the task counts: a float32 scalar."""

ChunkLoss = Callable[[Tensor, Tensor, "Head", float, bool], tuple[Tensor, Tensor | None]]
"""From logits, targets, head, smoothing, and whether it is wanted: a chunk's loss, and its gradient by the logits."""

CHUNK_ROWS = 4096
"""The most positions at once; fewer make narrow matrix products."""

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""The most bytes of float32 logits at once. On a CPU about what its cache holds: with a vocabulary of 32,000, chunks of
256 positions take the time of 2,048 in fp32, and two thirds of it in bf16 (AMD EPYC, one thread). A GPU wants large
matrix products."""

_PROOF_TOKENS = 64
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_LARGEST = 64.0  # of the logits in the proof: beyond all soft caps


@dataclass(frozen=True)
class Head:
    """How a model makes logits of what goes into its output embeddings: z = W x + b; scale·z; cap·tanh(…/cap).

    Args:
        linear: The output embeddings, frozen.
        scale: What z is multiplied by (Cohere, Granite).
        cap: Largest logit (Gemma 2), or None.
        offset: Added to z, beside the linear's own bias (Marian), or None.
    """

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None
    offset: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (rows, vocabulary) of hidden states (rows, hidden), float32 or wider."""
        z = _wide(F.linear(hidden, self.linear.weight, self.linear.bias))
        if self.offset is not None:
            z = z + self.offset.flatten()
        return _shaped(z, self.scale, self.cap)


def plain_loss(task: "Task") -> LossOf:
    """The loss by the task's own forward pass and all logits."""
    return lambda model, batch: task.loss(task.forward(model, batch), batch)


def head_loss(task: "Task", head: Head, *, compiled: bool = False) -> LossOf:
    """The same loss by the hidden states, without the logits.

    Args:
        task: Its ``targets`` are not None.
        head: From :func:`find_head`, of the model that the loss is taken of.
        compiled: As of :func:`linear_cross_entropy`.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        targets = task.targets(batch)
        assert targets is not None
        states = hidden_states(model, task, batch, head)
        return linear_cross_entropy(states, targets, head, task.options.label_smoothing, compiled=compiled)

    return loss


def ends_of(examples: Sequence[Example]) -> list[Example]:
    """The last 64 tokens and labels of some examples, for :func:`find_head`, which makes all their logits."""
    return [
        {
            name: value[-_PROOF_TOKENS:] if name in _TOKENS and "labels" in each else value
            for name, value in each.items()
        }
        for each in examples
    ]


def find_head(
    model: nn.Module, task: "Task", batch: Batch, compute: Compute, *, for_training: bool = True
) -> Head | str:
    """Proves on a model how its logits come from its output embeddings.

    Random states of the batch's shape are put into the embeddings, so large that caps act, and the logits that come out
    must be those of one :class:`Head`; then its loss of the batch must be the plain one. The model's training mode is
    restored, and no random number is drawn from a shared generator.

    Args:
        model: With or without ticks.
        task: Gives forward, targets and loss.
        batch: A few rows, on the device; see :func:`ends_of`.
        compute: Device and precision.
        for_training: Whether a gradient is wanted: the head must be frozen then.

    Returns:
        The head, or the reason why there is none.
    """
    linear = getattr(model, "get_output_embeddings", lambda: None)()
    targets = task.targets(batch)
    if targets is None or linear is None:
        return "the loss is not that of a language-model head"
    if type(linear) is not nn.Linear or any(type(p) is not nn.Parameter for p in linear.parameters()):
        return "the output embeddings are no plain linear projection"
    if for_training and any(p.requires_grad for p in linear.parameters()):
        return "the output embeddings are trained"
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), compute.autocast():
            return _proved(model, task, batch, linear, targets.shape, compute)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of the model, on odd shapes
        return f"the model does not run without its logits: {first_line(error)}"
    finally:
        for module, mode in modes.items():
            module.training = mode


def _proved(
    model: nn.Module, task: "Task", batch: Batch, linear: nn.Linear, shape: torch.Size, compute: Compute
) -> Head | str:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*shape, linear.in_features, generator=generator).to(linear.weight.device)
    states = (states * (_LARGEST / float(linear(states.to(linear.weight.dtype)).abs().max()))).to(linear.weight.dtype)
    calls: list[Tensor] = []

    def put(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(args[0])
        return (states.to(args[0].dtype),)

    with _hooked(linear, put):
        found = task.logits(task.forward(model, batch))
    if len(calls) != 1 or calls[0].shape != states.shape:
        return "the output embeddings are not called once with the states of all positions"
    rows = states.to(calls[0].dtype).flatten(0, -2)
    is_exact = compute.precision == "fp32" and {rows.dtype, found.dtype} <= {torch.float32, torch.float64}
    # The least that a wrong scale or cap changes is some percent of the largest logit.
    allowed = 1e-5 if is_exact else 2e-2
    for head in _candidates(model, linear):
        expected = head.logits(rows).view(found.shape)
        if float((found - expected).abs().max()) <= allowed * float(expected.abs().max()):
            plain, ours = float(plain_loss(task)(model, batch)), float(head_loss(task, head)(model, batch))
            if abs(plain - ours) <= allowed * max(1.0, abs(plain)):
                return head
    return "its logits are something else than the output embeddings' product, scaled or capped"


def _candidates(model: nn.Module, linear: nn.Linear) -> Iterator[Head]:
    """What the config says of the logits, in every combination; which of it is true is for the proof to say."""
    config: Any = getattr(model, "config", None)
    configs = [config, config.get_text_config(decoder=True)] if hasattr(config, "get_text_config") else [config]

    def numbers(*names: str) -> list[float]:
        found = [getattr(each, name, None) for each in configs for name in names]
        return [float(n) for n in dict.fromkeys(found) if isinstance(n, int | float) and n > 0]

    scales = numbers("logit_scale", "logits_scaling", "lm_head_multiplier")
    caps = numbers("final_logit_softcapping", "logits_soft_cap")
    offset = getattr(model, "final_logits_bias", None)
    for bias in [None, offset] if isinstance(offset, Tensor) and not offset.requires_grad else [None]:
        for cap in [None, *caps]:
            for scale in [1.0, *scales, *(1 / scale for scale in scales)]:
                yield Head(linear, scale, cap, bias)


def hidden_states(model: nn.Module, task: "Task", batch: Batch, head: Head) -> Tensor:
    """What goes into the output embeddings, (batch, seq, hidden); only one position's logits are computed."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return (args[0][:1, :1].detach(),)

    with _hooked(head.linear, keep):
        task.forward(model, batch)
    [states] = kept
    return states


def logits_in_parts(model: nn.Module, task: "Task", batch: Batch, head: Head) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits (tokens, vocabulary) and targets (tokens,) of the positions that have one, chunk by chunk."""
    targets = task.targets(batch)
    assert targets is not None
    flat, labels = hidden_states(model, task, batch, head).flatten(0, -2), targets.flatten()
    for kept in (labels != IGNORED).nonzero().flatten().split(_chunk(head)):
        if len(kept):
            yield head.logits(flat[kept]), labels[kept]


def _chunk(head: Head) -> int:
    """How many positions' logits are made at once."""
    size = CHUNK_BYTES.get(head.linear.weight.device.type, 1 << 29)
    return max(1, min(CHUNK_ROWS, size // (4 * head.linear.out_features)))


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    smoothing: float = 0.0,
    *,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Cross entropy of a frozen head's logits, summed over the positions that have a target.

    Args:
        hidden: (…, hidden).
        targets: (…) int64, IGNORED where there is none.
        head: How logits are made.
        smoothing: Share of the target that all tokens get.
        chunk: Positions at once; None: as many as :data:`CHUNK_ROWS` and :data:`CHUNK_BYTES` allow.
        compiled: Whether torch compiles what stands between a chunk's two matrix products: it then reads the logits
            twice and writes their gradient once, where eagerly float32 copies are made on the way.

    Returns:
        A scalar, float32, or float64 where ``hidden`` is; its gradient can be taken once.
    """
    flat, labels = hidden.flatten(0, -2), targets.flatten()
    kept = (labels != IGNORED).nonzero().flatten()
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if hidden.dtype == torch.float64:
        dtype = torch.float64
    size = chunk or _chunk(head)
    chunk_loss = _compiled(standins.BACKEND, head.scale, head.cap, smoothing) if compiled else _chunk_loss
    loss: Tensor = _LinearCrossEntropy.apply(flat, kept, labels[kept], head, smoothing, size, dtype, chunk_loss)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the hidden states is made in the forward pass, while each chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        kept: Tensor,
        targets: Tensor,
        head: Head,
        smoothing: float,
        chunk: int,
        dtype: torch.dtype,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        """Sums the loss; ``hidden`` is (positions, hidden), ``kept`` and ``targets`` (learned,)."""
        needs_gradient = ctx.needs_input_grad[0]
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = head.linear.weight.to(dtype), _bias(head, dtype)
            loss = torch.zeros((), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
            gradient = torch.empty(len(kept) if needs_gradient else 0, hidden.shape[1], dtype=dtype, device=loss.device)
            # Parts of about one size: a small rest would be as slow as a whole one.
            size = math.ceil(len(kept) / max(1, math.ceil(len(kept) / chunk)))
            for start in range(0, len(kept), max(1, size)):
                part = slice(start, start + size)
                z = F.linear(hidden[kept[part]].to(dtype), weight, bias)
                value, slope = chunk_loss(z, targets[part], head, smoothing, needs_gradient)
                loss += value
                if slope is not None:
                    torch.mm(slope.to(dtype), weight, out=gradient[part])
        if needs_gradient:
            ctx.save_for_backward(kept, gradient)
            ctx.like = (hidden.shape, hidden.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Scales the gradient, and puts it where the learned positions are."""
        kept, gradient = ctx.saved_tensors
        shape, dtype = ctx.like
        whole = gradient.new_zeros(shape, dtype=dtype)
        whole[kept] = (gradient * grad_output).to(dtype)
        return whole, *[None] * 7


def _chunk_loss(
    z: Tensor, target: Tensor, head: Head, smoothing: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of a few positions, and its gradient by z, (rows, vocabulary)."""
    is_shaped = head.scale != 1 or head.cap is not None
    logits = _shaped(_wide(z), head.scale, head.cap) if is_shaped else z
    log_p = logits.log_softmax(-1, dtype=_wide(z[:0]).dtype)
    loss = -log_p.gather(1, target[:, None]).sum() * (1 - smoothing)
    if smoothing:
        loss -= log_p.sum() * (smoothing / log_p.shape[1])
    if not needs_gradient:
        return loss, None
    slope = log_p.exp_()
    if smoothing:
        slope -= smoothing / slope.shape[1]
    slope.scatter_(1, target[:, None], slope.gather(1, target[:, None]) + (smoothing - 1))
    if head.cap is not None:
        slope *= 1 - (logits / head.cap).square_()
    if head.scale != 1:
        slope *= head.scale
    return loss, slope


@functools.cache
def _compiled(backend: str, scale: float, cap: float | None, smoothing: float) -> ChunkLoss:
    """:func:`_chunk_loss` of one kind of head, for any number of positions, as torch compiles it."""

    def fused(z: Tensor, target: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = _wide(z) * scale
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        loss = -log_p.gather(1, target[:, None])[:, 0] * (1 - smoothing)
        if smoothing:
            loss = loss - log_p.sum(-1) * (smoothing / z.shape[1])
        if not needs_gradient:
            return loss, None
        is_target = torch.arange(z.shape[1], device=z.device) == target[:, None]
        slope = log_p.exp() - smoothing / z.shape[1] - (1 - smoothing) * is_target.to(log_p.dtype)
        if cap is not None:
            slope = slope * (1 - (logits / cap).square())
        return loss, (slope * scale).to(z.dtype)

    compiled = torch.compile(fused, backend=backend)

    def chunk_loss(
        z: Tensor, target: Tensor, head: Head, smoothing: float, needs_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        for each in (z, target):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        with standins.compiling("the loss"):
            loss, slope = compiled(z, target, needs_gradient)
        return loss.sum(), slope

    return chunk_loss


def _bias(head: Head, dtype: torch.dtype) -> Tensor | None:
    parts = [part.flatten() for part in (head.linear.bias, head.offset) if part is not None]
    return torch.stack(parts).sum(0).to(dtype) if parts else None


def _shaped(z: Tensor, scale: float, cap: float | None) -> Tensor:
    z = z if scale == 1 else z * scale
    return z if cap is None else (z / cap).tanh_() * cap


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
