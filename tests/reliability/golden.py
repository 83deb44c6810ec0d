"""Writes a run that was killed halfway, as the version of today leaves it: ``python -m tests.reliability.golden``.

The folder ``golden/format-N`` is committed, so that every later version shows that it goes on from there.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

import tests.models as models
from tests.end_to_end.support import write_recipe, write_rows
from tests.launch import launch
from tests.reliability.faults import plan
from ticktune.checkpoint import FORMAT

FOLDER = Path(__file__).parent / "golden"
KILLED_AFTER, SAVED, STEPS = 3, 2, 4


def write(folder: Path) -> None:
    """Writes base, rows, recipe and the killed run, a few kB."""
    from transformers import BertConfig, BertModel

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "base").mkdir(parents=True)
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        vocab_size=len(models.WORDS),
        max_position_embeddings=16,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder / "base")
    models.word_tokenizer().save_pretrained(folder / "base")
    write_rows(folder, "train.jsonl", 13, 1)
    write_rows(folder, "validation.jsonl", 6, 2)
    recipe = {
        "task": "text-classification",
        "base": {"model": "base"},
        "ticks": {"dim": 2},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 16},
        "training": {"epochs": 2, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        "checkpoints": {"every": 2, "keep": 1},
        "logging": {"every": 1},
        "output": "run",
    }
    write_recipe(folder, recipe, {})
    fault = plan(f"KILL@ticktune.session.Session._show#{KILLED_AFTER}")
    assert launch("train", "recipe.yaml", cwd=folder, env=fault).returncode == -9
    (folder / "run/.lock").unlink()
    record = json.loads((folder / "run/run.json").read_text())
    record["compute"]["name"] = "a CPU"
    (folder / "run/run.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    write(FOLDER / f"format-{FORMAT}")
    sys.stdout.write(f"{FOLDER / f'format-{FORMAT}'}\n")
