"""Audio classification: files, resampling, lengths, random changes, batches, loss, metrics, predictions."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    ASTFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    HubertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

from tests.models import table
from ticktune.errors import DataError
from ticktune.evaluate import compute_metrics
from ticktune.tasks.audio_classification import AudioClassification
from ticktune.tasks.sounds import (
    change_sound,
    convolutions_of,
    count_samples,
    frames_of,
    read_sound,
    resample,
    shortest_of,
    sound_inputs,
)
from ticktune.tasks.task import EncodingReport, Example, TaskOptions, build_task, restore_task

LABELS = ("bark", "meow", "moo")
WAV = SimpleNamespace(conv_kernel=(10, 3), conv_stride=(5, 2))

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a sound, random if none is given, and returns its path."""

    def write(name: str, samples: Any, rate: int = 8000) -> str:
        if isinstance(samples, int):
            samples = 0.1 * np.random.default_rng(samples).standard_normal(samples)
        soundfile.write(tmp_path / name, samples, rate)
        return str(tmp_path / name)

    return write


def extractor(**options: Any) -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(**{"sampling_rate": 8000, "return_attention_mask": True, **options})


def task_of(processor: Any = None, config: Any = WAV, **options: Any) -> AudioClassification:
    rows = [{"audio": "", "label": label} for label in ("moo", "bark", "meow", "bark")]
    asked = TaskOptions(("audio", "label"), 128, **options)
    return build_task("audio-classification", asked, rows, lambda i: f"a.csv:{i}", processor or extractor(), config)


def encode(task: AudioClassification, *rows: dict[str, Any], **options: Any) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=options.get("labelled", True)), report


# Reading


@pytest.mark.parametrize("rates", [(8000, 16000), (16000, 8000), (44100, 16000), (48000, 16000), (22050, 8000)])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_resampling_is_that_of_scipy(rates: tuple[int, int], count: int) -> None:
    old, new = rates
    sound = np.random.default_rng(0).standard_normal(count)
    shared = math.gcd(old, new)
    expected = resample_poly(sound, new // shared, old // shared)
    found = resample(torch.tensor(sound, dtype=torch.float32), old, new).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_pitch_that_the_new_rate_cannot_hold_is_gone_and_does_not_come_back_as_another() -> None:
    high = torch.sin(2 * math.pi * 5500 / 16000 * torch.arange(16000))
    assert resample(high, 16000, 8000)[200:-200].abs().max() < 0.02
    low = torch.sin(2 * math.pi * 500 / 16000 * torch.arange(16000))
    assert (resample(low, 16000, 8000) - low[::2])[200:-200].abs().max() < 0.02


def test_channels_are_mixed_and_what_is_too_long_loses_its_end(write: Write) -> None:
    both = np.stack([np.full(800, 0.5), np.full(800, 0.25)], axis=1)
    path = write("two.wav", both)
    assert read_sound(path, 8000, 1.0) == pytest.approx(0.375, abs=1e-4)
    assert read_sound(path, 8000, 0.05).shape == (400,)
    assert read_sound(path, 16000, 0.05).shape == (800,)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_the_header_knows_how_long_a_sound_will_be(write: Write, name: str) -> None:
    path = write(name, 4410, 44100)
    for rate in (8000, 16000, 44100):
        assert count_samples(path, rate) == len(read_sound(path, rate, 9.0)) == math.ceil(4410 * rate / 44100)


# Rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "this is no sound that can be read"),
        (b"", "this is no sound that can be read"),
        (None, "this sound is empty"),
    ],
)
def test_a_file_that_is_no_sound_is_named_with_its_row(
    write: Write, tmp_path: Path, content: bytes | None, message: str
) -> None:
    bad = tmp_path / "bad.wav"
    if content is None:
        soundfile.write(bad, np.zeros(0), 8000)
    else:
        bad.write_bytes(content)
    rows = [{"audio": write("a.wav", 100), "label": "moo"}, {"audio": str(bad), "label": "bark"}]
    with pytest.raises(DataError, match=message) as caught:
        task_of().check(rows, lambda i: f"a.csv:{i + 2}")
    assert caught.value.problems[0].where == "a.csv:3"
    assert str(bad) in str(caught.value)


def test_a_label_that_the_training_rows_lack_is_named(write: Write) -> None:
    rows = [{"audio": write("a.wav", 100), "label": "quack"}]
    with pytest.raises(DataError, match="1 label does not occur in the training rows: 'quack'"):
        task_of().check(rows, lambda i: "a.csv:2")


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    soundfile.write(path, np.array([0.0, np.nan], dtype=np.float32), 8000, subtype="FLOAT")
    with pytest.raises(DataError, match="some that are no numbers"):
        read_sound(str(path), 8000, 1.0)


def test_length_is_in_samples_of_the_model_and_what_is_cut_is_counted(write: Write) -> None:
    task = task_of(max_seconds=0.5)
    rows = [{"audio": write("a.wav", 8000, 16000), "label": "moo"}, {"audio": write("b.wav", 8000), "label": "bark"}]
    examples, report = encode(task, *rows)
    assert [(e["row"], e["length"], e["target"]) for e in examples] == [(0, 4000, 2), (1, 4000, 0)]
    assert report == EncodingReport(truncated=[1])
    assert task.limit() == "data.max_seconds = 0.5 seconds"
    assert task.collate(examples)["input_values"].shape == (2, 4000)


def test_without_answers_there_is_no_target(write: Write) -> None:
    task = task_of()
    examples, _ = encode(task, {"audio": write("a.wav", 100)}, labelled=False)
    assert "target" not in task.collate(examples)


def test_an_example_is_shown_by_its_path_length_and_label(write: Write) -> None:
    path = write("a.wav", 2000)
    task = task_of()
    (example,), _ = encode(task, {"audio": path, "label": "meow"})
    assert task.show(example) == [("context", f"{path} (0.25 s)"), ("learned", "meow")]


# Random changes


def test_sounds_change_by_the_seed_alone_and_only_while_learning(write: Write) -> None:
    task = task_of(augment={"noise": 0.5, "time_mask": 0.5})
    rows = [{"audio": write(f"{i}.wav", 900 + i), "label": "moo"} for i in range(3)]
    examples, _ = encode(task, *rows)
    plain = task.collate(examples)["input_values"]
    assert torch.equal(plain, task_of().collate(examples, seed=1)["input_values"])
    changed = task.collate(examples, seed=1)["input_values"]
    assert torch.equal(changed, task.collate(examples, seed=1)["input_values"])
    assert not torch.equal(changed, task.collate(examples, seed=2)["input_values"])
    assert not torch.equal(changed, plain)
    # A row is changed alike in whatever batch it stands.
    alone = task.collate(examples[1:2], seed=1)["input_values"][0]
    torch.testing.assert_close(changed[1, :901], alone)


def test_a_piece_of_at_most_the_asked_share_is_silenced() -> None:
    sound = np.ones(1000, np.float32)
    shares = []
    for row in range(200):
        silent = change_sound(sound, {"time_mask": 0.3}, 5, row) == 0
        assert np.abs(np.diff(silent.astype(int))).sum() <= 2  # one piece
        shares.append(silent.mean())
    assert max(shares) <= 0.3
    assert 0.12 < np.mean(shares) < 0.18


def test_noise_is_as_loud_as_asked_for_compared_with_the_sound() -> None:
    sound = (3 * np.sin(np.arange(4000))).astype(np.float32)
    loudness = [np.std(change_sound(sound, {"noise": 0.4}, 5, row) - sound) for row in range(100)]
    assert max(loudness) < 0.42 * np.std(sound)
    assert 0.15 * np.std(sound) < np.mean(loudness) < 0.25 * np.std(sound)


# Batches


@pytest.mark.parametrize("masked", [True, False])
def test_a_sound_is_normalised_by_itself_whatever_it_is_padded_to(write: Write, masked: bool) -> None:
    task = task_of(extractor(return_attention_mask=masked))
    rows = [{"audio": write("a.wav", 500), "label": "moo"}, {"audio": write("b.wav", 900), "label": "moo"}]
    examples, _ = encode(task, *rows)
    batch = task.collate(examples)
    alone = task.collate(examples[:1])["input_values"][0]
    torch.testing.assert_close(batch["input_values"][0, :500], alone)
    assert (batch["input_values"][0, 500:] == 0).all()
    assert ("attention_mask" in task.inputs(batch)) == masked
    if masked:
        assert batch["attention_mask"].sum(-1).tolist() == [500, 900]
    assert task.weight(batch) == 2


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_frames_are_counted_as_the_model_counts_them(family: str) -> None:
    config = table()[family].config
    model = AutoModelForAudioClassification.from_config(config)
    lengths = torch.tensor([10, 20, 399, 800, 801])
    convolutions = convolutions_of(config)
    assert frames_of(lengths, convolutions).tolist() == model._get_feat_extract_output_lengths(lengths).tolist()
    shortest = shortest_of(convolutions, 8000)
    assert frames_of(torch.tensor([shortest - 1, shortest]), convolutions).tolist() == [0, 1]


def test_frames_after_an_adapter_are_counted_as_the_model_counts_them() -> None:
    config = Wav2Vec2Config(**table()["wav2vec2"].config.to_diff_dict() | {"add_adapter": True})
    model = AutoModelForCTC.from_config(config)
    lengths = torch.tensor([500, 801])
    assert (
        frames_of(lengths, convolutions_of(config)).tolist() == model._get_feat_extract_output_lengths(lengths).tolist()
    )


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "audio-spectrogram-transformer"])
@torch.no_grad()
def test_a_click_of_one_sample_is_heard(write: Write, family: str) -> None:
    config = table()[family].config
    processor: Any = extractor()
    if family == "audio-spectrogram-transformer":
        processor = ASTFeatureExtractor(num_mel_bins=16, max_length=40, sampling_rate=16000)
    config.num_labels = 3
    model = AutoModelForAudioClassification.from_config(config).eval()
    task = task_of(processor, config)
    rows = [{"audio": write("click.wav", np.ones(1)), "label": "moo"}, {"audio": write("b.wav", 900), "label": "moo"}]
    for part in (rows, rows[:1]):
        answers = task.predict(model, task.collate(encode(task, *part)[0]))
        assert len(answers) == len(part)
        for answer in answers:
            assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert answer["probabilities"][answer["label"]] == answer["probability"]
            assert task.describe(answer) == f"{answer['label']}  {answer['probability']:.4f}"


@torch.no_grad()
def test_with_a_mask_a_prediction_does_not_depend_on_the_batch(write: Write) -> None:
    config = Wav2Vec2Config(**table()["wav2vec2"].config.to_diff_dict() | {"feat_extract_norm": "layer"})
    config.num_labels = 3
    model = AutoModelForAudioClassification.from_config(config).eval()
    task = task_of()
    examples, _ = encode(task, *[{"audio": write(f"{n}.wav", n), "label": "moo"} for n in (400, 700, 900)])
    together = model(**task.inputs(task.collate(examples))).logits
    alone = torch.cat([model(**task.inputs(task.collate([e]))).logits for e in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_spectrograms_are_read_without_a_mask(write: Write) -> None:
    processor = ASTFeatureExtractor(num_mel_bins=16, max_length=40, sampling_rate=16000)
    task = task_of(processor, table()["audio-spectrogram-transformer"].config)
    batch = task.collate(encode(task, {"audio": write("a.wav", 2000), "label": "moo"})[0])
    assert task.inputs(batch).keys() == {"input_values"}
    assert batch["input_values"].shape == (1, 40, 16)


def test_an_extractor_that_gives_something_else_is_refused() -> None:
    def odd(*_: Any, **__: Any) -> dict[str, Any]:
        return {"pixel_values": torch.zeros(1)}

    odd.sampling_rate = 8000  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="neither input_values nor input_features"):
        sound_inputs(odd, [np.zeros(5)], 1)


# Configuring, loss, metrics


def test_the_bases_own_masking_is_off_and_known_again_after_a_restore() -> None:
    task = task_of(config=HubertConfig(conv_kernel=(10, 3), conv_stride=(5, 2), conv_dim=(8, 8)))
    assert task.config()["apply_spec_augment"] is False
    assert task.config()["id2label"] == dict(enumerate(LABELS))
    again = restore_task("audio-classification", task.options, task.state(), task.extractor)
    assert again == task
    assert "apply_spec_augment" not in task_of().config()


def test_balanced_weights_and_smoothing_are_in_the_loss() -> None:
    task = task_of(class_weights="balanced", label_smoothing=0.1)
    assert task.weights == pytest.approx((4 / 6, 4 / 3, 4 / 3))
    logits, target = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    weights, scores = np.array(task.weights), log_softmax(logits.double().numpy(), axis=-1)
    expected = sum(
        -0.9 * weights[t] * row[t] - 0.1 / 3 * (weights * row).sum() for t, row in zip(target, scores, strict=True)
    )
    loss = task.loss(SimpleNamespace(logits=logits), {"target": target})
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_metrics_over_uneven_batches_with_an_absent_class_are_those_of_a_plain_reference() -> None:
    task = task_of()
    logits, target = torch.randn(7, 3), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    metrics = task.metrics()
    for part in (slice(0, 4), slice(4, 7)):
        task.update(metrics, logits[part], {"target": target[part]})
    found = compute_metrics(metrics)
    values, truth = logits.double().numpy(), target.numpy()
    decided = values.argmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, decided))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, decided), abs=1e-6)
    present = sorted({*truth.tolist(), *decided.tolist()})
    assert found["f1"] == pytest.approx(f1_score(truth, decided, average="macro", labels=present), abs=1e-6)
    p = softmax(values, axis=-1)
    above = [np.mean([[a > b for b in p[truth != c, c]] for a in p[truth == c, c]]) for c in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(above), abs=1e-6)
    losses = -log_softmax(values, axis=-1)[np.arange(7), truth]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    decisions, gaps = task.decide(logits)
    assert decisions.tolist() == decided.tolist()
    assert gaps.tolist() == pytest.approx((np.sort(values)[:, -1] - np.sort(values)[:, -2]).tolist(), abs=1e-6)
