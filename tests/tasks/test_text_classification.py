"""Text classification: labels, examples, loss, metrics against independent references, predictions."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax
from scipy.stats import pearsonr, rankdata, spearmanr

from tests.models import word_tokenizer
from ticktune.errors import DataError, Problem, RecipeError
from ticktune.tasks.task import EncodingReport, Row, TaskOptions, build_task, restore_task
from ticktune.tasks.text_classification import TextClassification


def where(i: int) -> str:
    return f"a:b.jsonl:{i + 1}"


def options(problem: str = "auto", columns: tuple[str, ...] = ("text", "label"), max_length: int = 16) -> TaskOptions:
    return TaskOptions(columns, max_length, problem)


def build(labels: Sequence[Any], problem: str = "auto", id2label: dict[int, str] | None = None) -> TextClassification:
    rows = [{"text": "w1", "label": label} for label in labels]
    config = SimpleNamespace(id2label=id2label)
    task = build_task("text-classification", options(problem), rows, where, word_tokenizer(), config)
    assert isinstance(task, TextClassification)
    return task


def test_a_cell_holds_several_labels_where_the_recipe_says_what_stands_between_them() -> None:
    cells = ["Drama|War", "", " War ", None, "Drama||War|"]
    rows = [{"text": "w1", "label": cell} for cell in cells]
    config = SimpleNamespace(id2label=None)
    chosen = replace(options(), separator="|")
    task = build_task("text-classification", chosen, rows, where, word_tokenizer(), config)
    assert isinstance(task, TextClassification)
    assert (task.problem, task.labels) == ("multi", ("Drama", "War"))
    task.check(rows, where)
    examples = task.encode(rows, 0, EncodingReport(), labelled=True)
    assert [example["target"] for example in examples] == [[1, 1], [0, 0], [0, 1], [0, 0], [1, 1]]
    with pytest.raises(DataError) as caught:
        task.check([{"text": "w1", "label": "War|Comedy"}], where)
    assert "'Comedy'" in caught.value.problems[0].message


def refused(labels: Sequence[Any], problem: str = "auto") -> Problem:
    with pytest.raises(DataError) as caught:
        build(labels, problem)
    (found,) = caught.value.problems
    return found


def task_of(problem: Any, labels: int = 3) -> TextClassification:
    names = tuple("abcdefgh"[:labels]) if problem != "regression" else ("value",)
    return TextClassification(options(), problem, names, word_tokenizer())


# Labels


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["pos", "neg", "pos"], "single", ("neg", "pos")),
        ([1, 0, 1], "single", ("0", "1")),
        (["10", "9", "-1"], "single", ("-1", "9", "10")),
        ([10.0, 9.0], "single", ("9", "10")),
        ([True, False], "single", ("False", "True")),
        (["2", "b", "10"], "single", ("2", "10", "b")),
        (["--5", "²"], "single", ("--5", "²")),
        ([" a ", "a", "b"], "single", ("a", "b")),
        ([["a"], [], ["b", "a"]], "multi", ("a", "b")),
        ([[1.0], [2.0]], "multi", ("1", "2")),
        ([0.5, 1, 2], "regression", ("value",)),
        (["0.5", "1"], "regression", ("value",)),
        ([float("inf"), 1.0], "single", ("1", "inf")),
    ],
)
def test_problem_and_labels_are_read_off_the_rows(labels: list[Any], problem: str, names: tuple[str, ...]) -> None:
    task = build(labels)
    assert (task.problem, task.labels) == (problem, names)


def test_whole_numbers_are_values_where_the_recipe_says_so() -> None:
    assert build([1, 2, 3], "regression").problem == "regression"


def test_an_existing_head_keeps_its_order_of_labels() -> None:
    assert build(["a", "b"], id2label={0: "b", 1: "a"}).labels == ("b", "a")


def test_a_head_with_other_labels_does_not_count() -> None:
    assert build(["a", "b"], id2label={0: "b", 1: "c"}).labels == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        (
            ["a", None],
            "auto",
            Problem("expected a label, found None", where(1), "fill it in or remove the row"),
        ),
        (
            ["a", " "],
            "auto",
            Problem("expected a label, found ' '", where(1), "fill it in or remove the row"),
        ),
        (
            [1.0, float("nan")],
            "auto",
            Problem("expected a label, found nan", where(1), "fill it in or remove the row"),
        ),
        (
            [{"a": 1}],
            "auto",
            Problem("expected a label, found {'a': 1}", where(0), "fill it in or remove the row"),
        ),
        (
            ["a", "b", 3],
            "auto",
            Problem(
                f"labels are text in some rows and numbers in others: 'b' here, 3 at {where(2)}",
                where(1),
                "write all labels in one way",
            ),
        ),
        (
            [["a"], "b"],
            "auto",
            Problem("some rows have a list of labels, others a single one", where(1)),
        ),
        (
            ["a", "a"],
            "auto",
            Problem("all rows have the same label, a: nothing can be learned", "a:b.jsonl"),
        ),
        (
            [[], []],
            "auto",
            Problem("all rows have the same label, none: nothing can be learned", "a:b.jsonl"),
        ),
        (["0.5", "x"], "regression", Problem("expected a finite number as label, found 'x'", where(1))),
        (
            [0.5, float("inf")],
            "regression",
            Problem("expected a finite number as label, found inf", where(1)),
        ),
        (["a", "b"], "multi", Problem("problem: multi needs a list of labels in every row", where(0))),
        (
            [["a"], ["b"]],
            "single",
            Problem("problem: single needs one label in every row, found a list", where(0)),
        ),
    ],
)
def test_labels_that_make_no_task_are_refused(labels: list[Any], problem: str, expected: Problem) -> None:
    assert refused(labels, problem) == expected


@pytest.mark.parametrize(
    ("labels", "row", "expected"),
    [
        (
            ["a", "b"],
            "c",
            Problem("1 label does not occur in the training rows: 'c'", where(1), "the training rows have: a, b"),
        ),
        (
            [["a"], ["b"]],
            ["a", "c"],
            Problem("1 label does not occur in the training rows: 'c'", where(1), "the training rows have: a, b"),
        ),
        (["a", "b"], ["a"], Problem("expected a label, found ['a']", where(1))),
        ([["a"], ["b"]], "a", Problem("expected a list of labels, found 'a'", where(1))),
        ([0.5, 1.0], "high", Problem("expected a finite number as label, found 'high'", where(1))),
        ([0.5, 1.0], True, Problem("expected a finite number as label, found True", where(1))),
    ],
)
def test_a_row_of_another_split_with_a_strange_label_is_refused(labels: list[Any], row: Any, expected: Problem) -> None:
    task = build(labels)
    with pytest.raises(DataError) as caught:
        task.check([{"text": "w1", "label": labels[0]}, {"text": "w1", "label": row}], where)
    assert caught.value.problems == [expected]


@pytest.mark.parametrize(
    ("learned", "row", "message"),
    [
        (("text", "label"), {"text": "w1", "text_pair": "w2", "label": "a"}, "text_pair is there, and .* lack it"),
        (("text", "text_pair", "label"), {"text": "w1", "label": "a"}, "text_pair is missing, and .* have it"),
    ],
)
def test_a_pair_where_one_text_was_learned_and_the_other_way_is_refused(
    learned: tuple[str, ...], row: Row, message: str
) -> None:
    task = TextClassification(options(columns=learned), "single", ("a", "b"), word_tokenizer())
    with pytest.raises(DataError, match=f"a:b.jsonl:1: the column {message}"):
        task.check([row], where)
    with pytest.raises(DataError, match=f"row 1: the column {message}"):
        task.encode([row], 0, EncodingReport(), labelled=False)


@pytest.mark.parametrize(("label", "name"), [(None, "None"), (float("nan"), "nan")])
def test_a_gap_is_no_label_though_a_class_is_called_so(label: Any, name: str) -> None:
    for task in (build([name, "b"]), build([[name], ["b"]])):
        with pytest.raises(DataError, match="a:b.jsonl:2: 1 label does not occur in the training rows: ''"):
            task.check([{"text": "w1", "label": r if task.problem == "single" else [r]} for r in ("b", label)], where)


def test_all_unknown_labels_are_counted() -> None:
    with pytest.raises(DataError, match="2 labels do not occur in the training rows: 'c', 'd'"):
        build(["a", "b"]).check([{"label": label} for label in "acdc"], where)


def test_a_label_means_the_same_as_a_number_or_text() -> None:
    build([0, 1]).check([{"label": "1"}, {"label": 1.0}], where)


def test_a_restored_task_is_the_same_task() -> None:
    task = build([["a"], ["b"]])
    assert restore_task("text-classification", task.options, task.state(), task.tokenizer) == task


def test_the_config_has_the_label_map() -> None:
    assert build(["b", "a"]).config() == {
        "num_labels": 2,
        "id2label": {0: "a", 1: "b"},
        "label2id": {"a": 0, "b": 1},
        "problem_type": "single_label_classification",
        "pad_token_id": 0,
    }


# Examples and batches


def encode(task: TextClassification, *rows: Row, labelled: bool = True) -> tuple[list[Any], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 10, report, labelled=labelled), report


def test_a_long_text_loses_its_end_and_is_counted() -> None:
    task = TextClassification(options(max_length=2), "single", ("a", "b"), word_tokenizer())
    examples, report = encode(task, {"text": "w1 w2", "label": "b"}, {"text": "w1 w2 w3", "label": "a"})
    assert [e["input_ids"] for e in examples] == [[5, 6], [5, 6]]
    assert [(e["row"], e["length"], e["target"]) for e in examples] == [(10, 2, 1), (11, 2, 0)]
    assert report.truncated == [11]


def test_of_a_pair_the_longer_text_is_cut() -> None:
    columns = ("text", "text_pair", "label")
    task = TextClassification(options("auto", columns, 4), "single", ("a", "b"), word_tokenizer())
    row = {"text": "w1 w2 w3 w4", "text_pair": "w5 w6", "label": "a"}
    (example,), report = encode(task, row)
    assert example["input_ids"] == [5, 6, 9, 10]
    assert report.truncated == [10]


@pytest.mark.parametrize(
    ("labels", "label", "target"),
    [
        (["a", "b"], " b ", 1),
        ([0, 1], 1.0, 1),
        ([["a"], ["b"]], ["b", " a"], [1.0, 1.0]),
        ([[1.0], [2.0]], [2.0], [0.0, 1.0]),
        ([["a"], ["b"]], [], [0.0, 0.0]),
        (["0.5", "2"], "2", 2.0),
    ],
)
def test_a_target_is_a_class_a_vector_or_a_number(labels: list[Any], label: Any, target: Any) -> None:
    (example,), _ = encode(build(labels), {"text": "w1", "label": label})
    assert example["target"] == target


def test_a_row_to_predict_has_no_target() -> None:
    (example,), _ = encode(build(["a", "b"]), {"text": "w1"}, labelled=False)
    assert "target" not in example


@pytest.mark.parametrize(
    ("labels", "label", "shape", "dtype"),
    [
        (["a", "b"], "b", (2,), torch.int64),
        ([["a"], ["b"], ["c"]], ["b"], (2, 3), torch.float32),
        ([0.5, 2.0], 2.0, (2,), torch.float32),
    ],
)
def test_a_batch_is_padded_on_the_right_with_a_mask(
    labels: list[Any], label: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    task = build(labels)
    batch = task.collate(encode(task, *({"text": text, "label": label} for text in ("w1 w2 w3", "w4")))[0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (tuple(batch["target"].shape), batch["target"].dtype, task.weight(batch)) == (shape, dtype, 2.0)


# Loss


def batch_of(target: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(len(target), 1), "target": target}


def loss_of(task: TextClassification, logits: torch.Tensor, target: Any) -> float:
    loss = task.loss(SimpleNamespace(logits=logits), batch_of(target))
    assert loss.dtype == torch.float32
    return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_classes_is_summed_cross_entropy(dtype: torch.dtype) -> None:
    logits, target = torch.randn(7, 3).to(dtype), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    expected = -log_softmax(logits.double().numpy(), axis=1)[range(7), target.numpy()].sum()
    assert loss_of(task_of("single"), logits, target) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_several_labels_is_their_mean_binary_cross_entropy_summed_over_rows() -> None:
    logits, target = torch.randn(7, 3), (torch.rand(7, 3) < 0.5).float()
    p, y = expit(logits.double().numpy()), target.numpy()
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1).sum()
    assert loss_of(task_of("multi"), logits, target) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_values_is_summed_squared_error() -> None:
    logits, target = torch.randn(7, 1), torch.randn(7)
    expected = ((logits[:, 0].double() - target.double()) ** 2).sum().item()
    assert loss_of(task_of("regression"), logits, target) == pytest.approx(expected, rel=1e-6)


# Metrics: seven rows in batches of four, against closed forms


def scores_of(task: TextClassification, logits: torch.Tensor, target: torch.Tensor, size: int = 4) -> dict[str, float]:
    metrics = task.metrics()
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        task.update(metrics, logits[part], batch_of(target[part]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of absent classes
        return {name: float(metric.compute()) for name, metric in metrics.items()}


def f1_of(truth: np.ndarray, guess: np.ndarray) -> float:
    hits = (truth & guess).sum()
    return float(2 * hits / (truth.sum() + guess.sum()))


def auroc_of(truth: np.ndarray, score: np.ndarray) -> float:
    """The share of (inside, outside) pairs in the right order: Mann-Whitney's U."""
    inside = truth.sum()
    u = rankdata(score)[truth].sum() - inside * (inside + 1) / 2
    return float(u / (inside * (~truth).sum()))


def mcc_of(truth: np.ndarray, guess: np.ndarray, classes: int) -> float:
    """The correlation of the one-hot matrices (Gorodkin 2004)."""
    x, y = np.eye(classes)[truth], np.eye(classes)[guess]
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


LOGITS = torch.tensor(
    [
        [2.0, 0.5, -1.0],
        [0.1, 0.3, -0.5],
        [-0.4, 1.5, -2.0],
        [0.6, 0.2, -0.9],
        [1.2, 1.4, -1.5],
        [0.0, -0.3, -1.1],
        [0.9, 0.7, -0.2],
    ]
)


@pytest.mark.parametrize(
    "target", [[0, 1, 1, 0, 0, 1, 1], [0, 2, 1, 0, 2, 1, 2]], ids=["third-class-absent", "all-present"]
)
def test_metrics_of_classes_over_uneven_batches(target: list[int]) -> None:
    found = scores_of(task_of("single"), LOGITS, torch.tensor(target))
    truth, guess = np.array(target), LOGITS.argmax(1).numpy()
    p = np.exp(log_softmax(LOGITS.double().numpy(), axis=1))
    seen = sorted({*truth.tolist(), *guess.tolist()})
    expected = {
        "accuracy": (truth == guess).mean(),
        "f1": np.mean([f1_of(truth == k, guess == k) for k in seen]),
        "mcc": mcc_of(truth, guess, 3),
        "auroc": np.mean([auroc_of(truth == k, p[:, k]) for k in sorted({*target})]),
        "loss": -np.log(p[range(7), truth]).mean(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("target", "guess"), [([0] * 6 + [1], [0] * 7), ([0] * 7, [0] * 6 + [1]), ([1] * 7, [1] * 7)])
def test_one_class_alone_in_truth_or_guess_has_a_correlation_of_zero(
    target: list[int], guess: list[int], classes: int
) -> None:
    logits = torch.eye(classes)[guess]
    assert scores_of(task_of("single", classes), logits, torch.tensor(target))["mcc"] == 0.0


def test_a_perfect_ranking_has_an_auroc_of_one_though_a_class_is_absent() -> None:
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [5, 0, 0], [0, 5, 0]])
    assert scores_of(task_of("single"), logits, torch.tensor([0, 1, 0, 1]))["auroc"] == 1.0


def test_the_auroc_of_one_class_alone_is_not_defined() -> None:
    assert np.isnan(scores_of(task_of("single"), LOGITS, torch.zeros(7, dtype=torch.long))["auroc"])


def test_ties_count_half_in_the_auroc() -> None:
    logits = torch.zeros(7, 2)
    target = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    assert scores_of(task_of("single", 2), logits, target)["auroc"] == pytest.approx(0.5)


def test_metrics_of_several_labels_over_uneven_batches() -> None:
    logits = LOGITS.clone()
    logits[3] = 1.0
    target = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]]).float()
    found = scores_of(task_of("multi"), logits, target)
    truth, guess = target.numpy().astype(bool), logits.numpy() > 0
    p = expit(logits.double().numpy())
    bce = -np.where(truth, np.log(p), np.log(1 - p)).mean()
    expected = {
        "f1": np.mean([f1_of(truth[:, k], guess[:, k]) for k in range(3)]),
        "accuracy": (truth == guess).all(1).mean(),
        "auroc": np.mean([auroc_of(truth[:, k], p[:, k]) for k in range(3)]),
        "loss": bce,
    }
    assert 0 < expected["accuracy"] < 1
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_label_that_no_row_has_is_left_out_of_the_auroc() -> None:
    target = torch.tensor([[1, 0, 0], [0, 1, 0]] * 3).float()
    logits = torch.tensor([[3.0, -3, -3], [-3, 3, -3]] * 3)
    assert scores_of(task_of("multi"), logits, target)["auroc"] == 1.0


@pytest.mark.parametrize("size", [4, 6, 7, 1])
def test_metrics_of_values_over_uneven_batches(size: int) -> None:
    logits, target = torch.randn(7, 1), torch.randn(7).round(decimals=1)
    target[2] = target[5]  # a tie
    x, y = logits[:, 0].double().numpy(), target.double().numpy()
    found = scores_of(task_of("regression"), logits, target, size)
    expected = {
        "spearman": spearmanr(x, y).statistic,
        "pearson": pearsonr(x, y).statistic,
        "mse": ((x - y) ** 2).mean(),
        "loss": ((x - y) ** 2).mean(),
    }
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("problem", "metric"), [("single", "accuracy"), ("multi", "f1"), ("regression", "spearman")])
def test_the_default_metric_is_among_the_metrics(problem: str, metric: str) -> None:
    task = task_of(problem)
    assert task.default_metric == metric
    assert metric in task.metrics()


def test_the_registry_names_every_metric() -> None:
    from ticktune.registry import TASKS

    known = TASKS["text-classification"].metrics
    made = {name for problem in ("single", "multi", "regression") for name in task_of(problem).metrics()}
    made |= set(replace(task_of("single", 2), weights=(1.0, 2.0)).metrics())
    assert made == set(known)
    assert {name for name, more_is_better in known.items() if not more_is_better} == {"mse", "loss", "ece", "log_loss"}


# Decisions and predictions


def predict(task: TextClassification, logits: torch.Tensor) -> list[dict[str, Any]]:
    def model(**inputs: Any) -> Any:
        return {"logits": logits}

    return task.predict(model, {"input_ids": torch.zeros(len(logits), 1)})  # type: ignore[arg-type]


def test_a_prediction_of_a_class_has_all_probabilities() -> None:
    (found,) = predict(task_of("single"), torch.log(torch.tensor([[0.2, 0.7, 0.1]])))
    assert (found["label"], found["probability"]) == ("b", pytest.approx(0.7))
    assert found["probabilities"] == pytest.approx({"a": 0.2, "b": 0.7, "c": 0.1})


def test_a_prediction_of_several_labels_has_those_above_one_half() -> None:
    (found,) = predict(task_of("multi"), torch.tensor([[3.0, 0.0, -3.0]]))
    assert found["labels"] == ["a"]
    assert found["probabilities"] == pytest.approx(dict(zip("abc", expit([3.0, 0.0, -3.0]), strict=True)))


def test_a_prediction_of_a_value_is_the_value() -> None:
    assert predict(task_of("regression"), torch.tensor([[1.5], [-2.0]])) == [{"value": 1.5}, {"value": -2.0}]


def test_a_decision_is_the_class_and_its_lead() -> None:
    decisions, gaps = task_of("single").decide(torch.tensor([[1.0, 4.0, 2.5]]))
    assert (decisions.tolist(), gaps.tolist()) == ([1], [1.5])


def test_a_decision_of_several_labels_is_one_each() -> None:
    decisions, gaps = task_of("multi").decide(torch.tensor([[3.0, 0.0, -2.0]]))
    assert (decisions.tolist(), gaps.tolist()) == ([[1, 0, 0]], [[3.0, 0.0, 2.0]])


def test_a_value_is_no_decision() -> None:
    decisions, gaps = task_of("regression").decide(torch.tensor([[3.0], [1.0]]))
    assert (decisions.tolist(), gaps.tolist()) == ([0, 0], [np.inf, np.inf])


# Clicks: two classes whose probabilities are used as such

CLICKS = torch.tensor([[2.0, 0.5], [0.1, 0.3], [-0.4, 1.5], [0.6, 0.2], [1.2, 1.4], [0.0, -0.3], [-30.0, 30.0]])
CLICKED = torch.tensor([0, 1, 1, 0, 0, 1, 0])


def test_the_calibration_error_of_two_classes_is_that_of_fifteen_bins() -> None:
    p = expit((CLICKS[:, 1] - CLICKS[:, 0]).double().numpy())
    truth, bins = CLICKED.numpy(), np.clip(np.ceil(p * 15).astype(int) - 1, 0, 14)
    expected = sum(
        abs(p[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean() for b in sorted({*bins.tolist()})
    )
    found = scores_of(task_of("single", 2), CLICKS, CLICKED)
    assert found["ece"] == pytest.approx(expected, rel=1e-5)
    assert "ece" not in task_of("single", 3).metrics()
    assert "log_loss" not in found, "it is the loss"


def test_the_log_loss_knows_no_weights_and_no_smoothing() -> None:
    plain = task_of("single", 2)
    right = log_softmax(CLICKS.double().numpy(), axis=1)[range(7), CLICKED.numpy()]
    assert scores_of(plain, CLICKS, CLICKED)["loss"] == pytest.approx(-right.mean(), rel=1e-5)
    for changes, weights in (({"label_smoothing": 0.1}, None), ({}, (0.5, 2.0))):
        task = replace(plain, options=replace(plain.options, **changes), weights=weights)
        found = scores_of(task, CLICKS, CLICKED)
        assert found["log_loss"] == pytest.approx(-right.mean(), rel=1e-5)
        assert found["loss"] != pytest.approx(found["log_loss"], rel=0.01)


def test_rare_labels_of_several_weigh_more_where_they_are_there() -> None:
    rows: list[Row] = [{"text": "w1", "label": names} for names in (["a", "b"], ["b"], ["b"], [])]
    options = TaskOptions(("text", "label"), 16, class_weights="balanced")
    task = build_task("text-classification", options, rows, where, word_tokenizer(), None)
    assert isinstance(task, TextClassification)
    assert dict(zip(task.labels, task.weights or (), strict=True)) == pytest.approx({"a": 3.0, "b": 1 / 3})
    logits, target = np.array([[0.5, -1.0], [2.0, 0.25]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    weights = np.array(task.weights)
    losses = -(weights * target * np.log(expit(logits)) + (1 - target) * np.log(expit(-logits)))
    found = task.loss(SimpleNamespace(logits=torch.tensor(logits)), {"target": torch.tensor(target)})
    assert found.item() == pytest.approx(losses.mean(axis=1).sum())
    assert restore_task("text-classification", options, task.state(), task.tokenizer) == task


@pytest.mark.parametrize("labels", [[[1], [1, 2], [2], [2]], [["1"], ["1", "2", "1 "], ["2", "2", "2"], [" 2"]]])
def test_weights_count_the_rows_with_a_label_however_it_is_written(labels: list[Any]) -> None:
    rows: list[Row] = [{"text": "w1", "label": label} for label in labels]
    options = TaskOptions(("text", "label"), 16, class_weights="balanced")
    task = build_task("text-classification", options, rows, where, word_tokenizer(), None)
    assert isinstance(task, TextClassification)
    assert dict(zip(task.labels, task.weights or (), strict=True)) == pytest.approx({"1": 1.0, "2": 1 / 3})


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0.5, 1.5], {"label_smoothing": 0.1}, "loss.label_smoothing: only one label of several classes can be"),
        ([["a"], ["b"]], {"label_smoothing": 0.1}, "loss.label_smoothing: only one label of several classes can be"),
        ([0.5, 1.5], {"class_weights": "balanced"}, "loss.weights: numbers are no classes to weigh"),
        (["a", "b"], {"threshold": 0.4}, "evaluation.threshold: only where a row has several labels"),
        ([0.5, 1.5], {"threshold": 0.4}, "evaluation.threshold: only where a row has several labels"),
    ],
)
def test_keys_that_mean_nothing_for_these_labels_are_refused(
    labels: list[Any], options: dict[str, Any], message: str
) -> None:
    rows: list[Row] = [{"text": "w1", "label": label} for label in labels]
    asked = TaskOptions(("text", "label"), 16, **options)
    with pytest.raises(RecipeError, match=message):
        build_task("text-classification", asked, rows, where, word_tokenizer(), None)
