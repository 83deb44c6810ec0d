"""How much a forward pass keeps for its backward pass, and what gradient checkpointing saves of it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.patch.standins import Checkpointed, places_of, standing_in, without_cache


@dataclass
class Activations:
    """Bytes that are kept for the backward pass.

    Args:
        outside: What is kept outside of the layers, and what they share, such as masks.
        inputs: Hidden states between layers, which checkpointing keeps.
        layers: What each layer keeps without checkpointing.
    """

    outside: int = 0
    inputs: int = 0
    layers: list[int] = field(default_factory=list)

    @property
    def plain(self) -> int:
        """Without checkpointing."""
        return self.outside + sum(self.layers)

    @property
    def checkpointed(self) -> int:
        """With checkpointing, at the most: one layer is computed again at a time."""
        return self.outside + self.inputs + max(self.layers, default=0)


@contextmanager
def measured(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[Activations]:
    """Measures forward passes, whose layers are checkpointed: only one layer is ever held whole.

    Args:
        model: It holds the layers.
        layers: Those that are checkpointed.

    Yields:
        What is kept; complete at the end.
    """
    weights = [*model.parameters(), *model.buffers()]
    found, all_kept, inputs = Activations(), _Kept(weights), set[int]()
    stand_ins = {layer: _Measured(layer, found, weights, inputs) for layer in layers}
    with standing_in(places_of(model, layers), stand_ins), all_kept:
        yield found
    found.inputs = sum(size for key, size in all_kept.sizes.items() if key in inputs)
    found.outside = all_kept.total - found.inputs


class _Kept:
    """Sees which storages the graph of its body keeps.

    Args:
        known: Tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.sizes: dict[int, int] = {}  # by storage, so that none counts twice
        self._known = set(map(_storage, known))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self.sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


class _Measured(Checkpointed):
    """Runs its layer once to see what it keeps, and once more checkpointed."""

    def __init__(self, layer: nn.Module, found: Activations, weights: Sequence[Tensor], inputs: set[int]) -> None:
        super().__init__(layer)
        self._found = found
        self._weights = weights
        self._inputs = inputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, *shared = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._inputs.add(_storage(states))
        kept = _Kept([*self._weights, *shared])
        values, named = without_cache(args, kwargs)
        with kept:
            self._layer[0](*values, **named)
        self._found.layers.append(kept.total)
        return super().forward(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
