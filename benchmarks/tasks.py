"""One table over all tasks: the head alone, ticks and norms, and full fine-tuning, on the small cases of the tests.

    TICKTUNE_DATA=/path/to/data TICKTUNE_MODELS=/path/to/models python -m benchmarks.tasks [CASE]...

Same rows, batches, schedule and epochs for all three. A method's learning rate is the best of three on the validation
rows; then every seed is scored on the test rows, which chose nothing. Where the base has a head of its own, the base as
it is stands for the head alone. Every finished run is written at once, and a second call goes on where the first one
stopped; ``--docs`` writes the table into docs/tasks.md.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.real_data import cases
from tests.real_data.cases import Case
from ticktune.base import quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.data.encode import Encoded
from ticktune.device import describe
from ticktune.evaluate import score
from ticktune.files import read_json, write_json
from ticktune.patch.attach import adapter_parameters
from ticktune.prepare import Prepared, encode, load_trainable, prepare
from ticktune.recipe.load import load_recipe
from ticktune.registry import TASKS
from ticktune.run import attach_as
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.steps import train_steps
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "tasks.json"
PAGE = ROOT.parent / "docs" / "tasks.md"
METHODS = ("head alone", "ticks + norms", "full fine-tuning")
FACTORS = (0.4, 1.0, 2.5)


class Entry(NamedTuple):
    """What a row of the table says, and the middle of the learning rates of full fine-tuning."""

    make: Callable[[Path, Path], Case]
    data: str
    base: str
    full_lr: float


MINILM, SMALL = 3e-4, 1e-3
ENTRIES: dict[str, Entry] = {
    "sentiment": Entry(cases.sentiment, "SST-2, 480 phrases", "MiniLM-L6", MINILM),
    "reviews": Entry(cases.reviews, "ChnSentiCorp, 3,300 reviews", "BERT, 1.1M, of hotels' reviews", SMALL),
    "entities": Entry(cases.entities, "WNUT 17, 640 posts with names", "MiniLM-L6", MINILM),
    "questions": Entry(cases.questions, "SQuAD, 560 questions to sentences", "MiniLM-L6", MINILM),
    "translation": Entry(cases.translation, "Multi30k, 3,500 captions", "BART, 0.3M, a denoiser", SMALL),
    "arithmetic": Entry(cases.arithmetic, "320 made questions", "stories260K", SMALL),
    "domain": Entry(cases.domain, "tiny Shakespeare, 4,800 windows", "BERT, 0.7M, of captions", SMALL),
    "similarity": Entry(cases.similarity, "STS-B, 800 pairs", "MiniLM-L6", MINILM),
    "clicks": Entry(cases.clicks, "MovieLens, 640 candidates", "MiniLM-L6", MINILM),
    "items": Entry(cases.next_item, "MovieLens, rows of 366 people", "Llama, 0.2M, of 61 other people", SMALL),
    "genres": Entry(cases.genres, "MovieLens, 1,000 films", "MiniLM-L6", MINILM),
    "pairs": Entry(cases.pairs, "STS-B, 800 short pairs", "MiniLM-L6", MINILM),
    "digits": Entry(cases.digits, "MNIST, 2,000 pictures", "ViT, 0.1M, of digits 0 to 4", SMALL),
    "scenes": Entry(cases.scenes, "COCO, 100 pictures", "SegFormer, 0.2M, of digits 0 to 4", SMALL),
    "objects": Entry(cases.objects, "1,400 composed scenes of digits 5 to 7", "DETR, 0.3M, of digits 0 to 4", SMALL),
    "spoken": Entry(cases.spoken, "FSDD, 240 recordings", "wav2vec 2.0, 0.5M, of digits 0 to 4", SMALL),
    "transcripts": Entry(cases.transcripts, "FSDD, 240 recordings", "wav2vec 2.0, 0.5M, of digits 0 to 4", SMALL),
}


def train_and_score(prepared: Prepared, method: str, rates: dict[str, float], seed: int) -> dict[str, Any]:
    """One run: metrics of validation and test rows after the last step, parameters and CPU seconds of training."""
    recipe = prepared.loaded.recipe
    compute, task, examples = prepared.compute, prepared.task, prepared.examples["train"]
    torch.manual_seed(seed)
    model, fresh = load_trainable(prepared)
    base_parameters = sum(p.numel() for p in model.parameters())
    if method == "full fine-tuning":
        model.requires_grad_(True)
        named = [
            (name, "head" if name in fresh else "Q" if p.ndim > 1 else "r", p) for name, p in model.named_parameters()
        ]
    else:
        nothing = {} if method == "ticks + norms" else {"dim": 0}
        norms = recipe.norms if method == "ticks + norms" else recipe.norms.model_copy(update={"train": "none"})
        attach_as(
            recipe.model_copy(update={"ticks": recipe.ticks.model_copy(update=nothing), "norms": norms}), model, fresh
        )
        named = list(adapter_parameters(model))
    training = recipe.training
    per_epoch = -(-len(examples) // training.batch_size)
    total = training.steps or per_epoch * (training.epochs or 3)

    def batches() -> Iterator[list[Any]]:
        for epoch in range(-(-total // per_epoch)):
            for numbers in epoch_batches(examples.lengths, training.batch_size, seed=seed, epoch=epoch):
                yield [task.collate(examples.take(numbers), seed=seed * 1_000_003 + numbers[0])]

    started = time.process_time()
    if named:
        steps = train_steps(
            model,
            [(name, p) for name, _, p in named],
            task,
            (batch for batch, _ in zip(batches(), range(total), strict=False)),
            build_optimizer(named, recipe.optimizer.model_copy(update=rates)),
            compute.scaler(),
            compute,
            lr_factor=lambda step: lr_factor(step, total, recipe.schedule),
            clip=recipe.optimizer.clip,
            seed=seed,
            base_dropout=recipe.base.dropout == "keep",
        )
        for _ in steps:
            pass
    seconds = time.process_time() - started  # of the processor, on one thread: other work does not stretch it
    return {
        "method": method,
        "rates": rates,
        "seed": seed,
        "metrics": {name: score(model, task, prepared.examples[name], compute, 32) for name in ("validation", "test")},
        "trained_parameters": sum(p.numel() for _, _, p in named),
        "base_parameters": base_parameters,
        "seconds": round(seconds, 2),
    }


def grid(case: Case, entry: Entry, method: str) -> list[dict[str, float]]:
    """The learning rates that are tried."""
    if method == "head alone":
        return [{}] if case.head_lr is None else [{"head_lr": case.head_lr * f} for f in FACTORS]
    if method == "ticks + norms":
        scaled = {name: rate for name, rate in case.rates.items() if name != "p_lr_ratio"}
        return [{**case.rates, **{name: rate * f for name, rate in scaled.items()}} for f in FACTORS]
    head = {name: rate for name, rate in case.rates.items() if name == "head_lr"}
    return [{"lr": entry.full_lr * f, **head} for f in FACTORS]


def compare(name: str, document: dict[str, Any], seeds: int, keep: Callable[[], None]) -> None:
    """Runs what is missing of one case."""
    entry = ENTRIES[name]
    found = document["cases"].setdefault(name, {"choosing": [], "runs": []})
    if len(found["runs"]) == seeds * len(METHODS):
        return
    source = os.environ["TICKTUNE_MODELS" if name == "arithmetic" else "TICKTUNE_DATA"]
    with tempfile.TemporaryDirectory() as folder:
        case = entry.make(Path(source), Path(folder))
        words = [*case.words, "base.dtype=float32"]  # full fine-tuning needs it: the same for all
        prepared = prepare(load_recipe(case.path, words), Console(quiet=True))
        prepared.examples["test"] = test_examples(prepared)
        metric = prepared.loaded.recipe.evaluation.metric
        metric = prepared.task.default_metric if metric == "auto" else metric
        more = TASKS[prepared.task.name].metrics[metric]
        found |= {"task": prepared.task.name, "data": entry.data, "base": entry.base, "metric": metric}
        found |= {"rows": {split: len(rows) for split, rows in prepared.rows.items()}, "more_is_better": more}
        found |= {"precision": prepared.compute.precision}

        def do(stage: str, method: str, rates: dict[str, float], seed: int) -> dict[str, Any]:
            done = [r for r in found[stage] if (r["method"], r["rates"], r["seed"]) == (method, rates, seed)]
            if not done:
                done = [train_and_score(prepared, method, rates, seed)]
                found[stage] += done
                keep()
                scores = {split: values[metric] for split, values in done[0]["metrics"].items()}
                sys.stderr.write(f"{name}: {stage}: {method} {rates} seed {seed}: {metric} {scores}\n")
            return done[0]

        for method in METHODS:
            tried = [do("choosing", method, rates, 0) for rates in grid(case, entry, method)]
            best = max(tried, key=lambda run: _worth(run["metrics"]["validation"][metric], more))["rates"]
            for seed in range(1, seeds + 1):
                do("runs", method, best, seed)


def _worth(value: float | None, more_is_better: bool) -> float:
    """A metric that is undefined, as when a run diverged, is worth least."""
    return -math.inf if value is None or math.isnan(value) else value if more_is_better else -value


def test_examples(prepared: Prepared) -> Encoded:
    """The test rows, as examples."""
    return encode(prepared.task, prepared.rows["test"], prepared.base.directory)


def table(document: dict[str, Any]) -> str:
    """The runs as Markdown."""
    lines = [
        "| recipe | task | data | base | trained | metric | head alone | ticks + norms | full fine-tuning | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ENTRIES:
        found = document["cases"].get(name)
        if found is None or not found["runs"]:
            continue
        cells, seconds, share = [], [], 0.0
        for method in METHODS:
            runs = [run for run in found["runs"] if run["method"] == method]
            values = [run["metrics"]["test"][found["metric"]] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
            seconds.append(f"{statistics.median(run['seconds'] for run in runs):.0f}")
            if method == "ticks + norms":
                share = 100 * runs[0]["trained_parameters"] / runs[0]["base_parameters"]
        sign = "" if found["more_is_better"] else " (less is better)"
        lines.append(
            f"| {name} | {found['task']} | {found['data']} | {found['base']} | {share:.1f} % | "
            f"{found['metric']}{sign} | {' | '.join(cells)} | {' / '.join(seconds)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(ENTRIES)}; default: all", metavar="CASE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only write the table into docs/tasks.md")
    arguments = parser.parse_args()
    document = read_json(arguments.results) if arguments.results.exists() else {"cases": {}}
    if not arguments.docs:
        torch.set_num_threads(1)
        quiet_transformers()
        from ticktune.device import choose_compute

        document |= {
            "command": "python -m benchmarks.tasks",
            "seeds": arguments.seeds,
            "machine": describe(choose_compute("auto", "auto")),
            "versions": versions(),
        }
        for name in arguments.cases or ENTRIES:
            compare(name, document, arguments.seeds, lambda: write_json(arguments.results, document))
    sys.stdout.write(table(document) + "\n")
    if arguments.docs:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- table -->\n")
        after = rest.partition("<!-- end -->")[2]
        PAGE.write_text(f"{before}<!-- table -->\n{table(document)}\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
