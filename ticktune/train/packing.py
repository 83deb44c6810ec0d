"""Whether a model keeps the examples of a packed row apart: proved on two of them, or told why not."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import first_line
from ticktune.patch.attach import set_training
from ticktune.patch.segments import Segments
from ticktune.tasks.batch import Example
from ticktune.train.steps import Around

if TYPE_CHECKING:
    from ticktune.tasks.task import Task

# Of the logits' root mean square. Rounding is 1e-6 in float32 and 1e-2 in half precision.
_ALLOWED, _ALLOWED_HALF = 1e-4, 5e-2
_BEGINNING = 8  # tokens of an example
_TOKENS = ("input_ids", "labels")
_TOLD_APART = 5.0  # times what packing changes: the least that the same tokens in one text must change


def packed_pair(lengths: Sequence[int], capacity: int) -> tuple[int, int] | None:
    """The shortest example and the longest one that fits into a row behind it; None: no two fit.

    Args:
        lengths: Length of each example in tokens.
        capacity: The most tokens in a row.
    """
    first = min(range(len(lengths)), key=lengths.__getitem__)
    fitting = [i for i in range(len(lengths)) if i != first and lengths[first] + lengths[i] <= capacity]
    return (first, max(fitting, key=lengths.__getitem__)) if fitting else None


def beginning(example: Example, count: int) -> Example:
    """The first tokens of an example, at most so many."""
    part = {name: example[name][:count] for name in _TOKENS}
    return part | {"length": len(part["input_ids"])}


def packing_obstacle(
    model: nn.Module,
    task: "Task",
    pair: Sequence[Example],
    compute: Compute,
    segments: Segments | None = None,
    *,
    base_dropout: bool = True,
) -> str | None:
    """Why a model cannot be trained on packed rows; None: it can.

    The logits of the second example in a row with the first must be those that it has alone, and differ from those
    that it has as the first one's continuation, or nothing would be proved. By segments it must also run backwards with
    dropout as in training. The model's training mode is restored.

    Args:
        model: With or without ticks.
        task: Packs and runs.
        pair: Two examples.
        compute: Device and precision.
        segments: How the model attends in packed rows; None: by masks that it makes of the positions.
        base_dropout: Whether the base's own dropout acts in training.
    """
    modes = {module: module.training for module in model.modules()}
    around: Around = nullcontext if segments is None else segments.running
    model.eval()
    try:
        with torch.no_grad(), compute.autocast():
            alone = _logits(model, task, [pair[1]], compute)
            packed = _logits(model, task, pair, compute, around)
            joined = _logits(model, task, [_joined(pair)], compute, around)
        if segments is not None:
            _run_backwards(model, task, pair, compute, around, base_dropout)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:  # of the model
        if segments is not None and is_out_of_memory(error):
            raise
        what = "positions that begin anew in a row" if segments is None else "attention inside of segments"
        return f"the base does not run with {what}: {first_line(error)}"
    finally:
        for module, mode in modes.items():
            module.training = mode
    count = len(alone)
    apart, together = _distance(packed[-count:], alone), _distance(joined[-count:], alone)
    is_exact = compute.precision == "fp32" and next(model.parameters()).dtype in (torch.float32, torch.float64)
    if apart <= (_ALLOWED if is_exact else _ALLOWED_HALF) and together >= _TOLD_APART * apart:
        return None
    return (
        f"the base does not keep the examples of a row apart: behind another one, the logits of an example change by "
        f"{100 * apart:.2g} % of their size (by {100 * together:.2g} % where it continues the other one)"
    )


def _logits(
    model: nn.Module, task: "Task", examples: Sequence[Example], compute: Compute, around: Around = nullcontext
) -> Tensor:
    """(tokens, vocabulary), float32 or wider."""
    batch = compute.put(task.pack([examples]))
    with around(batch):
        logits = task.logits(task.forward(model, batch))[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def _run_backwards(
    model: nn.Module,
    task: "Task",
    pair: Sequence[Example],
    compute: Compute,
    around: Around,
    base_dropout: bool,
) -> None:
    """Sees that the beginnings of two examples run as in training; no gradient is kept, and no random number used up.

    Kernels refuse dropout, and some head sizes on some devices in the backward pass alone.
    """
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        set_training(model, True, base_dropout=base_dropout)
        beginnings = [beginning(example, _BEGINNING) for example in pair]
        with compute.autocast():
            logits = _logits(model, task, beginnings, compute, around)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trained:
            torch.autograd.grad(logits.square().mean(), trained, allow_unused=True)


def _joined(pair: Sequence[Example]) -> Example:
    joined = {name: [*pair[0][name], *pair[1][name]] for name in _TOKENS}
    return joined | {"length": len(joined["input_ids"])}


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
