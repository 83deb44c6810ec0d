"""Whether one model is better than another on the same rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 10_000
Array = np.ndarray[Any, Any]


def mean(means: Array) -> Array:
    """The mean of scores, one a row."""
    return means[..., 0]


def interval(
    first: Sequence[Any], second: Sequence[Any], measure: Callable[[Array], Array] = mean
) -> tuple[float, float, float]:
    """How much better the second model is, and the paired bootstrap 95 % interval of that.

    Args:
        first: Of each row its score, or several numbers, such as hits and misses.
        second: The other model's, on the same rows.
        measure: The rows' mean numbers, (..., numbers), to what is compared, (...,); of scores, their mean.
    """
    scores = [np.asarray(rows, dtype=float).reshape(len(rows), -1) for rows in (first, second)]
    count = len(first)
    drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    shares = np.stack([np.bincount(rows, minlength=count) for rows in drawn]) / count
    low, high = np.percentile(measure(shares @ scores[1]) - measure(shares @ scores[0]), [2.5, 97.5])
    return float(measure(scores[1].mean(0)) - measure(scores[0].mean(0))), float(low), float(high)
