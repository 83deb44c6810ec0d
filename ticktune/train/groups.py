"""Learning rate, decay and schedule for each role of parameter, and the norm of all gradients."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ticktune.patch.attach import Role

if TYPE_CHECKING:
    from ticktune.recipe.schema import Optimizer, Schedule


def build_optimizer(parameters: Iterable[tuple[str, Role, nn.Parameter]], options: "Optimizer") -> torch.optim.AdamW:
    """Builds AdamW with one group for each role.

    P learns at ``lr * p_lr_ratio`` with weight decay and eps divided by the ratio: under AdamW that is
    exactly a forward scale of this size on the tick (He et al. 2021 call it s), without one in the artefact.

    Args:
        parameters: (key, role, parameter) of everything that is trained.
        options: The recipe's section.

    Returns:
        The optimizer; each group has the keys ``role`` and ``peak_lr`` besides AdamW's own.
    """
    ratio = options.p_lr_ratio
    settings: dict[str, tuple[float, float, float]] = {
        "Q": (options.lr, options.weight_decay, options.eps),
        "U": (options.lr, options.weight_decay, options.eps),
        "P": (options.lr * ratio, options.weight_decay / ratio, options.eps / ratio),
        "r": (options.lr, 0.0, options.eps),
        "norm": (options.norm_lr, 0.0, options.eps),
        "head": (options.head_lr, options.weight_decay, options.eps),
        "head bias": (options.head_lr, 0.0, options.eps),
    }
    members: dict[str, list[nn.Parameter]] = {}
    for _, role, parameter in parameters:
        kind: str = "head bias" if role == "head" and parameter.ndim < 2 else role
        members.setdefault(kind, []).append(parameter)
    groups = []
    for kind, (lr, decay, eps) in settings.items():
        if kind in members:
            groups.append(
                {
                    "params": members[kind],
                    "role": kind,
                    "lr": lr,
                    "peak_lr": lr,
                    "weight_decay": decay,
                    "eps": eps,
                }
            )
    return torch.optim.AdamW(groups, betas=(options.betas[0], options.betas[1]), fused=True)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales gradients so that their norm is at most this, as torch does.

    Where it is not finite they stay as they are, so that it can be told which of them are not.

    Args:
        parameters: With or without gradients.
        most: Largest norm; inf: none is scaled.

    Returns:
        The norm before, a scalar.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, most, norm.nan_to_num(nan=0.0, posinf=0.0))
    return norm


def lr_factor(step: int, total: int, options: "Schedule") -> float:
    """The share of the peak learning rate at one update, in closed form.

    With W = ceil(warmup * total) warm-up steps: ``(step + 1) / W`` before step W, so that the first update is
    not wasted on a rate of zero. Then, with x = (step - W) / (total - W): ``1 - x`` (linear),
    ``(1 + cos(pi x)) / 2`` (cosine), or 1 (constant).

    Args:
        step: Number of the update, from 0.
        total: Updates in the whole run.
        options: The recipe's section.

    Returns:
        A number in (0, 1].
    """
    warmup = math.ceil(round(options.warmup * total, 9))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return (step + 1) / warmup
    if options.name == "constant":
        return 1.0
    x = (step - warmup) / max(1, total - warmup)
    return 1 - x if options.name == "linear" else (1 + math.cos(math.pi * x)) / 2
