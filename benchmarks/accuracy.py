"""How soon: CPU seconds of training until validation rows are answered well, ticktune beside the Trainer and PEFT.

    OMP_NUM_THREADS=1 TICKTUNE_DATA=/path/to/data python -m benchmarks.accuracy

MiniLM on SST-2. Every contender trains the same rows in steps of as many, at a constant learning rate, in a process of
its own, and answers the same validation rows every few steps. Only training takes time, and what a prefix cache takes
to be filled. Each contender's learning rate is the better of two, with a seed that is not used again: the one that
reaches the highest threshold, and that soonest. A second call goes on where the first one stopped. ``--docs`` only
writes the table into docs/performance.md.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from benchmarks import page
from benchmarks.clock import go_on
from benchmarks.peers import Job, Learned, Study, settled
from benchmarks.speed import CASES, DIM, SST2, machine_line, machine_of, rows_of, run_job, versions_of
from ticktune.base import load_model, quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.evaluate import score
from ticktune.files import read_json, write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.cpu import OnCpu
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.recipe.schema import Optimizer
from ticktune.tasks.task import Batch
from ticktune.train.groups import build_optimizer
from ticktune.train.prefix import NUMBERS, PrefixCache
from ticktune.train.steps import train_steps
from ticktune.versions import versions

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
ROWS, VALIDATION, BATCH, EPOCHS, EVERY = 3200, 872, 32, 2, 10
THRESHOLDS = (0.78, 0.80, 0.82)
CHOOSING_SEED = 0
OWN = {"ticktune: ticks + norms": "all", "ticktune: upper half, prefix kept": "last:3"}
"""Layers that have ticks and norms."""
GRID: dict[str, tuple[float, float]] = {
    "ticktune: ticks + norms": (2e-4, 6e-4),
    "ticktune: upper half, prefix kept": (2e-4, 6e-4),
    "Trainer + PEFT LoRA, FFN, default": (3e-4, 1e-3),
    "Trainer + PEFT LoRA, FFN, best": (3e-4, 1e-3),
    "Trainer, full fine-tuning, best": (3e-5, 1e-4),
}
"""Learning rates; of ticktune that of ticks, norms and head have its defaults."""


def prepared_rows() -> Prepared:
    """Rows and task, encoded."""
    data = {
        **SST2["data"],
        "train": {**SST2["data"]["train"], "limit": ROWS},
        "validation": {"path": "${TICKTUNE_DATA}/sst2/validation.jsonl", "limit": VALIDATION},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "accuracy.yaml"
        path.write_text(yaml.safe_dump({**SST2, "data": data}), encoding="utf-8")
        return prepare(load_recipe(path, []), Console(quiet=True))


def job_of(prepared: Prepared, budget: int) -> Job:
    """What a peer is given."""
    return Job(
        contender="",
        started=0.0,
        rows=rows_of(prepared, "train"),
        batch=BATCH,
        warm=0,
        directory=str(prepared.base.directory),
        config=None,
        task=prepared.task.config(),
        auto_class=prepared.task.auto_class,
        budget=budget,
        attention=CASES["minilm"].attention,
    )


def own_model(prepared: Prepared, layers: str, seed: int) -> Any:
    """MiniLM with ticks and norms in some layers."""
    model, fresh = load_model(
        prepared.base, prepared.task.auto_class, dtype=prepared.dtype, config=prepared.task.config(), seed=seed
    )
    return attach(model, DIM, layers, fresh=fresh, seed=seed)


def learn(layers: str, study: Study) -> Learned:
    """Trains with ticktune in this process until the goal is reached or the epochs are over.

    Args:
        layers: Which layers have ticks and norms; below ``last:N`` the prefix is kept, without the base's dropout.
        study: Learning rate, seed, epochs and goal.
    """
    prepared = prepared_rows()
    examples, task, compute = prepared.examples["train"], prepared.task, prepared.compute
    model = own_model(prepared, layers, study.seed).to(compute.device)
    named = list(adapter_parameters(model))
    keeps_prefix = layers != "all"
    serving: Callable[[Batch], AbstractContextManager[Any]] = nullcontext
    on_cpu = OnCpu(model)
    seconds, since = 0.0, time.process_time()
    if keeps_prefix:
        cache = PrefixCache(model, task, examples, compute, base_dropout=False)
        with on_cpu.running():
            cache.fill("memory", 32)
        serving = cache.serving

    @contextmanager
    def around(batch: Batch) -> Iterator[None]:
        with on_cpu.running(), serving(batch):
            yield

    def batches() -> Iterator[list[Batch]]:
        for epoch in range(study.epochs):
            for numbers in epoch_batches(examples.lengths, BATCH, seed=study.seed, epoch=epoch):
                yield [task.collate(examples.take(numbers), seed=study.seed) | {NUMBERS: numbers}]

    found: list[tuple[int, float, float]] = []
    steps = train_steps(
        model,
        [(name, p) for name, _, p in named],
        task,
        batches(),
        build_optimizer(named, Optimizer(lr=study.lr)),
        compute.scaler(),
        compute,
        lr_factor=lambda step: 1.0,
        clip=1.0,
        seed=study.seed,
        base_dropout=not keeps_prefix,
        around=around,
    )
    for report in steps:
        if report.step % study.every == 0:
            seconds += time.process_time() - since
            accuracy = score(model, task, prepared.examples["validation"], compute, 64)["accuracy"]
            found.append((report.step, seconds, accuracy))
            if settled(found) >= study.goal:
                break
            since = time.process_time()
    return Learned(found, sum(p.numel() for _, _, p in named))


def run_one(contender: str, lr: float, seed: int, job: Job, validation: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of a contender in a process of its own."""
    study = Study(validation, lr, seed, EPOCHS, EVERY, max(THRESHOLDS))
    if contender in OWN:
        given = {"layers": OWN[contender], "study": study._replace(validation=[])._asdict()}
        found = run_job(contender, sys.executable, "benchmarks.accuracy", given, "--job")
    else:
        given = job._replace(contender=contender, study=study._asdict())._asdict()
        found = run_job(contender, sys.executable, "benchmarks.peers", given)
    return {"contender": contender, "lr": lr, "seed": seed, **found}


def reached(run: dict[str, Any], threshold: float) -> tuple[int, float] | None:
    """(steps, seconds of training) until the accuracy has settled at a threshold; None: it has not."""
    found = run["evaluations"]
    ends = (number for number in range(1, len(found) + 1) if settled(found[:number]) >= threshold)
    number = next(ends, None)
    return None if number is None else (found[number - 1][0], found[number - 1][1])


def seconds_to(run: dict[str, Any], threshold: float) -> float | None:
    """Seconds of training until the accuracy has settled at a threshold; None: it has not."""
    found = reached(run, threshold)
    return None if found is None else found[1]


def better(runs: list[dict[str, Any]]) -> float:
    """The learning rate of the run that reaches the highest threshold, and that soonest."""

    def merit(run: dict[str, Any]) -> tuple[float, float]:
        there = [t for t in THRESHOLDS if seconds_to(run, t) is not None]
        return (max(there), -(seconds_to(run, max(there)) or 0.0)) if there else (0.0, 0.0)

    lr: float = max(runs, key=merit)["lr"]
    return lr


def planned(runs: list[dict[str, Any]], seeds: int) -> Iterator[tuple[str, float, int]]:
    """All runs as (contender, learning rate, seed): first those to choose by, which must be there for the rest."""
    for number in range(2):
        for contender, rates in GRID.items():
            yield contender, rates[number], CHOOSING_SEED
    for seed in range(CHOOSING_SEED + 1, CHOOSING_SEED + 1 + seeds):
        for contender in GRID:
            tried = [run for run in runs if run["contender"] == contender and run["seed"] == CHOOSING_SEED]
            yield contender, better(tried), seed


def table(document: dict[str, Any]) -> str:
    """Median seconds to each threshold, with the least and the most, as Markdown."""
    heads = [f"seconds to {threshold:.0%}" for threshold in THRESHOLDS]
    lines = [
        f"| | learning rate | trained | {' | '.join(heads)} | steps to {THRESHOLDS[-1]:.0%} |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for contender in GRID:
        runs = [r for r in document["runs"] if r["contender"] == contender and r["seed"] != CHOOSING_SEED]
        if not runs:
            continue
        cells = [_spread([seconds_to(run, threshold) for run in runs]) for threshold in THRESHOLDS]
        steps = _spread([_steps_to(run, THRESHOLDS[-1]) for run in runs])
        lines.append(f"| {contender} | {runs[0]['lr']:g} | {runs[0]['trained']:,} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines)


def _steps_to(run: dict[str, Any], threshold: float) -> int | None:
    found = reached(run, threshold)
    return None if found is None else found[0]


def _spread(values: Sequence[float | None]) -> str:
    """Median, least and most; a run that did not get there counts as longer than all others."""
    there = sorted(value for value in values if value is not None)
    if not there:
        return "not reached"
    ordered = [*there, *[math.inf] * (len(values) - len(there))]
    middle = statistics.median_low(ordered)
    told = "-" if middle == math.inf else f"{middle:.0f}"
    missed = f"; {len(values) - len(there)} of {len(values)} not" if len(there) < len(values) else ""
    return f"{told} ({there[0]:.0f} to {there[-1]:.0f}{missed})"


def section(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that these results are."""
    seeds = len({run["seed"] for run in document["runs"]} - {CHOOSING_SEED})
    settings = document["settings"]
    tried = ", ".join(f"{name}: {low:g}, {high:g}" for name, (low, high) in settings["rates"].items())
    error = 100 * (0.82 * 0.18 / settings["validation"]) ** 0.5
    return "\n".join(
        [
            f"`{document['command']}`: {machine_line(document)}.",
            "",
            f"MiniLM on {settings['rows']:,} rows of SST-2, {settings['batch']} in a step, at most "
            f"{settings['epochs']} epochs; every {settings['every']} steps {settings['validation']} validation rows "
            "are answered, which counts as no time, and the median of the last three times counts. An accuracy of 82 % "
            f"on so many rows has a standard error of {error:.1f} points. The thresholds are what trial runs reached "
            f"in this time. Median of {seeds} seeds, with the least and the most. Learning rates tried with another "
            f"seed: {tried}.",
            "",
            table(document),
        ]
    )


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--docs", action="store_true", help="only write the table into docs/performance.md")
    arguments = parser.parse_args()
    quiet_transformers()
    if arguments.job:
        given = read_json(arguments.job)
        sys.stdout.write(json.dumps(learn(given["layers"], Study(**given["study"]))._asdict()) + "\n")
        return
    document = read_json(arguments.results) if arguments.results.exists() else {"runs": []}
    if arguments.docs:
        page.put("accuracy", section(document))
        return
    prepared = prepared_rows()
    go_on(
        document,
        versions={**versions(), **versions_of(sys.executable, "peft", "accelerate")},
        machine=machine_of(prepared.compute),
        settings={
            "rows": ROWS,
            "validation": VALIDATION,
            "batch": BATCH,
            "epochs": EPOCHS,
            "every": EVERY,
            "thresholds": list(THRESHOLDS),
            "rates": {name: list(rates) for name, rates in GRID.items()},
        },
    )
    document["command"] = "python -m benchmarks.accuracy"
    validation = rows_of(prepared, "validation")
    model = own_model(prepared, "all", 0)
    budget = sum(p.numel() for _, role, p in adapter_parameters(model) if role != "head")
    job, runs = job_of(prepared, budget), document["runs"]
    for contender, lr, seed in planned(runs, arguments.seeds):
        if not any((run["contender"], run["lr"], run["seed"]) == (contender, lr, seed) for run in runs):
            runs.append(run_one(contender, lr, seed, job, validation))
            write_json(arguments.results, document)
            best = max(accuracy for _, _, accuracy in runs[-1]["evaluations"])
            sys.stderr.write(f"{contender}, {lr:g}, seed {seed}: {best:.3f}\n")
    sys.stdout.write(section(document) + "\n")


if __name__ == "__main__":
    main()
