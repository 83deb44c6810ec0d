"""Ticks and norms beside other ways to fine-tune, on SST-2 with MiniLM: one harness, one table.

    TICKTUNE_DATA=/path/to/data python benchmarks/methods.py

Same rows, batches, schedule, epochs, precision and head learning rate for all. Each method's learning rate is the
best of three on 10 % held out of the training rows, with a seed that is not used again; then each seed trains on
all rows and is scored on the whole validation set. Every finished run is written at once, and a second call
goes on where the first one stopped.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ticktune.base import load_model, quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.device import Compute, choose_compute, describe
from ticktune.evaluate import score
from ticktune.files import write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.recipe.schema import Optimizer
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.steps import train_steps
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "methods.json"
RECIPE = ROOT.parent / "recipes" / "sst2.yaml"
HEAD_LR = 1e-3
CHOOSING_SEED = 0

# The grid of each method's own learning rate; head-only has no other than the head's.
GRID: dict[str, list[float]] = {
    "head only": [1e-3, 3e-3, 1e-2],
    "norms only": [1e-3, 3e-3, 1e-2],
    "ticks only": [2e-4, 6e-4, 2e-3],
    "ticks + norms": [2e-4, 6e-4, 2e-3],
    "PEFT LoRA": [3e-4, 1e-3, 3e-3],
    "full fine-tuning": [3e-5, 1e-4, 3e-4],
}
LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": ["query", "value"]}


def build(
    method: str, lr: float, prepared: Prepared, seed: int
) -> tuple[nn.Module, list[tuple[str, Any, nn.Parameter]], Optimizer]:
    """Returns the model, what is trained as (name, role, parameter), and the learning rates."""
    task = prepared.task
    model, fresh = load_model(prepared.base, task.auto_class, dtype="float32", config=task.config(), seed=seed)
    if method == "PEFT LoRA":
        from peft import LoraConfig, TaskType, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"], **LORA)
        model = get_peft_model(model, config)
        # In the harness's optimizer the role Q learns at lr; the head at head_lr.
        named = [
            (name, "head" if "classifier" in name else "Q", p)
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
        return model, named, Optimizer(lr=lr, head_lr=HEAD_LR)
    if method == "full fine-tuning":
        named = [
            (name, "head" if name in fresh else "Q" if p.ndim > 1 else "r", p) for name, p in model.named_parameters()
        ]
        return model, named, Optimizer(lr=lr, head_lr=HEAD_LR)
    attach(
        model,
        dim=64 if "ticks" in method else 0,
        norms="all" if "norms" in method else "none",
        fresh=fresh,
        seed=seed,
    )
    rates = {
        "head only": Optimizer(head_lr=lr),
        "norms only": Optimizer(norm_lr=lr, head_lr=HEAD_LR),
    }.get(method, Optimizer(lr=lr, head_lr=HEAD_LR))
    return model, list(adapter_parameters(model)), rates


def train_and_score(method: str, lr: float, seed: int, prepared: Prepared, compute: Compute) -> dict[str, Any]:
    """One run: metrics after the last step, and how many parameters were trained."""
    recipe, examples = prepared.loaded.recipe, prepared.examples["train"]
    model, named, rates = build(method, lr, prepared, seed)
    trained = sum(p.numel() for _, _, p in named)
    batch_size, epochs = recipe.training.batch_size, recipe.training.epochs or 3
    total = epochs * -(-len(examples) // batch_size)

    def batches() -> Iterator[list[Any]]:
        for epoch in range(epochs):
            for numbers in epoch_batches(examples.lengths, batch_size, seed=seed, epoch=epoch):
                yield [prepared.task.collate(examples.take(numbers))]

    steps = train_steps(
        model,
        [(name, p) for name, _, p in named],
        prepared.task,
        batches(),
        build_optimizer(named, rates),
        compute.scaler(),
        compute,
        lr_factor=lambda step: lr_factor(step, total, recipe.schedule),
        clip=recipe.optimizer.clip,
        seed=seed,
    )
    losses = [report.loss for report in steps]
    metrics = score(model, prepared.task, prepared.examples["validation"], compute, 64)
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "metrics": metrics,
        "last_loss": statistics.mean(losses[-20:]),
        "trained_parameters": trained,
    }


def summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each method."""
    rows = []
    for method in GRID:
        runs = [r for r in document["runs"] if r["method"] == method]
        if runs:
            values = [100 * r["metrics"]["accuracy"] for r in runs]
            rows.append(
                {
                    "method": method,
                    "trained_parameters": runs[0]["trained_parameters"],
                    "lr": runs[0]["lr"],
                    "seeds": len(runs),
                    "accuracy_mean": round(statistics.mean(values), 2),
                    "accuracy_sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                }
            )
    return rows


def table(document: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["| method | trained | lr | accuracy (mean ± sd) |", "|---|---|---|---|"]
    for row in document["summary"]:
        lines.append(
            f"| {row['method']} | {row['trained_parameters']:,} | {row['lr']:g} | "
            f"{row['accuracy_mean']:.1f} ± {row['accuracy_sd'] or 0:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="recipe overrides, e.g. data.train.limit=64 for a trial")
    arguments = parser.parse_args()
    quiet_transformers()
    console = Console(quiet=True)
    everything = prepare(load_recipe(RECIPE, arguments.overrides), console)
    held_out = prepare(load_recipe(RECIPE, [*arguments.overrides, "data.validation={fraction: 0.1}"]), console)
    compute = choose_compute("auto", "auto")
    document: dict[str, Any] = {"choosing": [], "runs": []}
    if arguments.output.exists():
        document = json.loads(arguments.output.read_text(encoding="utf-8"))
    document |= {
        "what": "SST-2, MiniLM-L6: accuracy on the validation rows",
        "command": "python benchmarks/methods.py",
        "rows": {"train": len(everything.rows["train"]), "validation": len(everything.rows["validation"])},
        "rows_while_choosing": {
            "train": len(held_out.rows["train"]),
            "validation": len(held_out.rows["validation"]),
        },
        "grid": GRID,
        "head_lr": HEAD_LR,
        "lora": LORA,
        "weights": "float32, matrix products in " + compute.precision,
        "machine": describe(compute),
        "versions": versions(),
    }

    def do(stage: str, method: str, lr: float, seed: int, prepared: Prepared) -> None:
        done = any((r["method"], r["lr"], r["seed"]) == (method, lr, seed) for r in document[stage])
        if not done:
            document[stage].append(train_and_score(method, lr, seed, prepared, compute))
            document["summary"] = summary(document)
            write_json(arguments.output, document)
            sys.stderr.write(
                f"{stage}: {method} lr {lr:g} seed {seed}: {document[stage][-1]['metrics']['accuracy']:.4f}\n"
            )

    for method, rates in GRID.items():
        for lr in rates:
            do("choosing", method, lr, CHOOSING_SEED, held_out)
        tried = [r for r in document["choosing"] if r["method"] == method]
        best = max(tried, key=lambda r: (r["metrics"]["accuracy"], -r["metrics"]["loss"]))["lr"]
        for seed in range(1, arguments.seeds + 1):
            do("runs", method, best, seed, everything)
    sys.stdout.write(table(document) + "\n")


if __name__ == "__main__":
    main()
