"""What ticks cost beside training norms alone and beside full fine-tuning: CPU time of a step, and bytes it keeps.

    OMP_NUM_THREADS=1 python -m benchmarks.tick_tax

Models of real shapes with random weights; rows of one length, so every token is real. The forms take turns in one
process, and each round gives one ratio: what slows the machine down slows all of them down. Times are CPU time of
this process, with one thread. ``--only SHAPE`` measures one shape and keeps the rest of the file; ``--docs`` writes
docs/performance.md from it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks import page
from benchmarks.counting import saved_bytes
from benchmarks.tokens import Classes
from ticktune.device import Compute, Precision, describe
from ticktune.files import write_json
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.cpu import OnCpu
from ticktune.patch.wide import Wide
from ticktune.recipe.schema import Optimizer
from ticktune.train.groups import build_optimizer
from ticktune.train.steps import train_steps
from ticktune.versions import versions

RESULTS = Path(__file__).parent / "results" / "tick_tax.json"
DIM, ROWS, LENGTH, LABELS = 64, 32, 32, 2
IDS = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": LABELS}
# Shape -> (config, rounds in bf16, rounds in fp32).
SHAPES: dict[str, tuple[Any, int, int]] = {
    "MiniLM-L6 (384/1536, 6 layers)": (
        transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, **IDS
        ),
        60,
        12,
    ),
    "BERT-base (768/3072, 12 layers)": (transformers.BertConfig(**IDS), 10, 0),
    "GPT-2 of that size (384/1536, 6 layers)": (
        transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.1, **IDS),
        12,
        0,
    ),
    "Llama of that size (512/1536, 4 layers)": (
        transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            **IDS,
        ),
        12,
        0,
    ),
}  # fmt: skip


class Form(NamedTuple):
    """What is trained, and how.

    Args:
        dim: Units of a tick.
        fast: As ``training.fast``.
        wide: Whether ticks are computed as ``training.ffn: wide`` does.
    """

    dim: int
    fast: bool = True
    wide: bool = False

    def attached(self, model: nn.Module, **options: Any) -> nn.Module:
        """The model with ticks and trained norms."""
        return attach(model, self.dim, fast=self.fast, **options)


# None: all weights are trained.
FORMS: dict[str, Form | None] = {
    "norms only": Form(0),
    "ticks + norms": Form(DIM),
    "ticks + norms, ffn: wide": Form(DIM, wide=True),
    "norms only, fast: false": Form(0, fast=False),
    "ticks + norms, fast: false": Form(DIM, fast=False),
    "full fine-tuning": None,
}


def build(config: Any, form: str, precision: Precision) -> tuple[nn.Module, list[tuple[str, Any, nn.Parameter]]]:
    """A model of a form, as a run would hold it, and what is trained: (name, role, parameter)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    chosen = FORMS[form]
    if chosen is None:  # weights that are trained stay float32, and autocast multiplies in bfloat16
        return model, [(name, "Q" if p.ndim > 1 else "r", p) for name, p in model.named_parameters()]
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    chosen.attached(model)
    return model, list(adapter_parameters(model))


def steps(config: Any, form: str, precision: Precision) -> Iterator[Any]:
    """Steps of the training loop, without end."""
    model, named = build(config, form, precision)
    generator = torch.Generator().manual_seed(1)

    def batches() -> Iterator[list[dict[str, Tensor]]]:
        while True:
            ids = torch.randint(3, config.vocab_size, (ROWS, LENGTH), generator=generator)
            yield [{"input_ids": ids, "labels": torch.randint(0, LABELS, (ROWS,), generator=generator)}]

    compute, chosen = Compute(torch.device("cpu"), precision), FORMS[form]
    running = ways(model, chosen, compute.dtype)
    return train_steps(
        model,
        [(name, p) for name, _, p in named],
        Classes(),  # type: ignore[arg-type]
        batches(),
        build_optimizer(named, Optimizer()),
        compute.scaler(),
        compute,
        lr_factor=lambda step: 1.0,
        clip=1.0,
        seed=1,
        around=lambda batch: running(),
    )


def ways(model: nn.Module, form: Form | None, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager[Any]]:
    """What a form's forward passes run in, as a run of ``ticktune train`` would; full fine-tuning too is fast."""
    wide = Wide(model, dtype) if form is not None and form.wide else None
    on_cpu = OnCpu(model) if form is None or form.fast else None

    def running() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for way in (wide, on_cpu):
            if way is not None:
                stack.enter_context(way.running())
        return stack

    return running


def turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call in each round; who begins changes from round to round."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            started = time.process_time()
            calls[name]()
            if number >= 0:
                seconds[name].append(time.process_time() - started)
    return seconds


def compared(seconds: dict[str, list[float]], with_: str) -> dict[str, dict[str, Any]]:
    """Median CPU milliseconds, and how much more than another form in the same round: median and quartiles."""
    found = {}
    for name, own in seconds.items():
        more = [100 * (a / b - 1) for a, b in zip(own, seconds[with_], strict=True)]
        low, middle, high = statistics.quantiles(more, n=4) if len(more) > 1 else (more[0],) * 3
        found[name] = {
            "cpu_ms": round(1000 * statistics.median(own), 2),
            "cpu_ms_least": round(1000 * min(own), 2),
            "more_percent": round(middle, 2),
            "more_percent_quartiles": [round(low, 2), round(high, 2)],
        }
    return found


def timed(config: Any, precision: Precision, rounds: int) -> dict[str, Any]:
    """Each form's step, beside that of norms alone."""
    loops = {form: steps(config, form, precision) for form in FORMS}
    found = compared(turns({form: lambda loop=loop: next(loop) for form, loop in loops.items()}, rounds), "norms only")
    for entry in found.values():
        entry["tokens_per_cpu_second"] = round(ROWS * LENGTH / entry["cpu_ms"] * 1000)
    return {"rounds": rounds, "tokens": ROWS * LENGTH, "forms": found}


def kept(config: Any, peft: bool) -> dict[str, float]:
    """Bytes that one more layer keeps for each token, without dropout, in units of a hidden state in bfloat16."""
    forms: dict[str, Callable[[nn.Module], nn.Module]] = {
        name: (lambda model: model) if form is None else partial(form.attached, head=False)
        for name, form in FORMS.items()
    }
    if peft:
        from peft import LoraConfig, get_peft_model

        def lora(model: nn.Module, cast: bool) -> nn.Module:
            known = {"gate_proj", "up_proj", "down_proj", "c_fc"}
            names = [n for n, m in model.named_modules() if n.rpartition(".")[2] in known or _is_ffn(n, m)]
            return get_peft_model(model, LoraConfig(r=16, target_modules=names), autocast_adapter_dtype=cast)

        forms["PEFT LoRA r 16 on the feed-forward block"] = lambda model: lora(model, True)
        forms["the same, adapters in bfloat16"] = lambda model: lora(model, False)

    def bytes_of(form: str, layers: int, rows: int) -> int:
        own = type(config)(**{**config.to_diff_dict(), "num_hidden_layers": layers, **_no_dropout(config)})
        model = forms[form](transformers.AutoModel.from_config(own).to(torch.bfloat16)).train()
        ids = torch.randint(3, config.vocab_size, (rows, 64))
        running = ways(model, FORMS[form], None) if form in FORMS else nullcontext

        def states() -> Tensor:
            with running():
                found: Tensor = model(input_ids=ids).last_hidden_state
            return found

        states()  # wide weights take the place of the base's, and are no more than those

        return saved_bytes(model, states)

    unit = 2 * config.hidden_size * 2 * 64  # two rows more
    more = {f: {n: bytes_of(f, n, 4) - bytes_of(f, n, 2) for n in (1, 2)} for f in forms}
    return {form: round((more[form][2] - more[form][1]) / unit, 2) for form in forms}


def _is_ffn(name: str, module: nn.Module) -> bool:
    """Whether this is a projection of BERT's or GPT-2's feed-forward block."""
    is_bert = ".attention." not in name and name.endswith((".intermediate.dense", ".output.dense"))
    return is_bert or name.endswith("mlp.c_proj")


def _no_dropout(config: Any) -> dict[str, float]:
    return {name: 0.0 for name in vars(config) if name.endswith(("dropout", "dropout_prob", "pdrop"))}


def section(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that these results are."""
    machine, torch_version = document["machine"], document["versions"]["torch"]
    lines = [
        f"`{document['command']}`: a {machine['cores']}-core {machine['name']}, one thread, torch {torch_version};",
        f"{ROWS} rows of {LENGTH} random tokens, ticks of dim {document['dim']}, the training loop with its optimizer.",
        "The forms take turns, so that what slows the machine down slows all of them; each round gives one ratio, and",
        "the last column says median and quartiles. Times are CPU time.",
        "",
        "| shape | precision | form | ms | tokens per CPU second | beside norms only |",
        "|---|---|---|---|---|---|",
    ]
    for shape, entry in document["shapes"].items():
        for precision in ("bf16", "fp32"):
            for form, row in entry.get(precision, {"forms": {}})["forms"].items():
                low, high = row["more_percent_quartiles"]
                more = "" if form == "norms only" else f"{row['more_percent']:+.1f} % ({low:+.1f} to {high:+.1f})"
                speed = f"{row['cpu_ms']:.0f} | {row['tokens_per_cpu_second']:,}"
                lines.append(f"| {shape} | {precision} | {form} | {speed} | {more} |")
    lines += [
        "",
        "What one layer keeps for the backward pass, for each token, all in bfloat16, without autocast and dropout, in",
        "units of a hidden state (2 bytes for each of its numbers):",
        "",
        "| shape | form | kept |",
        "|---|---|---|",
    ]
    for shape, entry in document["shapes"].items():
        lines += [f"| {shape} | {form} | {units:.1f} |" for form, units in entry["kept_per_layer"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measures what is asked for and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="begins the name of one shape")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="measure nothing, write docs/performance.md")
    arguments = parser.parse_args()
    if arguments.docs:
        document = json.loads(arguments.output.read_text(encoding="utf-8"))
        page.put("tick_tax", section(document))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    document: dict[str, Any] = {"shapes": {}}
    if arguments.output.exists():
        document = json.loads(arguments.output.read_text(encoding="utf-8"))
    document |= {
        "what": "CPU time of a training step and bytes kept, ticks beside norms alone and full fine-tuning",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.tick_tax",
        "dim": DIM,
        "machine": describe(Compute(torch.device("cpu"), "bf16")) | {"cores": os.cpu_count()},
        "versions": versions(),
    }
    for name, (config, half, single) in SHAPES.items():
        if arguments.only is not None and not name.startswith(arguments.only):
            continue
        sys.stderr.write(f"{name}\n")
        entry: dict[str, Any] = {"kept_per_layer": kept(config, True)}
        rounds: dict[Precision, int] = {"bf16": half, "fp32": single}
        for precision, count in rounds.items():
            if count:
                entry[precision] = timed(config, precision, count)
        document["shapes"][name] = entry
        write_json(arguments.output, document)
    sys.stdout.write(json.dumps(document["shapes"], indent=1) + "\n")


if __name__ == "__main__":
    main()
