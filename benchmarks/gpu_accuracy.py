"""Accuracy by time on SST-2 with MiniLM: what G5 of the GPU benchmark measures."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks import methods
from benchmarks.clock import Budget
from benchmarks.gpu_steps import attempt, run_again
from ticktune.base import load_model
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.device import Compute
from ticktune.evaluate import score
from ticktune.files import read_json
from ticktune.patch.attach import adapter_parameters, attach, set_training
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.recipe.schema import Optimizer
from ticktune.train.graphs import Graphs, in_eighths
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.head_loss import plain_loss
from ticktune.train.prefix import NUMBERS, PrefixCache
from ticktune.train.steps import gradients_of, train_steps

SEED, BATCH = 1, 32
# Way -> method of methods.json, whose learning rate it has, the layers that are trained, and whether by CUDA graphs.
WAYS = {
    "ticks + norms, all layers, CUDA graphs": ("ticks + norms", "all", True),
    "ticks + norms, all layers": ("ticks + norms", "all", False),
    "ticks + norms, upper half, prefix kept": ("ticks + norms", "last:3", False),
    "PEFT LoRA": ("PEFT LoRA", "all", False),
    "full fine-tuning": ("full fine-tuning", "all", False),
}


def by_time(
    compute: Compute, limit: int, epochs: int, budget: Budget, left_out: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """One row for each way and epoch: accuracy on the validation rows, and seconds of training until then.

    Kept states are computed in the time that counts; scoring, reading and building are not in it.

    Args:
        compute: Device and precision.
        limit: Training rows, and at most as many validation rows.
        epochs: Of each way.
        budget: Of the call.
        left_out: Gets what is left out, and why.
    """
    words = [f"training.device={compute.device.type}", "training.precision=bf16", "base.dropout=off"]
    words += [
        f"data.train.limit={limit}",
        "data.validation.path=${TICKTUNE_DATA}/sst2/validation.jsonl",
        f"data.validation.limit={limit}",
    ]
    prepared = prepare(load_recipe(methods.RECIPE, words), Console(quiet=True))
    rates = {run["method"]: run["lr"] for run in read_json(methods.RESULTS)["runs"]}
    rows: list[dict[str, Any]] = []
    longest = 5.0
    for way in WAYS:
        if budget.allows(1.2 * longest, way, left_out):
            begun = budget.used
            rows += attempt(way, left_out, functools.partial(_trained, way, rates, prepared, epochs)) or []
            longest = max(longest, budget.used - begun)
    return rows


def _trained(way: str, rates: dict[str, float], prepared: Prepared, epochs: int) -> list[dict[str, Any]]:
    model, named, options, around, began = _built(way, rates, prepared)
    examples, task, compute = prepared.examples["train"], prepared.task, prepared.compute
    optimizer, scaler, graphs = build_optimizer(named, options), compute.scaler(), None
    longest = prepared.loaded.recipe.data.max_length
    if WAYS[way][2]:
        set_training(model, True, base_dropout=False)
        run = gradients_of(model, plain_loss(task), scaler, compute, around)
        record = None if compute.device.type == "cuda" else run_again
        graphs = Graphs(run, optimizer, compute, task.collate(examples.take([0])), record=record)
    per_epoch = -(-len(examples) // BATCH)

    def batches() -> Iterator[list[Any]]:
        for epoch in range(epochs):
            for numbers in epoch_batches(examples.lengths, BATCH, seed=SEED, epoch=epoch):
                batch = task.collate(examples.take(numbers)) | {NUMBERS: numbers}
                yield [batch if graphs is None else in_eighths(batch, longest, 0)]

    steps = train_steps(
        model,
        [(name, p) for name, _, p in named],
        task,
        batches(),
        optimizer,
        scaler,
        compute,
        lr_factor=lambda step: lr_factor(step, epochs * per_epoch, prepared.loaded.recipe.schedule),
        clip=1.0,
        seed=SEED,
        base_dropout=False,
        around=around,
        graphs=graphs,
    )
    rows: list[dict[str, Any]] = []
    seconds = began
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        for _ in range(per_epoch):
            next(steps)
        seconds += time.perf_counter() - begun  # a step ends with its loss on the host
        accuracy = score(model, task, prepared.examples["validation"], compute, 64)["accuracy"]
        row = {"kind": "accuracy", "case": f"{len(examples)} rows of SST-2, MiniLM-L6", "way": way, "epoch": epoch}
        rows.append(row | {"seconds": seconds, "accuracy": accuracy, "trained": sum(p.numel() for _, _, p in named)})
    return rows


def _built(
    way: str, rates: dict[str, float], prepared: Prepared
) -> tuple[nn.Module, list[tuple[str, Any, nn.Parameter]], Optimizer, Callable[..., Any], float]:
    """The model on its device, what is trained, the optimizer's options, what steps run in, and seconds it took."""
    method, layers, _ = WAYS[way]
    task, compute = prepared.task, prepared.compute
    if method != "ticks + norms":
        model, named, options = methods.build(method, rates[method], prepared, SEED)
        model.to(compute.device)
        return model, named, options, lambda batch: nullcontext(), 0.0
    model, fresh = load_model(prepared.base, task.auto_class, dtype=prepared.dtype, config=task.config(), seed=SEED)
    model.to(compute.device)
    attach(model, 64, layers, fresh=fresh, seed=SEED)
    named, options = list(adapter_parameters(model)), Optimizer(lr=rates[method], head_lr=methods.HEAD_LR)
    if layers == "all":
        return model, named, options, lambda batch: nullcontext(), 0.0
    begun = time.perf_counter()
    cache = PrefixCache(model, task, prepared.examples["train"], compute, base_dropout=False)
    cache.fill("memory", BATCH)
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return model, named, options, cache.serving, time.perf_counter() - begun
