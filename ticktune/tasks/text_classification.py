"""Text classification: one text or a pair; one label, several, or a number."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.console import figure
from ticktune.errors import DataError, RecipeError, UsageError
from ticktune.tasks.classes import (
    balanced_weights,
    check_known,
    class_answers,
    class_loss,
    class_metrics,
    describe_class,
    label_config,
    label_name,
    macro_auroc,
    read_labels,
    shared,
    update_classes,
)
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of

Problem = Literal["single", "multi", "regression"]
_CONFIG_NAMES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TextClassification(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        problem: ``single``, ``multi`` or ``regression``.
        labels: Names of the classes in the order of the logits; one entry, ``value``, for regression.
        tokenizer: The base's tokenizer.
        weights: Weight of each class in the loss, of several labels that of a label's presence; None: all 1.
    """

    options: TaskOptions
    problem: Problem
    labels: tuple[str, ...]
    tokenizer: Any
    weights: tuple[float, ...] | None = None
    name: str = "text-classification"
    auto_class: str = "AutoModelForSequenceClassification"

    @property
    def default_metric(self) -> str:
        """Spearman for regression, macro F1 for several labels, else accuracy."""
        return {"single": "accuracy", "multi": "f1", "regression": "spearman"}[self.problem]

    def config(self) -> dict[str, Any]:
        """The label map, the problem type and the pad token."""
        return {
            **label_config(self.labels),
            "problem_type": _CONFIG_NAMES[self.problem],
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def state(self) -> dict[str, Any]:
        """Problem, labels and their weights."""
        weights = None if self.weights is None else list(self.weights)
        return {"problem": self.problem, "labels": list(self.labels), "weights": weights}

    def row_of(self, text: str) -> Row:
        """The text; a pair cannot be written as one line."""
        if "text_pair" in self.options.columns:
            raise UsageError("this task reads pairs of texts", fix="give a jsonl or csv file with both columns")
        return {"text": text.rstrip("\r")}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows whose label the task cannot have, and one text where a pair was learned or the other way.

        Raises:
            DataError: Naming the first such row.
        """
        self._check_pair(rows, where)
        found: dict[str, int] = {}  # label -> the first row that has it
        for i, row in enumerate(rows):
            label = _parts(row["label"], self.options.separator)
            if self.problem == "regression":
                if _number(label) is None:
                    raise DataError(f"expected a finite number as label, found {label!r}", where=where(i))
                continue
            if (self.problem == "multi") != isinstance(label, list):
                expected = "a list of labels" if self.problem == "multi" else "a label"
                raise DataError(f"expected {expected}, found {label!r}", where=where(i))
            for name in label if self.problem == "multi" else [label]:
                found.setdefault(label_name(name), i)
        check_known(list(found), self.labels, lambda k: where(list(found.values())[k]))

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises; a text that is too long loses its end (of a pair, the longer one does)."""
        self._check_pair(rows, lambda i: f"row {first + i + 1}")  # rows to predict are not checked before
        texts = [str(row["text"]) for row in rows]
        pairs = [str(row["text_pair"]) for row in rows] if "text_pair" in self.options.columns else None
        limit = self.options.max_length
        whole = self.tokenizer(texts, pairs, verbose=False)["input_ids"]
        encoded = self.tokenizer(texts, pairs, truncation="longest_first", max_length=limit)
        examples: list[Example] = []
        for i, row in enumerate(rows):
            if len(whole[i]) > limit:
                report.truncated.append(first + i)
            example: Example = {"row": first + i}
            example |= {name: encoded[name][i] for name in _INPUTS if name in encoded and name != "attention_mask"}
            if not example["input_ids"]:
                # An empty text, and a tokenizer that adds nothing to it: a model needs one token at least.
                example |= {
                    "input_ids": [self._filler()],
                    **({"token_type_ids": [0]} if "token_type_ids" in example else {}),
                }
            example["length"] = len(example["input_ids"])
            if labelled:
                example["target"] = self._target(_parts(row["label"], self.options.separator))
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The text with its special tokens, and the label."""
        target = example["target"]
        if self.problem == "single":
            answer = self.labels[target]
        elif self.problem == "multi":
            answer = ", ".join(name for name, on in zip(self.labels, target, strict=True) if on) or "(none)"
        else:
            answer = str(target)
        return [("context", self.tokenizer.decode(example["input_ids"])), ("learned", answer)]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right to the longest; target is (batch,) int64 or (batch, labels) float32."""
        columns = {name: [e[name] for e in examples] for name in _INPUTS if name in examples[0]}
        batch: Batch = dict(
            self.tokenizer.pad(
                columns, padding=True, padding_side="right", return_tensors="pt", return_attention_mask=True
            )
        )
        if "target" in examples[0]:
            kind = torch.long if self.problem == "single" else torch.float32
            batch["target"] = torch.tensor([e["target"] for e in examples], dtype=kind)
        return batch

    def weight(self, batch: Batch) -> float:
        """The number of rows."""
        return float(len(batch["input_ids"]))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, mask, and segment ids where the tokenizer makes them; all (batch, seq) int64."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, mean binary cross entropy over the labels, or squared error; summed over rows."""
        return self._loss(outputs.logits.float(), batch["target"])

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.problem == "single":
            return class_loss(logits, target, self.weights, self.options.label_smoothing)
        if self.problem == "multi":
            weight = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
            losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="sum")
            return losses / len(self.labels)
        return F.mse_loss(logits.squeeze(-1), target, reduction="sum")

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class, or each label's yes or no; (batch,) or (batch, labels)."""
        if self.problem == "regression":
            return torch.zeros(len(logits), dtype=torch.long), torch.full((len(logits),), math.inf)
        if self.problem == "multi":
            distance = logits - self._cut
            return (distance > 0).long(), distance.abs()
        return best_of(logits)

    def metrics(self) -> Any:
        """Metrics of torchmetrics; f1 is the macro average, auroc one against the rest.

        Of two classes, ece says how far the second one's probabilities are from its shares (15 bins). log_loss is the
        loss without class weights and label smoothing, where there are such.
        """
        import torchmetrics.classification as c
        from torchmetrics import MeanMetric, MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

        n = len(self.labels)
        if self.problem == "regression":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that it keeps all values, which it must
                spearman = SpearmanCorrCoef()
            scores: dict[str, Any] = {
                "spearman": spearman,
                "pearson": PearsonCorrCoef(),
                "mse": MeanSquaredError(),
            }
        elif self.problem == "multi":
            scores = {
                "f1": c.MultilabelF1Score(n, threshold=self.options.threshold),
                "accuracy": c.MultilabelExactMatch(n, threshold=self.options.threshold),
                "auroc": macro_auroc(c.MultilabelAUROC, n),
            }
        else:
            scores = class_metrics(n)
            if n == 2:
                scores["ece"] = _calibration_error()
            if self.weights is not None or self.options.label_smoothing:
                scores["log_loss"] = _log_loss()  # else it is the loss
            return scores
        return nn.ModuleDict({**scores, "loss": MeanMetric()})

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch; accuracy of several labels counts rows with all labels right."""
        logits, target = logits.float(), batch["target"]
        loss = self._loss(logits, target)
        if self.problem == "single":
            update_classes(metrics, logits, target, loss)
            return
        predictions = logits.squeeze(-1) if self.problem == "regression" else logits.sigmoid()
        for name, metric in metrics.items():
            if name != "loss":
                metric.update(predictions, target if self.problem == "regression" else target.long())
        metrics["loss"].update(loss / len(logits), weight=len(logits))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Label and probability of each class, the labels above the threshold, or the value."""
        logits = self.logits(self.forward(model, batch)).float().cpu()
        if self.problem == "regression":
            return [{"value": value} for value in logits.squeeze(-1).tolist()]
        if self.problem == "multi":
            rows = [dict(zip(self.labels, p, strict=True)) for p in logits.sigmoid().tolist()]
            least = self.options.threshold
            return [{"labels": [n for n, p in row.items() if p > least], "probabilities": row} for row in rows]
        return class_answers(logits, self.labels)

    def describe(self, answer: dict[str, Any]) -> str:
        """Label and probability, all labels, or the number."""
        if "label" in answer:
            return describe_class(answer)
        if "labels" in answer:
            return ", ".join(f"{n} {answer['probabilities'][n]:.4f}" for n in answer["labels"]) or "(none)"
        return figure(answer["value"])

    def _check_pair(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Looks at the first row: all have the same columns."""
        learned = "text_pair" in self.options.columns
        if len(rows) and ("text_pair" in rows[0]) != learned:
            raise DataError(
                f"the column text_pair is {'missing' if learned else 'there'}, and the rows that the model learns from "
                f"{'have it' if learned else 'lack it'}",
                where=where(0),
                fix="give all files the same columns, or say in data.columns which are read",
            )

    @property
    def _cut(self) -> float:
        """The logit from which on a label of several is predicted."""
        return math.log(self.options.threshold / (1 - self.options.threshold))

    def _filler(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id) if end is None else end

    def _target(self, label: Any) -> Any:
        if self.problem == "regression":
            return float(label)
        if self.problem == "multi":
            present = {label_name(name) for name in label}
            return [float(name in present) for name in self.labels]
        return self.labels.index(label_name(label))


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> TextClassification:
    """Reads problem and labels off the training rows.

    Raises:
        DataError: Labels of several kinds, a label that is missing, or a single class.
        RecipeError: A key of the loss means nothing for such labels.
    """
    labels = [shared(_parts(row["label"], options.separator)) for row in rows]
    problem = _problem_of(labels, options.problem, where)
    if problem != "single" and options.label_smoothing:
        raise RecipeError(
            f"only one label of several classes can be smoothed, and the labels here are "
            f"{'numbers' if problem == 'regression' else 'lists'}",
            where="loss.label_smoothing",
            fix="remove it",
        )
    if problem != "multi" and options.threshold != TaskOptions.threshold:
        raise RecipeError(
            "only where a row has several labels is one said from a probability on, and here a row has one",
            where="evaluation.threshold",
            fix="remove it",
        )
    if problem == "regression":
        if options.class_weights != "none":
            raise RecipeError("numbers are no classes to weigh", where="loss.weights", fix="remove it")
        return TextClassification(options, problem, ("value",), tokenizer)
    if problem == "single":
        names = read_labels(labels, base_config, where)
        balanced = options.class_weights == "balanced"
        weights = tuple(balanced_weights([label_name(label) for label in labels], names)) if balanced else None
        return TextClassification(options, problem, names, tokenizer, weights)
    flat = [(name, i) for i, label in enumerate(labels) for name in label]
    names = read_labels([name for name, _ in flat], base_config, lambda k: where(flat[k][1] if flat else 0))
    weights = None
    if options.class_weights == "balanced":
        # A label that stands twice in a row is there once, as in its target.
        counts = Counter(name for label in labels for name in {label_name(part) for part in label})
        weights = tuple((len(labels) - counts[name]) / counts[name] for name in names)
    return TextClassification(options, problem, names, tokenizer, weights)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> TextClassification:
    """The task as :meth:`TextClassification.state` recorded it."""
    weights = state.get("weights")
    return TextClassification(
        options, state["problem"], tuple(state["labels"]), tokenizer, None if weights is None else tuple(weights)
    )


def _calibration_error() -> Any:
    from torchmetrics.classification import BinaryCalibrationError

    class CalibrationError(BinaryCalibrationError):  # type: ignore[misc]
        def update(self, probabilities: Tensor, target: Tensor) -> None:
            super().update(probabilities[:, 1], target)

    return CalibrationError(n_bins=15, norm="l1")


def _log_loss() -> Any:
    from torchmetrics import MeanMetric

    class LogLoss(MeanMetric):  # type: ignore[misc]
        def update(self, probabilities: Tensor, target: Tensor) -> None:
            right = probabilities.gather(1, target[:, None])
            super().update(-right.clamp_min(torch.finfo(right.dtype).tiny).log())

    return LogLoss()


def _parts(label: Any, separator: str | None) -> Any:
    """The labels of a cell where the recipe separates them, as a list; else the label as it is."""
    if separator is None or isinstance(label, list):
        return label
    text = "" if label is None else str(label)
    return [part.strip() for part in text.split(separator) if part.strip()]


def _problem_of(labels: list[Any], asked: str, where: Callable[[int], str]) -> Problem:
    for i, label in enumerate(labels):
        empty = label is None or isinstance(label, dict) or label != label  # a NaN is a gap in a table
        empty = empty or (isinstance(label, str) and not label.strip())
        if empty:
            raise DataError(f"expected a label, found {label!r}", where=where(i), fix="fill it in or remove the row")
    lists = [isinstance(label, list) for label in labels]
    if any(lists) and not all(lists):
        i = lists.index(not lists[0])
        raise DataError("some rows have a list of labels, others a single one", where=where(i))
    if asked == "regression" or (asked == "auto" and not lists[0] and _looks_like_regression(labels)):
        for i, label in enumerate(labels):
            if _number(label) is None:
                raise DataError(f"expected a finite number as label, found {label!r}", where=where(i))
        return "regression"
    if asked == "multi" or (asked == "auto" and lists[0]):
        if not lists[0]:
            raise DataError("problem: multi needs a list of labels in every row", where=where(0))
        return "multi"
    if lists[0]:
        raise DataError("problem: single needs one label in every row, found a list", where=where(0))
    return "single"


def _looks_like_regression(labels: list[Any]) -> bool:
    numbers = [_number(label) for label in labels]
    return all(n is not None for n in numbers) and any(n is not None and n != int(n) for n in numbers)


def _number(label: Any) -> float | None:
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
