"""Written text on real data: translation, arithmetic."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.real_data import pretrain
from tests.real_data.bootstrap import interval

RECIPES = Path(__file__).parents[2] / "recipes"

TRANSLATE = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
texts = []
sources = json.load(sys.stdin)
for i in range(0, len(sources), 32):
    inputs = tokenizer(sources[i:i + 32], padding=True, truncation=True, max_length=48, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, num_beams=2, max_new_tokens=30, do_sample=False)
    texts += tokenizer.batch_decode(out, skip_special_tokens=True)
print(json.dumps(texts))
assert "ticktune" not in sys.modules
"""


def stock(program: str, folder: Path, given: Any) -> Any:
    """What a program without ticktune says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained(ticktune: Run, recipe: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains and returns what the command printed."""
    done = ticktune("train", recipe, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def chrf(text: str, reference: str) -> float:
    """F2 of runs of 1 to 6 characters of one text, the mean over the lengths that both have."""
    scores = []
    a, b = text.replace(" ", ""), reference.replace(" ", "")
    for n in range(1, 7):
        made, wanted = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
        hits = (made & wanted).total()
        scores.append(5 * hits / (made.total() + 4 * wanted.total()) if wanted else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.slow
def test_a_model_that_knows_both_languages_learns_to_translate_and_merges(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    # The base has no head of its own to train alone: it is compared as it is.
    base = pretrain.denoiser(data_folder, tmp_path / "base")
    words = [
        f"base.model={base}",
        "data.train.limit=3500",
        "data.validation.limit=50",
        "data.test.limit=150",
        "data.max_length=48",
        "training={batch_size: 32, steps: 100, precision: fp32}",
        "optimizer={lr: 4e-3, norm_lr: 2e-2}",
        "evaluation={every: 100, metric: chrf, generate: {num_beams: 2, max_new_tokens: 30}}",
        "output=run",
    ]
    document = trained(ticktune, RECIPES / "translation.yaml", words, tmp_path)
    assert document["metrics"]["perplexity"] < document["base_metrics"]["perplexity"]
    assert document["metrics"]["chrf"] > document["base_metrics"]["chrf"]

    pairs = pretrain.captions(data_folder, "test", 0, 150)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"en": en}) for en, _ in pairs))
    done = ticktune("predict", "run", "rows.jsonl", cwd=tmp_path)
    ours = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    before = stock(TRANSLATE, base, [en for en, _ in pairs])
    scores = [[chrf(text, de) for text, (_, de) in zip(texts, pairs, strict=True)] for texts in (before, ours)]
    gain, low, high = interval(*scores)
    assert low > 0, (gain, low, high)

    merged = ticktune("export", "run", "--merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["verification"]["changed"] == 0
    assert stock(TRANSLATE, tmp_path / "run/merged", [en for en, _ in pairs]) == ours


LEGS = {"two": "bird duck", "four": "dog cat bear mouse frog", "six": "bee ant", "eight": "spider", "no": "fish snake"}
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy")

CONTINUE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
texts = []
for prompt in json.load(sys.stdin):
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False,
                         pad_token_id=0)
    texts.append(tokenizer.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
assert "ticktune" not in sys.modules
"""


@pytest.mark.slow
def test_a_story_teller_learns_to_answer_and_is_judged_by_its_answers(ticktune: Run, tmp_path: Path) -> None:
    # Rows made here: 260,000 parameters do not solve word problems. The base has no head to train alone.
    folder = os.environ.get("TICKTUNE_MODELS")
    if not folder:
        pytest.skip("TICKTUNE_MODELS is not set: it names the folder with stories260K-hf/")
    base = Path(folder) / "stories260K-hf"
    rows = [
        {"question": f"{name} saw a {kind} {animal}. How many legs does it have?", "answer": f"It has {legs} legs."}
        for name in NAMES
        for kind in ("big", "small", "red", "happy", "sad")
        for legs, animals in LEGS.items()
        for animal in animals.split()
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:320]), ("validation", rows[320:360]), ("test", rows[360:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    words = [
        f"base.model={base}",
        *(f"data.{name}={name}.jsonl" for name in ("train", "validation", "test")),
        "data.max_length=128",
        "training={steps: 80, batch_size: 32, precision: fp32}",
        "optimizer={lr: 5e-3, norm_lr: 1e-2, p_lr_ratio: 2}",
        'evaluation={every: 80, metric: exact_match, generate: {max_new_tokens: 16, answer: "has ([a-z]+) leg"}}',
        "output=run",
    ]
    document = trained(ticktune, RECIPES / "arithmetic.yaml", words, tmp_path)
    assert document["base_metrics"]["exact_match"] == 0
    done = ticktune("predict", "run", "test.jsonl", cwd=tmp_path)
    ours = [json.loads(line) for line in done.stdout.splitlines()]
    prompts = [row["question"] + "\n" for row in rows[360:]]
    before = stock(CONTINUE, base, prompts)
    answers = [next(legs for legs, a in LEGS.items() if row["question"].split()[4][:-1] in a.split()) for row in rows]
    scores = [
        [float(f"has {legs} leg" in text) for text, legs in zip(texts, answers[360:], strict=True)]
        for texts in (before, [one["text"] for one in ours])
    ]
    gain, low, high = interval(*scores)
    assert low > 0, (gain, low, high)
    evaluated = json.loads(ticktune("eval", "run", cwd=tmp_path).stdout)
    assert evaluated["metrics"]["exact_match"] == pytest.approx(sum(scores[1]) / 120, abs=1e-6)

    merged = ticktune("export", "run", "--merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert stock(CONTINUE, tmp_path / "run/merged", prompts) == [one["text"] for one in ours]
