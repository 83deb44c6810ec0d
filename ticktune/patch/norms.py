"""The task's own γ′ and β′ in the model's own norm modules.

A norm keeps its class and its forward, so Gemma's (1 + w) and T5's norm without mean stay themselves. On this
instance its parameters become float32 masters (a bfloat16 γ near 1 would round every usual update away), and
its output returns in the dtype that the frozen norm would give: that of its input.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import PatchError
from ticktune.patch.fast import RmsNorm, can_replace, rms_form


def train_norm(norm: nn.Module, *, fast: bool = False) -> list[Any]:
    """Makes the norm's own parameters trainable float32 masters.

    Args:
        norm: A module with ``weight`` and perhaps ``bias`` as its direct parameters.
        fast: Whether a norm without mean gets a backward pass that needs nothing but its input.

    Returns:
        The hook handles that undo the cast of its output.
    """
    has_hooks = bool(norm._forward_hooks)
    for name in own_parameters(norm):
        stored = norm.get_parameter(name)
        setattr(norm, name, nn.Parameter(stored.detach().float().clone()))
    cast = _Cast()
    return [
        norm.register_forward_pre_hook(cast.before),
        norm.register_forward_hook(cast.after),
        *(_lean(norm) if fast and not has_hooks else ()),
    ]


def lean_norm(norm: nn.Module) -> list[Any]:
    """Gives a norm without mean a backward pass that needs its input alone, trained or not.

    Returns:
        The hook handles that undo it; none where the norm is another one, or a hook of others may change its output.
    """
    return [] if norm._forward_hooks else _lean(norm)


def _lean(norm: nn.Module) -> list[Any]:
    form = rms_form(norm)
    return [] if form is None else [norm.register_forward_hook(partial(_with_lean_backward, *form))]


def own_parameters(norm: nn.Module) -> list[str]:
    """Returns the names of the norm's direct parameters, a subset of weight and bias.

    Raises:
        PatchError: It has other parameters, which no task file could hold.
    """
    names = [name for name, _ in norm.named_parameters(recurse=False)]
    if not set(names) <= {"weight", "bias"}:
        raise PatchError(f"the norm {type(norm).__name__} has the parameters {', '.join(names)}, not weight and bias")
    return names


class _Cast:
    """Gives a norm's kernel what it needs, and its output the dtype of its input.

    The input says the dtype at each call: a model can be converted after ticks were attached.
    """

    def __init__(self) -> None:
        self._dtype: torch.dtype | None = None

    # Bound methods, not closures: a deep copy of the model then has its own.
    def before(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args else None
        self._dtype = x.dtype if isinstance(x, Tensor) else None
        # Only the CPU's kernel of layer_norm takes an input and parameters of two dtypes: half precision and float32.
        if not isinstance(norm, nn.LayerNorm) or not isinstance(x, Tensor) or _in_autocast(x):
            return None
        if x.dtype == norm.weight.dtype or (
            x.device.type == "cpu" and norm.weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        ):
            return None
        return (x.to(norm.weight.dtype), *args[1:])

    def after(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        dtype, self._dtype = self._dtype, None
        # Under autocast the frozen layer_norm and this one run the same kernel and return the same dtype.
        if dtype is None or (isinstance(norm, nn.LayerNorm) and _in_autocast(output)):
            return output
        return output.to(dtype)


def _with_lean_backward(
    eps: float, offset: int, norm: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    if not args or not output.requires_grad or not can_replace():
        return None
    # What autograd recorded of the norm's own forward is freed with ``output``.
    result: Tensor = RmsNorm.apply(args[0], norm.weight, output.detach(), eps, offset)
    return result


def _in_autocast(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch 2.11 cannot compile is_autocast_available
