"""Next item: windows, what is a candidate, places, metrics against a plain reference, unknown items."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import WORDS, word_tokenizer
from ticktune.console import Console
from ticktune.data.encode import encode_rows
from ticktune.data.read import build_rows
from ticktune.errors import DataError
from ticktune.registry import TASKS
from ticktune.remarks import say_report
from ticktune.tasks.next_item import NextItem
from ticktune.tasks.task import IGNORED, EncodingReport, Example, Row, TaskOptions, build_task, restore_task

PAD, UNK, BOS = 0, 1, 2
FIRST = 4  # the token of w0


def ids(*words: int) -> list[int]:
    """Token ids of the items w0, w1, ..."""
    return [FIRST + word for word in words]


def row(*words: int, history: list[int] | None = None) -> Row:
    found: Row = {"items": [f"w{i}" for i in words]}
    return found if history is None else {"history": [f"w{i}" for i in history], **found}


def without_begin() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def task_of(max_length: int = 16, tokenizer: Any = None, **fields: Any) -> NextItem:
    smoothing = fields.pop("smoothing", 0.0)
    options = TaskOptions(("items",), max_length, label_smoothing=smoothing)
    return NextItem(options, tokenizer or word_tokenizer(), **fields)


def encode(task: NextItem, *rows: Row, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


def predicted_once(examples: list[Example]) -> list[tuple[int, int]]:
    """(row, token) of every position that is predicted."""
    return [(e["row"], label) for e in examples for label in e["labels"][1:] if label != IGNORED]


# Rows and windows


def test_every_item_is_predicted_from_those_before_it() -> None:
    (example,), report = encode(task_of(), row(3, 1, 2))
    assert example == {
        "row": 0,
        "length": 4,
        "input_ids": [BOS, *ids(3, 1, 2)],
        "labels": [IGNORED, *ids(3, 1, 2)],
        "prior": [],
    }
    assert (report.items, report.unknown, report.unsupervised) == (3, {}, [])


def test_the_last_window_is_a_whole_one_and_knows_what_stands_before_it() -> None:
    examples, _ = encode(task_of(4), row(0, 1, 2, 3, 4))
    assert [e["input_ids"] for e in examples] == [[BOS, *ids(0, 1)], ids(1, 2, 3, 4)]
    assert [e["prior"] for e in examples] == [[], [BOS, *ids(0)]]


@pytest.mark.parametrize("limit", [2, 3, 4, 7])
@pytest.mark.parametrize("tokenizer", [word_tokenizer, without_begin], ids=["begin", "no-begin"])
def test_no_item_is_predicted_twice_or_dropped(limit: int, tokenizer: Any) -> None:
    rows = [row(*range(n)) for n in range(2, 13)]
    examples, report = encode(task_of(limit, tokenizer()), *rows)
    skipped = 0 if tokenizer is word_tokenizer else 1
    expected = [(i, token) for i, r in enumerate(rows) for token in ids(*range(skipped, len(r["items"])))]
    assert sorted(predicted_once(examples)) == expected
    assert all(e["length"] == len(e["input_ids"]) <= limit for e in examples)
    assert report.unsupervised == []


def test_a_history_is_read_and_not_scored() -> None:
    examples, report = encode(task_of(4), row(7, 8, history=[0, 1, 2, 3, 4]))
    assert [e["input_ids"] for e in examples] == [ids(3, 4, 7, 8)]
    assert predicted_once(examples) == [(0, ids(7)[0]), (0, ids(8)[0])]
    assert examples[0]["prior"] == [BOS, *ids(0, 1, 2)]
    assert report.items == 7


def test_windows_of_history_alone_are_no_examples() -> None:
    examples, _ = encode(task_of(3), row(8, history=list(range(7))))
    assert [e["input_ids"] for e in examples] == [ids(5, 6, 8)]


def test_a_row_of_one_item_needs_a_token_that_begins() -> None:
    (example,), _ = encode(task_of(), row(5))
    assert predicted_once([example]) == [(0, ids(5)[0])]
    examples, report = encode(task_of(tokenizer=without_begin()), row(5), row(5, 6))
    assert [e["row"] for e in examples] == [1]
    assert report.unsupervised == [0]
    assert report.why == "there is no item to predict, or nothing before it"


def test_a_row_without_items_is_counted() -> None:
    examples, report = encode(task_of(), row(history=[1, 2]), row(1))
    assert [e["row"] for e in examples] == [1]
    assert report.unsupervised == [0]


def test_items_may_be_numbers() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "50": 2, "7": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    (example,), _ = encode(task_of(tokenizer=tokenizer), {"items": [50, 7]})
    assert example["input_ids"] == [2, 3]


def test_an_item_may_have_spaces_and_is_looked_up_as_a_whole() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "a b": 2, "a": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    (example,), _ = encode(task_of(tokenizer=tokenizer), {"items": ["a b", "a"]})
    assert example["input_ids"] == [2, 3]


def test_an_example_is_shown_with_its_unknown_items() -> None:
    (example,), _ = encode(task_of(), {"history": ["w1"], "items": ["w2", "zzz", "w3"]})
    assert task_of().show(example) == [
        ("context", "<s> w1"),
        ("learned", "w2"),
        ("context", "<unk>"),
        ("learned", "w3"),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"items": "w1 w2"}, "expected a list of items in the column items, found 'w1 w2'"),
        ({"items": None}, "expected a list of items in the column items, found None"),
        ({"items": ["w1", None]}, "expected an item as text or whole number in the column items, found None"),
        ({"items": [1.5]}, "expected an item as text or whole number in the column items, found 1.5"),
        ({"items": [True]}, "expected an item as text or whole number in the column items, found True"),
        ({"history": 3, "items": ["w1"]}, "expected a list of items in the column history, found 3"),
    ],
)
def test_rows_that_are_no_lists_of_items_are_refused(bad: Row, message: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of().check([row(1, 2), bad], lambda i: f"a.jsonl:{i + 1}")
    assert caught.value.problems[0].message == message
    assert caught.value.problems[0].where == "a.jsonl:2"


def test_rows_to_predict_are_refused_too() -> None:
    with pytest.raises(DataError, match="row 2: expected a list of items in the column items, found 'w1 w2'"):
        encode(task_of(), row(1), {"items": "w1 w2"}, labelled=False)


# Building


def built(*rows: Row, tokenizer: Any = None, max_length: int = 16, **config: Any) -> Any:
    options = TaskOptions(("items",), max_length)
    where = "a.jsonl:{}".format
    return build_task("next-item", options, rows, where, tokenizer or word_tokenizer(), SimpleNamespace(**config))


def test_items_that_people_take_again_stay_candidates() -> None:
    assert not built(row(1, 2, 3), row(1)).repeats
    assert built(row(1, 2, 3), row(1, 2, 1)).repeats
    assert built(row(1, 2, history=[2])).repeats


def test_a_restored_task_is_the_same_task() -> None:
    task = built(row(1, 2, 1))
    assert restore_task("next-item", task.options, task.state(), task.tokenizer) == task


def test_a_base_that_knows_no_item_is_refused() -> None:
    with pytest.raises(DataError, match="the base knows none of the 2 items of the training rows") as caught:
        built({"items": ["a", "b"]})
    assert "scripts/item_model.py" in caught.value.problems[0].fix


def test_special_tokens_are_no_items() -> None:
    with pytest.raises(DataError, match="knows none of the 2 items"):
        built({"items": ["<s>", "<pad>"]})


def test_a_tokenizer_without_an_unknown_token_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.unk_token = None
    with pytest.raises(DataError, match="no token for unknown items"):
        built(row(1, 2), tokenizer=tokenizer)


def test_max_length_is_at_most_the_number_of_positions() -> None:
    assert built(row(1, 2), max_length=16, max_position_embeddings=16)
    with pytest.raises(DataError, match="max_length is 17, but the model has 16 positions"):
        built(row(1, 2), max_length=17, max_position_embeddings=16)


# Loss


def test_the_loss_is_that_of_the_known_items_and_honours_smoothing() -> None:
    rows = [row(3, 1, 2), {"items": ["w1", "zzz", "w5"]}]
    plain, smooth = task_of(), task_of(smoothing=0.2)
    batch = plain.collate(encode(plain, *rows)[0])
    logits = torch.randn(*batch["input_ids"].shape, len(WORDS))
    logs = logits.double().log_softmax(-1)
    chosen = [(0, 0, 3), (0, 1, 1), (0, 2, 2), (1, 0, 1), (1, 2, 5)]
    right = sum(-logs[b, s, FIRST + word].item() for b, s, word in chosen)
    even = sum(-logs[b, s].mean().item() for b, s, _ in chosen)
    found = [task.loss(SimpleNamespace(logits=logits), batch).item() for task in (plain, smooth)]
    assert found == pytest.approx([right, 0.8 * right + 0.2 * even], rel=1e-5)
    assert plain.weight(batch) == 6  # the unknown one too


def test_a_batch_of_unknown_items_has_a_weight_and_no_loss() -> None:
    task = task_of()
    batch = task.collate(encode(task, {"items": ["yyy", "zzz"]})[0])
    logits = torch.randn(*batch["input_ids"].shape, len(WORDS))
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == 0
    assert task.weight(batch) == 2


# Places and metrics

ROWS = [
    row(*range(12)),
    row(5),
    row(30, 31, history=[1, 2, 3]),
    {"items": ["w1", "zzz", "w2", "w40"]},
    row(6, 7, 8, 9, 10, 11, 12),
    row(50, 51, 52),
    row(20, 21, 22, 23, 24, 25, 26, 27, 28, 29),
]


def logits_of(batch: dict[str, Any]) -> Tensor:
    """Logits that a position's row, place and tokens decide, in steps of a half, so that some are equal."""
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(WORDS), len(WORDS), generator=generator)
    return (table[ids] * 2).round() / 2


def by_hand(rows: list[Row], repeats: bool) -> dict[str, float]:
    """The metrics from the whole rows, item by item: sorted scores, no windows, no batches."""
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(len(WORDS), len(WORDS), generator=generator) * 2).round() / 2
    hits, gains, inverse, unknown, losses = [], [], [], [], []
    for one in rows:
        names = [*one.get("history", []), *one["items"]]
        tokens = [BOS] + [WORDS.index(name) if name in WORDS else UNK for name in names]
        for at in range(1 + len(one.get("history", [])), len(tokens)):
            scores, target = table[tokens[at - 1]], tokens[at]
            unknown.append(float(target == UNK))
            if target != UNK:
                losses.append(-scores.double().log_softmax(0)[target].item())
            candidates = [v for v in range(FIRST, len(WORDS)) if repeats or v not in tokens[:at]]
            if target not in candidates:
                place = math.inf
            else:
                above = [v for v in candidates if scores[v] > scores[target]]
                equal = [v for v in candidates if scores[v] == scores[target]]
                place = sum(range(len(above) + 1, len(above) + len(equal) + 1)) / len(equal)
            hits.append(float(place <= 10))
            gains.append(1 / math.log2(1 + place) if place <= 10 else 0.0)
            inverse.append(1 / place)
    loss = sum(losses) / len(losses)
    found = {"hit10": hits, "ndcg10": gains, "mrr": inverse, "unknown": unknown}
    return {name: sum(v) / len(v) for name, v in found.items()} | {"loss": loss, "perplexity": math.exp(loss)}


@pytest.mark.parametrize("limit", [3, 5, 16])
@pytest.mark.parametrize("repeats", [False, True])
def test_metrics_over_uneven_batches_are_those_of_a_plain_reference(limit: int, repeats: bool) -> None:
    rows = [*ROWS, row(3, 4, 3)]  # somebody who takes an item again
    task = task_of(limit, repeats=repeats)
    examples, _ = encode(task, *rows)
    metrics = task.metrics()
    for start in range(0, len(examples), 4):
        batch = task.collate(examples[start : start + 4])
        task.update(metrics, logits_of(batch), batch)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found == pytest.approx(by_hand(rows, repeats), rel=1e-5)
    assert 0 < found["hit10"] < 1


def test_seven_rows_in_batches_of_four_count_as_those_of_one_batch() -> None:
    task = task_of()
    examples, _ = encode(task, *ROWS)
    assert len(examples) == 7

    def of(parts: list[list[Example]]) -> dict[str, float]:
        metrics = task.metrics()
        for part in parts:
            batch = task.collate(part)
            task.update(metrics, logits_of(batch), batch)
        return {name: float(metric.compute()) for name, metric in metrics.items()}

    assert of([examples[:4], examples[4:]]) == pytest.approx(of([examples]), rel=1e-5)


def test_without_equal_scores_the_metrics_are_those_of_torchmetrics() -> None:
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

    task = task_of()
    batch = task.collate(encode(task, row(1, 2, 3, 4), row(10, 11, 12))[0])
    logits = torch.randn(*batch["input_ids"].shape, len(WORDS))
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    theirs = {"hit10": RetrievalHitRate(top_k=10), "ndcg10": RetrievalNormalizedDCG(top_k=10), "mrr": RetrievalMRR()}
    rows, at = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    for query, (b, s) in enumerate(zip(rows.tolist(), at.tolist(), strict=True)):
        tokens = batch["input_ids"][b]
        free = [v for v in range(FIRST, len(WORDS)) if v not in tokens[: s + 1].tolist()]
        target = torch.tensor([v == tokens[s + 1] for v in free])
        for metric in theirs.values():
            # Above 0: of what is scored less, torchmetrics says that it was not retrieved.
            metric.update(logits[b, s, free].softmax(-1), target, indexes=torch.full((len(free),), query))
    for name, metric in theirs.items():
        assert float(metrics[name].compute()) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_equal_scores_share_the_middle_of_their_places() -> None:
    task = task_of()
    batch = task.collate(encode(task, row(0, 1))[0])
    logits = torch.zeros(*batch["input_ids"].shape, len(WORDS))
    count = len(WORDS) - FIRST
    assert task.places(logits, batch).tolist() == [(count + 1) / 2, count / 2]


def test_what_somebody_has_and_special_tokens_stand_before_nobody() -> None:
    task = task_of(3)
    examples, _ = encode(task, row(9, history=[0, 1, 2, 3]))
    batch = task.collate(examples)
    logits = torch.zeros(*batch["input_ids"].shape, len(WORDS))
    logits[..., : FIRST + 4] = 5  # special tokens and the history, of which two items lie before the window
    logits[..., ids(9)[0]] = 1
    assert batch["input_ids"].tolist() == [ids(2, 3, 9)]
    assert task.places(logits, batch).tolist() == [1]
    again = task_of(3, repeats=True)
    batch = again.collate(encode(again, row(9, history=[0, 1, 2, 3]))[0])
    assert again.places(logits, batch).tolist() == [5]


def test_an_unknown_item_and_one_that_was_there_are_misses() -> None:
    task = task_of()
    batch = task.collate(encode(task, {"items": ["w1", "zzz", "w1"]})[0])
    logits = torch.zeros(*batch["input_ids"].shape, len(WORDS))
    logits[..., UNK] = logits[..., ids(1)[0]] = 9
    assert task.places(logits, batch).tolist() == [1, math.inf, math.inf]
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    found = {name: float(metrics[name].compute()) for name in ("hit10", "ndcg10", "mrr", "unknown")}
    assert found == pytest.approx(dict.fromkeys(found, 1 / 3))


def test_scores_that_are_no_numbers_are_misses() -> None:
    task = task_of()
    batch = task.collate(encode(task, row(1))[0])
    assert task.places(torch.full((1, 2, len(WORDS)), math.nan), batch).tolist() == [math.inf]


def test_embeddings_beyond_the_vocabulary_are_no_candidates() -> None:
    task = task_of()
    batch = task.collate(encode(task, row(1))[0])
    logits = torch.zeros(1, 2, len(WORDS) + 4)
    logits[..., len(WORDS) :] = 9
    logits[..., ids(1)[0]] = 1
    assert task.places(logits, batch).tolist() == [1]


def test_unknown_items_are_counted_and_named() -> None:
    rows = [{"items": ["w1", "zzz", "yyy"]}, {"history": ["zzz"], "items": ["w2"]}]
    for labelled in (True, False):
        _, report = encode(task_of(), *rows, labelled=labelled)
        assert report.unknown == {"zzz": 2, "yyy": 1}
    assert encode(task_of(), *rows)[1].items == 5


def test_a_split_with_unknown_items_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    task = task_of()
    records = [(1, {"items": ["w1", "zzz", "yyy"]}), (2, {"items": ["w2", "zzz"]})]
    rows = build_rows(records, TASKS["next-item"], {}, "a.jsonl")
    say_report(encode_rows(task, rows, "tokenizer"), "test", task, Console())
    assert capsys.readouterr().err == (
        "warning: test: 3 of 5 items (60.0 %) are unknown to the base, 2 different ones: zzz, yyy\n"
    )


# Predictions


class Table(torch.nn.Module):
    """Scores the next token by the one before."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": logits_of({"input_ids": input_ids})}


def test_a_prediction_is_the_best_new_items_with_probabilities_over_all_candidates() -> None:
    task = task_of(4)
    rows = [row(1, 2, 3, 4, 5), row(6), {"items": ["w7", "zzz"]}, row()]
    batch = task.collate(encode(task, *rows, labelled=False)[0])
    answers = task.predict(Table(), batch)
    last = [ids(5)[0], ids(6)[0], UNK, BOS]
    table = logits_of({"input_ids": torch.arange(len(WORDS))})
    for one, token, answer in zip(rows, last, answers, strict=True):
        free = [name for name in WORDS[FIRST:] if name not in one["items"]]
        scores = table[token, [WORDS.index(name) for name in free]].double().softmax(0).tolist()
        expected = dict(zip(free, scores, strict=True))
        found = {item["item"]: item["probability"] for item in answer["items"]}
        assert len(found) == 10
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
        assert sorted(found.values(), reverse=True) == pytest.approx(sorted(expected.values(), reverse=True)[:10])
    assert [answer["unknown"] for answer in answers] == [[], [], ["zzz"], []]


def test_a_row_with_a_history_is_continued_from_there() -> None:
    task = task_of()
    with_answer, without = encode(task, row(9, history=[1, 2]), row(1, 2), labelled=False)[0]
    assert with_answer["input_ids"] == without["input_ids"] == [BOS, *ids(1, 2)]


def test_a_long_history_is_continued_from_its_end_and_excludes_all_of_it() -> None:
    task = task_of(3)
    (example,), _ = encode(task, row(0, 1, 2, 3, 4), labelled=False)
    assert example["input_ids"] == ids(3, 4)
    found = task.predict(Table(), task.collate([example]))[0]["items"]
    assert not {item["item"] for item in found} & {f"w{i}" for i in range(5)}


def test_nothing_left_is_no_prediction() -> None:
    task = task_of(100)
    batch = task.collate(encode(task, row(*range(58)), row(*range(60)), labelled=False)[0])
    answers = task.predict(Table(), batch)
    assert [len(answer["items"]) for answer in answers] == [2, 0]
    assert sum(item["probability"] for item in answers[0]["items"]) == pytest.approx(1)


def test_a_line_of_text_is_a_row() -> None:
    assert task_of().row_of("w1  w2\r") == {"items": ["w1", "w2"]}


def test_an_answer_is_described_in_one_line() -> None:
    items = [{"item": f"w{i}", "probability": 0.5 / (i + 1)} for i in range(10)]
    answer = {"items": items, "unknown": ["zzz"]}
    assert task_of().describe(answer) == "w0 0.500, w1 0.250, w2 0.167, w3 0.125, w4 0.100  (unknown: zzz)"
    assert task_of().describe({"items": [], "unknown": []}) == "(none)"
