"""What a recipe would do to its base, or what a base offers: tables, no weights loaded, nothing written."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ticktune.base import (
    BaseFiles,
    code_not_run,
    load_config,
    locate_config,
    named_class,
    quiet_transformers,
    stored_bytes,
    stored_dtype,
    stored_quantization,
    weight_files,
    without_weights,
)
from ticktune.console import Console, size_text
from ticktune.device import mix
from ticktune.export.widen import block_obstacle, merge_obstacle
from ticktune.files import save_picture
from ticktune.patch.attach import adapter_parameters, attach, attachment_of, head_candidates, unquantized_modules
from ticktune.patch.layout import Ffn, Layout
from ticktune.patch.routing import routing_obstacle
from ticktune.prepare import prepare
from ticktune.quantize import merge_obstacle as quantized_obstacle
from ticktune.quantize import saved_bytes
from ticktune.recipe.load import LoadedRecipe
from ticktune.recipe.schema import Recipe
from ticktune.ways import check_prefix_cache, check_unpadded, check_wide

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# A trained parameter, its gradient and AdamW's two averages, all float32.
_TRAINED_BYTES = 16


def inspect_recipe(loaded: LoadedRecipe, console: Console, *, draw: Path | None = None) -> None:
    """Prints what a recipe would train, and one example.

    Args:
        loaded: The recipe.
        console: Where to print.
        draw: A folder that receives the example as a picture, changed at random as in training (``data.augment``).

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
        dropout=recipe.ticks.dropout,
        norm_layers=recipe.norms.layers,
        head=recipe.head.train,
        experts=recipe.ticks.experts,
        unshare=recipe.ticks.unshare,
    )
    check_prefix_cache(loaded, model)
    check_wide(loaded, model)
    check_unpadded(loaded, model)
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
    drawing = None
    if draw is not None:
        picture = task.draw_example(example, seed=mix(recipe.training.seed, 0))
        drawing = draw / f"{Path(example['image']).stem[:100]}-1.png"
        save_picture(picture, drawing)
    document = {
        "recipe": recipe.model_dump(mode="json"),
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
        "drawing": None if drawing is None else str(drawing),
    }
    rows = [["what", "value"], ["task", recipe.task], ["base", prepared.base.name]]
    rows += [["recipe", "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in _given(recipe))]]
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
        ["memory", f"{size_text(memory)} for weights and optimizer; activations come on top"],
    ]
    rows += [[f"example: {kind}", _short(text)] for kind, text in pieces]
    rows += [] if drawing is None else [["example: picture", str(drawing)]]
    console.result(document, rows, title=str(loaded.path))


def inspect_base(name: str, console: Console, *, revision: str | None = None, dim: int = 64) -> None:
    """Prints what a base offers; its config is enough.

    Args:
        name: Hub id, directory or ``package:NAME``; or a directory with nothing but config.json.
        console: Where to print.
        revision: Hub commit, tag or branch.
        dim: Hidden units of the ticks that are counted.

    Raises:
        BaseModelError: It is not there.
        PatchError: It has no feed-forward block that could be proved.
    """
    quiet_transformers()
    base = locate_config(name, revision=revision)
    config = load_config(base)
    if own := code_not_run(base):
        console.note(own)
    named = named_class(base)
    model = without_weights(base, named or "AutoModel", {})
    total = sum(p.numel() for p in model.parameters())
    head = head_candidates(model)
    attach(model, dim, head=False)
    layout = attachment_of(model).layout
    counts = Counter[str]()
    for _, role, parameter in adapter_parameters(model):
        counts["norms" if role == "norm" else "ticks"] += parameter.numel()
    trained, dtype = sum(counts.values()), _held_dtype(base, config)
    memory = {"frozen": total * _BYTES[dtype], "trained": trained * _TRAINED_BYTES}
    routing = _routing(model, layout)
    blocks = _blocks(layout, routing)
    stored = stored_quantization(base)
    obstacles = _obstacles(layout) + ([quantized_obstacle(stored)] if stored else [])
    refused = dict.fromkeys(text for text in routing.values() if text)
    document = {
        "base": name,
        "class": type(model).__name__,
        "parameters": total,
        "dtype": dtype,
        "quantized": stored,
        "layout": _layout_facts(layout),
        "blocks": blocks,
        "norms": {stack: _norm_counts(layout, stack) for stack in layout.sizes},
        "notes": layout.notes,
        "obstacles": obstacles,
        "refused": [f"ticks.experts: block: {text}" for text in refused],
        "head": head,
        "dim": dim,
        "trained_parameters": dict(counts),
        "memory_bytes": memory,
    }
    rows = [
        ["what", "value"],
        ["class", _class_text(model, named)],
        ["parameters", f"{total:,}, held in {dtype}" + (f", quantised: {stored}" if stored else "")],
        *([["note", note] for note in layout.notes] or [["blocks found", "by the table of families"]]),
        [
            f"trained with dim {dim}",
            f"{trained:,} ({100 * trained / (trained + total):.2f} %): "
            + ", ".join(f"{role} {n:,}" for role, n in counts.items()),
        ],
        [
            "memory",
            f"{size_text(memory['frozen'])} for the frozen base, {size_text(memory['trained'])} for what is trained "
            "(weights, gradients, AdamW); activations come on top",
        ],
        ["task head", ", ".join(head) or "none"],
        *[["does not merge", text] for text in obstacles],
        *[["refused", f"ticks.experts: block, as {text}"] for text in refused],
    ]
    console.result(document, rows, name, [("feed-forward blocks", _block_rows(blocks)), ("norms", _norm_rows(layout))])


def _given(recipe: Recipe) -> list[tuple[str, Any]]:
    """Dotted key -> value of what a recipe says differently from the defaults, as it was read."""
    found: list[tuple[str, Any]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            found.append((prefix, value))

    walk("", recipe.model_dump(mode="json", exclude_defaults=True))
    return found


def _class_text(model: Any, named: str | None) -> str:
    own = type(model).__name__
    return own if named in (None, own) else f"{own}; {named}, which the config names, is no model of transformers"


def _held_dtype(base: BaseFiles, config: Any) -> str:
    """The dtype of the weights, or what the config says where there are none."""
    if any(file.is_file() for file in weight_files(base)):
        return stored_dtype(base)
    named = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return named if named in _BYTES else "float32"


def _kind(ffn: Ffn) -> tuple[Any, ...]:
    return (ffn.stack, ffn.slot.partition(".")[0], ffn.hidden_size, ffn.width, ffn.is_gated, ffn.count)


def _routing(model: Any, layout: Layout) -> dict[tuple[Any, ...], str]:
    """Kind of a block of experts -> why one tick beside them is refused, or an empty string."""
    kinds: dict[tuple[Any, ...], list[Ffn]] = {}
    for ffn in layout.ffns:
        if ffn.experts is not None:
            kinds.setdefault(_kind(ffn), []).append(ffn)
    return {kind: routing_obstacle(model, ffns) for kind, ffns in kinds.items()}


def _blocks(layout: Layout, routing: dict[tuple[Any, ...], str]) -> list[dict[str, Any]]:
    """One entry for each kind of block in each stack."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for ffn in layout.ffns:
        kind = _kind(ffn)
        entry = found.setdefault(
            kind,
            {
                "stack": ffn.stack,
                "layers": [],
                "hidden_size": ffn.hidden_size,
                "width": ffn.width,
                "experts": ffn.count if ffn.experts is not None else 0,
                "gated": ffn.is_gated,
                "activation": _activation_name(ffn),
                "bias": ffn.has_bias,
                "bias_field": ffn.bias_field,
                "width_field": ffn.width_field,
                "plain": _merges(ffn, "plain", layout),
                "gated_ticks": _merges(ffn, "gated", layout),
                "beside_experts": _beside(ffn, layout, routing.get(kind)),
            },
        )
        if ffn.slot.startswith("experts."):
            entry["experts"] = max(entry["experts"], 1 + int(ffn.slot.rpartition(".")[2]))
        if ffn.layer not in entry["layers"]:
            entry["layers"].append(ffn.layer)
    return list(found.values())


def _merges(ffn: Ffn, form: str, layout: Layout) -> str:
    """What ticks of a form do on a block; empty where there are none of that form."""
    is_refused = any(f.experts is not None and f.is_gated for f in layout.ffns)  # plain ones, on the whole model
    if (form == "gated") != ffn.is_gated and (form == "gated" or is_refused):
        return ""
    if block_obstacle(ffn, form, layout.as_llama):
        can_be_llama = ffn.width_field is not None and layout.as_llama
        return "merges with --as llama" if can_be_llama else "trains, does not merge"
    if form == "plain" and not ffn.has_bias and ffn.bias_field is not None:
        return f"merges, {ffn.bias_field} becomes true"
    return "merges"


def _beside(ffn: Ffn, layout: Layout, refused: str | None) -> str:
    """What one tick beside all experts does; empty where there are none."""
    if refused is None:
        return ""
    return "refused" if refused else _merges(ffn, "gated" if ffn.is_gated else "plain", layout)


def _obstacles(layout: Layout) -> list[str]:
    """Why some form of ticks does not merge, each reason once."""
    texts = [
        block_obstacle(ffn, form, layout.as_llama)
        for ffn in layout.ffns
        for form in ("plain", "gated")
        if _merges(ffn, form, layout)
    ]
    return [text for text in dict.fromkeys(texts) if text]


def _block_rows(blocks: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["stack", "layers", "block and its width field", "ticks"]]
    for entry in blocks:
        many = f"{entry['experts']} experts, " if entry["experts"] else ""
        kind = "gated" if entry["gated"] else "plain"
        bias = "" if entry["bias"] else ", no biases"
        forms = {"gated": entry["gated_ticks"], "plain": entry["plain"]}
        if entry["experts"]:
            forms = {"each": entry["gated_ticks"] or entry["plain"], "block": entry["beside_experts"]}
        rows.append(
            [
                entry["stack"],
                _ranges(entry["layers"]),
                f"{many}{entry['hidden_size']} -> {entry['width']}\n{kind} {entry['activation']}{bias}\n"
                + (entry["width_field"] or "fixed width"),
                "\n".join(f"{form}: {text}" for form, text in forms.items() if text),
            ]
        )
    return rows


def _norm_counts(layout: Layout, stack: str) -> dict[str, int]:
    keys = [key for key in layout.norms if key.split(".")[0] == stack]
    return dict(Counter(key.rsplit(".", 1)[-1] for key in keys))


def _norm_rows(layout: Layout) -> list[list[str]]:
    rows = [["stack", "number by role"]]
    for stack in layout.sizes:
        counts = _norm_counts(layout, stack)
        rows.append([stack, ", ".join(f"{count} {slot}" for slot, count in counts.items()) or "none"])
    return rows


def _activation_name(ffn: Ffn) -> str:
    name: str = getattr(ffn.act, "__name__", type(ffn.act).__name__)
    return name.removesuffix("Activation")


def _layout_facts(layout: Layout) -> dict[str, Any]:
    return {
        stack: {
            "layers": layout.sizes[stack],
            "hidden_size": ffn.hidden_size,
            "width": ffn.width,
            "width_field": ffn.width_field,
            "gated": ffn.is_gated,
            "bias": ffn.has_bias,
            "activation": _activation_name(ffn),
        }
        for stack in layout.stacks
        for ffn in [next(f for f in layout.ffns if f.stack == stack)]
    }


def _layout_rows(layout: Layout) -> list[list[str]]:
    rows = []
    for stack, facts in _layout_facts(layout).items():
        kind = "gated" if facts["gated"] else "plain"
        bias = "with" if facts["bias"] else "without"
        field = facts["width_field"] or "fixed by the architecture"
        rows.append(
            [
                stack,
                f"{facts['layers']} layers, hidden {facts['hidden_size']}, {kind} feed-forward of {facts['width']} "
                f"({facts['activation']}, {bias} bias; {field})",
            ]
        )
    return rows + [["note", note] for note in layout.notes]


def _norm_text(keys: Sequence[str]) -> str:
    counts = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return ", ".join(f"{count} {slot}" for slot, count in counts.items()) or "none"


def _ranges(numbers: Sequence[int]) -> str:
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
