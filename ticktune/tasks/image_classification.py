"""Image classification: one label for each picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ticktune.tasks.classes import (
    check_known,
    class_answers,
    class_loss,
    class_metrics,
    describe_class,
    label_config,
    label_name,
    read_classes,
    update_classes,
)
from ticktune.tasks.pictures import (
    Change,
    check_pictures,
    class_color,
    enlarged,
    legend_below,
    pixel_values,
    read_picture,
    seen_picture,
)
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of

_TOP = 5


@dataclass(frozen=True)
class ImageClassification(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        labels: Names of the classes in the order of the logits.
        weights: Weight of each class in the loss; None: all 1.
        processor: The base's image processor.
    """

    options: TaskOptions
    labels: tuple[str, ...]
    weights: tuple[float, ...] | None
    processor: Any
    name: str = "image-classification"
    auto_class: str = "AutoModelForImageClassification"
    default_metric: str = "accuracy"

    def config(self) -> dict[str, Any]:
        """The label map."""
        return {**label_config(self.labels), "problem_type": "single_label_classification"}

    def state(self) -> dict[str, Any]:
        """Labels and their weights."""
        return {"labels": list(self.labels), "weights": None if self.weights is None else list(self.weights)}

    def row_of(self, text: str) -> Row:
        """A picture's path."""
        return {"image": text.strip()}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses files that are no pictures, and labels that the training rows lack."""
        check_known([label_name(row["label"]) for row in rows], self.labels, where)
        check_pictures([row["image"] for row in rows], where)

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes path and label; pictures are read batch by batch."""
        examples: list[Example] = []
        for i, row in enumerate(rows):
            example: Example = {"row": first + i, "length": 1, "image": row["image"]}
            if labelled:
                example["target"] = self.labels.index(label_name(row["label"]))
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The picture's path, its size, and the label."""
        width, height = read_picture(example["image"]).size
        return [
            ("context", f"{example['image']} ({width} x {height})"),
            ("learned", self.labels[example["target"]]),
        ]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pixel values (batch, channels, height, width) float32, and target (batch,) int64."""
        images = [read_picture(e["image"]) for e in examples]
        changes = [Change(self.options.augment, seed, e["row"], i.size) for e, i in zip(examples, images, strict=True)]
        changed = [change.picture(image) for change, image in zip(changes, images, strict=True)]
        batch: Batch = {"pixel_values": pixel_values(self.processor, changed)}
        if "target" in examples[0]:
            batch["target"] = torch.tensor([e["target"] for e in examples])
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Pixel values."""
        return {"pixel_values": batch["pixel_values"]}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over rows."""
        return class_loss(outputs.logits, batch["target"], self.weights, self.options.label_smoothing)

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class, (batch,)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Accuracy, macro F1, MCC, AUROC, and accuracy among the best five where there are more classes."""
        from torchmetrics.classification import MulticlassAccuracy

        scores = class_metrics(len(self.labels))
        if len(self.labels) > _TOP:
            scores["top5"] = MulticlassAccuracy(len(self.labels), average="micro", top_k=_TOP)
        return scores

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        update_classes(metrics, logits, batch["target"], class_loss(logits, batch["target"], self.weights, 0.0))

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """Label and probability of each class."""
        return class_answers(self.logits(self.forward(model, batch)).cpu(), self.labels)

    def describe(self, answer: dict[str, Any]) -> str:
        """Label and probability."""
        return describe_class(answer)

    def draw_example(self, example: Example, *, seed: int) -> Any:
        """What the model sees of the picture, and its label below."""
        image = seen_picture(self.processor, self.collate([example], seed=seed)["pixel_values"][0])
        target = example["target"]
        return legend_below(enlarged(image), [(self.labels[target], class_color(target))])


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], processor: Any, base_config: Any
) -> ImageClassification:
    """Reads the labels off the training rows.

    Raises:
        DataError: A label is missing, or there is a single class.
    """
    labels, weights = read_classes(rows, options.class_weights, base_config, where)
    return ImageClassification(options, labels, weights, processor)


def restore(options: TaskOptions, state: dict[str, Any], processor: Any) -> ImageClassification:
    """The task as :meth:`ImageClassification.state` recorded it."""
    weights = state["weights"]
    return ImageClassification(options, tuple(state["labels"]), None if weights is None else tuple(weights), processor)
