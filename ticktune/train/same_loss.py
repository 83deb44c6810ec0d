"""Whether a model computes the loss of a batch in another way too: tried on a few rows, or told why not."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import first_line

_ALLOWED, _ALLOWED_HALF = 1e-4, 5e-2  # relative; rounding is 1e-6 in float32 and 1e-2 in half precision


def loss_obstacle(
    model: nn.Module,
    compute: Compute,
    how: str,
    plain: Callable[[], Tensor],
    other: Callable[[], Tensor],
    *,
    exact: bool = False,
) -> str | None:
    """Why a model cannot be run in another way; None: the loss is the same. The model's training mode is restored.

    Args:
        model: With ticks.
        compute: Device and precision.
        how: What is other, such as ``wider blocks``.
        plain: The loss as ever,
        other: and in the other way.
        exact: Whether it must be the same to the last bit.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), compute.autocast():
            expected, found = float(plain()), float(other())
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
    ) as error:  # of the model, such as one that knows its width
        if is_out_of_memory(error):
            raise
        return f"the model does not run with {how}: {first_line(error)}"
    finally:
        for module, mode in modes.items():
            module.training = mode
    allowed = 0.0 if exact else _ALLOWED if compute.precision == "fp32" else _ALLOWED_HALF
    if math.isclose(found, expected, rel_tol=allowed, abs_tol=allowed):
        return None
    return f"with {how} the loss of a batch is {found:.6g} instead of {expected:.6g}"
