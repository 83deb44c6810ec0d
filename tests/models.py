"""Tiny random models of every family, and saved ones with a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = ["<pad>", "<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(60)]
HIDDEN, LAYERS, HEADS, WIDTH = 48, 3, 4, 82
_IMAGE, _FRAMES = 32, 40


@dataclass(frozen=True)
class Family:
    """A tiny model: the transformers auto class that loads it, its config, and the kind of inputs it takes."""

    auto: str
    config: Any
    kind: str


def table() -> dict[str, Family]:
    """Family -> its tiny model; three layers, hidden size 48, width 82, where the architecture lets one choose."""
    import transformers as t

    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": 64}
    common: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    encoder: dict[str, Any] = {**common, "intermediate_size": WIDTH, "vocab_size": 64}
    glu: dict[str, Any] = {**common, **ids, "num_key_value_heads": 2, "intermediate_size": WIDTH}
    vision: dict[str, Any] = {**common, "intermediate_size": WIDTH, "image_size": _IMAGE, "patch_size": 8}
    t5: dict[str, Any] = {
        "d_model": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "d_kv": 12,
        "d_ff": WIDTH,
        "vocab_size": 64,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
    }
    two_stacks: dict[str, Any] = {
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": WIDTH,
        "decoder_ffn_dim": 70,
        "activation_dropout": 0.2,
    }
    bart: dict[str, Any] = {**two_stacks, **ids, "decoder_start_token_id": 2, "forced_eos_token_id": 3}
    wav: dict[str, Any] = {
        **encoder,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "activation_dropout": 0.2,
        "pad_token_id": 0,
    }
    experts: dict[str, Any] = {**glu, "num_experts_per_tok": 2, "intermediate_size": 80}
    towers: dict[str, Any] = {
        "text_config": {**common, **ids, "intermediate_size": 70, "max_position_embeddings": 32},
        "vision_config": vision,
    }
    resnet = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    gpt: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **ids}
    moe = {**experts, "head_dim": 12, "moe_intermediate_size": 56, "num_experts": 4}

    def texts(config: Any) -> Family:
        return Family("AutoModelForSequenceClassification", config, "text")

    def lm(config: Any) -> Family:
        return Family("AutoModelForCausalLM", config, "text")

    def pairs(config: Any) -> Family:
        return Family("AutoModelForSeq2SeqLM", config, "seq2seq")

    def images(config: Any) -> Family:
        return Family("AutoModelForImageClassification", config, "image")

    return {
        # Encoders of text
        "bert": texts(t.BertConfig(**encoder)),
        "roberta": texts(t.RobertaConfig(**encoder)),
        "xlm-roberta": texts(t.XLMRobertaConfig(**encoder)),
        "camembert": texts(t.CamembertConfig(**encoder)),
        "electra": texts(t.ElectraConfig(**encoder, embedding_size=HIDDEN)),
        "ernie": texts(t.ErnieConfig(**encoder)),
        "deberta-v2": texts(t.DebertaV2Config(**encoder)),
        "mpnet": texts(t.MPNetConfig(**encoder)),
        "distilbert": texts(
            t.DistilBertConfig(dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=WIDTH, vocab_size=64)
        ),
        "albert": texts(t.AlbertConfig(**encoder, embedding_size=16)),
        "modernbert": texts(t.ModernBertConfig(**encoder, **_MODERNBERT)),
        "modernbert-bias": texts(t.ModernBertConfig(**encoder, **_MODERNBERT, mlp_bias=True)),
        # Decoders with plain blocks
        "gpt2": lm(t.GPT2Config(**gpt)),
        "gpt_neo": lm(
            t.GPTNeoConfig(**{**encoder, **ids}, num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global"], 3]])
        ),
        "gptj": lm(t.GPTJConfig(**gpt, rotary_dim=12)),
        "gpt_neox": lm(t.GPTNeoXConfig(**{**encoder, **ids}, rotary_pct=0.5)),
        "opt": lm(t.OPTConfig(**common, **ids, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN)),
        "bloom": lm(t.BloomConfig(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **ids)),
        "falcon": lm(t.FalconConfig(**common, **ids, ffn_hidden_size=WIDTH)),
        "phi": lm(t.PhiConfig(**glu)),
        "starcoder2": lm(t.Starcoder2Config(**glu, use_bias=False)),
        "starcoder2-bias": lm(t.Starcoder2Config(**glu)),
        # Decoders with gated blocks
        "llama": lm(t.LlamaConfig(**glu)),
        "llama-mlp-bias": lm(t.LlamaConfig(**glu, mlp_bias=True)),
        "mistral": lm(t.MistralConfig(**glu, sliding_window=None)),
        "qwen2": lm(t.Qwen2Config(**glu)),
        "qwen3": lm(t.Qwen3Config(**glu, head_dim=12)),
        "phi3": lm(t.Phi3Config(**glu)),
        "gemma": lm(t.GemmaConfig(**glu, head_dim=12)),
        "gemma2": lm(t.Gemma2Config(**glu, head_dim=12)),
        "gemma3_text": lm(t.Gemma3TextConfig(**glu, head_dim=12)),
        "smollm3": lm(t.SmolLM3Config(**glu)),
        "granite": lm(t.GraniteConfig(**glu)),
        "olmo2": lm(t.Olmo2Config(**glu)),
        # Mixtures of experts
        "mixtral": lm(t.MixtralConfig(**experts, num_local_experts=4)),
        "qwen3_moe": lm(t.Qwen3MoeConfig(**moe, mlp_only_layers=[1], norm_topk_prob=True)),
        "qwen2_moe": lm(t.Qwen2MoeConfig(**moe, shared_expert_intermediate_size=64)),
        # Encoders with decoders
        "t5": pairs(t.T5Config(**t5)),
        "t5-gated": pairs(t.T5Config(**t5, feed_forward_proj="gated-gelu")),
        "mt5": pairs(t.MT5Config(**t5)),
        "bart": pairs(t.BartConfig(**bart)),
        "mbart": pairs(t.MBartConfig(**bart)),
        "marian": pairs(t.MarianConfig(**bart)),
        "pegasus": pairs(t.PegasusConfig(**bart)),
        "m2m_100": pairs(t.M2M100Config(**bart)),
        # Images
        "vit": images(t.ViTConfig(**vision)),
        "deit": images(t.DeiTConfig(**vision, architectures=["DeiTForImageClassification"])),
        "beit": images(t.BeitConfig(**vision)),
        "yolos": Family(
            "AutoModelForObjectDetection",
            t.YolosConfig(**{**vision, "image_size": [_IMAGE, _IMAGE]}, num_detection_tokens=5),
            "image",
        ),
        "dinov2": images(t.Dinov2Config(**_without_width(vision), mlp_ratio=2)),
        "dinov2-swiglu": images(t.Dinov2Config(**_without_width(vision), mlp_ratio=2, use_swiglu_ffn=True)),
        "swin": images(
            t.SwinConfig(
                image_size=_IMAGE,
                patch_size=4,
                embed_dim=12,
                depths=[1, 2],
                num_heads=[2, 4],
                window_size=4,
                mlp_ratio=2.0,
            )
        ),
        "segformer": Family(
            "AutoModelForSemanticSegmentation",
            t.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 2],
                sr_ratios=[2, 1],
                hidden_sizes=[16, 24],
                patch_sizes=[3, 3],
                strides=[2, 2],
                num_attention_heads=[1, 2],
                mlp_ratios=[2, 3],
                decoder_hidden_size=16,
            ),
            "image",
        ),
        "detr": Family(
            "AutoModelForObjectDetection",
            t.DetrConfig(**two_stacks, num_queries=5, use_timm_backbone=False, backbone=None, backbone_config=resnet),
            "image",
        ),
        "clip": Family("AutoModel", t.CLIPConfig(**towers, projection_dim=16), "text and image"),
        "clip_vision_model": images(t.CLIPConfig(**towers, projection_dim=16)),
        "clip_text_model": Family("AutoModel", t.CLIPTextConfig(**towers["text_config"]), "text"),
        "siglip": Family("AutoModel", t.SiglipConfig(**towers), "text and image"),
        "siglip_vision_model": images(t.SiglipConfig(**towers)),
        # Sound
        "wav2vec2": Family("AutoModelForCTC", t.Wav2Vec2Config(**wav), "sound"),
        "hubert": Family("AutoModelForCTC", t.HubertConfig(**wav), "sound"),
        "wavlm": Family("AutoModelForCTC", t.WavLMConfig(**wav), "sound"),
        "whisper": Family(
            "AutoModelForSpeechSeq2Seq",
            t.WhisperConfig(
                **two_stacks, **ids, num_mel_bins=8, max_source_positions=_FRAMES, decoder_start_token_id=2
            ),
            "speech",
        ),
        "audio-spectrogram-transformer": Family(
            "AutoModelForAudioClassification",
            t.ASTConfig(**_without(vision, "image_size"), max_length=_FRAMES, num_mel_bins=16),
            "spectrogram",
        ),
    }


_MODERNBERT: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "mlp_dropout": 0.1,
}


FIXED_WIDTH = ("bloom",)
"""Families whose config has no field for the width: their ticks do not merge."""


def _without(entries: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key != name}


def _without_width(entries: dict[str, Any]) -> dict[str, Any]:
    return _without(entries, "intermediate_size")


def families() -> dict[str, Callable[[], nn.Module]]:
    """Family -> a builder of its tiny model with a head and random norms."""
    import transformers

    def builder(family: Family) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            model: nn.Module = getattr(transformers, family.auto).from_config(family.config).eval()
            with torch.no_grad():
                for module in model.modules():
                    if type(module).__name__.endswith("Norm"):
                        for parameter in module.parameters(recurse=False):
                            parameter += 0.2 * torch.randn_like(parameter)
            return model

        return build

    return {name: builder(family) for name, family in table().items()}


def inputs(model: nn.Module, kind: str = "", rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Random inputs for a model of :func:`families`, with padding at the end of the first row.

    Args:
        model: The model.
        kind: As in :class:`Family`; empty: text, text pairs or images, as the model's class says.
        rows: Rows.
        length: Tokens.
    """
    if not kind:
        is_pair = getattr(model.config, "is_encoder_decoder", False)
        kind = "image" if "ImageClassification" in type(model).__name__ else "seq2seq" if is_pair else "text"
    dtype = next(model.parameters()).dtype
    ids = torch.randint(4, 64, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    ids[0, -3:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    decoder = {"decoder_input_ids": torch.randint(4, 64, (rows, length - 2))}
    pixels = {"pixel_values": torch.randn(rows, 3, _IMAGE, _IMAGE, dtype=dtype)}
    batches: dict[str, Callable[[], dict[str, Tensor]]] = {
        "text": lambda: text,
        "seq2seq": lambda: {**text, **decoder},
        "image": lambda: pixels,
        "text and image": lambda: {**text, **pixels},
        "sound": lambda: {"input_values": torch.randn(rows, 800, dtype=dtype)},
        "spectrogram": lambda: {"input_values": torch.randn(rows, _FRAMES, 16, dtype=dtype)},
        "speech": lambda: {"input_features": torch.randn(rows, 8, 2 * _FRAMES, dtype=dtype), **decoder},
    }
    return batches[kind]()


def result(output: Any) -> Tensor:
    """The tensor of a model's output that a comparison is about: logits, or what comes nearest."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            found: Tensor = output[name]
            return found
    raise AssertionError(f"no logits in {type(output).__name__}")


def perturb(parameters: Any, scale: float = 0.3) -> None:
    """Adds noise to parameters, so that ticks and norms do something."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn_like(parameter)


def word_tokenizer() -> Any:
    """A tokenizer whose tokens are the words w0 to w59, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
    )


def save_tiny_bert(folder: Path) -> Path:
    """Saves a two-layer BERT body (no head) and its tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path) -> Path:
    """Saves a two-layer Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
