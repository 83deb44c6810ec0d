"""What a training step costs on MiniLM and SST-2: all layers, the upper half, its prefix kept, and other fast paths.

    TICKTUNE_DATA=/path/to/data python -m benchmarks.steps

Every variant runs the same batches of the second epoch, in turns, so that a busy machine slows all of them alike;
what counts is the CPU seconds of the middle turn. Losses are compared with those of the same layers without the fast
path.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ticktune.base import load_model, quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.device import describe
from ticktune.files import write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.cpu import OnCpu
from ticktune.patch.standins import Checkpointed, Compiled, layers_of, places_of, standing_in
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.tasks.task import Batch
from ticktune.train.groups import build_optimizer
from ticktune.train.memory import measured
from ticktune.train.prefix import NUMBERS, PrefixCache
from ticktune.train.steps import train_steps
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "steps.json"
RECIPE = ROOT.parent / "recipes" / "sst2.yaml"
VARIANTS = {
    "all layers": ("all", "plain"),
    "upper half": ("last:3", "plain"),
    "upper half, prefix kept": ("last:3", "kept"),
    "all layers, checkpointed": ("all", "checkpointed"),
    "all layers, compiled": ("all", "compiled"),
}


class Run:
    """One variant: its own model and optimizer."""

    def __init__(self, name: str, prepared: Prepared) -> None:
        layers, self.kind = VARIANTS[name]
        self.prepared = prepared
        self.model, fresh = load_model(
            prepared.base, prepared.task.auto_class, dtype=prepared.dtype, config=prepared.task.config(), seed=1
        )
        attach(self.model, 64, layers, fresh=fresh, seed=1)
        self.optimizer = build_optimizer(adapter_parameters(self.model), prepared.loaded.recipe.optimizer)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        found = layers_of(self.model)
        self._places = places_of(self.model, found)
        self._on_cpu = OnCpu(self.model)
        maker = {"checkpointed": self._checkpointed, "compiled": Compiled}.get(self.kind)
        self._stand_ins: dict[nn.Module, nn.Module] = {} if maker is None else {layer: maker(layer) for layer in found}
        if self.kind == "kept":
            began = time.process_time()
            self.cache = PrefixCache(
                self.model, prepared.task, prepared.examples["train"], prepared.compute, base_dropout=False
            )
            with self._on_cpu.running():
                self.cache.fill("memory", 32)
            self.facts["seconds_to_fill"] = round(time.process_time() - began, 2)
        if self.kind == "checkpointed":
            self._measure()

    def _checkpointed(self, layer: nn.Module) -> nn.Module:
        return Checkpointed(layer, self._on_cpu.running)

    def _measure(self) -> None:
        numbers = epoch_batches(self.prepared.examples["train"].lengths, 32, seed=1, epoch=0)[0]
        batch = self.prepared.task.collate(self.prepared.examples["train"].take(numbers))
        with self._on_cpu.running(), measured(self.model, layers_of(self.model), self._on_cpu.running) as kept:
            self.prepared.task.loss(self.prepared.task.forward(self.model, batch), batch)
        self.facts |= {"activation_bytes": kept.checkpointed, "activation_bytes_without": kept.plain}

    @contextmanager
    def _around(self, batch: Batch) -> Iterator[None]:
        with ExitStack() as stack:
            if self.kind != "compiled":  # what is compiled has its own
                stack.enter_context(self._on_cpu.running())
            if self.kind == "kept":
                stack.enter_context(self.cache.serving(batch))
            stack.enter_context(standing_in(self._places, self._stand_ins) if self._stand_ins else nullcontext())
            yield

    def turn(self, batches: list[list[Batch]], first: int) -> None:
        """Trains on some batches."""
        began = time.process_time()
        reports = train_steps(
            self.model,
            [(key, parameter) for key, _, parameter in adapter_parameters(self.model)],
            self.prepared.task,
            batches,
            self.optimizer,
            self.prepared.compute.scaler(),
            self.prepared.compute,
            lr_factor=lambda step: 1.0,
            clip=1.0,
            seed=1,
            base_dropout=False,
            first_step=first,
            around=self._around,
        )
        self.losses += [report.loss for report in reports]
        self.seconds.append((time.process_time() - began) / len(batches))


def measure(precision: str, turns: int, steps: int, names: list[str]) -> dict[str, Any]:
    """All variants in one arithmetic.

    Args:
        precision: As in recipes.
        turns: How often each variant takes its turn; one more before these does not count.
        steps: In a turn.
        names: Of the variants.
    """
    words = ["base.dropout=off", "training.device=cpu", f"training.precision={precision}"]
    prepared = prepare(load_recipe(RECIPE, words), Console(quiet=True))
    examples, task = prepared.examples["train"], prepared.task
    runs = {name: Run(name, prepared) for name in names}
    order = epoch_batches(examples.lengths, 32, seed=1, epoch=1)[: (turns + 1) * steps]
    batches = [[task.collate(examples.take(numbers)) | {NUMBERS: numbers}] for numbers in order]
    for turn in range(turns + 1):
        for run in runs.values():
            run.turn(batches[turn * steps : (turn + 1) * steps], turn * steps)
    plain = {VARIANTS[name][0]: run.losses for name, run in runs.items() if run.kind == "plain"}
    found: dict[str, Any] = {}
    for name, run in runs.items():
        reference = plain[VARIANTS[name][0]]
        found[name] = {
            "seconds_per_step": round(statistics.median(run.seconds[1:]), 4),
            "largest_relative_difference_of_a_loss": max(
                abs(a - b) / abs(b) for a, b in zip(run.losses, reference, strict=True)
            ),
            "of_the_first_step": abs(run.losses[0] - reference[0]) / abs(reference[0]),
            **run.facts,
        }
    kept = found["upper half, prefix kept"]["seconds_per_step"]
    return {
        "tokens_per_step": round(statistics.mean(float(b[0]["attention_mask"].sum()) for b in batches), 1),
        "variants": found,
        "speedup_of_a_kept_prefix": {
            "over the upper half": round(found["upper half"]["seconds_per_step"] / kept, 3),
            "over all layers": round(found["all layers"]["seconds_per_step"] / kept, 3),
        },
    }


def table(found: dict[str, Any]) -> str:
    """The steps as a table in Markdown.

    Args:
        found: What :func:`measure` gave, by arithmetic.
    """
    head = ["", *(f"{precision}: s a step" for precision in found), "memory kept for the backward pass"]
    rows = [head, ["---"] * len(head)]
    for name in VARIANTS:
        times = [f"{one['variants'][name]['seconds_per_step']:.3f}" for one in found.values()]
        facts = next(iter(found.values()))["variants"][name]
        kept = "-"
        if "activation_bytes" in facts:
            sizes = facts["activation_bytes"], facts["activation_bytes_without"]
            kept = " instead of ".join(f"{size / 1e6:.1f} MB" for size in sizes)
        rows.append([name, *times, kept])
    for what in ("over the upper half", "over all layers"):
        speedups = [f"{one['speedup_of_a_kept_prefix'][what]:.2f}×" for one in found.values()]
        rows.append([f"speed of a kept prefix {what}", *speedups, "-"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description="Measure training steps.")
    parser.add_argument("--turns", type=int, default=5, help="of each variant, after one that does not count")
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="arithmetic")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="which to run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args()
    quiet_transformers()
    found = {p: measure(p, options.turns, options.steps, options.variants) for p in options.precision}
    recipe = load_recipe(RECIPE, ["training.device=cpu"])
    compute = describe(prepare(recipe, Console(quiet=True)).compute)
    compute.pop("precision")
    compute["threads"] = torch.get_num_threads()
    write_json(options.output, {"machine": compute, "versions": versions(), "results": found})


if __name__ == "__main__":
    main()
