"""Tasks of text beyond classification on real data: entities in posts, answers in articles, words in plays."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.real_data.bootstrap import interval

RECIPES = Path(__file__).parents[2] / "recipes"
ALONE = ["ticks.dim=0", "norms.train=none"]

STOCK_TAGS = """
import json, sys
from transformers import pipeline
tag = pipeline("token-classification", sys.argv[1], ignore_labels=[])
for line in sys.stdin:
    (found,) = tag([json.loads(line)], is_split_into_words=True)
    print(json.dumps({token["start"]: token["entity"] for token in found}))
assert "ticktune" not in sys.modules
"""


def stock(program: str, folder: Path, lines: list[Any]) -> list[Any]:
    """What a program without ticktune says, in a process of its own: a JSON document for each that it is given."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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


def first_rows(source: Path, count: int, target: Path) -> list[dict[str, Any]]:
    """Copies the first rows of a jsonl file; returns them."""
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [json.loads(line) for line in lines]


def merged(ticktune: Run, folder: Path) -> Path:
    """Merges the run ``ours`` and returns the merged folder."""
    done = ticktune("export", "ours", "--merge", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert found["is_conclusive"]
    assert found["max_difference"] <= found["tolerance"]
    return folder / "ours/merged"


@pytest.mark.slow
def test_entities_learn_more_than_the_head_and_merge_into_a_stock_tagger(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    from ticktune.tasks.token_classification import spans_of

    # Most posts name nothing; those that do teach more in as many steps.
    lines = (data_folder / "wnut17/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([line for line in lines if '"B-' in line][:640]), encoding="utf-8")
    words = [f"data.train.path={tmp_path}/train.jsonl", "data.validation.limit=80", "data.test.limit=24"]
    words += ["training={steps: 40, batch_size: 16, precision: fp32}", "evaluation.every=40"]
    document = trained(ticktune, RECIPES / "entities.yaml", [*words, "output=ours"], tmp_path)
    trained(ticktune, RECIPES / "entities.yaml", [*words, *ALONE, "optimizer.head_lr=1e-2", "output=head"], tmp_path)
    assert document["metrics"]["f1"] > 0.2

    rows = first_rows(data_folder / "wnut17/test.jsonl", 240, tmp_path / "rows.jsonl")
    ours, head = (predicted(ticktune, run, "rows.jsonl", tmp_path) for run in ("ours", "head"))

    def f1(answer: dict[str, Any], row: dict[str, Any]) -> float:
        guessed, true = (set(spans_of(tags, marked=True)) for tags in (answer["tags"], row["ner_tags"]))
        return 2 * len(guessed & true) / (len(guessed) + len(true)) if guessed | true else 1.0

    scores = [[f1(answer, row) for answer, row in zip(answers, rows, strict=True)] for answers in (head, ours)]
    gain, low, high = interval(*scores)
    assert low > 0, (document["metrics"], [sum(s) / len(s) for s in scores], gain, low, high)

    theirs = stock(STOCK_TAGS, merged(ticktune, tmp_path), [row["tokens"] for row in rows])
    for answer, row, tags in zip(ours, rows, theirs, strict=True):
        starts = [len(" ".join(row["tokens"][:k])) + (k > 0) for k in range(len(row["tokens"]))]
        assert answer["tags"] == [tags[str(start)] for start in starts]
    assert sum(len(answer["entities"]) for answer in ours) > 50
