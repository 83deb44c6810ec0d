"""Which config fields drive the width of feed-forward blocks, and which give them biases.

Found by trial: a field is changed, a model of the changed config is built on the meta device, which takes no
memory, and what changed shape is compared with what should.
"""

import copy
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ticktune.patch.layout import config_of, projection_size
from ticktune.patch.proof import Block, Trace

# Tried first, as each trial builds a model; a name decides nothing else.
_LIKELY = re.compile(r"inter|ffn|mlp|ff|inner|expert|ratio|feed")
_NEVER = re.compile(r"token_id|token_index|vocab|_id2|label|max_|dropout|_prob|_eps|_std|range")

Shapes = dict[str, tuple[int, ...]]


def shapes_of(cls: type[nn.Module], config: Any) -> Shapes:
    """Names and shapes of the tensors that a model of a config has; on the meta device, so without memory."""
    config = copy.deepcopy(config)
    if isinstance(getattr(config, "dtype", None), str):
        # Saving a model leaves the dtype's name there, and some classes want the dtype itself.
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = cls(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass
class Widths:
    """What drives the widths of blocks.

    Args:
        fields: Name of ``down`` -> the config field that drives the width of its block, and nothing but blocks;
            dotted where it is one of an inner model.
        obstacles: Name of ``down`` -> why there is none.
    """

    fields: dict[str, str] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def width_fields(model: nn.Module, blocks: list[Block], trace: Trace) -> Widths:
    """Finds the fields of width.

    Args:
        model: The small model.
        blocks: Its proved blocks.
        trace: What ran.
    """
    trial = _Trial(model, blocks, trace)
    own = sorted(_leaves(model.config), key=lambda leaf: _LIKELY.search(leaf[0]) is None)
    # Last those of inner models: what stands between two of them may have the width of one.
    nested = [leaf for leaf in _nested_leaves(model.config) if _LIKELY.search(leaf[0].rpartition(".")[2])]
    for path, value in (*own, *nested):
        if trial.widths.fields.keys() >= set(trial.owners.values()):
            break
        for larger in _larger(value, trial.sizes):
            if trial.drives(path, larger):
                break
    return trial.widths


class _Trial:
    """Changes one field after the other and looks at what grows.

    Args:
        model: The small model.
        blocks: Its proved blocks.
        trace: What ran.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], trace: Trace) -> None:
        self._model, self._reference, self._trace = model, shapes_of(type(model), model.config), trace
        modules = dict(model.named_modules())
        self.owners = {
            f"{name}.{parameter}": block.down
            for block in blocks
            for name in block.names
            for parameter, _ in modules[name].named_parameters(recurse=False)
        }
        self.sizes = {projection_size(modules[b.down])[0] for b in blocks if not b.experts}
        self.widths = Widths()

    def drives(self, path: str, value: Any) -> bool:
        """Whether a value of a field changes blocks and nothing else; notes which."""
        shapes, owners = _shapes_with(self._model, path, value), self.owners
        if shapes is None or shapes.keys() != self._reference.keys():
            return False
        changed = {n for n in shapes if shapes[n] != self._reference[n]}
        driven = {owners[n] for n in changed & owners.keys()}
        # A bias of ``down`` has the outer size: where that changes, the field is not one of width.
        if any(f"{down}.bias" in changed for down in driven) or not changed:
            return False
        if others := sorted(changed - owners.keys()):
            self._note(path, driven, others)
            return False
        for down in driven:
            self.widths.fields.setdefault(down, path)
        return True

    def _note(self, path: str, driven: set[str], others: list[str]) -> None:
        """Notes a field that changes more than blocks, if that is the width of these."""
        weights = {f"{down}.weight": shape for down in driven if (shape := self._reference.get(f"{down}.weight"))}
        if len(others) > len(self._reference) // 2 or not weights:
            return
        ran = others[0].rpartition(".")[0] in self._trace.times
        why = "is no known feed-forward block" if ran else "no input that is known for this model makes run"
        for down in driven:
            self.widths.obstacles.setdefault(down, f"{path} is also the size of {others[0]}, which {why}")


def also_sized(model: nn.Module, field_name: str, own: Collection[str], widths: set[int]) -> str | None:
    """A tensor outside of blocks that has the size of a field too, or None.

    The field of an inner model may have a part in what the outer one builds around it.

    Args:
        model: The outermost model; only its class and config are used.
        field_name: The field, dotted from its config.
        own: Names of the modules of the blocks that the field drives.
        widths: Widths of these blocks.
    """
    try:
        reference = shapes_of(type(model), model.config)
    except Exception:  # noqa: BLE001 - a class that builds nothing of its config is met, and named, elsewhere
        return None
    owner, name = config_of(model.config, field_name)
    for larger in _larger(getattr(owner, name), widths):
        shapes = _shapes_with(model, field_name, larger)
        if shapes is None or shapes.keys() != reference.keys():
            continue
        changed = sorted(n for n in shapes if shapes[n] != reference[n])
        if changed:
            return next((n for n in changed if n.rpartition(".")[0] not in own), None)
    return None


def bias_field(model: nn.Module, blocks: list[Block]) -> str | None:
    """The config switch that gives the blocks' projections biases, and adds nothing but biases."""
    modules = dict(model.named_modules())
    plain = [b for b in blocks if not b.experts]
    if not plain or all(getattr(modules[b.up], "bias", None) is not None for b in plain):
        return None
    reference = shapes_of(type(model), model.config)
    wanted = {f"{n}.bias" for b in plain for n in b.names if n != b.down}
    best: tuple[int, str] | None = None
    for path, value in _leaves(model.config):
        if value is not False:
            continue
        shapes = _shapes_with(model, path, True)
        if shapes is None or not reference.keys() < shapes.keys():
            continue
        new = shapes.keys() - reference.keys()
        is_bias = all(n.endswith(".bias") and n.rpartition(".")[0] in modules for n in new)
        if is_bias and wanted <= new:
            best = min(best or (1 << 30, ""), (len(new), path))
    return best[1] if best else None


def _shapes_with(model: nn.Module, path: str, value: Any) -> Shapes | None:
    config = copy.deepcopy(model.config)
    try:
        owner, name = config_of(config, path)
        setattr(owner, name, value)
        return shapes_of(type(model), config)
    except Exception:  # noqa: BLE001 - this value is not one that the model takes
        return None


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if name.startswith("_") or _NEVER.search(name):
            continue
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            continue  # a body of its own
        yield prefix + name, value


def _nested_leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _leaves(value, f"{prefix}{name}.")
            yield from _nested_leaves(value, f"{prefix}{name}.")


def _larger(value: Any, widths: set[int]) -> Iterator[Any]:
    """Larger values of the same type to try in place of one; None stands for a width that the model chooses."""
    if value is None:
        yield from (width + 8 for width in sorted(widths))
    elif isinstance(value, bool):
        return
    elif isinstance(value, int) and value > 0:
        yield from (value + 8, value + 1)
    elif isinstance(value, float):
        yield value + 1.0
    elif isinstance(value, list | tuple) and value:
        if all(type(v) is int for v in value):
            yield type(value)(v + 8 for v in value)
            yield type(value)(v + 1 for v in value)
        elif all(type(v) is float for v in value):
            yield type(value)(v + 1.0 for v in value)
