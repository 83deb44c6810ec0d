"""What people take next, on real data: a base that learned from some people, fine-tuned on others."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.bootstrap import interval
from tests.real_data.cases import read_rows
from tests.real_data.commands import document, merged, predicted, stock, trained
from ticktune.folder import find_target
from ticktune.prepare import load_target
from ticktune.tasks.next_item import NextItem
from ticktune.tasks.task import IGNORED, Batch, EncodingReport, Row

NEXT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
for row in map(json.loads, sys.stdin):
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(row["history"])]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids[-63:]])).logits[0, -1]
    scores[ids + tokenizer.all_special_ids] = -torch.inf
    best = scores.softmax(-1).topk(10)
    found = zip(tokenizer.convert_ids_to_tokens(best.indices), best.values.tolist())
    print(json.dumps({"items": [{"item": item, "probability": value} for item, value in found]}))
"""


def test_the_next_film_is_told_better_than_by_the_base_and_by_what_most_people_take(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    case = cases.next_item(data_folder, tmp_path)
    trained(ticktune, case.path, [*case.ours(), "data.validation=null", "output=run"], tmp_path)
    used = load_target(find_target(str(tmp_path / "run")), precision="fp32")
    task = used.task
    assert isinstance(task, NextItem)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    known = [*read_rows(tmp_path / "base.jsonl"), *read_rows(tmp_path / "train.jsonl")]
    test = read_rows(tmp_path / "test.jsonl")
    after = by_person(task, test, lambda batch: used.model.eval()(**task.inputs(batch)).logits)
    before = {
        "base": by_person(task, test, lambda batch: base(**task.inputs(batch)).logits),
        "popularity": by_person(task, test, popularity(task, known)),
    }
    ours = [mean(gains) for gains in after]
    for name, gains in before.items():
        theirs = [mean(one) for one in gains]
        gain, low, high = interval(theirs, ours)
        sys.stderr.write(f"{name}: {mean(theirs):.4f} -> {mean(ours):.4f}, {gain:+.4f} [{low:.4f}, {high:.4f}]\n")
        assert low > 0, (name, mean(theirs), mean(ours), gain, low, high)

    evaluated = ticktune("eval", "run", "--precision", "fp32", cwd=tmp_path)
    metrics = document(evaluated)["metrics"]
    films = [film for row in test for film in row["items"]]
    unknown = sum(film not in task.tokenizer.get_vocab() for film in films)
    assert f"{unknown} of {len(films)} items" in evaluated.stderr
    assert metrics["unknown"] == pytest.approx(unknown / len(films), rel=1e-5)
    assert metrics["ndcg10"] == pytest.approx(mean(gain for gains in after for gain in gains), rel=1e-4)
    answers = predicted(ticktune, "run", case.file(tmp_path), tmp_path)
    # The command scores the same last film as the row's windows did.
    assert case.scores(answers) == pytest.approx([gains[-1] for gains in after], abs=1e-4)
    found = stock(NEXT, merged(ticktune, case, "run", tmp_path), lines=case.rows)
    for one, other in zip(found, answers, strict=True):
        assert [item["item"] for item in one["items"]] == [item["item"] for item in other["items"]]
        shares = [[item["probability"] for item in answer["items"]] for answer in (one, other)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3)


def by_person(task: NextItem, rows: list[Row], logits: Callable[[Batch], Tensor]) -> list[list[float]]:
    """NDCG at each step of each person's row."""
    examples = task.encode(rows, 0, EncodingReport(), labelled=True)
    found: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(examples), 32):
        batch = task.collate(examples[start : start + 32])
        with torch.no_grad():
            places = task.places(logits(batch), batch)
        gains: Iterator[float] = iter(torch.where(places <= 10, 1 / torch.log2(1 + places), 0.0).tolist())
        for example in examples[start : start + 32]:
            found[example["row"]] += [next(gains) for label in example["labels"][1:] if label != IGNORED]
    assert [len(gains) for gains in found] == [len(row["items"]) for row in rows]
    return found


def popularity(task: NextItem, rows: list[Row]) -> Callable[[Batch], Tensor]:
    """Scores a film by how many people took it, whatever stands before."""
    counts = Counter(film for row in rows for film in row["items"])
    scores = torch.zeros(len(task.tokenizer))
    for film, count in counts.items():
        scores[task.tokenizer.convert_tokens_to_ids(film)] += count

    def logits(batch: dict[str, Any]) -> Tensor:
        return scores.expand(*batch["input_ids"].shape, -1)

    return logits
