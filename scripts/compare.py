"""Accuracies of runs on the same rows, with 95 % intervals, and of the difference between the first two.

    python scripts/compare.py ROWS.jsonl LABEL_COLUMN "first name"=RUN "second name"=RUN

Wilson intervals for each accuracy; for the difference a paired bootstrap over the rows (10,000 draws, seed 0).
"""

import json
import math
import subprocess
import sys

import numpy as np


def hits(run: str, rows: str, column: str) -> "np.ndarray":
    """1 for each row that the run predicts rightly, else 0."""
    with open(rows, encoding="utf-8") as file:
        labels = [str(json.loads(line)[column]) for line in file if line.strip()]
    done = subprocess.run(["ticktune", "--json", "predict", run, rows], capture_output=True, text=True, check=True)
    predicted = [json.loads(line)["label"] for line in done.stdout.splitlines()]
    return np.array([a == b for a, b in zip(labels, predicted, strict=True)], dtype=float)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z = 1.959964
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return center - half, center + half


def main() -> None:
    """Prints one line for each run and one for the difference."""
    rows, column, *named = sys.argv[1:]
    results = {}
    for entry in named:
        name, _, run = entry.partition("=")
        results[name] = hits(run, rows, column)
        share, count = results[name].mean(), len(results[name])
        low, high = wilson(share, count)
        print(f"{name:16s} accuracy {share:.3f}  95 % interval {low:.3f} to {high:.3f}  ({count} rows)")
    first, second = list(results.values())[:2]
    draws = np.random.default_rng(0).integers(0, len(first), (10_000, len(first)))
    low, high = np.percentile((second - first)[draws].mean(axis=1), [2.5, 97.5])
    mean = (second - first).mean()
    print(f"{'difference':16s}         {mean:+.3f}  95 % interval {low:+.3f} to {high:+.3f}  (paired bootstrap)")


if __name__ == "__main__":
    main()
