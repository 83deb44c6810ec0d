"""Row order as a pure function of (seed, epoch); batches of about equal length, of so many rows or tokens."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CHUNK_BATCHES = 50


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int | None,
    *,
    seed: int,
    epoch: int,
    tokens: int | None = None,
    packed: bool = False,
) -> list[list[int]]:
    """Returns the batches of one epoch as lists of example numbers.

    The examples are shuffled; within chunks of 50 batches they are sorted by length, cut into batches, and
    the batches shuffled: little padding, and still a fresh order in every epoch. Every example appears once;
    where the numbers do not divide, one batch is smaller (with ``tokens``, one of each chunk).

    Args:
        lengths: Length of each example in tokens.
        batch_size: Examples in a batch; None: as many as ``tokens`` hold.
        seed: The run's seed.
        epoch: From 0.
        tokens: The most tokens in a batch, padding among them; a longer example is a batch of its own.
        packed: Whether examples share rows: they are not sorted then, and ``tokens`` are theirs alone.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    sizes = np.asarray(lengths)
    if batch_size is not None:
        rows = batch_size
    else:
        assert tokens is not None
        rows = max(1, int(tokens / max(1.0, sizes.mean())))
    batches: list[list[int]] = []
    chunk = rows * _CHUNK_BATCHES
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        if not packed:
            part = part[np.argsort(sizes[part], kind="stable")]
        if batch_size is not None:
            cut = [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
        else:
            cut = _filled(part, sizes[part], int(tokens or 0), packed)
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def _filled(
    numbers: "np.ndarray[Any, Any]", sizes: "np.ndarray[Any, Any]", tokens: int, packed: bool
) -> list[list[int]]:
    """Cuts examples into batches of at most so many tokens; if they are not packed, each is as long as the last."""
    batches: list[list[int]] = []
    total = 0
    for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
        total = total + size if packed else (len(batches[-1]) + 1 if batches else 1) * size
        if not batches or total > tokens:
            batches.append([])
            total = size
        batches[-1].append(number)
    return batches


def packed_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divides examples among as few rows as first fit, longest first, finds.

    Args:
        lengths: Length of each example in tokens.
        capacity: The most tokens in a row; a longer example has a row of its own.

    Returns:
        For each row the places of its examples in ``lengths``.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, room in enumerate(left) if room >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(capacity)
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows


@dataclass
class Epochs:
    """The batches of every epoch, and in which epoch a step is.

    Args:
        lengths: Length of each example in tokens.
        batch_size: Examples in a batch, or None.
        tokens: The most tokens in a batch, or None.
        seed: The run's seed.
        packed: Whether examples share rows.
    """

    lengths: Sequence[int]
    batch_size: int | None
    tokens: int | None
    seed: int
    packed: bool = False
    _ends: list[int] = field(default_factory=list)

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, from 0; see :func:`epoch_batches`."""
        return epoch_batches(
            self.lengths, self.batch_size, seed=self.seed, epoch=epoch, tokens=self.tokens, packed=self.packed
        )

    def end(self, epoch: int) -> int:
        """How many steps are done after an epoch; with ``tokens`` epochs differ by a few."""
        if self.batch_size is not None:
            return (epoch + 1) * -(-len(self.lengths) // self.batch_size)
        while len(self._ends) <= epoch:
            self._ends.append(len(self.batches(len(self._ends))) + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch]

    def find(self, step: int) -> tuple[int, int]:
        """The epoch that comes after so many steps, and the steps that were done when it began."""
        if self.batch_size is not None:
            per_epoch = self.end(0)
            return step // per_epoch, step // per_epoch * per_epoch
        while self.end(max(0, len(self._ends) - 1)) <= step:
            self.end(len(self._ends))
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, self._ends[epoch - 1] if epoch else 0


def micro_batches(batch: Sequence[int], size: int) -> list[list[int]]:
    """Cuts a batch into parts of at most ``size``."""
    return [list(batch[i : i + size]) for i in range(0, len(batch), size)]


def sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yields batches for evaluation, longest first, so that a lack of memory shows at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def split_rows(count: int, fraction: float, *, seed: int, name: str) -> tuple[list[int], list[int]]:
    """Splits row numbers into (rest, chosen), a pure function of the arguments.

    Args:
        count: Number of rows.
        fraction: Share to choose; at least one row, and at least one is left.
        seed: The run's seed.
        name: Name of the split, so that validation and test differ.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    size = min(max(1, round(count * fraction)), count - 1)
    order = rng.permutation(count)
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())
