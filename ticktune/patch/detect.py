"""Finds feed-forward blocks by numerical proof where the table has no row, and checks the table's rows.

The model's own class is built from its config made small, random, in float64, and run once. A pair of
projections is a feed-forward block when what goes into the second one *is* the activation of what came out of
the first: ``input(down) == act(out(up))``, or the gated or fused form of it. Names decide nothing, so a family
that was published this morning is found like any other; what does not hold numerically is refused.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import PatchError
from ticktune.patch.layout import (
    FAMILIES,
    Body,
    Ffn,
    Layout,
    Shape,
    Stack,
    add_stacks,
    config_of,
    find_bodies,
    is_conv1d,
    projection_size,
)
from ticktune.patch.shrink import build_small, example_inputs, shrink

# Candidates for an activation that the model has no module for; the best residual in float64 wins.
_ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "relu", "relu2", "mish", "tanh",
    "sigmoid", "linear",
)  # fmt: skip
_EXACT = 1e-6  # relative; a wrong activation is off by 1e-4 or more, a model that computes it in float32 by 1e-7
_NOT_TRAINED_SLOTS = re.compile(r"(^|[._])(q|k|query|key)(_?(layer_?)?norm|_ln)", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)


class DetectionError(PatchError):
    """No feed-forward block could be proved."""


def find_layout(model: nn.Module) -> Layout:
    """Finds a model's feed-forward blocks and norms: by the table, else by proof.

    Args:
        model: A transformers model, with or without head, perhaps on the meta device.

    Raises:
        PatchError: It has no feed-forward block that could be proved, and why.
    """
    bodies = find_bodies(model)
    layout = Layout(model_type=bodies[0].model_type)
    reasons: list[str] = []
    for body in bodies:
        stacks = FAMILIES.get(body.model_type)
        if stacks is None:
            try:
                stacks = detect_stacks(body.model)
            except DetectionError as error:
                reasons.append(f"{body.model_type}: {error}")
                continue
            layout.notes.append(f"the feed-forward blocks of {body.model_type} were found by numerical proof")
        before = len(layout.ffns)
        add_stacks(layout, body, stacks)
        if body.model_type not in FAMILIES:
            _check_real(body, layout.ffns[before:])
    if not layout.ffns:
        reason = "; ".join(reasons) or f"this {type(model).__name__} has none of the layers of its family"
        raise PatchError(
            f"no feed-forward block was found: {reason}",
            fix="the families that need no detection are in docs/families.md",
        )
    return layout


def detect_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Finds the rows of a model by proof on a small one of the same class.

    Args:
        model: A transformers model; its weights are not touched.

    Returns:
        Rows as the table has them.

    Raises:
        DetectionError: With the reason.
    """
    config: Any = model.config
    try:
        return _detect(_Key(type(model), config.to_json_string(use_diff=False), config))
    except DetectionError:
        raise
    except Exception as error:  # any class of any version may stand here, and the reason is reported
        raise DetectionError(f"its detection failed ({type(error).__name__}: {_first_line(error)})") from error


@dataclass(frozen=True)
class _Key:
    """What detection depends on."""

    cls: type[nn.Module]
    entries: str
    config: Any = field(compare=False, repr=False)


@lru_cache(maxsize=16)
def _detect(key: _Key) -> tuple[Stack, ...]:
    try:
        small = build_small(key.cls, shrink(key.config))
    except Exception as error:  # any class of any version may stand here, and the reason is reported
        raise DetectionError(f"a small model of its class cannot be built ({_first_line(error)})") from error
    blocks, trace = prove_blocks(small)
    if not blocks:
        raise DetectionError(trace.reason)
    return tuple(_stacks(small, blocks, trace))


@dataclass
class Block:
    """A proved feed-forward block of the small model.

    Args:
        up: Name of the projection in, or of the module of experts.
        down: Name of the projection out.
        act: Name of the activation's module from the model, or ``=name``.
        gate: Name of the gate's projection.
        fused: Which half of a fused ``up`` is the gate.
        dropout: Name of the dropout between the activation and ``down``.
        experts: Whether it is a block of experts.
        time: When ``up`` and ``down`` were called.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused: str | None = None
    dropout: str | None = None
    experts: bool = False
    time: tuple[int, int] = (0, 0)

    @property
    def names(self) -> list[str]:
        """The projections."""
        return [n for n in dict.fromkeys((self.gate, self.up, self.down)) if n is not None]


@dataclass
class Trace:
    """What one forward pass of the small model showed.

    Args:
        inputs: Module name -> what went in, the first time.
        outputs: Module name -> what came out, the first time.
        times: Module name -> when it was called first.
        ends: Module name -> when its first call ended.
        reason: Why nothing was proved.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def prove_blocks(model: nn.Module) -> tuple[list[Block], Trace]:
    """Runs a small model once and proves its feed-forward blocks.

    Args:
        model: From :func:`ticktune.patch.shrink.build_small`.

    Returns:
        The blocks in the order in which they ran, and what was seen.
    """
    trace = _run(model)
    names = dict(model.named_modules())
    blocks = [
        *_prove_experts(model),
        *(_prove_pairs(names, trace) if trace.inputs else ()),
    ]
    for block in blocks:
        block.time = (trace.times.get(block.up, 0), trace.ends.get(block.down, 0))
    blocks = sorted((b for b in blocks if not _is_look_alike(b, names)), key=lambda b: b.time)
    if not blocks and not trace.reason:
        trace.reason = "no pair of projections is down(act(up(x))) or its gated form, for any known activation"
    return blocks, trace


def _run(model: nn.Module) -> Trace:
    trace, clock = Trace(), iter(range(1 << 30))
    handles: list[Any] = []
    kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def keep(tensor: Any) -> Any:
        """A copy, as the model may go on to change the tensor; one only for each tensor and version."""
        if not isinstance(tensor, Tensor):
            return None
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version)
        if key not in kept:
            # The tensor itself is held too, or another one could come to lie at its address.
            kept[key] = (tensor.detach(), tensor.detach().clone())
        return kept[key][1]

    def watch(name: str, module: nn.Module, whole: bool) -> None:
        def before(m: Any, args: Any, kwargs: Any) -> None:
            if name not in trace.times:
                trace.times[name] = next(clock)
                if whole:
                    trace.inputs[name] = keep(args[0] if args else next(iter(kwargs.values()), None))

        def after(m: Any, args: Any, output: Any) -> None:
            if name not in trace.ends:
                trace.ends[name] = next(clock)
                if whole:
                    trace.outputs[name] = keep(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        if name:
            seen = (_is_projection, _is_norm, _is_act)
            watch(name, module, isinstance(module, nn.Dropout) or any(kind(module) for kind in seen))
    try:
        for arguments in example_inputs(model):
            for store in (trace.inputs, trace.outputs, trace.times, trace.ends):
                store.clear()
            kept.clear()
            try:
                with torch.no_grad():
                    model(**arguments)
            except Exception as error:  # noqa: BLE001 - see _detect
                # What ran before the failure counts all the same: a proof is local.
                trace.reason = f"a small model of its class does not run ({_first_line(error)})"
                continue
            trace.reason = ""
            break
        else:
            if not trace.reason:
                trace.reason = "no inputs are known for it"
    finally:
        for handle in handles:
            handle.remove()
    trace.inputs = {k: v for k, v in trace.inputs.items() if v is not None}
    trace.outputs = {k: v for k, v in trace.outputs.items() if v is not None}
    return trace


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_norm(module: nn.Module) -> bool:
    is_named = type(module).__name__.endswith("Norm") or isinstance(module, nn.LayerNorm)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        is_named
        and bool(names)
        and names <= {"weight", "bias"}
        and not isinstance(module, nn.GroupNorm | nn.BatchNorm2d)
    )


def _is_act(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return not list(module.children()) and any(
        word in name for word in ("gelu", "silu", "relu", "act", "mish", "tanh", "xielu", "swish")
    )


def _prove_pairs(names: dict[str, nn.Module], trace: Trace) -> Iterator[Block]:
    projections = [n for n in trace.inputs if n in trace.outputs and _is_projection(names[n])]
    by_parent: dict[str, list[str]] = {}
    for name in projections:
        for parent in _parents(name, 3):
            by_parent.setdefault(parent, []).append(name)
    for down in projections:
        inside = trace.inputs[down]
        if not inside.is_floating_point() or inside.numel() == 0 or not inside.any():
            continue
        found: list[tuple[float, Block]] = []
        near = dict.fromkeys(n for p in _parents(down, 3) for n in by_parent[p] if n != down)
        before = [n for n in near if trace.times[n] < trace.times[down]]
        for up in before:
            found += _tries(up, before, down, names, trace)
        if found:
            best = min(found, key=lambda pair: pair[0])
            if best[0] < _EXACT:
                best[1].dropout = _dropout_before(down, names, trace)
                yield best[1]


def _tries(
    up: str, before: list[str], down: str, names: dict[str, nn.Module], trace: Trace
) -> Iterator[tuple[float, Block]]:
    inside, wide = trace.inputs[down], trace.outputs[up]
    outer = projection_size(names[down])[1]
    if projection_size(names[up])[0] != outer or wide.shape[:-1] != inside.shape[:-1]:
        return
    width = inside.shape[-1]
    if wide.shape[-1] == width:
        for act, function in _candidates(up, down, names):
            value = _apply(function, wide)
            if value is None or act == "=linear":
                continue
            yield _residual(value, inside), Block(up, down, act)
        for gate in before:
            other = trace.outputs[gate]
            if gate == up or other.shape != wide.shape or not torch.equal(trace.inputs[gate], trace.inputs[up]):
                continue
            for act, function in _candidates(gate, down, names):
                value = _apply(function, other)
                if value is not None:
                    yield _residual(value * wide, inside), Block(up, down, act, gate=gate)
    elif wide.shape[-1] == 2 * width:
        first, second = wide.chunk(2, dim=-1)
        for act, function in _candidates(up, down, names):
            for which, (gate_half, up_half) in (("gate first", (first, second)), ("up first", (second, first))):
                value = _apply(function, gate_half)
                if value is not None:
                    yield _residual(value * up_half, inside), Block(up, down, act, fused=which)


def _candidates(up: str, down: str, names: dict[str, nn.Module]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    from transformers.activations import ACT2FN

    for parent in dict.fromkeys([*_parents(up, 2), *_parents(down, 2)]):
        for child, module in vars(names[parent]).get("_modules", {}).items():
            if module is not None and _is_act(module):
                yield f"{parent}.{child}" if parent else child, module
        for attribute, value in vars(names[parent]).items():
            if (
                not attribute.startswith("_")
                and callable(value)
                and not isinstance(value, nn.Module | type)
                and "act" in attribute
            ):
                yield f"{parent}.{attribute}" if parent else attribute, value
    for name in _ACTIVATIONS:
        yield f"={name}", ACT2FN[name]


def _apply(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            value = function(x.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # an activation of two arguments, or no activation
    return value if isinstance(value, Tensor) and value.shape == x.shape else None


def _residual(a: Tensor, b: Tensor) -> float:
    scale = float(b.double().abs().max())
    found = float((a.double() - b.double()).abs().max()) / max(scale, 1e-300)
    return found if found == found else float("inf")


def _dropout_before(down: str, names: dict[str, nn.Module], trace: Trace) -> str | None:
    inside = trace.inputs[down]
    for parent in _parents(down, 2):
        for child, module in names[parent].named_children():
            name = f"{parent}.{child}" if parent else child
            seen = trace.outputs.get(name)
            if (
                isinstance(module, nn.Dropout)
                and seen is not None
                and seen.shape == inside.shape
                and torch.equal(seen, inside)
            ):
                return name
        if isinstance(getattr(names[parent], "activation_dropout", None), float):
            return f"{parent}.activation_dropout" if parent else "activation_dropout"
    return None


def _prove_experts(model: nn.Module) -> Iterator[Block]:
    from transformers.activations import ACT2FN

    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        first = own.get("gate_up_proj", own.get("up_proj"))
        down = own.get("down_proj")
        if first is None or down is None or first.ndim != 3 or down.ndim != 3 or len(own) != 2:
            continue
        count, hidden, width = down.shape
        gated = "gate_up_proj" in own
        if first.shape != (count, width * (2 if gated else 1), hidden):
            continue
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, hidden, generator=generator, dtype=first.dtype)
        expert = count - 1
        index, weights = torch.full((5, 1), expert), torch.full((5, 1), 0.5, dtype=first.dtype)
        try:
            with torch.no_grad():
                output = module(x, index, weights)
        except Exception:  # noqa: BLE001 - experts with another signature are none that we know
            continue
        wide = x @ first[expert].T
        acts: list[tuple[str, Any]] = [(f"{name}.{child}", m) for child, m in module.named_children() if _is_act(m)] + [
            (f"={a}", ACT2FN[a]) for a in _ACTIVATIONS
        ]
        for act, function in acts:
            if gated:
                gate, up = wide.chunk(2, dim=-1)
                value = _apply(function, gate)
                hidden_units = None if value is None else value * up
            else:
                hidden_units = _apply(function, wide)
            if hidden_units is not None and _residual(0.5 * hidden_units @ down[expert].T, output) < _EXACT:
                yield Block(name, name, act, experts=True)
                break


def _is_look_alike(block: Block, names: dict[str, nn.Module]) -> bool:
    """Poolers, box heads and other pairs of projections that are no feed-forward block of a layer."""
    if block.experts:
        return not any(part.isdigit() for part in block.up.split("."))
    common = _common_parent(block.names)
    return (
        isinstance(names[common], nn.ModuleList | nn.Sequential)
        and not any(c.isalpha() for c in block.up.rsplit(".", 1)[-1])
        and _layer_of(block, names) is None
    )


def _layer_of(block: Block, names: dict[str, nn.Module]) -> tuple[str, str] | None:
    """(name of the module list, with stars; name of the layer) that a block lies in, or None.

    The innermost list whose items are of one class; where there is none, the outermost.
    """
    common = _common_parent(block.names) if not block.experts else block.up
    parts = common.split(".")
    places = [
        i
        for i, part in enumerate(parts)
        if part.isdigit() and isinstance(names[".".join(parts[:i])], nn.ModuleList | nn.Sequential)
    ]
    if not places:
        return None

    def is_even(i: int) -> bool:
        items = list(names[".".join(parts[:i])].children())
        return len({type(item) for item in items}) == 1

    even = [i for i in places if is_even(i)]
    at = even[-1] if even else places[0]
    pattern = ".".join("*" if i < at and i in places else part for i, part in enumerate(parts[:at]))
    return pattern, ".".join(parts[: at + 1])


def _common_parent(paths: list[str]) -> str:
    split = [path.split(".")[:-1] for path in paths]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _parents(name: str, count: int) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: len(parts) - i]) for i in range(min(count, len(parts) + 1))]


def _stacks(model: nn.Module, blocks: list[Block], trace: Trace) -> Iterator[Stack]:
    """Groups proved blocks to rows."""
    names = dict(model.named_modules())
    [body, *inner] = find_bodies(model)
    prefix = next(f"{n}." if n else "" for n, m in names.items() if m is body.module)
    inside = [n for n, m in names.items() if any(m is other.model for other in inner)]
    groups: dict[str, list[tuple[Block, str]]] = {}
    aux: list[Block] = []
    for block in blocks:
        if any(block.up.startswith(f"{n}.") for n in inside):
            continue
        place = _layer_of(block, names)
        if place is None or not place[0].startswith(prefix):
            aux.append(block)
        else:
            groups.setdefault(place[0], []).append((block, place[1]))
    if not groups:
        raise DetectionError("what looks like feed-forward blocks stands outside of any list of layers")
    driven = _fields(model, blocks)
    bias = _bias_field(model, blocks)
    used: set[str] = set()
    for pattern, members in groups.items():
        yield _stack(model, pattern, prefix, members, aux, driven, bias, trace, names, used)


def _stack(
    model: nn.Module,
    pattern: str,
    prefix: str,
    members: list[tuple[Block, str]],
    aux: list[Block],
    driven: dict[str, str],
    bias: str | None,
    trace: Trace,
    names: dict[str, nn.Module],
    used: set[str],
) -> Stack:
    shapes: dict[Shape, None] = {}
    ordinal: dict[str, int] = {}
    widths = [driven.get(block.down) for block, _ in members]
    main = next((w for w in widths if w is not None), None)
    for block, layer in members:
        slot = "experts" if block.experts else "ffn"
        if not block.experts:
            ordinal[layer] = ordinal.get(layer, 0) + 1
            slot += str(ordinal[layer]) if ordinal[layer] > 1 else ""
        shape = _shape(block, layer, slot)
        field_name = driven.get(block.down)
        shapes[replace(shape, width=None if field_name == main else field_name)] = None
    layers = {layer for _, layer in members}
    roles: dict[str, list[str]] = {}
    for layer in sorted(layers):
        first = next(block for block, where in members if where == layer)
        for slot, norm in _norm_roles(layer, first, trace, names).items():
            found = roles.setdefault(slot, [])
            if norm not in found:
                found.append(norm)
    whole = [n for n in _matches(pattern, names) if n]
    name = _stack_name(pattern.removeprefix(prefix), model)
    while name in used:
        name += "_"
    used.add(name)
    embedding, final = _outer_norms(prefix, layers, trace, names)
    return Stack(
        name,
        (pattern.removeprefix(prefix),),
        tuple(shapes),
        main,
        {slot: tuple(found) for slot, found in roles.items()},
        bias=bias,
        embedding=embedding,
        final=final,
        aux=tuple(
            (owner.removeprefix(prefix), _shape(block, owner, "ffn"))
            for block in aux
            if driven.get(block.down) == main and main is not None
            for owner in [_common_parent(block.names)]
        ),
        partial=len(layers) < len(whole),
    )


def _shape(block: Block, layer: str, slot: str) -> Shape:
    def relative(name: str | None) -> str | None:
        return name if name is None or name.startswith("=") else name.removeprefix(f"{layer}.") if layer else name

    fused: Any = block.fused
    return Shape(
        str(relative(block.up)),
        str(relative(block.down)),
        str(relative(block.act)),
        gate=relative(block.gate),
        fused=fused,
        dropout=relative(block.dropout),
        experts=block.experts,
        slot=slot,
    )


def _matches(pattern: str, names: dict[str, nn.Module]) -> list[str]:
    """Names of the layers of every list that a pattern means."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\.\d+")
    return [name for name in names if expression.fullmatch(name)]


def _stack_name(pattern: str, model: nn.Module) -> str:
    for word in ("encoder", "decoder"):
        if word in pattern:
            return word
    for word in ("vision", "visual", "text", "audio"):
        if word in pattern:
            return "vision" if word == "visual" else word
    is_decoder = (
        getattr(model.config, "is_decoder", False) or hasattr(model, "generate") or "CausalLM" in type(model).__name__
    )
    has_cache = getattr(model.config, "use_cache", None) is True
    return "decoder" if is_decoder or has_cache else "encoder"


def _norm_roles(layer: str, block: Block, trace: Trace, names: dict[str, nn.Module]) -> dict[str, str]:
    """Slot -> norm, relative to its layer, by when the norms run; what fits no slot stays as it is."""
    inside = [n for n in trace.times if n.startswith(f"{layer}.") and _is_norm(names[n]) and n in trace.outputs]
    inside.sort(key=lambda n: trace.times[n])
    roles: dict[str, str] = {}
    before, after = [], []
    start, end = block.time
    projections = sorted(
        (t, n) for n, t in trace.times.items() if n.startswith(f"{layer}.") and _is_projection(names[n])
    )
    is_named = any(_CROSS.search(norm.removeprefix(layer)) for norm in inside)
    for norm in inside:
        leaf = norm.removeprefix(f"{layer}.")
        reader = next((n.removeprefix(layer) for t, n in projections if t > trace.times[norm]), "")
        match = _NOT_TRAINED_SLOTS.search(leaf)
        if match:
            roles.setdefault("q" if match[2].lower().startswith("q") else "k", leaf)
        elif _CROSS.search(leaf if is_named else reader):
            roles.setdefault("cross_attention", leaf)
        elif (
            block.names[0].startswith(f"{norm.rsplit('.', 1)[0]}.")
            and norm.count(".") > layer.count(".") + 1
            and trace.times[norm] > start
        ):
            continue  # inside the block itself
        elif trace.times[norm] < start:
            if _width_of(names[norm]) == _hidden(block, names):
                before.append(leaf)
        elif trace.times[norm] > end and _width_of(names[norm]) == _hidden(block, names):
            after.append(leaf)
    if len(before) == 1:
        roles["attention"] = before[0]
        if after:
            roles["ffn"] = after[0]
    elif before:
        roles["attention"], roles["ffn"] = before[0], before[-1]
        if len(before) > 2:
            roles["attention_post"] = before[1]
        if after:
            roles["ffn_post"] = after[0]
    elif after:
        roles["ffn"] = after[-1]
        if len(after) > 1:
            roles["attention"] = after[0]
    return roles


def _outer_norms(
    prefix: str, layers: set[str], trace: Trace, names: dict[str, nn.Module]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The norms before the first and after the last layer, where there is one of each."""
    first = min((trace.times[n] for n in layers if n in trace.times), default=None)
    last = max((trace.ends[n] for n in layers if n in trace.ends), default=None)
    if first is None or last is None:
        return (), ()
    depth = min(n.count(".") for n in layers) - prefix.count(".")
    outside = [
        n for n in trace.times
        if _is_norm(names[n]) and n.startswith(prefix) and not any(part.isdigit() for part in n.split("."))
        and n.removeprefix(prefix).count(".") <= max(1, depth)
    ]  # fmt: skip
    own = next(iter(layers)).removeprefix(prefix).split(".")[0]
    near = [n for n in outside if n.removeprefix(prefix).split(".")[0] == own] or outside
    early = [n.removeprefix(prefix) for n in near if trace.times[n] < first]
    late = [n.removeprefix(prefix) for n in near if trace.times[n] > last]
    return tuple(early[-1:]) if len(early) == 1 else (), tuple(late[:1])


def _width_of(norm: nn.Module) -> int:
    return next(norm.parameters(recurse=False)).shape[-1]


def _hidden(block: Block, names: dict[str, nn.Module]) -> int:
    if block.experts:
        return int(names[block.down].get_parameter("down_proj").shape[1])
    return projection_size(names[block.down])[1]


# Config fields


def _fields(model: nn.Module, blocks: list[Block]) -> dict[str, str]:
    """Name of ``down`` -> the config field that drives the width of its block, and nothing else."""
    config, reference = model.config, shapes_of(type(model), model.config)
    owners: dict[str, str] = {}
    for block in blocks:
        for name in block.names:
            for parameter, _ in dict(model.named_modules())[name].named_parameters(recurse=False):
                owners[f"{name}.{parameter}"] = block.down
    found: dict[str, str] = {}
    for path, value in _leaves(config):
        for larger in _larger(value, blocks, model):
            shapes = _shapes_with(model, path, larger)
            if shapes is None or shapes.keys() != reference.keys():
                continue
            changed = {n for n in shapes if shapes[n] != reference[n]}
            downs = {owners[n] for n in changed if n in owners}
            if not changed or not changed <= owners.keys():
                continue
            if any(
                reference[n][0] != shapes[n][0] and n.startswith(f"{d}.") and len(shapes[n]) == 1
                for n in changed
                for d in downs
                if owners[n] == d and n.startswith(f"{d}.bias")
            ):
                continue  # the outer size changed, not the width
            for down in downs:
                found.setdefault(down, path)
            break
    return found


def _bias_field(model: nn.Module, blocks: list[Block]) -> str | None:
    """The config switch that gives the blocks' projections biases, and adds nothing but biases."""
    modules = dict(model.named_modules())
    plain = [b for b in blocks if not b.experts]
    if not plain or all(getattr(modules[b.up], "bias", None) is not None for b in plain):
        return None
    reference = shapes_of(type(model), model.config)
    best: tuple[int, str] | None = None
    for path, value in _leaves(model.config):
        if value is not False:
            continue
        shapes = _shapes_with(model, path, True)
        if shapes is None or not reference.keys() < shapes.keys():
            continue
        new = shapes.keys() - reference.keys()
        is_bias = all(n.endswith(".bias") and n.rpartition(".")[0] in modules for n in new)
        if is_bias and all(f"{n}.bias" in new for b in plain for n in b.names if n != b.down):
            best = min(best or (1 << 30, ""), (len(new), path))
    return best[1] if best else None


def shapes_of(cls: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model of a config has; on the meta device, so without memory."""
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shapes_with(model: nn.Module, path: str, value: Any) -> dict[str, tuple[int, ...]] | None:
    config = copy.deepcopy(model.config)
    try:
        owner, name = config_of(config, path)
        setattr(owner, name, value)
        return shapes_of(type(model), config)
    except Exception:  # noqa: BLE001 - this value is not one that the model takes
        return None


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            continue  # a body of its own
        yield prefix + name, value


def _larger(value: Any, blocks: list[Block], model: nn.Module) -> Iterator[Any]:
    """Larger values of the same type to try in place of one."""
    if isinstance(value, bool) or isinstance(value, str):
        return
    if value is None:
        modules = dict(model.named_modules())
        for width in {projection_size(modules[b.down])[0] for b in blocks if not b.experts}:
            yield width + 8
    elif isinstance(value, int) and value > 0:
        yield value + 8
        yield value + 1
    elif isinstance(value, float):
        yield value + 1.0
    elif (
        isinstance(value, list | tuple) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        yield type(value)(v + 8 for v in value)
        yield type(value)(v + 1 for v in value)
    elif isinstance(value, list | tuple) and value and all(isinstance(v, float) for v in value):
        yield type(value)(v + 1.0 for v in value)


def _check_real(body: Body, ffns: list[Ffn]) -> None:
    """Checks one block of the real model on random input: what was proved on the small one holds here too."""
    ffn = next((f for f in ffns if f.experts is None), None)
    if ffn is None or ffn.device.type == "meta":
        return
    names = {id(module): name for name, module in body.model.named_modules()}
    parent = _common_parent([names[id(ffn.up)], names[id(ffn.down)]])
    owner = body.model.get_submodule(parent)
    seen: dict[str, Tensor] = {}
    handles = [
        ffn.up.register_forward_hook(lambda m, a, o: seen.__setitem__("up", o)),
        ffn.down.register_forward_pre_hook(lambda m, a: seen.__setitem__("down", a[0])),
    ]
    if ffn.gate is not None:
        handles.append(ffn.gate.register_forward_hook(lambda m, a, o: seen.__setitem__("gate", o)))
    dtype = next(ffn.down.parameters()).dtype
    x = torch.randn(1, 4, ffn.hidden_size, generator=torch.Generator().manual_seed(0)).to(ffn.device, dtype)
    try:
        with torch.no_grad():
            owner(x)
    except Exception:  # noqa: BLE001 - a block without a module of its own: its layer wants more than hidden states
        seen.clear()
    finally:
        for handle in handles:
            handle.remove()
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
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    if _residual(expected, seen["down"].float()) > tolerance:
        raise DetectionError("what was proved on a small model of its class does not hold on this one")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
