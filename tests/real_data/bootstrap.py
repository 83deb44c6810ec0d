"""Whether one model is better than another on the same rows."""

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """How much better the second is: mean difference of the rows' scores, and its paired bootstrap 95 % interval.

    Args:
        first: Score of each row.
        second: The other model's, on the same rows.
    """
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(difference), (DRAWS, len(difference)))
    low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
