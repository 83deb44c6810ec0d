"""The table: where each family keeps its feed-forward blocks and norms, and which config fields hold the width.

Names are relative: stacks to the model without its head, everything else to one layer. Where a name changed
between versions of transformers, all of them are listed and the first that exists is used. A ``*`` stands for
every item of a module list. A new family is one row of FAMILIES.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from ticktune.errors import PatchError

Names = tuple[str, ...]
Norms = dict[str, Names]


@dataclass(frozen=True)
class Shape:
    """A feed-forward block of a layer.

    A ``*`` in its names stands for every item of a list of blocks: experts that are modules of their own.

    Args:
        up: The projection into the wide space; with ``fused`` it holds gate and up. Of experts: their module.
        down: The projection back.
        act: The activation, a module or attribute of the layer; ``=gelu``: that function of transformers.
        gate: The gate's projection, where it is a module of its own.
        fused: Which half of a fused ``up`` is the gate.
        conv: Depthwise convolution between ``up`` and ``act``.
        dropout: Dropout that the block applies to its hidden units.
        experts: Whether ``up`` is a module of experts, with one three-dimensional weight for all of them.
        width: Config field of the width, where it differs from the stack's; empty: the architecture fixes it.
        slot: Tells the blocks of one layer apart; of the shapes with one slot a layer has the first that fits.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused: Literal["gate first", "up first"] | None = None
    conv: str | None = None
    dropout: str | None = None
    experts: bool = False
    width: str | None = None
    slot: str = "ffn"


@dataclass(frozen=True)
class Stack:
    """A row of layers.

    Args:
        name: ``encoder`` or ``decoder``; the first part of every tensor's key.
        layers: The module list; none where the row holds nothing but ``aux``.
        ffn: Possible shapes of the feed-forward blocks.
        width: Config field of their width; None: the architecture fixes it, so nothing merges.
        norms: Slot -> name of the norm in each layer.
        bias: Config switch that gives the projections biases where they have none.
        embedding: The norm of the embeddings.
        final: The norm after the last layer.
        aux: Feed-forward blocks outside the layers that share the width: (module, shape in it). They get no
            tick, but must grow with the rest.
        shared: Config fields (number of groups, number of layers) of a family whose layers share a block.
        partial: Whether some layers have no feed-forward block.
        obstacle: Why there is no field of width, where more is known than that.
    """

    name: str
    layers: Names
    ffn: tuple[Shape, ...]
    width: str | None
    norms: Norms
    bias: str | None = None
    embedding: Names = ()
    final: Names = ()
    aux: tuple[tuple[str, Shape], ...] = ()
    shared: tuple[str, str] | None = None
    partial: bool = False
    obstacle: str = ""


# The shapes, about a dozen for all families.
_BERT = Shape("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_FC = Shape("fc1", "fc2", "activation_fn", dropout="activation_dropout")
_FC_PLAIN = Shape("fc1", "fc2", "activation_fn")
_MLP_FC = Shape("mlp.fc1", "mlp.fc2", "mlp.activation_fn")
_MLP_C = Shape("mlp.c_fc", "mlp.c_proj", "mlp.act")
_MLP_4H = Shape("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act")
_GLU = Shape("mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj")
_FUSED = Shape("mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", fused="gate first")
_WAV = Shape(
    "feed_forward.intermediate_dense",
    "feed_forward.output_dense",
    "feed_forward.intermediate_act_fn",
    dropout="feed_forward.intermediate_dropout",
)


def _experts(module: str, width: str) -> Shape:
    return Shape(module, module, f"{module}.act_fn", experts=True, width=width, slot="experts")


def _encoder(
    ffn: tuple[Shape, ...] = (_BERT,),
    attention: Names = ("attention.output.LayerNorm",),
    after: Names = ("output.LayerNorm",),
    **other: Any,
) -> tuple[Stack, ...]:
    """BERT and its kin: the norms follow attention and feed-forward block."""
    norms: Norms = {"attention": attention, "cross_attention": ("crossattention.output.LayerNorm",), "ffn": after}
    row: dict[str, Any] = {"layers": ("encoder.layer",), "width": "intermediate_size"}
    return (Stack(name="encoder", ffn=ffn, norms=norms, **{**row, "embedding": ("embeddings.LayerNorm",), **other}),)


def _vision(*ffn: Shape, **other: Any) -> tuple[Stack, ...]:
    """ViT and its kin: the norms stand before attention and feed-forward block."""
    row: dict[str, Any] = {
        "name": "encoder",
        "layers": ("layers", "encoder.layer"),
        "ffn": ffn or (_MLP_FC, _BERT),
        "width": "intermediate_size",
        "norms": {"attention": ("layernorm_before",), "ffn": ("layernorm_after",)},
        "final": ("layernorm",),
    }
    return (Stack(**{**row, **other}),)


def _tower(**other: Any) -> tuple[Stack, ...]:
    """A text or vision tower of CLIP and its kin."""
    norms: Norms = {"attention": ("layer_norm1",), "ffn": ("layer_norm2",)}
    return (Stack("encoder", ("encoder.layers",), (_MLP_FC,), "intermediate_size", norms, **other),)


def _decoder(
    *ffn: Shape,
    layers: Names = ("layers",),
    attention: str | Names = "input_layernorm",
    second: str | Names = "post_attention_layernorm",
    embedding: Names = (),
    final: str = "norm",
    width: str | None = "intermediate_size",
    bias: str | None = None,
    norms: Norms | None = None,
) -> tuple[Stack, ...]:
    """Llama and its kin; also GPT-2 and its kin under other names."""
    slots = {"attention": _names(attention), "ffn": _names(second), **(norms or {})}
    return (Stack("decoder", layers, ffn or (_GLU,), width, slots, bias, embedding, (final,)),)


def _names(names: str | Names) -> Names:
    return (names,) if isinstance(names, str) else names


def _gemma(norms: Norms | None = None) -> tuple[Stack, ...]:
    around: Norms = {
        "attention_post": ("post_attention_layernorm",),
        "ffn_post": ("post_feedforward_layernorm",),
        **(norms or {}),
    }
    return _decoder(second="pre_feedforward_layernorm", norms=around)


def _gpt(ffn: Shape, width: str) -> tuple[Stack, ...]:
    return _decoder(ffn, layers=("h",), attention="ln_1", second="ln_2", final="ln_f", width=width)


def _t5_stack(name: str, ffn_at: int, **norms: Names) -> Stack:
    block = f"layer.{ffn_at}.DenseReluDense"
    act, dropout = f"{block}.act", f"{block}.dropout"
    return Stack(
        name,
        (f"{name}.block",),
        (
            Shape(f"{block}.wi", f"{block}.wo", act, dropout=dropout),
            Shape(f"{block}.wi_1", f"{block}.wo", act, gate=f"{block}.wi_0", dropout=dropout),
        ),
        "d_ff",
        {"attention": ("layer.0.layer_norm",), **norms, "ffn": (f"layer.{ffn_at}.layer_norm",)},
        final=(f"{name}.final_layer_norm",),
    )


def _t5() -> tuple[Stack, ...]:
    return (_t5_stack("encoder", 1), _t5_stack("decoder", 2, cross_attention=("layer.1.layer_norm",)))


def _bart(ffn: Shape = _FC) -> tuple[Stack, ...]:
    """BART and its kin, Whisper and DETR too: two stacks with a width of their own."""
    stacks = []
    for name, cross in (("encoder", {}), ("decoder", {"cross_attention": ("encoder_attn_layer_norm",)})):
        norms: Norms = {"attention": ("self_attn_layer_norm",), **cross, "ffn": ("final_layer_norm",)}
        stacks.append(
            Stack(
                name,
                (f"{name}.layers",),
                (ffn,),
                f"{name}_ffn_dim",
                norms,
                embedding=(f"{name}.layernorm_embedding",),
                final=(f"{name}.layer_norm", f"{name}.layernorm"),
            )
        )
    return tuple(stacks)


def _wav() -> tuple[Stack, ...]:
    norms: Norms = {"attention": ("layer_norm",), "ffn": ("final_layer_norm",)}
    final: Names = ("encoder.layer_norm",)
    return (Stack("encoder", ("encoder.layers",), (_WAV,), "intermediate_size", norms, final=final),)


_QK: Norms = {"q": ("self_attn.q_norm",), "k": ("self_attn.k_norm",)}
_SEGFORMER_STAGES = {
    "layers": ("stages.*.blocks", "encoder.block.*"),
    "norms": {"attention": ("layernorm_before", "layer_norm_1"), "ffn": ("layernorm_after", "layer_norm_2")},
    "final": (),
}

FAMILIES: dict[str, tuple[Stack, ...]] = {
    # Encoders of text
    "bert": _encoder(),
    "roberta": _encoder(),
    "xlm-roberta": _encoder(),
    "camembert": _encoder(),
    "electra": _encoder(),
    "ernie": _encoder(),
    "deberta-v2": _encoder(),
    "mpnet": _encoder(attention=("attention.LayerNorm",)),
    "distilbert": _encoder(
        (Shape("ffn.lin1", "ffn.lin2", "ffn.activation"),),
        ("sa_layer_norm",),
        ("output_layer_norm",),
        layers=("transformer.layer",),
        width="hidden_dim",
    ),
    "albert": _encoder(
        (Shape("ffn", "ffn_output", "activation"),),
        ("attention.LayerNorm",),
        ("full_layer_layer_norm",),
        layers=("encoder.albert_layer_groups.*.albert_layers",),
        shared=("num_hidden_groups", "num_hidden_layers"),
    ),
    "modernbert": _encoder(
        (Shape("mlp.Wi", "mlp.Wo", "mlp.act", fused="gate first", dropout="mlp.drop"),),
        ("attn_norm",),
        ("mlp_norm",),
        layers=("layers",),
        bias="mlp_bias",
        embedding=("embeddings.norm",),
        final=("final_norm",),
    ),
    # Decoders with plain blocks
    "gpt2": _gpt(_MLP_C, "n_inner"),
    "gpt_neo": _gpt(_MLP_C, "intermediate_size"),
    "gptj": _gpt(Shape("mlp.fc_in", "mlp.fc_out", "mlp.act"), "n_inner"),
    "gpt_neox": _decoder(_MLP_4H, final="final_layer_norm"),
    "opt": _decoder(
        _FC_PLAIN,
        layers=("decoder.layers",),
        attention="self_attn_layer_norm",
        second="final_layer_norm",
        final="decoder.final_layer_norm",
        width="ffn_dim",
        bias="enable_bias",
    ),
    "bloom": _decoder(
        Shape("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.gelu_impl"),
        layers=("h",),
        embedding=("word_embeddings_layernorm",),
        final="ln_f",
        width=None,
    ),
    "falcon": _decoder(
        _MLP_4H,
        layers=("h",),
        attention=("input_layernorm", "ln_attn"),
        second=("post_attention_layernorm", "ln_mlp"),
        final="ln_f",
        width="ffn_hidden_size",
        bias="bias",
    ),
    "phi": _decoder(_MLP_FC, final="final_layernorm"),
    "starcoder2": _decoder(_MLP_C, bias="use_bias"),
    # Decoders with gated blocks
    "llama": _decoder(bias="mlp_bias"),
    "mistral": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(norms=_QK),
    "phi3": _decoder(_FUSED),
    "gemma": _decoder(),
    "gemma2": _gemma(),
    "gemma3_text": _gemma(_QK),
    "smollm3": _decoder(bias="mlp_bias"),
    "granite": _decoder(bias="mlp_bias"),
    "olmo2": _decoder(attention="post_attention_layernorm", second="post_feedforward_layernorm", norms=_QK),
    # Mixtures of experts
    "mixtral": _decoder(_experts("mlp.experts", "intermediate_size")),
    "qwen3_moe": _decoder(_experts("mlp.experts", "moe_intermediate_size"), _GLU, norms=_QK),
    "qwen2_moe": _decoder(
        _experts("mlp.experts", "moe_intermediate_size"),
        replace(
            _GLU,
            up="mlp.shared_expert.up_proj",
            down="mlp.shared_expert.down_proj",
            act="mlp.shared_expert.act_fn",
            gate="mlp.shared_expert.gate_proj",
            width="shared_expert_intermediate_size",
        ),
        _GLU,
    ),
    # Encoders with decoders
    "t5": _t5(),
    "mt5": _t5(),
    "bart": _bart(),
    "mbart": _bart(),
    "marian": _bart(),
    "pegasus": _bart(),
    "m2m_100": _bart(),
    # Images
    "vit": _vision(),
    "deit": _vision(),
    "beit": _vision(final=("layernorm", "pooler.layernorm")),
    "yolos": _vision(_BERT),
    "dinov2": _vision(
        _MLP_FC,
        replace(_MLP_FC, act="mlp.activation"),
        replace(_GLU, act="mlp.activation_fn"),
        replace(_GLU, act="=silu"),
        Shape("mlp.weights_in", "mlp.weights_out", "=silu", fused="gate first"),
        layers=("encoder.layer",),
        width="mlp_ratio",
        norms={"attention": ("norm1",), "ffn": ("norm2",)},
    ),
    "swin": _vision(
        Shape("mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
        Shape("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"),
        layers=("encoder.layers.*.blocks",),
        width="mlp_ratio",
        embedding=("embeddings.norm",),
    ),
    "segformer": _vision(
        replace(_MLP_FC, conv="mlp.dwconv.dwconv", dropout="mlp.dropout"),
        Shape(
            "mlp.dense1",
            "mlp.dense2",
            "mlp.intermediate_act_fn",
            conv="mlp.dwconv.dwconv",
            dropout="mlp.dropout",
        ),
        width="mlp_ratios",
        **_SEGFORMER_STAGES,
    ),
    "detr": _bart(replace(_MLP_FC, dropout="mlp.activation_dropout")),
    "clip_vision_model": _tower(embedding=("pre_layrnorm",), final=("post_layernorm",)),
    "clip_text_model": _tower(final=("final_layer_norm",)),
    "siglip_vision_model": _tower(
        final=("post_layernorm",),
        aux=(("head", replace(_FC_PLAIN, up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn")),),
    ),
    "siglip_text_model": _tower(final=("final_layer_norm",)),
    # Sound
    "wav2vec2": _wav(),
    "hubert": _wav(),
    "wavlm": _wav(),
    "whisper": _bart(),
    "audio-spectrogram-transformer": _vision(),
}


AS_LLAMA = ("mistral", "qwen2", "phi3")
"""Families that are a Llama under another name, with other switches."""


def llama_obstacle(config: Any) -> str:
    """Returns why a model of one of AS_LLAMA is no Llama all the same, or an empty string."""
    where = f"a {config.model_type} model"
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    slides = window is not None and getattr(config, "use_sliding_window", True) and kinds != {"full_attention"}
    if slides and window < config.max_position_embeddings:
        return (
            f"{where} with a sliding window of {window} tokens and {config.max_position_embeddings} positions is no "
            "Llama: a Llama attends to all positions"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default" or share not in (None, 1.0):
        return f"{where} with {kind} rotary positions on {share or 1:.0%} of each head is not known to be a Llama"
    return ""


@dataclass(eq=False)
class Ffn:
    """One feed-forward block of a model in memory.

    Args:
        stack: Name of its stack.
        layer: Number of its layer, from 0.
        slot: Which of the layer's blocks it is.
        up: Projection in; fused with the gate when ``fused``. Of experts: their module, as ``down``.
        down: Projection out.
        gate: The gate's own projection, or None.
        fused: Which half of ``up`` is the gate.
        conv: Depthwise convolution behind ``up``, or None.
        act: The activation.
        dropout: Module and attribute of the dropout on the hidden units, or None.
        experts: The module that routes tokens to the experts, where this is a block of experts.
        width_field: Config field of the width, dotted from the model's config; None: fixed.
        bias_field: Config switch that gives the projections biases.
        obstacle: Why there is no field of width, where more is known than that.
    """

    stack: str
    layer: int
    slot: str
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    fused: Literal["gate first", "up first"] | None
    conv: nn.Module | None
    act: Callable[[Tensor], Tensor]
    dropout: tuple[nn.Module, str] | None
    experts: nn.Module | None
    width_field: str | None
    bias_field: str | None
    obstacle: str = ""

    @property
    def key(self) -> str:
        """Prefix of its tick's tensors in an adapter."""
        return f"{self.stack}.{self.layer}.{self.slot}"

    @property
    def is_gated(self) -> bool:
        """Whether the block is down(σ(gate x) ⊙ up x)."""
        if self.experts is not None:
            return hasattr(self.up, "gate_up_proj")
        return self.fused is not None or self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether the projections into the wide space have a bias, where r can go."""
        return getattr(self.gate if self.gate is not None else self.up, "bias", None) is not None

    @property
    def hidden_size(self) -> int:
        """Size of the block's input and output."""
        return self._experts_shape[1] if self.experts is not None else projection_size(self.down)[1]

    @property
    def width(self) -> int:
        """Number of hidden units."""
        return self._experts_shape[2] if self.experts is not None else projection_size(self.down)[0]

    @property
    def count(self) -> int:
        """Number of experts; 1 for a block without."""
        return self._experts_shape[0] if self.experts is not None else 1

    @property
    def _experts_shape(self) -> tuple[int, int, int]:
        experts, hidden, width = self.down.get_parameter("down_proj").shape
        return experts, hidden, width

    @property
    def device(self) -> Any:
        """Where its weights are."""
        return next(self.down.parameters()).device


@dataclass
class Layout:
    """Where a model in memory has its blocks and norms.

    Args:
        stacks: Stack name -> its row, in order.
        sizes: Stack name -> number of layers.
        layers: Stack name -> its layers, in order; a module that stands for several of them, once for each.
        ffns: All feed-forward blocks that can have a tick, in order.
        aux: Blocks that only grow with the others.
        norms: ``stack.layer.norm.slot``, or ``stack.norm.embedding|final`` -> module.
        notes: What a person should know: which families were found by proof.
        as_llama: Whether the whole model can be written as a Llama; see :data:`AS_LLAMA`.
    """

    stacks: dict[str, Stack] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    layers: dict[str, list[nn.Module]] = field(default_factory=dict)
    ffns: list[Ffn] = field(default_factory=list)
    aux: list[Ffn] = field(default_factory=list)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    as_llama: bool = False


@dataclass
class Body:
    """A model, or one inside another, that has a config of its own.

    Args:
        model: The module.
        config: Its config.
        path: Where the config stands in the outermost one, dotted; empty for that one itself, None if nowhere.
        name: What its stacks are called after, empty for the outermost.
    """

    model: nn.Module
    config: Any
    path: str | None
    name: str

    @property
    def model_type(self) -> str:
        """The family's name in transformers."""
        return str(self.config.model_type)

    @property
    def module(self) -> nn.Module:
        """The model without its head."""
        found: nn.Module = getattr(self.model, "base_model", self.model)
        return found

    def field(self, name: str | None) -> str | None:
        """A config field of this body, dotted from the outermost config."""
        if name is None or self.path is None:
            return None
        return f"{self.path}.{name}" if self.path else name


def find_bodies(model: nn.Module) -> list[Body]:
    """Returns the model and the models of other families inside it: towers, backbones, encoders.

    Raises:
        PatchError: It is no transformers model.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise PatchError(f"a {type(model).__name__} has no config, so it is no transformers model")
    outermost = Body(model, config, "", "")
    return [outermost, *_bodies_inside(outermost)]


def add_stacks(layout: Layout, body: Body, stacks: tuple[Stack, ...]) -> None:
    """Finds what rows say in a model and adds it to a layout.

    Args:
        layout: Grows.
        body: The model.
        stacks: Its rows.

    Raises:
        PatchError: The model does not look as its rows say.
    """
    found = [(stack, layers) for stack in stacks if (layers := _layers(body.module, stack.layers))]
    for stack, layers in found:
        name = stack.name if not body.name else body.name if len(found) == 1 else f"{body.name}_{stack.name}"
        while name in layout.stacks:
            name += "_"
        layout.stacks[name] = stack
        layout.sizes[name] = len(layers)
        layout.layers[name] = layers
        for number, layer in enumerate(layers):
            blocks = list(_ffns(stack, name, number, layer, body))
            if not blocks and not stack.partial:
                raise PatchError(
                    f"layer {number} of the {body.model_type} {name} ({type(layer).__name__}) has no known "
                    "feed-forward block"
                )
            if len({id(ffn.down) for ffn in blocks if ffn.experts is None}) < sum(f.experts is None for f in blocks):
                raise PatchError(
                    f"layer {number} of the {body.model_type} {name} ({type(layer).__name__}) has one feed-forward "
                    "block under two names"
                )
            layout.ffns += blocks
            for slot, names in stack.norms.items():
                _add_norm(layout, f"{name}.{number}.norm.{slot}", _norm(layer, names))
        for slot, names in (("embedding", stack.embedding), ("final", stack.final)):
            _add_norm(layout, f"{name}.norm.{slot}", _norm(body.module, names))
        layout.aux += _aux(stack, name, body)
    for stack in stacks:
        if not stack.layers:
            layout.aux += _aux(stack, stack.name, body)


def _add_norm(layout: Layout, key: str, norm: nn.Module | None) -> None:
    """Adds a norm; one that layers or stacks share, once."""
    if norm is not None and not any(other is norm for other in layout.norms.values()):
        layout.norms[key] = norm


def _aux(stack: Stack, name: str, body: Body) -> Iterator[Ffn]:
    for path, shape in stack.aux:
        owner = _find(body.module, path)
        block = None if owner is None else _ffn(replace(shape, slot="aux"), name, -1, owner, body, stack)
        if block is not None:
            yield block


def projection_size(module: nn.Module) -> tuple[int, int]:
    """Returns (inputs, outputs) of a linear projection, ``nn.Linear`` or GPT-2's ``Conv1D``."""
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    # Not the weight's shape: a quantised weight is packed.
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored as (inputs, outputs), as in GPT-2's ``Conv1D``."""
    return type(module).__name__ == "Conv1D"


def config_of(config: Any, dotted: str) -> tuple[Any, str]:
    """Returns the (sub-)config and the field's own name for ``vision_config.intermediate_size`` and the like."""
    *parents, name = dotted.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


@dataclass(eq=False)
class Shared:
    """Blocks that layers shared before each got its own copy.

    Args:
        owner: The module that holds the list of blocks.
        leaf: The list's name in it.
        path: The list's name in the model.
        blocks: The list as it was.
        config: The model's config.
        field: Its field for the number of blocks.
    """

    owner: nn.Module
    leaf: str
    path: str
    blocks: nn.ModuleList
    config: Any
    field: str

    def restore(self) -> None:
        """Lets the layers share their blocks again."""
        setattr(self.owner, self.leaf, self.blocks)
        setattr(self.config, self.field, len(self.blocks))

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the model as they were."""
        inside = f"{self.path}."
        yield from ((n, p) for n, p in model.named_parameters() if not n.startswith(inside))
        yield from ((inside + n, p) for n, p in self.blocks.named_parameters())


def unshare_layers(model: nn.Module) -> Shared:
    """Gives every layer its own copy of a block that layers share, in place; the function stays the same.

    Returns:
        What undoes it.

    Raises:
        PatchError: The family shares nothing.
    """
    body = find_bodies(model)[0]
    stack = next((s for s in FAMILIES.get(body.model_type, ()) if s.shared is not None), None)
    if stack is None or stack.shared is None:
        raise PatchError(f"the layers of a {body.model_type} model share no block", fix="leave ticks.unshare at false")
    groups_field, layers_field = stack.shared
    path = stack.layers[0].partition(".*")[0]
    blocks, count = body.module.get_submodule(path), getattr(body.config, layers_field)
    assert isinstance(blocks, nn.ModuleList)
    # The model's own rule: layer i uses block int(i / (layers / blocks)).
    used = [int(i / (count / len(blocks))) for i in range(count)]
    own = [blocks[b] if i == used.index(b) else copy.deepcopy(blocks[b]) for i, b in enumerate(used)]
    owner_path, _, leaf = path.rpartition(".")
    owner = body.module.get_submodule(owner_path)
    prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is body.module)
    shared = Shared(owner, leaf, prefix + path, blocks, body.config, groups_field)
    setattr(owner, leaf, nn.ModuleList(own))
    setattr(body.config, groups_field, count)
    return shared


def _bodies_inside(outer: Body) -> Iterator[Body]:
    from transformers import PreTrainedModel

    seen: list[str] = []
    names: set[str] = set()
    for path, module in outer.model.named_modules():
        if not path or any(path.startswith(f"{inner}.") for inner in seen) or not isinstance(module, PreTrainedModel):
            continue
        if module.config.model_type == outer.model_type:
            continue
        seen.append(path)
        where = _config_path(outer.config, module.config, path)
        short = (where or path).rsplit(".", 1)[-1].removesuffix("_config")
        name = f"{outer.name}_{short}" if outer.name else short
        while name in names:
            name += "_"
        names.add(name)
        inner = Body(module, module.config, None if where is None else outer.field(where), name)
        yield inner
        yield from _bodies_inside(inner)


def _config_path(config: Any, wanted: Any, module_path: str) -> str | None:
    nested = {k: v for k, v in vars(config).items() if getattr(v, "model_type", None) == wanted.model_type}
    same = [k for k, v in nested.items() if v is wanted] or list(nested)
    if len(same) > 1:
        parts = module_path.split(".")
        same = [k for k in same if k.removesuffix("_config") in parts] or same
    return same[0] if same else None


def _ffns(stack: Stack, name: str, number: int, layer: nn.Module, body: Body) -> Iterator[Ffn]:
    slots: set[str] = set()
    for shape in stack.ffn:
        if shape.slot in slots:
            continue
        for one in _unstarred(shape, layer):
            if (found := _ffn(one, name, number, layer, body, stack)) is not None:
                slots.add(shape.slot)
                yield found


def _unstarred(shape: Shape, layer: nn.Module) -> Iterator[Shape]:
    """A shape for each item of the list of blocks that its star stands for; itself where it has none."""
    path, star, _ = shape.up.partition(".*")
    if not star:
        yield shape
        return
    found = _find(layer, path)
    if not isinstance(found, nn.ModuleList | nn.ModuleDict):
        return
    for number, (child, _) in enumerate(items_of(found)):
        names = {key: getattr(shape, key) for key in ("up", "down", "act", "gate", "conv", "dropout")}
        named: dict[str, Any] = {key: value.replace("*", child) for key, value in names.items() if value is not None}
        yield replace(shape, **named, slot=f"{shape.slot}.{number}")


def _ffn(shape: Shape, name: str, number: int, layer: nn.Module, body: Body, stack: Stack) -> Ffn | None:
    up, down, act = _find(layer, shape.up), _find(layer, shape.down), _activation(layer, shape.act)
    gate = _find(layer, shape.gate) if shape.gate else None
    conv = _find(layer, shape.conv) if shape.conv else None
    if up is None or down is None or act is None or (shape.gate and gate is None) or (shape.conv and conv is None):
        return None
    experts = None
    if shape.experts:
        if not any(p.ndim == 3 for p in up.parameters(recurse=False)):
            return None
        experts = _find(layer, shape.up.rpartition(".")[0])
    dropout = None
    if shape.dropout:
        owner, _, leaf = shape.dropout.rpartition(".")
        dropout = (layer.get_submodule(owner), leaf)
    return Ffn(
        name,
        number,
        shape.slot,
        up,
        down,
        gate,
        shape.fused,
        conv,
        act,
        dropout,
        experts,
        body.field((stack.width if shape.width is None else shape.width) or None),
        # Experts have no place for biases, whatever the switch gives to other blocks.
        body.field(stack.bias)
        if stack.bias and not shape.experts and getattr(body.config, stack.bias, None) is False
        else None,
        stack.obstacle,
    )


def items_of(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules in a list; a dropout that some keep among their experts is none of these."""
    return [(name, child) for name, child in container.named_children() if any(True for _ in child.parameters())]


def _activation(layer: nn.Module, name: str) -> Any:
    if not name.startswith("="):
        return _attribute(layer, name)
    from transformers.activations import ACT2FN

    return ACT2FN[name[1:]]


def _layers(body: nn.Module, names: Names) -> list[nn.Module]:
    for name in names:
        found = list(_expand(body, name))
        if found:
            return found
    return []


def _expand(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The items of the list that a name with stars means."""
    head, star, rest = name.partition(".*")
    found = _find(module, head)
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        return
    if not star:
        yield from found
    for item in found if star else ():
        if rest:
            yield from _expand(item, rest.removeprefix("."))
        elif isinstance(item, nn.ModuleList | nn.Sequential):
            yield from item


def _find(module: nn.Module, name: str) -> nn.Module | None:
    found = _attribute(module, name) if name else module
    return found if isinstance(found, nn.Module) else None


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        if part.isdigit() and isinstance(module, nn.ModuleList | nn.Sequential):
            module = module[int(part)] if int(part) < len(module) else None
        else:
            module = getattr(module, part, None)
        if module is None:
            return None
    return module


def _norm(module: nn.Module, names: Names) -> nn.Module | None:
    """The first that exists and has parameters: an nn.Identity stands where a family leaves a norm out."""
    found = (_find(module, name) for name in names)
    return next((norm for norm in found if norm is not None and next(norm.parameters(False), None) is not None), None)
