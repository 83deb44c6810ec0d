"""The loss without logits and the layouts of batches, beside the plain ways: time and memory on the CPU.

    TICKTUNE_DATA=/path/to/data TICKTUNE_MODELS=/path/to/models OMP_NUM_THREADS=1 python -m benchmarks.loss

Loss: forward and backward passes of a model with ticks over one batch, the two ways in turn; time is that of the CPU,
memory the most that the process holds above what it held before. Layouts: all rows of a set once, forward and
backward, in batches as they come, of about one length, and packed, where attention stays in an example or is masked.
Writes benchmarks/results/loss.json; ``--docs`` writes its tables into docs/performance.md.
"""

import argparse
import ctypes
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ticktune.base import quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches, packed_rows
from ticktune.data.encode import Encoded
from ticktune.device import Compute, choose_compute, describe
from ticktune.files import read_json, write_json
from ticktune.patch.attach import attach
from ticktune.patch.segments import Segments
from ticktune.prepare import prepare
from ticktune.recipe.load import load_recipe
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import IGNORED, Batch, TaskOptions
from ticktune.train.head_loss import Head, LossOf, find_head, head_loss, plain_loss
from ticktune.train.packing import packing_obstacle
from ticktune.train.steps import Around
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "loss.json"
PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- loss -->\n", "<!-- end of loss -->"
WAYS = ("plain", "chunked")
LAYOUTS = ("as they come", "of one length", "packed", "packed, masked")


class Shape(NamedTuple):
    """The batch whose loss is measured, and in which arithmetic."""

    rows: int
    length: int
    precisions: tuple[str, ...]


SHAPES = {
    "stories260K": Shape(16, 512, ("fp32",)),
    "hidden 256, vocabulary 32,000": Shape(4, 512, ("fp32", "bf16")),
}
LEARNED = {"all": 1.0, "a third": 1 / 3}
"""Shares of the positions that carry a label: plain text, and responses to prompts."""

SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "data": {"train": "gsm8k/train.jsonl", "columns": {"prompt": "question", "response": "answer"}},
        "rows": 96,
    },
    "tinyshakespeare by line": {
        "data": {"train": {"path": "tinyshakespeare/train.txt", "sample_by": "line"}},
        "rows": 512,
    },
}
MAX_LENGTH, BATCH_SIZE = 512, 16
MEMORY_REPEATS = 2


def build(name: str) -> nn.Module:
    """A model with ticks of 64 units."""
    import transformers as t

    torch.manual_seed(0)
    model: Any
    if name == "stories260K":
        model = t.AutoModelForCausalLM.from_pretrained(Path(os.environ["TICKTUNE_MODELS"]) / "stories260K-hf")
    else:
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
        model = t.LlamaForCausalLM(
            t.LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=4, vocab_size=32000)
        )
    return attach(model.train(), 64)


def batch_of(model: nn.Module, rows: int, length: int, share: float) -> Batch:
    """Random tokens; the last share of each row is learned."""
    ids = torch.randint(3, model.config.vocab_size, (rows, length))  # type: ignore[union-attr,arg-type]
    labels = ids.clone()
    labels[:, : length - round(share * length)] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(way: str, model: nn.Module, compute: Compute) -> LossOf:
    """The loss of causal-lm by one of the ways."""
    task = CausalLm(TaskOptions(("text",), MAX_LENGTH), None)
    if way == "plain":
        return plain_loss(task)
    head = find_head(model, task, batch_of(model, 2, 4, 1.0), compute)
    assert isinstance(head, Head), head
    return head_loss(task, head)


def one_pass(model: nn.Module, loss: LossOf, batch: Batch, compute: Compute) -> float:
    """Forward and backward; CPU seconds."""
    started = time.process_time()
    with compute.autocast():
        value = loss(model, batch)
    value.backward()
    seconds = time.process_time() - started
    model.zero_grad(set_to_none=True)
    return seconds


def most_held(run: Callable[[], Any]) -> int:
    """By how many bytes a call raises the most memory that this process holds at once (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator kept of earlier passes, which would not count
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = held("VmRSS")
    run()
    return max(0, held("VmHWM") - before)


def held(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most."""
    return {name: float(f"{f(values):.4g}") for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def measure_loss(repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each model, precision and share of learned positions."""
    for name, size in SHAPES.items():
        for precision in size.precisions:
            compute = choose_compute("cpu", precision)
            model = build(name)
            losses = {way: loss_of(way, model, compute) for way in WAYS}
            for label, share in LEARNED.items():
                batch = batch_of(model, size.rows, size.length, share)
                for loss in losses.values():
                    one_pass(model, loss, batch, compute)
                seconds: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(repeats):
                    for way in WAYS:
                        seconds[way].append(one_pass(model, losses[way], batch, compute))
                yield {
                    "model": name,
                    "batch": f"{size.rows} × {size.length}",
                    "precision": precision,
                    "learned": label,
                    "cpu_seconds": {way: spread(seconds[way]) for way in WAYS},
                }


def measure_memory() -> Iterator[dict[str, Any]]:
    """The most memory of a pass, in the order of :func:`measure_loss`."""
    for name, size in SHAPES.items():
        for precision in size.precisions:
            compute = choose_compute("cpu", precision)
            model = build(name)
            for share in LEARNED.values():
                batch = batch_of(model, size.rows, size.length, share)
                passes = {
                    way: functools.partial(one_pass, model, loss_of(way, model, compute), batch, compute)
                    for way in WAYS
                }
                yield {way: spread([most_held(passes[way]) for _ in range(MEMORY_REPEATS)]) for way in WAYS}


def batches_of(layout: str, task: Any, examples: Encoded) -> Iterator[Batch]:
    """One epoch's batches."""
    lengths = examples.lengths
    if layout == "as they come":
        order = np.random.default_rng([0, 0]).permutation(len(lengths)).tolist()
        numbers = [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    else:
        numbers = epoch_batches(lengths, BATCH_SIZE, seed=0, epoch=0, packed=layout.startswith("packed"))
    for part in numbers:
        chosen = examples.take(part)
        if layout.startswith("packed"):
            rows = packed_rows([e["length"] for e in chosen], MAX_LENGTH)
            yield task.pack([[chosen[i] for i in row] for row in rows])
        else:
            yield task.collate(chosen)


def measure_layouts(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each set of rows."""
    base = Path(os.environ["TICKTUNE_MODELS"]) / "stories260K-hf"
    compute = choose_compute("cpu", "fp32")
    for name, entry in SETS.items():
        data = {**entry["data"], "max_length": MAX_LENGTH}
        source = data["train"] if isinstance(data["train"], dict) else {"path": data["train"]}
        path = str(Path(os.environ["TICKTUNE_DATA"]) / source["path"])
        data["train"] = {**source, "path": path, "limit": entry["rows"]}
        (folder / "recipe.yaml").write_text(
            repr({"task": "causal-lm", "base": {"model": str(base)}, "data": data}).replace("'", '"')
        )
        prepared = prepare(load_recipe(folder / "recipe.yaml"), Console(quiet=True))
        task, examples = prepared.task, prepared.examples["train"]
        model = build("stories260K")
        segments = Segments(model)
        assert packing_obstacle(model, task, examples.take([0, 1]), compute, segments) is None
        loss = loss_of("chunked", model, compute)
        seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        places = {layout: sum(b["input_ids"].numel() for b in batches_of(layout, task, examples)) for layout in LAYOUTS}
        for repeat in range(repeats + 1):
            for layout in LAYOUTS:
                around: Around = segments.running if layout == "packed" else nullcontext
                taken = 0.0
                for batch in batches_of(layout, task, examples):
                    with around(batch):
                        taken += one_pass(model, loss, batch, compute)
                if repeat:  # the first one warms up
                    seconds[layout].append(taken)
        tokens = sum(examples.lengths)
        yield {
            "rows": name,
            "count": len(examples),
            "tokens": tokens,
            "longest": max(examples.lengths),
            "batch_size": BATCH_SIZE,
            "padding": {layout: round(1 - tokens / places[layout], 4) for layout in LAYOUTS},
            "rows_per_cpu_second": {
                layout: spread([len(examples) / each for each in seconds[layout]]) for layout in LAYOUTS
            },
        }


def encoder_padding() -> dict[str, Any]:
    """The share of padding in the batches of SST-2, by layout: what unpadded batches for encoders could save."""
    recipe = ROOT.parent / "recipes" / "sst2.yaml"
    examples = prepare(load_recipe(recipe), Console(quiet=True)).examples["train"]
    lengths = np.asarray(examples.lengths)
    size = load_recipe(recipe).recipe.training.batch_size or BATCH_SIZE
    order = np.random.default_rng([0, 0]).permutation(len(lengths))
    ways: dict[str, Callable[[], list[Any]]] = {
        "as they come": lambda: [order[i : i + size] for i in range(0, len(order), size)],
        "of one length": lambda: epoch_batches(examples.lengths, size, seed=0, epoch=0),
    }
    shares = {}
    for name, make in ways.items():
        places = sum(len(batch) * int(lengths[batch].max()) for batch in make())
        shares[name] = round(1 - float(lengths.sum()) / places, 4)
    return {"rows": len(examples), "batch_size": size, "padding": shares}


def table(document: dict[str, Any]) -> str:
    """The tables as Markdown: medians, with least and most in parentheses."""
    lines = [
        "| model, batch | precision | learned | CPU seconds, all logits | without | memory, all logits | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, peak in zip(document["loss"], document["peak_bytes"], strict=True):
        seconds = row["cpu_seconds"]
        cells = [_figure(seconds[way], 1, 2) for way in WAYS] + [_figure(peak[way], 1e-6, 0, " MB") for way in WAYS]
        lines.append(
            f"| {row['model']}, {row['batch']} | {row['precision']} | {row['learned']} | {' | '.join(cells)} |"
        )
    lines += ["", f"| rows of a batch of {BATCH_SIZE} | {' | '.join(LAYOUTS)} |", "|---|---|---|---|"]
    for row in document["layouts"]:
        shares, speeds = row["padding"], row["rows_per_cpu_second"]
        cells = [f"{100 * shares[way]:.1f} %" for way in LAYOUTS]
        lines.append(f"| {row['rows']}: padding | {' | '.join(cells)} |")
        lines.append(f"| rows in a CPU second | {' | '.join(_figure(speeds[way], 1, 1) for way in LAYOUTS)} |")
    return "\n".join(lines)


def _figure(values: dict[str, Any], factor: float, digits: int, unit: str = "") -> str:
    low, middle, high = (f"{values[name] * factor:.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle}{unit} ({low}-{high})"


def main() -> None:
    """Measures everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=("all", "loss", "memory", "layouts"), default="all")
    parser.add_argument("--docs", action="store_true", help="only write the tables into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.docs:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        tables = table(read_json(arguments.output))
        PAGE.write_text(f"{before}{BEGIN}{tables}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    quiet_transformers()
    compute = choose_compute("cpu", "fp32")
    document: dict[str, Any] = read_json(arguments.output) if arguments.output.exists() else {}
    document |= {
        "what": "the loss without logits, and the layouts of batches, beside the plain ways",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.loss",
        "machine": describe(compute),
        "versions": versions(),
        "repeats": arguments.repeats,
    }
    if arguments.part in ("all", "loss"):
        document["loss"] = list(measure_loss(arguments.repeats))
        write_json(arguments.output, document)
    if arguments.part in ("all", "memory"):
        document["peak_bytes"] = list(measure_memory())
        write_json(arguments.output, document)
    if arguments.part in ("all", "layouts"):
        with tempfile.TemporaryDirectory() as folder:
            document["layouts"] = list(measure_layouts(arguments.repeats, Path(folder)))
        document["encoders"] = encoder_padding()
        write_json(arguments.output, document)


if __name__ == "__main__":
    main()
