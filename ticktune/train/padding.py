"""Whether a model computes the same without padding, or with more: proved on a few of its rows, or told why not."""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import PatchError, first_line
from ticktune.patch.attach import set_training
from ticktune.patch.segments import DropoutError
from ticktune.patch.unpadded import TOKENS, Unpadded
from ticktune.tasks.batch import SEGMENTS, Batch
from ticktune.train.same_loss import loss_obstacle
from ticktune.train.steps import Around

if TYPE_CHECKING:
    from ticktune.tasks.task import Task

# Of the states' root mean square, and of the loss. Rounding is 1e-6 in float32 and 1e-2 in half precision.
_ALLOWED, _ALLOWED_HALF = 1e-4, 5e-2
_TOLD_APART = 5.0  # times what is allowed to change: the least that rows must change that see each other


def prove_unpadded(
    model: nn.Module, unpadded: Unpadded, task: "Task", batch: Batch, compute: Compute, *, base_dropout: bool
) -> None:
    """Proves that layers compute of a batch without padding what they compute with it, and can be trained so.

    The states behind the last layer must be the same, and others where all texts see each other, or nothing would be
    proved; then the loss must be the same. The model's training mode is restored, and no random number is used up.

    Args:
        model: With ticks.
        unpadded: Its layers.
        task: Gives forward and loss.
        batch: A few rows from :func:`~ticktune.patch.unpadded.without_padding`, on the device.
        compute: Device and precision.
        base_dropout: Whether the base's own dropout acts in training.

    Raises:
        PatchError: It does not hold.
    """
    modes = {module: module.training for module in model.modules()}
    joined = batch | {SEGMENTS: [sum(batch[SEGMENTS])]}
    try:
        model.eval()
        with torch.no_grad():
            padded, expected = _states(model, unpadded, task, batch, compute, nullcontext)
            alone, loss = _states(model, unpadded, task, batch, compute, unpadded.running)
            together, _ = _states(model, unpadded, task, joined, compute, unpadded.running)
        _run_backwards(model, unpadded, task, batch, compute, base_dropout)
    except DropoutError as error:
        raise PatchError("the base's own dropout acts in its attention", fix="set base.dropout: off") from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:  # of the model
        if is_out_of_memory(error):
            raise
        raise PatchError(f"its layers do not run without padding: {first_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    is_exact = compute.precision == "fp32" and padded.dtype in (torch.float32, torch.float64)
    allowed = _ALLOWED if is_exact else _ALLOWED_HALF
    change, seen = _distance(alone, padded), _distance(together, padded)
    is_told_apart = seen >= _TOLD_APART * change or len(batch[SEGMENTS]) == 1
    if not change <= allowed or not is_told_apart:
        raise PatchError(
            f"without padding the states behind its layers change by {100 * change:.2g} % of their size "
            f"(by {100 * seen:.2g} % where all texts see each other)"
        )
    if not math.isclose(loss, expected, rel_tol=allowed, abs_tol=allowed):
        raise PatchError(f"without padding the loss of a batch is {loss:.6g} instead of {expected:.6g}")


def padding_obstacle(model: nn.Module, task: "Task", batch: Batch, wider: Batch, compute: Compute) -> str | None:
    """Why texts cannot be padded further; None: the loss stays the same. The model's training mode is restored.

    Args:
        model: With ticks.
        task: Gives forward and loss.
        batch: A few rows,
        wider: and the same with more padding.
        compute: Device and precision.
    """

    def loss(each: Batch) -> Tensor:
        each = compute.put(each)
        return task.loss(task.forward(model, each), each)

    return loss_obstacle(model, compute, "more padding", lambda: loss(batch), lambda: loss(wider))


def _states(
    model: nn.Module, unpadded: Unpadded, task: "Task", batch: Batch, compute: Compute, around: Around
) -> tuple[Tensor, float]:
    """The states of tokens behind the last layer, ``(n, h)``, and the loss."""
    kept: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = unpadded.layers[-1].register_forward_hook(keep)
    try:
        with around(batch), compute.autocast():
            loss = float(task.loss(task.forward(model, batch), batch))
    finally:
        handle.remove()
    states = kept[-1].flatten(0, 1)  # a block that layers share is called for each of them
    return (states if len(states) == len(batch[TOKENS]) else states[batch[TOKENS]]), loss


def _run_backwards(
    model: nn.Module, unpadded: Unpadded, task: "Task", batch: Batch, compute: Compute, base_dropout: bool
) -> None:
    """Sees that a batch runs as in training; no gradient is kept."""
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        set_training(model, True, base_dropout=base_dropout)
        with unpadded.running(batch), compute.autocast():
            loss = task.loss(task.forward(model, batch), batch)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)


def _distance(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
