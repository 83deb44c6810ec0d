"""Ticks -> a wider feed-forward block: merging is concatenation, and the result is a stock model.

    FFN(x) + P σ(Qx + r) = [W2 P] σ([W1; Q] x + [b1; r]) + b2

No base weight changes, because nothing is added into one. How wide each block becomes is read off a model of the
new config, built on the meta device: so one rule serves fields that count units and fields that are ratios.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import ExportError
from ticktune.patch.attach import Plan, form_of, has_tick
from ticktune.patch.detect import find_layout
from ticktune.patch.fields import shapes_of
from ticktune.patch.layout import Ffn, Layout, config_of, is_conv1d, projection_size, unshare_layers

# Grouped matrix products of experts need strides of 16 bytes: 8 numbers of 2 bytes (transformers issue 48644).
_EXPERTS_MULTIPLE = 8
_ATTEMPTS = 300
# CTranslate2 4.8 converts these only where the config says how positions are embedded. transformers 4 wrote it,
# transformers 5 knows no other way and dropped it.
_ABSOLUTE_POSITIONS = ("bert", "roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class Widening:
    """What merging did to the blocks that one config field drives.

    Args:
        field: The field, dotted from the model's config.
        value: Its new value.
        before: The blocks' widths before, each different one once.
        after: The same after.
        units: Units of a tick.
        padding: Zero units of the block that got most, to reach a multiple or because it has no tick.
        cost_percent: How much more the blocks compute.
    """

    field: str
    value: Any
    before: list[int]
    after: list[int]
    units: int
    padding: int
    cost_percent: float

    def text(self) -> str:
        """For a person."""
        change = ", ".join(f"{a:,} -> {b:,}" for a, b in zip(self.before, self.after, strict=True))
        zeros = f", up to {self.padding:,} of them zero units" if self.padding else ""
        return f"{change} (+{self.cost_percent:.2f} % feed-forward compute{zeros})"


def merge_obstacle(layout: Layout, plan: Plan) -> str:
    """Returns why a plan cannot be merged into this architecture, or an empty string.

    Args:
        layout: The model's feed-forward blocks.
        plan: What is attached.
    """
    ticked = (ffn for ffn in layout.ffns if has_tick(plan, ffn))
    return next((text for ffn in ticked if (text := block_obstacle(ffn, form_of(plan, ffn), layout.as_llama))), "")


def block_obstacle(ffn: Ffn, form: str, as_llama: bool) -> str:
    """Returns why a tick of a form cannot be merged into a block, and the way out, or an empty string."""
    if ffn.width_field is None and ffn.obstacle:
        return f"no config field widens only the feed-forward blocks of the {ffn.stack}: {ffn.obstacle}"
    if ffn.width_field is None:
        return (
            f"the architecture fixes the width of its feed-forward blocks ({ffn.stack}: {ffn.width} beside "
            f"{ffn.hidden_size} hidden units), so no stock config can describe the wider ones"
        )
    if form == "plain" and ffn.is_gated and not ffn.has_bias and ffn.bias_field is None:
        way_out = (
            "as a Llama it can hold them (export --merge --as llama), and gated ticks merge as they are"
            if as_llama
            else "gated ticks merge (ticks.form: auto)"
        )
        return (
            "plain ticks on gated feed-forward blocks need biases (r at the gate, 1 at up), "
            f"and this architecture has none; {way_out}"
        )
    return ""


def widen(
    model: nn.Module,
    plan: Plan,
    tensors: dict[str, Tensor],
    *,
    pad_to: int | str = "auto",
    layout: Layout | None = None,
) -> list[Widening]:
    """Builds an adapter into a stock model, in place.

    All blocks that share a config field of width grow together; blocks without a tick get zero units. The
    arithmetic is the model's: use float32 or wider.

    Args:
        model: The stock base under the adapter's model class, without ticks.
        plan: What the adapter holds.
        tensors: Its tensors.
        pad_to: Multiple that the new width is rounded up to with zero units: a number, ``none``, or ``auto``:
            what divides the width before, 64 at most. Experts always get a multiple of 8, as their kernels need.
        layout: Where the model's blocks and norms are; None: they are found here.

    Returns:
        What changed, for each config field of width.

    Raises:
        ExportError: The architecture has no place for it.
    """
    check_pad_to(pad_to)
    if plan.unshare:
        unshare_layers(model)
    layout = layout or find_layout(model)
    obstacle = merge_obstacle(layout, plan)
    if obstacle:
        raise ExportError(f"this adapter cannot be merged: {obstacle}")
    fields = {ffn.width_field for ffn in layout.ffns if has_tick(plan, ffn)}
    blocks = [ffn for ffn in (*layout.ffns, *layout.aux) if ffn.width_field in fields]
    promoted = {
        ffn.bias_field
        for ffn in blocks
        if has_tick(plan, ffn) and form_of(plan, ffn) == "plain" and not ffn.has_bias and ffn.bias_field is not None
    }
    found: list[Widening] = []
    if blocks:
        before = {id(ffn): ffn.width for ffn in blocks}
        config, shapes, after = _grow(model, blocks, plan.dim, pad_to, promoted)
        with torch.no_grad():
            if promoted:
                _add_biases(model, shapes)
            for ffn in blocks:
                _widen_block(ffn, after[id(ffn)], plan, tensors)
        for ffn in layout.ffns:
            if has_tick(plan, ffn):
                _refuse_lost_units(ffn, before[id(ffn)], plan, tensors)
        for name in sorted(f for f in (*fields, *promoted) if f is not None):
            value = getattr(*config_of(config, name))
            owner, leaf = config_of(model.config, name)
            setattr(owner, leaf, value)
            if name in fields:
                found.append(_widening(name, value, [f for f in blocks if f.width_field == name], before, plan))
        _refuse_other_shapes(model, shapes)
    with torch.no_grad():
        for key in plan.norms:
            for name, parameter in layout.norms[key].named_parameters(recurse=False):
                parameter.copy_(tensors[f"{key}.{name}"])
    put_head(model, plan, tensors)
    _write_for_other_readers(model.config)
    return found


def check_pad_to(pad_to: Any) -> None:
    """Refuses what is no multiple to round widths up to.

    Raises:
        ExportError: It is none.
    """
    is_number = isinstance(pad_to, int) and not isinstance(pad_to, bool)
    is_digits = isinstance(pad_to, str) and pad_to.isdecimal()
    if pad_to not in ("auto", "none") and not ((is_number or is_digits) and int(pad_to) >= 1):
        raise ExportError(f"pad_to is {pad_to!r}, expected auto, none or a whole number of at least 1")


def put_head(model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Gives a stock model the adapter's head."""
    with torch.no_grad():
        for name in plan.head:
            model.get_parameter(name).copy_(tensors[f"head.{name}"])


def _write_for_other_readers(config: Any) -> None:
    """Writes config entries that other tools ask for and transformers 5 neither writes nor reads.

    An entry that the base has is left: it says what the base's author meant.
    """
    if config.model_type in _ABSOLUTE_POSITIONS and not hasattr(config, "position_embedding_type"):
        config.position_embedding_type = "absolute"
    if config.model_type == "phi":
        config.n_inner = config.intermediate_size


def _widening(field: str, value: Any, blocks: Sequence[Ffn], before: dict[int, int], plan: Plan) -> Widening:
    pairs = sorted({(before[id(f)], f.width) for f in blocks})
    old = sum(before[id(f)] * f.hidden_size for f in blocks)
    new = sum(f.width * f.hidden_size for f in blocks)
    padding = max(f.width - before[id(f)] - (plan.dim if has_tick(plan, f) else 0) for f in blocks)
    return Widening(
        field, value, [a for a, _ in pairs], [b for _, b in pairs], plan.dim, padding, 100 * (new - old) / old
    )


def _grow(
    model: nn.Module, blocks: Sequence[Ffn], units: int, pad_to: int | str, promoted: set[str]
) -> tuple[Any, dict[str, tuple[int, ...]], dict[int, int]]:
    """Finds the config whose blocks are wide enough.

    Returns:
        The config, the shapes of its model's tensors, and the blocks' widths in it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    needed = {id(ffn): _rounded(ffn.width + units, ffn, pad_to) for ffn in blocks}
    config: Any = copy.deepcopy(model.config)
    for field in promoted:
        setattr(*config_of(config, field), True)

    def widths() -> dict[int, int]:
        return {id(ffn): _width_in(shapes, names[id(ffn.down)], ffn) for ffn in blocks}

    shapes = shapes_of(type(model), config)
    after = widths()
    driven: dict[str, list[Ffn]] = {}
    for ffn in blocks:
        driven.setdefault(str(ffn.width_field), []).append(ffn)
    # The field of most blocks first: where two make the width of one block, the other may have nothing left to do.
    for field in sorted(driven, key=lambda name: (-len(driven[name]), name)):
        value = getattr(*config_of(config, field))
        for attempt in range(_ATTEMPTS):
            if all(after[id(ffn)] >= needed[id(ffn)] for ffn in driven[field]):
                break
            now = getattr(*config_of(config, field))
            larger = (
                _larger_count(now, driven[field], after, needed, pad_to)
                if type(now) is int
                else _larger(value, driven[field], needed, attempt)
            )
            _set(config, field, larger)
            shapes = shapes_of(type(model), config)
            after = widths()
        else:
            raise ExportError(f"no value of {field} makes the feed-forward blocks wide enough")
    return config, shapes, after


def _set(config: Any, field: str, value: Any) -> None:
    owner, name = config_of(config, field)
    try:
        setattr(owner, name, value)
    except Exception as error:
        raise ExportError(f"the config refuses {field} = {value!r}: {error}") from error


def _rounded(width: int, ffn: Ffn, pad_to: int | str) -> int:
    multiple = _multiple(ffn, pad_to)
    return -(-width // multiple) * multiple


def _multiple(ffn: Ffn, pad_to: int | str) -> int:
    multiple = math.gcd(ffn.width, 64) if pad_to == "auto" else 1 if pad_to == "none" else int(pad_to)
    return math.lcm(multiple, _EXPERTS_MULTIPLE) if ffn.experts is not None else multiple


def _larger_count(
    value: int, blocks: Sequence[Ffn], now: dict[int, int], needed: dict[int, int], pad_to: int | str
) -> int:
    """The least count that makes all blocks wide enough, where each width is a whole multiple of it; else one more.

    A field may count units, or hidden sizes, or experts of which each has many units.
    """
    if value < 1 or any(now[id(ffn)] % value for ffn in blocks):
        return value + 1
    each = [(ffn, now[id(ffn)] // value) for ffn in blocks]
    least = max(value + 1, *(-(-needed[id(ffn)] // factor) for ffn, factor in each))
    for count in range(least, least + 1024):
        if all(factor * count % _multiple(ffn, pad_to) == 0 for ffn, factor in each):
            return count
    return least


def _larger(value: Any, blocks: Sequence[Ffn], needed: dict[int, int], attempt: int) -> Any:
    """The next value to try: a width that the model chose itself, a ratio, or one of these for each stage."""
    if value is None:
        return max(needed[id(ffn)] for ffn in blocks) + attempt
    if isinstance(value, float):
        # Stages with a larger hidden size get more; rounding down in the model is why one attempt may not do.
        least = min(blocks, key=lambda ffn: ffn.width)
        width = needed[id(least)] + attempt
        own = least.width / value
        return width / round(own) if math.isclose(own, round(own)) else width / own
    widths = {ffn.width: needed[id(ffn)] for ffn in blocks}
    if all(v in widths for v in value):
        return type(value)(widths[v] + attempt for v in value)
    return type(value)(v + (1 + attempt if isinstance(v, int) else (1 + attempt) / 8) for v in value)


def _width_in(shapes: dict[str, tuple[int, ...]], down: str, ffn: Ffn) -> int:
    if ffn.experts is not None:
        return shapes[f"{down}.down_proj"][2]
    return shapes[f"{down}.weight"][0 if is_conv1d(ffn.down) else 1]


def _add_biases(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Zero biases where the new config has biases and the model has none: the function stays the same."""
    for name in sorted(shapes.keys() - model.state_dict().keys()):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        weight = getattr(owner, "weight", None)
        if leaf != "bias" or not isinstance(weight, Tensor):
            raise ExportError(f"with biases the architecture gets the tensor {name}, which is none")
        outputs = projection_size(owner)[1]  # of the narrow block; what is widened grows with it
        owner.bias = nn.Parameter(weight.new_zeros(outputs), requires_grad=False)


def _refuse_other_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """A stock model of the new config must have exactly the tensors that the widened model has."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    different = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if different:
        raise ExportError(
            f"the config's width also changes tensors that belong to no known feed-forward block: "
            f"{', '.join(different[:5])}"
        )


def _widen_block(ffn: Ffn, width: int, plan: Plan, tensors: dict[str, Tensor]) -> None:
    if ffn.experts is not None:
        _widen_experts(ffn, width, plan, tensors)
        return
    extra = width - ffn.width
    Q, U, P, r, one = _units(f"{ffn.key}", extra, ffn, plan, tensors)
    if ffn.fused is not None:
        old = ffn.width
        halves = [(Q, r), (U, one)] if ffn.fused == "gate first" else [(U, one), (Q, r)]
        rows, bias = _rows(ffn.up), _bias(ffn.up)
        parts = [rows[:old], halves[0][0], rows[old:], halves[1][0]]
        _set_rows(ffn.up, torch.cat(parts))
        if bias is not None:
            _set_bias(ffn.up, torch.cat([bias[:old], halves[0][1], bias[old:], halves[1][1]]))
    elif ffn.gate is not None:
        _append(ffn.gate, Q, r)
        _append(ffn.up, U, one)
    else:
        _append(ffn.up, Q, r)
    if ffn.conv is not None:
        _widen_convolution(ffn.conv, plan.dim if f"{ffn.key}.P" in tensors else 0, extra)
    _set_rows(ffn.down, torch.cat([_rows(ffn.down), P], dim=1))


def _units(
    key: str, extra: int, ffn: Ffn, plan: Plan, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q, U (extra, h), P (h, extra), r and the up bias (extra) of a block, zero units last."""
    like = next(ffn.down.parameters())

    def padded(name: str, shape: tuple[int, ...]) -> Tensor:
        whole = like.new_zeros(shape)
        given = tensors.get(f"{key}.{name}")
        if given is not None:
            whole[tuple(slice(n) for n in given.shape)] = given.to(whole)
        return whole

    one = like.new_zeros(extra)
    if f"{key}.P" in tensors and form_of(plan, ffn) == "plain" and ffn.is_gated:
        one[: plan.dim] = 1  # the up half of a plain tick on a gated block is the constant 1, from its bias
    h = ffn.hidden_size
    return padded("Q", (extra, h)), padded("U", (extra, h)), padded("P", (h, extra)), padded("r", (extra,)), one


def _widen_experts(ffn: Ffn, width: int, plan: Plan, tensors: dict[str, Tensor]) -> None:
    extra, module = width - ffn.width, ffn.down
    old, gated = ffn.width, ffn.is_gated
    first = module.get_parameter("gate_up_proj" if gated else "up_proj")
    down = module.get_parameter("down_proj")
    rows, columns = [], []
    for number in range(ffn.count):
        # One tick beside the whole block stands in every expert: the routing weights sum to one.
        key = ffn.key if plan.experts == "block" else f"{ffn.key}.{number}"
        Q, U, P, _, _ = _units(key, extra, ffn, plan, tensors)
        parts = [first[number, :old], Q, first[number, old:], U] if gated else [first[number], Q]
        rows.append(torch.cat(parts))
        columns.append(torch.cat([down[number], P], dim=1))
    setattr(module, "gate_up_proj" if gated else "up_proj", nn.Parameter(torch.stack(rows), requires_grad=False))
    module.down_proj = nn.Parameter(torch.stack(columns), requires_grad=False)
    for name in ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_dim"):
        if getattr(module, name, None) == old:
            setattr(module, name, width)


def _refuse_lost_units(ffn: Ffn, old: int, plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Every tick must stand in its wider block as it is: rows that a comparison of logits may never reach too."""
    units = slice(old, old + plan.dim)
    for number in range(ffn.count if ffn.experts is not None else 1):
        key, r = ffn.key, None
        if ffn.experts is not None:
            key = ffn.key if plan.experts == "block" else f"{ffn.key}.{number}"
            first = ffn.down.get_parameter("gate_up_proj" if ffn.is_gated else "up_proj")[number]
            parts, down = first.chunk(2 if ffn.is_gated else 1), ffn.down.get_parameter("down_proj")[number]
        else:
            entry = ffn.gate if ffn.gate is not None else ffn.up
            parts = _rows(ffn.up).chunk(2) if ffn.fused is not None else (_rows(entry), _rows(ffn.up))
            biases = None if (bias := _bias(entry)) is None else bias.chunk(2 if ffn.fused is not None else 1)
            is_last = ffn.fused == "up first"
            parts, down = parts[::-1] if is_last else parts, _rows(ffn.down)
            r = None if biases is None else biases[-1 if is_last else 0][units]
        found = {"Q": parts[0][units], "U": parts[-1][units], "P": down[:, units], "r": r}
        for name, tensor in found.items():
            given = tensors.get(f"{key}.{name}")
            if given is not None and (tensor is None or not torch.equal(tensor, given.to(tensor))):
                raise ExportError(f"the tensor {key}.{name} does not stand in the wider block as it is")


def _widen_convolution(conv: nn.Module, ticks: int, extra: int) -> None:
    """Gives a depthwise convolution new channels: a tick's passes through unchanged, a zero unit's stays zero."""
    weight, bias = conv.get_parameter("weight"), _bias(conv)
    kernel = weight.new_zeros(extra, *weight.shape[1:])
    kernel[:ticks, 0, weight.shape[2] // 2, weight.shape[3] // 2] = 1
    conv.weight = nn.Parameter(torch.cat([weight, kernel]), requires_grad=False)
    if bias is not None:
        _set_bias(conv, torch.cat([bias, bias.new_zeros(extra)]))
    for name in ("groups", "in_channels", "out_channels"):
        setattr(conv, name, getattr(conv, name) + extra)


def _append(projection: nn.Module, rows: Tensor, bias: Tensor) -> None:
    _set_rows(projection, torch.cat([_rows(projection), rows]))
    own = _bias(projection)
    if own is not None:
        _set_bias(projection, torch.cat([own, bias]))


def _rows(projection: nn.Module) -> Tensor:
    """The weight as (outputs, inputs)."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(projection) else weight


def _set_rows(projection: nn.Module, rows: Tensor) -> None:
    weight = rows.T if is_conv1d(projection) else rows
    projection.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    names = ("nf", "nx") if is_conv1d(projection) else ("out_features", "in_features")
    for name, value in zip(names, rows.shape, strict=True):
        setattr(projection, name, value)


def _bias(projection: nn.Module) -> Tensor | None:
    bias = getattr(projection, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _set_bias(projection: nn.Module, bias: Tensor) -> None:
    projection.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
