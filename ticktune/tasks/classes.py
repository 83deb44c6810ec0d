"""What the tasks share that put something into one of several classes: labels, weights, loss, metrics, answers."""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import DataError

_INTEGER = re.compile(r"-?[0-9]{1,18}")


def label_name(label: Any) -> str:
    """A label as the text that a config keeps; a gap in a table is no text, so that no class has its name."""
    if label is None or label != label:
        return ""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def shared(label: Any) -> Any:
    """The label; those that are the same text are one object, as there are many rows and few labels."""
    return sys.intern(label) if type(label) is str else label


def ordered_labels(names: set[str], base_config: Any) -> tuple[str, ...]:
    """Labels in the order of the logits: numbers by their value, then words; an existing head keeps its own order."""
    ordered = sorted(names, key=lambda n: (0, int(n), n) if _INTEGER.fullmatch(n) else (1, 0, n))
    known = getattr(base_config, "id2label", None) or {}
    known_names = [str(known[i]) for i in sorted(known)]
    return tuple(known_names if set(known_names) == names else ordered)


def class_order(names: Collection[str], base_config: Any) -> tuple[str, ...]:
    """Classes that a recipe names, in its order; an existing head of the same classes keeps its own."""
    known = getattr(base_config, "id2label", None) or {}
    known_names = tuple(str(known[i]) for i in sorted(known))
    return known_names if set(known_names) == set(names) else tuple(names)


def read_labels(labels: Sequence[Any], base_config: Any, where: Callable[[int], str]) -> tuple[str, ...]:
    """The classes of training rows that have one label each.

    Raises:
        DataError: A label is missing, they are of several kinds, or there is a single class.
    """
    for i, label in enumerate(labels):
        if label is None or isinstance(label, dict | list) or label != label or not str(label).strip():
            raise DataError(f"expected a label, found {label!r}", where=where(i), fix="fill it in or remove the row")
    kinds = {type(label): i for i, label in enumerate(labels)}
    if len(kinds) > 1:
        (one, i), (other, j) = list(kinds.items())[:2]
        raise DataError(
            f"labels are text in some rows and numbers in others: {labels[i]!r} here, {labels[j]!r} at {where(j)}",
            where=where(i),
            fix="write all labels in one way",
        )
    names = {label_name(label) for label in labels}
    if len(names) < 2:
        raise DataError(
            f"all rows have the same label, {names.pop() if names else 'none'}: nothing can be learned",
            where=where(0).rpartition(":")[0] or where(0),
        )
    return ordered_labels(names, base_config)


def read_classes(
    rows: Sequence[Any], class_weights: str, base_config: Any, where: Callable[[int], str]
) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """The classes of training rows, as :func:`read_labels`, and the weights that ``loss.weights`` asks for."""
    labels = [row["label"] for row in rows]
    names = read_labels(labels, base_config, where)
    if class_weights != "balanced":
        return names, None
    return names, tuple(balanced_weights([label_name(label) for label in labels], names))


def check_known(found: Sequence[str], labels: Sequence[str], where: Callable[[int], str]) -> None:
    """Refuses labels that do not occur in the training rows.

    Args:
        found: One label for each row.
        labels: Those of the training rows.
        where: Gives ``file:line`` of a row's number.

    Raises:
        DataError: Naming the first such row.
    """
    unknown: dict[str, int] = {}
    for i, name in enumerate(found):
        if name not in labels:
            unknown.setdefault(name, i)
    if unknown:
        name, i = next(iter(unknown.items()))
        count = "1 label does" if len(unknown) == 1 else f"{len(unknown)} labels do"
        raise DataError(
            f"{count} not occur in the training rows: {', '.join(map(repr, list(unknown)[:5]))}",
            where=where(i),
            fix=f"the training rows have: {', '.join(labels[:20])}",
        )


def balanced_weights(labels: Sequence[str], classes: Sequence[str]) -> list[float]:
    """Weight of each class: rows / (classes x its rows), as scikit-learn's ``balanced`` has it."""
    counts = Counter(labels)
    return [len(labels) / (len(classes) * counts[name]) if counts[name] else 0.0 for name in classes]


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """A config's entries for the labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def class_loss(logits: Tensor, target: Tensor, weights: Sequence[float] | None, smoothing: float) -> Tensor:
    """Cross entropy summed over rows.

    Args:
        logits: (rows, classes).
        target: (rows,) int64.
        weights: Of each class; None: all 1.
        smoothing: Share of the target that all classes get.
    """
    weight = None if weights is None else torch.tensor(weights, device=logits.device)
    return F.cross_entropy(logits.float(), target, weight=weight, label_smoothing=smoothing, reduction="sum")


def class_metrics(count: int) -> Any:
    """Accuracy, macro F1, Matthews' correlation, AUROC (one against the rest) and loss, of torchmetrics."""
    import torchmetrics.classification as c
    from torchmetrics import MeanMetric

    return nn.ModuleDict(
        {
            "accuracy": c.MulticlassAccuracy(count, average="micro"),
            "f1": c.MulticlassF1Score(count, average="macro"),
            "mcc": _matthews(count),
            "auroc": macro_auroc(c.MulticlassAUROC, count),
            "loss": MeanMetric(),
        }
    )


def update_classes(metrics: Any, logits: Tensor, target: Tensor, loss: Tensor) -> None:
    """Adds a batch to :func:`class_metrics`; ``loss`` is its sum."""
    probabilities = logits.float().softmax(-1)
    for name, metric in metrics.items():
        if name != "loss":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metric.update(probabilities, target)
    metrics["loss"].update(loss / len(logits), weight=len(logits))


def class_answers(logits: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Label and probability of each row, and the probabilities of all classes."""
    answers = []
    for probabilities in logits.float().softmax(-1).tolist():
        best = max(range(len(labels)), key=lambda i: probabilities[i])
        answers.append(
            {
                "label": labels[best],
                "probability": probabilities[best],
                "probabilities": dict(zip(labels, probabilities, strict=True)),
            }
        )
    return answers


def describe_class(answer: dict[str, Any]) -> str:
    """Label and probability, for a person."""
    return f"{answer['label']}  {answer['probability']:.4f}"


def macro_auroc(kind: Any, classes: int) -> Any:
    """AUROC averaged over the classes with rows inside and outside; torchmetrics counts the others as 0."""

    class MacroAuroc(kind):  # type: ignore[misc]
        def compute(self) -> Tensor:
            target = torch.cat(self.target)
            inside = target.sum(0) if target.ndim == 2 else torch.bincount(target, minlength=classes)
            scores: Tensor = super().compute()
            return scores[(inside > 0) & (inside < len(target))].mean()

    return MacroAuroc(classes, average=None)


def _matthews(classes: int) -> Any:
    """Matthews' correlation; 0 where all rows, or all predictions, are of one class.

    For two classes torchmetrics 1.9 gives something else there, such as 0.41 for a model that always says what 95 of
    100 rows are, and such a model could be chosen.
    """
    from torchmetrics.classification import MulticlassMatthewsCorrCoef

    class Matthews(MulticlassMatthewsCorrCoef):  # type: ignore[misc]
        def compute(self) -> Tensor:
            counts = self.confmat.double()
            rows, columns, total = counts.sum(1), counts.sum(0), counts.sum()
            both = counts.trace() * total - rows @ columns
            spread = (total**2 - rows @ rows) * (total**2 - columns @ columns)
            return both / spread.sqrt() if spread > 0 else torch.zeros_like(both)

    return Matthews(classes)
