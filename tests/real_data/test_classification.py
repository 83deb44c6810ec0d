"""Text classification on real data: praise in two languages, several labels, and pairs with a number."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import better_than_the_head, merged, stock

LABELS = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1])
for line in sys.stdin:
    print(json.dumps(classify(json.loads(line), truncation=True, max_length=int(sys.argv[2]))))
"""

GENRES = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1])
for row in map(json.loads, sys.stdin):
    words = {"text": row["title"], "text_pair": f"seen with: {row['near']}"}
    found = classify(words, top_k=None, truncation=True, max_length=64)
    print(json.dumps({one["label"]: one["score"] for one in found}))
"""

SCORES = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1])
for row in map(json.loads, sys.stdin):
    words = {"text": row["sentence1"], "text_pair": row["sentence2"]}
    print(json.dumps(classify(words, function_to_apply="none", truncation=True, max_length=48)["score"]))
"""


@pytest.mark.parametrize(("name", "column", "length"), [("sentiment", "sentence", "64"), ("reviews", "text", "48")])
def test_praise_is_told_better_than_by_the_head_alone(
    name: str, column: str, length: str, data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    case = getattr(cases, name)(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    texts = [row[column] for row in case.rows[:100]]
    theirs = stock(LABELS, merged(ticktune, case, "ours", tmp_path), length, lines=texts)
    for answer, (found,) in zip(ours, theirs, strict=False):
        assert answer["label"] == found["label"]
        assert answer["probability"] == pytest.approx(found["score"], abs=1e-4)


def test_genres_of_films_are_told_better_than_by_the_head_alone(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    case = cases.genres(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    theirs = stock(GENRES, merged(ticktune, case, "ours", tmp_path), lines=case.rows[:100])
    for answer, found in zip(ours, theirs, strict=False):
        assert answer["probabilities"] == pytest.approx(found, abs=1e-4)
        assert set(answer["labels"]) == {name for name, p in answer["probabilities"].items() if p > 0.35}
    assert max(len(answer["labels"]) for answer in ours) > 1


def test_sentences_are_compared_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.pairs(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    values, scores = [answer["value"] for answer in ours], [row["score"] for row in case.rows]
    assert np.corrcoef(values, scores)[0, 1] > 0.5
    assert spearmanr(values, scores).statistic > 0.5
    theirs = stock(SCORES, merged(ticktune, case, "ours", tmp_path), lines=case.rows[:100])
    assert values[:100] == pytest.approx(theirs, abs=1e-3)
