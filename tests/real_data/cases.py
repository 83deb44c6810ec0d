"""Each task's recipe made small: what it starts from, on which rows, for how long, and how an answer is scored.

The tests run a case by the command line; ``benchmarks/tasks.py`` compares ways of fine-tuning on it, and chose the
learning rates here, those of the head alone too, on validation rows.
"""

import csv
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.real_data import pretrain
from tests.real_data.bootstrap import Array, mean

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One of the recipes, made small.

    Args:
        recipe: Name of the recipe.
        words: What is changed for every way of fine-tuning: base, rows, steps.
        rates: Learning rates of ticks and norms, keys of ``optimizer``.
        head_lr: Learning rate where the head alone is trained; None: the base has a head of its own, and as it is
            stands for it.
        rows: Test rows.
        score: Of one answer to one row; more is better.
        measure: What is made of the scores of all rows, where that is not their mean: see ``bootstrap.interval``.
    """

    recipe: str
    words: list[str]
    rates: dict[str, float]
    head_lr: float | None
    rows: list[Row]
    score: Callable[[Row, Row], Any]
    measure: Callable[[Array], Array] = mean

    @property
    def path(self) -> Path:
        """The recipe."""
        return ROOT / "recipes" / f"{self.recipe}.yaml"

    def ours(self) -> list[str]:
        """The words of a run of ticks and norms."""
        return [*self.words, *(f"optimizer.{name}={rate}" for name, rate in self.rates.items())]

    def alone(self) -> list[str]:
        """The words of a run of the head alone."""
        return [*self.words, f"optimizer.head_lr={self.head_lr}", "ticks.dim=0", "norms.train=none"]

    def scores(self, answers: Sequence[Row]) -> list[Any]:
        """The score of each row's answer."""
        return [self.score(answer, row) for answer, row in zip(answers, self.rows, strict=True)]

    def file(self, folder: Path) -> Path:
        """Writes the test rows as a file."""
        return write_rows(folder / "rows.jsonl", self.rows)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path, count: int | None = None, chosen: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """The first rows of a file that are chosen."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [row for row in map(json.loads, filter(None, lines)) if chosen(row)][:count]


def right(answer: Row, row: Row) -> float:
    """Whether the label is right."""
    return float(answer["label"] == str(row["label"]))


def belief(answer: Row, row: Row) -> float:
    """The probability of the right label."""
    return float(answer["probabilities"][str(row["label"])])


def sentiment(data: Path, folder: Path) -> Case:
    """Whether phrases of film reviews are praise, by MiniLM."""
    words = ["data.train.limit=480", "training={epochs: 2, batch_size: 16}", f"data.test={data}/sst2/test.jsonl"]
    rows = read_rows(data / "sst2/test.jsonl", 400)
    words[-1] = f"data.test={write_rows(folder / 'test.jsonl', rows)}"
    rates = {"lr": 1e-3, "norm_lr": 3e-3, "head_lr": 3e-3}
    return Case("sst2", words, rates, 1e-2, rows, right)


def reviews(data: Path, folder: Path) -> Case:
    """Whether Chinese reviews of books and laptops are praise, by a small BERT that read those of hotels."""
    base = pretrain.review_model(data, folder / "base")
    counts = {"train": 3300, "validation": 695, "test": 695}
    parts = {name: pretrain.reviews(data, name, hotels=False)[:count] for name, count in counts.items()}
    words = [f"base.model={base}", "data.max_length=48", "training={epochs: 3, batch_size: 16, precision: fp32}"]
    words += [f"data.{name}={write_rows(folder / f'{name}.jsonl', part)}" for name, part in parts.items()]
    rates = {"lr": 1.4e-3, "norm_lr": 4e-3, "head_lr": 4e-3}
    return Case("reviews", words, rates, 1e-2, parts["test"], right)


def entities(data: Path, folder: Path) -> Case:
    """Entities in posts, by MiniLM: most posts name nothing; those that do teach more in as many steps."""
    from ticktune.tasks.token_classification import spans_of

    source = data / "wnut17"
    train = read_rows(source / "train.jsonl", 640, lambda row: {*row["ner_tags"]} > {"O"})
    words = [f"data.train.path={write_rows(folder / 'train.jsonl', train)}"]
    words += ["data.validation.limit=200", "data.test.limit=250", "training={steps: 40, batch_size: 16}"]

    def f1(answer: Row, row: Row) -> float:
        guessed, true = (set(spans_of(tags, marked=True)) for tags in (answer["tags"], row["ner_tags"]))
        return 2 * len(guessed & true) / (len(guessed) + len(true)) if guessed | true else 1.0

    rates = {"lr": 1e-3, "norm_lr": 3e-3, "head_lr": 7.5e-3}
    return Case("entities", words, rates, 2.5e-2, read_rows(source / "test.jsonl", 250), f1)


def questions(data: Path, folder: Path) -> Case:
    """Answers in one sentence, by MiniLM, which never learned to answer: what a few steps teach."""
    from ticktune.tasks.question_answering import word_f1

    files = {name: short_questions(data / "squad_v1_dev" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    counts = {"train": 560, "validation": 150, "test": 180}
    words = []
    for name, rows in files.items():
        words.append(f"data.{name}={write_rows(folder / f'{name}.jsonl', rows[: counts[name]])}")
    words += ["training={epochs: 1, batch_size: 16}", "data.max_length=96", "data.overlap=16"]
    rates = {"lr": 1e-3, "norm_lr": 2.5e-3, "head_lr": 1.5e-3}
    return Case(
        "questions", words, rates, 1e-2, files["test"][:180],
        lambda answer, row: word_f1(answer["answer"], row["answers"]["text"]),
    )  # fmt: skip


def short_questions(path: Path) -> list[Row]:
    """Questions, each with the sentence of its answer alone."""
    rows = []
    for row in read_rows(path):
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        context = row["context"]
        first = max(context.rfind(". ", 0, start) + 2, 0) if ". " in context[:start] else 0
        last = context.find(". ", start + len(text))
        last = len(context) if last < 0 else last + 1
        if last - first < 250:
            answers = {"text": [text], "answer_start": [start - first]}
            rows.append({"question": row["question"], "context": context[first:last], "answers": answers})
    return rows


def domain(data: Path, folder: Path) -> Case:
    """Masked words of Shakespeare, by a small BERT that read captions of pictures."""
    base = pretrain.masked_model(data, folder / "base")
    source = data / "tinyshakespeare"
    validation = (source / "validation.txt").read_text(encoding="utf-8")
    (folder / "validation.txt").write_text(validation[:15_000], encoding="utf-8")
    words = [f"base.model={base}", f"data.validation={folder}/validation.txt"]
    words += ["data.max_length=64", "training={steps: 100, batch_size: 32, precision: fp32}"]
    # The probability of a word that is no good guess is no part of an answer: the tests ask stock transformers.
    rows = masked_lines(source / "test.txt", 300)
    rates = {"lr": 3e-3, "norm_lr": 5e-3}
    return Case("domain", words, rates, None, rows, lambda answer, row: float(answer["log_probability"]))


def masked_lines(path: Path, count: int) -> list[Row]:
    """Lines with one word masked, another place in each, and the word."""
    rows = []
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) > 4][:count]
    for number, words in enumerate(lines):
        place = number % (len(words) - 1)
        word = words[place].strip(",.;:!?'").lower()
        if word.isalpha():
            rows.append({"text": " ".join([*words[:place], "[MASK]", *words[place + 1 :]]), "word": word})
    return rows


def translation(data: Path, folder: Path) -> Case:
    """English captions to German ones, by a small BART that read captions of both languages."""
    base = pretrain.denoiser(data, folder / "base")
    words = [
        f"base.model={base}",
        "data.columns={source: en, target: de}",
        "data.train.limit=3500",
        "data.validation.limit=100",
        "data.test.limit=150",
        "data.max_length=48",
        "training={batch_size: 32, steps: 100, precision: fp32}",
        "evaluation={metric: chrf, generate: {num_beams: 2, max_new_tokens: 30}}",
    ]
    rows = [{"en": en, "de": de} for en, de in pretrain.captions(data, "test", 0, 150)]
    rates = {"lr": 4e-3, "norm_lr": 2e-2}
    return Case("translation", words, rates, None, rows, lambda answer, row: chrf(answer["text"], row["de"]))


def chrf(text: str, reference: str) -> float:
    """F2 of runs of 1 to 6 characters of one text, the mean over the lengths that both have."""
    scores = []
    a, b = text.replace(" ", ""), reference.replace(" ", "")
    for n in range(1, 7):
        made, wanted = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
        hits = (made & wanted).total()
        scores.append(5 * hits / (made.total() + 4 * wanted.total()) if wanted else 0.0)
    return sum(scores) / len(scores)


LEGS = {"two": "bird duck", "four": "dog cat bear mouse frog", "six": "bee ant", "eight": "spider", "no": "fish snake"}
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy")


def arithmetic(models: Path, folder: Path) -> Case:
    """Questions after the legs of animals, by a small teller of stories: it is too small for word problems."""
    rows = [
        {
            "question": f"{name} saw a {kind} {animal}. How many legs does it have?",
            "answer": f"It has {legs} legs.",
            "legs": legs,
        }
        for name in NAMES
        for kind in ("big", "small", "red", "happy", "sad")
        for legs, animals in LEGS.items()
        for animal in animals.split()
    ]
    random.Random(0).shuffle(rows)
    parts = {"train": rows[:320], "validation": rows[320:360], "test": rows[360:]}
    words = [
        f"base.model={models}/stories260K-hf",
        *(f"data.{name}={write_rows(folder / f'{name}.jsonl', part)}" for name, part in parts.items()),
        "data.max_length=128",
        "training={steps: 80, batch_size: 32, precision: fp32}",
        'evaluation={metric: exact_match, generate: {max_new_tokens: 16, answer: "has ([a-z]+) leg"}}',
    ]
    rates = {"lr": 5e-3, "norm_lr": 1e-2, "p_lr_ratio": 2}
    return Case(
        "arithmetic", words, rates, None, parts["test"], lambda answer, row: float(answer["answer"] == row["legs"])
    )


def similarity(data: Path, folder: Path) -> Case:
    """How much sentences mean the same, by MiniLM. The set stands in the order of its sources: it is shuffled."""
    parts = {}
    for name, size in {"train": 800, "validation": 300, "test": 550}.items():
        parts[name] = random.Random(0).sample(read_rows(data / "stsb_en" / f"{name}.jsonl"), size)
    words = [f"data.{name}={write_rows(folder / f'{name}.jsonl', part)}" for name, part in parts.items()]
    words += ["data.max_length=64", "training={epochs: 1}"]
    rates = {"lr": 5e-4}
    # A place in the order of cosines is no score of one row alone: the tests rank all.
    return Case("similarity", words, rates, None, parts["test"], lambda answer, row: float(answer["cosine"]))


def clicks(data: Path, folder: Path) -> Case:
    """Whether somebody likes a film after two others, by MiniLM."""
    words = [data / "ml_latest_small", folder, "--history", "1", "--limit", "4800"]
    script = [sys.executable, str(ROOT / "scripts/recommendation_rows.py"), *map(str, words)]
    subprocess.run(script, check=True, capture_output=True)
    train = random.Random(0).sample(read_rows(folder / "train.jsonl"), 640)
    changes = [f"data.train={write_rows(folder / 'few.jsonl', train)}"]
    rows = random.Random(0).sample(read_rows(folder / "test.jsonl"), 240)
    changes += [f"data.validation={folder}/validation.jsonl", f"data.test={write_rows(folder / 'asked.jsonl', rows)}"]
    changes += ["data.max_length=64", "training={epochs: 1, batch_size: 8}"]
    rates = {"lr": 4e-4, "norm_lr": 1e-3, "head_lr": 8e-3}
    return Case(
        "clicks", changes, rates, 8e-3, rows,
        lambda answer, row: math.log(answer["probabilities"][str(row["liked"])]),
    )  # fmt: skip


def next_item(data: Path, folder: Path) -> Case:
    """The next film, by a small Llama of films that learned from other people; here of each test person the last."""
    base = pretrain.item_model(data, folder)
    words = [f"base.model={base}", *(f"data.{name}={folder}/{name}.jsonl" for name in ("train", "validation", "test"))]
    words += ["training={epochs: 5, precision: fp32}"]
    people = [row["items"] for row in read_rows(folder / "test.jsonl")]
    rows = [{"history": films[:-1], "items": films[-1:]} for films in people]
    rates = {"lr": 6e-3, "norm_lr": 3e-2}
    return Case("items", words, rates, None, rows, lambda answer, row: ndcg(answer["items"], row["items"][0]))


def ndcg(found: Sequence[Row], item: str) -> float:
    """NDCG of a list of which one item is right."""
    names = [one["item"] for one in found]
    return 1 / math.log2(2 + names.index(item)) if item in names else 0.0


def genres(data: Path, folder: Path) -> Case:
    """The genres of a film, several each, by MiniLM: from its title and the genres of what the same people saw."""
    script = [sys.executable, str(ROOT / "scripts/genre_rows.py"), str(data / "ml_latest_small"), str(folder)]
    subprocess.run([*script, "--near", "3"], check=True, capture_output=True)
    words = [f"data.{name}={folder}/{name}.csv" for name in ("train", "validation", "test")]
    words += ["data.train.limit=1000", "data.max_length=64", "training={epochs: 1, batch_size: 8}"]
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))

    def log_probability(answer: Row, row: Row) -> float:
        true = row["genres"].split("|")
        found = answer["probabilities"].items()
        return sum(math.log(p if name in true else 1 - p) for name, p in found) / len(found)

    return Case("genres", words, {"lr": 1e-4, "norm_lr": 5e-4, "head_lr": 4e-2}, 4e-2, rows, log_probability)


def pairs(data: Path, folder: Path) -> Case:
    """How much sentences mean the same, read together, by MiniLM; the set stands in the order of its sources."""

    def is_short(row: Row) -> bool:
        return len(f"{row['sentence1']} {row['sentence2']}".split()) <= 18

    parts = {}
    for name, size in {"train": 800, "validation": 200, "test": 250}.items():
        short = read_rows(data / "stsb_en" / f"{name}.jsonl", None, is_short)
        parts[name] = random.Random(0).sample(short, size)
    words = [f"data.{name}={write_rows(folder / f'{name}.jsonl', part)}" for name, part in parts.items()]
    words += ["data.max_length=48", "training={epochs: 2, batch_size: 16}"]
    rates = {"lr": 3e-4, "norm_lr": 1e-3, "head_lr": 1e-2}
    return Case(
        "pairs", words, rates, 1e-2, parts["test"], lambda answer, row: -((answer["value"] - row["score"]) ** 2)
    )


def digits(data: Path, folder: Path) -> Case:
    """Ten written digits, by a small ViT that knows the first five."""
    from transformers import ViTConfig, ViTImageProcessorPil

    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(**small, image_size=28, patch_size=7)
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    base = pretrain.image_model(data, folder / "base", config, processor)
    words = [f"base.model={base}", "training={batch_size: 25, epochs: 4, precision: fp32}"]
    paths, labels = pretrain.digits(data, "test", "0123456789")
    rows = [{"image": str(path), "label": int(label)} for path, label in zip(paths, labels, strict=True)]
    return Case("digits", words, {"lr": 2e-3, "norm_lr": 4e-3, "head_lr": 5e-3}, 2.5e-2, rows, belief)


def scenes(data: Path, folder: Path) -> Case:
    """Eight kinds of things and surroundings, by a small SegFormer that tells five written digits."""
    from PIL import Image
    from transformers import SegformerConfig, SegformerImageProcessorPil

    from ticktune.recipe.load import load_recipe
    from ticktune.tasks.semantic_segmentation import classes_of_runs

    classes = load_recipe(ROOT / "recipes/scenes.yaml").recipe.data.classes
    small = {"depths": [1, 2, 2], "sr_ratios": [4, 2, 1], "hidden_sizes": [16, 32, 64], "strides": [4, 2, 2]}
    small |= {"patch_sizes": [7, 3, 3], "num_attention_heads": [1, 2, 4], "mlp_ratios": [2, 2, 2]}
    rest = {"decoder_hidden_size": 32, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    config = SegformerConfig(num_encoder_blocks=3, **small, **rest)
    processor = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    base = pretrain.image_model(data, folder / "base", config, processor)
    words = [f"base.model={base}", "training={batch_size: 10, epochs: 20, precision: fp32}"]
    source = data / "coco_semseg"
    rows = [
        {name: str(source / path) for name, path in row.items() if name in ("image", "mask")}
        for row in read_rows(source / "test.jsonl")
    ]
    table = np.full(256, -1)
    for number, values in enumerate(classes.values()):
        table[values] = number

    def counts(answer: Row, row: Row) -> Array:
        """Of each class the pixels that are it in both, in the truth, and in the answer."""
        truth, found = table[np.asarray(Image.open(row["mask"]))], classes_of_runs(answer)
        kinds = np.arange(len(classes))[:, None]
        of_truth, of_answer = (pixels[truth >= 0] == kinds for pixels in (truth, found))
        return np.array([(of_truth & of_answer).sum(1), of_truth.sum(1), of_answer.sum(1)]).ravel()

    def mean_iou(means: Array) -> Array:
        both, of_truth, of_answer = np.split(means, 3, axis=-1)
        union = of_truth + of_answer - both
        return np.nanmean(np.where(union > 0, both / np.maximum(union, 1e-9), np.nan), axis=-1)

    return Case("scenes", words, {"lr": 2e-3, "norm_lr": 1e-2, "head_lr": 1.5e-2}, 1.5e-2, rows, counts, mean_iou)


def objects(data: Path, folder: Path) -> Case:
    """The written digits 5, 6 and 7 on darkened photographs, by a small DETR that finds 0 to 4."""
    base = pretrain.detection_model(data, folder, size=48)
    counts = {"train": 1400, "validation": 150, "test": 300}
    for seed, (split, count) in enumerate(counts.items(), start=2):
        pretrain.digit_scenes(data, folder / split, split, "567", count, size=48, seed=seed)
    words = [f"base.model={base}", "training={batch_size: 32, epochs: 4, precision: fp32}"]
    words += [f"data={{train: {folder}/train, validation: {folder}/validation, test: {folder}/test}}"]
    rows = read_rows(folder / "test/metadata.jsonl")
    rows = [{"image": f"{folder}/test/{row['file_name']}", "objects": row["objects"]} for row in rows]
    rates = {"lr": 1e-2, "norm_lr": 2.5e-2, "head_lr": 1e-2}
    return Case("objects", words, rates, 1e-2, rows, lambda answer, row: fit(answer["objects"], row["objects"]))


def fit(found: list[Row], truth: Row) -> float:
    """Of one picture: share of true boxes and guesses that fit each other (Dice); one half of the union is a fit."""
    left = list(zip(truth["bbox"], truth["category"], strict=True))
    hits, total = 0, len(left) + len(found)
    for thing in found:
        fits = [pair for pair in left if pair[1] == thing["label"] and overlap(pair[0], thing["box"]) >= 0.5]
        if fits:
            left.remove(fits[0])
            hits += 1
    return 2 * hits / max(total, 1)


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes as left, top, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def spoken(data: Path, folder: Path) -> Case:
    """Ten spoken digits, by a small wav2vec 2.0 that knows the first five."""
    base = pretrain.sound_model(data, folder / "base", pretrain.small_wav2vec2())
    words = [
        f"base={{model: {base}, dropout: off}}",
        "data.augment={noise: 0.3, time_mask: 0.2}",
        "training={epochs: 20, batch_size: 16, precision: fp32}",
    ]
    rates = {"lr": 1e-2, "p_lr_ratio": 1, "norm_lr": 2e-2, "head_lr": 3e-3}
    rows = [
        {"audio": str(data / "fsdd/test" / row["file_name"]), "label": row["label"]}
        for row in read_rows(data / "fsdd/test/metadata.jsonl")
    ]
    return Case("spoken", words, rates, 1e-2, rows, right)


def transcripts(data: Path, folder: Path) -> Case:
    """Ten spoken digits as words, by a small wav2vec 2.0 that writes the first five."""
    base = pretrain.transcript_model(data, folder / "base", pretrain.small_wav2vec2())
    parts = {}
    for split in ("train", "validation", "test"):
        source = data / "fsdd" / split
        parts[split] = [
            {"audio": str(source / row["file_name"]), "words": pretrain.WORDS[row["label"]]}
            for row in read_rows(source / "metadata.jsonl")
        ]
    words = [
        f"base={{model: {base}, dropout: off}}",
        *(f"data.{split}={write_rows(folder / f'{split}.jsonl', rows)}" for split, rows in parts.items()),
        "data.columns={audio: audio, text: words}",
        "training={epochs: 20, batch_size: 16, precision: fp32}",
    ]
    rates = {"lr": 1e-2, "p_lr_ratio": 1, "norm_lr": 2e-2, "head_lr": 3e-3}
    return Case(
        "transcripts", words, rates, 1e-2, parts["test"], lambda answer, row: float(answer["text"] == row["words"])
    )
