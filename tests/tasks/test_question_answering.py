"""Question answering: windows, targets, spans across windows, metrics against the reference of SQuAD."""

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from tests.models import WORDS, word_tokenizer
from tests.tasks.test_token_classification import bytes_tokenizer, pieces_tokenizer
from ticktune.data.batches import sorted_batches
from ticktune.errors import DataError, Problem
from ticktune.evaluate import compute_metrics
from ticktune.tasks import question_answering
from ticktune.tasks.question_answering import QuestionAnswering, exact_match, normalized, read_answers, word_f1
from ticktune.tasks.task import EncodingReport, Example, Row, TaskOptions, build_task, restore_task

COLUMNS = ("question", "context", "answers")
FORM = 'write {"text": ["Paris"], "answer_start": [17]}, or a list of {"text": ..., "answer_start": ...}'


def where(i: int) -> str:
    return f"a:b.jsonl:{i + 1}"


def task_of(tokenizer: Any = None, max_length: int = 32, overlap: int = 3, **rest: Any) -> QuestionAnswering:
    return QuestionAnswering(TaskOptions(COLUMNS, max_length, overlap=overlap, **rest), tokenizer or word_tokenizer())


def row(question: str, context: str, *answers: str) -> Row:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def encode(task: QuestionAnswering, *rows: Row, labelled: bool = True) -> list[Example]:
    report = EncodingReport()
    examples = task.encode(rows, 0, report, labelled=labelled)
    assert report == EncodingReport()
    return examples


def refused(call: Any, *arguments: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    (found,) = caught.value.problems
    return found


# Rows


@pytest.mark.parametrize(
    "value",
    [
        {"text": ["w1", "w3"], "answer_start": [0, 6]},
        [{"text": "w1", "answer_start": 0}, {"text": "w3", "answer_start": 6}],
        [{"text": "w1", "start": 0}, {"text": "w3", "start": 6}],
    ],
)
def test_answers_come_in_several_forms(value: Any) -> None:
    assert read_answers(value, "x") == [("w1", 0), ("w3", 6)]
    task_of().check([{"question": "w9", "context": "w1 w2 w3", "answers": value}], where)


def test_a_single_answer_needs_no_list() -> None:
    assert read_answers({"text": "w1", "answer_start": 2}, "x") == [("w1", 2)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("w1", Problem("expected answers with texts and starts, found 'w1'", where(1), FORM)),
        (["w1"], Problem("expected answers with texts and starts, found ['w1']", where(1), FORM)),
        (
            {"text": ["w1"], "answer_start": []},
            Problem(
                "expected answers with texts and starts, found {'text': ['w1'], 'answer_start': []}", where(1), FORM
            ),
        ),
        (
            {"text": ["w1"], "answer_start": ["0"]},
            Problem(
                "expected answers with texts and starts, found {'text': ['w1'], 'answer_start': ['0']}",
                where(1),
                FORM,
            ),
        ),
        (
            {"text": [], "answer_start": []},
            Problem(
                "expected an answer that stands in the context, found {'text': [], 'answer_start': []}",
                where(1),
                "remove questions without an answer",
            ),
        ),
        (
            {"text": ["w2"], "answer_start": [-2]},
            Problem(
                "expected an answer that stands in the context, found {'text': ['w2'], 'answer_start': [-2]}",
                where(1),
                "remove questions without an answer",
            ),
        ),
        (
            {"text": ["w2"], "answer_start": [2]},
            Problem(
                "expected the answer 'w2' at character 2 of the context, found ' w'",
                where(1),
                "it starts at character 3",
            ),
        ),
        (
            {"text": ["w7"], "answer_start": [3]},
            Problem(
                "expected the answer 'w7' at character 3 of the context, found 'w2'",
                where(1),
                "it is not in the context",
            ),
        ),
    ],
)
def test_answers_that_cannot_be_used_are_named(value: Any, expected: Problem) -> None:
    rows = [row("w9", "w1 w2", "w1"), {"question": "w9", "context": "w1 w2", "answers": value}]
    assert refused(task_of().check, rows, where) == expected


def test_a_question_that_leaves_no_room_is_named() -> None:
    task = task_of(max_length=10, overlap=4)
    rows = [row("w9", "w1", "w1"), row("w0 w1 w2 w3 w4 w5", "w1", "w1")]
    message = (
        "the question has 6 tokens, which leaves 4 for the context; windows that share data.overlap = 4 tokens need "
        "more"
    )
    fix = "raise data.max_length, now 10, or lower data.overlap"
    assert refused(task.check, rows, where) == Problem(message, where(1), fix)
    assert refused(lambda: encode(task, *rows, labelled=False)) == Problem(message, "row 2", fix)


def test_a_slow_tokenizer_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    assert "slow tokenizer" in refused(question_answering.build, task_of().options, [], where, slow, None).message


def test_the_task_is_restored() -> None:
    task = build_task("question-answering", task_of().options, [], where, word_tokenizer(), None)
    assert task.config() == {"num_labels": 2, "pad_token_id": 0}
    assert restore_task("question-answering", task.options, task.state(), task.tokenizer) == task


# Examples


def test_the_answer_is_its_first_and_last_token() -> None:
    (example,) = encode(task_of(), row("w9 w8", "w1 w2 w3 w4", "w2 w3"))
    assert example["input_ids"] == [4 + i for i in (9, 8, 1, 2, 3, 4)]
    assert example["starts"] == [-1, -1, 0, 3, 6, 9]
    assert example["ends"] == [-1, -1, 2, 5, 8, 11]
    assert example["target"] == [3, 4]
    assert task_of().show(example) == [("context", "w9 w8 w1 w2 w3 w4"), ("learned", "w2 w3")]


def test_an_answer_inside_a_word_is_the_pieces_that_it_touches() -> None:
    (example,) = encode(task_of(pieces_tokenizer()), row("a", "abcd. ef", "bc"))
    first, last = example["target"]
    assert example["context"][example["starts"][first] : example["ends"][last]] == "bc"


def test_spaces_around_an_answer_change_nothing() -> None:
    (plain,) = encode(task_of(bytes_tokenizer()), row("a", "a b c", "b"))
    spaced = {"question": " a ", "context": "a b c", "answers": {"text": [" b"], "answer_start": [1]}}
    (example,) = encode(task_of(bytes_tokenizer()), spaced)
    assert example["target"] == plain["target"]
    assert example["input_ids"] == plain["input_ids"]


@pytest.mark.parametrize("seed", range(10))
def test_windows_share_the_overlap_and_learn_the_answer_where_all_of_it_is(seed: int) -> None:
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(rng.randint(1, 50))]
    first = rng.randrange(len(words))
    last = min(len(words) - 1, first + rng.randint(0, 5))
    context = " ".join(words)
    start = len(" ".join(words[:first])) + (first > 0)
    answers = {"text": [" ".join(words[first : last + 1])], "answer_start": [start]}
    task = task_of(max_length=12, overlap=rng.randint(0, 9))
    examples = encode(task, {"question": "w59 w58", "context": context, "answers": answers})
    pieces = [[i - 4 for i in example["input_ids"][2:]] for example in examples]
    assert pieces[0][0] == 0
    assert pieces[-1][-1] == len(words) - 1
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert after[0] == before[-1] + 1 - task.options.overlap
    for piece, example in zip(pieces, examples, strict=True):
        is_inside = piece[0] <= first and last <= piece[-1]
        assert example["target"] == ([2 + first - piece[0], 2 + last - piece[0]] if is_inside else [0, 0])
        if not is_inside:
            assert task.show(example)[1] == ("learned", "(not in this window)")


# Predictions


def predicted(task: QuestionAnswering, given: Row, starts: dict[str, float], ends: dict[str, float]) -> dict[str, Any]:
    """The answer of a model that gives words these logits, 0 to all others."""
    tokenizer = task.tokenizer

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            tables = [torch.zeros(len(tokenizer)), torch.zeros(len(tokenizer))]
            for table, values in zip(tables, (starts, ends), strict=True):
                for word, value in values.items():
                    table[tokenizer.convert_tokens_to_ids(word)] = value
            return {"start_logits": tables[0][input_ids], "end_logits": tables[1][input_ids]}

    examples = encode(task, given, labelled=False)
    answers = [a for e in examples for a in task.predict(Model(), task.collate([e]))]
    return task.join(answers)


def test_the_best_spans_of_all_windows_with_their_probabilities() -> None:
    task = task_of(max_length=7, overlap=2)
    context = " ".join(f"w{i}" for i in range(1, 13))
    starts, ends = {"w2": 3.0, "w9": 5.0, "w5": 1.0}, {"w3": 2.0, "w9": 1.0, "w10": 4.0, "w8": 9.0, "w59": 50.0}
    answer = predicted(task, {"question": "w59 w58", "context": context}, starts, ends)
    # The reference: every span of every window.
    spans: list[tuple[float, int, int]] = []
    for first in range(1, 13, 3):
        window = range(first, min(first + 5, 13))
        spans += [(starts.get(f"w{a}", 0.0) + ends.get(f"w{b}", 0.0), a, b) for a in window for b in window if b >= a]
        if window[-1] == 12:
            break
    total = sum(math.exp(score) for score, _, _ in spans)
    best: list[tuple[float, int, int]] = []
    for span in sorted(spans, reverse=True):
        if span not in best:
            best.append(span)
    # w9 cannot begin what w8 ends, and the question is no answer.
    assert best[0][1:] == (5, 8)
    assert [n["score"] for n in answer["n_best"]] == pytest.approx([math.exp(s) / total for s, _, _ in best[:3]])
    assert answer["answer"] == answer["n_best"][0]["answer"] == context[answer["start"] : answer["end"]]
    assert len({(n["start"], n["end"]) for n in answer["n_best"]}) == 3
    assert answer["answer"] == "w5 w6 w7 w8"
    assert task.describe(answer) == f"w5 w6 w7 w8  {answer['score']:.4f}  at {answer['start']}-{answer['end']}"


def test_an_answer_has_at_most_thirty_tokens() -> None:
    words = [f"w{i}" for i in range(50)]
    task = task_of(max_length=64)
    given = {"question": "w59", "context": " ".join(words)}
    assert predicted(task, given, {"w0": 9.0}, {"w29": 5.0, "w30": 9.0})["answer"] == " ".join(words[:30])


def test_an_empty_context_has_no_answer() -> None:
    task = task_of(pieces_tokenizer())
    answer = predicted(task, {"question": "a", "context": ""}, {}, {})
    assert answer == {"answer": "", "score": 0.0, "start": 0, "end": 0, "n_best": []}
    assert task.describe(answer) == "(none)  0.0000"


# Loss and metrics


def test_answers_are_compared_as_torchmetrics_does() -> None:
    from torchmetrics.functional.text import squad

    cases = [
        ("The  Denver Broncos!", ["Denver Broncos", "broncos"]),
        ("Denver", ["Denver Broncos"]),
        ("the", ["a"]),
        ("", ["x"]),
        ("x y z x", ["x x", "y"]),
        ("24\u201310", ["24-10"]),
        ("no", ["yes"]),
    ]
    for answer, truths in cases:
        theirs = squad(
            [{"prediction_text": answer, "id": "1"}],
            [{"answers": {"answer_start": [0] * len(truths), "text": truths}, "id": "1"}],
        )
        assert 100 * exact_match(answer, truths) == pytest.approx(float(theirs["exact_match"]))
        # Its F1 of two answers of which nothing is left is 0; SQuAD 2's script, and ours, say 1.
        if any(normalized(text) for text in (answer, *truths)):
            assert 100 * word_f1(answer, truths) == pytest.approx(float(theirs["f1"]), abs=1e-4)
    assert word_f1("the", ["a"]) == 1.0


def labelled_rows() -> list[Row]:
    """Seven rows with contexts of one window and more, answers of one word and more."""
    rng = random.Random(5)
    rows = []
    for n in (1, 40, 6, 25, 3, 12, 18):
        context = " ".join(rng.choice(WORDS[4:]) for _ in range(n))
        words = context.split()
        first = rng.randrange(n)
        start = len(" ".join(words[:first])) + (first > 0)
        answer = " ".join(words[first : first + rng.randint(1, 3)])
        answers = {"text": [answer, words[0]], "answer_start": [start, 0]}
        rows.append({"question": "w1 w2", "context": context, "answers": answers})
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_metrics_are_those_of_rows_whatever_their_windows_and_batches(smoothing: float) -> None:
    from torchmetrics.text import SQuAD

    rows = labelled_rows()
    task = task_of(max_length=14, overlap=4, label_smoothing=smoothing)
    task.check(rows, where)
    examples = encode(task, *rows)
    assert len(examples) > 10
    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(e["length"], 2, generator=generator) for e in examples]

    def padded(numbers: list[int], batch: dict[str, Any]) -> torch.Tensor:
        out = torch.full((*batch["input_ids"].shape, 2), 100.0)  # what stands at padding must not matter
        for i, n in enumerate(numbers):
            out[i, : len(logits[n])] = logits[n]
        return out

    metrics = task.metrics()
    trained = 0.0
    for numbers in sorted_batches([e["length"] for e in examples], 4):
        batch = task.collate([examples[n] for n in numbers])
        given = padded(numbers, batch)
        task.update(metrics, given, batch)
        trained += float(task.loss({"start_logits": given[..., 0], "end_logits": given[..., 1]}, batch))
    found = compute_metrics(metrics)

    reference = SQuAD()
    for number, given_row in enumerate(rows):
        best = (-math.inf, "")
        for example, values in zip(examples, logits, strict=True):
            places = [k for k, start in enumerate(example["starts"]) if start >= 0 and example["row"] == number]
            for a in places:
                for b in places:
                    score = float(values[a, 0] + values[b, 1])
                    if a <= b and score > best[0]:
                        best = (score, example["context"][example["starts"][a] : example["ends"][b]])
        reference.update(
            {"prediction_text": best[1], "id": str(number)}, {"answers": given_row["answers"], "id": str(number)}
        )
    expected = reference.compute()
    logs = [log_softmax(values.double().numpy(), axis=0) for values in logits]
    right = [np.mean([-v[e["target"][side], side] for side in (0, 1)]) for v, e in zip(logs, examples, strict=True)]
    even = [-v.mean() for v in logs]
    assert found["exact_match"] == pytest.approx(float(expected["exact_match"]) / 100, abs=1e-6)
    assert found["f1"] == pytest.approx(float(expected["f1"]) / 100, abs=1e-6)
    assert found["loss"] == pytest.approx(np.mean(right), abs=1e-5)
    smoothed = [(1 - smoothing) * r + smoothing * e for r, e in zip(right, even, strict=True)]
    assert trained == pytest.approx(sum(smoothed), rel=1e-5)


def test_starts_and_ends_are_decided_one_by_one() -> None:
    task = task_of()
    outputs = {"start_logits": torch.tensor([[0.0, 3.0, 1.0]]), "end_logits": torch.tensor([[5.0, 0.0, 1.0]])}
    logits = task.logits(outputs)
    assert logits.shape == (1, 3, 2)
    decisions, margins = task.decide(logits)
    assert (decisions.tolist(), margins.tolist()) == ([[1, 0]], [[2.0, 4.0]])


def test_the_outputs_of_a_model_are_what_the_task_reads() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    task = task_of(pieces_tokenizer())
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    batch = task.collate(encode(task, row("a", "b c", "c"), row("abc", "d", "d")))
    outputs = task.forward(BertForQuestionAnswering(config), batch)
    assert task.logits(outputs).shape == (*batch["input_ids"].shape, 2)
    assert task.weight(batch) == 2.0
    counted = task.counted(batch)
    assert counted is not None
    assert counted.sum(1).tolist() == [6, 7]
