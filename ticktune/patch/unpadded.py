"""Encoder layers without padding: they see the tokens of a batch in one row, and attention stays inside of each text.

Before the first layer the tokens that are no padding are gathered, texts of one length beside each other; behind the
last one their states are put back where they were. Embeddings, poolers, heads and losses see padded rows as ever.

Legend of shapes: ``b`` rows, ``s`` their padded length, ``n`` tokens of a batch that are no padding, ``h`` hidden size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from ticktune.errors import PatchError
from ticktune.patch.attach import attachment_of
from ticktune.patch.segments import Segments, layer_keywords
from ticktune.patch.standins import StandIn, places_of
from ticktune.tasks.batch import SEGMENTS, Batch

TOKENS = "unpadded"
"""Key of a batch: where the tokens are that are no padding, in its rows one after the other; ``(n,)`` int64."""


def without_padding(batch: Batch) -> Batch:
    """A padded batch, and which of its tokens :class:`Unpadded` computes.

    Args:
        batch: On the CPU; its ``attention_mask`` is ``(b, s)``.
    """
    mask: Tensor = batch["attention_mask"].bool()
    lengths, order = mask.sum(1).sort(stable=True)
    row, place = mask[order].nonzero(as_tuple=True)
    return batch | {TOKENS: order[row] * mask.shape[1] + place, SEGMENTS: [n for n in lengths.tolist() if n]}


class Unpadded:
    """A model whose layers can run without padding.

    Args:
        model: With ticks, on its device.

    Raises:
        PatchError: It has several stacks of layers, or its attention has no segments.
    """

    def __init__(self, model: nn.Module) -> None:
        stacks = attachment_of(model).layout.layers
        if len(stacks) != 1:
            raise PatchError(f"the model has several stacks of layers ({', '.join(stacks)})")
        [self.layers] = stacks.values()
        self._segments = Segments(model)
        self._places = places_of(model, self.layers)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Within it the layers, or what stands in their places, compute the tokens of a batch alone.

        Args:
            batch: From :func:`without_padding`, on the device.
        """
        tokens, (rows, length) = batch[TOKENS], batch["attention_mask"].shape
        keywords = layer_keywords(batch[SEGMENTS], tokens.device)
        before = [owner._modules[name] for owner, name, _ in self._places]
        try:
            for (owner, name, layer), inner in zip(self._places, before, strict=True):
                is_first, is_last = layer is self.layers[0], layer is self.layers[-1]
                owner._modules[name] = _OfTokens(
                    inner, tokens, (rows, length), keywords, is_first=is_first, is_last=is_last
                )
            with self.again():
                yield
        finally:
            for (owner, name, _), inner in zip(self._places, before, strict=True):
                owner._modules[name] = inner

    def attend_on_cpu(self) -> None:
        """As :meth:`ticktune.patch.segments.Segments.attend_on_cpu`."""
        self._segments.attend_on_cpu()

    def again(self) -> AbstractContextManager[None]:
        """What layers are computed again in, in a backward pass; they get the arguments that they had."""
        return self._segments.again()


class _OfTokens(StandIn):
    """Runs a layer on the tokens of a batch.

    Args:
        layer: What it stands for.
        tokens: From :func:`without_padding`.
        shape: (b, s).
        keywords: What the layer is told of the texts' ends.
        is_first: Whether it gets padded rows, and gathers their tokens.
        is_last: Whether it returns padded rows, zero where there is padding.
    """

    def __init__(
        self,
        layer: nn.Module | None,
        tokens: Tensor,
        shape: tuple[int, int],
        keywords: dict[str, Any],
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        assert layer is not None
        super().__init__(layer)
        self._tokens = tokens
        self._shape = shape
        self._keywords = keywords
        self._is_first = is_first
        self._is_last = is_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result of ``(1, n, h)``, or of ``(b, s, h)`` where it is the first one.

        Returns:
            ``(1, n, h)``, or ``(b, s, h)`` where it is the last one, as the layer returns its states.
        """
        named = kwargs
        states, *others = args or (named.pop("hidden_states"),)
        if self._is_first:
            states = self._gathered(states)
        others, named = self._gathered(others), self._gathered(named)
        found = self._layer[0](states, *others, **named, **self._keywords)
        if not self._is_last:
            return found
        if isinstance(found, tuple):
            return self._put_back(found[0]), *found[1:]
        return self._put_back(found)

    def _gathered(self, value: Any) -> Any:
        """What there is one of for each position, of the tokens alone; everything else as it is."""
        if isinstance(value, dict):
            return {name: self._gathered(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._gathered(each) for each in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != self._shape[1]:
            return value
        if value.shape[0] == self._shape[0]:
            return value.flatten(0, 1).index_select(0, self._tokens)[None]
        if value.shape[0] == 1:  # the same for all rows
            return value.index_select(1, self._tokens % self._shape[1])
        return value

    def _put_back(self, states: Tensor) -> Tensor:
        rows, length = self._shape
        padded = states.new_zeros(rows * length, *states.shape[2:]).index_copy(0, self._tokens, states[0])
        return padded.view(rows, length, *states.shape[2:])
