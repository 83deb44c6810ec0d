"""Tiny random models of every family, and saved ones with a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = ["<pad>", "<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(60)]


def families() -> dict[str, Callable[[], nn.Module]]:
    """Family -> a builder of a tiny model with a head, three layers, odd sizes, random norms."""
    import transformers as t

    glu: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 82,
        "vocab_size": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    encoder: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 82,
        "vocab_size": 64,
    }
    t5: dict[str, Any] = {
        "d_model": 48,
        "num_layers": 3,
        "num_heads": 4,
        "d_kv": 12,
        "d_ff": 82,
        "vocab_size": 64,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
    }
    seq, lm, s2s, img = (
        t.AutoModelForSequenceClassification,
        t.AutoModelForCausalLM,
        t.AutoModelForSeq2SeqLM,
        t.AutoModelForImageClassification,
    )
    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    configs: dict[str, tuple[Any, Any]] = {
        "bert": (seq, t.BertConfig(**encoder)),
        "roberta": (seq, t.RobertaConfig(**encoder)),
        "distilbert": (seq, t.DistilBertConfig(dim=48, n_layers=3, n_heads=4, hidden_dim=82, vocab_size=64)),
        "gpt2": (lm, t.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=64, **ids)),
        "opt": (
            lm,
            t.OPTConfig(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                ffn_dim=82,
                vocab_size=64,
                word_embed_proj_dim=48,
                **ids,
            ),
        ),
        "llama": (lm, t.LlamaConfig(**glu)),
        "llama-mlp-bias": (lm, t.LlamaConfig(**glu, mlp_bias=True)),
        "mistral": (lm, t.MistralConfig(**glu)),
        "gemma": (lm, t.GemmaConfig(**glu, head_dim=12)),
        "qwen2": (lm, t.Qwen2Config(**glu)),
        "qwen3": (lm, t.Qwen3Config(**glu, head_dim=12)),
        "phi3": (lm, t.Phi3Config(**glu)),
        "t5": (s2s, t.T5Config(**t5)),
        "t5-gated": (s2s, t.T5Config(**t5, feed_forward_proj="gated-gelu")),
        "bart": (
            s2s,
            t.BartConfig(
                d_model=48,
                encoder_layers=3,
                decoder_layers=3,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=82,
                decoder_ffn_dim=70,
                vocab_size=64,
                activation_dropout=0.2,
                bos_token_id=2,
                eos_token_id=3,
                pad_token_id=0,
                decoder_start_token_id=2,
                forced_eos_token_id=3,
            ),
        ),
        "vit": (
            img,
            t.ViTConfig(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=82,
                image_size=16,
                patch_size=8,
            ),
        ),
    }

    def builder(auto: Any, config: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            model: nn.Module = auto.from_config(config).eval()
            with torch.no_grad():
                for module in model.modules():
                    if type(module).__name__.endswith("Norm"):
                        for parameter in module.parameters(recurse=False):
                            parameter += 0.2 * torch.randn_like(parameter)
            return model

        return build

    return {name: builder(auto, config) for name, (auto, config) in configs.items()}


def auto_class(model: nn.Module) -> str:
    """The transformers auto class that loads a model of :func:`families`."""
    name = type(model).__name__
    for part, auto in (
        ("SequenceClassification", "AutoModelForSequenceClassification"),
        ("ImageClassification", "AutoModelForImageClassification"),
        ("T5", "AutoModelForSeq2SeqLM"),
        ("Bart", "AutoModelForSeq2SeqLM"),
    ):
        if part in name:
            return auto
    return "AutoModelForCausalLM"


def inputs(model: nn.Module, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Random inputs for a model of :func:`families`, with padding at the end of the first row."""
    dtype = next(model.parameters()).dtype
    if "ImageClassification" in type(model).__name__:
        return {"pixel_values": torch.randn(rows, 3, 16, 16, dtype=dtype)}
    ids = torch.randint(4, 64, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    ids[0, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(4, 64, (rows, length - 2))
    return batch


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
