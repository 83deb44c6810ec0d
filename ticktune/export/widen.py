"""Ticks -> a wider feed-forward block: merging is concatenation, and the result is a stock model.

    FFN(x) + P σ(Qx + r) = [W2 P] σ([W1; Q] x + [b1; r]) + b2

No base weight changes, because nothing is added into one.
"""

import torch
from torch import Tensor, nn

from ticktune.errors import ExportError
from ticktune.patch.attach import Plan
from ticktune.patch.layout import Ffn, Layout, config_of, find_layout, is_conv1d, projection_size


def merge_obstacle(layout: Layout, plan: Plan) -> str:
    """Returns why a plan cannot be merged into this architecture, or an empty string.

    Args:
        layout: The model's feed-forward blocks.
        plan: What is attached.
    """
    ffn = layout.ffns[0]
    if plan.dim and plan.form == "plain" and ffn.is_gated and not ffn.has_bias:
        return (
            "plain ticks on gated feed-forward blocks need biases (r at the gate, 1 at up), "
            "and this architecture has none; gated ticks merge (ticks.form: auto)"
        )
    return ""


def widen(model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Builds an adapter into a stock model, in place.

    All blocks that share a config field of width get the same number of new units; blocks without a tick get
    zeros. The arithmetic is the model's: use float32 or wider.

    Args:
        model: The stock base under the adapter's model class, without ticks.
        plan: What the adapter holds.
        tensors: Its tensors.

    Returns:
        Config field -> its new width.

    Raises:
        ExportError: The architecture has no place for it.
    """
    layout = find_layout(model)
    obstacle = merge_obstacle(layout, plan)
    if obstacle:
        raise ExportError(f"this adapter cannot be merged: {obstacle}")
    wider = {layout.stacks[stack].width for stack, layers in plan.layers.items() if layers and plan.dim}
    widths: dict[str, int] = {}
    with torch.no_grad():
        for ffn in layout.ffns:
            field = layout.stacks[ffn.stack].width
            if field in wider:
                _widen_block(ffn, plan, tensors)
                widths[field] = ffn.width
        for key in plan.norms:
            norm = layout.norms[key]
            for name, parameter in norm.named_parameters(recurse=False):
                parameter.copy_(tensors[f"{key}.{name}"])
        for name in plan.head:
            model.get_parameter(name).copy_(tensors[f"head.{name}"])
    for field, width in widths.items():
        config, name = config_of(model.config, field)
        setattr(config, name, width)
    return widths


def _widen_block(ffn: Ffn, plan: Plan, tensors: dict[str, Tensor]) -> None:
    key = f"{ffn.stack}.{ffn.layer}.ffn"
    weight = ffn.down.weight
    assert isinstance(weight, Tensor)
    zeros = weight.new_zeros(plan.dim, ffn.hidden_size)
    nothing = weight.new_zeros(plan.dim)
    has_tick = f"{key}.P" in tensors

    def tensor(name: str, default: Tensor) -> Tensor:
        return tensors[f"{key}.{name}"].to(default) if f"{key}.{name}" in tensors else default

    Q, U, P, r = tensor("Q", zeros), tensor("U", zeros), tensor("P", zeros.T), tensor("r", nothing)
    # The up half of a plain tick on a gated block is the constant 1, from its bias.
    up_bias = torch.ones_like(nothing) if has_tick and plan.form == "plain" else nothing
    if ffn.fused:
        width = ffn.width
        gate_weight, up_weight = _rows(ffn.up)[:width], _rows(ffn.up)[width:]
        _set_rows(ffn.up, torch.cat([gate_weight, Q, up_weight, U]))
        bias = _bias(ffn.up)
        if bias is not None:
            _set_bias(ffn.up, torch.cat([bias[:width], r, bias[width:], up_bias]))
    elif ffn.gate is not None:
        _append(ffn.gate, Q, r)
        _append(ffn.up, U, up_bias)
    else:
        _append(ffn.up, Q, r)
    _set_rows(ffn.down, torch.cat([_rows(ffn.down), P], dim=1))


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
    inputs, outputs = projection_size(projection)
    names = ("nx", "nf") if is_conv1d(projection) else ("in_features", "out_features")
    for name, value in zip(names, (inputs, outputs), strict=True):
        setattr(projection, name, value)


def _bias(projection: nn.Module) -> Tensor | None:
    bias = getattr(projection, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _set_bias(projection: nn.Module, bias: Tensor) -> None:
    projection.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
