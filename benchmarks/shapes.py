"""Shapes of models, their weights drawn at random, and what a step of them costs at the least.

Letters: d hidden size, f width, k size of keys and values, L layers, V vocabulary, N weights of all layers' matrices,
s tokens of an example (of several: sum of s squared / sum of s), t the tick's dim. Costs are of one token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What the roofline floor counts with, of one H200 in bfloat16: matrix products on random data and a copy (measured),
# and attention of the class of FlashAttention 3 (arXiv 2407.08608), forward and backward.
PRODUCTS, COPY, ATTENTION_FORWARD, ATTENTION_BACKWARD = 790e12, 4.3e12, 550e12, 400e12
PEAK = 989e12
"""FLOPs a second of an H100 or H200 in bfloat16, dense, by its data sheet: the denominator of an MFU."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Args:
        family: ``llama``: gated, causal, with a language-model head; ``bert``: plain, with a classifier.
        hidden: d.
        width: f.
        layers: L.
        heads: Of attention.
        kv_heads: Heads of keys and values.
        vocabulary: V.
        tied: Whether the head is the embedding.
    """

    family: Literal["llama", "bert"]
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def causal(self) -> bool:
        """Whether the model says what comes next."""
        return self.family == "llama"

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a feed-forward block, and of its tick."""
        return 3 if self.causal else 2

    @property
    def kv(self) -> int:
        """K."""
        return self.hidden * self.kv_heads // self.heads

    @property
    def weights(self) -> int:
        """N."""
        d = self.hidden
        return self.layers * (2 * d * d + 2 * d * self.kv + self.ffn_matrices * d * self.width)

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.vocabulary * self.hidden if self.causal else 0


SHAPES = {
    "Llama-1B": Shape("llama", 2048, 8192, 16, 32, 8, 128256, tied=True),
    "Llama-8B": Shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "BERT-base": Shape("bert", 768, 3072, 12, 12, 12, 30522),
    "MiniLM-L6": Shape("bert", 384, 1536, 6, 12, 12, 30522),
}
TINY = {
    name: Shape(shape.family, 64, 128, 2, 4, 2 if shape.causal else 4, 512, shape.tied)
    for name, shape in SHAPES.items()
}
"""The same names, small enough for a CPU."""


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of this shape, all of whose matrices are drawn from N(0, 0.02), norms being the identity.

    Zeros would flatter: with few bits to toggle a GPU clocks higher.
    """
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    with device:
        if shape.causal:
            config = t.LlamaConfig(
                **sizes,
                num_key_value_heads=shape.kv_heads,
                max_position_embeddings=8192,
                tie_word_embeddings=shape.tied,
                use_cache=False,
            )
            model: nn.Module = t.AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            config = t.BertConfig(**sizes, num_labels=2)
            model = t.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def take_weights(model: nn.Module, weights: list[Tensor]) -> None:
    """Gives a model the weights of another one of its shape, which both then hold together."""
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data = weight


def product_flops(shape: Shape, *, full: bool = False) -> int:
    """FLOPs of the products with the base's weights: 4 (N + V d), or 6 where each has a gradient."""
    return (6 if full else 4) * (shape.weights + shape.head)


def attention_flops(shape: Shape, length: float) -> float:
    """FLOPs of scores and values in a forward pass: 4 s d L, half of it where attention is causal."""
    return 4 * length * shape.hidden * shape.layers * (0.5 if shape.causal else 1.0)


def mfu4(rate: float, shape: Shape, length: float) -> float:
    """Share of the peak that so many tokens a second are: 4 (N + V d), and attention three times (12 s d L c)."""
    return rate * (product_flops(shape) + 3 * attention_flops(shape, length)) / PEAK


def floor_seconds(shape: Shape, length: float, dim: int, *, full: bool = False) -> dict[str, float]:
    """The least seconds of a token on one H200, by part: a roofline.

    The elementwise part is of fully fused kernels, in numbers of 2 bytes for each layer: gated blocks 8f + 20d + 4k +
    5t, plain ones 5f + 16d + 5t; the loss passes four times over the logits. Backward attention is 2.5 times forward.
    A tick's six products have a thin side, and are counted at half of the rate.
    """
    d, f, k = shape.hidden, shape.width, shape.kv
    numbers = 8 * f + 20 * d + 4 * k if shape.causal else 5 * f + 16 * d
    logits = 4 * 2 * shape.vocabulary if shape.causal else 0
    attention = attention_flops(shape, length)
    return {
        "products": product_flops(shape, full=full) / PRODUCTS,
        "attention": attention / ATTENTION_FORWARD + 2.5 * attention / ATTENTION_BACKWARD,
        "elementwise": (2 * shape.layers * (numbers + 5 * dim) + logits) / COPY,
        "ticks": 6 * shape.ffn_matrices * d * dim * shape.layers / (PRODUCTS / 2),
    }
