"""Speech recognition: vocabularies, transcripts, frames, CTC, generation, metrics, processors that are saved."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.special import log_softmax, logsumexp
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
)

from tests.conftest import Run
from tests.models import table, word_tokenizer
from ticktune.base import BaseFiles, load_processor
from ticktune.errors import BaseModelError, DataError
from ticktune.evaluate import compute_metrics
from ticktune.tasks.sounds import frames_of
from ticktune.tasks.speech_recognition import CtcRecognition, GeneratedRecognition
from ticktune.tasks.task import IGNORED, EncodingReport, Example, TaskOptions, build_task, restore_task

WAV = table()["wav2vec2"].config
WHISPER = table()["whisper"].config

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a random sound of so many samples and returns its path."""

    def write(name: str, samples: int) -> str:
        noise = 0.1 * np.random.default_rng(samples).standard_normal(samples)
        soundfile.write(tmp_path / name, noise, 8000)
        return str(tmp_path / name)

    return write


def extractor() -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)


def build(texts: list[str], processor: Any, config: Any, **options: Any) -> Any:
    asked = TaskOptions(("audio", "text"), **{"max_length": 16, **options})
    rows = [{"audio": "", "text": text} for text in texts]
    return build_task("speech-recognition", asked, rows, lambda i: f"a.csv:{i + 2}", processor, config)


def ctc(*texts: str, **options: Any) -> CtcRecognition:
    task = build(list(texts or ("see a bee",)), extractor(), WAV, **options)
    assert isinstance(task, CtcRecognition)
    return task


def generated(**options: Any) -> GeneratedRecognition:
    processor = SimpleNamespace(
        feature_extractor=WhisperFeatureExtractor(feature_size=8, hop_length=200, chunk_length=1),
        tokenizer=word_tokenizer(),
    )
    task = build(["w1"], processor, WHISPER, **options)
    assert isinstance(task, GeneratedRecognition)
    return task


def encode(task: Any, *rows: dict[str, Any], labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


# Vocabulary


def test_the_vocabulary_of_a_base_without_one_is_the_characters_of_the_training_transcripts() -> None:
    task = ctc("ab  c", "cab")
    assert task.vocabulary == ("<pad>", "<unk>", "|", "a", "b", "c")
    assert len(task.tokenizer) == 6
    assert task.config()["vocab_size"] == 6
    assert task.config()["pad_token_id"] == 0
    assert task._ids("ab c") == [3, 4, 2, 5]


def test_a_base_keeps_its_own_vocabulary_unless_the_rows_are_asked_for() -> None:
    own = ctc("ABC").saved_processor(None)
    kept = build(["CAB"], own, WAV)
    assert kept.vocabulary == ()
    assert kept.tokenizer is own.tokenizer
    assert "vocab_size" not in kept.config()
    assert kept.saved_processor(own) is own
    assert build(["xy"], own, WAV, vocabulary="rows").vocabulary == ("<pad>", "<unk>", "|", "x", "y")


@pytest.mark.parametrize(
    ("own", "text", "message", "fix"),
    [
        (True, "abc", "the base's vocabulary lacks 'a', 'b', 'c', in 'abc'", "write the transcripts in the other case"),
        (True, "A-B", "the base's vocabulary lacks '-', in 'A-B'", "remove them, or set data.vocabulary: rows"),
        (False, "A|B", "the training transcripts' vocabulary lacks '|', in 'A|B'", "remove these characters"),
        (True, " \n", "the transcript is empty", "fill it in or remove the row"),
    ],
)
def test_a_transcript_that_cannot_be_written_is_named(
    write: Write, own: bool, text: str, message: str, fix: str
) -> None:
    task = build(["ABC"], ctc("ABC").saved_processor(None), WAV) if own else ctc("ABC")
    sound = write("a.wav", 900)
    rows = [{"audio": sound, "text": "CAB A"}, {"audio": sound, "text": text}]
    with pytest.raises(DataError) as caught:
        task.check(rows, lambda i: f"a.csv:{i + 2}")
    problem = caught.value.problems[0]
    assert (problem.message, problem.where, problem.fix) == (message, "a.csv:3", fix)


def test_a_file_that_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no")
    with pytest.raises(DataError, match="this is no sound that can be read") as caught:
        ctc("a").check([{"audio": str(tmp_path / "bad.wav"), "text": "a"}], lambda i: "a.csv:2")
    assert caught.value.problems[0].where == "a.csv:2"


def test_a_restored_task_writes_the_same_tokens_and_saves_them_for_stock_transformers(tmp_path: Path) -> None:
    task = ctc("zero one")
    again = restore_task("speech-recognition", task.options, task.state(), extractor())
    assert again.state() == task.state()
    assert again.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    again.saved_processor(extractor()).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, Wav2Vec2Processor)
    assert processor.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    assert processor.tokenizer("one zero").input_ids == task._ids("one zero")
    assert AutoFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000


def test_the_processor_of_speech_has_a_tokenizer_where_the_base_has_one(tmp_path: Path) -> None:
    WAV.save_pretrained(tmp_path)
    base = BaseFiles("base", tmp_path)
    with pytest.raises(BaseModelError, match="its feature extractor cannot be used"):
        load_processor(base, "speech")
    extractor().save_pretrained(tmp_path)
    assert isinstance(load_processor(base, "speech"), Wav2Vec2FeatureExtractor)
    ctc("abc").saved_processor(None).save_pretrained(tmp_path)
    assert isinstance(load_processor(base, "speech"), Wav2Vec2Processor)


# What a base or an option cannot do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.1}, "loss.label_smoothing is not defined for CTC, found 0.1"),
        ({"language": "english"}, "data.language is for Whisper alone, found english"),
    ],
)
def test_options_that_mean_nothing_for_ctc_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ctc("a", **options)


def test_options_that_mean_nothing_for_generation_are_refused() -> None:
    with pytest.raises(DataError, match="keeps its vocabulary"):
        generated(vocabulary="rows")
    with pytest.raises(DataError, match="data.max_length is 500, but the model writes 448 tokens"):
        generated(max_length=500)
    with pytest.raises(DataError, match="the base knows one language, found data.language: english"):
        generated(language="english")
    with pytest.raises(DataError, match="has no tokenizer"):
        build(["w1"], extractor(), WHISPER)
    several = type(WHISPER)(**{**WHISPER.to_diff_dict(), "vocab_size": 51865})
    with pytest.raises(DataError, match="the base knows several languages"):
        build(["w1"], SimpleNamespace(feature_extractor=None, tokenizer=word_tokenizer()), several)


def test_a_model_of_other_inputs_is_refused() -> None:
    with pytest.raises(DataError, match="a bert reads no waveforms by frames"):
        build(["a"], extractor(), table()["bert"].config)


# CTC


def test_a_transcript_longer_than_its_frames_has_nothing_to_learn_from(write: Write) -> None:
    task = ctc("aab")
    # Strides 5 and 2, kernels 10 and 3: 40 samples are 3 frames, 50 are 4, and "aab" needs one between its equals.
    rows = [{"audio": write("40.wav", 40), "text": "aab"}, {"audio": write("50.wav", 50), "text": "a a"}]
    rows += [{"audio": write("60.wav", 50), "text": "aab"}]
    assert frames_of(torch.tensor([40, 50]), task.convolutions).tolist() == [3, 4]
    examples, report = encode(task, *rows)
    assert [e["row"] for e in examples] == [1, 2]
    assert report.unsupervised == [0]
    assert "a character needs a frame" in report.why
    assert [e["row"] for e in encode(task, *rows, labelled=False)[0]] == [0, 1, 2]


def test_what_is_cut_is_counted_and_may_have_lost_its_words(write: Write) -> None:
    task = ctc("a", max_seconds=0.1)
    examples, report = encode(task, {"audio": write("a.wav", 900), "text": "a"})
    assert examples[0]["length"] == 800
    assert (report.truncated, report.cut_ends) == ([0], 1)


def example_batch(task: CtcRecognition, write: Write, *rows: tuple[int, str]) -> Any:
    made = [{"audio": write(f"{i}.wav", n), "text": text} for i, (n, text) in enumerate(rows)]
    return task.collate(encode(task, *made)[0])


def all_paths(scores: np.ndarray, labels: list[int], blank: int) -> float:
    """Minus the log probability of a transcript: the sum over every path that reads as it."""
    import itertools

    found = []
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        joined = [token for token, _ in itertools.groupby(path)]
        if [token for token in joined if token != blank] == labels:
            found.append(sum(scores[i, token] for i, token in enumerate(path)))
    return -float(logsumexp(found))


def test_the_loss_is_that_of_all_paths_over_the_frames_that_are_heard(write: Write) -> None:
    task = ctc("ab")
    batch = example_batch(task, write, (50, "aa"), (70, "ab"), (60, "b"))
    assert batch["frames"].tolist() == [4, 6, 5]
    assert task.weight(batch) == 5
    logits = torch.randn(3, 6, 5)
    expected = sum(
        all_paths(log_softmax(logits[i, :n].double().numpy(), axis=-1), labels, 0)
        for i, (n, labels) in enumerate([(4, [3, 3]), (6, [3, 4]), (5, [4])])
    )
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == pytest.approx(expected, rel=1e-5)
    assert task.counted(batch).sum(-1).tolist() == [4, 6, 5]  # type: ignore[union-attr]


@torch.no_grad()
def test_frames_and_logits_are_of_the_same_length(write: Write) -> None:
    task = ctc("ab")
    config = Wav2Vec2Config(**WAV.to_diff_dict() | task.config())
    model = AutoModelForCTC.from_config(config).eval()
    batch = example_batch(task, write, (50, "aa"), (701, "ab"), (8, "a"))
    logits = task.logits(task.forward(model, batch))
    assert logits.shape == (3, int(batch["frames"].max()), 5)
    assert task.counted(batch).shape == logits.shape[:2]  # type: ignore[union-attr]
    answers = task.predict(model, batch)
    assert [answer.keys() for answer in answers] == [{"text"}] * 3
    assert task.describe({"text": "ab"}) == "ab"


def heard_as(task: CtcRecognition, *tokens: list[str]) -> torch.Tensor:
    """Logits of frames in which these tokens are best."""
    longest = max(map(len, tokens))
    ids = [[task.vocabulary.index(t) for t in row] + [3] * (longest - len(row)) for row in tokens]
    return 5 * torch.nn.functional.one_hot(torch.tensor(ids), len(task.vocabulary)).float()


def test_equal_neighbours_are_one_and_what_is_padding_is_not_read(write: Write) -> None:
    task = ctc("bees a")
    batch = example_batch(task, write, (90, "bee"), (50, "a"))
    frames = batch["frames"].tolist()
    assert frames == [8, 4]
    logits = heard_as(task, ["b", "b", "e", "<pad>", "e", "|", "s", "s"], ["|", "s", "<pad>", "|"])
    assert task._heard(logits, batch) == ["bee s", "s"]


def edits(one: Any, other: Any) -> int:
    """Levenshtein distance, written out."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_error_rates_over_uneven_batches_are_those_of_a_plain_reference(write: Write) -> None:
    task = ctc("ab cb")
    texts = ["a b", "ab", "c", "b b b", "a", "cab", "b a"]
    rows = [(80 + 10 * i, text) for i, text in enumerate(texts)]
    logits = [torch.randn(n, 3, 6)[:, :1] + torch.randn(n, 20, 6) for n in (4, 3)]
    metrics, found, loss, count = task.metrics(), [], 0.0, 0.0
    for part, scores in ((rows[:4], logits[0]), (rows[4:], logits[1])):
        batch = example_batch(task, write, *part)
        scores = scores[:, : int(batch["frames"].max())]
        task.update(metrics, scores, batch)
        found += task._heard(scores, batch)
        loss += float(task.loss(SimpleNamespace(logits=scores), batch))
        count += task.weight(batch)
    assert len(found) == 7
    values = compute_metrics(metrics)
    words = sum(edits(a.split(), b.split()) for a, b in zip(found, texts, strict=True))
    letters = sum(edits(a, b) for a, b in zip(found, texts, strict=True))
    assert values["wer"] == pytest.approx(words / sum(len(t.split()) for t in texts))
    assert values["cer"] == pytest.approx(letters / sum(map(len, texts)))
    assert values["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert count == sum(map(len, texts))


def test_a_perfect_transcript_has_no_errors(write: Write) -> None:
    task = ctc("ab")
    batch = example_batch(task, write, (70, "a b"))
    metrics = task.metrics()
    task.update(metrics, heard_as(task, ["a", "<pad>", "|", "b", "b", "<pad>"]), batch)
    assert compute_metrics(metrics)["wer"] == compute_metrics(metrics)["cer"] == 0


def test_an_example_is_shown_as_its_tokens_have_it(write: Write) -> None:
    task = ctc("see a")
    path = write("a.wav", 2000)
    (example,), _ = encode(task, {"audio": path, "text": "see  a"})
    assert task.show(example) == [("context", f"{path} (0.25 s)"), ("learned", "see a")]


# Generation


def test_the_decoder_starts_from_its_start_and_learns_the_end(write: Write) -> None:
    task = generated()
    rows = [{"audio": write("a.wav", 800), "text": "w1 w2"}, {"audio": write("b.wav", 900), "text": "w3"}]
    batch = task.collate(encode(task, *rows)[0])
    assert batch["input_features"].shape == (2, 8, 80)
    assert batch["decoder_input_ids"].tolist() == [[2, 5, 6], [2, 7, 3]]
    assert batch["labels"].tolist() == [[5, 6, 3], [7, 3, IGNORED]]
    assert task.weight(batch) == 5
    assert task.inputs(batch).keys() == {"input_features", "decoder_input_ids"}
    assert task.counted(batch).tolist() == [[True] * 3, [True, True, False]]  # type: ignore[union-attr]


def test_tokens_that_generation_is_given_are_not_learned(write: Write) -> None:
    task = generated()
    task.tokenizer.prefix_tokens = [2, 60, 61]  # start, language, task
    (example,), _ = encode(task, {"audio": write("a.wav", 800), "text": "w1"})
    assert example["decoder_input_ids"] == [2, 60, 61, 5]
    assert example["labels"] == [IGNORED, IGNORED, 5, 3]


def test_long_sounds_and_long_transcripts_are_cut_and_counted_once(write: Write) -> None:
    task = generated(max_length=2)
    rows = [{"audio": write("a.wav", 8100), "text": "w1 w2 w3"}, {"audio": write("b.wav", 900), "text": "w1 w2"}]
    examples, report = encode(task, *rows)
    assert [e["length"] for e in examples] == [16000, 1800]
    assert [e["labels"] for e in examples] == [[5, 6], [5, 6]]
    assert (report.truncated, report.cut_ends) == ([0, 1], 2)
    assert task.limit() == "data.max_seconds = 1 seconds, or data.max_length = 2 tokens,"


def test_the_loss_is_that_of_the_learned_tokens_and_smoothing_is_in_it(write: Write) -> None:
    task = generated(label_smoothing=0.1)
    rows = [{"audio": write("a.wav", 800), "text": "w1 w2"}, {"audio": write("b.wav", 900), "text": "w3"}]
    batch = task.collate(encode(task, *rows)[0])
    logits = torch.randn(2, 3, 64)
    scores = log_softmax(logits.double().numpy(), axis=-1)
    learned = [(i, j, int(t)) for i, row in enumerate(batch["labels"]) for j, t in enumerate(row) if t != IGNORED]
    plain = -sum(scores[place] for place in learned)
    smooth = sum(-0.9 * scores[i, j, t] - 0.1 * scores[i, j].mean() for i, j, t in learned)
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == pytest.approx(smooth, rel=1e-5)
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    assert float(metrics["loss"].compute()) == pytest.approx(plain / 5, rel=1e-5)


@torch.no_grad()
def test_what_is_generated_is_scored_and_predicted(write: Write) -> None:
    task = generated(max_new_tokens=4)
    model = AutoModelForSpeechSeq2Seq.from_config(WHISPER).eval()
    rows = [{"audio": write(f"{i}.wav", 800 + i), "text": "w1 w2"} for i in range(3)]
    examples, _ = encode(task, *rows)
    batch = task.collate(examples)
    assert task.logits(task.forward(model, batch)).shape == (3, 3, 64)
    answers = [answer["text"] for answer in task.predict(model, batch)]
    unlabelled = task.collate(encode(task, *rows, labelled=False)[0])
    assert [answer["text"] for answer in task.predict(model, unlabelled)] == answers
    assert all(len(text.split()) <= 4 for text in answers)
    metrics = task.metrics()
    task.update_by_generation(metrics, model, batch)
    words = sum(edits(text.split(), ["w1", "w2"]) for text in answers)
    assert compute_metrics(metrics)["wer"] == pytest.approx(words / 6)


def test_a_merged_folder_knows_the_language(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"begin_suppress_tokens": [1], "lang_to_id": {"<|de|>": 60}}')
    assert generated().extra_files(tmp_path) == {}
    several = replace(generated(), options=TaskOptions(("audio", "text"), max_length=16, language="german"))
    defaults = json.loads(several.extra_files(tmp_path)["generation_config.json"])
    assert defaults == {
        "begin_suppress_tokens": [1],
        "lang_to_id": {"<|de|>": 60},
        "language": "german",
        "task": "transcribe",
    }


def test_a_restored_generator_is_the_same() -> None:
    task = generated()
    processor = SimpleNamespace(feature_extractor=task.extractor, tokenizer=task.tokenizer)
    assert restore_task("speech-recognition", task.options, task.state(), processor) == task
    assert task.saved_processor(processor) is processor


@pytest.mark.slow
def test_a_generator_learns_to_name_tones_and_merges(ticktune: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForSpeechSeq2Seq.from_config(WHISPER).save_pretrained(tmp_path / "base")
    task = generated()
    task.extractor.save_pretrained(tmp_path / "base")
    task.tokenizer.save_pretrained(tmp_path / "base")
    rows = []
    for i in range(24):
        pitch, name = ((300, "w1 w2"), (2500, "w3"))[i % 2]
        soundfile.write(
            tmp_path / f"{i}.wav", 0.3 * np.sin(2 * np.pi * pitch * (1 + i / 200) * np.arange(6000) / 8000), 8000
        )
        rows.append(json.dumps({"audio": f"{i}.wav", "text": name}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(rows[:16]))
    (tmp_path / "test.jsonl").write_text("".join(rows[16:]))
    (tmp_path / "recipe.yaml").write_text(
        "task: speech-recognition\nbase: {model: base, dropout: off}\noutput: run\n"
        "data: {train: train.jsonl, validation: test.jsonl, max_length: 8}\n"
        "optimizer: {lr: 3e-2, p_lr_ratio: 1, norm_lr: 5e-2}\ntraining: {steps: 120, batch_size: 8, precision: fp32}\n"
        "evaluation: {every: 120, save: last, generate: {max_new_tokens: 5}}\n"
    )
    done = ticktune("train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["metrics"]["loss"] < 0.5 * document["base_metrics"]["loss"]
    assert document["metrics"]["wer"] < document["base_metrics"]["wer"]
    for words in (["run", "--merge"], ["run", "--merge", "--dtype", "bfloat16", "-o", "half"]):
        done = ticktune("export", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    ours = ticktune("predict", "run", "test.jsonl", cwd=tmp_path)
    merged = ticktune("predict", "run/merged", "16.wav", "17.wav", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    same = [json.loads(line) for line in ours.stdout.splitlines()[:2]]
    named = [{"audio": name, **answer} for name, answer in zip(("16.wav", "17.wav"), same, strict=True)]
    assert [json.loads(line) for line in merged.stdout.splitlines()] == named
