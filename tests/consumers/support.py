"""Models with ticks that matter, and the comparison that all consumers must pass."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import ticktune
from ticktune.patch.attach import adapter_parameters

TOLERANCE = 1e-5  # relative to the largest value: float32 sums in another order
_PROOF = 1000  # the ticks must do so many times more, else equality proves nothing


@dataclass(frozen=True)
class Agreement:
    """How far a consumer is from base + adapter, and how far that is from the base with trained norms alone."""

    difference: float
    tolerance: float
    effect: float


def agreement(theirs: Any, ours: Any, without: Any) -> Agreement:
    """Asserts that a consumer's numbers are ours, and that they would not be without the ticks.

    Args:
        theirs: Arrays of the consumer, on the merged folder; the same shapes as ours.
        ours: Of base + adapter in this process.
        without: The same with ticks that do nothing.
    """
    their, our, base = ([np.asarray(a, dtype=np.float64) for a in part] for part in (theirs, ours, without))
    assert [a.shape for a in their] == [a.shape for a in our] == [a.shape for a in base]
    assert all(np.isfinite(a).all() for a in (*their, *our, *base))
    found = Agreement(
        difference=max(float(np.abs(a - b).max()) for a, b in zip(their, our, strict=True)),
        tolerance=TOLERANCE * max(1.0, *(float(np.abs(a).max()) for a in our)),
        effect=max(float(np.abs(a - b).max()) for a, b in zip(our, base, strict=True)),
    )
    assert found.difference <= found.tolerance
    assert found.effect >= _PROOF * found.tolerance
    return found


def attach(model: nn.Module, *, form: str = "auto", dim: int = 16) -> nn.Module:
    """Puts ticks that do nothing yet, and norms that are trained already, on a model."""
    ticktune.attach(model, dim=dim, form=form)
    _perturb(model, ("norm",), 0.05)
    return model.eval()


def train(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Gives the ticks values, as training would."""
    _perturb(model, ("Q", "r", "P", "U"), scale)
    return model


def _perturb(model: nn.Module, wanted: tuple[str, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, role, parameter in adapter_parameters(model):
            if role in wanted:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def randomised(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """A model whose every parameter is noise, biases and norms too: nothing is zero or one by accident."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def sizes(**changes: Any) -> dict[str, Any]:
    """Config entries of a tiny model that most families share; the width is no multiple of anything."""
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 82}
    return {**shape, "vocab_size": 64, **ids, **changes}
