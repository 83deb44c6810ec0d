"""What a task is: the one protocol between rows, model, loss, metrics and predictions."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ticktune.errors import DataError, UsageError
from ticktune.recipe.schema import Ratio
from ticktune.registry import TASKS
from ticktune.tasks.batch import IGNORED as IGNORED
from ticktune.tasks.batch import Batch as Batch
from ticktune.tasks.batch import Example as Example
from ticktune.tasks.batch import Row as Row

# Ranges that hold for what an adapter recorded too.
Size = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class TaskOptions:
    """What a recipe says to its task.

    Args:
        columns: Names of the task's columns that the rows have.
        max_length: Longest example, in tokens.
        problem: ``auto``, ``single``, ``multi`` or ``regression``.
        max_new_tokens: Longest generated continuation, in tokens.
        num_beams: Beams of generation; 1 = greedy.
        answer: Pattern whose first group is the answer inside a response; None: responses have none.
        overlap: Tokens that the windows of one long row share.
        threshold: Probability from which on a label of several is predicted.
        class_weights: ``balanced``: each class counts as much as the others in the loss.
        label_smoothing: Share of the target that all classes get.
        augment: Name -> strength of what is random in training; see :class:`ticktune.recipe.schema.Augment`.
        classes: Name of a class -> values in the masks, or categories, that are it; empty: each is a class.
        max_seconds: Longest sound.
        vocabulary: ``base``, or ``rows``: the characters of the training transcripts.
        language: What is spoken, for a model of several languages.
        separator: What stands between the labels of one cell; None: a cell is one label.
    """

    columns: tuple[str, ...]
    max_length: Size
    problem: str = "auto"
    max_new_tokens: Size = 128
    num_beams: Size = 1
    overlap: Size = 64
    answer: str | None = None
    threshold: Ratio = 0.5
    class_weights: str = "none"
    label_smoothing: Ratio = 0.0
    augment: dict[str, float] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    max_seconds: float = 30.0
    vocabulary: str = "base"
    language: str | None = None
    separator: str | None = None


@dataclass
class EncodingReport:
    """What happened to the rows on their way to examples.

    Args:
        truncated: Places of rows that were cut; :meth:`Task.limit` says to what.
        unsupervised: Places of rows without anything to learn from; they give no example.
        cut_ends: How many of the truncated rows lost the end that must be learned.
        ends: Rows whose end token is learned; None: the model writes nothing that could end.
        why: Why rows are unsupervised, where it is not that they were cut.
        items: Items of the rows, where a row is items that the base knows or not.
        unknown: How often each unknown one of them stands there.
    """

    truncated: list[int] = field(default_factory=list)
    unsupervised: list[int] = field(default_factory=list)
    cut_ends: int = 0
    ends: int | None = None
    why: str = ""
    items: int = 0
    unknown: dict[str, int] = field(default_factory=dict)

    def count_end(self, learned: bool) -> None:
        """Notes of one more row whether its end token is learned."""
        self.ends = (self.ends or 0) + learned


class Task(ABC):
    """A configured task: a frozen dataclass with one file of its own.

    Examples are plain lists, numbers and names of files; batches hold tensors. Every example has the key ``row``, the
    number of the row that it comes from, and ``length``, its size in tokens or samples, by which batches are sorted.
    """

    name: str
    auto_class: str
    """Name of the transformers auto class."""
    options: TaskOptions
    cut: ClassVar[str] = "their end"
    """What examples lose that are too long."""
    scores_tokens: ClassVar[bool] = False
    """Whether :meth:`update` is no more than :func:`update_tokens` of the positions that have :meth:`targets`."""

    @property
    @abstractmethod
    def default_metric(self) -> str:
        """The metric that chooses the best checkpoint where the recipe names none."""

    def config(self) -> dict[str, Any]:
        """Entries for the model's config, such as id2label."""
        return {}

    def state(self) -> dict[str, Any]:
        """What :func:`restore_task` needs, as JSON."""
        return {}

    def row_of(self, text: str) -> Row:
        """The row, without an answer, that a line of text stands for.

        Raises:
            UsageError: A row of this task is more than one text.
        """
        columns = ", ".join(self.options.columns)
        raise UsageError(f"a row of {self.name} is no line of text", fix=f"give a file with the columns {columns}")

    def limit(self) -> str:
        """What longer examples are cut to: the recipe's key, its value, and the unit."""
        return f"data.max_length = {self.options.max_length} tokens"

    @abstractmethod
    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows that the task cannot use.

        Args:
            rows: Rows with the task's columns.
            where: Gives ``file:line`` of a row's number.

        Raises:
            DataError: Naming the first such row.
        """

    @abstractmethod
    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Turns rows into examples.

        Args:
            rows: Rows with the task's columns.
            first: Number of the first row.
            report: Receives what was cut or left out.
            labelled: Whether the rows must have their answers.
        """

    @abstractmethod
    def show(self, example: Example) -> list[tuple[str, str]]:
        """An example for a person: (``context`` or ``learned``, text) in order."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Makes a batch: reads files, pads.

        Args:
            examples: Its examples.
            seed: Of what is random in training, such as a flipped image; None: nothing is.
        """

    def pack(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Makes a batch whose rows hold several examples each; only where ``training.packing`` means something.

        Args:
            rows: The examples of each row.

        Raises:
            UsageError: Examples of this task cannot share rows; recipes are refused before.
        """
        raise UsageError(f"examples of {self.name} cannot share rows", where="training.packing", fix="remove it")

    def rows(self, batch: Batch) -> int:
        """The number of examples in a batch."""
        return len(next(iter(batch.values())))

    def weight(self, batch: Batch) -> float:
        """How much the batch counts: its rows, or its supervised tokens."""
        return float(len(next(iter(batch.values()))))

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's keyword arguments among the batch's tensors."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels; returns its outputs by name."""
        return model(**self.inputs(batch))

    def logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """What predictions and metrics are made of, as one tensor: the outputs' ``logits``."""
        return outputs["logits"]

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss summed over what :meth:`weight` counts, float32 scalar."""

    def targets(self, batch: Batch) -> Tensor | None:
        """What a language-model head is to say at each position, where :meth:`loss` is no more than :func:`token_loss`.

        Returns:
            (batch, seq) int64, IGNORED where there is no loss; None: the loss is of another kind.
        """
        return None

    def counted(self, batch: Batch) -> Tensor | None:
        """Which positions' logits mean something, a mask of their leading dimensions; None: all."""
        return None

    @abstractmethod
    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted from logits, and how far each decision is from another one.

        Returns:
            Decisions as integers, and for each the smallest change of a logit difference that turns it,
            infinite where nothing is decided; both of the same shape.
        """

    @abstractmethod
    def metrics(self) -> Any:
        """A fresh, empty set of metrics with ``compute()``."""

    @abstractmethod
    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch to the metrics, by what :meth:`logits` gave for it."""

    def update_by_generation(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds a batch to the metrics of generated text, which need more than one forward pass."""
        return

    def extra_files(self, base_directory: Path) -> dict[str, str]:
        """Further files that a merged folder needs to be of use: name, with / between folders -> text.

        Args:
            base_directory: The base's folder, which may hold such files already.
        """
        return {}

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """One JSON object for each example of the batch."""

    def saved_processor(self, processor: Any) -> Any:
        """What is saved beside merged weights: the base's processor, or one that the task changed."""
        return processor

    def join(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer of a row from those of its examples, where a long row is several."""
        return answers[0]

    def describe(self, answer: dict[str, Any]) -> str:
        """An answer for a person, in one line."""
        return str(answer["text"])

    def draw(self, row: Row, answer: dict[str, Any]) -> Any:
        """An answer as a picture of Pillow's.

        Args:
            row: The row.
            answer: What :meth:`predict` gave for it.

        Raises:
            UsageError: Answers of this task cannot be drawn.
        """
        raise UsageError(f"answers of {self.name} cannot be drawn", where="--draw", fix="leave it out")

    def mask(self, answer: dict[str, Any]) -> Any:
        """An answer as a mask such as those of training, a picture of Pillow's; None: answers are no masks."""
        return None

    def draw_example(self, example: Example, *, seed: int) -> Any:
        """An example as a model in training sees it, with its answer, as a picture of Pillow's.

        Args:
            example: It has its answer.
            seed: Of what is random in training.

        Raises:
            UsageError: Examples of this task cannot be drawn.
        """
        raise UsageError(f"examples of {self.name} cannot be drawn", where="--draw", fix="leave it out")


def best_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class with the largest logit along the last dimension, and its distance from the second."""
    best = logits.topk(2, dim=-1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]


def token_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy in float32, summed over the tokens that are not IGNORED.

    Args:
        logits: (batch, seq, vocabulary).
        labels: (batch, seq) int64.
        smoothing: Share of the target that all tokens get.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )


def update_tokens(metrics: Any, logits: Tensor, targets: Tensor) -> None:
    """Adds tokens to perplexity, token_accuracy and loss.

    Args:
        metrics: Of torchmetrics, by these names.
        logits: (tokens, vocabulary).
        targets: (tokens,) int64, none of them IGNORED.
    """
    count = len(targets)
    if count == 0:
        return
    logits = logits.float()
    metrics["loss"].update(F.cross_entropy(logits, targets, reduction="sum") / count, weight=count)
    metrics["perplexity"].update(logits[None], targets[None])
    metrics["token_accuracy"].update((logits.argmax(-1) == targets).float().mean(), weight=count)


def room(model: nn.Module, asked: int, used: int) -> int:
    """How many tokens a model may write: what is asked for, and no more than it has positions left.

    Args:
        model: Its config says how many positions it has, if it is limited.
        asked: New tokens wanted.
        used: Positions that are taken already.

    Raises:
        DataError: None is left.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return asked
    if used >= positions:
        raise DataError(
            f"a prompt of {used} tokens takes all of the model's {positions} positions, so that nothing can be written",
            fix="lower data.max_length",
        )
    return min(asked, positions - used)


def build_task(
    name: str,
    options: TaskOptions,
    rows: Sequence[Row],
    where: Callable[[int], str],
    processor: Any,
    base_config: Any,
) -> Task:
    """Configures a task from its training rows.

    Args:
        name: Task name.
        options: What the recipe says.
        rows: The training rows, for the labels.
        where: Gives ``file:line`` of a row's number.
        processor: The base's tokenizer, image processor or feature extractor.
        base_config: The base's config: its own label map is kept where it fits.

    Raises:
        DataError: The labels do not make a task.
    """
    task: Task = importlib.import_module(TASKS[name].module).build(options, rows, where, processor, base_config)
    return task


def restore_task(name: str, options: TaskOptions, state: dict[str, Any], processor: Any) -> Task:
    """Configures a task as it was when ``state`` was taken."""
    task: Task = importlib.import_module(TASKS[name].module).restore(options, state, processor)
    return task
