"""Text classification: one text or a pair; one label, several, or a number."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import DataError, UsageError
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, TaskOptions

Problem = Literal["single", "multi", "regression"]
_CONFIG_NAMES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TextClassification:
    """The task, configured.

    Args:
        options: What the recipe says.
        problem: ``single``, ``multi`` or ``regression``.
        labels: Names of the classes in the order of the logits; one entry, ``value``, for regression.
        tokenizer: The base's tokenizer.
    """

    options: TaskOptions
    problem: Problem
    labels: tuple[str, ...]
    tokenizer: Any
    name: str = "text-classification"
    auto_class: str = "AutoModelForSequenceClassification"

    @property
    def default_metric(self) -> str:
        """Spearman for regression, macro F1 for several labels, else accuracy."""
        return {"single": "accuracy", "multi": "f1", "regression": "spearman"}[self.problem]

    def config(self) -> dict[str, Any]:
        """The label map, the problem type and the pad token."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": _CONFIG_NAMES[self.problem],
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def state(self) -> dict[str, Any]:
        """Problem and labels."""
        return {"problem": self.problem, "labels": list(self.labels)}

    def row_of(self, text: str) -> Row:
        """The text; a pair cannot be written as one line."""
        if "text_pair" in self.options.columns:
            raise UsageError("this task reads pairs of texts", fix="give a jsonl or csv file with both columns")
        return {"text": text.rstrip("\r")}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows whose label the task cannot have.

        Raises:
            DataError: Naming the first such row.
        """
        unknown: dict[str, int] = {}
        for i, row in enumerate(rows):
            label = row["label"]
            if self.problem == "regression":
                if _number(label) is None:
                    raise DataError(f"expected a finite number as label, found {label!r}", where=where(i))
                continue
            if (self.problem == "multi") != isinstance(label, list):
                expected = "a list of labels" if self.problem == "multi" else "a label"
                raise DataError(f"expected {expected}, found {label!r}", where=where(i))
            for name in label if self.problem == "multi" else [label]:
                if _name(name) not in self.labels:
                    unknown.setdefault(_name(name), i)
        if unknown:
            name, i = next(iter(unknown.items()))
            count = "1 label does" if len(unknown) == 1 else f"{len(unknown)} labels do"
            raise DataError(
                f"{count} not occur in the training rows: {', '.join(map(repr, list(unknown)[:5]))}",
                where=where(i),
                fix=f"the training rows have: {', '.join(self.labels[:20])}",
            )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises; a text that is too long loses its end (of a pair, the longer one does)."""
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
                example["target"] = self._target(row["label"])
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

    def collate(self, examples: Sequence[Example]) -> Batch:
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

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels; ``logits`` is (batch, labels)."""
        return model(**self.inputs(batch))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, mean binary cross entropy over the labels, or squared error; summed over rows."""
        logits, target = outputs.logits.float(), batch["target"]
        if self.problem == "single":
            return F.cross_entropy(logits, target, reduction="sum")
        if self.problem == "multi":
            return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(self.labels)
        return F.mse_loss(logits.squeeze(-1), target, reduction="sum")

    def counted(self, batch: Batch) -> Tensor | None:
        """All logits count."""
        return None

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class, or each label's yes or no; (batch,) or (batch, labels)."""
        if self.problem == "regression":
            return torch.zeros(len(logits), dtype=torch.long), torch.full((len(logits),), math.inf)
        if self.problem == "multi":
            return (logits > 0).long(), logits.abs()
        best = logits.topk(2, dim=-1)
        return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]

    def metrics(self) -> Any:
        """Metrics of torchmetrics; f1 is the macro average, auroc one against the rest."""
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
                "f1": c.MultilabelF1Score(n),
                "accuracy": c.MultilabelExactMatch(n),
                "auroc": _macro_auroc(c.MultilabelAUROC, n),
            }
        else:
            scores = {
                "accuracy": c.MulticlassAccuracy(n, average="micro"),
                "f1": c.MulticlassF1Score(n, average="macro"),
                "mcc": c.MulticlassMatthewsCorrCoef(n),
                "auroc": _macro_auroc(c.MulticlassAUROC, n),
            }
        return nn.ModuleDict({**scores, "loss": MeanMetric()})

    def update(self, metrics: Any, outputs: Any, batch: Batch) -> None:
        """Adds a batch; accuracy of several labels counts rows with all labels right."""
        logits, target = outputs.logits.float(), batch["target"]
        if self.problem == "regression":
            predictions = logits.squeeze(-1)
        elif self.problem == "multi":
            predictions, target = logits.sigmoid(), target.long()
        else:
            predictions = logits.softmax(-1)
        for name, metric in metrics.items():
            if name != "loss":
                metric.update(predictions, target)
        metrics["loss"].update(self.loss(outputs, batch) / len(logits), weight=len(logits))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Label and probability of each class, the labels above one half, or the value."""
        logits = self.forward(model, batch).logits.float().cpu()
        if self.problem == "regression":
            return [{"value": value} for value in logits.squeeze(-1).tolist()]
        if self.problem == "multi":
            rows = [dict(zip(self.labels, p, strict=True)) for p in logits.sigmoid().tolist()]
            return [{"labels": [n for n, p in row.items() if p > 0.5], "probabilities": row} for row in rows]
        answers = []
        for probabilities in logits.softmax(-1).tolist():
            best = max(range(len(self.labels)), key=lambda i: probabilities[i])
            answers.append(
                {
                    "label": self.labels[best],
                    "probability": probabilities[best],
                    "probabilities": dict(zip(self.labels, probabilities, strict=True)),
                }
            )
        return answers

    def _filler(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id) if end is None else end

    def _target(self, label: Any) -> Any:
        if self.problem == "regression":
            return float(label)
        if self.problem == "multi":
            present = {_name(name) for name in label}
            return [float(name in present) for name in self.labels]
        return self.labels.index(_name(label))


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> TextClassification:
    """Reads problem and labels off the training rows.

    Raises:
        DataError: Labels of several kinds, a label that is missing, or a single class.
    """
    labels = [row["label"] for row in rows]
    problem = _problem_of(labels, options.problem, where)
    if problem == "regression":
        return TextClassification(options, problem, ("value",), tokenizer)
    kinds = {type(name): i for i, label in enumerate(labels) for name in (label if problem == "multi" else [label])}
    if len(kinds) > 1:
        (one, i), (other, j) = list(kinds.items())[:2]
        raise DataError(
            f"labels are text in some rows and numbers in others: {labels[i]!r} here, {labels[j]!r} at {where(j)}",
            where=where(i),
            fix="write all labels in one way",
        )
    names = {_name(name) for label in labels for name in (label if problem == "multi" else [label])}
    if len(names) < 2:
        raise DataError(
            f"all rows have the same label, {names.pop() if names else 'none'}: nothing can be learned",
            where=where(0).rpartition(":")[0],
        )
    ordered = sorted(names, key=lambda n: (0, int(n), n) if _INTEGER.fullmatch(n) else (1, 0, n))
    known = getattr(base_config, "id2label", None) or {}
    known_names = [str(known[i]) for i in sorted(known)]
    if set(known_names) == names:
        ordered = known_names  # an existing head keeps its own order
    return TextClassification(options, problem, tuple(ordered), tokenizer)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> TextClassification:
    """The task as :meth:`TextClassification.state` recorded it."""
    return TextClassification(options, state["problem"], tuple(state["labels"]), tokenizer)


def _macro_auroc(kind: Any, classes: int) -> Any:
    """AUROC averaged over the classes with rows inside and outside; torchmetrics counts the others as 0."""

    class MacroAuroc(kind):  # type: ignore[misc]
        def compute(self) -> Tensor:
            target = torch.cat(self.target)
            inside = target.sum(0) if target.ndim == 2 else torch.bincount(target, minlength=classes)
            scores: Tensor = super().compute()
            return scores[(inside > 0) & (inside < len(target))].mean()

    return MacroAuroc(classes, average=None)


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


def _name(label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()
