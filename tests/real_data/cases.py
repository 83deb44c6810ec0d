"""Each task's recipe made small: what it starts from, on which rows, for how long, and how an answer is scored.

The tests run a case by the command line, and ``benchmarks/tasks.py`` compares ways of fine-tuning on it. Learning rates
were chosen on validation rows, those of the head alone too: a head that learns badly is no measure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"
Answers = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One of the recipes, made small.

    Args:
        recipe: The recipe.
        words: What is changed for every way of fine-tuning: base, rows, steps.
        rates: Learning rates of ticks, norms and head.
        head_rates: Learning rates where the head alone is trained; None: the base's own head is part of it, and the
            base as it is stands for it.
        rows: File of test rows.
        scores: One number for each test row from the predictions of all, more is better.
    """

    recipe: Path
    words: list[str]
    rates: str
    head_rates: str | None
    rows: Path
    scores: Callable[[Answers], list[float]]

    @property
    def ours(self) -> list[str]:
        """Words of the run of ticks and norms."""
        return [*self.words, self.rates, "output=ours"]

    @property
    def alone(self) -> list[str]:
        """Words of the run of the head alone."""
        assert self.head_rates is not None
        return [*self.words, self.head_rates, "ticks.dim=0", "norms.train=none", "output=head"]
