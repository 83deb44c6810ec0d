"""Object detection: boxes around the things in a picture, each with its class (DETR, YOLOS)."""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.classes import check_known, class_order, label_config, label_name, ordered_labels
from ticktune.tasks.pictures import Change, check_pictures, draw_boxes, enlarged, read_picture, seen_picture
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of
from ticktune.versions import require

_MODELS = ("detr", "yolos", "table-transformer")
# As the configs of these models name them, with the values of DETR (arXiv 2005.12872).
_COSTS = {
    "class_cost": 1.0,
    "bbox_cost": 5.0,
    "giou_cost": 2.0,
    "bbox_loss_coefficient": 5.0,
    "giou_loss_coefficient": 2.0,
    "eos_coefficient": 0.1,
}
_SLACK = 0.5  # pixels that a box may reach beyond its picture: boxes are often rounded


@dataclass(frozen=True)
class ObjectDetection(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        labels: Names of the classes in the order of the logits; the last logit means no object.
        weights: Weight of each class in the loss; None: all 1.
        model_type: Of the base.
        costs: What the matching and the loss of the base count each error.
        processor: The base's image processor.
    """

    options: TaskOptions
    labels: tuple[str, ...]
    weights: tuple[float, ...] | None
    model_type: str
    costs: Mapping[str, float]
    processor: Any
    name: str = "object-detection"
    auto_class: str = "AutoModelForObjectDetection"
    default_metric: str = "map"

    def config(self) -> dict[str, Any]:
        """The label map."""
        return label_config(self.labels)

    def state(self) -> dict[str, Any]:
        """Classes and their weights, and what the base's loss counts."""
        return {
            "labels": list(self.labels),
            "weights": None if self.weights is None else list(self.weights),
            "model_type": self.model_type,
            "costs": dict(self.costs),
        }

    def row_of(self, text: str) -> Row:
        """A picture's path."""
        return {"image": text.strip()}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses files that are no pictures, boxes that are none or lie outside, and unknown classes."""
        sizes = check_pictures([row["image"] for row in rows], where)
        owners: list[int] = []
        names: list[str] = []
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            boxes, _ = objects_of(row["objects"], where(i))
            for number, box in enumerate(boxes):
                _check_box(box, size, f"box {number + 1} of {len(boxes)}", where(i))
            _, found = wanted_of(row["objects"], where(i), self.options.classes)
            owners += [i] * len(found)
            names += found
        check_known(names, self.labels, lambda k: where(owners[k]))

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes path, boxes and classes; pictures are read batch by batch."""
        examples: list[Example] = []
        for i, row in enumerate(rows):
            example: Example = {"row": first + i, "length": 1, "image": row["image"]}
            if labelled:
                boxes, names = wanted_of(row["objects"], "", self.options.classes)
                example["boxes"] = boxes
                example["classes"] = [self.labels.index(name) for name in names]
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The picture's path and size, and each box with its class."""
        width, height = read_picture(example["image"]).size
        things = [
            f"{self.labels[c]} at {', '.join(f'{value:g}' for value in box)}"
            for c, box in zip(example["classes"], example["boxes"], strict=True)
        ]
        return [
            ("context", f"{example['image']} ({width} x {height})"),
            ("learned", "; ".join(things) or "(nothing)"),
        ]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pixels, sizes and boxes.

        pixel_values (batch, channels, height, width) float32, and for DETR pixel_mask (batch, height, width) int64,
        0 where a picture was padded; size (batch, 2) int64, height and width of the pictures themselves; boxes
        (objects, 4) float32 as left, top, width, height in their pixels; classes (objects,) int64; counts (batch,)
        int64, the objects of each picture.
        """
        images, boxes, classes, counts = [], [], [], []
        for example in examples:
            image = read_picture(example["image"])
            change = Change(self.options.augment, seed, example["row"], image.size)
            images.append(change.picture(image))
            if "boxes" in example:
                found, kept = change.boxes(np.array(example["boxes"], dtype=np.float64).reshape(-1, 4))
                boxes.append(found)
                classes.append(np.array(example["classes"], dtype=np.int64)[kept])
                counts.append(len(found))
        values = self.processor(images, return_tensors="pt")
        batch: Batch = {"pixel_values": values["pixel_values"]}
        if self.model_type != "yolos" and "pixel_mask" in values:
            batch["pixel_mask"] = values["pixel_mask"]
        batch["size"] = torch.tensor([(image.height, image.width) for image in images])
        if boxes:
            batch["boxes"] = torch.from_numpy(np.concatenate(boxes)).float()
            batch["classes"] = torch.from_numpy(np.concatenate(classes))
            batch["counts"] = torch.tensor(counts)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Pixel values, and which of them are pictures."""
        return {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}

    def logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Classes and boxes side by side, (batch, queries, classes + 1 + 4).

        A box is center x, center y, width, height as shares of the picture's sides.
        """
        return torch.cat([outputs["logits"], outputs["pred_boxes"]], dim=-1)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The model's own loss, of each picture by itself and summed: each counts alike in any batch.

        Of DETR's loss the terms of inner layers (``auxiliary_loss``) are left out.
        """
        return self._losses(self.logits(outputs), batch).sum()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each query, the last one for no object, (batch, queries)."""
        return best_of(logits[..., :-4])

    def metrics(self) -> Any:
        """COCO's mean average precision, over ten overlaps and at an overlap of one half, and loss."""
        from torchmetrics import MeanMetric

        found = Found(len(self.labels))
        return nn.ModuleDict(
            {"map": AveragePrecision(found, 0), "map50": AveragePrecision(found, 1), "loss": MeanMetric()}
        )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch: all queries, whatever their score."""
        truth = batch["boxes"].split(batch["counts"].tolist())
        classes = batch["classes"].split(batch["counts"].tolist())
        for guess, boxes, names in zip(self._guesses(logits, batch), truth, classes, strict=True):
            metrics["map"].found.add(*(part.cpu().numpy() for part in (*guess, boxes, names)))
        metrics["loss"].update(self._losses(logits, batch))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Size, and the objects whose score reaches the threshold: label, score, box [left, top, width, height]."""
        answers = []
        logits = self.logits(self.forward(model, batch))
        for (boxes, scores, classes), (height, width) in zip(
            self._guesses(logits, batch), batch["size"].tolist(), strict=True
        ):
            things = [
                {"label": self.labels[c], "score": score, "box": _inside(box, width, height)}
                for box, score, c in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True)
                if score >= self.options.threshold
            ]
            answers.append({"size": [width, height], "objects": sorted(things, key=lambda t: -float(t["score"]))})
        return answers

    def describe(self, answer: dict[str, Any]) -> str:
        """Label, score and box (left, top, width, height) of each object."""
        things = []
        for thing in answer["objects"]:
            box = ", ".join(f"{value:.0f}" for value in thing["box"])
            things.append(f"{thing['label']} {thing['score']:.2f} at {box}")
        return "; ".join(things) or "(nothing)"

    def draw(self, row: Row, answer: dict[str, Any]) -> Any:
        """The picture with the boxes and their labels on it."""
        image = read_picture(row["image"])
        things = reversed(answer["objects"])  # the surest on top
        draw_boxes(
            image,
            [(t["box"], f"{t['label']} {t['score']:.2f}", self.labels.index(t["label"])) for t in things],
        )
        return image

    def draw_example(self, example: Example, *, seed: int) -> Any:
        """What the model sees of the picture, and the boxes with their labels on it."""
        batch = self.collate([example], seed=seed)
        values = batch["pixel_values"][0]
        if "pixel_mask" in batch:  # what was padded is no part of the picture
            rows, columns = batch["pixel_mask"][0].amax(1).sum(), batch["pixel_mask"][0].amax(0).sum()
            values = values[:, :rows, :columns]
        image = enlarged(seen_picture(self.processor, values))
        height, width = batch["size"][0].tolist()
        share = torch.tensor([image.width / width, image.height / height] * 2)
        boxes = (batch["boxes"] * share).tolist()
        classes = batch["classes"].tolist()
        draw_boxes(image, [(box, self.labels[c], c) for box, c in zip(boxes, classes, strict=True)])
        return image

    def _guesses(self, logits: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each picture: boxes (queries, 4) as left, top, width, height in pixels, scores, classes (queries,)."""
        scores, classes = logits[..., :-4].float().softmax(-1)[..., :-1].max(-1)
        height, width = batch["size"].to(logits.device).unbind(1)
        boxes = logits[..., -4:].float() * torch.stack([width, height, width, height], dim=1)[:, None]
        boxes = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)
        return list(zip(boxes, scores, classes, strict=True))

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each picture, (batch,) float32."""
        from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

        costs = self.costs
        matcher = HungarianMatcher(costs["class_cost"], costs["bbox_cost"], costs["giou_cost"])
        criterion = ImageLoss(matcher, len(self.labels), costs["eos_coefficient"], ["labels", "boxes"])
        if self.weights is not None:
            criterion.empty_weight[:-1] = torch.tensor(self.weights)
        criterion.to(logits.device)
        counts = batch["counts"].tolist()
        rows = zip(
            logits.float(), batch["size"], batch["boxes"].split(counts), batch["classes"].split(counts), strict=True
        )
        losses = []
        for found, size, boxes, classes in rows:
            height, width = size.unbind()
            share = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
            share = share / torch.stack([width, height, width, height])
            outputs = {"logits": found[None, :, :-4], "pred_boxes": found[None, :, -4:]}
            parts = criterion(outputs, [{"class_labels": classes, "boxes": share}])
            losses.append(
                parts["loss_ce"]
                + costs["bbox_loss_coefficient"] * parts["loss_bbox"]
                + costs["giou_loss_coefficient"] * parts["loss_giou"]
            )
        return torch.stack(losses)


@dataclass
class Found:
    """Boxes of a split, guessed and true, and the scores that COCO's own program gives them.

    Args:
        classes: Number of classes.
        pictures: Of each picture: boxes (n, 4), scores (n,), classes (n,); true boxes (m, 4), true classes (m,).
        scores: COCO's summary of so many pictures; computed once.
    """

    classes: int
    pictures: list[tuple[Any, ...]] = field(default_factory=list)
    scores: tuple[int, list[float]] = (0, [])

    def add(self, *picture: Any) -> None:
        """Adds a picture."""
        self.pictures.append(picture)

    def summary(self) -> list[float]:
        """COCO's summary: average precision over overlaps of 0.5 to 0.95, at 0.5, and ten more.

        NaN where there is no true box.
        """
        if self.scores[0] != len(self.pictures):
            self.scores = len(self.pictures), self._summary()
        return self.scores[1]

    def _summary(self) -> list[float]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truths: list[dict[str, Any]] = []
        guesses: list[list[float]] = []
        for image, (boxes, scores, classes, true_boxes, true_classes) in enumerate(self.pictures, start=1):
            guesses += [[image, *b, s, c] for b, s, c in zip(boxes, scores, classes, strict=True)]
            for box, c in zip(true_boxes.tolist(), true_classes.tolist(), strict=True):
                # Ids start from 1: COCO's program takes a match with the id 0 for none.
                truth = {"id": len(truths) + 1, "image_id": image, "category_id": c, "bbox": box, "iscrowd": 0}
                truths.append(truth | {"area": box[2] * box[3]})
        if not truths:
            return [math.nan] * 12
        if not guesses:
            return [0.0] * 12
        known = COCO()
        known.dataset = {
            "images": [{"id": image} for image in range(1, len(self.pictures) + 1)],
            "categories": [{"id": c} for c in range(self.classes)],
            "annotations": truths,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            known.createIndex()
            evaluation = COCOeval(known, known.loadRes(np.array(guesses, dtype=np.float64)), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return [float(value) for value in evaluation.stats]


class AveragePrecision(nn.Module):
    """One number of :meth:`Found.summary`.

    Args:
        found: Shared with the other numbers.
        place: In the summary.
    """

    def __init__(self, found: Found, place: int) -> None:
        super().__init__()
        self.found = found
        self.place = place

    def compute(self) -> float:
        """The number; NaN where there is no true box."""
        return self.found.summary()[self.place]


def objects_of(objects: Any, where: str) -> tuple[list[list[float]], list[str]]:
    """Boxes and classes of a row.

    Args:
        objects: ``{"bbox": [[left, top, width, height], ...], "category": [...]}``, in pixels; ``categories`` will do.
        where: ``file:line`` of the row.

    Raises:
        DataError: It is something else.
    """
    shape = '{"bbox": [[left, top, width, height], ...], "category": [...]}'
    names = objects.get("category", objects.get("categories")) if isinstance(objects, dict) else None
    boxes = objects.get("bbox") if isinstance(objects, dict) else None
    if not isinstance(boxes, list) or not isinstance(names, list):
        raise DataError(f"expected {shape} in the column objects, found {objects!r}", where=where)
    if len(boxes) != len(names):
        raise DataError(f"expected a category for each box, found {len(boxes)} boxes and {len(names)}", where=where)
    for number, (box, name) in enumerate(zip(boxes, names, strict=True), start=1):
        is_box = isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)
        if not is_box:
            raise DataError(
                f"expected four finite numbers as box {number}, found {box!r}",
                where=where,
                fix="write left, top, width and height in pixels",
            )
        if name is None or isinstance(name, dict | list) or not str(name).strip():
            raise DataError(f"expected a category for box {number}, found {name!r}", where=where)
    return [[float(value) for value in box] for box in boxes], [label_name(name) for name in names]


def wanted_of(objects: Any, where: str, classes: Mapping[str, Sequence[int]]) -> tuple[list[list[float]], list[str]]:
    """Boxes and classes of a row, of those classes that the recipe names.

    Args:
        objects: As in :func:`objects_of`.
        where: ``file:line`` of the row.
        classes: Name of a class -> categories that are it; empty: every category is a class of its own.

    Raises:
        DataError: As :func:`objects_of`.
    """
    boxes, categories = objects_of(objects, where)
    if not classes:
        return boxes, categories
    names = {str(number): name for name, numbers in classes.items() for number in numbers}
    kept = [i for i, category in enumerate(categories) if category in names]
    return [boxes[i] for i in kept], [names[categories[i]] for i in kept]


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], processor: Any, base_config: Any
) -> ObjectDetection:
    """Reads the classes off the training rows.

    Raises:
        BaseModelError: The base is none of the models that this is for.
        DataError: A row has no list of boxes, or none has a box.
        RecipeError: The recipe smooths labels, which the models' loss does not.
        UsageError: A package is missing.
    """
    require("scipy", "vision")
    require("pycocotools", "vision")
    model_type = str(getattr(base_config, "model_type", ""))
    if model_type not in _MODELS:
        raise BaseModelError(
            f"object-detection is for {', '.join(_MODELS)}, found a model of the type {model_type or 'unknown'}",
            where="base.model",
        )
    counts: Counter[str] = Counter()
    for i, row in enumerate(rows):
        counts.update(wanted_of(row["objects"], where(i), options.classes)[1])
    for name, numbers in options.classes.items():
        if not counts[name]:
            raise DataError(
                f"no training row has a box of the categories {', '.join(map(str, numbers))}",
                where=f"data.classes.{name}",
                fix="correct the categories, or leave the class out",
            )
    if not counts:
        raise DataError("no training row has a box: nothing can be learned", where=where(0).rpartition(":")[0])
    labels = class_order(options.classes, base_config) or ordered_labels(set(counts), base_config)
    total = sum(counts.values())
    balanced = options.class_weights == "balanced"
    weights = tuple(total / (len(labels) * counts[name]) for name in labels) if balanced else None
    costs = {name: float(getattr(base_config, name, value)) for name, value in _COSTS.items()}
    return ObjectDetection(options, labels, weights, model_type, costs, processor)


def restore(options: TaskOptions, state: dict[str, Any], processor: Any) -> ObjectDetection:
    """The task as :meth:`ObjectDetection.state` recorded it."""
    weights = state["weights"]
    return ObjectDetection(
        options,
        tuple(state["labels"]),
        None if weights is None else tuple(weights),
        state["model_type"],
        state["costs"],
        processor,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_box(box: list[float], size: tuple[int, int], name: str, where: str) -> None:
    left, top, width, height = box
    said = f"{name} is {', '.join(f'{value:g}' for value in box)} (left, top, width, height)"
    if width <= 0 or height <= 0:
        raise DataError(f"{said}: expected a width and height above 0", where=where, fix="remove it, or correct it")
    beyond = max(-left, -top, left + width - size[0], top + height - size[1])
    if beyond > _SLACK:
        raise DataError(
            f"{said}: it reaches {beyond:g} pixels beyond its picture of {size[0]} x {size[1]}",
            where=where,
            fix="boxes are in pixels of the upright picture; cut it at the edge, or correct it",
        )


def _inside(box: list[float], width: int, height: int) -> list[float]:
    """A box cut at the picture's edges, to a hundredth of a pixel."""
    left, top = min(max(box[0], 0.0), width), min(max(box[1], 0.0), height)
    right, bottom = min(max(box[0] + box[2], left), width), min(max(box[1] + box[3], top), height)
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]
