"""A small random model of the same class as a given one, and inputs that it takes.

The detector traces this model instead of the user's: the same code with few, narrow layers runs in float64 in
a moment. Only the sizes differ; every switch of the config stays as it is.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "n_group",
         "num_expert_group", "moe_top_k", "n_expert_group"),
        2,
    ),
    **dict.fromkeys(("topk_group", "n_limited_groups"), 1),
    "num_hash_layers": 1,
    "first_k_dense_replace": 1,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _POSITIONS,
    "n_positions": _POSITIONS,
    "n_ctx": _POSITIONS,
    "max_source_positions": _POSITIONS,
    "max_target_positions": _POSITIONS,
    "num_queries": 10,
    "num_mel_bins": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "num_labels": 2,
}  # fmt: skip
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads")
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
    "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
    "num_mem_blocks", "e_layers", "d_layers", "num_blocks", "memory_attention_num_layers", "n_transformer_layers",
)  # fmt: skip
_MOST_LAYERS = 6
_LARGEST = 150_000_000  # parameters of a small model
_AS_THEY_ARE = ("num_feat_extract_layers", "num_kv_shared_layers", "max_window_layers")


def shrink(config: Any) -> Any:
    """Returns a copy of a transformers config with few, narrow layers; nested configs too.

    Every kind of layer that per-layer lists name is kept once, so a model of dense and sparse layers keeps both.
    """
    config = copy.deepcopy(config)
    for part in _parts(config):
        _shrink_part(part)
    return config


def build_small(cls: type[nn.Module], config: Any, *, seed: int = 0) -> nn.Module:
    """Builds a random float64 model of a class from a shrunk config, in evaluation mode.

    Experts are computed one by one, as the grouped kernels take no float64.

    Raises:
        ValueError: It is not small: its config has sizes that no rule of this file knows.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > _LARGEST:
        raise ValueError(f"it would still have {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(torch.float64).eval()
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
    main = getattr(model, "main_input_name", None)
    choices = [text, found, {main: found[main]} if main in found else {}]
    choices += [{**text, name: found[name]} for name in found if name not in text]
    unique: list[dict[str, Tensor]] = []
    for choice in choices:
        if choice and choice.keys() not in [other.keys() for other in unique]:
            unique.append(choice)
    return unique


def _parts(config: Any) -> Iterator[Any]:
    """The config and every config nested in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _shrink_part(config: Any) -> None:
    entries = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    layers = next((n for k in _LAYERS if isinstance(n := entries.get(k), int) and n > 0), 0)
    kinds = _kinds(entries, layers)
    if hasattr(config, "dtype"):
        config.dtype = torch.float64
    if isinstance(entries.get("stage_names"), list):  # a backbone: only its last stage is asked for
        config.stage_names = entries["stage_names"][: len(kinds) + 1] if layers else entries["stage_names"]
        config._out_features, config._out_indices = config.stage_names[-1:], [len(config.stage_names) - 1]
    for name, value in entries.items():
        if name in ("stage_names", "dtype"):
            continue
        try:
            small = _small(name, value, entries, layers, kinds)
            if small is not value:
                setattr(config, name, small)
        except (TypeError, ValueError):
            continue  # strict configs refuse a value of another type; then it stays as it is
        except Exception as error:
            if "Validation" not in type(error).__name__:
                raise


def _kinds(entries: dict[str, Any], layers: int) -> list[int]:
    """Numbers of the layers that are kept: the first of each kind that the per-layer lists tell apart."""
    lists = [v for v in entries.values() if isinstance(v, list | tuple) and len(v) == layers and layers > 4]
    if not lists:
        return list(range(min(layers, 2)))
    seen: dict[str, int] = {}
    for number, kind in enumerate(zip(*lists, strict=True)):
        seen.setdefault(repr(kind), number)
    kept = sorted(seen.values())[:_MOST_LAYERS]
    return kept if len(kept) > 1 else [0, 1]


def _small(name: str, value: Any, entries: dict[str, Any], layers: int, kinds: list[int]) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and len(value) == layers and layers > 4:
        return type(value)(value[i] for i in kinds)
    if isinstance(value, dict) and "mrope_section" in value:
        pairs = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
        parts = len(value["mrope_section"])
        return {**value, "mrope_section": [pairs - (parts - 1) * (pairs // parts)] + [pairs // parts] * (parts - 1)}
    if isinstance(value, int):
        if name in _LAYERS and value > 2:
            return len(kinds) if value == layers else 2
        if name in _KEY_VALUE_HEADS:
            heads = entries.get("num_attention_heads", value)
            return HEADS if value == heads else 1 if value == 1 else 2
        if name in _SIZES:
            return min(value, _SIZES[name]) if value > 0 and name not in _EXACT else _SIZES[name] if value else value
        return _by_rule(name, value)
    return value


_EXACT = frozenset(name for name, size in _SIZES.items() if size in (HIDDEN, HEADS, HEAD_DIM, 2 * HEAD_DIM))


def _by_rule(name: str, value: int) -> int:
    if name.endswith(("_token_id", "_token_index")) and value >= _VOCABULARY:
        return value % (_VOCABULARY // 2) + 8
    if "vocab" in name and value > _VOCABULARY:
        return _VOCABULARY
    if name.endswith(("intermediate_size", "ffn_dim", "mlp_dim")) and value > WIDTH:
        return WIDTH
    if name.endswith(("hidden_size", "hidden_dim", "embed_dim")) and value > HIDDEN:
        return HIDDEN
    if name.endswith(("_layers", "_depth")) and value > 2 and name not in _AS_THEY_ARE:
        return 2
    return value


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


def _decoder_ids(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return _ids(config, names, generator)


def _find(config: Any, *names: str) -> Any:
    for part in _parts(config):
        for name in names:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return None


def _pixels(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    size = _find(config, "image_size", "input_size", "img_size", "pretrain_image_size")
    size = 224 if size is None else size
    height, width = (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)
    channels = _find(config, "num_channels", "in_chans", "in_channels", "image_channels")
    channels = channels if isinstance(channels, int) else 3
    frames = _find(config, "num_frames", "frames_per_clip", "frame_num")
    shape: tuple[int, ...] = (_ROWS, channels, height, width)
    if isinstance(frames, int) and "input_ids" not in names:
        shape = (_ROWS, frames, channels, height, width)
    return torch.randn(shape, generator=generator)


def _waves(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    if (bins := _find(config, "num_mel_bins")) is not None and _find(config, "max_length") is not None:
        return torch.randn(_ROWS, int(_find(config, "max_length")), int(bins), generator=generator)
    return torch.randn(_ROWS, 4000, generator=generator)


def _features(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "input_size")
    positions = _find(config, "max_source_positions")
    if not isinstance(bins, int):
        return None
    if positions is not None and "decoder_input_ids" in names and hasattr(config, "num_mel_bins"):
        return torch.randn(_ROWS, bins, 2 * positions, generator=generator)
    return torch.randn(_ROWS, 64, bins, generator=generator)


def _boxes(config: Any, names: Any, generator: torch.Generator) -> Tensor | None:
    return torch.zeros(_ROWS, _LENGTH, 4, dtype=torch.long)


_INPUTS = {
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "qformer_input_ids": _decoder_ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
}
