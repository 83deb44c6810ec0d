"""Spoken digits: small models that know five of them learn all ten, and merge into stock ones."""

import math
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import better_than_the_head, document, merged, stock

PIPELINE = """
import json, sys, soundfile
from transformers import pipeline
ask = pipeline(sys.argv[2], sys.argv[1])
for line in sys.stdin:
    samples, rate = soundfile.read(json.loads(line), dtype="float32")
    print(json.dumps(ask({"raw": samples, "sampling_rate": rate})))
"""


def test_spoken_digits_are_told_better_than_by_the_head_alone(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    case = cases.spoken(data_folder, tmp_path)
    ours = better_than_the_head(case, ticktune, tmp_path)
    files = [row["audio"] for row in case.rows]
    theirs = stock(PIPELINE, merged(ticktune, case, "ours", tmp_path), "audio-classification", lines=files)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["probability"] == pytest.approx(other[0]["score"], abs=1e-3)
        assert mine["label"] == other[0]["label"]


def test_spoken_digits_are_written_better_than_by_the_head_alone(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    case = cases.transcripts(data_folder, tmp_path)
    ours = [answer["text"] for answer in better_than_the_head(case, ticktune, tmp_path)]
    folder = merged(ticktune, case, "ours", tmp_path)
    theirs = stock(PIPELINE, folder, "automatic-speech-recognition", lines=[row["audio"] for row in case.rows])
    assert [answer["text"] for answer in theirs] == ours
    # The merged folder brings its vocabulary along, and counts the errors that its transcripts have.
    scored = document(ticktune("eval", folder, "--precision", "fp32", cwd=tmp_path))["metrics"]["wer"]
    assert math.isclose(scored, word_errors(ours, [row["words"] for row in case.rows]), abs_tol=1e-6)


def word_errors(found: list[str], wanted: list[str]) -> float:
    """The word error rate where every transcript is one word: it is wrong, or stands among others, or not."""
    count = 0
    for text, word in zip(found, wanted, strict=True):
        heard = text.split()
        count += max(len(heard), 1) - (word in heard)
    return count / len(wanted)
