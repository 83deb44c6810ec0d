"""Finds where a model keeps its feed-forward blocks and norms: by the table, else by proof on a small model.

The model's own class is built from its config made small, random, in float64, and run once. What is proved there
(:mod:`ticktune.patch.proof`) becomes rows as the table has them, so a family that was published this morning is
found like any other; what does not hold numerically is refused.
"""

import itertools
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import PatchError, first_line
from ticktune.patch.fields import also_sized, bias_field, width_fields
from ticktune.patch.layout import (
    AS_LLAMA,
    FAMILIES,
    Body,
    Ffn,
    Layout,
    Names,
    Shape,
    Stack,
    add_stacks,
    find_bodies,
    llama_obstacle,
    projection_size,
)
from ticktune.patch.proof import (
    Block,
    Trace,
    common_parent,
    is_alternative,
    is_norm,
    is_projection,
    layer_of,
    prove_blocks,
    residual,
)
from ticktune.patch.shrink import example_inputs, layer_counts, small_models

_QUERY_OR_KEY = re.compile(r"(^|[._])(q|k|query|key)(_?(layer_?)?norm|_ln)", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)

_MOST_SECONDS = 15  # after which no other small model is tried

Families = Mapping[str, tuple[Stack, ...]]


def find_layout(model: nn.Module, *, families: Families = FAMILIES) -> Layout:
    """Finds a model's feed-forward blocks and norms: by the table, else by proof.

    Neither the model nor its config nor torch's random state is changed.

    Args:
        model: A transformers model, with or without head, perhaps on the meta device.
        families: The table; an empty one leaves everything to proof.

    Raises:
        PatchError: It has no feed-forward block that could be proved, and why.
    """
    bodies = find_bodies(model)
    layout = Layout(as_llama=bodies[0].model_type in AS_LLAMA and not llama_obstacle(bodies[0].config))
    reasons: dict[str, str] = {}
    for body in bodies:
        stacks = families.get(body.model_type)
        before = len(layout.ffns)
        if stacks is not None:
            add_stacks(layout, body, stacks)
            continue
        found = detect(body.model)
        if not found.stacks and body is not bodies[0]:
            found = _detect_inside(bodies[0], body) or found
        if not found.stacks:
            reasons[body.name] = f"{body.model_type}: {found.reason}"
            continue
        layout.notes.append(f"the feed-forward blocks of {body.model_type} were found by numerical proof")
        add_stacks(layout, body, found.stacks)
        _check_real(body, layout.ffns[before:])
    if not layout.ffns:
        raise _nothing_found(model, reasons.values())
    # The outermost model of several towers has no layers of its own, as a rule.
    layout.notes += [f"no ticks in the {name}: {reason}" for name, reason in reasons.items() if name]
    layout.notes += _other_norms(layout, bodies[0].module)
    _check_inner_fields(layout, model)
    return layout


def _check_inner_fields(layout: Layout, model: nn.Module) -> None:
    """Takes the width fields of inner models back that also size something of the outer one."""
    blocks = [*layout.ffns, *layout.aux]
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for field_name in sorted({f.width_field for f in blocks if f.width_field is not None and "." in f.width_field}):
        mine = [ffn for ffn in blocks if ffn.width_field == field_name]
        modules = [m for ffn in mine for m in (ffn.up, ffn.gate, ffn.down, ffn.conv) if m is not None]
        own = {name for module in modules for name in names[id(module)]}
        other = also_sized(model, field_name, own, {ffn.width for ffn in mine})
        if other is not None:
            for ffn in mine:
                ffn.width_field = None
                ffn.obstacle = f"{field_name} is also the size of {other}, which is no known feed-forward block"


def _other_norms(layout: Layout, body: nn.Module) -> list[str]:
    """Says which norms have no role, so that no recipe can train them: those of convolutions and the like."""
    known = {id(norm) for norm in layout.norms.values()}
    names = [name for name, module in body.named_modules() if is_norm(module) and id(module) not in known]
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"norms of no known role stay as they are: {', '.join(names[:2])}{more}"]


def _nothing_found(model: nn.Module, reasons: Iterable[str]) -> PatchError:
    counts = layer_counts(model.config)
    if counts and all(value < 1 for _, value in counts):
        found = ", ".join(f"{name} is {value}" for name, value in counts)
        return PatchError(
            f"this {type(model).__name__} has no layers, as {found} in its config",
            fix=f"correct {counts[0][0]} in its config.json",
        )
    reason = "; ".join(reasons) or f"this {type(model).__name__} has none of the layers of its family"
    return PatchError(
        f"no feed-forward block was found: {reason}",
        fix="choose another base; docs/families.md lists those that take ticks",
    )


@dataclass(frozen=True)
class Detected:
    """What a small model of a class showed.

    Args:
        stacks: Rows as the table has them; none where nothing was proved.
        reason: Why there are none.
    """

    stacks: tuple[Stack, ...] = ()
    reason: str = ""


def detect(model: nn.Module) -> Detected:
    """Finds the rows of a model by proof on a small one of the same class.

    Args:
        model: A transformers model; its weights are not touched.
    """
    return _safely(model, "")


def _detect_inside(outer: Body, body: Body) -> Detected | None:
    """Finds the rows of an inner model in a run of the outer one, which knows what inputs it wants."""
    path = next(name for name, module in outer.model.named_modules() if module is body.model)
    found = _safely(outer.model, path)
    return found if found.stacks else None


def _safely(model: nn.Module, path: str) -> Detected:
    config: Any = model.config
    with torch.random.fork_rng(devices=[]):
        try:
            return _detect(_Key(type(model), config.to_json_string(use_diff=False), path, config))
        except Exception as error:  # noqa: BLE001 - any class of any version may stand here, and the reason is reported
            return Detected(reason=f"its detection failed ({type(error).__name__}: {first_line(error)})")


@dataclass(frozen=True)
class _Key:
    """What detection depends on; ``path`` names the inner model that is asked for, if one is."""

    cls: type[nn.Module]
    entries: str
    path: str
    config: Any = field(compare=False, repr=False)


@lru_cache(maxsize=32)
def _detect(key: _Key) -> Detected:
    try:
        blocks, trace, small = _prove(key)
    except ValueError as error:
        return Detected(reason=f"a small model of its class cannot be built ({first_line(error)})")
    if key.path:
        prefix = f"{key.path}."
        blocks = [block.within(prefix) for block in blocks if block.up.startswith(prefix)]
        trace, small = trace.within(prefix), small.get_submodule(key.path)
    if not blocks:
        return Detected(reason=trace.reason)
    stacks = _Rows(small, blocks, trace).build()
    if not stacks:
        return Detected(reason="what looks like feed-forward blocks stands outside of any list of layers")
    return Detected(stacks)


def _prove(key: _Key) -> tuple[list[Block], Trace, nn.Module]:
    """The small model that shows most.

    Raises:
        ValueError: None can be built.
    """
    start = time.monotonic()
    found: tuple[list[Block], Trace, nn.Module] | None = None
    for small in small_models(key.cls, key.config):
        blocks, trace = prove_blocks(small)
        if found is None or len(blocks) > len(found[0]) or not trace.failed:
            found = blocks, trace, small
        # One that ran to its end shows all there is to see.
        if not trace.failed or time.monotonic() - start > _MOST_SECONDS:
            break
    assert found is not None  # or small_models would have raised
    return found


class _Rows:
    """Groups the proved blocks of a small model to rows of the table.

    Args:
        model: The small model.
        blocks: Its blocks in the order in which they ran; those of inner models are left to these.
        trace: What was seen.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], trace: Trace) -> None:
        self._model, self._trace = model, trace
        [body, *inner] = find_bodies(model)
        names = {id(module): f"{name}." if name else "" for name, module in trace.modules.items()}
        self._prefix = names[id(body.module)]
        inside = tuple(names[id(other.model)] for other in inner)
        self._blocks = [b for b in blocks if not b.up.startswith(inside)]
        widths = width_fields(model, blocks, trace)
        self._fields, self._obstacles = widths.fields, widths.obstacles
        self._bias = bias_field(model, self._blocks)
        self._is_alone = True  # whether there is one stack only, which then owns the norms around it

    def build(self) -> tuple[Stack, ...]:
        """The rows; none where no block lies in a list of layers."""
        groups: dict[str, list[tuple[Block, str]]] = {}
        aux: list[Block] = []
        for block in self._blocks:
            place = layer_of(block, self._trace.modules)
            if place is None or not place[0].startswith(self._prefix):
                aux.append(block)
            else:
                groups.setdefault(place[0], []).append((block, place[1]))
        self._is_alone = len(groups) == 1
        rows: list[Stack] = []
        for pattern, members in groups.items():
            row = self._row(pattern, members, aux)
            if row.name in [other.name for other in rows]:
                row = replace(row, name=_long_name(row.layers[0]))
            rows.append(row)
        return (*rows, *self._between(aux))

    def _between(self, aux: list[Block]) -> tuple[Stack, ...]:
        """Rows without layers: blocks between inner models that have the width of one of these."""
        driven: dict[str, list[tuple[str, Shape]]] = {}
        for block in aux:
            width = self._fields.get(block.down, "")
            if "." in width:
                owner = common_parent(block.names)
                shape = _shape(block, owner, "ffn")
                driven.setdefault(width, []).append((owner.removeprefix(self._prefix), shape))
        return tuple(Stack(f"beside_{w}", (), (), w, {}, aux=tuple(found)) for w, found in driven.items())

    def _row(self, pattern: str, members: list[tuple[Block, str]], aux: list[Block]) -> Stack:
        layers = sorted({layer for _, layer in members})
        width = next((w for block, _ in members if (w := self._fields.get(block.down)) is not None), None)
        embedding, final = self._outer_norms(layers)
        short = pattern.removeprefix(self._prefix)
        return Stack(
            _stack_name(short, self._model),
            (short,),
            self._shapes(members, width),
            width,
            self._norms(members, layers),
            bias=self._bias,
            embedding=embedding,
            final=final,
            aux=tuple(
                (owner.removeprefix(self._prefix), _shape(block, owner, "ffn"))
                for block in aux
                if width is not None and self._fields.get(block.down) == width
                for owner in [common_parent(block.names)]
            ),
            partial=len(layers) < self._count(pattern),
            obstacle=next((self._obstacles[b.down] for b, _ in members if b.down in self._obstacles), ""),
        )

    def _shapes(self, members: list[tuple[Block, str]], width: str | None) -> tuple[Shape, ...]:
        """Each different form of a block once."""
        found = [(block, layer, _shape(self._starred(block, layer), layer, "")) for block, layer in members]
        slots = _slots([(layer, shape) for _, layer, shape in found])
        shapes: dict[Shape, None] = {}
        for block, _, shape in found:
            own = self._fields.get(block.down, "")
            shapes[replace(shape, slot=slots[shape.up], width=None if own == (width or "") else own)] = None
        return tuple(shapes)

    def _starred(self, block: Block, layer: str) -> Block:
        """The block with a star for its place in a list of bare blocks of its layer."""
        parts = block.up.split(".")
        for at in range(layer.count(".") + 1, len(parts)):
            if is_alternative(block, self._trace.modules, at):
                return block.moved(".".join(parts[: at + 1]), ".".join([*parts[:at], "*"]))
        return block

    def _norms(self, members: list[tuple[Block, str]], layers: list[str]) -> dict[str, Names]:
        """Slot -> the names that its norm has in the layers; a name has one slot in all of them."""
        found = [
            _LayerNorms(layer, next(block for block, where in members if where == layer), self._trace).roles()
            for layer in layers
        ]
        slots: dict[str, str] = {}
        # The layers with most norms first: one that lacks the norm of its attention would call its only norm that.
        for roles in sorted(found, key=len, reverse=True):
            for slot, norm in roles.items():
                slots.setdefault(norm, slot)
        names: dict[str, Names] = {}
        for norm, slot in slots.items():
            names[slot] = (*names.get(slot, ()), norm)
        return names

    def _count(self, pattern: str) -> int:
        """How many layers the lists that a pattern means have."""
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\.\d+")
        return sum(expression.fullmatch(name) is not None for name in self._trace.modules)

    def _outer_norms(self, layers: list[str]) -> tuple[Names, Names]:
        """The norms before the first and after the last layer, where there is one of each."""
        times = self._trace.times
        first = min((times[n] for n in layers if n in times), default=None)
        last = max((self._trace.ends[n] for n in layers if n in self._trace.ends), default=None)
        if first is None or last is None:
            return (), ()
        depth = min(n.count(".") for n in layers) - self._prefix.count(".")
        outside = {
            name.removeprefix(self._prefix): time
            for name, time in times.items()
            if is_norm(self._trace.modules[name])
            and name.startswith(self._prefix)
            and not any(part.isdigit() for part in name.split("."))
            and name.removeprefix(self._prefix).count(".") <= max(1, depth)
        }
        own = layers[0].removeprefix(self._prefix).split(".")[0]
        near = {n: t for n, t in outside.items() if n.split(".")[0] == own}
        if not near and self._is_alone:
            near = outside
        early = tuple(n for n, t in near.items() if t < first)
        late = tuple(n for n, t in near.items() if t > last)
        late = tuple(n for n in late if not n.startswith("pooler.")) or late
        return early if len(early) == 1 else (), late[:1]


def _slots(members: list[tuple[str, Shape]]) -> dict[str, str]:
    """Name of ``up`` in a layer -> slot: one in all layers, and another than that of any block beside it.

    Args:
        members: Layer and shape of each block, in the order in which they ran.
    """
    layers: dict[str, dict[str, Shape]] = {}
    for layer, shape in members:
        layers.setdefault(layer, {})[shape.up] = shape
    slots: dict[str, str] = {}
    for shapes in layers.values():
        for up, shape in shapes.items():
            kind = "experts" if shape.experts or ("*" in up and "expert" in up) else "ffn"
            beside = {
                slots[name] for in_layer in layers.values() if up in in_layer for name in in_layer if name in slots
            }
            names = itertools.chain([kind], (f"{kind}{number}" for number in itertools.count(2)))
            slots.setdefault(up, next(name for name in names if name not in beside))
    return slots


def _shape(block: Block, layer: str, slot: str) -> Shape:
    own = block.within(f"{layer}." if layer else "")
    return Shape(
        own.up,
        own.down,
        own.act,
        gate=own.gate,
        fused=own.fused,
        dropout=own.dropout,
        experts=own.experts,
        slot=slot,
    )


def _stack_name(pattern: str, model: nn.Module) -> str:
    for word in ("encoder", "decoder"):
        if word in pattern:
            return word
    for word in ("vision", "visual", "text", "audio"):
        if word in pattern:
            return "vision" if word == "visual" else word
    from transformers.models.auto import modeling_auto as auto

    # Of the config alone: the name stands in an adapter's keys, and must not depend on the head's class.
    config: Any = model.config
    is_causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    is_decoder = getattr(config, "is_decoder", False) or (is_causal and not is_masked)
    return "decoder" if is_decoder else "encoder"


def _long_name(pattern: str) -> str:
    """The name of a second stack of one kind: where its layers stand."""
    parts = [part for part in pattern.split(".") if part != "*"]
    return "_".join(parts[:-1] or parts)


class _LayerNorms:
    """Tells by when they run what the norms of a layer are for; what fits no slot stays as it is.

    Args:
        layer: Name of the layer.
        block: Its first feed-forward block.
        trace: What was seen.
    """

    def __init__(self, layer: str, block: Block, trace: Trace) -> None:
        self._block, self._trace = block, trace
        self._prefix = f"{layer}."
        inside = sorted((t, n) for n, t in trace.times.items() if n.startswith(self._prefix))
        self._norms = [n for _, n in inside if n in trace.outputs and is_norm(trace.modules[n])]
        self._projections = [(t, n) for t, n in inside if is_projection(trace.modules[n])]
        self._is_named = any(_CROSS.search(self._leaf(norm)) for norm in self._norms)

    def roles(self) -> dict[str, str]:
        """Slot -> norm, by its name in the layer."""
        roles: dict[str, str] = {}
        before, after = [], []
        start, end = self._block.time
        for norm in self._norms:
            leaf = self._leaf(norm)
            if match := _QUERY_OR_KEY.search(leaf):
                roles.setdefault("q" if match[2].lower().startswith("q") else "k", leaf)
            elif _CROSS.search(leaf if self._is_named else self._reader(norm)):
                roles.setdefault("cross_attention", leaf)
            elif self._is_in_block(norm) or self._width(norm) != self._hidden():
                continue
            elif self._trace.times[norm] < start:
                before.append(leaf)
            elif self._trace.times[norm] > end:
                after.append(leaf)
        return roles | _around(before, after)

    def _leaf(self, norm: str) -> str:
        return norm.removeprefix(self._prefix)

    def _reader(self, norm: str) -> str:
        """The projection that runs next: where norms have no telling names, it says what they are for."""
        return next((self._leaf(n) for t, n in self._projections if t > self._trace.times[norm]), "")

    def _is_in_block(self, norm: str) -> bool:
        start, end = self._block.time
        return start < self._trace.times[norm] < end

    def _width(self, norm: str) -> int:
        return next(self._trace.modules[norm].parameters(recurse=False)).shape[-1]

    def _hidden(self) -> int:
        down = self._trace.modules[self._block.down]
        return int(down.get_parameter("down_proj").shape[1]) if self._block.experts else projection_size(down)[1]


def _around(before: list[str], after: list[str]) -> dict[str, str]:
    """Slots of the norms of the hidden size before and after the feed-forward block, in the order of their run."""
    roles: dict[str, str] = {}
    if before:
        roles["attention"] = before[0]
        if len(before) > 1:
            roles["ffn"] = before[-1]
            if after:
                roles["ffn_post"] = after[0]
        elif after:
            roles["ffn"] = after[0]
        if len(before) > 2:
            roles["attention_post"] = before[1]
    elif after:
        roles["ffn"] = after[-1]
        if len(after) > 1:
            roles["attention"] = after[0]
    return roles


def _check_real(body: Body, ffns: list[Ffn]) -> None:
    """Checks one block of the real model on random input: what was proved on the small one holds here too.

    Raises:
        PatchError: It does not.
    """
    ffn = next((f for f in ffns if f.experts is None), None)
    if ffn is None or ffn.device.type == "meta":
        return
    seen = _run_block(body, ffn)
    if "up" not in seen or "down" not in seen:
        return
    wide = seen["up"].float()
    if ffn.fused is not None:
        first, second = wide.chunk(2, dim=-1)
        gate, wide = (first, second) if ffn.fused == "gate first" else (second, first)
        expected = ffn.act(gate) * wide
    elif ffn.gate is not None:
        expected = ffn.act(seen["gate"].float()) * wide
    else:
        expected = ffn.act(wide)
    dtype = next(ffn.down.parameters()).dtype
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    if residual(expected, seen["down"].float()) > tolerance:
        raise PatchError(
            f"what was proved on a small {body.model_type} does not hold on this one: its first feed-forward block "
            "computes something else"
        )


def _run_block(body: Body, ffn: Ffn) -> dict[str, Tensor]:
    """What a block's projections show on random input, without dropout.

    The innermost module that holds the block runs on hidden states; where that is a whole layer, which wants more
    than these, the model runs on inputs of its own.
    """
    names = {id(module): name for name, module in body.model.named_modules()}
    owner = body.model.get_submodule(common_parent([names[id(ffn.up)], names[id(ffn.down)]]))
    seen: dict[str, Tensor] = {}
    watched = {"up": ffn.up, **({"gate": ffn.gate} if ffn.gate is not None else {})}
    handles = [
        module.register_forward_hook(lambda m, a, output, key=key: seen.__setitem__(key, output))
        for key, module in watched.items()
    ]
    handles.append(ffn.down.register_forward_pre_hook(lambda m, args: seen.__setitem__("down", args[0])))
    training = [module for module in body.model.modules() if module.training]
    x = torch.randn(1, 4, ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(ffn.device, next(ffn.down.parameters()).dtype)
    runs = [partial(owner, x), *(partial(body.model, **choice) for choice in example_inputs(body.model))]
    try:
        body.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for run in runs:
                seen.clear()
                with suppress(Exception):  # it may want other inputs; what ran before it failed counts all the same
                    run()
                if {"up", "down"} <= seen.keys():
                    break
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return seen
