"""Small random models of the same class as a given one, and inputs that they take.

The detector traces these instead of the user's model: the same code with few, narrow layers runs in float64 in a
moment. Only the sizes differ; every switch of the config stays as it is. There are several ways to make a config
small, because no one of them fits every class; which of them fits is found by trying.
"""

import copy
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ticktune.errors import first_line

Way = Literal["narrow", "scaled", "short", "filled", "large images"]

HIDDEN, HEADS, HEAD_DIM, WIDTH = 64, 4, 16, 96
_VOCABULARY, _POSITIONS, _LENGTH, _ROWS = 128, 64, 8, 2

# Config field -> its small value. What a field is not named here keeps its value, or is made smaller by a rule
# of _by_rule. All hidden sizes are one number, so that towers, projections and heads still fit each other.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "encoder_hidden_size",
            "decoder_hidden_size", "text_hidden_size", "vision_hidden_size", "audio_hidden_size", "out_hidden_size",
            "output_hidden_size", "projection_dim", "projection_size", "word_embed_proj_dim", "fpn_hidden_size",
            "cross_attention_hidden_size", "embedding_dim", "backbone_hidden_size", "output_dim", "hidden_dim",
            "encoder_hidden_dim", "hidden_size_per_layer_input", "attention_hidden_size", "emb_dim",
            "projector_hidden_size", "model_dim", "kv_dim", "width", "decoder_hidden_dim", "vision_embed_dim",
            "memory_attention_hidden_size", "memory_encoder_hidden_size", "pooler_hidden_size", "proj_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
            "encoder_num_heads", "decoder_num_heads", "decoder_num_attention_heads", "num_attn_heads",
            "encoder_num_attention_heads", "attention_heads", "index_n_heads", "num_self_attention_heads",
            "num_cross_attention_heads", "linear_num_value_heads", "linear_num_key_heads", "linear_num_heads",
            "cross_num_attention_heads", "memory_attention_num_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim", "d_kv", "d_head", "attention_head_dim", "attention_head_size", "v_head_dim",
            "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "linear_key_head_dim",
            "linear_value_head_dim", "linear_head_dim", "global_head_dim", "swa_head_dim", "rotary_dim",
            "kv_lora_rank", "q_lora_rank", "rope_head_dim", "num_pos_feats",
        ),
        HEAD_DIM,
    ),
    "qk_head_dim": 2 * HEAD_DIM,
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "mlp_dim", "d_ff", "n_inner", "encoder_ffn_dim", "ffn_hidden_size",
            "encoder_intermediate_size", "dim_feedforward", "mlp_hidden_size", "block_ff_dim", "d_inner",
            "ffn_intermediate_size", "encoder_feedforward_dim", "feed_forward_dim", "dense_intermediate_size",
            "feedforward_dim", "hidden_mlp_dim", "inner_dim", "feedforward_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        ("decoder_ffn_dim", "decoder_intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size",
         "intermediate_size_mlp", "expert_intermediate_size", "decoder_feedforward_dim"),
        WIDTH + 16,
    ),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
        WIDTH + 32,
    ),
    "num_mel_bins": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
}  # fmt: skip
# Numbers of things that have no part in the sizes, small in every way.
_COUNTS: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "n_group",
         "num_expert_group", "moe_top_k", "n_expert_group"),
        2,
    ),
    **dict.fromkeys(("topk_group", "n_limited_groups", "num_hash_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"),
        _POSITIONS,
    ),
    "vocab_size": _VOCABULARY,
    "num_queries": 10,
    "num_labels": 2,
    "prediction_length": 4,
    "context_length": 16,
}  # fmt: skip
# What a config may leave open and a model of it wants all the same.
_FILLED = {
    **_COUNTS, "head_dim": HEAD_DIM, "num_key_value_heads": 2, "pad_token_id": 1, "image_token_id": 5,
    "image_token_index": 5,
}  # fmt: skip
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads")
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
    "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
    "num_mem_blocks", "e_layers", "d_layers", "num_blocks", "memory_attention_num_layers", "n_transformer_layers",
)  # fmt: skip
_MOST_LAYERS = 6
_PIXELS, _PATCH = 224, 16
_MANY_PIXELS = 512 * 512  # of which one image is enough
_LARGEST_DIVISOR = 16
_LARGEST = 150_000_000  # parameters of a small model
_AS_THEY_ARE = ("num_feat_extract_layers", "num_kv_shared_layers", "max_window_layers")
# Of every how many layers one is of another kind.
_PERIOD = re.compile(r"_(layer_period|layer_interval|sparse_step|n_layers|frequency)$")
_INDICES = re.compile(r"ind(ex|ices|exes)|layers|layer_ids")
# What is a size or a number of heads and may be divided; the second is not, or is one that the data prescribe.
_WIDTH = re.compile(r"size|dim|heads?$|width|d_model|n_embd|inner|d_ff|channels|n_head|_rank|filters")
_NO_WIDTH = re.compile(
    r"head_dim|d_head|head_size|d_kv|patch|image|img|window|kernel|vocab|chunk|conv|block_size|max_|position|temporal"
    r"|spatial|crop|codebook|pool|type|num_channels|in_channels|stride|state|group|mel|sample|batch|rotary|rope|input"
)


def small_models(cls: type[nn.Module], config: Any) -> Iterator[nn.Module]:
    """Builds small random models of a class in each way that works, the best for a proof first.

    The last ones are float32: some classes mix float32 into what they compute and do not run in float64.

    Args:
        cls: A class of transformers.
        config: The config of the large model; it is not changed.

    Raises:
        ValueError: None can be built, and why.
    """
    reasons: list[Exception] = []
    built = False
    for dtype in (torch.float64, torch.float32):
        for way in _ways(config):
            try:
                model = build_small(cls, shrink(config, way, dtype=dtype), dtype=dtype)
            except Exception as error:  # noqa: BLE001 - any class of any version may stand here
                reasons.append(error)
                continue
            built = True
            yield model
    if not built:
        raise ValueError(_build_error(cls, config) or first_line(reasons[0])) from reasons[0]


def _build_error(cls: type[nn.Module], config: Any) -> str:
    """Why the class builds no model of the config as it is, or an empty string."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            cls(copy.deepcopy(config))
    except Exception as error:  # noqa: BLE001 - any class of any version may stand here
        return f"transformers itself builds no model of this config: {first_line(error)}"
    return ""


def _ways(config: Any) -> tuple[Way, ...]:
    scaled: tuple[Way, ...] = ("scaled",) if _divisor(config) > 1 else ()
    return ("narrow", *scaled, "short", "filled", "large images")


def shrink(config: Any, way: Way = "narrow", *, dtype: torch.dtype = torch.float64) -> Any:
    """Returns a copy of a transformers config with few, narrow layers; nested configs too.

    Every kind of layer that per-layer lists name is kept once, so a model of dense and sparse layers keeps both.

    Args:
        config: Is not changed.
        way: ``narrow``: all sizes become the same few numbers; ``scaled``: they are divided by one number, so
            their ratios stay; ``short``: they stay, and only the numbers of layers and tokens fall; ``filled``:
            narrow, and numbers that are None in the config get a value; ``large images``: short, and images
            are as large as they were.
        dtype: Of the model that will be built.
    """
    config = copy.deepcopy(config)
    divisor = _divisor(config) if way == "scaled" else 1
    for part in _parts(config):
        _Shrinking(part, way, divisor).apply(dtype)
    return config


def build_small(cls: type[nn.Module], config: Any, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Builds a random model of a class from a shrunk config, in evaluation mode.

    Experts are computed one by one, as the grouped kernels take no float64.

    Raises:
        ValueError: It is not small: its config has sizes that no rule of this file knows.
    """
    if hasattr(config, "validate"):
        config.validate()  # what does not fit together here could not be saved and loaded
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > _LARGEST:
        raise ValueError(f"it would still have {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Zeros, as some models start their gates and norms, would hide what is computed.
                if not parameter.any():
                    parameter.normal_(0, 0.1)
    for part in _parts(model.config):
        part._experts_implementation = "eager"
        part._attn_implementation = "eager"
        if hasattr(part, "use_cache"):
            part.use_cache = False  # a cache has no part in what is computed
    return model.requires_grad_(False)


def example_inputs(model: nn.Module, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Makes random keyword arguments that a model's forward may take: token ids, pixels, audio.

    Args:
        model: A transformers model.
        seed: Of the values.

    Returns:
        Possible arguments, the likeliest first: a model of text and images runs on text alone or wants both.
        They are of the model's own floating dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(model.parameters())
    names = inspect.signature(model.forward).parameters
    found = {}
    for name, make in _INPUTS.items():
        if name in names and (value := make(model.config, names, generator)) is not None:
            dtype = first.dtype if value.is_floating_point() else value.dtype
            found[name] = value.to(first.device, dtype)
    text = {name: value for name, value in found.items() if name.endswith("_ids") or name == "bbox"}
    # Only beside what works without: a decoder alone, as most are, would attend to what it has no weights for.
    crossed = {name: found.pop(name) for name in ("encoder_hidden_states",) if name in found}
    needed = [n for n, p in names.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    main = getattr(model, "main_input_name", None)
    masks = {name: value for name, value in found.items() if name.endswith("mask")}
    plain = {name: value for name, value in found.items() if name not in masks}
    choices = [text, {name: found[name] for name in needed if name in found}, plain, found, {**text, **masks}]
    choices += [{main: found[main]} if main in found else {}, {n: v for n, v in found.items() if n not in text}]
    choices += [{**text, name: found[name]} for name in found if name not in text]
    choices += [{**choice, **crossed} for choice in (text, plain) if crossed]
    choices = [choice for choice in choices if choice.keys() - masks.keys() and set(needed) <= choice.keys()]
    return _unique([*choices, *(other for choice in choices for other in _other_shapes(choice))])


def _other_shapes(choice: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same with one more dimension for images or channels, or with time last."""
    for name in ("pixel_values", "input_features", "input_values"):
        if name not in choice:
            continue
        value = choice[name]
        yield {**choice, name: value.unsqueeze(1)}
        if name == "pixel_values":
            yield {**choice, name: torch.stack([value, value.flip(0)], 1)}
        elif value.ndim == 3:
            yield {**choice, name: value.transpose(1, 2)}


def _unique(choices: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    seen: dict[str, dict[str, Tensor]] = {}
    for choice in choices:
        seen.setdefault(str(sorted((name, value.shape) for name, value in choice.items())), choice)
    return list(seen.values())


def _parts(config: Any) -> Iterator[Any]:
    """The config and every config nested in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def layer_counts(config: Any) -> list[tuple[str, int]]:
    """The entries of a config, and of those nested in it, that count layers."""
    return [(k, v) for part in _parts(config) for k, v in vars(part).items() if k in _LAYERS and type(v) is int]


class _Shrinking:
    """Makes one config small, in place.

    Args:
        config: Without those nested in it.
        way: See :func:`shrink`.
        divisor: Of the way ``scaled``.
    """

    def __init__(self, config: Any, way: Way, divisor: int) -> None:
        self._config, self._way, self._divisor = config, way, divisor
        self._is_narrow = way in ("narrow", "filled")
        self._entries = {k: v for k, v in vars(config).items() if not k.startswith("_")}
        self._layers = next((n for k in _LAYERS if isinstance(n := self._entries.get(k), int) and n > 0), 0)
        spec = getattr(config, "_heterogeneity_spec", None)
        self._overrides: dict[int, dict[str, Any]] = {} if spec is None else dict(spec.per_layer_overrides)
        self._kept = self._kinds()
        # Heads that differ by stage go with sizes that do, and these no rule of one size for all can know.
        self._has_stages = any(
            isinstance(value, list | tuple) and (name in ("num_heads", "depths") or "per_stage" in name)
            for name, value in self._entries.items()
        )

    def apply(self, dtype: torch.dtype) -> None:
        config = self._config
        if hasattr(config, "dtype"):
            config.dtype = dtype
        if self._overrides:
            config.per_layer_config = None  # sizes of single layers; back below
        self._shrink_stages()
        for name, value in self._entries.items():
            if name in ("stage_names", "dtype"):
                continue
            small = self._small(name, value)
            if small is not value:
                _set(config, name, small)
        if self._overrides:
            config.per_layer_config = {
                new: {name: self._small(name, value) for name, value in self._overrides[old].items()}
                for new, old in enumerate(self._kept)
                if old in self._overrides
            }

    def _shrink_stages(self) -> None:
        """A backbone names its stages, and others ask for some of them."""
        names = self._entries.get("stage_names")
        if not isinstance(names, list) or not self._layers or len(names) != self._layers + 1:
            return
        old = list(getattr(self._config, "_out_indices", None) or [])
        self._config.stage_names = names[: len(self._kept) + 1]
        # As many as before where there are as many: their number may be a size elsewhere.
        count = max(1, min(len(old), len(self._kept)))
        indices = list(range(len(self._kept) + 1 - count, len(self._kept) + 1))
        self._config._out_indices = indices
        self._config._out_features = [self._config.stage_names[i] for i in indices]

    def _kinds(self) -> list[int]:
        """Numbers of the layers that are kept: the first of each kind that lists and periods tell apart."""
        count = self._layers
        if count <= 4:
            return list(range(count))
        signals = [list(v) for v in self._entries.values() if isinstance(v, list | tuple) and len(v) == count]
        signals += [[i in v for i in range(count)] for k, v in self._entries.items() if self._is_indices(k, v)]
        if self._overrides:
            signals.append([repr(self._overrides.get(i)) for i in range(count)])
        periods = [v for k, v in self._entries.items() if _PERIOD.search(k) and type(v) is int and 1 < v < count]
        if periods and not signals:
            return list(range(min(math.lcm(*periods), 8)))
        seen: dict[str, int] = {}
        for number, kind in enumerate(zip(*signals, strict=True) if signals else ()):
            seen.setdefault(repr(kind), number)
        kept = sorted(seen.values())[:_MOST_LAYERS]
        return kept if len(kept) > 1 else [0, 1]

    def _is_indices(self, name: str, value: Any) -> bool:
        """Whether an entry is a list of numbers of layers."""
        if not isinstance(value, list | tuple) or not value or not all(type(v) is int for v in value):
            return False
        is_rising = list(value) == sorted(set(value)) and 0 <= value[0] and value[-1] < self._layers
        return is_rising and len(value) < self._layers and _INDICES.search(name) is not None

    def _small(self, name: str, value: Any) -> Any:
        if value is None and self._way == "filled":
            return _FILLED.get(name)
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if isinstance(value, list | tuple):
            return self._small_list(name, value)
        if isinstance(value, dict) and "mrope_section" in value and self._is_narrow:
            return {**value, "mrope_section": self._sections(value)}
        if isinstance(value, int):
            return self._small_int(name, value)
        return value

    def _small_list(self, name: str, value: Any) -> Any:
        if self._layers > 4 and len(value) == self._layers:
            return type(value)(value[i] for i in self._kept)
        if self._layers > 4 and self._is_indices(name, value):
            return type(value)(new for new, old in enumerate(self._kept) if old in value) or type(value)([0])
        if name in ("depths", "num_block_repeats") and all(type(v) is int for v in value):
            return type(value)(min(v, 2) for v in value)
        return value

    def _sections(self, rope: dict[str, Any]) -> list[int]:
        """Sections of a rotary embedding: they add up to half of the head's size."""
        pairs, parts = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2, len(rope["mrope_section"])
        return [pairs - (parts - 1) * (pairs // parts)] + [pairs // parts] * (parts - 1)

    def _small_int(self, name: str, value: int) -> int:
        if name in _LAYERS and value > 2:
            return len(self._kept) if value == self._layers else 2
        if name in _COUNTS:
            return min(value, _COUNTS[name])
        if self._way == "scaled" and name in _KEY_VALUE_HEADS:
            return value // math.gcd(value, self._divisor)
        if self._way == "scaled" and _is_width(name) and value % self._divisor == 0:
            return value // self._divisor
        if self._is_narrow and not self._has_stages:
            if name.endswith("groups") and value == self._entries.get("hidden_size"):
                return min(value, HIDDEN)  # a depthwise convolution
            if name in _KEY_VALUE_HEADS:
                heads = self._entries.get("num_attention_heads", value)
                return HEADS if value == heads else 1 if value == 1 else 2
            if name in _SIZES:
                return value if value <= 0 else _SIZES[name] if name in _EXACT else min(value, _SIZES[name])
            if name.endswith(("intermediate_size", "ffn_dim", "mlp_dim")):
                return min(value, WIDTH)
            if name.endswith(("hidden_size", "hidden_dim", "embed_dim")):
                return min(value, HIDDEN)
            if name == "image_size" and isinstance(patch := self._entries.get("patch_size"), int):
                return min(value, 4 * patch)
        if name == "image_size" and self._way != "large images":
            return min(value, _PIXELS)
        if name == "image_embedding_size" and self._way != "large images":
            return min(value, _PIXELS // int(self._entries.get("patch_size", _PATCH)))
        return _by_rule(name, value)


_EXACT = frozenset(name for name, size in _SIZES.items() if size in (HIDDEN, HEADS, HEAD_DIM, 2 * HEAD_DIM))


def _by_rule(name: str, value: int) -> int:
    if name.endswith(("_token_id", "_token_index")) and value >= _VOCABULARY:
        return value % (_VOCABULARY // 2) + 8
    if "vocab" in name and value > _VOCABULARY:
        return _VOCABULARY
    if name.endswith(("_layers", "_depth")) and value > 2 and name not in _AS_THEY_ARE:
        return 2
    return value


def _is_width(name: str) -> bool:
    return _WIDTH.search(name) is not None and _NO_WIDTH.search(name) is None


def _divisor(config: Any) -> int:
    """What all hidden sizes and numbers of heads of a config can be divided by, with two heads left."""
    found = 0
    for part in _parts(config):
        for name, value in vars(part).items():
            if type(value) is not int or value < 2 or name.startswith("_") or not _is_width(name):
                continue
            if name in _KEY_VALUE_HEADS:
                continue  # they may be few, and are divided as far as they can be
            if re.search(r"heads$|n_head$", name):
                found = math.gcd(found, max(1, value // 2))
            elif name in ("hidden_size", "d_model", "n_embd", "embed_dim"):
                found = math.gcd(found, value)
    return max(math.gcd(found, _LARGEST_DIVISOR), 1)


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (TypeError, ValueError):
        return  # strict configs refuse a value of another type; then it stays as it is
    except Exception as error:
        if "Validation" not in type(error).__name__:
            raise


def _ids(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    vocabulary = vocabulary if isinstance(vocabulary, int) else _VOCABULARY // 2
    ids = torch.randint(4, max(5, vocabulary - 1), (_ROWS, _LENGTH), generator=generator)
    # Placeholders of images and sounds would ask for these.
    special = {
        token
        for part in _parts(config)
        for name, value in vars(part).items()
        if name.endswith(("_token_id", "_token_index"))
        for token in (value if isinstance(value, list | tuple) else [value])
    }
    for token in special:
        if isinstance(token, int):
            ids[ids == token] = next(i for i in range(4, vocabulary) if i not in special)
    eos = getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        ids[:, -1] = eos
    return ids


def _mask(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, _LENGTH, dtype=torch.long)


def _find(config: Any, *names: str) -> Any:
    for part in _parts(config):
        for name in names:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return None


def _number(config: Any, default: int, *names: str) -> int:
    value = _find(config, *names)
    return value if isinstance(value, int) else default


def _pixels(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    if _GRIDS & set(names):
        return _patches(config, names, generator)
    size = _find(config, "image_size", "input_size", "img_size", "pretrain_image_size")
    size = 224 if size is None else size
    height, width = (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)
    channels = _number(config, 3, "num_channels", "in_chans", "in_channels", "image_channels")
    rows = _ROWS if height * width <= _MANY_PIXELS or "input_ids" in names else 1
    shape: tuple[int, ...] = (rows, channels, height, width)
    if "aspect_ratio_ids" in names:
        shape = (_ROWS, 1, _tiles(config), channels, height, width)
    frames = _find(config, "num_frames", "frames_per_clip", "frame_num")
    if isinstance(frames, int) and "input_ids" not in names:
        shape = (_ROWS, frames, channels, height, width)
    return torch.randn(shape, generator=generator)


_GRIDS = {"grid_thw", "image_grid_thw", "grid_thws", "target_sizes", "spatial_shapes"}
_SIDE = 4  # patches of an image that is given as a row of patches


def _patches(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    """Images of models that take them as one row of patches, with their grids beside."""
    patch = _number(config, 14, "patch_size", "spatial_patch_size")
    channels = _number(config, 3, "in_channels", "num_channels", "in_chans")
    size = channels * _number(config, 1, "temporal_patch_size") * patch**2
    return torch.randn(_ROWS * _SIDE**2, size, generator=generator)


def _tiles(config: Any) -> int:
    """Parts that an image is cut into."""
    return _number(config, 4, "max_num_tiles")


def _ratio(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, 1, dtype=torch.long)


def _ratio_mask(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, 1, _tiles(config), dtype=torch.long)


def _tile_mask(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, _LENGTH, 1, _tiles(config), dtype=torch.long) if "aspect_ratio_ids" in names else None


def _states(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    """What another tower gives to a text model that attends to it."""
    size = _number(config, HIDDEN, "hidden_size", "d_model")
    return torch.randn(_ROWS, _LENGTH, size, generator=generator)


def _encoder_states(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    """What an encoder gives to a decoder, which may have another size."""
    own = getattr(config, "encoder_hidden_size", None)
    size = own if isinstance(own, int) else _number(config, HIDDEN, "hidden_size", "d_model")
    return torch.randn(_ROWS, _LENGTH, size, generator=generator)


def _grid(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.tensor([[1, _SIDE, _SIDE]] * _ROWS)


def _waves(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    if (bins := _find(config, "num_mel_bins")) is not None and _find(config, "max_length") is not None:
        return torch.randn(_ROWS, int(_find(config, "max_length")), int(bins), generator=generator)
    return torch.randn(_ROWS, 4000, generator=generator)


def _features(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    bins = _find(
        config,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "input_size",
        "feature_projection_input_dim",
    )
    if not isinstance(bins, int):
        return None
    return torch.randn(_ROWS, _frames(config), bins, generator=generator)


def _frames(config: Any) -> int:
    """Frames of sound; models with positions for them want twice as many, which their convolutions halve."""
    positions = _find(config, "max_source_positions")
    return 2 * positions if isinstance(positions, int) else 64


def _features_mask(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, _frames(config), dtype=torch.long)


def _image_mask(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.ones(_ROWS, _LENGTH, 1, dtype=torch.long)


def _boxes(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.zeros(_ROWS, _LENGTH, 4, dtype=torch.long)


def _series(features: str) -> Any:
    """Makes values of time series: (rows, time) or with the number of features of a config field behind."""

    def make(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
        lags = _find(config, "lags_sequence") or [0]
        time = _number(config, 16, "context_length") + max(lags)
        shape = (_ROWS, time, _number(config, 1, features))
        return torch.randn(shape if features else shape[:2], generator=generator)

    return make


_INPUTS = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "qformer_input_ids": _ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    **dict.fromkeys(sorted(_GRIDS - {"spatial_shapes", "target_sizes"}), _grid),
    "input_values": _waves,
    "input_features": _features,
    "attention_mask": _mask,
    "input_features_mask": _features_mask,
    "image_attention_mask": _image_mask,
    "query_embeds": _states,
    "aspect_ratio_ids": _ratio,
    "aspect_ratio_mask": _ratio_mask,
    "cross_attention_mask": _tile_mask,
    "cross_attention_states": _states,
    "encoder_hidden_states": _encoder_states,
    "hidden_states": _patches,
    "past_values": _series("num_input_channels"),
}
