"""Sequence to sequence: cuts, how the decoder begins, loss, and metrics of tokens and of generated texts."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from tests.models import WORDS, word_tokenizer
from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.seq2seq_lm import ChrF, Seq2SeqLm
from ticktune.tasks.task import IGNORED, EncodingReport, Example, Row, TaskOptions, build_task, restore_task

EOS = 3
ROWS = [{"source": f"w{i} w{i + 1}", "target": " ".join(f"w{j}" for j in range(i, 2 * i + 1))} for i in range(7)]


def ids(*words: int) -> list[int]:
    return [4 + word for word in words]


def task_of(max_length: int = 16, start: int | None = 2, tokenizer: Any = None, **options: Any) -> Seq2SeqLm:
    found = TaskOptions(("source", "target"), max_length, **options)
    return Seq2SeqLm(found, tokenizer or tokenizer_that_ends(), start)


def tokenizer_that_ends() -> Any:
    """A tokenizer that puts </s> after a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def encode(task: Seq2SeqLm, *rows: Row, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


# Examples


def test_the_end_of_the_target_is_learned_and_the_decoder_begins_with_the_start() -> None:
    (example,), report = encode(task_of(), {"source": "w1 w2", "target": "w3"})
    assert example == {
        "row": 0,
        "length": 3,
        "input_ids": [*ids(1, 2), EOS],
        "decoder_input_ids": [2, *ids(3)],
        "labels": [*ids(3), EOS],
        "reference": "w3",
    }
    assert report == EncodingReport(ends=1)


def test_a_target_ends_once_whether_or_not_the_tokenizer_ends_it() -> None:
    for tokenizer in (word_tokenizer(), tokenizer_that_ends()):
        (example,), _ = encode(task_of(tokenizer=tokenizer), {"source": "w1", "target": "w3"})
        assert example["labels"] == [*ids(3), EOS]


def test_a_source_that_is_too_long_keeps_its_end_token_and_a_target_loses_it() -> None:
    rows = [
        {"source": "w1 w2 w3 w4", "target": "w5"},
        {"source": "w1", "target": "w5 w6 w7"},
        {"source": "w1 w2 w3", "target": "w5 w6 w7"},
    ]
    examples, report = encode(task_of(3), {"source": "w1 w2", "target": "w5 w6"}, *rows)
    assert [e["input_ids"] for e in examples[1:]] == [[*ids(1, 2), EOS], [*ids(1), EOS], [*ids(1, 2), EOS]]
    assert [e["labels"] for e in examples[1:]] == [[*ids(5), EOS], ids(5, 6, 7), ids(5, 6, 7)]
    assert report == EncodingReport(truncated=[1, 2, 3], cut_ends=2, ends=2)


def test_an_empty_source_is_one_token() -> None:
    (example,), _ = encode(task_of(tokenizer=word_tokenizer()), {"source": ""}, labelled=False)
    assert example == {"row": 0, "length": 1, "input_ids": [EOS]}


def test_where_targets_end_with_a_language_code_the_decoder_begins_with_it() -> None:
    tokenizer = word_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s> w59", special_tokens=[("</s>", EOS), ("w59", 63)]
    )
    (example,), _ = encode(task_of(start=None, tokenizer=tokenizer), {"source": "w1", "target": "w3 w4"})
    assert example["labels"] == [*ids(3, 4), EOS, 63]
    assert example["decoder_input_ids"] == [63, *ids(3, 4), EOS]


def test_the_target_is_tokenised_as_a_target() -> None:
    class Two:
        """A tokenizer with another vocabulary for targets."""

        eos_token_id, pad_token_id = EOS, 0

        def __call__(self, text: Any = None, *, text_target: Any = None, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[7, EOS] for _ in text] if text else [[9, EOS] for _ in text_target]}

    (example,), _ = encode(task_of(tokenizer=Two()), {"source": "a", "target": "b"})
    assert (example["input_ids"], example["labels"]) == ([7, EOS], [9, EOS])


def test_an_example_is_shown_with_its_special_tokens() -> None:
    (example,), _ = encode(task_of(), {"source": "w1", "target": "w3"})
    assert task_of().show(example) == [("context", "w1 </s>"), ("learned", "w3 </s>")]


@pytest.mark.parametrize("name", ["source", "target"])
def test_a_row_without_text_is_named(name: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of().check([ROWS[0], {**ROWS[1], name: " "}], lambda i: f"a.jsonl:{i + 1}")
    assert str(caught.value).startswith(f"a.jsonl:2: expected text as {name}, found ' '")


# The stock model


def models() -> list[Any]:
    import transformers as t

    common: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": EOS}
    stacks: dict[str, Any] = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    }  # fmt: skip
    return [
        t.T5Config(**common, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
        t.BartConfig(**common, **stacks, bos_token_id=2, decoder_start_token_id=EOS, forced_eos_token_id=None),
        t.MarianConfig(**common, **stacks, decoder_start_token_id=0, forced_eos_token_id=None),
        t.MBartConfig(**common, **stacks, bos_token_id=2, forced_eos_token_id=None),
    ]


@pytest.mark.parametrize("config", models(), ids=lambda config: config.model_type)
def test_logits_and_loss_are_those_of_the_stock_model_that_shifts_the_labels_itself(config: Any) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    options = TaskOptions(("source", "target"), 16)
    task = build_task("seq2seq-lm", options, [], lambda i: "", tokenizer_that_ends(), config)
    batch = task.collate(encode(task, *ROWS)[0])  # type: ignore[arg-type]
    with torch.no_grad():
        ours = task.forward(model, batch)
        stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    learned = batch["labels"] != IGNORED
    assert torch.equal(task.counted(batch), learned)  # type: ignore[arg-type]
    torch.testing.assert_close(task.logits(ours)[learned], stock.logits[learned], atol=1e-6, rtol=0)
    assert (task.loss(ours, batch) / task.weight(batch)).item() == pytest.approx(stock.loss.item(), rel=1e-5)
    with torch.no_grad():
        again = model(**task.inputs(batch)).logits
    torch.testing.assert_close(again[learned], stock.logits[learned], atol=1e-6, rtol=0)


def test_generated_texts_are_those_of_the_stock_search() -> None:
    from transformers import BartForConditionalGeneration

    torch.manual_seed(3)
    model = BartForConditionalGeneration(models()[1]).eval()
    task = task_of(num_beams=3, max_new_tokens=5, start=EOS)
    batch = task.collate(encode(task, *ROWS, labelled=False)[0])
    assert "decoder_input_ids" not in batch
    answers = task.predict(model, batch)
    for row, answer in zip(ROWS, answers, strict=True):
        source = task.tokenizer(row["source"], return_tensors="pt")
        stock = model.generate(
            input_ids=source.input_ids, attention_mask=source.attention_mask, num_beams=3, max_new_tokens=5
        )
        assert answer == {"text": task.tokenizer.decode(stock[0], skip_special_tokens=True)}
        assert task.describe(answer) == answer["text"]


# Loss and metrics


def by_hand(logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0) -> tuple[float, int, int]:
    """Summed loss, hits and count of the target's tokens."""
    loss, hits, count = 0.0, 0, 0
    for row, at in zip(*np.nonzero(labels != IGNORED), strict=True):
        chances = log_softmax(logits[row, at])
        loss -= (1 - smoothing) * chances[labels[row, at]] + smoothing * chances.mean()
        hits += int(logits[row, at].argmax() == labels[row, at])
        count += 1
    return loss, hits, count


def noise(batch: dict[str, Any]) -> torch.Tensor:
    """Logits that are right about half the time."""
    logits = torch.randn(*batch["labels"].shape, 64)
    right = torch.nn.functional.one_hot(batch["labels"].clamp(0), 64)
    return logits + 4 * right * (torch.rand(*right.shape[:2], 1) < 0.5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_summed_over_the_targets_tokens(smoothing: float) -> None:
    task = task_of(label_smoothing=smoothing)
    batch = task.collate(encode(task, *ROWS)[0])
    logits = noise(batch)
    expected, _, count = by_hand(logits.double().numpy(), batch["labels"].numpy(), smoothing)
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == pytest.approx(expected, rel=1e-5)
    assert task.weight(batch) == count == sum(range(1, 8)) + 7


def test_metrics_over_uneven_batches_are_those_of_all_tokens() -> None:
    task = task_of(label_smoothing=0.1)  # no metric is smoothed
    examples, _ = encode(task, *ROWS)
    metrics, loss, hits, count = task.metrics(), 0.0, 0, 0
    for part in (examples[:4], examples[4:]):
        batch = task.collate(part)
        logits = noise(batch)
        task.update(metrics, logits, batch)
        more = by_hand(logits.double().numpy(), batch["labels"].numpy())
        loss, hits, count = loss + more[0], hits + more[1], count + more[2]
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert 0 < hits < count
    assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits / count, rel=1e-6)
    assert all(math.isnan(found[name]) for name in ("bleu", "chrf", "rouge_l")), "nothing was generated"


def grams(items: Any, n: int) -> Counter[Any]:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU of plain words: geometric mean of clipped precisions of 1 to 4 words, times the brevity penalty."""
    pairs = [(text.split(), reference.split()) for text, reference in zip(texts, references, strict=True)]
    logs = 0.0
    for n in range(1, 5):
        hits = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        logs += math.log(hits / sum(grams(a, n).total() for a, _ in pairs)) / 4
    length, wanted = (sum(len(p[i]) for p in pairs) for i in (0, 1))
    return math.exp(logs) * min(1.0, math.exp(1 - wanted / length))


def chrf(texts: list[str], references: list[str]) -> float:
    """Corpus chrF: F2 of the mean precision and recall of runs of 1 to 6 characters without spaces."""
    pairs = [(a.replace(" ", ""), b.replace(" ", "")) for a, b in zip(texts, references, strict=True)]
    precisions, recalls = [], []
    for n in range(1, 7):
        hits = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        precisions.append(hits / sum(max(0, len(a) - n + 1) for a, _ in pairs))
        recalls.append(hits / sum(max(0, len(b) - n + 1) for _, b in pairs))
    precision, recall = np.mean(precisions), np.mean(recalls)
    return float(5 * precision * recall / (4 * precision + recall))


def rouge_l(texts: list[str], references: list[str]) -> float:
    """Mean F1 of the longest common subsequence of words."""
    scores = []
    for a, b in zip((t.split() for t in texts), (r.split() for r in references), strict=True):
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        common = int(table[-1, -1])
        scores.append(2 * common / (len(a) + len(b)) if common else 0.0)
    return sum(scores) / len(scores)


def test_metrics_of_texts_equal_plain_references_over_uneven_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "a man rides a brown horse", "two dogs run on the sand", "", "a child", "the red car is parked outside",
        "people sit in a long row", "no word in common",
    ]  # fmt: skip
    references = [
        "a man rides a horse on sand", "two dogs run along the sand", "a woman sings", "a child",
        "the red car is outside now", "people sit in one long row", "completely different",
    ]  # fmt: skip
    monkeypatch.setattr(Seq2SeqLm, "_generate", lambda self, model, batch: batch["texts"])
    task, metrics = task_of(), None
    metrics = task.metrics()
    for part in (slice(0, 4), slice(4, 7)):
        batch = {"references": references[part], "texts": texts[part]}
        task.update_by_generation(metrics, torch.nn.Module(), batch)
    found = {name: float(metrics[name].compute()) for name in ("bleu", "chrf", "rouge_l")}
    assert found["bleu"] == pytest.approx(bleu(texts, references), rel=1e-5)
    assert found["chrf"] == pytest.approx(chrf(texts, references), rel=1e-5)
    assert found["rouge_l"] == pytest.approx(rouge_l(texts, references), rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "references", "expected"),
    [([""], ["x"], 0.0), (["x"], ["y"], 0.0), (["ab"], ["ab"], 1.0), (["a b", ""], ["ab", "cdcdcd"], 25 / 101)],
)
def test_chrf_counts_references_that_nothing_was_written_for(
    texts: list[str], references: list[str], expected: float
) -> None:
    # The last one by hand: runs of one character 2/2 and 2/8, of two 1/1 and 1/6; F2 of 1 and their mean, 5/24.
    metric = ChrF()
    metric.update(texts, [[reference] for reference in references])
    assert metric.compute() == pytest.approx(expected)


# Building


def test_a_base_without_a_decoder_of_its_own_is_refused() -> None:
    config = SimpleNamespace(model_type="llama", is_encoder_decoder=False)
    with pytest.raises(BaseModelError, match="it is a llama model, expected one with an encoder and a decoder"):
        build_task("seq2seq-lm", TaskOptions((), 16), [], lambda i: "", word_tokenizer(), config)


def test_a_base_that_does_not_say_how_its_decoder_begins_is_refused() -> None:
    config = SimpleNamespace(model_type="encoder-decoder", is_encoder_decoder=True)
    with pytest.raises(BaseModelError, match="does not say which token the decoder begins with"):
        build_task("seq2seq-lm", TaskOptions((), 16), [], lambda i: "", word_tokenizer(), config)


def test_max_length_is_at_most_the_number_of_positions() -> None:
    with pytest.raises(DataError, match="max_length is 33, but the model has 32 positions"):
        build_task("seq2seq-lm", TaskOptions((), 33), [], lambda i: "", word_tokenizer(), models()[1])


def test_a_restored_task_is_the_same_task() -> None:
    for task in (task_of(), task_of(start=None)):
        again = restore_task("seq2seq-lm", task.options, task.state(), task.tokenizer)
        assert again == task


def test_a_tokenizer_whose_package_is_missing_says_what_to_install(tmp_path: Any, monkeypatch: Any) -> None:
    import transformers

    from ticktune.base import BaseFiles, load_tokenizer

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("\nMarianTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(BaseModelError, match="MarianTokenizer requires the SentencePiece library") as caught:
        load_tokenizer(BaseFiles("owner/marian", tmp_path))
    assert "pip install sentencepiece" in str(caught.value.problems[0].fix)
