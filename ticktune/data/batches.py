"""Row order as a pure function of (seed, epoch); batches of about equal length."""

from collections.abc import Iterator, Sequence

import numpy as np

_CHUNK_BATCHES = 50


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Returns the batches of one epoch as lists of example numbers.

    The examples are shuffled; within chunks of 50 batches they are sorted by length, cut into batches, and
    the batches shuffled: little padding, and still a fresh order in every epoch. Every example appears once;
    where the numbers do not divide, one batch is smaller.

    Args:
        lengths: Length of each example in tokens.
        batch_size: Examples in a batch.
        seed: The run's seed.
        epoch: From 0.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    sizes = np.asarray(lengths)
    batches: list[list[int]] = []
    chunk = batch_size * _CHUNK_BATCHES
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(sizes[part], kind="stable")]
        cut = [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


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
