"""What a recipe would do to its base, or what a base offers: tables, no weights loaded, nothing written."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ticktune.base import (
    load_config,
    locate_base,
    quiet_transformers,
    stored_bytes,
    stored_dtype,
    stored_quantization,
    without_weights,
)
from ticktune.console import Console
from ticktune.errors import PatchError
from ticktune.export.widen import merge_obstacle
from ticktune.patch.attach import (
    adapter_parameters,
    attach,
    attachment_of,
    choose_form,
    head_candidates,
    unquantized_modules,
)
from ticktune.patch.detect import find_layout
from ticktune.patch.layout import Layout
from ticktune.prepare import prepare
from ticktune.quantize import merge_obstacle as quantized_obstacle
from ticktune.quantize import saved_bytes
from ticktune.recipe.load import LoadedRecipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# A trained parameter, its gradient and AdamW's two averages, all float32.
_TRAINED_BYTES = 16


def inspect_recipe(loaded: LoadedRecipe, console: Console) -> None:
    """Prints what a recipe would train, and one example.

    Args:
        loaded: The recipe.
        console: Where to print.

    Raises:
        TicktuneError: Of the stage that found a problem.
    """
    quiet_transformers()
    prepared = prepare(loaded, console)
    recipe, task = loaded.recipe, prepared.task
    model = without_weights(prepared.base, task.auto_class, task.config())
    attach(
        model,
        recipe.ticks.dim,
        recipe.ticks.layers,
        recipe.norms.train,
        form=recipe.ticks.form,
        norm_layers=recipe.norms.layers,
        head=recipe.head.train,
    )
    record = attachment_of(model)
    obstacle = merge_obstacle(record.layout, record.plan)
    counts = Counter[str]()
    for _, role, parameter in adapter_parameters(model):
        counts[role] += parameter.numel()
    trained = sum(counts.values())
    base_count = sum(p.numel() for p in model.parameters()) - trained
    quantize, stored, width = recipe.base.quantize, stored_quantization(prepared.base), _BYTES[prepared.dtype]
    if stored is not None:
        obstacle = obstacle or quantized_obstacle(stored)
        held = stored_bytes(prepared.base)
    else:
        held = base_count * width - saved_bytes(model, unquantized_modules(model), quantize, width)
    memory = held + trained * _TRAINED_BYTES
    how = f", quantised: {stored or quantize}" if stored or quantize != "none" else ""
    example = prepared.examples["train"].take([0])[0]
    pieces = task.show(example)
    document = {
        "task": recipe.task,
        "base": prepared.base.name,
        "rows": {name: len(rows) for name, rows in prepared.rows.items()},
        "layout": _layout_facts(record.layout),
        "ticks": {"form": record.plan.form, "dim": record.plan.dim, "layers": record.plan.layers},
        "norms": record.plan.norms,
        "head": record.plan.head,
        "trained_parameters": dict(counts),
        "trained_share": trained / (trained + base_count),
        "merges": not obstacle,
        "merge_obstacle": obstacle,
        "memory_bytes": memory,
        "quantized": stored or (None if quantize == "none" else quantize),
        "compute": {"device": str(prepared.compute.device), "precision": prepared.compute.precision},
        "example": [{"kind": kind, "text": text} for kind, text in pieces],
    }
    rows = [["what", "value"], ["task", recipe.task], ["base", prepared.base.name]]
    rows += [["rows", ", ".join(f"{len(r):,} {name}" for name, r in prepared.rows.items())]]
    rows += _layout_rows(record.layout)
    layers = "; ".join(f"{stack} {_ranges(numbers)}" for stack, numbers in record.plan.layers.items() if numbers)
    rows += [
        ["ticks", f"{record.plan.form}, dim {record.plan.dim}, layers: {layers}" if layers else "none"],
        ["norms trained", _norm_text(record.plan.norms)],
        ["head trained", ", ".join(record.plan.head) or "none"],
        ["trained", ", ".join(f"{role} {n:,}" for role, n in counts.items())],
        [
            "share",
            f"{trained:,} of {trained + base_count:,} parameters ({100 * trained / (trained + base_count):.2f} %)",
        ],
        ["merges", f"no: {obstacle}" if obstacle else "yes, exactly"],
        ["device", f"{prepared.compute.device}, {prepared.compute.precision}, base held in {prepared.dtype}{how}"],
        ["memory", f"{memory / 1e6:.0f} MB for weights and optimizer; activations come on top"],
    ]
    rows += [[f"example: {kind}", _short(text)] for kind, text in pieces]
    console.result(document, rows, title=str(loaded.path))


def inspect_base(name: str, console: Console) -> None:
    """Prints what a base offers.

    Args:
        name: Hub id, directory or ``package:NAME``.
        console: Where to print.

    Raises:
        BaseModelError: It is not there, or has no known feed-forward blocks.
    """
    quiet_transformers()
    base = locate_base(name)
    architectures = getattr(load_config(base), "architectures", None) or [None]
    model = without_weights(base, "AutoModel" if architectures[0] is None else architectures[0], {})
    layout = find_layout(model)
    total = sum(p.numel() for p in model.parameters())
    stored = stored_quantization(base)
    forms = {}
    for form in ("plain", "gated"):
        found = _merges(layout, form)
        is_possible = stored is not None and not found.startswith("no:")
        forms[form] = f"train, but do not merge: {quantized_obstacle(str(stored))}" if is_possible else found
    document = {
        "base": name,
        "class": type(model).__name__,
        "parameters": total,
        "dtype": stored_dtype(base),
        "quantized": stored,
        "layout": _layout_facts(layout),
        "merges": forms,
        "head": head_candidates(model),
    }
    rows = [
        ["what", "value"],
        ["class", type(model).__name__],
        ["parameters", f"{total:,}, stored in {stored_dtype(base)}" + (f", quantised: {stored}" if stored else "")],
        *_layout_rows(layout),
        ["norms", _norm_text(list(layout.norms))],
        *[[f"{form} ticks", text] for form, text in forms.items()],
        ["head", ", ".join(head_candidates(model)) or "none"],
    ]
    console.result(document, rows, title=name)


def _merges(layout: Layout, form: str) -> str:
    from ticktune.patch.attach import Plan

    try:
        plan = Plan(choose_form(form, layout), 1, {}, [], [])
    except PatchError as error:
        return f"no: {error}"
    obstacle = merge_obstacle(layout, plan)
    return f"train, but do not merge: {obstacle}" if obstacle else "merge exactly"


def _layout_facts(layout: Layout) -> dict[str, Any]:
    return {
        stack: {
            "layers": layout.sizes[stack],
            "hidden_size": ffn.hidden_size,
            "width": ffn.width,
            "width_field": layout.stacks[stack].width,
            "gated": ffn.is_gated,
            "bias": ffn.has_bias,
            "activation": type(ffn.act).__name__,
        }
        for stack in layout.stacks
        for ffn in [next(f for f in layout.ffns if f.stack == stack)]
    }


def _layout_rows(layout: Layout) -> list[list[str]]:
    rows = []
    for stack, facts in _layout_facts(layout).items():
        kind = "gated" if facts["gated"] else "plain"
        bias = "with" if facts["bias"] else "without"
        rows.append(
            [
                stack,
                f"{facts['layers']} layers, hidden {facts['hidden_size']}, {kind} feed-forward of {facts['width']} "
                f"({facts['activation']}, {bias} bias; {facts['width_field']})",
            ]
        )
    return rows


def _norm_text(keys: Sequence[str]) -> str:
    counts = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return ", ".join(f"{count} {slot}" for slot, count in counts.items()) or "none"


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
