"""Token classification: words and their tokens, windows, entities, metrics against independent references."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from tests.models import WORDS, word_tokenizer
from ticktune.data.batches import sorted_batches
from ticktune.errors import DataError, Problem, UsageError
from ticktune.evaluate import compute_metrics
from ticktune.tasks import token_classification
from ticktune.tasks.task import IGNORED, EncodingReport, Example, Row, TaskOptions, build_task, restore_task
from ticktune.tasks.token_classification import Span, TokenClassification, marks_entities, spans_of

TAGS = ("B-loc", "B-per", "I-loc", "I-per", "O")


def where(i: int) -> str:
    return f"a:b.jsonl:{i + 1}"


def options(max_length: int = 16, overlap: int = 4, **rest: Any) -> TaskOptions:
    return TaskOptions(("tokens", "tags"), max_length, overlap=overlap, **rest)


def pieces_tokenizer() -> Any:
    """A BERT-like tokenizer: [CLS] and [SEP] around a text, words of two letters or more in pieces of one letter."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh.,", *(f"##{c}" for c in "abcdefgh")]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bytes_tokenizer() -> Any:
    """A RoBERTa-like tokenizer: a word inside a text begins with its space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", *"abcd", "\u0120", "\u0120a", "\u0120b"])}
    core = Tokenizer(models.BPE(vocabulary, [("\u0120", "a"), ("\u0120", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def task_of(tokenizer: Any = None, labels: tuple[str, ...] = TAGS, **rest: Any) -> TokenClassification:
    return TokenClassification(options(**rest), labels, tokenizer or word_tokenizer())


def row(tokens: str, tags: str = "") -> Row:
    return {"tokens": tokens.split(), "tags": tags.split() or ["O"] * len(tokens.split())}


def encode(task: TokenClassification, *rows: Row, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


def refused(call: Any, *arguments: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    (found,) = caught.value.problems
    return found


def build(rows: list[Row], **rest: Any) -> TokenClassification:
    config = SimpleNamespace(id2label=None)
    task = build_task("token-classification", options(**rest), rows, where, word_tokenizer(), config)
    assert isinstance(task, TokenClassification)
    return task


# Tags and rows


def test_tags_are_read_off_the_rows_and_kept_in_the_state() -> None:
    task = build([row("w1 w2", "B-per I-per"), row("w3", "O")])
    assert task.labels == ("B-per", "I-per", "O")
    assert task.config()["id2label"] == {0: "B-per", 1: "I-per", 2: "O"}
    assert restore_task("token-classification", task.options, task.state(), task.tokenizer) == task


def test_balanced_weights_count_each_tag_alike() -> None:
    task = build([row("w1 w2 w3 w4", "O O O B-per")], class_weights="balanced")
    assert task.weights == (2.0, 4 / 6)
    assert restore_task("token-classification", task.options, task.state(), task.tokenizer) == task


def test_f1_of_entities_chooses_the_checkpoint_and_accuracy_where_tags_mark_no_entities() -> None:
    assert task_of().default_metric == "f1"
    assert task_of(labels=("ADJ", "NOUN")).default_metric == "token_accuracy"


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (
            {"tokens": ["w1", "w2"], "tags": ["O"]},
            Problem("expected a tag for each word, found 2 tokens and 1 tags", where(1)),
        ),
        (
            {"tokens": "w1 w2", "tags": ["O"]},
            Problem("expected a list of words in the column tokens, found 'w1 w2'", where(1)),
        ),
        (
            {"tokens": ["w1"], "tags": None},
            Problem("expected a list of tags in the column tags, found None", where(1)),
        ),
        (
            {"tokens": [None], "tags": ["O"]},
            Problem("expected a word as text in the column tokens, found None", where(1)),
        ),
        (
            {"tokens": ["w1"], "tags": [3]},
            Problem(
                "expected a tag as text in the column tags, found 3",
                where(1),
                "write the names of the tags, such as B-person, not their numbers",
            ),
        ),
        (
            {"tokens": ["w1"], "tags": [" "]},
            Problem(
                "expected a tag as text in the column tags, found ' '",
                where(1),
                "write the names of the tags, such as B-person, not their numbers",
            ),
        ),
        (
            {"tokens": ["w1", "w2"], "tags": ["O", "O"], "text": "w2 w1"},
            Problem(
                "the column text does not hold the token 'w2' after character 5",
                where(1),
                "leave text out of data.columns: offsets then count in the tokens with a space between them",
            ),
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(bad: Row, expected: Problem) -> None:
    rows = [row("w1", "B-per"), bad]
    assert refused(task_of().check, rows, where) == expected
    assert refused(build, rows) == expected


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("w1 w2", "row 2: expected a list of words in the column tokens, found 'w1 w2'"),
        (None, "row 2: expected a list of words in the column tokens, found None"),
        (["w1", None], "row 2: expected a word as text in the column tokens, found None"),
    ],
)
def test_rows_to_predict_are_refused_too(tokens: Any, message: str) -> None:
    task = TokenClassification(options(), TAGS, word_tokenizer())
    with pytest.raises(DataError, match=message):
        task.encode([{"tokens": ["w1"]}, {"tokens": tokens}], 0, EncodingReport(), labelled=False)


def test_an_unknown_tag_is_named_with_its_row() -> None:
    rows = [row("w1 w2"), row("w1 w2", "O B-org")]
    assert refused(task_of().check, rows, where) == Problem(
        "1 label does not occur in the training rows: 'B-org'",
        where(1),
        "the training rows have: B-loc, B-per, I-loc, I-per, O",
    )


def test_a_word_that_fits_into_no_example_is_an_error_that_names_the_row() -> None:
    task = task_of(pieces_tokenizer(), max_length=6, overlap=2)
    rows = [row("a abcd"), row("a abcde b")]
    expected = "the word 'abcde' has 5 tokens, but an example has room for 4 with data.max_length = 6"
    fix = "set data.max_length: 7, or mend the word"
    assert refused(task.check, rows, where) == Problem(expected, where(1), fix)
    assert refused(lambda: encode(task, *rows, labelled=False)) == Problem(expected, "row 2", fix)
    task.check(rows[:1], where)


def test_windows_that_would_not_go_forward_are_refused() -> None:
    assert refused(lambda: build([row("w1 w2", "O B-per")], max_length=16, overlap=16)) == Problem(
        "data.overlap is 16, but an example has room for 16 tokens of words with data.max_length = 16: the windows of "
        "a long row would not go forward",
        fix="set data.overlap: 8",
    )


def test_all_words_with_one_tag_are_refused() -> None:
    assert "same label, O" in refused(build, [row("w1 w2")]).message


def test_a_base_without_a_fast_tokenizer_is_refused() -> None:
    arguments = (options(), [row("w1")], where, SimpleNamespace(is_fast=False), None)
    assert "slow tokenizer" in refused(token_classification.build, *arguments).message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ticktune.versions.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="nervaluate"):
        build([row("w1 w2", "O B-per")])


# Examples


def test_the_first_token_of_a_word_carries_its_tag() -> None:
    (example,), report = encode(task_of(pieces_tokenizer()), row("Abc d efg", "B-per O B-loc"))
    assert example["labels"] == [IGNORED, 1, IGNORED, IGNORED, 4, 0, IGNORED, IGNORED, IGNORED]
    assert example["words"] == [-1, 0, -1, -1, 1, 2, -1, -1, -1]
    assert (example["length"], example["text"]) == (9, "Abc d efg")
    assert report == EncodingReport()


def test_a_word_of_which_the_tokenizer_leaves_nothing_still_has_a_tag() -> None:
    (example,), _ = encode(task_of(pieces_tokenizer()), {"tokens": ["a", "\x01", "b"], "tags": ["O", "B-per", "O"]})
    assert example["input_ids"] == [2, 4, 1, 5, 3]
    assert example["labels"] == [IGNORED, 4, 1, 4, IGNORED]


def test_words_inside_a_text_get_the_space_that_their_tokenizer_knows_them_by() -> None:
    tokenizer = bytes_tokenizer()
    (example,), _ = encode(task_of(tokenizer), row("a b a"))
    assert example["input_ids"] == tokenizer("a b a")["input_ids"]
    assert example["words"] == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_each_word_of_a_long_row_is_decided_on_once_where_it_has_most_context(seed: int) -> None:
    rng = random.Random(seed)
    words = ["abcdefgh"[: rng.randint(1, 6)] for _ in range(rng.randint(1, 60))]
    tags = [rng.choice(TAGS) for _ in words]
    overlap = rng.randint(0, 13)
    task = task_of(pieces_tokenizer(), max_length=16, overlap=overlap)
    examples, report = encode(task, row("a"), {"tokens": words, "tags": tags})
    assert report == EncodingReport()
    assert all(len(e["input_ids"]) <= 16 for e in examples)
    owned: dict[int, str] = {}
    for example in examples[1:]:
        assert example["row"] == 1
        for word, label in zip(example["words"], example["labels"], strict=True):
            assert (word < 0) == (label == IGNORED)
            if word >= 0:
                assert word not in owned
                owned[word] = task.labels[label]
    assert [owned[i] for i in range(len(words))] == tags
    # The reference: all windows as (first word, end), greedily cut, and the best of them for each word.
    sizes = [len(word) for word in words]
    windows, first = [], 0
    while True:
        end = first
        while end < len(words) and sum(sizes[first : end + 1]) <= 14:
            end += 1
        windows.append((first, end))
        if end == len(words):
            break
        start = end
        while start - 1 > first and sum(sizes[start - 1 : end]) <= overlap and sum(sizes[start - 1 : end + 1]) <= 14:
            start -= 1
        first = start

    def context(window: tuple[int, int], word: int) -> float:
        left = sum(sizes[window[0] : word]) if window[0] else 1e9
        right = sum(sizes[word + 1 : window[1]]) if window[1] < len(words) else 1e9
        return min(left, right)

    for word in range(len(words)):
        best = max((w for w in windows if w[0] <= word < w[1]), key=lambda w, i=word: (context(w, i), -w[0]))
        (mine,) = [e for e in examples[1:] if word in e["words"]]
        text = " ".join(words[best[0] : best[1]])
        assert task.tokenizer(text)["input_ids"] == mine["input_ids"]


def test_a_row_without_words_is_left_out_of_training_and_answered_with_nothing() -> None:
    examples, report = encode(task_of(), row("w1 w2"), {"tokens": [], "tags": []})
    assert [e["row"] for e in examples] == [0]
    assert report.unsupervised == [1]
    for tokenizer in (word_tokenizer(), pieces_tokenizer()):
        task = task_of(tokenizer)
        (empty,), _ = encode(task, {"tokens": [], "text": ""}, labelled=False)
        assert empty["length"] >= 1
        answers = task.predict(_Model(tokenizer, {}), task.collate([empty]))
        assert task.join(answers) == {"entities": [], "tags": []}


def test_an_example_is_shown_with_its_tags() -> None:
    task = task_of(pieces_tokenizer())
    (example,), _ = encode(task, row("Abc d", "B-per O"))
    assert task.show(example) == [("context", "[CLS] a ##b ##c d [SEP]"), ("learned", "Abc/B-per d/O")]


# Entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-x I-x O B-x", [("x", 0, 1), ("x", 3, 3)]),
        ("B-x B-x I-y", [("x", 0, 0), ("x", 1, 1), ("y", 2, 2)]),
        ("I-x I-x O I-y", [("x", 0, 1), ("y", 3, 3)]),
        ("B-x I-x E-x I-x", [("x", 0, 2), ("x", 3, 3)]),
        ("S-x I-x B-x L-x U-x", [("x", 0, 0), ("x", 1, 1), ("x", 2, 3), ("x", 4, 4)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_marked_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert spans_of(tags.split(), marked=True) == [Span(*span) for span in expected]


def test_entities_of_iob_tags_are_those_of_nervaluate() -> None:
    from nervaluate import collect_named_entities

    rng = random.Random(0)
    for _ in range(300):
        tags = [rng.choice(TAGS) for _ in range(rng.randint(0, 12))]
        theirs = [Span(e["label"], e["start"], e["end"]) for e in collect_named_entities(tags)]
        assert spans_of(tags, marked=True) == theirs


def test_of_plain_tags_each_word_is_an_entity() -> None:
    assert not marks_entities(("O", "person"))
    assert not marks_entities(("O",))
    assert spans_of(["person", "person", "O"], marked=False) == [Span("person", 0, 0), Span("person", 1, 1)]


class _Output(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class _Model(torch.nn.Module):
    """Gives each token id the tag that a table says, O where it says nothing, with probability 0.9."""

    def __init__(self, tokenizer: Any, table: dict[str, str]) -> None:
        super().__init__()
        self.tags = {tokenizer.convert_tokens_to_ids(word): TAGS.index(tag) for word, tag in table.items()}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((*input_ids.shape, len(TAGS)), float(np.log(0.025)))
        for place in np.ndindex(*input_ids.shape):
            logits[(*place, self.tags.get(int(input_ids[place]), 4))] = float(np.log(0.9))
        return _Output(logits=logits)


def test_an_entity_across_windows_is_one_and_has_the_offsets_of_the_joined_tokens() -> None:
    task = task_of(max_length=4, overlap=1)
    examples, _ = encode(task, row("w0 w1 w2 w3 w4 w5 w6 w7"), labelled=False)
    assert len(examples) == 3
    model = _Model(task.tokenizer, {"w2": "B-per", "w3": "I-per", "w4": "I-per", "w7": "B-loc"})
    answer = task.join(task.predict(model, task.collate(examples)))
    assert answer["tags"] == ["O", "O", "B-per", "I-per", "I-per", "O", "O", "B-loc"]
    assert [{k: v for k, v in e.items() if k != "score"} for e in answer["entities"]] == [
        {"label": "per", "text": "w2 w3 w4", "start": 6, "end": 14},
        {"label": "loc", "text": "w7", "start": 21, "end": 23},
    ]
    assert [e["score"] for e in answer["entities"]] == pytest.approx([0.9, 0.9])
    assert task.describe(answer) == "w2 w3 w4 (per 0.90 at 6-14), w7 (loc 0.90 at 21-23)"
    assert task.describe({"entities": [], "tags": []}) == "(none)"


def test_a_line_is_split_into_words_and_its_offsets_count_in_it() -> None:
    task = task_of()
    line = "Hi,  @joe met Dr. O'Neil (33.5 km)... \u5317\u4eac!\r"
    found = task.row_of(line)
    assert found["tokens"] == [
        "Hi", ",", "@joe", "met", "Dr", ".", "O'Neil", "(", "33.5", "km", ")...", "\u5317", "\u4eac", "!",
    ]  # fmt: skip
    task = task_of()
    given = task.row_of("w1  w2 w3")
    answer = task.join(
        task.predict(
            _Model(task.tokenizer, {"w2": "B-per", "w3": "I-per"}), task.collate(encode(task, given, labelled=False)[0])
        )
    )
    assert [(e["text"], e["start"], e["end"]) for e in answer["entities"]] == [("w2 w3", 4, 9)]


# Loss and metrics


def labelled_rows() -> list[Row]:
    """Seven rows, long and short, one without entities; B-loc and I-loc occur nowhere."""
    rng = random.Random(3)
    rows = [
        {
            "tokens": [rng.choice(WORDS[4:]) for _ in range(n)],
            "tags": [rng.choice(TAGS[1::2] + ("O",)) for _ in range(n)],
        }
        for n in (1, 30, 5, 2, 17, 16, 9)
    ]
    rows[2]["tags"] = ["O"] * 5
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 3.0, 0.5, 0.25)])
def test_metrics_equal_plain_references_with_no_word_twice_or_dropped(
    smoothing: float, weights: tuple[float, ...] | None
) -> None:
    rows = labelled_rows()
    task = TokenClassification(options(16, 5, label_smoothing=smoothing), TAGS, word_tokenizer(), weights)
    examples, _ = encode(task, *rows)
    assert len(examples) > 7
    table = torch.randn(len(WORDS), len(TAGS), generator=torch.Generator().manual_seed(1))
    metrics = task.metrics()
    for numbers in sorted_batches([e["length"] for e in examples], 4):
        batch = task.collate([examples[n] for n in numbers])
        task.update(metrics, table[batch["input_ids"]], batch)
    found = compute_metrics(metrics)

    ids = [[WORDS.index(token) for token in r["tokens"]] for r in rows]
    true = [r["tags"] for r in rows]
    guessed = [[TAGS[int(table[i].argmax())] for i in row_ids] for row_ids in ids]
    a = {(n, s) for n, tags in enumerate(true) for s in spans_of(tags, marked=True)}
    b = {(n, s) for n, tags in enumerate(guessed) for s in spans_of(tags, marked=True)}
    precision, recall = len(a & b) / len(b), len(a & b) / len(a)
    assert 0 < len(a & b) < len(a)
    expected = {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "token_accuracy": float(np.mean([x == y for x, y in zip(sum(true, []), sum(guessed, []), strict=True)])),
    }
    logs = log_softmax(table[sum(ids, [])].double().numpy(), axis=1)
    targets = np.array([TAGS.index(tag) for tag in sum(true, [])])
    w = np.array(weights or [1.0] * 5)
    losses = -(1 - smoothing) * w[targets] * logs[np.arange(len(targets)), targets] - smoothing / 5 * (w * logs).sum(1)
    expected["loss"] = losses.mean()
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_loss_over_weight_is_the_same_however_a_batch_is_cut() -> None:
    task = task_of(max_length=16, overlap=5)
    examples, _ = encode(task, *labelled_rows())
    table = torch.randn(len(WORDS), len(TAGS), generator=torch.Generator().manual_seed(1))

    def mean(parts: list[list[Example]]) -> float:
        batches = [task.collate(part) for part in parts]
        losses = [task.loss(SimpleNamespace(logits=table[b["input_ids"]]), b) for b in batches]
        return float(sum(losses)) / sum(task.weight(b) for b in batches)

    assert mean([examples]) == pytest.approx(mean([[e] for e in examples]), rel=1e-5)
    assert sum(task.weight(task.collate([e])) for e in examples) == sum(len(r["tokens"]) for r in labelled_rows())


def test_without_any_entity_the_scores_are_zero() -> None:
    task = task_of()
    examples, _ = encode(task, row("w1 w2"))
    metrics = task.metrics()
    batch = task.collate(examples)
    task.update(metrics, torch.eye(5)[torch.full(batch["labels"].shape, 4)], batch)
    found = compute_metrics(metrics)
    assert (found["f1"], found["precision"], found["recall"], found["token_accuracy"]) == (0, 0, 0, 1)


def test_decisions_count_at_the_first_tokens_of_words_only() -> None:
    task = task_of(pieces_tokenizer())
    examples, _ = encode(task, row("abc d"), row("e"))
    batch = task.collate(examples)
    counted = task.counted(batch)
    assert counted is not None
    assert counted.tolist() == [[False, True, False, False, True, False], [False, True, *[False] * 4]]
    decisions, margins = task.decide(torch.tensor([[[0.0, 3.0, 1.0, 0.0, 0.0]]]))
    assert (decisions.tolist(), margins.tolist()) == ([[1]], [[2.0]])
    assert set(task.inputs(batch)) == {"input_ids", "attention_mask"}
