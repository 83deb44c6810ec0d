"""Families that are a Llama with other switches, written as the Llama they are.

Mistral, Qwen2 and Phi-3 have no biases in their feed-forward blocks, so plain ticks do not merge there. Llama's
config has the switch ``mlp_bias``. The conversion renames and splits, and computes nothing: without ticks the
logits agree exactly, and that is checked on every export.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import ExportError
from ticktune.patch.layout import AS_LLAMA, llama_obstacle

_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "id2label", "label2id", "problem_type",
)  # fmt: skip


def as_llama(model: nn.Module) -> nn.Module:
    """Writes a Mistral, Qwen2 or Phi-3 model as a Llama that computes the same.

    Args:
        model: The stock model, with any head that Llama has too.

    Returns:
        A new model with the same values; the given one is left as it is.

    Raises:
        ExportError: It is of another family, or has what a Llama lacks: a sliding window shorter than its
            positions, scaled or partial rotary positions.
    """
    import transformers

    config: Any = model.config
    family = config.model_type
    if family not in AS_LLAMA:
        raise ExportError(
            f"a {family} model cannot be written as a Llama", fix=f"--as llama is for {', '.join(AS_LLAMA)}"
        )
    if obstacle := llama_obstacle(config):
        raise ExportError(obstacle, fix="train with ticks.form: gated, which merges as it is")
    name = type(model).__name__
    for own in ("Mistral", "Qwen2", "Phi3"):
        name = name.replace(own, "Llama")
    if not hasattr(transformers, name):
        raise ExportError(f"Llama has no head like {type(model).__name__}")
    entries = {key: getattr(config, key) for key in _KEPT if hasattr(config, key)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    llama_config = transformers.LlamaConfig(
        **entries, head_dim=head_dim, attention_bias=family == "qwen2", mlp_bias=False, dtype=config.dtype
    )
    llama: Any = getattr(transformers, name)(llama_config).to(next(model.parameters()).dtype)
    body = f"{model.base_model_prefix}."  # question answering keeps it under another name than the other heads
    state = {
        (llama.base_model_prefix + "." + k.removeprefix(body) if k.startswith(body) else k): v
        for key, value in model.state_dict().items()
        for k, v in _renamed(key, value, llama_config)
    }
    for key, value in llama.state_dict().items():
        if key.endswith("o_proj.bias"):
            state[key] = torch.zeros_like(value)
    llama.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        llama.generation_config = model.generation_config
    found: nn.Module = llama.eval()
    return found


def probe(model: nn.Module, *, length: int = 64) -> dict[str, Tensor]:
    """A row of random token ids, as long as the model's positions allow: what a conversion is checked on.

    One row, as classifiers of sequences without a padding token take no more.
    """
    config: Any = model.config
    tokens = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _renamed(key: str, value: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """A tensor under Llama's names; fused ones in their parts."""
    if "qkv_proj." in key:
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        parts = value.split([n * config.head_dim for n in sizes])
        return [(key.replace("qkv_proj", f"{p}_proj"), t) for p, t in zip("qkv", parts, strict=True)]
    if "gate_up_proj." in key:
        gate, up = value.chunk(2)
        return [(key.replace("gate_up_proj", "gate_proj"), gate), (key.replace("gate_up_proj", "up_proj"), up)]
    return [(key, value)]
