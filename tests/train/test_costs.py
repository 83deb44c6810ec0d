"""What a step costs, counted: matrix products, tensors kept for the backward pass, kernels. No clock is read.

Letters: d hidden size, f width, k size of keys and values, L layers, V vocabulary, C classes, t the tick's dim,
s tokens in a row, T tokens in a batch, B rows.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.counting import flops, kernels, saved_bytes
from tests.training import Work, optimizer_of, steps
from ticktune.patch.attach import attach

d, f, k, L, V, C, t, B, s = 64, 192, 32, 4, 96, 3, 8, 3, 16
T = B * s


class _Loop:
    """A task that takes what a model gives, for the training loop."""

    def rows(self, batch: dict[str, Tensor]) -> int:
        return 1

    def weight(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**batch)

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        return outputs.logits.float().square().mean()


def _bert(layers: int = L, **options: Any) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=4, vocab_size=V, num_labels=C,
        attn_implementation="eager", **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _llama(layers: int = L, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, **{"attn_implementation": "eager", **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _step(model: nn.Module) -> Any:
    """A function that does one step of the training loop on this model."""
    ids = torch.randint(3, V, (B, s))
    work = Work(model, _Loop(), SimpleNamespace())  # type: ignore[arg-type]
    optimizer = optimizer_of(model)
    return lambda: list(steps(work, [[{"input_ids": ids}]], optimizer))


def _check(found: int, expected: float) -> None:
    assert expected * 0.99 < found < expected * 1.01, f"{found / expected:.4f} of the formula"


# Forward, each product of a weight is 2 FLOPs for each of its entries and tokens, and so is its input's gradient.
# Attention: scores and values, 2 s d each for each token, and twice that in the backward pass.
_ATTENTION_BERT, _ATTENTION_LLAMA = 4 * d * d, 2 * d * d + 2 * d * k
_FFN_BERT, _FFN_LLAMA = 2 * d * f, 3 * d * f
_SCORES = 4 * s * d


def _bert_step(*, first: int, ticks: int) -> float:
    """A BERT whose lowest trained tensor is the norm in front of layer ``first``'s feed-forward block.

    -1 means the norm of the embeddings. The pooler is frozen, and the classifier trained.
    """
    forward = L * (2 * (_ATTENTION_BERT + _FFN_BERT) + _SCORES)
    whole = L - 1 - first
    backward = whole * (2 * (_ATTENTION_BERT + _FFN_BERT) + 2 * _SCORES)
    if first >= 0:
        backward += 2 * _FFN_BERT
    return T * (forward + backward + ticks * 6 * 2 * d * t) + B * (4 * d * d + 6 * d * C)


def _llama_step(*, first: int, ticks: int) -> float:
    """A Llama whose lowest trained tensor is the first norm of layer ``first``; the language-model head is frozen."""
    forward = L * (2 * (_ATTENTION_LLAMA + _FFN_LLAMA) + _SCORES) + 2 * V * d
    backward = (L - first) * (2 * (_ATTENTION_LLAMA + _FFN_LLAMA) + 2 * _SCORES) + 2 * V * d
    return T * (forward + backward + ticks * 6 * 3 * d * t)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("options", "first", "ticks"),
    [
        ({"dim": 0}, -1, 0),
        ({"dim": t}, -1, L),
        ({"dim": t, "layers": "last:2"}, L - 2, 2),
        ({"dim": t, "layers": "last:1", "norm_layers": "last:2"}, L - 2, 1),
        ({"dim": 0, "layers": "last:1"}, L - 1, 0),
    ],
)
def test_a_step_on_bert_multiplies_no_more_than_the_formula_says(
    options: dict[str, Any], first: int, ticks: int, fast: bool
) -> None:
    model = attach(_bert(), **options, fast=fast)
    _check(flops(_step(model)), _bert_step(first=first, ticks=ticks))


def test_the_step_of_norms_alone_is_4_n() -> None:
    weights = L * (_ATTENTION_BERT + _FFN_BERT)
    found = flops(_step(attach(_bert(), 0)))
    _check(found, T * (4 * weights + 3 * L * _SCORES) + B * (4 * d * d + 6 * d * C))
    full = _bert()
    for parameter in full.parameters():
        parameter.requires_grad_(True)
    ids = torch.randint(3, V, (B, s))
    whole = flops(lambda: full(input_ids=ids).logits.sum().backward())
    _check(whole, T * (6 * weights + 3 * L * _SCORES) + B * (6 * d * d + 6 * d * C))


@pytest.mark.parametrize("fast", [True, False])
def test_ticks_without_norms_need_no_gradient_of_the_lowest_input(fast: bool) -> None:
    """What the tick of layer 0 reads depends on nothing that is trained: the block itself has no backward pass."""
    found = flops(_step(attach(_bert(), t, norms="none", fast=fast)))
    layer = 2 * (_ATTENTION_BERT + _FFN_BERT) + 2 * _SCORES
    # Nor is the tick's own share of that gradient needed: 2 d t of its 12 d t.
    _check(found, _bert_step(first=-1, ticks=L) - T * (layer + 2 * d * t))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("options", "first", "ticks"),
    [
        ({"dim": 0}, 0, 0),
        ({"dim": t}, 0, L),
        ({"dim": t, "layers": "last:2"}, L - 2, 2),
        ({"dim": 0, "norms": ["final"]}, L, 0),
    ],
)
def test_a_step_on_llama_multiplies_no_more_than_the_formula_says(
    options: dict[str, Any], first: int, ticks: int, fast: bool
) -> None:
    model = attach(_llama(), **options, fast=fast)
    _check(flops(_step(model)), _llama_step(first=first, ticks=ticks))


def _per_token(make: Any, ids: int = V) -> float:
    """Bytes that one more layer keeps for each token: constants and what is outside of layers fall out."""

    def kept(layers: int, rows: int) -> int:
        model = make(layers)
        tokens = torch.randint(3, ids, (rows, s))
        return saved_bytes(model, lambda: model(input_ids=tokens).logits)

    more = {layers: kept(layers, 4) - kept(layers, 2) for layers in (1, 2)}
    return (more[2] - more[1]) / (2 * s)


@pytest.mark.parametrize("dim", [0, t])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_bert_keeps_no_more_than_the_formula_says(dtype: torch.dtype, dim: int) -> None:
    """Two inputs of norms, q, k, v and o, the pre-activations; a tick's input, its pre-activations and its units."""

    def make(layers: int) -> nn.Module:
        free = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = _bert(layers, **free)
        model.set_attn_implementation("sdpa")
        return attach(model.to(dtype), dim)

    tick = d + 2 * t if dim else 0
    statistics = 4 * 4 + 4 * 4  # float32: mean and deviation of two norms, one log-sum-exp for each of 4 heads
    expected = dtype.itemsize * (6 * d + f + tick) + statistics
    found = _per_token(make)
    assert expected * 0.95 < found < expected * 1.05, f"{found:.0f} bytes, expected {expected}"


@pytest.mark.parametrize("dim", [0, t])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_llama_keeps_no_more_than_the_formula_says(dtype: torch.dtype, dim: int) -> None:
    """Two inputs of norms, q and o, k and v, gate and up; a tick's input, Qx, σ(Qx), Ux and its units."""

    def make(layers: int) -> nn.Module:
        return attach(_llama(layers, attn_implementation="sdpa").to(dtype), dim)

    tick = d + 4 * t if dim else 0
    statistics = 4 * 4  # float32: one log-sum-exp for each of 4 heads
    expected = dtype.itemsize * (4 * d + 2 * k + 2 * f + tick) + statistics
    found = _per_token(make)
    assert expected * 0.95 < found < expected * 1.05, f"{found:.0f} bytes, expected {expected}"


def _kernels_of_a_layer(make: Any, dim: int, fast: bool) -> Counter[str]:
    """What one more layer starts in a forward and backward pass."""

    def counted(layers: int) -> Counter[str]:
        model = attach(make(layers).eval(), dim, fast=fast)
        tokens = torch.randint(3, V, (B, s))
        run = lambda: model(input_ids=tokens).logits.sum().backward()  # noqa: E731
        run()  # the first call compares units and makes gradients
        model.zero_grad()
        return kernels(run)

    return counted(2) - counted(1)


@pytest.mark.parametrize("fast", [True, False])
def test_kernels_that_a_tick_adds_to_a_step(fast: bool) -> None:
    """Six matrix products, one of them with its bias; the activation, there and back; r's gradient; two sums."""
    added = _kernels_of_a_layer(_bert, t, fast) - _kernels_of_a_layer(_bert, 0, fast)
    assert added == {"addmm": 1, "mm": 5, "gelu": 1, "gelu_backward": 1, "sum": 1, "add": 2}


def test_kernels_that_a_gated_tick_adds_to_a_step() -> None:
    """Six matrix products, as Q and U are one; act(gate) * up, there and back; two sums."""
    added = _kernels_of_a_layer(_llama, t, True) - _kernels_of_a_layer(_llama, 0, True)
    assert added == {"mm": 6, "cat": 2, "silu": 1, "silu_backward": 1, "mul": 3, "add": 2}
    plain = _kernels_of_a_layer(_llama, t, False) - _kernels_of_a_layer(_llama, 0, False)
    assert plain == {"mm": 9, "silu": 1, "silu_backward": 1, "mul": 3, "add": 3}
