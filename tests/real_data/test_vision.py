"""Pictures, by small models that learned a part of the same data first: digits, scenes, digits in scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import better_than_the_head, document, merged, stock, trained
from ticktune.tasks.semantic_segmentation import classes_of_runs

LABELS = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1])
for line in sys.stdin:
    print(json.dumps(classify(json.loads(line), top_k=1)[0]))
"""

MASKS = """
import json, sys
import numpy as np
from transformers import pipeline
segment = pipeline("image-segmentation", sys.argv[1])
for line in sys.stdin:
    found = {one["label"]: np.asarray(one["mask"]) > 0 for one in segment(json.loads(line))}
    label = np.full(next(iter(found.values())).shape, -1)
    for name, mask in found.items():
        label[mask] = segment.model.config.label2id[name]
    print(json.dumps(label.ravel().tolist()))
"""

BOXES = """
import json, sys
from transformers import pipeline
detect = pipeline("object-detection", sys.argv[1])
for line in sys.stdin:
    print(json.dumps(detect(json.loads(line), threshold=0.5)))
"""


def test_digits_are_told_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.digits(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    found = stock(LABELS, merged(ticktune, case, "ours", tmp_path), lines=[row["image"] for row in case.rows])
    assert [one["label"] for one in found] == [one["label"] for one in ours]
    assert [one["score"] for one in found] == pytest.approx([one["probability"] for one in ours], abs=1e-4)


def test_scenes_are_told_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.scenes(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    some = [row["image"] for row in case.rows[:20]]
    masks = stock(MASKS, merged(ticktune, case, "ours", tmp_path), lines=some)
    for path, one, found in zip(some, ours, masks, strict=False):
        assert (classes_of_runs(one).ravel() != np.array(found)).mean() < 1e-3, path


def test_digits_in_scenes_are_found(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.objects(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    metrics = document(ticktune("eval", "ours", cwd=tmp_path))["metrics"]
    assert metrics["map50"] >= 0.3

    some = [row["image"] for row in case.rows[:40]]
    for answer, found in zip(ours, stock(BOXES, merged(ticktune, case, "ours", tmp_path), lines=some), strict=False):
        found.sort(key=lambda one: -one["score"])
        assert [one["label"] for one in found] == [one["label"] for one in answer["objects"]]
        for one, thing in zip(found, answer["objects"], strict=True):
            left, top, width, height = thing["box"]
            corners = [one["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == pytest.approx([left, top, left + width, top + height], abs=1.01)  # whole pixels there


def test_everyday_things_are_read_scored_and_learned_from(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    # From nothing: 128 pictures teach no detector, but its loss must fall, on every kind of row that they hold.
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    shape = {"image_size": [64, 64], "patch_size": 8, "num_detection_tokens": 20, "use_mid_position_embeddings": False}
    YolosForObjectDetection(YolosConfig(**small, **shape)).save_pretrained(tmp_path / "base")
    YolosImageProcessorPil(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(tmp_path / "base")
    words = [f"base.model={tmp_path}/base", "training={batch_size: 16, epochs: 4, precision: fp32}", "output=run"]
    words += ["optimizer={lr: 2e-3, norm_lr: 3e-3, head_lr: 3e-3}", "evaluation.metric=loss"]
    found = trained(ticktune, cases.ROOT / "recipes/objects.yaml", words, tmp_path)
    assert found["metrics"]["loss"] < 0.95 * found["base_metrics"]["loss"]  # four passes over 128 pictures
    assert 0 <= found["metrics"]["map"] <= found["metrics"]["map50"] <= 1
    evaluated = document(ticktune("eval", "run", "--split", "validation", cwd=tmp_path))
    assert evaluated["rows"] == 64
    assert evaluated["metrics"] == pytest.approx(found["metrics"], abs=1e-5)
    rows = data_folder / "coco128/test/metadata.jsonl"
    done = ticktune("predict", "run", rows, "--draw", "drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = [json.loads(line)["size"] for line in done.stdout.splitlines()]
    assert sizes == [[one["width"], one["height"]] for one in cases.read_rows(rows)]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 64
