"""Predictions of rows, and scores: metrics(predictions)."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ticktune.data.batches import sorted_batches
from ticktune.data.encode import Encoded
from ticktune.device import Compute
from ticktune.tasks.task import Batch, Task, update_tokens
from ticktune.train.head_loss import Head, ends_of, find_head, logits_in_parts


def score(
    model: nn.Module,
    task: Task,
    examples: Encoded,
    compute: Compute,
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
    *,
    fast: bool = True,
) -> dict[str, float]:
    """Computes a task's metrics over all examples, each exactly once.

    The model's training mode is restored, and no random number is drawn. Logits of all positions are made only where
    the metrics need them, or the model's head is not proved.

    Args:
        model: With or without ticks.
        task: Gives forward and metrics.
        examples: Of rows with answers.
        compute: Device and precision.
        batch_size: Examples in a forward pass.
        poll: Called before each batch, so that a signal is noticed.
        fast: Whether tokens are scored without the logits of all positions.

    Returns:
        Metric name -> value; a metric that is not defined on these rows is NaN.
    """
    metrics = task.metrics().to(compute.device)
    with _frozen(model):
        head = _proved_head(model, task, examples, compute) if fast and task.scores_tokens else None
        for numbers in sorted_batches(examples.lengths, batch_size):
            poll()
            batch = compute.put(task.collate(examples.take(numbers)))
            if head is None:
                with compute.autocast():
                    outputs = task.forward(model, batch)
                task.update(metrics, task.logits(outputs), batch)
            else:
                with compute.autocast():
                    for logits, targets in logits_in_parts(model, task, batch, head):
                        update_tokens(metrics, logits, targets)
            with compute.autocast():
                task.update_by_generation(metrics, model, batch)
    return compute_metrics(metrics)


def _proved_head(model: nn.Module, task: Task, examples: Encoded, compute: Compute) -> Head | None:
    shortest = min(range(len(examples)), key=examples.lengths.__getitem__)
    batch = compute.put(task.collate(ends_of(examples.take([shortest]))))
    head = find_head(model, task, batch, compute, for_training=False)
    return head if isinstance(head, Head) else None


def compute_metrics(metrics: Any) -> dict[str, float]:
    """Computes a task's metrics; seven digits are kept, which is what float32 holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns where a class is absent
        values = {
            name: metric.compute() if getattr(metric, "update_called", True) else math.nan
            for name, metric in metrics.items()
        }
    return {name: float(f"{float(value):.7g}") for name, value in values.items()}


def predict(
    model: nn.Module, task: Task, examples: Encoded, compute: Compute, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields one prediction for each row, in their order.

    Args as :func:`score`; the rows need no answers.
    """
    answers: dict[int, dict[str, Any]] = {}
    rows: dict[int, list[int]] = {}
    for number, row in enumerate(examples.dataset["row"]):
        rows.setdefault(row, []).append(number)
    with _frozen(model):
        for numbers in sorted_batches(examples.lengths, batch_size):
            batch = compute.put(task.collate(examples.take(numbers)))
            with compute.autocast():
                found = task.predict(model, batch)
            answers |= dict(zip(numbers, found, strict=True))
    for row in sorted(rows):
        yield task.join([answers[number] for number in rows[row]])


def logits_of(model: nn.Module, task: Task, batches: list[Batch], compute: Compute) -> list[torch.Tensor]:
    """Returns the logits of each batch, float32 or wider, on the CPU."""
    with _frozen(model):
        return [task.logits(task.forward(model, compute.put(batch))).cpu() for batch in batches]


def is_better(value: float, than: float | None, more_is_better: bool) -> bool:
    """Whether a score is strictly better; NaN never is."""
    if math.isnan(value):
        return False
    return than is None or (value > than if more_is_better else value < than)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
