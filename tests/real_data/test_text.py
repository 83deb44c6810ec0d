"""Tasks of text beyond classification on real data: entities in posts, answers in articles, words in plays."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.real_data import pretrain
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

STOCK_ANSWERS = """
import json, sys, torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
tokenizer, model = (a.from_pretrained(sys.argv[1]) for a in (AutoTokenizer, AutoModelForQuestionAnswering))
for line in sys.stdin:
    row = json.loads(line)
    encoded = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    with torch.no_grad():
        found = model(**encoded)
    starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
    inside = [k for k, part in enumerate(parts) if part == 1]
    spans = [(starts[a] + ends[b], a, b) for a in inside for b in inside if a <= b < a + 30]
    _, first, last = max(spans)
    print(json.dumps(row["context"][offsets[first][0] : offsets[last][1]]))
assert "ticktune" not in sys.modules
"""

STOCK_FILLINGS = """
import json, sys
from transformers import pipeline
fill = pipeline("fill-mask", sys.argv[1])
for line in sys.stdin:
    print(json.dumps([[f["token_str"], f["score"]] for f in fill(json.loads(line))]))
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


def chosen_rows(
    source: Path, count: int, target: Path, is_chosen: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Copies the first rows of a jsonl file that are chosen; returns them."""
    rows = [row for row in map(json.loads, source.read_text(encoding="utf-8").splitlines()) if is_chosen(row)][:count]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


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
    chosen_rows(
        data_folder / "wnut17/train.jsonl", 640, tmp_path / "train.jsonl", lambda row: {*row["ner_tags"]} > {"O"}
    )
    words = [f"data.train.path={tmp_path}/train.jsonl", "data.validation.limit=80", "data.test.limit=24"]
    words += ["training={steps: 40, batch_size: 16, precision: fp32}", "evaluation.every=40"]
    document = trained(ticktune, RECIPES / "entities.yaml", [*words, "output=ours"], tmp_path)
    trained(ticktune, RECIPES / "entities.yaml", [*words, *ALONE, "optimizer.head_lr=1e-2", "output=head"], tmp_path)
    assert document["metrics"]["f1"] > 0.2

    rows = chosen_rows(data_folder / "wnut17/test.jsonl", 240, tmp_path / "rows.jsonl")
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


@pytest.mark.slow
def test_answers_learn_more_than_the_head_and_merge_into_a_stock_reader(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    from ticktune.tasks.question_answering import word_f1

    folder = data_folder / "squad_v1_dev"
    # Short contexts: MiniLM never learned to answer, and learns what there is in a minute from many rather than long.
    chosen_rows(folder / "train.jsonl", 640, tmp_path / "train.jsonl", lambda row: len(row["context"]) < 550)
    chosen_rows(folder / "validation.jsonl", 24, tmp_path / "validation.jsonl", lambda row: len(row["context"]) < 650)
    rows = chosen_rows(folder / "test.jsonl", 200, tmp_path / "rows.jsonl", lambda row: len(row["context"]) < 700)
    words = [f"data.{name}.path={tmp_path}/{name}.jsonl" for name in ("train", "validation")]
    words += [f"data.test={tmp_path}/validation.jsonl", "training={steps: 50, batch_size: 16, precision: fp32}"]
    words += ["evaluation.every=50"]
    document = trained(ticktune, RECIPES / "questions.yaml", [*words, "output=ours"], tmp_path)
    trained(ticktune, RECIPES / "questions.yaml", [*words, *ALONE, "optimizer.head_lr=1e-2", "output=head"], tmp_path)
    assert document["metrics"]["loss"] < document["base_metrics"]["loss"] - 0.8

    ours, head = (predicted(ticktune, run, "rows.jsonl", tmp_path) for run in ("ours", "head"))
    scores = [
        [word_f1(answer["answer"], row["answers"]["text"]) for answer, row in zip(answers, rows, strict=True)]
        for answers in (head, ours)
    ]
    gain, low, high = interval(*scores)
    assert low > 0, (document["metrics"], [sum(s) / len(s) for s in scores], gain, low, high)

    theirs = stock(STOCK_ANSWERS, merged(ticktune, tmp_path), rows)
    assert [answer["answer"] for answer in ours] == theirs


@pytest.mark.slow
def test_a_small_bert_learns_more_shakespeare_and_merges_into_a_stock_guesser(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    base = pretrain.masked_model(data_folder, tmp_path / "base")
    text = (data_folder / "tinyshakespeare/train.txt").read_text(encoding="utf-8")
    (tmp_path / "rest.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
    validation = (data_folder / "tinyshakespeare/validation.txt").read_text(encoding="utf-8")
    (tmp_path / "validation.txt").write_text(validation[:12_000], encoding="utf-8")
    words = [f"base.model={base}", f"data.train={tmp_path}/rest.txt", f"data.validation={tmp_path}/validation.txt"]
    words += [f"data.test={tmp_path}/validation.txt", "data.max_length=64", "evaluation.every=120"]
    words += ["training={steps: 120, batch_size: 32, precision: fp32}", "optimizer={lr: 3e-3, norm_lr: 5e-3}"]
    document = trained(ticktune, RECIPES / "domain.yaml", [*words, "output=ours"], tmp_path)
    assert document["metrics"]["perplexity"] < 0.95 * document["base_metrics"]["perplexity"]

    # The head for masked words is part of the base, and no other would do: the head alone is the base as it is.
    masked, hidden = masked_lines(data_folder / "tinyshakespeare/test.txt", 600)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": m}) + "\n" for m in masked), encoding="utf-8")
    ours = [answer["masks"][0] for answer in predicted(ticktune, "ours", "rows.jsonl", tmp_path)]
    before = stock(STOCK_FILLINGS, base, masked)
    scores = [
        [
            1 / (1 + fillings.index(word)) if word in fillings else 0.0
            for fillings, word in zip(all_, hidden, strict=True)
        ]
        for all_ in ([[t for t, _ in each] for each in before], [[f["token"] for f in each] for each in ours])
    ]
    gain, low, high = interval(*scores)
    assert low > 0, (document["metrics"], [sum(s) / len(s) for s in scores], gain, low, high)

    after = stock(STOCK_FILLINGS, merged(ticktune, tmp_path), masked)
    assert [[f["token"] for f in each] for each in ours] == [[token for token, _ in each] for each in after]
    probabilities = [f["probability"] for each in ours for f in each]
    assert probabilities == pytest.approx([score for each in after for _, score in each], abs=1e-4)


def masked_lines(path: Path, count: int) -> tuple[list[str], list[str]]:
    """Lines with one word masked, another place in each, and the word."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) > 4][:count]
    masked, hidden = [], []
    for number, words in enumerate(lines):
        place = number % (len(words) - 1)
        word = words[place].strip(",.;:!?'").lower()
        if word.isalpha():
            masked.append(" ".join([*words[:place], "[MASK]", *words[place + 1 :]]))
            hidden.append(word)
    return masked, hidden
