"""How much a forward pass keeps for its backward pass, and what gradient checkpointing saves of it."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.patch.standins import Checkpointed, Context, places_of, standing_in, without_cache


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
def measured(model: nn.Module, layers: Sequence[nn.Module], again: Context = nullcontext) -> Iterator[Activations]:
    """Measures forward passes, whose layers are checkpointed: only one layer is ever held whole.

    Args:
        model: It holds the layers.
        layers: Those that are checkpointed.
        again: As of :class:`~ticktune.patch.standins.Checkpointed`.

    Yields:
        What is kept; complete at the end, when the results of the body must still be there.
    """
    weights = [*model.parameters(), *model.buffers()]
    found, all_kept, inputs = Activations(), Kept(weights), set[int]()
    stand_ins = {layer: _Measured(layer, again, found, weights, inputs) for layer in layers}
    with standing_in(places_of(model, layers), stand_ins), all_kept:
        yield found
    sizes = all_kept.sizes
    found.inputs = sum(size for key, size in sizes.items() if key in inputs)
    found.outside = sum(sizes.values()) - found.inputs


class Kept:
    """Sees which storages the graph of its body keeps, as long as it keeps them.

    Args:
        known: Tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = set(map(_storage, known))
        self._alive: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each storage that is still kept; each counts once and whole."""
        found = {_storage(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in self._alive}
        return {key: size for key, size in found.items() if key not in self._known}

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> "_Saved":
        saved = _Saved(tensor)
        self._alive.add(saved)
        return saved


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a saved result would hold the record that holds it


class _Measured(Checkpointed):
    """Runs its layer once to see what it keeps, and once more checkpointed."""

    def __init__(
        self, layer: nn.Module, again: Context, found: Activations, weights: Sequence[Tensor], inputs: set[int]
    ) -> None:
        super().__init__(layer, again)
        self._found = found
        self._weights = weights
        self._inputs = inputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, *shared = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._inputs.add(_storage(states))
        kept = Kept([*self._weights, *shared])
        values, named = without_cache(args, kwargs)
        with kept:
            result = self._layer[0](*values, **named)
        self._found.layers.append(kept.total)
        del result
        return super().forward(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
