"""The frozen layers below all that train are computed once for each example, and never again.

Their result is kept for each example at its own length. Batches of the cache are those of an evaluation, longest
first, whatever the order of training: so the same run has the same states, also when it is stopped and goes on. That
the rest of the model gives the same from them is tried before anything is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ticktune.data.batches import sorted_batches
from ticktune.data.encode import Encoded
from ticktune.data.states import States
from ticktune.device import Compute
from ticktune.errors import PatchError, first_line
from ticktune.patch.attach import set_training
from ticktune.patch.standins import Prefix, find_prefix
from ticktune.tasks.task import Batch, Task

NUMBERS = "numbers"
"""Key of a batch under which the numbers of its examples stand."""

_PROBE = 8  # rows that the proof looks at
_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Relative difference that rounding may make; it is _ROUGH in half precision."""
_ROUGH = 2e-2


class PrefixCache:
    """Hidden states at the end of the frozen prefix, by example.

    Args:
        model: With ticks.
        task: Gives batches and forward.
        examples: The training examples.
        compute: Device and precision.
        base_dropout: Whether the base's own dropout acts in training.

    Raises:
        PatchError: There is no frozen prefix, or its result is not the same whenever a row is seen.
    """

    def __init__(
        self, model: nn.Module, task: Task, examples: Encoded, compute: Compute, *, base_dropout: bool
    ) -> None:
        self.model, self.task, self.examples, self.compute = model, task, examples, compute
        self.base_dropout = base_dropout
        self.prefix: Prefix = find_prefix(model)
        refuse_dropout(self.prefix, base_dropout=base_dropout)
        self._states: States | None = None
        self._prove()

    def fill(self, kind: Literal["memory", "disk"], batch_size: int, poll: Callable[[], None] = lambda: None) -> None:
        """Computes the states of all examples.

        Args:
            kind: Where they are kept.
            batch_size: Examples in a forward pass.
            poll: Called before each batch, so that a signal is noticed.

        Raises:
            ResourceError: They need more room than there is.
        """
        states: States | None = None
        set_training(self.model, True, base_dropout=self.base_dropout)
        for numbers in sorted_batches(self.examples.lengths, batch_size):
            poll()
            found, rows = self._compute(self._batch(numbers))
            if states is None:
                states = States(kind, self._size(numbers, rows))
            states.add(numbers, rows)
        assert states is not None
        states.seal()
        self._states = states

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Within it the model begins its forward pass of a training batch behind the prefix.

        Args:
            batch: With the numbers of its examples under :data:`NUMBERS`.
        """
        assert self._states is not None, "the cache is empty"
        states = pad_sequence(self._states.take(batch[NUMBERS]), batch_first=True).to(self.compute.device)
        with self.prefix.replaced(states):
            yield

    def _batch(self, numbers: list[int], seed: int = 0) -> Batch:
        return self.compute.put(self.task.collate(self.examples.take(numbers), seed=seed))

    def _run(self, batch: Batch, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        with self.compute.autocast():
            return self.prefix.states(lambda: self.task.forward(self.model, batch))

    def _compute(self, batch: Batch, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The states of a batch, and those of each row at its own length."""
        with torch.no_grad(), self._own_random():
            states = self._run(batch, seed)
        if states.ndim != 3:
            raise PatchError(f"its hidden states have {states.ndim} dimensions, expected (batch, seq, hidden)")
        mask = self.task.inputs(batch).get("attention_mask")
        if mask is None:
            return states, list(states)
        if mask.shape != states.shape[:2]:
            raise PatchError(f"its hidden states are {states.shape[1]} in a row, and its mask {mask.shape[-1]}")
        lengths = mask.sum(1)
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
            raise PatchError("its rows are not padded on the right")
        return states, [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]

    def _own_random(self) -> AbstractContextManager[Any]:
        return torch.random.fork_rng([self.compute.device] if self.compute.device.type == "cuda" else [])

    def _size(self, numbers: list[int], rows: list[Tensor]) -> int:
        """Bytes that the states of all examples take, from those of some."""
        lengths = self.examples.lengths
        by_length = [len(row) for row in rows] == [lengths[number] for number in numbers]
        tokens = sum(lengths) if by_length else len(lengths) * max(map(len, rows))
        return tokens * rows[0].shape[1] * rows[0].element_size()

    def _prove(self) -> None:
        """Tries on a few rows of all lengths that what is kept is all that the rest of the model needs."""
        order = sorted(range(len(self.examples)), key=lambda number: self.examples.lengths[number])
        numbers = [order[i * (len(order) - 1) // (_PROBE - 1)] for i in range(_PROBE)]
        numbers = list(dict.fromkeys(numbers))
        batch, again = self._batch(numbers, seed=1), self._batch(numbers, seed=2)
        other = self.task.inputs(again)
        if any(not torch.equal(value, other[name]) for name, value in self.task.inputs(batch).items()):
            raise PatchError("the inputs of a row are drawn anew in each step")
        set_training(self.model, True, base_dropout=self.base_dropout)
        states, rows = self._compute(batch, seed=1)
        if len(states) != len(numbers):
            raise PatchError(f"{len(numbers)} rows have {len(states)} rows of hidden states")
        if not torch.equal(states, self._compute(batch, seed=2)[0]):
            raise _dropout_acts()
        with self._own_random():
            if self._run(batch).requires_grad:
                raise PatchError("a trained tensor lies below the lowest trained layer")
        is_exact = self.compute.precision == "fp32"
        tolerance = _CLOSE.get(states.dtype, _ROUGH) if is_exact else _ROUGH
        [alone] = self._compute(self._batch(numbers[:1], seed=1))[1]
        if alone.shape != rows[0].shape or float((alone - rows[0]).abs().max()) > tolerance * float(alone.abs().max()):
            raise PatchError("the hidden states of a row depend on the other rows of its batch")
        plain = self._loss(batch)
        try:
            with self.prefix.replaced(pad_sequence(rows, batch_first=True)):
                served = self._loss(batch)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:  # its own
            raise PatchError(f"behind its frozen layers it does not run: {first_line(error)}") from error
        if not abs(served - plain) <= tolerance * abs(plain):
            raise PatchError(f"behind its frozen layers it computes a loss of {served}, and with them {plain}")

    def _loss(self, batch: Batch) -> float:
        with torch.no_grad(), self._own_random(), self.compute.autocast():
            torch.manual_seed(0)
            return float(self.task.loss(self.task.forward(self.model, batch), batch))


def refuse_dropout(prefix: Prefix, *, base_dropout: bool) -> None:
    """Refuses frozen layers whose dropout modules act in training; what acts without a module, the proof finds.

    Raises:
        PatchError: They do.
    """
    modules = [module for layer in prefix.layers for module in layer.modules()]
    if base_dropout and any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules):
        raise _dropout_acts()


def _dropout_acts() -> PatchError:
    return PatchError("the base's own dropout acts in its frozen layers", fix="set base.dropout: off")
