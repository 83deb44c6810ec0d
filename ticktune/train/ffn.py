"""In which form a run computes its ticks: the wide form is proved on the run's own model, and timed where asked."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ticktune.device import Compute
from ticktune.patch.wide import Wide
from ticktune.tasks.task import Batch, Task
from ticktune.train.head_loss import plain_loss
from ticktune.train.same_loss import loss_obstacle

_ROUNDS, _LEAST_ROUNDS, _SECONDS = 9, 3, 10.0
_WORTH = 0.98  # of the split form's time: less to win is noise, and the split form has the base's bits


def wide_obstacle(model: nn.Module, wide: Wide, task: Task, batch: Batch, compute: Compute) -> str | None:
    """Why a model cannot compute its ticks in wide form; None: the loss of a batch is that of the split form.

    The model's training mode is restored.

    Args:
        model: With ticks.
        wide: The wide form of its ticks.
        task: Gives forward and loss.
        batch: A few rows, on the device.
        compute: Device and precision.
    """
    loss_of = plain_loss(task)

    def widened() -> Tensor:
        with wide.running():
            return loss_of(model, batch)

    return loss_obstacle(model, compute, "wider blocks", lambda: loss_of(model, batch), widened)


@dataclass(frozen=True)
class Trial:
    """How long the two forms took for the same micro-batch, forwards and backwards.

    Args:
        split: Seconds in split form, the median.
        wide: Seconds in wide form.
        ratio: Median of wide / split, round by round.
        faster: Rounds in which the wide form was faster.
        rounds: How often each ran.
    """

    split: float
    wide: float
    ratio: float
    faster: int
    rounds: int

    @property
    def choice(self) -> str:
        """``wide`` where it saves 2 % or more, and is faster in five of six rounds; else ``split``."""
        return "wide" if self.ratio <= _WORTH and 6 * self.faster >= 5 * self.rounds else "split"


def timed(split: Callable[[], None], wide: Callable[[], None], device: torch.device) -> Trial:
    """Runs the two in turns, so that what else the machine does falls on both.

    Args:
        split: Computes a micro-batch in split form.
        wide: Computes the same in wide form.
        device: Where they run.

    Returns:
        What was found in nine rounds, or in ten seconds if those are at least three rounds.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for run in (split, wide):
        run()
    begun = time.perf_counter()
    for number in range(_ROUNDS):
        for which in (0, 1) if number % 2 else (1, 0):
            started = _now(device)
            (split, wide)[which]()
            taken[which].append(_now(device) - started)
        if len(taken[0]) >= _LEAST_ROUNDS and time.perf_counter() - begun > _SECONDS:
            break
    ratios = [mine / plain for plain, mine in zip(*taken, strict=True)]
    medians = statistics.median(taken[0]), statistics.median(taken[1]), statistics.median(ratios)
    return Trial(*medians, faster=sum(ratio < 1 for ratio in ratios), rounds=len(ratios))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
