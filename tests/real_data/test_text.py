"""Tasks of text beyond classification on real data: entities in posts, answers in articles, words in plays."""

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import assert_better, better_than_the_head, merged, predicted, stock, trained

TAGS = """
import json, sys
from transformers import pipeline
tag = pipeline("token-classification", sys.argv[1], ignore_labels=[])
for line in sys.stdin:
    (found,) = tag([json.loads(line)], is_split_into_words=True)
    print(json.dumps({token["start"]: token["entity"] for token in found}))
"""

ANSWERS = """
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
"""

FILLINGS = """
import json, sys
from transformers import pipeline
fill = pipeline("fill-mask", sys.argv[1])
for row in map(json.loads, sys.stdin):
    masks = [{"token": f["token_str"], "probability": f["score"]} for f in fill(row["text"])]
    inputs = fill.tokenizer(row["text"], return_tensors="pt")
    word = fill.tokenizer(row["word"], add_special_tokens=False)["input_ids"][0]
    logits = fill.model(**inputs).logits[0, inputs["input_ids"][0].tolist().index(fill.tokenizer.mask_token_id)]
    print(json.dumps({"masks": masks, "log_probability": logits.log_softmax(-1)[word].item()}))
"""


def test_entities_are_found_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.entities(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    few = case.rows[:100]
    theirs = stock(TAGS, merged(ticktune, case, "ours", tmp_path), lines=[row["tokens"] for row in few])
    for answer, row, tags in zip(ours, few, theirs, strict=False):
        starts = [len(" ".join(row["tokens"][:k])) + (k > 0) for k in range(len(row["tokens"]))]
        assert answer["tags"] == [tags[str(start)] for start in starts]
    assert sum(len(answer["entities"]) for answer in ours) > 50


def test_questions_are_answered_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.questions(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    theirs = stock(ANSWERS, merged(ticktune, case, "ours", tmp_path), lines=case.rows[:60])
    assert [answer["answer"] for answer in ours[:60]] == theirs


def test_a_small_bert_learns_more_shakespeare(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.domain(data_folder, tmp_path)
    document = trained(ticktune, case.path, [*case.ours(), "output=ours"], tmp_path)
    assert document["metrics"]["perplexity"] < 0.95 * document["base_metrics"]["perplexity"]
    ours = predicted(ticktune, "ours", case.file(tmp_path), tmp_path)
    before = stock(FILLINGS, tmp_path / "base", lines=case.rows)
    after = stock(FILLINGS, merged(ticktune, case, "ours", tmp_path), lines=case.rows)
    assert_better(case, before, after)
    for answer, found in zip(ours, after, strict=True):
        (mine,) = answer["masks"]
        assert [filling["token"] for filling in mine] == [filling["token"] for filling in found["masks"]]
        probabilities = [filling["probability"] for filling in found["masks"]]
        assert [filling["probability"] for filling in mine] == pytest.approx(probabilities, abs=1e-4)


def test_an_answer_outside_of_its_context_is_named(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.questions(data_folder, tmp_path)
    spoiled = [*case.rows[:3], {**case.rows[3], "answers": {"text": ["nowhere"], "answer_start": [0]}}]
    file = cases.write_rows(tmp_path / "spoiled.jsonl", spoiled)
    done = ticktune("train", case.path, *case.words, f"data.train={file}", "output=run", cwd=tmp_path)
    assert done.returncode == 4
    assert f"{file}:4" in done.stderr
    assert json.dumps("nowhere").strip('"') in done.stderr
