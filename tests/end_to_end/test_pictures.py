"""Tasks of pictures by the command line: training, predictions as JSON, drawings, and rows that cannot be used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Run


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    """A folder with pictures and masks of two classes, a tiny SegFormer and a recipe."""
    from transformers import SegformerConfig, SegformerImageProcessorPil, SegformerModel

    torch.manual_seed(0)
    SegformerModel(
        SegformerConfig(
            num_encoder_blocks=1,
            depths=[1],
            sr_ratios=[1],
            hidden_sizes=[16],
            patch_sizes=[3],
            strides=[2],
            num_attention_heads=[2],
            mlp_ratios=[2],
            decoder_hidden_size=8,
        )
    ).save_pretrained(tmp_path / "base")
    SegformerImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        mask = np.zeros((12, 18), dtype=np.uint8)
        mask[:, : rng.integers(4, 14)] = 5
        Image.fromarray(np.where(mask[..., None] == 5, 220, 30).astype(np.uint8).repeat(3, 2)).save(
            tmp_path / f"p{i}.png"
        )
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
        lines.append(json.dumps({"image": f"p{i}.png", "mask": f"m{i}.png"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:6]))
    (tmp_path / "other.jsonl").write_text("\n".join(lines[6:]))
    (tmp_path / "recipe.yaml").write_text(
        "task: semantic-segmentation\nbase: {model: base}\nticks: {dim: 8}\n"
        "data: {train: rows.jsonl, validation: other.jsonl, classes: {dark: 0, light: [5]}}\n"
        "optimizer: {lr: 3e-3, norm_lr: 1e-2, head_lr: 3e-2}\n"
        "training: {steps: 30, batch_size: 4, precision: fp32}\noutput: run\n"
    )
    return tmp_path


def test_a_segmenter_learns_predicts_draws_and_merges(segmenter: Path, ticktune: Run) -> None:
    done = ticktune("train", "recipe.yaml", cwd=segmenter)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["pixel_accuracy"] > 0.9
    done = ticktune("predict", "run", "other.jsonl", "--draw", "drawn", cwd=segmenter)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["size"] for answer in answers] == [[18, 12]] * 2
    assert sorted(path.name for path in (segmenter / "drawn").iterdir()) == [
        "p6-1-mask.png", "p6-1.png", "p7-2-mask.png", "p7-2.png"
    ]  # fmt: skip
    # The mask is one to train on.
    found, truth = (np.asarray(Image.open(segmenter / name)) for name in ("drawn/p6-1-mask.png", "m6.png"))
    assert found.shape == truth.shape
    assert (found == truth).mean() > 0.8
    with Image.open(segmenter / "drawn/p6-1.png") as drawn:
        assert drawn.size[0] == 36
    (segmenter / "more/deep").mkdir(parents=True)
    for old, new in (("p6.png", "more/b.PNG"), ("p7.png", "more/deep/a.png"), ("rows.jsonl", "more/rows.jsonl")):
        shutil.copy(segmenter / old, segmenter / new)
    done = ticktune("predict", "run", "more", "p6.png", cwd=segmenter)
    of_folder = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["more/b.PNG", "more/deep/a.png", "p6.png"]
    assert of_folder == [{"image": n, **a} for n, a in zip(names, [*answers, answers[0]], strict=True)]
    merged = json.loads(ticktune("export", "run", "--merge", cwd=segmenter).stdout)
    assert merged["verification"]["changed"] == 0


def test_pictures_that_are_not_there_are_named(segmenter: Path, ticktune: Run) -> None:
    assert ticktune("train", "recipe.yaml", "training.steps=1", cwd=segmenter).returncode == 0
    (segmenter / "empty").mkdir()
    done = ticktune("predict", "run", "empty", cwd=segmenter)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error[usage]: empty: the folder holds no file that ends in .jpg" in done.stderr
    done = ticktune("predict", "run", "p6.png", "gone.png", cwd=segmenter)
    assert (done.returncode, done.stdout) == (4, "")
    assert "there is no file 'gone.png'" in done.stderr


def test_inspect_shows_and_draws_an_example_and_a_bad_mask_is_named(segmenter: Path, ticktune: Run) -> None:
    document = json.loads(ticktune("inspect", "recipe.yaml", "--draw", "drawn", cwd=segmenter).stdout)
    assert document["drawing"] == "drawn/p0-1.png"
    with Image.open(segmenter / document["drawing"]) as drawn:
        assert drawn.size == (320, 320 + 2 * 16)
    shown = document["example"]
    assert [piece["kind"] for piece in shown] == ["context", "learned"]
    assert shown[0]["text"].endswith("p0.png (18 x 12)")
    Image.new("L", (12, 18)).save(segmenter / "m7.png")
    done = ticktune("train", "recipe.yaml", cwd=segmenter)
    assert done.returncode == 4
    assert "other.jsonl:2" in done.stderr
    assert "the mask has 12 x 18 pixels, its picture 18 x 12" in " ".join(done.stderr.split())


def test_drawings_of_a_task_without_any_are_refused(tiny_bert: Path, ticktune: Run, tmp_path: Path) -> None:
    from tests.end_to_end.support import classification

    recipe = classification(tmp_path, tiny_bert)
    done = ticktune("inspect", recipe, "--draw", "drawn", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "examples of text-classification cannot be drawn" in done.stderr
    assert ticktune("train", recipe, "training={epochs: 1}", cwd=tmp_path).returncode == 0
    done = ticktune("predict", "runs/tiny", "w1 w2", "--draw", "drawn", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "answers of text-classification cannot be drawn" in done.stderr
    assert not (tmp_path / "drawn").exists()
