"""Small recipes on tiny models, written into a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_rows(folder: Path, name: str, count: int, seed: int) -> Path:
    """Rows whose label says which of two groups of words is more frequent."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [
            f"w{rng.integers(0, 4) + (30 if rng.random() < (0.95 if label else 0.05) else 0)}"
            for _ in range(rng.integers(4, 12))
        ]
        lines.append(json.dumps({"text": " ".join(words), "label": ["small", "large"][label]}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def classification(folder: Path, base: Path, /, **changes: Any) -> Path:
    """Writes data and a recipe for a tiny classifier that learns its task in a second; returns the recipe."""
    for name, count, seed in (("train", 93, 1), ("validation", 40, 2), ("test", 50, 3)):
        write_rows(folder, f"{name}.jsonl", count, seed)
    return write_recipe(
        folder,
        {
            "task": "text-classification",
            "base": {"model": str(base)},
            "ticks": {"dim": 8},
            "data": {
                "train": "train.jsonl",
                "validation": "validation.jsonl",
                "test": "test.jsonl",
                "max_length": 16,
            },
            "optimizer": {"lr": 3e-2, "norm_lr": 3e-2, "head_lr": 3e-2},
            "training": {
                "epochs": 3,
                "batch_size": 8,
                "micro_batch_size": 4,
                "precision": "fp32",
                "device": "cpu",
            },
            "checkpoints": {"every": 5},
            "output": "runs/tiny",
        },
        changes,
    )


def write_recipe(folder: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Writes a recipe with some sections changed."""
    import yaml

    for section, entries in changes.items():
        recipe[section] = {**recipe[section], **entries} if isinstance(recipe.get(section), dict) else entries
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
