"""Runs a small model once and proves which of its projections are feed-forward blocks.

A pair of projections is a block when what goes into the second one *is* the activation of what came out of the
first: ``input(down) == act(out(up))``, or the gated or fused form of it. Names decide nothing.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ticktune.errors import first_line
from ticktune.patch.layout import is_conv1d, items_of, projection_size
from ticktune.patch.shrink import example_inputs

Act = Callable[[Tensor], Tensor]

# Candidates for an activation that the model has no module for; the best residual in float64 wins.
_ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "relu", "relu2", "mish", "tanh",
    "sigmoid", "linear",
)  # fmt: skip
_EXACT = 1e-6  # relative; a wrong activation is off by 1e-4 or more, a model that computes it in float32 by 1e-7
_LARGE = 1000.0  # times what a small model computes: beyond the limits of all clamps
_ROWS = 256  # of hidden states that are compared
_MOST_SECONDS = 10  # of one run, and after which no other inputs are tried
_MOST_BYTES = 1 << 31  # kept of one run; what comes after is not looked at


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
        time: When ``up`` was called and ``down`` had ended.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused: Literal["gate first", "up first"] | None = None
    dropout: str | None = None
    experts: bool = False
    time: tuple[int, int] = (0, 0)

    @property
    def names(self) -> list[str]:
        """The projections."""
        return [n for n in dict.fromkeys((self.gate, self.up, self.down)) if n is not None]

    def within(self, prefix: str) -> "Block":
        """The same block by its names in an inner model."""
        return self._renamed(lambda name: name.removeprefix(prefix))

    def moved(self, old: str, new: str) -> "Block":
        """The block that has the same names in another module."""
        return self._renamed(lambda name: new + name.removeprefix(old) if name.startswith(f"{old}.") else name)

    def _renamed(self, rename: Callable[[str], str]) -> "Block":
        names = {key: getattr(self, key) for key in ("up", "down", "act", "gate", "dropout")}
        changed: dict[str, Any] = {k: n if n is None or n.startswith("=") else rename(n) for k, n in names.items()}
        return replace(self, **changed)


@dataclass
class Trace:
    """What one forward pass of the small model showed.

    Args:
        modules: The model's modules by name.
        inputs: Module name -> what went in, the first time.
        outputs: Module name -> what came out, the first time.
        times: Module name -> when it was called first.
        ends: Module name -> when its first call ended.
        reason: Why nothing was proved.
        failed: Whether the run did not come to its end.
    """

    modules: dict[str, nn.Module]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False

    def within(self, prefix: str) -> "Trace":
        """The part of it that shows an inner model, by the names there."""

        def cut(entries: dict[str, Any]) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}

        modules = {"": self.modules[prefix.removesuffix(".")], **cut(self.modules)}
        return Trace(
            modules, cut(self.inputs), cut(self.outputs), cut(self.times), cut(self.ends), self.reason, self.failed
        )


def prove_blocks(model: nn.Module) -> tuple[list[Block], Trace]:
    """Runs a small model once and proves its feed-forward blocks.

    Args:
        model: From :func:`ticktune.patch.shrink.build_small`.

    Returns:
        The blocks in the order in which they ran, and what was seen.
    """
    trace = _run(model)
    pairs = list(_prove_pairs(trace))
    unclamped = _without_clamps(model, pairs)
    blocks = [*_prove_experts(model), *unclamped]
    for block in blocks:
        block.time = (trace.times.get(block.up, 0), trace.ends.get(block.down, 0))
    blocks = [b for b in blocks if not _is_look_alike(b, trace.modules)]
    blocks = sorted(_with_alternatives(blocks, trace.modules), key=lambda b: b.time)
    if not blocks and pairs and not unclamped:
        trace.reason = "its feed-forward blocks clamp large values, or do something else to them"
    if not blocks and not trace.reason:
        trace.reason = "no pair of projections is down(act(up(x))) or its gated form, for any known activation"
    return blocks, trace


def layer_of(block: Block, modules: dict[str, nn.Module]) -> tuple[str, str] | None:
    """(name of the module list, with stars; name of the layer) that a block lies in, or None.

    The innermost list whose items are of one class and more than a block; where there is none, the outermost.
    """
    common = common_parent(block.names) if not block.experts else block.up
    parts = common.split(".")
    places = [
        i
        for i, part in enumerate(parts)
        if part.isdigit() and isinstance(modules[".".join(parts[:i])], nn.ModuleList | nn.Sequential)
    ]
    if not places:
        return None

    even = [i for i in places if len({type(item) for item in modules[".".join(parts[:i])].children()}) == 1]
    while len(even) > 1 and is_alternative(block, modules, even[-1]):
        even.pop()
    at = even[-1] if even else places[0]
    pattern = ".".join("*" if i < at and i in places else part for i, part in enumerate(parts[:at]))
    return pattern, ".".join(parts[: at + 1])


def is_alternative(block: Block, modules: dict[str, nn.Module], at: int) -> bool:
    """Whether a block lies in a list of bare blocks: experts of a layer, or several that run one after the other.

    Args:
        block: The block.
        modules: The model's modules by name.
        at: Which part of the block's name is the item's name in the list.
    """
    parts = common_parent(block.names).split(".")
    if block.experts or at >= len(parts):
        return False
    container = modules[".".join(parts[:at])]
    items = [module for _, module in items_of(container)]
    return (
        isinstance(container, nn.ModuleList | nn.ModuleDict)
        and len({type(item) for item in items}) == 1
        and all(_is_bare(item, len(block.names)) for item in items)
    )


def _is_bare(item: nn.Module, projections: int) -> bool:
    """Whether a module holds the projections of one block and norms, and nothing else that it could compute with."""
    owners = [module for module in item.modules() if next(module.parameters(recurse=False), None) is not None]
    found = sum(map(is_projection, owners))
    return found == projections and all(is_projection(module) or is_norm(module) for module in owners)


def common_parent(paths: list[str]) -> str:
    """The innermost module that holds all of some modules."""
    split = [path.split(".")[:-1] for path in paths]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def is_projection(module: nn.Module) -> bool:
    """Whether it is a linear projection."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm over the last dimension with a weight, of whatever class."""
    is_named = type(module).__name__.endswith("Norm") or isinstance(module, nn.LayerNorm)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    is_other = isinstance(module, nn.GroupNorm | nn.BatchNorm2d)
    return is_named and bool(names) and names <= {"weight", "bias"} and not is_other


def residual(a: Tensor, b: Tensor) -> float:
    """How far two tensors are apart, relative to the largest value of the second."""
    scale = float(b.double().abs().max())
    found = float((a.double() - b.double()).abs().max()) / max(scale, 1e-300)
    return found if found == found else float("inf")


# The run


class _Recorder:
    """Hooks that write down what modules get and give."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace(dict(model.named_modules()))
        self._clock = itertools.count()
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._bytes = 0
        self._handles: list[Any] = []
        self._deadline = float("inf")
        for name, module in self.trace.modules.items():
            if name:
                self._watch(name, module)

    def clear(self) -> None:
        """Forgets a run and starts another."""
        self._deadline = time.monotonic() + _MOST_SECONDS
        self._kept.clear()
        self._bytes = 0
        for store in (self.trace.inputs, self.trace.outputs, self.trace.times, self.trace.ends):
            store.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        trace = self.trace
        has_values = isinstance(module, nn.Dropout) or is_projection(module) or is_norm(module) or _is_act(module)

        def before(m: Any, args: Any, kwargs: Any) -> None:
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"one run takes more than {_MOST_SECONDS} seconds")
            if name not in trace.times:
                trace.times[name] = next(self._clock)
                if has_values:
                    self._keep(trace.inputs, name, args[0] if args else next(iter(kwargs.values()), None))

        def after(m: Any, args: Any, output: Any) -> None:
            if name not in trace.ends:
                trace.ends[name] = next(self._clock)
                if has_values:
                    self._keep(trace.outputs, name, output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _keep(self, store: dict[str, Tensor], name: str, tensor: Any) -> None:
        """A copy, as the model may go on to change the tensor; one only for each tensor and version."""
        if not isinstance(tensor, Tensor):
            return
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version)
        if key not in self._kept:
            self._bytes += 2 * tensor.numel() * tensor.element_size()
            if self._bytes > _MOST_BYTES:
                return
            # The tensor itself is held too, or another one could come to lie at its address.
            self._kept[key] = (tensor.detach(), tensor.detach().clone())
        store[name] = self._kept[key][1]


def _run(model: nn.Module) -> Trace:
    recorder = _Recorder(model)
    trace, reason = recorder.trace, ""
    trace.reason, trace.failed = "no inputs are known for it", True
    try:
        choices = example_inputs(model)
        start = time.monotonic()
        for number, arguments in enumerate(choices):
            recorder.clear()
            error = _call(model, arguments)
            if not error and _is_nan(trace):
                error = "a small model of its class computes no numbers"
            if not error:
                trace.reason, trace.failed = "", False
                _run_the_rest(model, recorder, choices[number + 1 :])
                break
            # What ran before the failure counts all the same, as a proof is local; the reason is that of the
            # likeliest inputs.
            reason = trace.reason = reason or error
            if time.monotonic() - start > _MOST_SECONDS:
                break
    finally:
        recorder.remove()
    return trace


def _run_the_rest(model: nn.Module, recorder: _Recorder, choices: list[dict[str, Tensor]]) -> None:
    """Gives a model of several inputs more of them, where projections were not run by the first that work.

    A failure does no harm: towers and what joins them run before the text model finds fault.
    """
    trace = recorder.trace
    idle = [n for n, m in trace.modules.items() if is_projection(m) and n not in trace.inputs]
    start = time.monotonic()
    for arguments in choices if idle else ():
        _call(model, arguments)
        if time.monotonic() - start > _MOST_SECONDS / 10 or all(n in trace.inputs for n in idle):
            break


def _call(model: nn.Module, arguments: dict[str, Tensor]) -> str:
    """Runs a model; returns what it fails with, or an empty string."""
    try:
        with torch.no_grad():
            model(**arguments)
    except Exception as error:  # noqa: BLE001 - any class of any version may stand here
        return f"a small model of its class does not run ({first_line(error)})"
    return ""


def _is_nan(trace: Trace) -> bool:
    return any(v.is_floating_point() and bool(v.isnan().any()) for v in trace.outputs.values())


# Pairs of projections


def _prove_pairs(trace: Trace) -> Iterator[Block]:
    projections = [n for n in trace.inputs if n in trace.outputs and is_projection(trace.modules[n])]
    by_parent: dict[str, list[str]] = {}
    for name in projections:
        for parent in _parents(name, 3):
            by_parent.setdefault(parent, []).append(name)
    for down in projections:
        near = dict.fromkeys(n for p in _parents(down, 3) for n in by_parent[p] if n != down)
        before = [n for n in near if trace.times[n] < trace.times[down]]
        block = _Proof(trace, down, before).best()
        if block is not None:
            yield block


def _without_clamps(model: nn.Module, blocks: list[Block]) -> list[Block]:
    """The blocks that hold on large hidden units too: some classes clamp these, which small ones do not show."""
    if not blocks:
        return []
    names = {n for block in blocks for n in block.names if n != block.down}
    parameters = [p for n in names for p in model.get_submodule(n).parameters(recurse=False) if p.is_floating_point()]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(_LARGE)
        trace = _run(model)
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return [b for b in blocks if all(n in trace.inputs and n in trace.outputs for n in b.names) and _holds(b, trace)]


def _holds(block: Block, trace: Trace) -> bool:
    return _Proof(trace, block.down, [n for n in block.names if n != block.down]).holds(block)


class _Proof:
    """Looks for the projections whose activation is what went into one.

    Args:
        trace: What was seen.
        down: The one.
        before: Names of the projections near it that ran before it.
    """

    def __init__(self, trace: Trace, down: str, before: list[str]) -> None:
        self._trace, self._down, self._before = trace, down, before
        self._inside = _some(trace.inputs[down])

    def best(self) -> Block | None:
        """The block that fits best, where one fits."""
        error, block = min(self._tries(), key=lambda pair: pair[0], default=(float("inf"), None))
        if block is None or not error < _EXACT:
            return None
        block.dropout = self._dropout()
        return block

    def holds(self, block: Block) -> bool:
        """Whether a certain block fits."""
        wanted = replace(block, dropout=None, time=(0, 0))
        return any(error < _EXACT and other == wanted for error, other in self._tries())

    def _tries(self) -> Iterator[tuple[float, Block]]:
        """How far off each possible block is."""
        inside = self._inside
        if not inside.is_floating_point() or inside.numel() == 0 or not inside.any():
            return
        outer, width = projection_size(self._trace.modules[self._down])[1], inside.shape[-1]
        for up in self._before:
            wide = _some(self._trace.outputs[up])
            # A feed-forward block gives what it takes; a pooler with a classifier behind it does not.
            if projection_size(self._trace.modules[up])[0] != outer or wide.shape[:-1] != inside.shape[:-1]:
                continue
            if wide.shape[-1] == width:
                yield from self._plain(up)
                yield from self._gated(up)
            elif wide.shape[-1] == 2 * width:
                yield from self._fused(up)

    def _plain(self, up: str) -> Iterator[tuple[float, Block]]:
        for act, value in self._activated(up, _some(self._trace.outputs[up])):
            if act != "=linear":
                yield residual(value, self._inside), Block(up, self._down, act)

    def _gated(self, up: str) -> Iterator[tuple[float, Block]]:
        inputs, outputs = self._trace.inputs, self._trace.outputs
        for gate in self._before:
            if gate == up or outputs[gate].shape != outputs[up].shape or not torch.equal(inputs[gate], inputs[up]):
                continue
            for act, value in self._activated(gate, _some(outputs[gate])):
                yield residual(value * _some(outputs[up]), self._inside), Block(up, self._down, act, gate=gate)

    def _fused(self, up: str) -> Iterator[tuple[float, Block]]:
        first, second = _some(self._trace.outputs[up]).chunk(2, dim=-1)
        for act, value in self._activated(up, first):
            yield residual(value * second, self._inside), Block(up, self._down, act, fused="gate first")
        for act, value in self._activated(up, second):
            yield residual(value * first, self._inside), Block(up, self._down, act, fused="up first")

    def _activated(self, up: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What each candidate for the activation makes of a tensor."""
        near = dict.fromkeys([*_parents(up, 2), *_parents(self._down, 2)])
        for name, function in [*_own_acts(near, self._trace.modules), *_known_acts()]:
            value = _apply(function, x)
            if value is not None:
                yield name, value

    def _dropout(self) -> str | None:
        for parent in _parents(self._down, 2):
            owner = self._trace.modules[parent]
            for child, module in owner.named_children():
                seen = self._trace.outputs.get(_join(parent, child))
                if isinstance(module, nn.Dropout) and seen is not None:
                    if torch.equal(_some(seen), self._inside):
                        return _join(parent, child)
            if isinstance(getattr(owner, "activation_dropout", None), float):
                return _join(parent, "activation_dropout")
        return None


def _some(values: Tensor) -> Tensor:
    """At most a few hundred rows: as many as a proof needs, whatever the size of the image."""
    return values.reshape(-1, values.shape[-1])[:_ROWS] if values.ndim > 1 else values


def _own_acts(parents: dict[str, None], modules: dict[str, nn.Module]) -> Iterator[tuple[str, Act]]:
    """The activations that some modules hold, as modules or as functions."""
    for parent in parents:
        for child, module in modules[parent].named_children():
            if _is_act(module):
                yield _join(parent, child), module
        for attribute, value in vars(modules[parent]).items():
            is_function = callable(value) and not isinstance(value, nn.Module | type)
            if is_function and "act" in attribute and not attribute.startswith("_"):
                yield _join(parent, attribute), value


def _known_acts() -> Iterator[tuple[str, Act]]:
    from transformers.activations import ACT2FN

    for name in _ACTIVATIONS:
        yield f"={name}", ACT2FN[name]


def _is_act(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    words = ("gelu", "silu", "relu", "act", "mish", "tanh", "xielu", "swish")
    return not list(module.children()) and any(word in name for word in words)


def _apply(function: Act, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            value = function(x.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # an activation of two arguments, or no activation
    return value if isinstance(value, Tensor) and value.shape == x.shape else None


# Experts


def _prove_experts(model: nn.Module) -> Iterator[Block]:
    """Runs each module of experts on input of its own, for one expert: so all of the module is used."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        first, down = own.get("gate_up_proj", own.get("up_proj")), own.get("down_proj")
        if first is None or down is None or down.ndim != 3 or len(own) != 2:
            continue
        count, hidden, width = down.shape
        gated = "gate_up_proj" in own
        if first.shape != (count, width * (2 if gated else 1), hidden):
            continue
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, hidden, generator=generator, dtype=first.dtype)
        index, weights = torch.full((5, 1), count - 1), torch.full((5, 1), 0.5, dtype=first.dtype)
        try:
            with torch.no_grad():
                seen = [(scale * x, module(scale * x, index, weights)) for scale in (1, _LARGE)]
        except Exception:  # noqa: BLE001 - experts with another signature are none that we know
            continue
        for act, function in [*_own_acts({name: None}, {name: module}), *_known_acts()]:
            units = [_expert_units(x @ first[-1].T, gated, function) for x, _ in seen]
            if all(
                u is not None and residual(0.5 * u @ down[-1].T, output) < _EXACT
                for u, (_, output) in zip(units, seen, strict=True)
            ):
                yield Block(name, name, act, experts=True)
                break


def _expert_units(wide: Tensor, gated: bool, function: Act) -> Tensor | None:
    if not gated:
        return _apply(function, wide)
    gate, up = wide.chunk(2, dim=-1)
    value = _apply(function, gate)
    return None if value is None else value * up


def _with_alternatives(blocks: list[Block], modules: dict[str, nn.Module]) -> Iterator[Block]:
    """The blocks, and those beside them in lists of bare blocks of one class: a router sends tokens to some only."""
    known = {block.up for block in blocks}
    for block in blocks:
        yield block
        for at in range(1, common_parent(block.names).count(".") + 1):
            if not is_alternative(block, modules, at):
                continue
            parts = block.up.split(".")
            here = ".".join(parts[: at + 1])
            for child, _ in items_of(modules[".".join(parts[:at])]):
                other = block.moved(here, ".".join([*parts[:at], child]))
                if other.up not in known:
                    known.add(other.up)
                    yield other


def _is_look_alike(block: Block, modules: dict[str, nn.Module]) -> bool:
    """Box heads and other pairs of projections that are no feed-forward block of a layer."""
    if block.experts:
        return not any(part.isdigit() for part in block.up.split("."))
    return (
        isinstance(modules[common_parent(block.names)], nn.ModuleList | nn.Sequential)
        and not any(c.isalpha() for c in block.up.rsplit(".", 1)[-1])
        and layer_of(block, modules) is None
    )


def _parents(name: str, count: int) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: len(parts) - i]) for i in range(min(count, len(parts) + 1))]


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
