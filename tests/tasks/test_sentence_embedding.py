"""Sentence embedding: pooling, losses, correlations and ranks, and the files of sentence-transformers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from tests.models import word_tokenizer
from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.sentence_embedding import SentenceEmbedding
from ticktune.tasks.task import EncodingReport, Example, Row, TaskOptions, build_task, restore_task

SCORED, PAIRS = ("text", "text_pair", "score"), ("text", "text_pair")
ROWS = [
    {
        "text": " ".join(f"w{j}" for j in range(i + 1)),
        "text_pair": f"w{i} w{2 * i}",
        "score": [1, 5, 2, 4, 3, 2.5, 1][i],
    }
    for i in range(7)
]


def ids(*words: int) -> list[int]:
    return [4 + word for word in words]


def task_of(
    columns: tuple[str, ...] = SCORED, max_length: int = 16, pooling: str = "mean", is_unit: bool = False
) -> SentenceEmbedding:
    return SentenceEmbedding(TaskOptions(columns, max_length), word_tokenizer(), pooling, is_unit, 8, 1.0, 5.0)


def encode(task: SentenceEmbedding, *rows: Row, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


# Examples and batches


def test_a_row_is_two_texts_and_the_score_as_a_cosine() -> None:
    (example,), report = encode(task_of(), {"text": "w1 w2 w3", "text_pair": "w4", "score": 4})
    assert example == {"row": 0, "length": 3, "text": ids(1, 2, 3), "text_pair": ids(4), "target": 0.75}
    assert report == EncodingReport()


def test_each_text_is_cut_and_the_row_counted_once() -> None:
    row = {"text": "w1 w2 w3", "text_pair": "w4 w5 w6", "score": 1}
    (_, example), report = encode(task_of(max_length=2), {"text": "w1", "text_pair": "w2", "score": 1}, row)
    assert (example["text"], example["text_pair"]) == (ids(1, 2), ids(4, 5))
    assert report == EncodingReport(truncated=[1])


def test_the_two_texts_of_a_row_stand_half_a_batch_apart() -> None:
    task = task_of()
    batch = task.collate(encode(task, *ROWS[:3])[0])
    assert batch["input_ids"].tolist() == [
        [*ids(0), 0, 0],
        [*ids(0, 1), 0],
        ids(0, 1, 2),
        [*ids(0, 0), 0],
        [*ids(1, 2), 0],
        [*ids(2, 4), 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [1, 2, 3, 2, 2, 2]
    assert batch["target"].tolist() == [0, 1, 0.25]
    assert task.weight(batch) == 3 == len(next(iter(batch.values())))


def test_a_text_alone_is_one_sequence_and_an_empty_one_a_token() -> None:
    task = task_of()
    batch = task.collate(encode(task, {"text": "w1 w2"}, {"text": ""}, labelled=False)[0])
    assert batch["input_ids"].tolist() == [ids(1, 2), [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert task.row_of("w1\r") == {"text": "w1"}


def test_an_example_is_shown() -> None:
    (example,), _ = encode(task_of(), {"text": "w1", "text_pair": "w2", "score": 3})
    assert task_of().show(example) == [("context", "w1"), ("context", "w2"), ("learned", "cosine 0.5000")]
    (example,), _ = encode(task_of(PAIRS), {"text": "w1", "text_pair": "w2"})
    assert task_of(PAIRS).show(example)[-1] == ("learned", "nearest of the batch")


@pytest.mark.parametrize("score", [None, "x", math.nan, math.inf, True, [1]])
def test_a_score_that_is_no_number_is_named(score: Any) -> None:
    rows = [ROWS[0], {**ROWS[1], "score": score}]
    with pytest.raises(DataError, match="expected a finite number as score") as caught:
        task_of().check(rows, lambda i: f"a.jsonl:{i + 1}")
    assert caught.value.problems[0].where == "a.jsonl:2"


def test_pairs_without_scores_are_refused_where_scores_were_learned() -> None:
    with pytest.raises(DataError, match="a.jsonl:1: the column score is missing"):
        task_of().check([{"text": "w1", "text_pair": "w2"}], lambda i: f"a.jsonl:{i + 1}")


# Pooling

HIDDEN = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def pooled_by_hand(kind: str, tokens: np.ndarray) -> np.ndarray:
    found: np.ndarray = {
        "mean": tokens.mean(0),
        "cls": tokens[0],
        "max": tokens.max(0),
        "mean_sqrt_len_tokens": tokens.sum(0) / math.sqrt(len(tokens)),
        "lasttoken": tokens[-1],
    }[kind]
    return found


@pytest.mark.parametrize("is_unit", [False, True])
@pytest.mark.parametrize("kind", ["mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken"])
def test_pooling_looks_at_the_real_tokens_only(kind: str, is_unit: bool) -> None:
    found = task_of(pooling=kind, is_unit=is_unit).embed(HIDDEN, MASK)
    for row, length in enumerate((5, 2, 1)):
        expected = pooled_by_hand(kind, HIDDEN[row, :length].double().numpy())
        expected = expected / np.linalg.norm(expected) if is_unit else expected
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-6)


# Loss and metrics


def batch_and_hidden(task: SentenceEmbedding, examples: list[Example]) -> tuple[dict[str, Any], torch.Tensor]:
    batch = task.collate(examples)
    return batch, torch.randn(*batch["input_ids"].shape, 8)


def cosines_by_hand(hidden: torch.Tensor, batch: dict[str, Any]) -> np.ndarray:
    """Cosine of every text with every partner."""
    tokens, lengths = hidden.double().numpy(), batch["attention_mask"].sum(1).tolist()
    means = np.stack([row[:length].mean(0) for row, length in zip(tokens, lengths, strict=True)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    half = len(means) // 2
    return np.asarray(means[:half] @ means[half:].T)


def test_with_scores_the_loss_is_the_squared_error_of_the_cosine() -> None:
    task = task_of()
    batch, hidden = batch_and_hidden(task, encode(task, *ROWS)[0])
    targets = [(row["score"] - 1) / 4 for row in ROWS]
    expected = ((np.diag(cosines_by_hand(hidden, batch)) - targets) ** 2).sum()
    assert task.loss({"last_hidden_state": hidden}, batch).item() == pytest.approx(expected, rel=1e-5)


def test_without_scores_the_right_partner_is_chosen_among_the_batch_and_equal_ones_do_not_compete() -> None:
    task = task_of(PAIRS)
    rows = [*ROWS[:4], {"text": "w9", "text_pair": ROWS[1]["text_pair"]}]
    batch, hidden = batch_and_hidden(task, encode(task, *rows)[0])
    scores = cosines_by_hand(hidden, batch) / 0.05
    scores[1, 4] = scores[4, 1] = -np.inf
    expected = sum(np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(scores))
    assert task.loss({"last_hidden_state": hidden}, batch).item() == pytest.approx(expected, rel=1e-5)


def test_correlations_over_uneven_batches_are_those_of_all_rows() -> None:
    task = task_of()
    examples, _ = encode(task, *ROWS)
    metrics, cosines = task.metrics(), []
    for part in (examples[:4], examples[4:]):
        batch, hidden = batch_and_hidden(task, part)
        task.update(metrics, hidden, batch)
        cosines += np.diag(cosines_by_hand(hidden, batch)).tolist()
    scores = [row["score"] for row in ROWS]
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-5)
    assert found["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-5)
    errors = [(c - (s - 1) / 4) ** 2 for c, s in zip(cosines, scores, strict=True)]
    assert found["loss"] == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("sizes", [(4, 3), (7,), (1, 6)])
def test_ranks_are_those_among_all_rows_however_they_are_batched(sizes: tuple[int, ...]) -> None:
    task = task_of(PAIRS)
    rows = [{"text": f"w{i}", "text_pair": f"w{i + 10}"} for i in range(7)]
    examples, _ = encode(task, *rows)
    hidden = torch.randn(14, 1, 8)
    hidden[9] = hidden[8]  # two partners that are the same: neither stands before the other
    metrics, first = task.metrics(), 0
    for size in sizes:
        batch = task.collate(examples[first : first + size])
        rows_of_batch = torch.cat([hidden[first : first + size], hidden[7 + first : 7 + first + size]])
        task.update(metrics, rows_of_batch, batch)
        first += size
    whole = {"attention_mask": torch.ones(14, 1, dtype=torch.long)}
    cosines = cosines_by_hand(hidden, whole)
    places = [1 + int((row > row[i] + 1e-6).sum()) for i, row in enumerate(cosines)]
    assert len(set(places)) > 2
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found["mrr"] == pytest.approx(np.mean([1 / place for place in places]), rel=1e-6)
    assert found["hit1"] == pytest.approx(np.mean([place == 1 for place in places]), rel=1e-6)


def test_metrics_without_rows_are_not_a_number() -> None:
    assert math.isnan(float(task_of(PAIRS).metrics()["mrr"].compute()))


# Predictions


class Words(torch.nn.Module):
    """Hidden states that are a fixed vector of each token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return {"last_hidden_state": table[input_ids]}


def test_a_text_gives_its_embedding_and_a_pair_its_cosine() -> None:
    task = task_of(is_unit=True)
    one = task.predict(Words(), task.collate(encode(task, {"text": "w1"}, {"text": "w2 w3"}, labelled=False)[0]))
    assert [list(answer) for answer in one] == [["embedding"], ["embedding"]]
    pair = {"text": "w1", "text_pair": "w2 w3"}
    ((name, cosine),) = task.predict(Words(), task.collate(encode(task, pair, labelled=False)[0]))[0].items()
    assert name == "cosine"
    assert cosine == pytest.approx(np.dot(one[0]["embedding"], one[1]["embedding"]), abs=1e-6)
    assert task.describe({"cosine": 0.5}) == "0.5000"
    assert task.describe({"embedding": [0.5] * 8}) == "+0.5000 " * 6 + "... (8 numbers)"


def test_nothing_is_decided() -> None:
    decisions, margins = task_of().decide(HIDDEN)
    assert decisions.tolist() == [0, 0, 0]
    assert margins.tolist() == [math.inf] * 3


# The base's files


def folder(
    path: Path, kinds: list[str] | None = None, pooling: dict[str, Any] | None = None, transformer: str = ""
) -> Path:
    """A folder of sentence-transformers."""
    kinds = ["Transformer", "Pooling"] if kinds is None else kinds
    paths = [transformer, *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in zip(kinds, paths, strict=True)]
    (path / "1_Pooling").mkdir(parents=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling/config.json").write_text(json.dumps(pooling or {"pooling_mode_cls_token": True}))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 77}')
    return path


def build(path: Path, rows: list[Row] = ROWS, columns: tuple[str, ...] = SCORED, **entries: Any) -> SentenceEmbedding:
    config = SimpleNamespace(name_or_path=str(path), model_type="bert", hidden_size=8, **entries)
    config.get_text_config = lambda: config
    task = build_task("sentence-embedding", TaskOptions(columns, 16), rows, lambda i: f"a:{i + 1}", None, config)
    assert isinstance(task, SentenceEmbedding)
    return task


def test_a_plain_base_pools_by_the_mean(tmp_path: Path) -> None:
    task = build(tmp_path)
    assert (task.pooling, task.is_unit, task.size) == ("mean", False, 8)
    assert (task.lowest, task.highest) == (1, 5)
    assert task.default_metric == "spearman"
    assert build(tmp_path, columns=PAIRS).default_metric == "mrr"
    assert restore_task("sentence-embedding", task.options, json.loads(json.dumps(task.state())), None) == task


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_a_base_of_sentence_transformers_keeps_its_pooling(
    tmp_path: Path, entries: dict[str, Any], expected: str
) -> None:
    base = folder(tmp_path / "base", ["Transformer", "Pooling", "Normalize"], entries)
    task = build(base)
    assert (task.pooling, task.is_unit) == (expected, True)
    files = task.extra_files(base)
    assert files.keys() == {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    assert all((base / name).read_text() == text for name, text in files.items())


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], None, "made by Transformer, Pooling, Dense"),
        (None, {"pooling_mode_weightedmean_tokens": True}, "it pools by pooling_mode_weightedmean_tokens"),
        (None, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "it pools by cls, max"),
        (None, {"x": 1}, "it pools by nothing"),
    ],
)
def test_a_base_that_makes_its_embeddings_otherwise_is_refused(
    tmp_path: Path, kinds: list[str] | None, pooling: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(BaseModelError, match=message):
        build(folder(tmp_path / "base", kinds, pooling))


def test_damaged_files_of_a_base_are_named(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    (base / "1_Pooling/config.json").write_text("{")
    with pytest.raises(BaseModelError, match="cannot be read as JSON"):
        build(base)
    (base / "modules.json").write_text('{"a": 1}')
    with pytest.raises(BaseModelError, match="expected a list of modules"):
        build(base)


@pytest.mark.parametrize("transformer", [None, "0_Transformer"])
def test_a_folder_gets_the_files_that_its_base_lacks_and_they_say_the_same(
    tmp_path: Path, transformer: str | None
) -> None:
    base = tmp_path if transformer is None else folder(tmp_path / "base", None, None, transformer)
    task = build(base)
    for name, text in task.extra_files(base).items():
        (tmp_path / "merged" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "merged" / name).write_text(text)
    assert build(tmp_path / "merged") == task
    modules = json.loads((tmp_path / "merged/modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling"]
    assert json.loads((tmp_path / "merged/sentence_bert_config.json").read_text())["max_seq_length"] == 16


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="bert has an encoder and a decoder"):
        build(tmp_path, is_encoder_decoder=True)


def test_equal_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all rows have the same score, 1") as caught:
        build(tmp_path, rows=[ROWS[0], ROWS[0]])
    assert "leave the column out" in caught.value.problems[0].fix
