"""Whether a model keeps the examples of a packed row apart: proved on two of them, or told why not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ticktune.device import Compute
from ticktune.errors import first_line
from ticktune.tasks.batch import Example

if TYPE_CHECKING:
    from ticktune.tasks.task import Task

# Of the logits' root mean square. Rounding is 1e-6 in float32 and 1e-2 in half precision.
_ALLOWED, _ALLOWED_HALF = 1e-4, 5e-2
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


def packing_obstacle(model: nn.Module, task: "Task", pair: Sequence[Example], compute: Compute) -> str | None:
    """Why a model cannot be trained on packed rows; None: it can.

    The logits of the second example in a row with the first must be those that it has alone, and differ from those
    that it has as the first one's continuation, or nothing would be proved. The model's training mode is restored.

    Args:
        model: With or without ticks.
        task: Packs and runs.
        pair: Two examples.
        compute: Device and precision.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), compute.autocast():
            alone = _logits(model, task, [pair[1]], compute)
            packed = _logits(model, task, pair, compute)
            joined = _logits(model, task, [_joined(pair)], compute)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # of the model
        return f"the base does not run with positions that begin anew in a row: {first_line(error)}"
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


def _logits(model: nn.Module, task: "Task", examples: Sequence[Example], compute: Compute) -> Tensor:
    """(tokens, vocabulary), float32 or wider."""
    outputs = task.forward(model, compute.put(task.pack([examples])))
    logits = task.logits(outputs)[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def _joined(pair: Sequence[Example]) -> Example:
    names = ("input_ids", "labels")
    return {name: [*pair[0][name], *pair[1][name]] for name in names} | {"length": sum(e["length"] for e in pair)}


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
