"""Image classification: labels, batches of files, loss, metrics against plain references, predictions."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.special import log_softmax, softmax
from transformers import ViTImageProcessorPil

from ticktune.errors import DataError
from ticktune.tasks.image_classification import ImageClassification
from ticktune.tasks.pictures import class_color
from ticktune.tasks.task import EncodingReport, TaskOptions, build_task, restore_task

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def where(i: int) -> str:
    return f"rows.jsonl:{i + 1}"


def options(**more: Any) -> TaskOptions:
    return TaskOptions(("image", "label"), 128, **more)


def build(labels: Sequence[Any], **more: Any) -> ImageClassification:
    rows = [{"image": "a.png", "label": label} for label in labels]
    task = build_task("image-classification", options(**more), rows, where, PROCESSOR, SimpleNamespace(id2label=None))
    assert isinstance(task, ImageClassification)
    return task


def picture(folder: Path, name: str, size: tuple[int, int] = (10, 6)) -> str:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def examples_of(task: ImageClassification, paths: list[str], labels: list[Any]) -> list[dict[str, Any]]:
    rows = [{"image": path, "label": label} for path, label in zip(paths, labels, strict=True)]
    return task.encode(rows, 10, EncodingReport(), labelled=True)


# Labels and rows


def test_labels_are_read_off_the_rows_and_restored() -> None:
    task = build(["dog", "cat", "dog"])
    assert task.labels == ("cat", "dog")
    assert task.config()["id2label"] == {0: "cat", 1: "dog"}
    assert restore_task("image-classification", task.options, task.state(), PROCESSOR) == task


def test_balanced_weights_are_restored_too() -> None:
    task = build(["dog", "cat", "dog", "dog"], class_weights="balanced")
    assert task.weights == (2.0, 2 / 3)
    assert restore_task("image-classification", task.options, task.state(), PROCESSOR) == task


def test_a_label_that_the_training_rows_lack_is_refused(tmp_path: Path) -> None:
    path = picture(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 1 label does not occur in the training rows: 'cow'"):
        build(["dog", "cat"]).check([{"image": path, "label": label} for label in ("dog", "cow")], where)


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_text("text")
    rows = [{"image": picture(tmp_path, "a.png"), "label": 1}, {"image": str(tmp_path / "b.png"), "label": 0}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: this is no picture: .*b\.png"):
        build([0, 1]).check(rows, where)


def test_a_line_of_text_is_a_path() -> None:
    assert build([0, 1]).row_of(" a b.png\n") == {"image": "a b.png"}


# Batches


def test_a_batch_has_the_pixels_of_the_processor_and_its_targets(tmp_path: Path) -> None:
    task = build(["dog", "cat"])
    paths = [picture(tmp_path, "a.png"), picture(tmp_path, "bb.png", (5, 9))]
    examples = examples_of(task, paths, ["dog", "cat"])
    assert [(e["row"], e["target"]) for e in examples] == [(10, 1), (11, 0)]
    batch = task.collate(examples)
    expected = PROCESSOR([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert (batch["target"].tolist(), task.weight(batch)) == ([1, 0], 2.0)
    assert task.inputs(batch).keys() == {"pixel_values"}


def test_a_row_to_predict_has_no_target(tmp_path: Path) -> None:
    task = build(["dog", "cat"])
    rows = [{"image": picture(tmp_path, "a.png")}]
    batch = task.collate(task.encode(rows, 0, EncodingReport(), labelled=False))
    assert batch.keys() == {"pixel_values"}


def test_pictures_change_in_training_only_and_by_their_row(tmp_path: Path) -> None:
    task = build(["dog", "cat"], augment={"flip": 1.0})
    examples = examples_of(task, [picture(tmp_path, "a.png")], ["dog"])
    plain, mirrored = task.collate(examples), task.collate(examples, seed=1)
    image = ImageOps.mirror(Image.open(examples[0]["image"]))
    assert torch.equal(mirrored["pixel_values"], PROCESSOR([image], return_tensors="pt")["pixel_values"])
    assert not torch.equal(plain["pixel_values"], mirrored["pixel_values"])


def test_a_row_changes_alike_in_any_batch(tmp_path: Path) -> None:
    task = build(["dog", "cat"], augment={"flip": 0.5, "crop": 0.5, "jitter": 0.5})
    examples = examples_of(task, [picture(tmp_path, f"{'a' * i}.png") for i in (1, 2, 3)], ["dog", "cat", "dog"])
    together = task.collate(examples, seed=5)["pixel_values"]
    alone = [task.collate([example], seed=5)["pixel_values"] for example in examples]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, task.collate(examples, seed=6)["pixel_values"])


def test_an_example_is_shown_by_its_file_and_size(tmp_path: Path) -> None:
    task = build(["dog", "cat"])
    (example,) = examples_of(task, [picture(tmp_path, "a.png")], ["dog"])
    assert task.show(example) == [("context", f"{tmp_path}/a.png (10 x 6)"), ("learned", "dog")]


# Loss and metrics: seven rows in batches of four


def test_the_loss_counts_weights_and_smoothing() -> None:
    logits, target = torch.randn(7, 3), torch.tensor([0, 2, 1, 1, 1, 2, 2])
    task = build([0, 2, 1, 1, 1, 2, 2], class_weights="balanced", label_smoothing=0.2)
    log = log_softmax(logits.double().numpy(), axis=1)
    weights = np.array([7 / 3, 7 / 9, 7 / 9])
    goal = 0.8 * np.eye(3)[target.numpy()] + 0.2 / 3
    expected = -(goal * weights * log).sum()
    found = task.loss(SimpleNamespace(logits=logits), {"pixel_values": logits, "target": target})
    assert found.item() == pytest.approx(expected, rel=1e-5)


def scores_of(task: ImageClassification, logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    metrics = task.metrics()
    for part in (slice(0, 4), slice(4, 7)):
        task.update(metrics, logits[part], {"target": target[part]})
    return {name: float(metric.compute()) for name, metric in metrics.items()}


@pytest.mark.filterwarnings("ignore:.*No (positive|negative) samples:UserWarning")
def test_metrics_of_seven_rows_of_which_one_class_is_absent() -> None:
    task = build(range(8))
    logits = torch.randn(7, 8)
    target = torch.tensor([0, 1, 1, 2, 3, 4, 6])
    found = scores_of(task, logits, target)
    guess, truth = logits.argmax(1).numpy(), target.numpy()
    best_five = np.argsort(-logits.numpy(), axis=1)[:, :5]
    assert found["accuracy"] == pytest.approx((guess == truth).mean())
    assert found["top5"] == pytest.approx((best_five == truth[:, None]).any(1).mean())
    loss = -log_softmax(logits.double().numpy(), axis=1)[range(7), truth].mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    f1 = []
    for c in range(8):
        hits, of = ((guess == c) & (truth == c)).sum(), (guess == c).sum() + (truth == c).sum()
        f1 += [2 * hits / of] if of else []
    assert found["f1"] == pytest.approx(np.mean(f1))


def test_the_best_five_are_counted_only_where_there_are_more() -> None:
    assert "top5" not in build(range(5)).metrics()
    assert "top5" in build(range(6)).metrics()


def test_the_registry_names_every_metric() -> None:
    from ticktune.registry import TASKS

    row = TASKS["image-classification"]
    assert set(build(range(6)).metrics()) == set(row.metrics)
    assert build([0, 1]).default_metric in row.metrics


# Decisions and predictions


def test_a_decision_is_the_class_and_its_lead() -> None:
    decisions, gaps = build([0, 1, 2]).decide(torch.tensor([[1.0, 4.0, 2.5]]))
    assert (decisions.tolist(), gaps.tolist()) == ([1], [1.5])


def test_a_prediction_has_all_probabilities_and_one_line_for_a_person() -> None:
    task, logits = build(["a", "b", "c"]), torch.tensor([[0.0, 2.0, 1.0]])

    def model(**inputs: Any) -> Any:
        return {"logits": logits}

    (found,) = task.predict(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})  # type: ignore[arg-type]
    expected = softmax(logits.double().numpy()[0])
    assert (found["label"], found["probability"]) == ("b", pytest.approx(expected[1]))
    assert list(found["probabilities"].values()) == pytest.approx(expected.tolist())
    assert task.describe(found) == f"b  {expected[1]:.4f}"


def test_an_example_is_drawn_with_its_label_below(tmp_path: Path) -> None:
    task = build(["dog", "cat"])
    path = tmp_path / "grey.png"
    Image.new("RGB", (8, 8), (10, 100, 200)).save(path)
    drawn = np.asarray(task.draw_example(examples_of(task, [str(path)], ["dog"])[0], seed=1))
    assert drawn.shape == (320 + 16, 320, 3)
    assert (drawn[:320] == (10, 100, 200)).all()
    assert (drawn[320:] == class_color(1)).all(-1).any()
    assert not (drawn[320:] == class_color(0)).all(-1).any()
