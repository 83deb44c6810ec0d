"""What a task is: the one protocol between rows, model, loss, metrics and predictions."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ticktune.registry import TASKS

Row = dict[str, Any]
Example = dict[str, Any]
Batch = dict[str, Any]

IGNORED = -100
"""Label of a position that carries no loss, as torch's cross entropy has it."""


@dataclass(frozen=True)
class TaskOptions:
    """What a recipe says to its task.

    Args:
        columns: Names of the task's columns that the rows have.
        max_length: Longest example, in tokens.
        problem: ``auto``, ``single``, ``multi`` or ``regression``.
        max_new_tokens: Longest generated continuation, in tokens.
        num_beams: Beams of generation; 1 = greedy.
    """

    columns: tuple[str, ...]
    max_length: int
    problem: str = "auto"
    max_new_tokens: int = 128
    num_beams: int = 1


@dataclass
class EncodingReport:
    """What happened to the rows on their way to examples.

    Args:
        truncated: Places of rows that were cut to max_length.
        unsupervised: Places of rows without anything to learn from; they give no example.
        cut_ends: How many of the truncated rows lost the end that must be learned.
    """

    truncated: list[int] = field(default_factory=list)
    unsupervised: list[int] = field(default_factory=list)
    cut_ends: int = 0


class Task(Protocol):
    """A configured task. Examples are plain lists and numbers; batches hold tensors.

    Every example has the key ``row``, the number of the row that it comes from, and ``length``, its size in
    tokens, by which batches are sorted.
    """

    name: str
    auto_class: str
    """Name of the transformers auto class."""
    default_metric: str

    def config(self) -> dict[str, Any]:
        """Entries for the model's config, such as id2label."""

    def state(self) -> dict[str, Any]:
        """What :func:`restore_task` needs, as JSON."""

    def row_of(self, text: str) -> Row:
        """The row, without an answer, that a line of text stands for.

        Raises:
            UsageError: A row of this task is more than one text.
        """

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows that the task cannot use.

        Args:
            rows: Rows with the task's columns.
            where: Gives ``file:line`` of a row's number.

        Raises:
            DataError: Naming the first such row.
        """

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Turns rows into examples.

        Args:
            rows: Rows with the task's columns.
            first: Number of the first row.
            report: Receives what was cut or left out.
            labelled: Whether the rows must have their answers.
        """

    def show(self, example: Example) -> list[tuple[str, str]]:
        """An example for a person: (``context`` or ``learned``, text) in order."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pads examples to a batch."""

    def weight(self, batch: Batch) -> float:
        """How much the batch counts: its rows, or its supervised tokens."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's keyword arguments among the batch's tensors."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model; returns its outputs, which have ``logits``."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss summed over what :meth:`weight` counts, float32 scalar."""

    def counted(self, batch: Batch) -> Tensor | None:
        """Which positions' logits mean something, a mask of their leading dimensions; None: all."""

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted from logits, and how far each decision is from another one.

        Returns:
            Decisions as integers, and for each the smallest change of a logit difference that turns it,
            infinite where nothing is decided; both of the same shape.
        """

    def metrics(self) -> Any:
        """A fresh, empty set of metrics with ``compute()``."""

    def update(self, metrics: Any, outputs: Any, batch: Batch) -> None:
        """Adds a batch to the metrics."""

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """One JSON object for each example of the batch."""


def build_task(
    name: str,
    options: TaskOptions,
    rows: Sequence[Row],
    where: Callable[[int], str],
    tokenizer: Any,
    base_config: Any,
) -> Task:
    """Configures a task from its training rows.

    Args:
        name: Task name.
        options: What the recipe says.
        rows: The training rows, for the labels.
        where: Gives ``file:line`` of a row's number.
        tokenizer: The base's tokenizer.
        base_config: The base's config: its own label map is kept where it fits.

    Raises:
        DataError: The labels do not make a task.
    """
    task: Task = importlib.import_module(TASKS[name].module).build(options, rows, where, tokenizer, base_config)
    return task


def restore_task(name: str, options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> Task:
    """Configures a task as it was when ``state`` was taken."""
    task: Task = importlib.import_module(TASKS[name].module).restore(options, state, tokenizer)
    return task
