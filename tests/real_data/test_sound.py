"""Spoken digits: small models that know five of them learn all ten, and merge into stock ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.real_data import pretrain
from tests.real_data.bootstrap import interval

RECIPES = Path(__file__).parents[2] / "recipes"
ALONE = ["ticks.dim=0", "norms.train=none", "optimizer.head_lr=1e-2", "output=alone"]

STOCK = """
import json, sys, soundfile
from transformers import pipeline
ask = pipeline(sys.argv[1], sys.argv[2])
answers = []
for line in sys.stdin:
    samples, rate = soundfile.read(json.loads(line), dtype="float32")
    answers.append(ask({"raw": samples, "sampling_rate": rate}))
print(json.dumps(answers))
assert "ticktune" not in sys.modules
"""


def stock(kind: str, folder: Path, files: list[Path]) -> list[Any]:
    """What transformers' own pipeline answers, in a process without ticktune."""
    done = subprocess.run(
        [sys.executable, "-c", STOCK, kind, str(folder)],
        input="\n".join(json.dumps(str(file)) for file in files),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_spoken_digits(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    base = pretrain.sound_model(data_folder, tmp_path / "base", pretrain.small_wav2vec2())
    words = [
        f"base={{model: {base}, dropout: off}}",
        "optimizer={lr: 1e-2, p_lr_ratio: 1, norm_lr: 2e-2, head_lr: 3e-3}",
        "data.augment={noise: 0.3, time_mask: 0.2}",
        "training={epochs: 20, batch_size: 16, precision: fp32}",
        "evaluation={every: 100, save: last}",
    ]
    file = data_folder / "fsdd/test/metadata.jsonl"
    truth = lines(file.read_text())
    hits = {}
    for run, more in (("ours", ["output=ours"]), ("alone", ALONE)):
        done = ticktune("train", RECIPES / "spoken.yaml", *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = ticktune("predict", run, file, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        answers = lines(done.stdout)
        hits[run] = [float(a["label"] == str(row["label"])) for a, row in zip(answers, truth, strict=True)]
        if run == "ours":
            ours = answers
    mean, low, high = interval(hits["alone"], hits["ours"])
    figures = (
        f"accuracy {sum(hits['alone']) / 120:.3f} -> {sum(hits['ours']) / 120:.3f}: +{mean:.3f} ({low:.3f}, {high:.3f})"
    )
    assert low > 0, figures

    merged = ticktune("export", "ours", "--merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    theirs = stock("audio-classification", tmp_path / "ours/merged", [file.parent / row["file_name"] for row in truth])
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(mine["probability"] - other[0]["score"]) < 1e-3
        assert mine["label"] == other[0]["label"]


@pytest.mark.slow
def test_spoken_digits_are_written_as_words(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    base = pretrain.transcript_model(data_folder, tmp_path / "base", pretrain.small_wav2vec2())
    for split in ("train", "validation", "test"):
        folder = data_folder / "fsdd" / split
        rows = lines((folder / "metadata.jsonl").read_text())
        words = [{"audio": str(folder / r["file_name"]), "words": pretrain.WORDS[r["label"]]} for r in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    changes = [
        f"base={{model: {base}, dropout: off}}",
        *(f"data.{split}={split}.jsonl" for split in ("train", "validation", "test")),
        "data.columns={audio: audio, text: words}",
        "optimizer={lr: 1e-2, p_lr_ratio: 1, norm_lr: 2e-2, head_lr: 3e-3}",
        "training={epochs: 20, batch_size: 16, precision: fp32}",
        "evaluation={every: 1000, save: last}",
    ]
    (tmp_path / "recipe.yaml").write_text((RECIPES / "transcripts.yaml").read_text())
    truth = lines((tmp_path / "test.jsonl").read_text())
    hits: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for run, more in (("ours", ["output=ours"]), ("alone", ALONE)):
        done = ticktune("train", "recipe.yaml", *changes, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = ticktune("predict", run, "test.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        texts[run] = [answer["text"] for answer in lines(done.stdout)]
        hits[run] = [float(text == row["words"]) for text, row in zip(texts[run], truth, strict=True)]
    mean, low, high = interval(hits["alone"], hits["ours"])
    assert low > 0, (
        f"{sum(hits['alone'])} -> {sum(hits['ours'])} words right of 120: +{mean:.3f} ({low:.3f}, {high:.3f})"
    )

    merged = ticktune("export", "ours", "--merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    files = [Path(row["audio"]) for row in truth]
    theirs = stock("automatic-speech-recognition", tmp_path / "ours/merged", files)
    assert [answer["text"] for answer in theirs] == texts["ours"]
    # The merged folder brings its vocabulary along, and counts the errors that its transcripts have.
    scored = ticktune("eval", "ours/merged", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    errors = json.loads(scored.stdout)["metrics"]["wer"]
    assert abs(errors - word_errors(texts["ours"], [row["words"] for row in truth])) < 1e-6


def word_errors(found: list[str], wanted: list[str]) -> float:
    """The word error rate where every transcript is one word: it is wrong, or stands among others, or not."""
    count = 0
    for text, word in zip(found, wanted, strict=True):
        heard = text.split()
        count += max(len(heard), 1) - (word in heard)
    return count / len(wanted)
