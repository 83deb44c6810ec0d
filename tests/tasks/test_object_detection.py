"""Object detection: boxes of rows, changes, the models' own loss, metrics against plain references, bad rows."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessorPil, ResNetConfig, YolosConfig, YolosImageProcessorPil

from ticktune.errors import BaseModelError, DataError, Problem
from ticktune.tasks.object_detection import ObjectDetection, objects_of
from ticktune.tasks.task import EncodingReport, Row, TaskOptions, build_task, restore_task

SIZE = {"height": 16, "width": 16}
PROCESSOR = YolosImageProcessorPil(size=SIZE, do_pad=False)
WIDTH, HEIGHT = 40, 30
SQUARE = {"height": 40, "width": 40}


def where(i: int) -> str:
    return f"rows.jsonl:{i + 1}"


def options(**more: Any) -> TaskOptions:
    return TaskOptions(("image", "objects"), 128, **more)


def row(path: str, boxes: Sequence[Sequence[float]] = (), names: Sequence[Any] = ()) -> Row:
    return {"image": path, "objects": {"bbox": [list(box) for box in boxes], "category": list(names)}}


@pytest.fixture
def path(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def rows_of(path: str) -> list[Row]:
    """Two boxes, none, and one."""
    return [
        row(path, [[4, 3, 10, 20], [0, 0, 40, 30]], ["cat", "dog"]),
        row(path),
        row(path, [[20.5, 10, 5, 5]], ["dog"]),
    ]


def build(rows: Sequence[Row], model_type: str = "yolos", processor: Any = PROCESSOR, **more: Any) -> ObjectDetection:
    config = SimpleNamespace(model_type=model_type, id2label=None)
    task = build_task("object-detection", options(**more), rows, where, processor, config)
    assert isinstance(task, ObjectDetection)
    return task


def encoded(task: ObjectDetection, rows: Sequence[Row], *, labelled: bool = True) -> list[dict[str, Any]]:
    return task.encode(rows, 0, EncodingReport(), labelled=labelled)


# Classes


def test_classes_are_read_off_the_rows_and_restored(path: str) -> None:
    task = build(rows_of(path), class_weights="balanced")
    assert (task.labels, task.weights) == (("cat", "dog"), (1.5, 0.75))
    assert task.config()["id2label"] == {0: "cat", 1: "dog"}
    assert restore_task("object-detection", task.options, task.state(), PROCESSOR) == task


def test_one_class_is_enough_and_numbers_are_in_order(path: str) -> None:
    assert build([row(path, [[0, 0, 1, 1]], ["cat"])]).labels == ("cat",)
    assert build([row(path, [[0, 0, 1, 1]] * 3, [10, 9, 2.0])]).labels == ("2", "9", "10")


def test_the_base_s_own_costs_are_taken(path: str) -> None:
    config = YolosConfig(giou_cost=7, eos_coefficient=0.3)
    task = build_task("object-detection", options(), rows_of(path), where, PROCESSOR, config)
    assert isinstance(task, ObjectDetection)
    assert (task.costs["giou_cost"], task.costs["eos_coefficient"], task.costs["bbox_cost"]) == (7.0, 0.3, 5.0)


@pytest.mark.parametrize(("model_type", "said"), [("rt_detr", "rt_detr"), ("", "unknown")])
def test_other_models_are_refused(path: str, model_type: str, said: str) -> None:
    with pytest.raises(BaseModelError, match=f"for detr, yolos, table-transformer, found a model of the type {said}"):
        build(rows_of(path), model_type)


def test_categories_are_grouped_as_the_recipe_says(path: str) -> None:
    rows = [row(path, [[0, 0, 1, 1], [1, 1, 2, 2], [2, 2, 3, 3]], [7, 3, 9]), row(path, [[4, 4, 5, 5]], [1])]
    task = build(rows, classes={"thing": [7, 3], "animal": [1]})
    assert task.labels == ("thing", "animal")
    examples = encoded(task, rows)
    assert [(e["boxes"], e["classes"]) for e in examples] == [
        ([[0, 0, 1, 1], [1, 1, 2, 2]], [0, 0]),
        ([[4, 4, 5, 5]], [1]),
    ]
    task.check([row(path, [[0, 0, 1, 1]], [55])], where)  # background
    with pytest.raises(DataError) as caught:
        build(rows, classes={"thing": [7], "boat": [8, 11]})
    assert caught.value.problems == [
        Problem(
            "no training row has a box of the categories 8, 11",
            "data.classes.boat",
            "correct the categories, or leave the class out",
        )
    ]


# Bad rows


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (None, "in the column objects, found None"),
        ({"bbox": []}, "in the column objects, found {'bbox': []}"),
        ({"bbox": [[1, 1, 2, 2]], "category": []}, "expected a category for each box, found 1 boxes and 0"),
        ({"bbox": [[1, 1, 2]], "category": ["cat"]}, "expected four finite numbers as box 1, found [1, 1, 2]"),
        (
            {"bbox": [[1, 1, 2, float("nan")]], "category": ["cat"]},
            "four finite numbers as box 1, found [1, 1, 2, nan]",
        ),
        ({"bbox": [["1", 1, 2, 2]], "category": ["cat"]}, "expected four finite numbers as box 1"),
        ({"bbox": [[1, 1, 2, 2]], "category": [None]}, "expected a category for box 1, found None"),
        ({"bbox": [[1, 1, 2, 2]], "category": [" "]}, "expected a category for box 1, found ' '"),
        (
            {"bbox": [[1, 1, 0, 2]], "category": ["cat"]},
            "box 1 of 1 is 1, 1, 0, 2 (left, top, width, height): expected",
        ),
        ({"bbox": [[1, 1, 2, -2]], "category": ["cat"]}, "expected a width and height above 0"),
        (
            {"bbox": [[1, 1, 2, 2], [30, 1, 12, 2]], "category": ["cat", "dog"]},
            "box 2 of 2 is 30, 1, 12, 2 (left, top, width, height): it reaches 2 pixels beyond its picture of 40 x 30",
        ),
        ({"bbox": [[-3, 1, 12, 2]], "category": ["cat"]}, "it reaches 3 pixels beyond"),
        ({"bbox": [[1, 20, 12, 20]], "category": ["cat"]}, "it reaches 10 pixels beyond"),
        ({"bbox": [[1, 1, 2, 2]], "category": ["cow"]}, "1 label does not occur in the training rows: 'cow'"),
    ],
)
def test_a_bad_row_is_named(path: str, objects: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build(rows_of(path)).check([*rows_of(path), {"image": path, "objects": objects}], where)
    (problem,) = caught.value.problems
    assert problem.where == "rows.jsonl:4"
    assert message in problem.message


def test_good_rows_and_a_box_that_rounding_put_beyond_the_edge_pass(path: str) -> None:
    build(rows_of(path)).check([*rows_of(path), row(path, [[-0.2, 0, 40.4, 30]], ["cat"])], where)


def test_categories_may_be_called_so() -> None:
    assert objects_of({"bbox": [[1, 1, 2, 2]], "categories": [3]}, "") == ([[1.0, 1.0, 2.0, 2.0]], ["3"])


def test_rows_without_any_box_are_refused(path: str) -> None:
    with pytest.raises(DataError) as caught:
        build([row(path), row(path)])
    assert caught.value.problems == [Problem("no training row has a box: nothing can be learned", "rows.jsonl")]


# Batches


def test_a_batch_has_boxes_of_all_pictures_and_their_counts(path: str) -> None:
    task = build(rows_of(path))
    batch = task.collate(encoded(task, rows_of(path)))
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["size"].tolist() == [[HEIGHT, WIDTH]] * 3
    assert batch["boxes"].tolist() == [[4, 3, 10, 20], [0, 0, 40, 30], [20.5, 10, 5, 5]]
    assert (batch["classes"].tolist(), batch["counts"].tolist()) == ([0, 1, 1], [2, 0, 1])
    assert (task.weight(batch), task.inputs(batch).keys()) == (3.0, {"pixel_values"})


def test_padding_is_masked_for_detr(path: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    rows = [*rows_of(path)[:1], row(str(tmp_path / "b.png"))]
    processor = DetrImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32})
    task = build(rows, "detr", processor)
    batch = task.collate(encoded(task, rows))
    assert task.inputs(batch).keys() == {"pixel_values", "pixel_mask"}
    assert batch["pixel_mask"].shape == batch["pixel_values"].shape[:1] + batch["pixel_values"].shape[2:]
    assert batch["pixel_mask"].min() == 0


def test_a_row_to_predict_has_no_boxes(path: str) -> None:
    task = build(rows_of(path))
    batch = task.collate(encoded(task, [{"image": path}], labelled=False))
    assert batch.keys() == {"pixel_values", "size"}


def test_boxes_are_mirrored_with_their_picture(path: str) -> None:
    task = build(rows_of(path), augment={"flip": 1.0})
    examples = encoded(task, rows_of(path))
    plain, changed = task.collate(examples), task.collate(examples, seed=1)
    assert changed["boxes"].tolist() == [[26, 3, 10, 20], [0, 0, 40, 30], [14.5, 10, 5, 5]]
    assert torch.allclose(changed["pixel_values"], plain["pixel_values"].flip(-1), atol=0.05)


def test_a_box_that_is_cut_away_takes_its_class_along(path: str) -> None:
    boxes = [[x, y, 4, 4] for x in range(0, 36, 4) for y in range(0, 26, 4)]
    rows = [row(path, boxes, [f"{x},{y}" for x, y, _, _ in boxes])]
    task = build(rows, augment={"crop": 0.6})
    batch = task.collate(encoded(task, rows), seed=2)
    assert 0 < batch["counts"].item() == len(batch["boxes"]) == len(batch["classes"]) < len(boxes)
    names = [task.labels[c].split(",") for c in batch["classes"].tolist()]
    inner = [i for i, box in enumerate(batch["boxes"].tolist()) if box[2:] == [4, 4]]
    shifts = {
        (int(names[i][0]) - batch["boxes"][i, 0].item(), int(names[i][1]) - batch["boxes"][i, 1].item()) for i in inner
    }
    assert len(shifts) == 1  # all whole boxes moved alike, and kept their own class


def test_an_example_is_shown_with_its_boxes(path: str) -> None:
    task = build(rows_of(path))
    shown = [task.show(example) for example in encoded(task, rows_of(path))]
    assert shown[0] == [("context", f"{path} (40 x 30)"), ("learned", "cat at 4, 3, 10, 20; dog at 0, 0, 40, 30")]
    assert shown[1][1] == ("learned", "(nothing)")


# Loss


def outputs_of(queries: int = 6, rows: int = 3, classes: int = 2) -> dict[str, torch.Tensor]:
    return {"logits": torch.randn(rows, queries, classes + 1), "pred_boxes": torch.rand(rows, queries, 4) * 0.4 + 0.3}


def stock_loss(outputs: dict[str, torch.Tensor], task: ObjectDetection, rows: Sequence[Row]) -> float:
    """transformers' own loss, of each picture by itself, summed."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    config = YolosConfig(num_labels=len(task.labels))
    total = 0.0
    for i, one in enumerate(rows):
        boxes = torch.tensor(one["objects"]["bbox"], dtype=torch.float32).reshape(-1, 4)
        center = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1) / torch.tensor([WIDTH, HEIGHT] * 2)
        classes = torch.tensor([task.labels.index(n) for n in one["objects"]["category"]], dtype=torch.int64)
        loss, _, _ = ForObjectDetectionLoss(
            outputs["logits"][i : i + 1],
            [{"class_labels": classes, "boxes": center}],
            torch.device("cpu"),
            outputs["pred_boxes"][i : i + 1],
            config,
        )
        total += float(loss)
    return total


def test_the_loss_is_the_models_own_summed_over_pictures(path: str) -> None:
    task, outputs = build(rows_of(path)), outputs_of()
    batch = task.collate(encoded(task, rows_of(path)))
    loss = task.loss(outputs, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(stock_loss(outputs, task, rows_of(path)), rel=1e-5)


def test_a_picture_counts_alike_in_any_batch(path: str) -> None:
    task, outputs = build(rows_of(path)), outputs_of()
    examples = encoded(task, rows_of(path))
    alone = [
        task.loss({k: v[i : i + 1] for k, v in outputs.items()}, task.collate([examples[i]])).item() for i in range(3)
    ]
    assert task.loss(outputs, task.collate(examples)).item() == pytest.approx(sum(alone), rel=1e-5)


def test_the_loss_of_one_box_is_written_out(path: str) -> None:
    rows = [row(path, [[10, 6, 20, 12]], ["dog"]), row(path, [[1, 1, 2, 2]], ["cat"])]
    task = build([*rows, rows[0]], class_weights="balanced")  # dog 0.75, cat 1.5
    logits = torch.tensor([[[0.5, 2.0, 0.1], [0.0, 0.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]])
    batch = task.collate(encoded(task, rows[:1]))
    log = logits[0].double().log_softmax(-1)
    # The first query is the nearer one, so the other should find no object, which counts 0.1.
    weights = np.array([0.75, 0.1])
    entropy = -(weights * np.array([log[0, 1], log[1, 2]])).sum() / weights.sum()
    # True box: center 0.5, 0.4; sides 0.5, 0.4: the guess reaches 0.1 farther at the lower edge, around all of it.
    l1 = 0.1 + 0.1
    true, guess = (0.25, 0.2, 0.75, 0.6), (0.25, 0.25, 0.75, 0.75)
    both = 0.5 * (min(true[3], guess[3]) - max(true[1], guess[1]))
    union = 0.5 * 0.4 + 0.5 * 0.5 - both
    hull = 0.5 * (max(true[3], guess[3]) - min(true[1], guess[1]))
    giou = both / union - (hull - union) / hull
    expected = entropy + 5 * l1 + 2 * (1 - giou)
    assert task.loss({"logits": logits, "pred_boxes": boxes}, batch).item() == pytest.approx(float(expected), rel=1e-5)


# Metrics: seven pictures in batches of four


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def plain_precision(guesses: list[Any], truths: list[Any], classes: int, overlap: float) -> float:
    """Average precision at one overlap as COCO defines it (101 recalls), averaged over the classes with boxes.

    Args:
        guesses: (picture, box, score, class), all of them.
        truths: (picture, box, class).
        classes: Number of classes.
        overlap: From which on a guess is a hit.
    """
    found = []
    for c in range(classes):
        wanted = [t for t in truths if t[2] == c]
        if not wanted:
            continue
        taken: set[int] = set()
        hits = []
        for picture, box, _, _ in sorted((g for g in guesses if g[3] == c), key=lambda g: -g[2]):
            free = [(iou(box, t[1]), i) for i, t in enumerate(wanted) if t[0] == picture and i not in taken]
            best = max(free, default=(0.0, -1))
            hits.append(best[0] >= overlap)
            taken |= {best[1]} if hits[-1] else set()
        right = np.cumsum(hits)
        precision = right / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        recall = right / len(wanted)
        places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        found.append(np.mean([precision[p] if p < len(precision) else 0.0 for p in places]))
    return float(np.mean(found))


def test_metrics_of_seven_pictures_of_which_one_has_no_box_and_one_class_is_absent(path: str) -> None:
    rng = np.random.default_rng(3)
    task = build([row(path, [[0, 0, 1, 1]] * 3, ["0", "1", "2"])])
    rows, logits, boxes = [], torch.randn(7, 6, 4) * 2, np.zeros((7, 6, 4))
    for i in range(7):
        true = [[*rng.integers(0, 15, 2).tolist(), *rng.integers(5, 14, 2).tolist()] for _ in range(i % 4)]
        names = [str(n) for n in rng.integers(0, 2, len(true))]  # class 2 has no box
        rows.append(row(path, true, names))
        for q in range(6):  # guesses near the true boxes, and some anywhere
            near = true[q % len(true)] if true and q < 4 else [*rng.integers(0, 20, 2), *rng.integers(5, 10, 2)]
            boxes[i, q] = np.array(near, dtype=float) + rng.uniform(0, 2.0, 4)
            if true and q < 4 and rng.random() < 0.8:  # mostly of their class
                logits[i, q, int(names[q % len(true)])] += 4
    center = np.concatenate([boxes[..., :2] + boxes[..., 2:] / 2, boxes[..., 2:]], -1) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    outputs = {"logits": logits, "pred_boxes": torch.tensor(center, dtype=torch.float32)}
    metrics = task.metrics()
    for part in (slice(0, 4), slice(4, 7)):
        batch = task.collate(encoded(task, rows[part]))
        task.update(metrics, task.logits({k: v[part] for k, v in outputs.items()}), batch)
    shares = logits.softmax(-1)[..., :-1].numpy()
    guesses = [(i, boxes[i, q], shares[i, q].max(), shares[i, q].argmax()) for i in range(7) for q in range(6)]
    truths = [(i, b, int(n)) for i, r in enumerate(rows) for b, n in zip(*r["objects"].values(), strict=True)]
    by_overlap = [plain_precision(guesses, truths, 3, o) for o in np.linspace(0.5, 0.95, 10)]
    assert 0.1 < by_overlap[0] < 1
    assert float(metrics["map50"].compute()) == pytest.approx(by_overlap[0], abs=1e-6)
    assert float(metrics["map"].compute()) == pytest.approx(np.mean(by_overlap), abs=1e-6)
    assert float(metrics["loss"].compute()) == pytest.approx(stock_loss(outputs, task, rows) / 7, rel=1e-5)


def test_exact_guesses_have_a_precision_of_one(path: str) -> None:
    task = build(rows_of(path))
    batch = task.collate(encoded(task, rows_of(path)[:1]))
    logits = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]])
    boxes = torch.tensor([[[9 / 40, 13 / 30, 10 / 40, 20 / 30], [0.5, 0.5, 1, 1], [0.1, 0.1, 0.1, 0.1]]])
    metrics = task.metrics()
    task.update(metrics, task.logits({"logits": logits, "pred_boxes": boxes}), batch)
    assert (metrics["map"].compute(), metrics["map50"].compute()) == (pytest.approx(1), pytest.approx(1))


def test_without_boxes_precision_is_not_defined(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = build(rows_of(path))
    metrics = task.metrics()
    task.update(metrics, task.logits(outputs_of(rows=1)), task.collate(encoded(task, [row(path)])))
    assert np.isnan(metrics["map"].compute())
    assert capsys.readouterr().out == ""


def test_the_registry_names_every_metric(path: str) -> None:
    from ticktune.registry import TASKS

    entry, task = TASKS["object-detection"], build(rows_of(path))
    assert set(task.metrics()) == set(entry.metrics)
    assert task.default_metric in entry.metrics


# Decisions and predictions


def test_a_decision_is_each_query_s_class_and_its_lead(path: str) -> None:
    task = build(rows_of(path))
    values = task.logits({"logits": torch.tensor([[[1.0, 4.0, 2.0], [0, 1, 6.0]]]), "pred_boxes": torch.ones(1, 2, 4)})
    assert values.shape == (1, 2, 7)
    decisions, gaps = task.decide(values)
    assert (decisions.tolist(), gaps.tolist()) == ([[1, 2]], [[2.0, 5.0]])


def predict(task: ObjectDetection, outputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    def model(**inputs: Any) -> Any:
        return outputs

    count = len(outputs["logits"])
    batch = {"pixel_values": torch.zeros(count, 3, 16, 16), "size": torch.tensor([[HEIGHT, WIDTH]] * count)}
    return task.predict(model, batch)  # type: ignore[arg-type]


OUTPUTS = {
    "logits": torch.tensor([[[0.0, 5.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 9.0]]]),
    "pred_boxes": torch.tensor([[[0.5, 0.5, 0.25, 0.2], [0.1, 0.5, 0.4, 0.2], [0.5, 0.5, 0.5, 0.5]]]),
}


def test_a_prediction_has_the_boxes_above_the_threshold_in_pixels(path: str) -> None:
    task = build(rows_of(path))
    (answer,) = predict(task, OUTPUTS)
    assert answer["size"] == [WIDTH, HEIGHT]
    assert [(t["label"], t["box"]) for t in answer["objects"]] == [
        ("dog", [15.0, 12.0, 10.0, 6.0]),
        ("cat", [0.0, 12.0, 12.0, 6.0]),  # cut at the left edge
    ]
    scores = [t["score"] for t in answer["objects"]]
    assert scores == pytest.approx(OUTPUTS["logits"].softmax(-1)[0, :2].amax(-1).tolist())
    assert task.describe(answer) == f"dog {scores[0]:.2f} at 15, 12, 10, 6; cat {scores[1]:.2f} at 0, 12, 12, 6"
    (strict,) = predict(build(rows_of(path), threshold=0.95), OUTPUTS)
    assert [t["label"] for t in strict["objects"]] == ["dog"]
    assert task.describe({"objects": []}) == "(nothing)"


def test_a_prediction_is_what_the_stock_processor_says(path: str) -> None:
    task, outputs = build(rows_of(path), threshold=0.4), outputs_of()
    found = PROCESSOR.post_process_object_detection(
        SimpleNamespace(**outputs), threshold=0.4, target_sizes=torch.tensor([[HEIGHT, WIDTH]] * 3)
    )
    for answer, stock in zip(predict(task, outputs), found, strict=True):
        order = stock["scores"].argsort(descending=True, stable=True)
        assert [t["label"] for t in answer["objects"]] == [task.labels[c] for c in stock["labels"][order].tolist()]
        assert [t["score"] for t in answer["objects"]] == pytest.approx(stock["scores"][order].tolist())
        corners = stock["boxes"][order]
        corners[:, 0::2] = corners[:, 0::2].clamp(0, WIDTH)
        corners[:, 1::2] = corners[:, 1::2].clamp(0, HEIGHT)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        for thing, box in zip(answer["objects"], boxes, strict=True):
            assert thing["box"] == pytest.approx(box, abs=0.006)


def test_a_drawing_has_the_boxes_on_the_picture(path: str) -> None:
    task = build(rows_of(path))
    answer = {"objects": [{"label": "dog", "score": 0.9, "box": [20.0, 5.0, 15.0, 20.0]}]}
    before, after = np.asarray(Image.open(path)), np.asarray(task.draw({"image": path}, answer))
    assert after.shape == before.shape
    assert (after[24, 21:34] == after[24, 21]).all()  # the lower edge, in one colour
    assert (after[21, 23:32] == before[21, 23:32]).all()  # inside, below the label
    assert (np.asarray(task.draw({"image": path}, {"objects": []})) == before).all()


def test_an_example_is_drawn_as_the_model_sees_it(path: str) -> None:
    rows = [row(path, [[0, 0, 20, 30]], ["cat"]), row(path, [[0, 0, 1, 1]], ["dog"])]
    task = build(rows, augment={"flip": 1.0})
    values = task.collate(encoded(task, rows), seed=1)["pixel_values"][0]
    drawn = np.asarray(task.draw_example(encoded(task, rows)[0], seed=1))
    assert drawn.shape == (320, 320, 3)
    mean, spread = (np.array(PROCESSOR.to_dict()[name])[:, None, None] for name in ("image_mean", "image_std"))
    seen = np.kron(np.rint((values.numpy() * spread + mean) * 255), np.ones((1, 20, 20)))
    assert (drawn[:, :160] == seen[:, :, :160].transpose(1, 2, 0)).all()  # mirrored: the box is on the right
    red = np.array([255, 38, 38])
    assert (drawn[40:, 160:162] == red).all()
    assert (drawn[318:, 160:] == red).all()


def test_what_was_padded_is_not_drawn(path: str) -> None:
    task = build(rows_of(path), "detr", DetrImageProcessorPil(size={"height": 24, "width": 32}, pad_size=SQUARE))
    assert task.collate(encoded(task, rows_of(path)))["pixel_values"].shape == (3, 3, 40, 40)
    assert task.draw_example(encoded(task, rows_of(path))[0], seed=1).size == (32 * 14, 24 * 14)


# Models


@pytest.mark.parametrize("family", ["yolos", "detr"])
def test_the_architectures_that_it_is_for_learn(path: str, family: str) -> None:
    import transformers as t

    rows = rows_of(path)
    if family == "yolos":
        processor: Any = PROCESSOR
        config: Any = YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[16, 16],
            patch_size=4, num_detection_tokens=5,
        )  # fmt: skip
    else:
        processor = DetrImageProcessorPil(size={"height": 32, "width": 32})
        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        config = t.DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5, use_timm_backbone=False, backbone=None,
            backbone_config=backbone,
        )  # fmt: skip
    task = build(rows, family, processor)
    for key, value in task.config().items():
        setattr(config, key, value)
    model = t.AutoModelForObjectDetection.from_config(config).eval()
    batch = task.collate(encoded(task, rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = task.loss(task.forward(model, batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
