"""What a GPU makes of training steps: the calls G0 to G6, each at most eight minutes on one device.

    python -m benchmarks.gpu --call G1

- G0: products with and without a tick, attention, copies, and the loss by size of its chunks
- G1: a Llama of 1B: norms alone, ticks, PEFT LoRA, full fine-tuning; rows of one length and of many
- G2: the same with compiled layers, and three losses
- G3: a Llama of 8B: tokens in a step, lengths, feed-forward blocks computed again
- G4: BERT-base and MiniLM: batches, padding, compiling, CUDA graphs, AdamW
- G5: accuracy by time on SST-2 with MiniLM (needs datasets, the rows and the base)
- G6: bytes that kernels move, by formula and by ncu

Bases are built from their sizes with random weights. All ways of a case train the same tokens and take turns; what a
time counts is between two CUDA events, after steps that do not count. What does not fit into memory or time, or is not
installed, is listed with the reason. ``--tiny`` runs the same code on small shapes in seconds, on a CPU, and is no
measurement. ``--docs`` writes all results into docs/performance.md.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_kernels
from benchmarks.clock import Budget, all_versions, clocks, machine
from benchmarks.gpu_steps import (
    REFERENCE,
    TICK_FORMS,
    Effort,
    Subject,
    Way,
    attempt,
    budget_of,
    everything,
    lora,
    measure,
    ticks,
    weights_of,
)
from benchmarks.shapes import SHAPES, TINY, Shape
from benchmarks.tokens import Classes, NextTokens, divided, drawn, in_rows, lognormal, mean_length, up_to
from ticktune.base import quiet_transformers
from ticktune.device import Compute
from ticktune.files import read_json, write_json
from ticktune.patch import standins

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- gpu -->", "<!-- end of gpu -->"
SECONDS = 480.0
_NAMED = 6  # of what was left out for one reason


@dataclass
class Run:
    """One call.

    Args:
        tiny: Whether shapes are tiny.
        compute: Device and precision.
        effort: How much is measured.
        budget: Seconds.
        document: Gets rows and what is left out.
        keep: Writes the document.
        only: Cases with this in their names are measured; of G1 to G4.
    """

    tiny: bool
    compute: Compute
    effort: Effort
    budget: Budget
    document: dict[str, Any]
    keep: Callable[[], None]
    only: str = ""

    @property
    def left_out(self) -> list[dict[str, str]]:
        """What could not be measured, and why."""
        found: list[dict[str, str]] = self.document["left_out"]
        return found

    def shape(self, name: str) -> Shape:
        """A model's sizes."""
        return (TINY if self.tiny else SHAPES)[name]

    def size(self, real: int, tiny: int) -> int:
        """A number that is smaller in a tiny run."""
        return tiny if self.tiny else real

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes rows, with the clocks that the device has while it is warm, and writes the file."""
        self.document["rows"] += rows
        if self.compute.device.type == "cuda":
            self.document["machine"]["clocks_under_load"] = clocks()
        self.keep()

    def measure(self, case: str, subject: Callable[[str], Subject], ways: dict[str, Way]) -> None:
        """Measures the ways of a case, unless another one is wanted."""
        if self.only in case:
            self.add(measure(subject(case), ways, self.effort, self.budget, self.left_out))

    def try_(self, what: str, make: Callable[[], Sequence[dict[str, Any]]]) -> None:
        """Takes the rows of a part, or notes why there are none."""
        if self.budget.allows(5.0, what, self.left_out):
            self.add(attempt(what, self.left_out, make) or [])


# Calls of kernels


def g0(run: Run) -> None:
    device, effort, left_out = run.compute.device, run.effort, run.left_out
    small = run.tiny
    run.try_("copy", lambda: gpu_kernels.copies(run.size(1 << 29, 1 << 10), device, effort))
    llama = run.shape("Llama-1B")
    tokens, chunks = run.size(16384, 256), [32, 128] if small else [256, 512, 1024, 2048, 4096, 8192]
    run.try_(
        "loss by chunks",
        lambda: gpu_kernels.losses(llama.hidden, llama.vocabulary, tokens, chunks, device, effort),
    )
    # Llama-1B's, Llama-8B's and MiniLM's heads.
    cases = [(size, heads, s) for s in (2048, 512, 128, 8192) for size, heads in ((64, 32), (128, 32), (32, 12))]
    cases = [(8, 2, 16)] if small else cases
    run.add(gpu_kernels.attention(cases, run.size(16384, 32), device, effort, run.budget, left_out))
    names = ["Llama-1B", "MiniLM-L6"] if small else list(SHAPES)
    counts, dims = ([32], [0, 8]) if small else ([8192, 16384, 4096], [0, 64, 16, 128, 256, 8, 32])
    shapes = {name: run.shape(name) for name in names}
    run.add(gpu_kernels.products(shapes, counts, dims, device, effort, run.budget, left_out))


def g6(run: Run) -> None:
    shape = run.shape("Llama-1B")
    words = ["-m", "benchmarks.gpu", "--call", "G6"]
    tokens, dim = run.size(4096, 32), run.size(64, 8)
    run.try_(
        "kernels",
        lambda: gpu_kernels.traffic(shape, tokens, dim, run.compute.device, run.effort, run.left_out, words),
    )


# Calls of language models


def language(run: Run, shape: Shape, weights: list[Any], lengths: list[int], capacity: int, case: str) -> Subject:
    """What the ways of a case train on: examples of these lengths, packed into rows of a capacity, and padded.

    The steps have the same lengths and other tokens. Padded rows are cut into micro-batches that have, with their
    padding, no more tokens than a whole packed step: the logits of all of them would not fit into any memory.
    """
    task = NextTokens()
    batches: dict[str, list[Any]] = {"packed": [], "padded": []}
    most = max(1, sum(lengths) // max(lengths))
    for number in range(run.effort.steps):
        examples = drawn(lengths, shape.vocabulary, number)
        batches["padded"].append([task.collate(examples[i : i + most]) for i in range(0, len(examples), most)])
        shared = [[examples[i] for i in row] for row in in_rows(lengths, capacity)]
        # Examples that fill a row each need no positions, and attention no mask.
        full = all(len(row) == 1 for row in shared)
        batches["packed"].append([task.collate(examples) if full else task.pack(shared)])
    budget = budget_of(shape, tick_dim(run))
    return Subject(case, shape, weights, batches, mean_length(lengths), capacity, run.compute, budget)


def tick_dim(run: Run) -> int:
    """The ticks' dim that peers are given as many parameters as."""
    return run.size(64, 8)


def tick_ways(dims: Sequence[int], **options: Any) -> dict[str, Way]:
    """Ticks of some dims in each form."""
    return {
        f"ticks {dim} + norms, {form}": Way(ticks(dim, form), "packed", dim=dim, **options)
        for dim in dims
        for form in TICK_FORMS
    }


def g1(run: Run) -> None:
    shape = run.shape("Llama-1B")
    weights, dim = weights_of(shape, run.compute), tick_dim(run)
    longest, tokens = run.size(2048, 32), run.size(16384, 64)
    reference = {REFERENCE: Way(ticks(0), "packed")}
    ffn = {
        "PEFT LoRA, FFN, best": Way(lora(everywhere=False, best=True), "packed", autocast=False),
        "Trainer + PEFT LoRA, FFN, default": Way(lora(everywhere=False, best=False), "padded", trainer=True),
    }
    linear = {
        "PEFT LoRA, all linear, r 16, best": Way(lora(everywhere=True, rank=16, best=True), "packed", autocast=False),
        "Trainer + PEFT LoRA, all linear, r 16, default": Way(
            lora(everywhere=True, rank=16, best=False), "padded", trainer=True
        ),
    }
    full = {
        "full fine-tuning": Way(everything(torch.float32), "packed", full=True),
        "full fine-tuning, bfloat16 weights": Way(everything(torch.bfloat16), "packed", full=True, autocast=False),
        "Trainer, full fine-tuning, default": Way(everything(torch.float32), "padded", full=True, trainer=True),
    }
    rows = [longest] * (tokens // longest)
    mixed = up_to(lognormal(tokens, run.size(350, 8), longest), tokens)
    masked = {f"ticks {dim} + norms, split, masked": Way(ticks(dim), "packed", dim=dim, attention="masked")}
    other = [run.size(16, 2), run.size(256, 16)]
    groups = [
        (f"rows of {longest}", rows, reference | tick_ways([dim]) | ffn | tick_ways(other) | linear),
        (f"lengths of mean {run.size(350, 8)}", mixed, reference | tick_ways([dim]) | masked | ffn | linear),
        # Their weights and moments would take the room of what stands above.
        (f"rows of {longest}, all weights", rows, reference | full),
    ]
    for case, lengths, ways in groups:
        make = functools.partial(language, run, shape, weights, lengths, longest)
        run.measure(f"Llama-1B, {case}", make, ways)


def g2(run: Run) -> None:
    shape = run.shape("Llama-1B")
    weights, dim = weights_of(shape, run.compute), tick_dim(run)
    longest, tokens = run.size(2048, 32), run.size(16384, 64)
    compiled: Any = {"layers": "compiled"}
    best = Way(lora(everywhere=False, best=True), "packed", autocast=False)
    ours = Way(ticks(dim), "packed", dim=dim)
    peers = {
        "PEFT LoRA, FFN, best, not compiled": best,
        "Trainer + PEFT LoRA, FFN, default": Way(lora(everywhere=False, best=False), "padded", trainer=True),
    }
    ways = {REFERENCE: Way(ticks(0), "packed", **compiled), **tick_ways([dim], **compiled), **peers}
    slow_to_compile = {"PEFT LoRA, FFN, best": replace(best, **compiled)}
    losses = {
        "ticks, all logits": replace(ours, loss="plain", **compiled),
        "ticks, Liger's loss": replace(ours, loss="liger", **compiled),
        "ticks, not compiled": ours,
        "PEFT LoRA, FFN, best, Liger's loss": replace(best, loss="liger", **compiled),
    }
    masked = {f"ticks {dim} + norms, split, masked": replace(ours, attention="masked", **compiled)}
    rows, mean = [longest] * (tokens // longest), run.size(350, 8)
    mixed = up_to(lognormal(tokens, mean, longest), tokens)
    groups = [
        (f"lengths of mean {mean}", mixed, ways | masked),
        (f"rows of {longest}", rows, ways | losses | slow_to_compile),
    ]
    for case, lengths, those in groups[run.size(0, 1) :]:
        make = functools.partial(language, run, shape, weights, lengths, longest)
        run.measure(f"Llama-1B, compiled, {case}", make, those)


def g3(run: Run) -> None:
    shape = run.shape("Llama-8B")
    weights, dim = weights_of(shape, run.compute), tick_dim(run)
    ways = {
        REFERENCE: Way(ticks(0), "packed"),
        **tick_ways([dim]),
        "PEFT LoRA, FFN, best": Way(lora(everywhere=False, best=True), "packed", autocast=False),
        "ticks, FFN computed again": Way(ticks(dim), "packed", dim=dim, layers="checkpointed"),
    }
    sizes = [(8192, 2048), (16384, 2048), (8192, 8192), (32768, 2048)]
    for tokens, length in [(64, 32), (64, 64)] if run.tiny else sizes:
        make = functools.partial(language, run, shape, weights, [length] * (tokens // length), length)
        run.measure(f"Llama-8B, {tokens} tokens, rows of {length}", make, ways)
    run.left_out.append({"what": "base in FP8", "why": "ticktune has no products in FP8"})


# The call of encoders


def g4(run: Run) -> None:
    names = ("MiniLM-L6", "BERT-base")[: run.size(2, 1)]  # their tiny shapes are the same
    weights = {name: weights_of(run.shape(name), run.compute) for name in names}
    sizes = [(32, 128), (128, 128), (512, 128), (32, 32), (128, 32), (512, 32), (32, 512), (128, 512), (512, 512)]
    if not run.tiny:  # steps are short, and each shape of a turn is to be compiled or recorded before it counts
        run.effort = Effort(warm=21, turns=4, steps=20)
    for number, (rows, longest) in enumerate([(4, 16)] if run.tiny else sizes):
        for name, drawn_weights in weights.items():
            dim = run.size(32 if name == "MiniLM-L6" else 64, 8)
            make = functools.partial(encoder, run, run.shape(name), drawn_weights, rows, longest, dim)
            run.measure(f"{name}, {rows} rows of up to {longest}", make, encoder_ways(dim, few=number > 0))
    run.left_out.append({"what": "8 runs at once", "why": "ticktune trains one run in a process"})


def encoder(run: Run, shape: Shape, weights: list[Any], rows: int, longest: int, dim: int, case: str) -> Subject:
    """The same rows of many lengths in two orders: as they come, and by length."""
    task, steps = Classes(), run.effort.steps
    lengths = lognormal(rows * steps, longest / 4, longest)
    examples = drawn(lengths, shape.vocabulary)
    batches: dict[str, list[Any]] = {}
    for layout in ("random", "by length"):
        batches[layout] = [[task.collate([examples[i] for i in part])] for part in divided(lengths, rows, layout)]
    return Subject(case, shape, weights, batches, mean_length(lengths), longest, run.compute, budget_of(shape, dim))


def encoder_ways(dim: int, *, few: bool) -> dict[str, Way]:
    """By worth; the first few of them for batches that are less common."""
    ours = Way(ticks(dim), "by length", dim=dim)
    alike = {"layout": "random", "dropout": False}
    ways = {
        REFERENCE: Way(ticks(0), "by length"),
        **{f"ticks, {form}, by length": replace(ours, adapt=ticks(dim, form)) for form in TICK_FORMS},
        "Trainer + PEFT LoRA, FFN, default": Way(lora(everywhere=False, best=False), "random", trainer=True),
        "ticks, CUDA graphs": replace(ours, graphs=True),
        "ticks, without padding, no dropout": replace(ours, padding_free=True, **alike),
        "ticks, random, no dropout": replace(ours, **alike),
    }
    more = {
        "PEFT LoRA, FFN, best": Way(lora(everywhere=False, best=True), "by length", autocast=False),
        "norms only, CUDA graphs": Way(ticks(0), "by length", graphs=True),
        "full fine-tuning": Way(everything(torch.float32), "by length", full=True),
        "ticks, compiled, CUDA graphs": replace(ours, layers="compiled", graphs=True),
        "ticks, compiled": replace(ours, layers="compiled"),
        "ticks, AdamW foreach": replace(ours, adamw="foreach"),
    }
    return ways if few else ways | more


# The call of accuracy by time


def g5(run: Run) -> None:
    def rows() -> list[dict[str, Any]]:
        from benchmarks.gpu_accuracy import by_time  # datasets and pydantic, which no other call needs

        return by_time(run.compute, run.size(3000, 48), run.size(5, 1), run.budget, run.left_out)

    run.try_("accuracy by time", rows)


CALLS: dict[str, Callable[[Run], None]] = {"G0": g0, "G1": g1, "G2": g2, "G3": g3, "G4": g4, "G5": g5, "G6": g6}

# The tables


def _number(digits: int, factor: float = 1.0, unit: str = "") -> Callable[[Any], str]:
    return lambda value: f"{factor * value:,.{digits}f}{unit}"


Columns = dict[str, tuple[str, Callable[[Any], str]]]
_PERCENT, _TERA, _GIB = _number(1, 100, " %"), _number(1, 1e-12), _number(2, 1 / 2**30)
_TIME: Columns = {"ms": ("ms", _number(3)), "ms_p10": ("p10", _number(3)), "ms_p90": ("p90", _number(3))}
_NAMES: Columns = {"case": ("", str), "way": ("", str)}
# Kind of a row -> its field -> heading and form.
TABLES: dict[str, Columns] = {
    "step": {
        **_NAMES,
        "trained": ("trained", _number(0)),
        "tokens_per_second": ("real tokens/s", _number(0)),
        **_TIME,
        "tax": ("slower than norms", _PERCENT),
        "mfu4": ("MFU4", _PERCENT),
        "of_floor": ("of the floor", _PERCENT),
        "of_products": ("of a product's rate", _PERCENT),
        "peak_allocated_bytes": ("GiB, most allocated", _GIB),
        "peak_reserved_bytes": ("reserved", _GIB),
        "saved_bytes_per_token": ("kept bytes/token", _number(0)),
        "first_step_seconds": ("first step, s", _number(2)),
    },
    "product": {**_NAMES, **_TIME, "flops_per_second": ("TFLOP/s", _TERA)},
    "attention": {**_NAMES, **_TIME, "flops_per_second": ("TFLOP/s", _TERA)},
    "loss": {**_NAMES, **_TIME, "flops_per_second": ("TFLOP/s", _TERA)},
    "copy": {**_NAMES, **_TIME, "bytes_per_second": ("TB/s", _TERA)},
    "kernel": {
        **_NAMES,
        **_TIME,
        "expected_bytes": ("MB by formula", _number(1, 1e-6)),
        "counted_bytes": ("counted", _number(1, 1e-6)),
        "bytes_per_second": ("TB/s by formula", _TERA),
    },
    "accuracy": {
        **_NAMES,
        "epoch": ("epoch", _number(0)),
        "seconds": ("s until then", _number(2)),
        "accuracy": ("accuracy", _PERCENT),
        "trained": ("trained", _number(0)),
    },
}


def table(document: dict[str, Any]) -> str:
    """The rows of a call as Markdown, a table for each kind of them, and what was left out."""
    parts = []
    for kind, columns in TABLES.items():
        rows = [row for row in document["rows"] if row["kind"] == kind]
        if rows:
            lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |", "|---" * len(columns) + "|"]
            for row in map(functools.partial(_beside_its_limit, rows), rows):
                cells = [form(row[name]) if row.get(name) is not None else "-" for name, (_, form) in columns.items()]
                lines.append(f"| {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    if document["left_out"]:
        parts.append("\n".join(_left_out(document["left_out"])))
    return "\n\n".join(parts)


def _beside_its_limit(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """A row whose tax is over norms alone by CUDA graphs too, where it has such; without a tax where these are not."""
    if "CUDA graphs" not in row["way"] or "tokens_per_second" not in row:
        return row
    limits = [r for r in rows if (r["case"], r["way"]) == (row["case"], f"{REFERENCE}, CUDA graphs") and r is not row]
    tax = [1 - row["tokens_per_second"] / limit["tokens_per_second"] for limit in limits]
    return {**row, "tax": tax[0] if tax else None}


def _left_out(entries: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line for each reason, with the first of what was left out for it."""
    reasons: dict[str, list[str]] = {}
    for each in entries:
        reasons.setdefault(each["why"], []).append(each["what"])
    for why, parts in reasons.items():
        more = f"; and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
        yield f"- Left out: {'; '.join(parts[:_NAMED])}{more}: {why}"


_LEGEND = """MFU4: model FLOPs of a frozen base, 4 for each weight and token, with attention, beside the 989 TFLOP/s
that an H100 or H200 is sold with. Of the floor: the least time that one H200 needs by products, attention and memory,
beside the time taken. Of a product's rate: FLOPs in a second, beside those of one large product on this GPU."""


def section(documents: dict[str, dict[str, Any]]) -> str:
    """The part of docs/performance.md that these results are.

    Args:
        documents: By call.
    """
    parts = ["## On a GPU", _LEGEND]
    for call, document in documents.items():
        facts, found = document["machine"], document["versions"]
        clock = (facts.get("clocks_under_load") or {}).get("clocks.sm")
        told = f"`{document['command']}`: {facts['name']}, torch {found['torch']}, transformers {found['transformers']}"
        told += f", {clock} MHz after the last case." if clock else "."
        parts += [f"### {call}", told, table(document)]
    return "\n\n".join(parts)


def page_with(documents: dict[str, dict[str, Any]], text: str) -> str:
    """A page with this section between its marks, at the end where it has none; as it is where there are no results.

    Args:
        documents: By call.
        text: The page.
    """
    if not documents:
        return text
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{section(documents)}\n\n{END}{rest.partition(END)[2]}"


def committed() -> dict[str, dict[str, Any]]:
    """The results that there are, by call."""
    return {call: read_json(path) for call in CALLS if (path := RESULTS / f"gpu-{call}.json").exists()}


# The command


def measured(
    call: str, *, tiny: bool, device: torch.device, seconds: float, path: Path | None, only: str = ""
) -> dict[str, Any]:
    """Makes a call.

    Args:
        call: Which.
        tiny: Whether shapes are tiny.
        device: Where.
        seconds: That it may take.
        path: Where the document is written after each case; None: nowhere.
        only: Cases with this in their names are measured, and take the place of what the document has of them.

    Raises:
        SystemExit: The document has results of another machine or of other versions.
    """
    compute = Compute(device, "bf16")
    document: dict[str, Any] = {
        "call": call,
        "command": f"python -m benchmarks.gpu --call {call}" + (" --tiny" if tiny else ""),
        "tiny": tiny,
        "machine": machine(compute),
        "versions": all_versions(),
        "rows": [],
        "left_out": [],
    }
    if only and path is not None and path.exists():
        _keep_others(document, read_json(path), only)
    effort = Effort(warm=1, turns=2, steps=1) if tiny else Effort()
    keep = functools.partial(write_json, path, document) if path else lambda: None
    run = Run(tiny, compute, effort, Budget(seconds), document, keep, only)
    square = gpu_kernels.product_rate(device, 64 if tiny else 8192, effort)
    document["product_flops_per_second"] = square["flops_per_second"]
    with _layers_compiled_by("eager" if tiny and device.type == "cpu" else "inductor") as backend:
        document["backend"] = backend
        CALLS[call](run)
    document["warm_steps"], document["steps"] = run.effort.warm, run.effort.turns * run.effort.steps
    for row in document["rows"]:
        if row["kind"] == "step" and "of_products" not in row:
            row["of_products"] = row["flops_per_second"] / document["product_flops_per_second"]
    document["seconds"] = round(run.budget.used, 1)
    run.keep()
    return document


def _keep_others(document: dict[str, Any], before: dict[str, Any], only: str) -> None:
    """Takes over what another document has of other cases."""
    for name, own, other in (
        ("machine", document["machine"]["name"], before["machine"]["name"]),
        ("versions", document["versions"], before["versions"]),
    ):
        if own != other:
            raise SystemExit(f"these results are of other {name}: {other}, now {own}; name other --results")
    document["rows"] += [row for row in before["rows"] if only not in row["case"]]
    document["left_out"] += [each for each in before["left_out"] if only not in each["what"]]


@contextmanager
def _layers_compiled_by(backend: str) -> Iterator[str]:
    """By what torch compiles; the default needs a C++ compiler on a CPU, and minutes."""
    before, standins.BACKEND = standins.BACKEND, backend
    try:
        yield backend
    finally:
        standins.BACKEND = before


def main() -> None:
    """Makes a call, writes its result and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=CALLS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU unless --device says else")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, with --tiny cpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the call may take")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/gpu-CALL.json, with --tiny nowhere")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases of G1 to G4 with this in their names")
    parser.add_argument("--docs", action="store_true", help="measure nothing, write docs/performance.md")
    parser.add_argument("--kernel", choices=gpu_kernels.KERNELS, help="run it under a profiler; what G6 calls itself")
    arguments = parser.parse_args()
    if arguments.docs:
        PAGE.write_text(page_with(committed(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if arguments.call is None:
        parser.error("--call or --docs is needed")
    device = torch.device(arguments.device or ("cpu" if arguments.tiny else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("not run: this machine has no CUDA device; --tiny runs small shapes on the CPU\n")
        raise SystemExit(2)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("real shapes need a GPU; a CPU runs --tiny")
    if arguments.kernel:
        gpu_kernels.profile(gpu_kernels.kernel(arguments.kernel, SHAPES["Llama-1B"], 4096, 64, device))
        return
    quiet_transformers()
    path = arguments.results or (None if arguments.tiny else RESULTS / f"gpu-{arguments.call}.json")
    document = measured(
        arguments.call,
        tiny=arguments.tiny,
        device=device,
        seconds=arguments.seconds,
        path=path,
        only=arguments.only,
    )
    sys.stdout.write(table(document) + "\n")


if __name__ == "__main__":
    main()
