"""Semantic segmentation: a class for each pixel of a picture."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.classes import class_order, label_config
from ticktune.tasks.pictures import (
    Change,
    check_pictures,
    class_color,
    enlarged,
    legend_below,
    pixel_values,
    read_mask,
    read_picture,
    seen_picture,
)
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of

NO_CLASS = 255
"""Class of a pixel that is none: it carries no loss and counts in no metric."""
_SHOWN = 5


@dataclass(frozen=True)
class SemanticSegmentation(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        labels: Names of the classes in the order of the logits.
        values: Of each class, the values in the masks that are it.
        weights: Weight of each class in the loss; None: all 1.
        processor: The base's image processor.
    """

    options: TaskOptions
    labels: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] | None
    processor: Any
    name: str = "semantic-segmentation"
    auto_class: str = "AutoModelForSemanticSegmentation"
    default_metric: str = "mean_iou"

    def config(self) -> dict[str, Any]:
        """The label map."""
        return {**label_config(self.labels), "semantic_loss_ignore_index": NO_CLASS}

    def state(self) -> dict[str, Any]:
        """Classes, their values in the masks, and their weights."""
        return {
            "labels": list(self.labels),
            "values": [list(values) for values in self.values],
            "weights": None if self.weights is None else list(self.weights),
        }

    def row_of(self, text: str) -> Row:
        """A picture's path."""
        return {"image": text.strip()}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses files that are no pictures or masks, masks of another size, and values that are no class."""
        sizes = check_pictures([row["image"] for row in rows], where)
        known = {value for values in self.values for value in values} | {NO_CLASS}
        for i, (row, (width, height)) in enumerate(zip(rows, sizes, strict=True)):
            mask = read_mask(row["mask"], where(i))
            if mask.shape != (height, width):
                raise DataError(
                    f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {width} x {height}",
                    where=where(i),
                    fix=f"save {row['mask']} in the size of its picture",
                )
            unknown = () if self.options.classes else sorted(set(np.unique(mask).tolist()) - known)
            if unknown:
                raise DataError(
                    f"the mask has the value {unknown[0]}, which no training mask has",
                    where=where(i),
                    fix=f"the training masks have: {', '.join(self.labels[:20])}; {NO_CLASS} means no class",
                )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes the paths; pictures and masks are read batch by batch."""
        examples: list[Example] = []
        for i, row in enumerate(rows):
            example: Example = {"row": first + i, "length": 1, "image": row["image"]}
            if labelled:
                example["mask"] = row["mask"]
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The picture's path and size, and the classes' shares of it."""
        width, height = read_picture(example["image"]).size
        classes = self._classes_of(example["mask"])
        counts = np.bincount(classes.ravel(), minlength=NO_CLASS + 1) / classes.size
        shares = {name: float(counts[c]) for c, name in enumerate(self.labels)} | {"no class": float(counts[NO_CLASS])}
        return [
            ("context", f"{example['image']} ({width} x {height})"),
            ("learned", f"{example['mask']}: {_share_text(shares)}"),
        ]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pixels, sizes and classes.

        pixel_values (batch, channels, height, width) float32 as the model takes them; size (batch, 2) int64, height and
        width of the pictures themselves; mask (batch, largest height, largest width) uint8, the class of each of their
        pixels, :data:`NO_CLASS` beyond their edges.
        """
        images, masks = [], []
        for example in examples:
            image = read_picture(example["image"])
            change = Change(self.options.augment, seed, example["row"], image.size)
            images.append(change.picture(image))
            if "mask" in example:
                masks.append(torch.from_numpy(self._changed(example["mask"], change)))
        sizes = torch.tensor([(image.height, image.width) for image in images])
        batch: Batch = {"pixel_values": pixel_values(self.processor, images), "size": sizes}
        if masks:
            height, width = sizes.amax(0).tolist()
            batch["mask"] = torch.full((len(masks), height, width), NO_CLASS, dtype=torch.uint8)
            for whole, mask in zip(batch["mask"], masks, strict=True):
                whole[: mask.shape[0], : mask.shape[1]] = mask
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Pixel values."""
        return {"pixel_values": batch["pixel_values"]}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, its mean over a picture's pixels summed over pictures: each counts alike, whatever its size.

        The logits are scaled up to the picture, as for a prediction.
        """
        return self._losses(outputs.logits, batch, self.options.label_smoothing, self.weights).sum()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class at each place of the logits, (batch, height, width)."""
        return best_of(logits.movedim(1, -1))

    def metrics(self) -> Any:
        """Mean IoU over the classes that occur, share of the pixels that are right, and loss."""
        from torchmetrics import MeanMetric

        count = len(self.labels)
        return nn.ModuleDict(
            {
                "mean_iou": Confusion(count, mean_iou),
                "pixel_accuracy": Confusion(count, pixel_accuracy),
                "loss": MeanMetric(),
            }
        )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch: every pixel of a picture in its own size."""
        for found, truth in _rows(logits, batch):
            guess = found.argmax(0)
            for name in ("mean_iou", "pixel_accuracy"):
                metrics[name].update(guess, truth)
        metrics["loss"].update(self._losses(logits, batch, 0.0, self.weights))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Size, each class's share of the pixels, and the classes row by row as runs [class, pixels]."""
        answers = []
        for logits, (height, width) in zip(
            self.logits(self.forward(model, batch)), batch["size"].tolist(), strict=True
        ):
            classes = _at_size(logits, height, width).argmax(0).flatten()
            counts = torch.bincount(classes, minlength=len(self.labels)).tolist()
            answers.append(
                {
                    "size": [width, height],
                    "shares": {n: count / len(classes) for n, count in zip(self.labels, counts, strict=True)},
                    "runs": [[c, len(list(run))] for c, run in groupby(classes.tolist())],
                }
            )
        return answers

    def describe(self, answer: dict[str, Any]) -> str:
        """The largest shares."""
        return _share_text(answer["shares"])

    def draw(self, row: Row, answer: dict[str, Any]) -> Any:
        """The picture, the classes in colours beside it, and what the colours are."""
        from PIL import Image

        image = read_picture(row["image"])
        colors = [class_color(c) for c in range(len(self.labels))]
        classes = classes_of_runs(answer)
        both = Image.new("RGB", (2 * image.width, image.height))
        both.paste(image, (0, 0))
        both.paste(Image.fromarray(np.array(colors, dtype=np.uint8)[classes]), (image.width, 0))
        seen = [c for c in range(len(self.labels)) if (classes == c).any()]
        return legend_below(both, [(self.labels[c], colors[c]) for c in seen])

    def mask(self, answer: dict[str, Any]) -> Any:
        """The mask: each class by the first value in the training masks that is it, its colour in the palette.

        Of one channel of 16 bits, without colours, where a value is larger than 255.
        """
        from PIL import Image

        values = np.array([values[0] for values in self.values], dtype=np.uint16)
        pixels = values[classes_of_runs(answer)]
        if values.max() > 255:
            return Image.fromarray(pixels)
        mask = Image.fromarray(pixels.astype(np.uint8), "L").convert("P")
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[values] = [class_color(c) for c in range(len(self.labels))]
        mask.putpalette(palette.tobytes())
        return mask

    def draw_example(self, example: Example, *, seed: int) -> Any:
        """What the model sees of the picture, the classes' colours laid over it, and what they are.

        Pixels without a class keep the picture's own colours.
        """
        from PIL import Image

        batch = self.collate([example], seed=seed)
        image = enlarged(seen_picture(self.processor, batch["pixel_values"][0]))
        mask = Image.fromarray(batch["mask"][0].numpy()).resize(image.size, Image.Resampling.NEAREST)
        classes = np.asarray(mask)
        colors = [class_color(c) for c in range(len(self.labels))]
        table = np.array([*colors, *[(0, 0, 0)] * (NO_CLASS + 1 - len(colors))], dtype=np.uint8)
        mixed = Image.blend(image, Image.fromarray(table[classes]), 0.5)
        mixed.paste(image, mask=Image.fromarray(np.where(classes == NO_CLASS, 255, 0).astype(np.uint8)))
        seen = [c for c in range(len(self.labels)) if (classes == c).any()]
        return legend_below(mixed, [(self.labels[c], colors[c]) for c in seen])

    def _classes_of(self, path: str) -> "np.ndarray[Any, Any]":
        """The class of each pixel of a mask file, (height, width) uint8."""
        table = np.full(65536, NO_CLASS, dtype=np.uint8)
        for c, values in enumerate(self.values):
            table[list(values)] = c
        classes: np.ndarray[Any, Any] = table[read_mask(path, path)]
        return classes

    def _changed(self, path: str, change: Change) -> "np.ndarray[Any, Any]":
        from PIL import Image

        return np.array(change.shape(Image.fromarray(self._classes_of(path))))

    def _losses(self, logits: Tensor, batch: Batch, smoothing: float, weights: Sequence[float] | None) -> Tensor:
        """The loss of each picture, (batch,); 0 where no pixel has a class."""
        weight = None if weights is None else torch.tensor(weights, device=logits.device)
        losses = []
        for found, truth in _rows(logits, batch):
            total = F.cross_entropy(
                found[None],
                truth[None].long(),
                weight=weight,
                ignore_index=NO_CLASS,
                label_smoothing=smoothing,
                reduction="sum",
            )
            losses.append(total / (truth != NO_CLASS).sum().clamp(min=1))
        return torch.stack(losses)


class Confusion(nn.Module):
    """A figure of the confusion of all pixels of a split; pixels without a class are left out.

    Args:
        count: Number of classes.
        figure: Confusion (truth, guess) int64 -> value.
    """

    counts: Tensor

    def __init__(self, count: int, figure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.figure = figure
        self.register_buffer("counts", torch.zeros(count, count, dtype=torch.int64))

    def update(self, guess: Tensor, truth: Tensor) -> None:
        """Adds the pixels of a picture: classes as integers, of equal shape."""
        counts = truth != NO_CLASS
        size = len(self.counts)
        places = truth[counts].long() * size + guess[counts]
        self.counts += torch.bincount(places, minlength=size * size).reshape(size, size)

    def compute(self) -> Tensor:
        """The figure; NaN where no pixel was added."""
        return self.figure(self.counts)


def mean_iou(counts: Tensor) -> Tensor:
    """Intersection over union of a class's pixels in truth and guess, averaged over the classes in either."""
    counts = counts.double()
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    return (both / either)[either > 0].mean()


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Share of the pixels whose class is right."""
    counts = counts.double()
    return counts.trace() / counts.sum()


def classes_of_runs(answer: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """The class of each pixel, (height, width) int64, of an answer of :meth:`SemanticSegmentation.predict`."""
    width, height = answer["size"]
    classes, lengths = np.array(answer["runs"], dtype=np.int64).reshape(-1, 2).T
    return np.repeat(classes, lengths).reshape(height, width)


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], processor: Any, base_config: Any
) -> SemanticSegmentation:
    """Reads the classes off the recipe, or off the training masks.

    Raises:
        DataError: A mask cannot be used, or no training mask has a pixel of a class.
        BaseModelError: The base's image processor cuts or pads pictures, so that masks would not fit.
    """
    _check_processor(processor)
    pixels: Counter[int] = Counter()
    for i, row in enumerate(rows):
        values, counts = np.unique(read_mask(row["mask"], where(i)), return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    classes = options.classes or {str(value): [value] for value in sorted(pixels) if value != NO_CLASS}
    if not 2 <= len(classes) <= NO_CLASS:
        raise DataError(
            f"the training masks have {len(classes)} values, expected 2 to {NO_CLASS} classes",
            where=where(0).rpartition(":")[0] or where(0),
            fix="say which values are a class, for example data.classes: {animal: [16, 17], person: [1]}",
        )
    labels, sizes = class_order(classes, base_config), {n: sum(pixels[v] for v in classes[n]) for n in classes}
    for name, size in sizes.items():
        if not size:
            raise DataError(
                f"no training mask has a pixel of the values {', '.join(map(str, classes[name]))}",
                where=f"data.classes.{name}",
                fix="correct the values, or leave the class out",
            )
    total = sum(sizes.values())
    balanced = options.class_weights == "balanced"
    weights = tuple(total / (len(labels) * sizes[name]) for name in labels) if balanced else None
    return SemanticSegmentation(options, labels, tuple(tuple(classes[n]) for n in labels), weights, processor)


def restore(options: TaskOptions, state: dict[str, Any], processor: Any) -> SemanticSegmentation:
    """The task as :meth:`SemanticSegmentation.state` recorded it."""
    weights = state["weights"]
    return SemanticSegmentation(
        options,
        tuple(state["labels"]),
        tuple(tuple(values) for values in state["values"]),
        None if weights is None else tuple(weights),
        processor,
    )


def _check_processor(processor: Any) -> None:
    for setting in ("do_center_crop", "do_pad"):
        if getattr(processor, setting, None):
            raise BaseModelError(
                "its image processor cuts or pads pictures, so that masks would not fit them",
                where=f"preprocessor_config.json {setting}",
                fix=f"set {setting} to false in a copy of the model's folder",
            )


def _at_size(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (classes, h, w) scaled to (classes, height, width) float32, as transformers' image processors do it."""
    return F.interpolate(logits[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0]


def _rows(logits: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """For each picture in its own size, logits (classes, height, width) and classes (height, width)."""
    sizes = batch["size"].tolist()
    return [
        (_at_size(found, height, width), mask[:height, :width])
        for found, mask, (height, width) in zip(logits, batch["mask"], sizes, strict=True)
    ]


def _share_text(shares: dict[str, float]) -> str:
    largest = sorted(shares.items(), key=lambda entry: -entry[1])[:_SHOWN]
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest if share)
