"""The table: where each family keeps its feed-forward blocks and norms, and which config fields hold the width.

Names are relative: stacks to the model without its head, everything else to one layer. Where a name changed
between versions of transformers, all of them are listed and the first that exists is used. A new family is
one row of FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ticktune.errors import PatchError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """The feed-forward block of a layer.

    Args:
        up: The projection into the wide space; with ``fused`` it holds gate and up, gate first.
        down: The projection back.
        act: The activation.
        gate: The gate's projection, where it is a module of its own.
        fused: Whether ``up`` holds both gate and up.
        dropout: Dropout that the block applies to its hidden units.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused: bool = False
    dropout: str | None = None


@dataclass(frozen=True)
class Stack:
    """A row of equal layers.

    Args:
        name: ``encoder`` or ``decoder``; the first part of every tensor's key.
        layers: The module list.
        ffn: Possible shapes of the feed-forward block.
        width: Config field of its width.
        norms: Slot -> name of the norm in each layer.
        embedding: The norm of the embeddings.
        final: The norm after the last layer.
    """

    name: str
    layers: Names
    ffn: tuple[Shape, ...]
    width: str
    norms: dict[str, Names]
    embedding: Names = ()
    final: Names = ()


_BERT_FFN = Shape("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_GLU = Shape("mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj")
_FC = Shape("fc1", "fc2", "activation_fn", dropout="activation_dropout")


def _post_norm_encoder() -> tuple[Stack, ...]:
    return (
        Stack(
            "encoder",
            ("encoder.layer",),
            (_BERT_FFN,),
            "intermediate_size",
            {"attention": ("attention.output.LayerNorm",), "ffn": ("output.LayerNorm",)},
            embedding=("embeddings.LayerNorm",),
        ),
    )


def _llama_like(ffn: Shape = _GLU, **norms: Names) -> tuple[Stack, ...]:
    return (
        Stack(
            "decoder",
            ("layers",),
            (ffn,),
            "intermediate_size",
            {"attention": ("input_layernorm",), "ffn": ("post_attention_layernorm",), **norms},
            final=("norm",),
        ),
    )


def _t5_stack(name: str, ffn_at: int, **norms: Names) -> Stack:
    block = f"layer.{ffn_at}.DenseReluDense"
    return Stack(
        name,
        (f"{name}.block",),
        (
            Shape(f"{block}.wi", f"{block}.wo", f"{block}.act", dropout=f"{block}.dropout"),
            Shape(
                f"{block}.wi_1",
                f"{block}.wo",
                f"{block}.act",
                gate=f"{block}.wi_0",
                dropout=f"{block}.dropout",
            ),
        ),
        "d_ff",
        {"attention": ("layer.0.layer_norm",), **norms, "ffn": (f"layer.{ffn_at}.layer_norm",)},
        final=(f"{name}.final_layer_norm",),
    )


def _bart_stack(name: str, **norms: Names) -> Stack:
    return Stack(
        name,
        (f"{name}.layers",),
        (_FC,),
        f"{name}_ffn_dim",
        {"attention": ("self_attn_layer_norm",), **norms, "ffn": ("final_layer_norm",)},
        embedding=(f"{name}.layernorm_embedding",),
        final=(f"{name}.layer_norm",),
    )


FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bert": _post_norm_encoder(),
    "roberta": _post_norm_encoder(),
    "distilbert": (
        Stack(
            "encoder",
            ("transformer.layer",),
            (Shape("ffn.lin1", "ffn.lin2", "ffn.activation"),),
            "hidden_dim",
            {"attention": ("sa_layer_norm",), "ffn": ("output_layer_norm",)},
            embedding=("embeddings.LayerNorm",),
        ),
    ),
    "gpt2": (
        Stack(
            "decoder",
            ("h",),
            (Shape("mlp.c_fc", "mlp.c_proj", "mlp.act"),),
            "n_inner",
            {"attention": ("ln_1",), "ffn": ("ln_2",)},
            final=("ln_f",),
        ),
    ),
    "opt": (
        Stack(
            "decoder",
            ("decoder.layers",),
            (Shape("fc1", "fc2", "activation_fn"),),
            "ffn_dim",
            {"attention": ("self_attn_layer_norm",), "ffn": ("final_layer_norm",)},
            final=("decoder.final_layer_norm",),
        ),
    ),
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "gemma": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(q=("self_attn.q_norm",), k=("self_attn.k_norm",)),
    "phi3": _llama_like(Shape("mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", fused=True)),
    "t5": (_t5_stack("encoder", 1), _t5_stack("decoder", 2, cross_attention=("layer.1.layer_norm",))),
    "bart": (_bart_stack("encoder"), _bart_stack("decoder", cross_attention=("encoder_attn_layer_norm",))),
    "vit": (
        Stack(
            "encoder",
            ("layers", "encoder.layer"),
            (Shape("mlp.fc1", "mlp.fc2", "mlp.activation_fn"), _BERT_FFN),
            "intermediate_size",
            {"attention": ("layernorm_before",), "ffn": ("layernorm_after",)},
            final=("layernorm",),
        ),
    ),
}


@dataclass(eq=False)
class Ffn:
    """One feed-forward block of a model in memory.

    Args:
        stack: Name of its stack.
        layer: Number of its layer, from 0.
        up: Projection in; fused with the gate when ``fused``.
        down: Projection out.
        gate: The gate's own projection, or None.
        fused: Whether ``up`` holds gate and up, gate first.
        act: The activation.
        dropout: Module and attribute of the dropout on the hidden units, or None.
    """

    stack: str
    layer: int
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    fused: bool
    act: Callable[[Tensor], Tensor]
    dropout: tuple[nn.Module, str] | None

    @property
    def is_gated(self) -> bool:
        """Whether the block is down(σ(gate x) ⊙ up x)."""
        return self.fused or self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether the projections into the wide space have a bias, where r can go."""
        return getattr(self.gate if self.gate is not None else self.up, "bias", None) is not None

    @property
    def hidden_size(self) -> int:
        """Size of the block's input and output."""
        return projection_size(self.up)[0]

    @property
    def width(self) -> int:
        """Number of hidden units."""
        return projection_size(self.down)[0]


@dataclass
class Layout:
    """What the table says of a model in memory.

    Args:
        stacks: Stack name -> its row, in order.
        sizes: Stack name -> number of layers.
        ffns: All feed-forward blocks, in order.
        norms: ``stack.layer.norm.slot``, or ``stack.norm.embedding|final`` -> module.
    """

    stacks: dict[str, Stack]
    sizes: dict[str, int] = field(default_factory=dict)
    ffns: list[Ffn] = field(default_factory=list)
    norms: dict[str, nn.Module] = field(default_factory=dict)


def find_layout(model: nn.Module) -> Layout:
    """Finds a model's feed-forward blocks and norms.

    Args:
        model: A transformers model, with or without head.

    Raises:
        PatchError: The family has no row, or the model does not look as its row says.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise PatchError(
            f"no feed-forward blocks are known for the model type {model_type!r}",
            fix=f"use one of: {', '.join(FAMILIES)}",
        )
    body: nn.Module = getattr(model, "base_model", model)
    layout = Layout(stacks={})
    for stack in FAMILIES[model_type]:
        layers = _first(body, stack.layers)
        if layers is None:
            continue  # an encoder-only use of an encoder-decoder family
        layout.stacks[stack.name] = stack
        layout.sizes[stack.name] = len(layers)
        for number, layer in enumerate(layers):
            layout.ffns.append(_ffn(stack, number, layer, model_type))
            for slot, names in stack.norms.items():
                norm = _first(layer, names)
                if norm is not None:
                    layout.norms[f"{stack.name}.{number}.norm.{slot}"] = norm
        for slot, names in (("embedding", stack.embedding), ("final", stack.final)):
            norm = _first(body, names)
            if norm is not None:
                layout.norms[f"{stack.name}.norm.{slot}"] = norm
    if not layout.ffns:
        raise PatchError(f"this {type(model).__name__} has none of the layers of a {model_type} model")
    return layout


def projection_size(module: nn.Module) -> tuple[int, int]:
    """Returns (inputs, outputs) of a linear projection, ``nn.Linear`` or GPT-2's ``Conv1D``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored as (inputs, outputs), as in GPT-2's ``Conv1D``."""
    return type(module).__name__ == "Conv1D"


def config_of(config: Any, dotted: str) -> tuple[Any, str]:
    """Returns the (sub-)config and the field's own name for ``vision_config.intermediate_size`` and the like."""
    *parents, name = dotted.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def _ffn(stack: Stack, number: int, layer: nn.Module, model_type: str) -> Ffn:
    for shape in stack.ffn:
        up, down = _find(layer, shape.up), _find(layer, shape.down)
        gate = _find(layer, shape.gate) if shape.gate else None
        act = _attribute(layer, shape.act)
        if up is None or down is None or act is None or (shape.gate and gate is None):
            continue
        dropout = None
        if shape.dropout:
            owner, _, name = shape.dropout.rpartition(".")
            dropout = (layer.get_submodule(owner), name)
        return Ffn(stack.name, number, up, down, gate, shape.fused, act, dropout)
    raise PatchError(
        f"layer {number} of the {model_type} {stack.name} ({type(layer).__name__}) has no known feed-forward block"
    )


def _find(module: nn.Module, name: str) -> nn.Module | None:
    found = _attribute(module, name)
    return found if isinstance(found, nn.Module) else None


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = module[int(part)] if part.isdigit() and int(part) < len(module) else getattr(module, part, None)
        if module is None:
            return None
    return module


def _first(module: nn.Module, names: Names) -> Any:
    return next((found for name in names if (found := _find(module, name)) is not None), None)
