"""Semantic segmentation: classes of masks, changes, loss, metrics against plain references, predictions, bad rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import SegformerImageProcessorPil

from ticktune.errors import BaseModelError, DataError, Problem
from ticktune.tasks.pictures import class_color, read_mask, seen_picture
from ticktune.tasks.semantic_segmentation import NO_CLASS, SemanticSegmentation, classes_of_runs
from ticktune.tasks.task import EncodingReport, Row, TaskOptions, build_task, restore_task

PROCESSOR = SegformerImageProcessorPil(size={"height": 8, "width": 8})
GROUPS = {"thing": [1, 2], "sky": [7], "sea": [300]}


def where(i: int) -> str:
    return f"rows.jsonl:{i + 1}"


def options(**more: Any) -> TaskOptions:
    return TaskOptions(("image", "mask"), 128, **more)


def row_of(folder: Path, name: str, values: Any, size: tuple[int, int] | None = None) -> Row:
    """A picture and its mask, as files."""
    mask = np.asarray(values)
    mask = mask.astype(np.uint8 if mask.max() < 256 else np.uint16)
    height, width = mask.shape
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    (picture if size is None else picture.resize(size)).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}-mask.png")
    return {"image": str(folder / f"{name}.png"), "mask": str(folder / f"{name}-mask.png")}


def build(rows: Sequence[Row], config: Any = None, processor: Any = PROCESSOR, **more: Any) -> SemanticSegmentation:
    task = build_task("semantic-segmentation", options(**more), rows, where, processor, config)
    assert isinstance(task, SemanticSegmentation)
    return task


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Two pictures of different size: all classes, one of no class, and pixels of none."""
    one = [[1, 1, 2, 7, 7], [1, 0, 2, 7, 255], [300, 300, 300, 7, 7]]
    two = [[7, 7], [7, 9], [7, 1], [1, 1]]
    return [row_of(tmp_path, "one", one), row_of(tmp_path, "two", two)]


def encoded(task: SemanticSegmentation, rows: Sequence[Row], *, labelled: bool = True) -> list[dict[str, Any]]:
    return task.encode(rows, 0, EncodingReport(), labelled=labelled)


CLASSES_ONE = [[0, 0, 0, 1, 1], [0, 255, 0, 1, 255], [2, 2, 2, 1, 1]]
CLASSES_TWO = [[1, 1], [1, 255], [1, 0], [0, 0]]


# Classes


def test_values_are_grouped_as_the_recipe_says(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    assert task.labels == ("thing", "sky", "sea")
    assert task.config()["id2label"] == {0: "thing", 1: "sky", 2: "sea"}
    assert restore_task("semantic-segmentation", task.options, task.state(), PROCESSOR) == task


def test_without_groups_every_value_but_255_is_a_class(rows: list[Row]) -> None:
    assert build(rows).labels == ("0", "1", "2", "7", "9", "300")


def test_an_existing_head_of_the_same_classes_keeps_its_order(rows: list[Row]) -> None:
    task = build(rows, SimpleNamespace(id2label={0: "sea", 1: "thing", 2: "sky"}), classes=GROUPS)
    assert (task.labels, task.values) == (("sea", "thing", "sky"), ((300,), (1, 2), (7,)))


def test_balanced_weights_are_those_of_the_pixels(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS, class_weights="balanced")
    # 8, 9 and 3 of 20 pixels
    assert task.weights == pytest.approx((20 / (3 * 8), 20 / (3 * 9), 20 / (3 * 3)))
    assert restore_task("semantic-segmentation", task.options, task.state(), PROCESSOR) == task


def test_a_class_without_pixels_is_refused(rows: list[Row]) -> None:
    with pytest.raises(DataError) as caught:
        build(rows, classes={**GROUPS, "boat": [8, 11]})
    assert caught.value.problems == [
        Problem(
            "no training mask has a pixel of the values 8, 11",
            "data.classes.boat",
            "correct the values, or leave the class out",
        )
    ]


def test_masks_of_one_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: the training masks have 1 values, expected 2 to 255 classes"):
        build([row_of(tmp_path, "a", [[3, 3, 255]])])


@pytest.mark.parametrize("setting", ["do_center_crop", "do_pad"])
def test_a_processor_that_cuts_or_pads_is_refused(rows: list[Row], setting: str) -> None:
    with pytest.raises(BaseModelError, match="cuts or pads pictures, so that masks would not fit"):
        build(rows, processor=SimpleNamespace(**{setting: True}))


# Bad rows


def refused(task: SemanticSegmentation, good: Row, bad: Row) -> Problem:
    with pytest.raises(DataError) as caught:
        task.check([good, bad], where)
    (problem,) = caught.value.problems
    return problem


def test_a_mask_of_another_size_is_refused(rows: list[Row], tmp_path: Path) -> None:
    bad = row_of(tmp_path, "bad", np.ones((4, 6)), size=(5, 4))
    assert refused(build(rows), rows[0], bad) == Problem(
        "the mask has 6 x 4 pixels, its picture 5 x 4", where(1), f"save {bad['mask']} in the size of its picture"
    )


def test_a_value_that_no_training_mask_has_is_refused_where_values_are_the_classes(
    rows: list[Row], tmp_path: Path
) -> None:
    bad = row_of(tmp_path, "bad", [[1, 255, 8]])
    assert refused(build(rows), rows[0], bad) == Problem(
        "the mask has the value 8, which no training mask has",
        where(1),
        "the training masks have: 0, 1, 2, 7, 9, 300; 255 means no class",
    )
    build(rows, classes=GROUPS).check([rows[0], bad], where)  # one that is in no group is just not learned


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("RGB", "expected a mask of one channel of whole numbers, found the mode RGB"),
        ("LA", "expected a mask of one channel of whole numbers, found the mode LA"),
        ("F", "expected a mask of one channel of whole numbers, found the mode F"),
    ],
)
def test_a_mask_of_colours_or_fractions_is_refused(rows: list[Row], tmp_path: Path, mode: str, message: str) -> None:
    ending = "tif" if mode == "F" else "png"
    Image.new(mode, (5, 3)).save(tmp_path / f"c.{ending}")
    problem = refused(build(rows), rows[0], {**rows[0], "mask": str(tmp_path / f"c.{ending}")})
    assert (problem.message, problem.where) == (message, where(1))


def test_a_negative_value_is_refused(rows: list[Row], tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 5), -1, dtype=np.int32)).save(tmp_path / "n.tif")
    problem = refused(build(rows), rows[0], {**rows[0], "mask": str(tmp_path / "n.tif")})
    assert problem.message == "expected values of 0 to 65535 in the mask, found -1"


def test_a_broken_mask_and_a_broken_picture_are_refused(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    broken = str(tmp_path / "x.png")
    assert "this mask cannot be read" in refused(build(rows), rows[0], {**rows[0], "mask": broken}).message
    assert "this is no picture" in refused(build(rows), rows[0], {**rows[0], "image": broken}).message


def test_a_palette_s_values_are_its_places(rows: list[Row], tmp_path: Path) -> None:
    mask = Image.fromarray(np.array([[1, 7]], dtype=np.uint8)).convert("P")
    mask.putpalette([200, 100, 50] * 256)
    mask.save(tmp_path / "p.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "q.png")
    row = {"image": str(tmp_path / "q.png"), "mask": str(tmp_path / "p.png")}
    task = build(rows, classes=GROUPS)
    assert task.collate(encoded(task, [row]))["mask"].tolist() == [[[0, 1]]]


# Batches


def test_a_batch_holds_each_mask_in_its_own_size(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    batch = task.collate(encoded(task, rows))
    expected = PROCESSOR([Image.open(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["size"].tolist() == [[3, 5], [4, 2]]
    assert (batch["mask"].shape, batch["mask"].dtype) == ((2, 4, 5), torch.uint8)
    assert batch["mask"][0, :3, :5].tolist() == CLASSES_ONE
    assert batch["mask"][1, :4, :2].tolist() == CLASSES_TWO
    assert (batch["mask"][0, 3:] == NO_CLASS).all()
    assert (batch["mask"][1, :, 2:] == NO_CLASS).all()
    assert (task.weight(batch), task.inputs(batch).keys()) == (2.0, {"pixel_values"})


def test_a_row_to_predict_has_no_mask(rows: list[Row]) -> None:
    task = build(rows)
    only = [{"image": row["image"]} for row in rows]
    assert task.collate(encoded(task, only, labelled=False)).keys() == {"pixel_values", "size"}


def test_a_picture_and_its_mask_change_together(tmp_path: Path, rows: list[Row]) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (40, 30)) * 6 + 1  # 1 and 7
    row = row_of(tmp_path, "same", values)
    # The picture shows its own mask: white where the value is 7.
    Image.fromarray(((values == 7) * 255).astype(np.uint8)).save(row["image"])
    processor = SegformerImageProcessorPil(do_resize=False, do_normalize=False)
    task = build(rows, classes=GROUPS, processor=processor, augment={"flip": 0.5, "crop": 0.5})
    (example,) = encoded(task, [row])
    seen = set()
    for seed in range(8):
        batch = task.collate([example], seed=seed)
        height, width = batch["size"][0].tolist()
        seen.add((height, width))
        assert torch.equal(batch["pixel_values"][0, 0], batch["mask"][0].float())
        assert batch["mask"].shape == (1, height, width)
    assert len(seen) > 1


def test_a_mirrored_mask(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS, augment={"flip": 1.0})
    examples = encoded(task, rows[:1])
    assert task.collate(examples, seed=3)["mask"][0].tolist() == [row[::-1] for row in CLASSES_ONE]
    mirrored = PROCESSOR([ImageOps.mirror(Image.open(rows[0]["image"]))], return_tensors="pt")["pixel_values"]
    assert torch.equal(task.collate(examples, seed=3)["pixel_values"], mirrored)
    assert task.collate(examples)["mask"][0].tolist() == CLASSES_ONE


def test_an_example_is_shown_by_the_shares_of_its_classes(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    (context, learned) = task.show(encoded(task, rows)[0])
    assert context == ("context", f"{rows[0]['image']} (5 x 3)")
    assert learned == ("learned", f"{rows[0]['mask']}: thing 33.3 %, sky 33.3 %, sea 20.0 %, no class 13.3 %")


# Loss


def batch_of(masks: Sequence[Any]) -> dict[str, Any]:
    """A batch of masks (nested lists of classes), padded."""
    arrays = [np.asarray(mask, dtype=np.uint8) for mask in masks]
    sizes = [array.shape for array in arrays]
    whole = np.full((len(arrays), max(s[0] for s in sizes), max(s[1] for s in sizes)), NO_CLASS, dtype=np.uint8)
    for target, array in zip(whole, arrays, strict=True):
        target[: array.shape[0], : array.shape[1]] = array
    pixels = torch.zeros(len(arrays), 3, 8, 8)
    return {"pixel_values": pixels, "size": torch.tensor(sizes), "mask": torch.from_numpy(whole)}


def upscaled(logits: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation with half-pixel centres, written out: logits (classes, h, w)."""
    values = logits.double().numpy()

    def places(size: int, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = ((np.arange(size) + 0.5) * source / size - 0.5).clip(0)
        low = np.floor(x).astype(int).clip(0, source - 1)
        return low, (low + 1).clip(0, source - 1), x - low

    low, high, share = places(height, values.shape[1])
    values = values[:, low] * (1 - share)[:, None] + values[:, high] * share[:, None]
    low, high, share = places(width, values.shape[2])
    found: np.ndarray = values[:, :, low] * (1 - share) + values[:, :, high] * share
    return found


def log_probabilities(logits: torch.Tensor, mask: Any) -> np.ndarray:
    values = upscaled(logits, *np.shape(mask))
    found: np.ndarray = values - np.log(np.exp(values).sum(0))
    return found


def plain_losses(logits: torch.Tensor, masks: Sequence[Any], weights: np.ndarray, smoothing: float) -> list[float]:
    losses = []
    for one, mask in zip(logits, masks, strict=True):
        log, total, count = log_probabilities(one, mask), 0.0, 0
        for (y, x), c in np.ndenumerate(np.asarray(mask)):
            if c != NO_CLASS:
                goal = (1 - smoothing) * np.eye(len(log))[c] + smoothing / len(log)
                total, count = total - (goal * weights * log[:, y, x]).sum(), count + 1
        losses.append(total / max(count, 1))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_a_picture_s_pixels_summed_over_pictures(rows: list[Row], dtype: torch.dtype) -> None:
    task = build(rows, classes=GROUPS)
    logits, masks = torch.randn(3, 3, 2, 2).to(dtype), [CLASSES_ONE, CLASSES_TWO, [[255, 255]]]
    expected = plain_losses(logits, masks, np.ones(3), 0.0)
    assert expected[2] == 0
    found = task.loss(SimpleNamespace(logits=logits), batch_of(masks))
    assert (found.dtype, found.item()) == (torch.float32, pytest.approx(sum(expected), rel=1e-5))


def test_the_loss_knows_weights_and_smoothing(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS, class_weights="balanced", label_smoothing=0.3)
    logits, masks = torch.randn(2, 3, 2, 2), [CLASSES_ONE, CLASSES_TWO]
    expected = plain_losses(logits, masks, np.array(task.weights), 0.3)
    found = task.loss(SimpleNamespace(logits=logits), batch_of(masks))
    assert found.item() == pytest.approx(sum(expected), rel=1e-5)


def test_a_picture_counts_alike_in_any_batch(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    logits, masks = torch.randn(2, 3, 2, 2), [CLASSES_ONE, CLASSES_TWO]
    together = task.loss(SimpleNamespace(logits=logits), batch_of(masks))
    alone = [
        task.loss(SimpleNamespace(logits=logits[i : i + 1]), batch_of([mask])).item() for i, mask in enumerate(masks)
    ]
    assert together.item() == pytest.approx(sum(alone), rel=1e-6)


# Metrics: seven pictures in batches of four


def test_metrics_of_seven_pictures_of_which_one_class_is_absent(rows: list[Row]) -> None:
    task = build(rows, classes={**GROUPS, "no": [9], "none": [0]})
    rng = np.random.default_rng(4)
    masks = [rng.choice([0, 1, 3, 255], size=rng.integers(2, 6, 2)) for _ in range(7)]
    logits = torch.randn(7, 5, 2, 3)
    logits[:, 4] = -9  # never guessed, and in no mask: out of the mean
    metrics = task.metrics()
    for start in (0, 4):
        task.update(metrics, logits[start : start + 4], batch_of(masks[start : start + 4]))
    guess = [upscaled(one, *mask.shape).argmax(0) for one, mask in zip(logits, masks, strict=True)]
    g, t = (np.concatenate([a.ravel() for a in arrays]) for arrays in (guess, masks))
    g, t = g[t != 255], t[t != 255]
    ious = [((g == c) & (t == c)).sum() / ((g == c) | (t == c)).sum() for c in (0, 1, 2, 3)]
    assert ious[2] == 0  # guessed, but in no mask: counts as wrong
    assert float(metrics["mean_iou"].compute()) == pytest.approx(np.mean(ious))
    assert float(metrics["pixel_accuracy"].compute()) == pytest.approx((g == t).mean())
    expected = np.mean(plain_losses(logits, [m.tolist() for m in masks], np.ones(5), 0.0))
    assert float(metrics["loss"].compute()) == pytest.approx(expected, rel=1e-5)


def test_metrics_are_those_of_torchmetrics(rows: list[Row]) -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    task = build(rows, classes=GROUPS)
    masks = [np.random.default_rng(i).choice([0, 1, 2, 255], size=(6, 6)) for i in range(3)]
    logits = torch.randn(3, 3, 6, 6)
    metrics = task.metrics()
    task.update(metrics, logits, batch_of(masks))
    theirs = MulticlassJaccardIndex(3, ignore_index=255)
    theirs.update(logits.argmax(1), torch.tensor(np.stack(masks)))
    assert float(metrics["mean_iou"].compute()) == pytest.approx(float(theirs.compute()))


def test_without_any_class_metrics_are_not_defined(rows: list[Row]) -> None:
    task = build(rows)
    metrics = task.metrics()
    task.update(metrics, torch.randn(1, 6, 2, 2), batch_of([[[255, 255]]]))
    assert np.isnan([float(metrics[name].compute()) for name in ("mean_iou", "pixel_accuracy")]).all()


def test_the_registry_names_every_metric(rows: list[Row]) -> None:
    from ticktune.registry import TASKS

    row, task = TASKS["semantic-segmentation"], build(rows)
    assert set(task.metrics()) == set(row.metrics)
    assert task.default_metric in row.metrics


# Decisions and predictions


def test_a_decision_is_the_class_of_a_place_and_its_lead(rows: list[Row]) -> None:
    logits = torch.tensor([[[[1.0, 5.0]], [[4.0, 2.0]], [[2.5, 0.0]]]])
    decisions, gaps = build(rows).decide(logits)
    assert (decisions.tolist(), gaps.tolist()) == ([[[1, 0]]], [[[1.5, 3.0]]])


def answer_of(task: SemanticSegmentation, logits: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
    def model(**inputs: Any) -> Any:
        return {"logits": logits}

    (answer,) = task.predict(model, {"pixel_values": torch.zeros(1, 3, 8, 8), "size": torch.tensor([size])})  # type: ignore[arg-type]
    return answer


def test_a_prediction_has_the_picture_s_size_its_shares_and_every_pixel(rows: list[Row]) -> None:
    task, logits = build(rows, classes=GROUPS), torch.randn(1, 3, 2, 2)
    answer = answer_of(task, logits, (7, 5))
    stock = PROCESSOR.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes=[(7, 5)])[0]
    assert answer["size"] == [5, 7]
    assert np.array_equal(classes_of_runs(answer), stock.numpy())
    shares = [(stock == c).float().mean().item() for c in range(3)]
    assert list(answer["shares"]) == ["thing", "sky", "sea"]
    assert list(answer["shares"].values()) == pytest.approx(shares)
    assert task.describe({"shares": {"thing": 0.25, "sky": 0.75, "sea": 0.0}}) == "sky 75.0 %, thing 25.0 %"


def test_a_drawing_shows_the_picture_its_classes_and_their_names(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    answer = {"size": [5, 3], "runs": [[0, 5], [2, 10]]}
    drawn = task.draw(rows[0], answer)
    assert drawn.size == (10, 3 + 2 * 16)
    pixels = np.asarray(drawn)
    assert (pixels[:3, :5] == np.asarray(Image.open(rows[0]["image"]))).all()
    colors = {tuple(color) for color in pixels[:3, 5:].reshape(-1, 3).tolist()}
    assert len(colors) == 2
    assert (pixels[0, 5:] == pixels[0, 5]).all()


@pytest.mark.parametrize("values", [(7, 1, 300), (7, 1, 9)])
def test_a_mask_has_the_values_of_the_training_masks(rows: list[Row], tmp_path: Path, values: tuple[int, ...]) -> None:
    task = replace(build(rows, classes=GROUPS), values=tuple((value, 2) for value in values))
    answer = {"size": [4, 2], "runs": [[0, 3], [2, 4], [1, 1]]}
    task.mask(answer).save(tmp_path / "mask.png")
    a, b, c = values
    assert read_mask(str(tmp_path / "mask.png"), "").tolist() == [[a, a, a, c], [c, c, c, b]]
    if max(values) < 256:
        with Image.open(tmp_path / "mask.png") as image:
            assert image.convert("RGB").getpixel((0, 0)) == class_color(0)


def test_an_example_is_drawn_with_its_classes_laid_over(rows: list[Row]) -> None:
    task = build(rows, classes=GROUPS)
    example = encoded(task, rows)[0]
    seen = np.asarray(seen_picture(PROCESSOR, task.collate([example])["pixel_values"][0]).resize((320, 320), 0))
    drawn = np.asarray(task.draw_example(example, seed=1))
    assert drawn.shape == (320 + 3 * 16, 320, 3)
    classes = np.asarray(Image.fromarray(np.array(CLASSES_ONE, dtype=np.uint8)).resize((320, 320), 0))
    for c in range(3):
        here = classes == c
        expected = (seen[here].astype(float) + np.array(class_color(c))) / 2
        assert np.abs(drawn[:320][here] - expected).max() <= 1
    assert (drawn[:320][classes == 255] == seen[classes == 255]).all()


# Models


@pytest.mark.parametrize("family", ["segformer", "beit", "dpt"])
def test_the_architectures_that_it_is_for_learn(rows: list[Row], family: str) -> None:
    import transformers as t

    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {**small, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    config = {
        "segformer": lambda: t.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 24],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        "beit": lambda: t.BeitConfig(**vision, out_indices=[1, 2, 3, 4], use_auxiliary_head=False),
        "dpt": lambda: t.DPTConfig(
            **vision, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
        ),
    }[family]()
    processor = SegformerImageProcessorPil(size={"height": 16, "width": 16})
    task = build(rows, classes=GROUPS, processor=processor)
    for key, value in task.config().items():
        setattr(config, key, value)
    model = t.AutoModelForSemanticSegmentation.from_config(config).eval()
    batch = task.collate(encoded(task, rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        outputs = task.forward(model, batch)
        assert task.logits(outputs).shape[:2] == (2, 3)
        loss = task.loss(outputs, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_stock_model_s_own_loss_is_ours_where_masks_have_one_size(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    rng = np.random.default_rng(1)
    rows = [row_of(tmp_path, name, rng.choice([1, 7, 300], size=(8, 8))) for name in "ab"]
    task = build(rows, classes=GROUPS)
    config = SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[1],
        hidden_sizes=[8],
        patch_sizes=[3],
        strides=[2],
        num_attention_heads=[1],
        mlp_ratios=[2],
        decoder_hidden_size=8,
        **task.config(),
    )
    model = SegformerForSemanticSegmentation(config).eval()
    batch = task.collate(encoded(task, rows))
    theirs = model(pixel_values=batch["pixel_values"], labels=batch["mask"].long()).loss
    ours = task.loss(task.forward(model, batch), batch) / task.weight(batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
