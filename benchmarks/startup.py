"""How long the command line takes before it computes: help, a wrong recipe, and `ticktune train` up to its first step.

    TICKTUNE_DATA=/path/to/data python -m benchmarks.startup

Each command runs in a process of its own, five times; the median of its CPU seconds and of its wall seconds is
written to results/startup.json. Of `train` each stage counts apart; the overhead is what is left of the whole without
the imports of torch and transformers, reading the weights, and scoring the untrained model. The passes of the longest
rows and the first step itself are part of it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "startup.json"
RECIPE = ROOT.parent / "recipes" / "sst2.yaml"
RUNS = 5
STAGES = {
    "prepare": ("ticktune.run", "prepare"),
    "weights": ("ticktune.prepare", "load_model"),
    "attach": ("ticktune.run", "attach_as"),
    "hashes": ("ticktune.run", "begin"),
    "metrics": ("ticktune.tasks.text_classification", "TextClassification.metrics"),
    "longest rows": ("ticktune.session", "Session._try_longest"),
    "first score": ("ticktune.session", "Session._evaluate"),
}
"""What is timed of a run: a stage's name -> module and name of a function, where it is called from."""

Times = tuple[float, float]


def now() -> Times:
    """CPU seconds of this process, and wall seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, time.perf_counter()


def child(words: list[str]) -> None:
    """Runs a command up to its first step, and prints the seconds of each stage."""
    found: dict[str, Times] = {}

    def add(name: str, began: Times) -> None:
        ended, before = now(), found.get(name, (0.0, 0.0))
        found[name] = (before[0] + ended[0] - began[0], before[1] + ended[1] - began[1])

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                add(name, began)

        return call

    def first_step(*args: Any) -> None:
        found["whole"] = (now()[0], time.time() - float(os.environ["BEGAN"]))
        sys.stdout.write(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)

    began = now()
    # What any program pays that loads a BERT and its tokenizer.
    from transformers import AutoTokenizer, BertForSequenceClassification, BertTokenizer  # noqa: F401

    add("import", began)
    import importlib

    began = now()
    import datasets  # noqa: F401

    import ticktune.run  # noqa: F401

    add("our imports", began)
    for name, (module, path) in STAGES.items():
        *owners, attribute = path.split(".")
        holder: Any = importlib.import_module(module)
        for owner in owners:
            holder = getattr(holder, owner)
        setattr(holder, attribute, timed(name, getattr(holder, attribute)))
    from ticktune.cli import entry
    from ticktune.session import Session

    setattr(Session, "_show", first_step)  # noqa: B010 - mypy knows the method's own arguments
    sys.exit(entry(words))


def run(words: list[str], *, is_child: bool = False, cwd: Path, cache: Path) -> tuple[Times, str]:
    """Runs a command of ours; returns its seconds and what it printed."""
    program = ["-m", "benchmarks.startup", "--child"] if is_child else ["-m", "ticktune"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XDG_CACHE_HOME": str(cache),
        "BEGAN": str(time.time()),
    }
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *program, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if is_child and done.returncode:
        raise SystemExit(done.stderr)
    return (cpu, wall), done.stdout


def middle(times: list[Times]) -> dict[str, float]:
    """The medians."""
    return {
        "cpu_seconds": round(statistics.median(cpu for cpu, _ in times), 3),
        "wall_seconds": round(statistics.median(wall for _, wall in times), 3),
    }


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """All figures.

    Args:
        folder: Runs and the cache lie in it.
        runs: Of each command.
    """
    wrong = folder / "wrong.yaml"
    wrong.write_text("task: text-clasification\nbase: {model: m}\ndata: {train: a}\n")
    cache = folder / "cache"
    found: dict[str, Any] = {
        name: middle([run(words, cwd=folder, cache=cache)[0] for _ in range(runs)])
        for name, words in (("help", ["--help"]), ("recipe error", ["train", str(wrong)]))
    }
    for name in ("train, first time", "train, rows in the cache"):
        stages: dict[str, list[Times]] = {}
        for number in range(runs):
            own = folder / f"cache-{number}"
            words = ["train", str(RECIPE), f"output=run-{name[7]}-{number}", "training.device=cpu"]
            _, text = run(words, is_child=True, cwd=folder, cache=own)
            one: dict[str, Times] = {stage: tuple(times) for stage, times in json.loads(text).items()}
            cpu, wall = (
                one["whole"][i] - one["import"][i] - one["weights"][i] - (one["first score"][i] - one["metrics"][i])
                for i in (0, 1)
            )
            one["overhead"] = (cpu, wall)
            for stage, times in one.items():
                stages.setdefault(stage, []).append(times)
        found[name] = {stage: middle(times) for stage, times in stages.items()}
    return found


def table(seconds: dict[str, Any]) -> str:
    """The CPU seconds as a table in Markdown.

    Args:
        seconds: What :func:`measure` gave.
    """
    stages = ("longest rows", "our imports", "metrics", "prepare", "overhead", "whole")
    rows = [["command", *stages], ["---"] * (len(stages) + 1)]
    for name, found in seconds.items():
        if "whole" in found:
            rows.append([name, *(f"{found[stage]['cpu_seconds']:.2f}" for stage in stages)])
        else:
            rows.append([name, *["-"] * (len(stages) - 1), f"{found['cpu_seconds']:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description="Measure how long the command line takes before it computes.")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each command")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    from ticktune.device import choose_compute, describe
    from ticktune.files import write_json
    from ticktune.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.runs)
    machine = describe(choose_compute("cpu", "auto"))
    write_json(options.output, {"machine": machine, "versions": versions(), "runs": options.runs, "seconds": found})


if __name__ == "__main__":
    main()
