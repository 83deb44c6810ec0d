"""Masked language modelling: windows, what is hidden, loss and metrics, fillings."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from tests.models import word_tokenizer
from ticktune.data.batches import sorted_batches
from ticktune.errors import DataError, Problem
from ticktune.evaluate import compute_metrics
from ticktune.tasks.masked_lm import MaskedLm
from ticktune.tasks.task import IGNORED, EncodingReport, Example, TaskOptions, build_task, restore_task

CLS, SEP, MASK, UNK = 2, 3, 64, 1


def where(i: int) -> str:
    return f"a:b.jsonl:{i + 1}"


def mask_tokenizer() -> Any:
    """The words w0 to w59 between <s> and </s>, and a mask."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", CLS), ("</s>", SEP)]
    )
    assert tokenizer.mask_token_id == MASK
    return tokenizer


def task_of(max_length: int = 32, tokenizer: Any = None, **rest: Any) -> MaskedLm:
    return MaskedLm(TaskOptions(("text",), max_length, **rest), tokenizer or mask_tokenizer())


def encode(task: MaskedLm, *texts: str, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode([{"text": text} for text in texts], 0, report, labelled=labelled), report


def words(count: int) -> str:
    return " ".join(f"w{i % 60}" for i in range(count))


def build(tokenizer: Any, base_config: Any = None, **rest: Any) -> Any:
    options = TaskOptions(("text",), **{"max_length": 32, **rest})
    return build_task("masked-lm", options, [{"text": "w1"}], where, tokenizer, base_config)


# Windows


def test_a_text_is_cut_into_windows_that_share_no_token() -> None:
    examples, report = encode(task_of(8), "w7", words(20))
    assert [(e["row"], e["window"], e["length"]) for e in examples] == [
        (0, 0, 3),
        (1, 0, 8),
        (1, 1, 8),
        (1, 2, 8),
        (1, 3, 4),
    ]
    assert all(e["input_ids"][0] == CLS and e["input_ids"][-1] == SEP for e in examples)
    tokens = [token for e in examples[1:] for token in e["input_ids"][1:-1]]
    assert tokens == [4 + i for i in range(20)]
    assert report == EncodingReport()


def test_texts_without_a_token_to_guess_are_left_out() -> None:
    examples, report = encode(task_of(8), "", "w1", "unknown <mask>")
    assert [e["row"] for e in examples] == [1]
    assert report.unsupervised == [0, 2]


# What is hidden


def hidden(example: Example, batch: dict[str, Any]) -> set[int]:
    return {i for i, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED}


def test_evaluation_hides_the_same_tokens_every_time_and_other_ones_in_other_rows() -> None:
    task = task_of(64)
    (one, other), _ = encode(task, words(50), words(50))
    first, again, second = task.collate([one]), task.collate([other, one]), task.collate([other])
    assert torch.equal(first["input_ids"][0], again["input_ids"][1])
    assert torch.equal(first["labels"][0], again["labels"][1])
    assert hidden(one, first) != hidden(other, second)


def test_the_windows_of_a_row_hide_other_places() -> None:
    task = task_of(52)
    examples, _ = encode(task, words(100))
    assert hidden(examples[0], task.collate([examples[0]])) != hidden(examples[1], task.collate([examples[1]]))


def test_training_hides_other_tokens_with_each_seed_and_the_same_with_the_same() -> None:
    task = task_of(64)
    (example,), _ = encode(task, words(50))
    one, again, other = (task.collate([example], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert torch.equal(one["labels"], again["labels"])
    assert hidden(example, one) != hidden(example, other)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 1), (10, 2), (20, 3), (50, 8)])
def test_fifteen_percent_are_guessed_and_one_at_least(count: int, expected: int) -> None:
    task = task_of(64)
    (example,), _ = encode(task, words(count))
    for seed in range(5):
        batch = task.collate([example], seed=seed)
        assert len(hidden(example, batch)) == expected
        assert task.weight(batch) == expected


def test_of_the_guessed_four_fifths_are_masked_a_tenth_replaced_and_a_tenth_kept() -> None:
    task = task_of(64)
    (example,), _ = encode(task, words(60))
    kinds = {"masked": 0, "kept": 0, "replaced": 0}
    original = example["input_ids"]
    for seed in range(600):
        batch = task.collate([example], seed=seed)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert (ids[0], ids[-1]) == (CLS, SEP)
        for token, label, before in zip(ids, labels, original, strict=True):
            if label == IGNORED:
                assert token == before
            else:
                assert label == before
                assert token == MASK or 4 <= token < 64  # never another special token
                kinds["masked" if token == MASK else "kept" if token == before else "replaced"] += 1
    total = sum(kinds.values())
    assert total == 600 * 9
    # Five standard errors of a share of 5,400 draws; a replacement is the same token once in sixty.
    assert kinds["masked"] / total == pytest.approx(0.8, abs=0.03)
    assert kinds["replaced"] / total == pytest.approx(0.1 * 59 / 60, abs=0.02)
    assert kinds["kept"] / total == pytest.approx(0.1 + 0.1 / 60, abs=0.02)


def test_special_tokens_inside_a_text_are_never_guessed() -> None:
    task = task_of(64)
    (example,), _ = encode(task, "w1 nonsense <mask> w2 " + "nonsense " * 20)
    for seed in range(20):
        assert hidden(example, task.collate([example], seed=seed)) <= {1, 4}


def test_an_example_is_shown_as_evaluation_sees_it() -> None:
    task = task_of(16)
    (example,), _ = encode(task, "w1 w2 w3 w4")
    context, learned = task.show(example)
    batch = task.collate([example])
    assert context == ("context", task.tokenizer.decode(batch["input_ids"][0]))
    (label,) = [label for label in batch["labels"][0].tolist() if label != IGNORED]
    assert learned == ("learned", f"w{label - 4}")


# Loss and metrics


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_metrics_equal_plain_references_whatever_the_batches(smoothing: float) -> None:
    task = task_of(16, label_smoothing=smoothing)
    examples, _ = encode(task, *(words(n) for n in (1, 40, 2, 5, 14, 30, 7)))
    table = torch.randn(65, 65, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(65)
    metrics, trained = task.metrics(), 0.0
    for numbers in sorted_batches([e["length"] for e in examples], 4):
        batch = task.collate([examples[n] for n in numbers])
        logits = table[batch["input_ids"]]
        task.update(metrics, logits, batch)
        trained += float(task.loss(SimpleNamespace(logits=logits), batch))
    found = compute_metrics(metrics)

    inputs, targets = [], []
    for example in examples:
        batch = task.collate([example])
        places = batch["labels"][0] != IGNORED
        inputs += batch["input_ids"][0][places].tolist()
        targets += batch["labels"][0][places].tolist()
    logs = log_softmax(table.double().numpy()[inputs], axis=1)
    right = -logs[np.arange(len(targets)), targets]
    assert found["loss"] == pytest.approx(right.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(right.mean()), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx((logs.argmax(1) == targets).mean(), abs=1e-6)
    assert trained == pytest.approx(((1 - smoothing) * right - smoothing * logs.mean(1)).sum(), rel=1e-5)


def test_padding_is_not_counted() -> None:
    task = task_of(16)
    examples, _ = encode(task, "w1", "w1 w2 w3")
    batch = task.collate(examples)
    counted = task.counted(batch)
    assert counted is not None
    assert counted.sum(1).tolist() == [3, 5]
    assert batch["labels"][0, 3:].tolist() == [IGNORED, IGNORED]
    assert set(task.inputs(batch)) == {"input_ids", "attention_mask"}
    decisions, margins = task.decide(torch.tensor([[[0.0, 2.0, 1.0]]]))
    assert (decisions.tolist(), margins.tolist()) == ([[1]], [[1.0]])


# Fillings


class _Model(torch.nn.Module):
    """Guesses the word after the one before, with probability 0.9."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        following = (input_ids.roll(1, 1) + 1).clamp(max=63)
        logits = torch.full((*input_ids.shape, 65), float(np.log(0.1 / 64)))
        return {"logits": logits.scatter(2, following[..., None], float(np.log(0.9)))}


def filled(task: MaskedLm, text: str) -> dict[str, Any]:
    examples, _ = encode(task, text, labelled=False)
    answers = [answer for example in examples for answer in task.predict(_Model(), task.collate([example]))]
    return task.join(answers)


def test_each_mask_has_its_best_fillings_and_the_text_the_best_of_them() -> None:
    task = task_of()
    answer = filled(task, "w1 <mask> w5  <mask>")
    assert answer["text"] == "w1 w2 w5  w6"
    assert [mask[0]["token"] for mask in answer["masks"]] == ["w2", "w6"]
    assert [len(mask) for mask in answer["masks"]] == [5, 5]
    assert [mask[0]["probability"] for mask in answer["masks"]] == pytest.approx([0.9, 0.9])
    assert task.describe(answer) == "w1 w2 w5  w6"


def test_masks_in_several_windows_keep_their_order_and_windows_without_one_are_left_out() -> None:
    task = task_of(6)
    text = "w1 <mask> w5 w6 w7 w8 w9 w10 w11 w12 <mask>"
    examples, _ = encode(task, text, labelled=False)
    assert [e["window"] for e in examples] == [0, 1]
    assert [mask[0]["token"] for mask in filled(task, text)["masks"]] == ["w2", "w13"]


def test_a_piece_that_goes_on_with_a_word_joins_it() -> None:
    task = task_of()
    filling = [{"token": "##s", "id": 0, "probability": 1.0}]
    task.tokenizer.decode = lambda ids: "##s"
    assert task.join([{"text": "The king <mask> ride", "masks": [filling]}])["text"] == "The kings ride"


def test_a_text_without_a_mask_is_an_error() -> None:
    task = task_of()
    with pytest.raises(DataError) as caught:
        encode(task, "w1 <mask>", "w1 w2", labelled=False)
    assert caught.value.problems == [
        Problem(
            "there is nothing to fill in: no <mask> in 'w1 w2'", "row 2", "write <mask> where a token is to be guessed"
        )
    ]
    assert task.row_of("w1 <mask>\r") == {"text": "w1 <mask>"}


# Settings


def test_bases_and_settings_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(DataError, match="no mask token"):
        build(word_tokenizer())
    with pytest.raises(DataError, match="slow tokenizer"):
        build(SimpleNamespace(is_fast=False))
    with pytest.raises(DataError, match="data.max_length is 32, but the model has 16 positions"):
        build(mask_tokenizer(), SimpleNamespace(max_position_embeddings=16))
    with pytest.raises(DataError, match="data.max_length is 2, but a window has 2 special tokens"):
        build(mask_tokenizer(), max_length=2)


def test_the_task_is_restored() -> None:
    task = build(mask_tokenizer(), SimpleNamespace(max_position_embeddings=64))
    assert restore_task("masked-lm", task.options, task.state(), task.tokenizer) == task
    assert task.default_metric == "perplexity"
    task.check([{"text": ""}], where)
