"""Which families merge exactly: every row of the table, then every model type of transformers, and docs/families.md.

    python benchmarks/families.py              the table, what the sweep lacks, and the page
    python benchmarks/families.py --no-sweep   the table and the page
    python benchmarks/families.py --docs       the page alone, from the committed results

A small random model of each family gets ticks with random values in its first and last layer and random norms. It is
merged, saved, and loaded again by the stock class in float64 and float32, and what it computes is compared with base
and adapter; the unticked base makes the same way first. Beside that stands whether the detector, without the table,
finds the same blocks.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sweep  # noqa: E402 - it stands beside this file

import tests.models as models  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
DIM = 5
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}  # x max(1, largest output)
# The routers of experts compute in float32: their weights sum to one up to its rounding, also in float64.
LOOSE = {"mixtral, one tick beside the experts": 1e-6, "qwen3_moe, one tick beside the experts": 1e-6}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        family: Of ``tests/models.py``.
        label: What is special about it.
        options: Of ``attach``.
        express: The architecture that it is written as.
    """

    family: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    express: str = "same"

    @property
    def name(self) -> str:
        """Of the line."""
        return f"{self.family}, {self.label}" if self.label else self.family


def cases() -> list[Case]:
    plain = {"form": "plain"}
    special = [
        *(Case(name, "plain ticks", plain) for name in ("llama", "smollm3", "granite", "modernbert")),
        *(Case(name, "plain ticks, as a Llama", plain, "llama") for name in ("mistral", "qwen2", "phi3")),
        *(Case(name, "plain ticks, same architecture", plain) for name in ("mistral", "qwen3", "gemma")),
        Case("albert", "a tick for each layer", {"unshare": True}),
        *(
            Case(name, "one tick beside the experts", {"experts": "block"})
            for name in ("mixtral", "qwen3_moe", "qwen2_moe")
        ),
    ]
    return [*map(Case, models.table()), *special]


def run(case: Case) -> dict[str, Any]:
    """Attaches, merges, saves, reloads and compares one case."""
    import torch
    import transformers

    from ticktune.errors import TicktuneError
    from ticktune.export.save import express_as_llama
    from ticktune.export.widen import merge_obstacle, widen
    from ticktune.patch.attach import adapter_parameters, adapter_state, attach, attachment_of, detach
    from ticktune.patch.detect import find_layout
    from ticktune.patch.layout import find_bodies

    torch.manual_seed(0)
    row = models.table()[case.family]
    stock_class = getattr(transformers, row.auto)
    model = models.families()[case.family]()
    models.perturb(p for n, p in model.named_parameters() if "classifier" in n)
    batch = models.inputs(model, row.kind)
    layout = find_layout(model)
    bodies = sorted({body.model_type for body in find_bodies(model)})
    result: dict[str, Any] = {"case": case.name, "bodies": bodies, **_block(layout)}
    result["detected"] = _same_blocks(layout, find_or_none(model))

    def load(folder: Path, dtype: str) -> Any:
        loaded, said = stock_class.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
        assert not any(said.values()), said
        if dtype == "float64" and hasattr(loaded, "set_experts_implementation"):
            loaded.set_experts_implementation("eager")  # the grouped kernels take no float64
        return loaded.eval()

    def outputs(loaded: Any) -> Any:
        kind = next(loaded.parameters()).dtype
        with torch.no_grad():
            inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in batch.items()}
            return models.result(loaded(**inputs))

    with tempfile.TemporaryDirectory() as name:
        control, merged = Path(name) / "control", Path(name) / "merged"
        model.save_pretrained(control)
        ours, base, tensors = {}, {}, {}
        for dtype in TOLERANCE:
            model = load(control, dtype)
            base[dtype] = outputs(model)
            layers = {stack: [0, size - 1] for stack, size in layout.sizes.items()}
            if case.options.get("unshare"):
                layers = {stack: [0, 2] for stack in layers}
            try:
                attach(model, DIM, layers, head=False, **case.options)
            except TicktuneError as error:
                return result | {"merges": "refused before training", "reason": str(error)}
            plan = attachment_of(model).plan
            if not tensors:
                models.perturb(p for _, _, p in adapter_parameters(model))
                tensors = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
            for key, _, parameter in adapter_parameters(model):
                parameter.data = tensors[key].to(getattr(torch, dtype))
            ours[dtype] = outputs(model)
        result["form"] = plan.form
        model = detach(model)
        if case.express == "llama":
            model = express_as_llama(model)
        elif obstacle := merge_obstacle(find_layout(model), plan):
            return result | {"merges": "no", "reason": obstacle}
        widened = widen(model, plan, tensors)
        model.save_pretrained(merged)
        result["widths"] = {w.field: w.value for w in widened}
        result["cost_percent"] = {w.field: w.cost_percent for w in widened}
        exact = True
        for dtype, tolerance in TOLERANCE.items():
            scale = max(1.0, float(ours[dtype].abs().max()))
            difference = _distance(ours[dtype], outputs(load(merged, dtype)))
            own = _distance(base[dtype], outputs(load(control, dtype)))
            allowed = (max(tolerance, LOOSE.get(case.name, 0.0)) if dtype == "float64" else tolerance) * scale
            exact = exact and difference <= allowed and own <= allowed
            result[dtype] = {"difference": difference, "control": own, "tolerance": allowed}
        result["effect"] = _distance(ours["float32"], base["float32"])
        exact = exact and result["effect"] >= 1000 * result["float32"]["tolerance"]
        how = "written as a Llama" if case.express == "llama" else "exactly"
        return result | {"merges": how if exact else "WRONG"}


def find_or_none(model: Any) -> Any:
    """The layout by proof alone, or None."""
    from ticktune.errors import PatchError
    from ticktune.patch.detect import find_layout

    try:
        return find_layout(model, families={})
    except PatchError:
        return None


def _same_blocks(table: Any, proof: Any) -> bool:
    def facts(layout: Any) -> set[tuple[Any, ...]]:
        return {(f.key, id(f.up), id(f.down), id(f.gate), f.fused, f.width_field, f.bias_field) for f in layout.ffns}

    return proof is not None and facts(table) == facts(proof)


def _block(layout: Any) -> dict[str, Any]:
    kinds, fields = [], []
    for ffn in layout.ffns:
        kind = "experts" if ffn.experts is not None else "gated" if ffn.is_gated else "plain"
        kinds.append(f"{kind}{', fused' if ffn.fused else ''}{', convolution' if ffn.conv is not None else ''}")
        fields.append(ffn.width_field)
    return {
        "blocks": sorted(set(kinds)),
        "biases": sorted({f.has_bias for f in layout.ffns}),
        "width_fields": sorted({f for f in fields if f is not None}),
        "norms": sorted({key.rpartition(".")[2] for key in layout.norms}),
        "stacks": layout.sizes,
    }


def _distance(a: Any, b: Any) -> float:
    found = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(found) else found


def measure() -> dict[str, Any]:
    import torch
    import transformers

    from ticktune.versions import versions

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    started, rows = time.monotonic(), []
    for case in cases():
        rows.append(run(case))
        row = rows[-1]
        figures = f"{row['float64']['difference']:.0e} {row['float32']['difference']:.0e}" if "effect" in row else ""
        print(f"{row['case']:45} {row['merges']:25} {figures}", flush=True)
    merges = [r["merges"] for r in rows]
    return {
        "command": "python benchmarks/families.py",
        "versions": versions(),
        "hardware": f"{os.cpu_count()}-core {sweep.processor()}",
        "seconds": round(time.monotonic() - started),
        "counts": {word: merges.count(word) for word in sorted(set(merges))},
        "rows": rows,
    }


INTRO = """\
# Families

Which models ticktune works on, what is ticked, and what merges. Made by `python benchmarks/families.py` from
[families.json](../benchmarks/results/families.json) and [sweep.json](../benchmarks/results/sweep.json); nothing
here is written by hand. `ticktune inspect MODEL` says the same of your own model, and needs only its config.

The models are small and random: this proves the algebra and the path through stock `transformers`, not the quality
of anything trained. The differences are the largest of any output between base + adapter and the merged folder,
loaded again by the stock class; in real arithmetic they are zero. *effect* is what the ticks and norms change."""

TABLE = """\
## The table

A family with a row is found without tracing anything. *found by proof* says whether the detector finds the same
blocks without the row. Where nothing else is said, the ticks have the form of the family's own blocks."""

SWEEP = """\
## Families without a row

A model of another family is traced: its own class, built small and random from its config, runs once in float64, and
two projections count as a feed-forward block only if the input of the second *is* the activation of the output of
the first. So a family that was published this morning works, or is refused before training with the reason. All
types that `AutoModel` of transformers {transformers} knows, without the table:"""

MEANING = """\
*exact*: all floating outputs for one batch are equal, in float64 to 1e-12 and in float32 to 1e-5 of the largest, and
the stock class loads the folder without a remark. The batch is the first that runs, and the outputs say nothing of
blocks that it does not reach: experts that no token is sent to, and, of types with inner models (towers of images,
sound and text), towers that it holds nothing for, as it is text alone where that runs. Ticks of such blocks are
compared with the wider blocks value by value all the same. `ticktune export --merge` and `ticktune.merge` count the
ticks that the compared rows reach, and name the others. {count} of the exact types have no inner model."""

REFUSED = """\
### What was refused, and why

One line for each reason, shortened."""


def page(families: dict[str, Any], swept: dict[str, Any]) -> str:
    """docs/families.md."""
    parts = [INTRO, TABLE, _table(families["rows"])]
    versions = families["versions"]
    parts.append(
        f"transformers {versions['transformers']}, torch {versions['torch']}, {families['hardware']}; "
        f"{families['seconds']} s."
    )
    parts += [SWEEP.format(transformers=swept["versions"]["transformers"]), _counts(swept)]
    exact = {n: r for n, r in swept["types"].items() if r["status"] == "exact"}
    inner = sorted(n for n, r in exact.items() if any("." in field for field in r["width"]))
    own = sorted(exact.keys() - set(inner))
    parts.append(MEANING.format(count=len(own)))
    parts.append(f"Exact: {', '.join(f'`{name}`' for name in own)}.")
    parts.append(f"Exact, with inner models: {', '.join(f'`{name}`' for name in inner)}.")
    parts += [REFUSED, _reasons(swept)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| family | block | width field | merges | largest difference, fp64 | fp32 | effect | found by proof |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name, _, label = row["case"].partition(", ")
        block = "; ".join(row["blocks"]) + ("" if any(row["biases"]) else ", no biases")
        fields = ", ".join(f"`{f}`" for f in row["width_fields"]) or "none"
        figures = ["", "", ""]
        if "effect" in row:
            figures = [f"{row[d]['difference']:.0e}" for d in TOLERANCE] + [f"{row['effect']:.2g}"]
        merges = row["merges"] + (f": {row['reason']}" if "reason" in row else "")
        found = "yes" if row["detected"] else "no"
        cells = [f"`{name}`" + (f", {label}" if label else ""), block, fields, merges, *figures, found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _counts(swept: dict[str, Any]) -> str:
    rows = [f"| {status} | {count} |" for status, count in swept["counts"].items()]
    return "\n".join(["| outcome | model types |", "| --- | --- |", *rows])


def _reasons(swept: dict[str, Any]) -> str:
    grouped: dict[str, list[str]] = {}
    for name, result in swept["types"].items():
        if not result["status"].startswith("exact"):
            reason = " ".join(str(result.get("reason", "")).split()).replace("|", "/")
            grouped.setdefault(f"{result['status']}: {reason[:160]}", []).append(name)
    lines = [
        f"- {reason}{'' if reason.endswith('.') else '.'} ({', '.join(f'`{n}`' for n in names)})"
        for reason, names in sorted(grouped.items())
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sweep", action="store_true", help="leave the sweep as it is")
    parser.add_argument("--docs", action="store_true", help="write the page from the results that are there")
    options = parser.parse_args()
    if not options.docs:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
        if not options.no_sweep:
            subprocess.run([sys.executable, str(ROOT / "benchmarks" / "sweep.py")], check=True)
    PAGE.write_text(page(json.loads(RESULTS.read_text()), json.loads(sweep.RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
