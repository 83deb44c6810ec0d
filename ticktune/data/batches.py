"""Row order as a pure function of (seed, epoch); batches of about equal length, of so many rows or tokens."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

_CHUNK_BATCHES = 50
_LOOKED_AT = 200_000  # examples: packing them takes a second or less

_Numbers = np.ndarray[Any, Any]


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
    rng, sizes = np.random.default_rng([seed, epoch]), np.asarray(lengths)
    order, chunk = _order(rng, sizes, batch_size, tokens, packed)
    if batch_size is not None:
        starts = np.arange(0, len(order), batch_size)
    else:
        starts = _starts(sizes[order], chunk, int(tokens or 0), packed)
    # Chunks begin where batches do.
    firsts = np.searchsorted(starts, np.arange(0, len(order) + chunk, chunk)).tolist()
    places = [first + i for first, end in pairwise(firsts) for i in rng.permutation(end - first).tolist()]
    numbers, bounds = order.tolist(), [*starts.tolist(), len(order)]
    return [numbers[bounds[place] : bounds[place + 1]] for place in places]


def count_batches(lengths: Sequence[int], *, seed: int, epoch: int, tokens: int, packed: bool = False) -> int:
    """How many batches :func:`epoch_batches` makes of so many tokens, without making them."""
    rng, sizes = np.random.default_rng([seed, epoch]), np.asarray(lengths)
    order, chunk = _order(rng, sizes, None, tokens, packed)
    return len(_starts(sizes[order], chunk, tokens, packed))


def _order(
    rng: np.random.Generator, sizes: _Numbers, batch_size: int | None, tokens: int | None, packed: bool
) -> tuple[_Numbers, int]:
    """The examples shuffled, and, if they are not packed, sorted within chunks; and a chunk's length."""
    rows = batch_size
    if rows is None:
        assert tokens is not None
        rows = max(1, int(tokens / max(1.0, sizes.mean())))
    order, chunk = rng.permutation(len(sizes)), rows * _CHUNK_BATCHES
    if not packed:
        whole = len(order) // chunk * chunk
        for part in (order[:whole].reshape(-1, chunk), order[whole:].reshape(1, -1)):
            part[:] = np.take_along_axis(part, np.argsort(sizes[part], axis=1, kind="stable"), axis=1)
    return order, chunk


def _starts(sizes: _Numbers, chunk: int, tokens: int, packed: bool) -> _Numbers:
    """Where batches of at most so many tokens begin; each is filled before the next one is begun.

    All chunks are cut side by side, as a loop over the examples takes a second for a million of them.

    Args:
        sizes: Of the examples in order, rising within chunks if they are not packed.
        chunk: Examples in a chunk; no batch reaches over its end.
        tokens: The most tokens in a batch, but for one longer example.
        packed: Whether a batch holds the sum of its sizes, and not the largest size as often as it has examples.
    """
    sums = np.concatenate([[0], np.cumsum(sizes)])
    here = np.arange(0, len(sizes), chunk)
    ends = np.minimum(here + chunk, len(sizes))
    found: list[_Numbers] = []
    while len(here):
        found.append(here)
        if packed:
            after = np.clip(np.searchsorted(sums, sums[here] + tokens, side="right") - 1, here + 1, ends)
        else:
            # The first example with which the batch is too large, which it is with all behind it too.
            after, high = here + 1, ends
            while (open_ := after < high).any():
                middle = (after + high) // 2
                fits = (middle - here + 1) * sizes[np.minimum(middle, len(sizes) - 1)] <= tokens
                after, high = np.where(open_ & fits, middle + 1, after), np.where(open_ & ~fits, middle, high)
        goes_on = after < ends
        here, ends = after[goes_on], ends[goes_on]
    return np.sort(np.concatenate(found))


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
        poll: Called before the batches of an epoch are counted, so that a signal is noticed.
    """

    lengths: Sequence[int]
    batch_size: int | None
    tokens: int | None
    seed: int
    packed: bool = False
    poll: Callable[[], None] = lambda: None
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
            self.poll()
            assert self.tokens is not None
            count = count_batches(
                self.lengths, seed=self.seed, epoch=len(self._ends), tokens=self.tokens, packed=self.packed
            )
            self._ends.append(count + (self._ends[-1] if self._ends else 0))
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


def largest_padded(lengths: Sequence[int], size: int, tokens: int | None = None) -> list[list[int]]:
    """The micro-batches that no other one exceeds, in whatever order the examples come.

    Args:
        lengths: Length of each example in tokens.
        size: The most examples in a micro-batch.
        tokens: The most tokens in a batch, padding among them, or None; a longer example is a batch of its own.

    Returns:
        That with the most pairs of tokens in a row, and, where it is another one, that with the most tokens: memory
        grows with both. Without ``tokens`` the longest examples are both.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    sizes = np.maximum(np.asarray(lengths)[order], 1)
    counts = np.minimum(size, np.arange(len(order), 0, -1))
    if tokens is not None:
        counts = np.minimum(counts, np.maximum(1, tokens // sizes))
    places = dict.fromkeys(int(np.argmax(counts * weight)) for weight in (sizes * sizes, sizes))
    return [order[place : place + counts[place]].tolist() for place in places]


def largest_packed(
    epochs: Epochs, steps: int, size: int, capacity: int, poll: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """As :func:`largest_padded`, of packed examples: how full rows are depends on which examples meet.

    Args:
        epochs: The batches of a run.
        steps: How many of them there are. Those of the first 200,000 examples or so are looked at.
        size: The most examples in a micro-batch.
        capacity: The most tokens in a row.
        poll: Called before each batch, so that a signal is noticed.
    """
    best: dict[int, tuple[int, list[int]]] = {}
    step = epoch = seen = 0
    while step < steps and seen < _LOOKED_AT:
        for batch in epochs.batches(epoch)[: steps - step]:
            if seen >= _LOOKED_AT:
                break
            poll()
            for part in micro_batches(batch, size):
                sizes = [epochs.lengths[number] for number in part]
                rows = packed_rows(sizes, capacity)
                longest = max(sum(sizes[place] for place in row) for row in rows)
                for power in (2, 1):
                    best[power] = max(best.get(power, (0, part)), (len(rows) * longest**power, part), key=itemgetter(0))
            step, seen = step + 1, seen + len(batch)
        epoch += 1
    return [list(part) for part in dict.fromkeys(tuple(part) for _, part in best.values())]


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
