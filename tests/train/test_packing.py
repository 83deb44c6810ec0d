"""Packed rows: each example's logits, loss and gradient are those that it has alone, or packing is refused."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import HIDDEN, families, perturb, word_tokenizer
from tests.training import CPU
from ticktune.data.batches import packed_rows
from ticktune.device import Compute
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import IGNORED, Example, TaskOptions
from ticktune.train.head_loss import Head, head_loss, plain_loss
from ticktune.train.packing import packed_pair, packing_obstacle

LENGTHS = [5, 11, 2, 7, 9, 3, 12, 4, 2]
CAPACITY = 16


def _task() -> CausalLm:
    return CausalLm(TaskOptions(("prompt", "response"), CAPACITY), word_tokenizer())


def _examples(lengths: list[int] = LENGTHS) -> list[Example]:
    """Examples whose first third is not learned."""
    rng = random.Random(1)
    examples = []
    for row, length in enumerate(lengths):
        ids = [rng.randrange(4, 64) for _ in range(length)]
        labels = [IGNORED if place < length // 3 else token for place, token in enumerate(ids)]
        examples.append({"row": row, "length": length, "input_ids": ids, "labels": labels})
    return examples


def _rows(examples: list[Example]) -> list[list[Example]]:
    return [[examples[i] for i in row] for row in packed_rows([e["length"] for e in examples], CAPACITY)]


def _model(name: str, attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers as t

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 82, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}
    # A window of 4 tokens, far shorter than the examples.
    windowed: dict[str, Any] = {
        "mistral-window": lambda: t.MistralForCausalLM(t.MistralConfig(**shape, sliding_window=4)),
        "gemma2-window": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**shape, sliding_window=4)),
        "gemma3-window": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**shape, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        ),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4, pad_token_id=0)
        ),
    }
    torch.manual_seed(4)
    model: Any = (windowed[name] if name in windowed else families()[name])().eval()
    if attention:
        model.set_attn_implementation(attention)
    with torch.no_grad():  # as sharp as a trained model's, so that a leak shows
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 3
    return model.to(dtype)  # type: ignore[no-any-return]


# Gemma 2 has no sdpa: its attention scores are capped.
EAGER = ["llama", "gpt2", "gemma", "gemma2", "mistral-window", "gemma2-window", "gemma3-window", "gpt_neox"]
SDPA = ["llama", "gpt2", "gemma", "mistral-window", "gemma3-window", "gpt_neox"]
isolated = pytest.mark.parametrize(
    ("name", "attention"), [(name, "eager") for name in EAGER] + [(name, "sdpa") for name in SDPA]
)


@isolated
def test_packed_logits_are_those_of_each_example_alone(name: str, attention: str) -> None:
    model, task, rows = _model(name, attention), _task(), _rows(_examples())
    assert len(rows) < len(LENGTHS)
    assert any(len(row) > 2 for row in rows)
    with torch.no_grad():
        packed = task.forward(model, task.pack(rows)).logits
        for row, found in zip(rows, packed, strict=True):
            at = 0
            for example in row:
                alone = task.forward(model, task.collate([example])).logits[0]
                own = found[at : at + example["length"]]
                torch.testing.assert_close(own, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))
                at += example["length"]


def _slopes(model: Any, task: CausalLm, fast: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The loss and the gradient of every trained parameter: of padded rows, and of packed ones."""
    examples = _examples()
    batches = [task.collate(examples), task.pack(_rows(examples))]
    assert task.weight(batches[0]) == task.weight(batches[1])
    assert task.rows(batches[0]) == task.rows(batches[1]) == len(LENGTHS)
    loss_of = head_loss(task, Head(model.get_output_embeddings())) if fast else plain_loss(task)
    found = []
    for batch in batches:
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), slopes))
    return found


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma", "sdpa"), ("gemma3-window", "sdpa")],
)
def test_loss_and_gradients_are_those_of_padded_rows(name: str, attention: str, fast: bool) -> None:
    model = attach(_model(name, attention), 4)
    perturb(parameter for _, _, parameter in adapter_parameters(model))
    (padded, expected), (packed, found) = _slopes(model, _task(), fast)
    torch.testing.assert_close(packed, padded, rtol=2e-6, atol=0)
    assert found.keys() == expected.keys()
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for key, slope in expected.items():
        torch.testing.assert_close(found[key], slope, rtol=0, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_float64_they_are_the_same_but_for_its_last_digits(name: str) -> None:
    model: Any = _model(name, "sdpa", torch.float64)
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_output_embeddings().weight.detach().clone(), requires_grad=False
    )
    (padded, expected), (packed, found) = _slopes(model, _task(), fast=True)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=0)
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for key, slope in expected.items():
        torch.testing.assert_close(found[key], slope, rtol=0, atol=1e-11 * largest, msg=key)


@isolated
def test_what_is_isolated_is_proved(name: str, attention: str) -> None:
    assert packing_obstacle(_model(name, attention), _task(), _examples([3, 12]), CPU) is None


def test_the_proof_holds_under_bf16_too() -> None:
    compute = Compute(torch.device("cpu"), "bf16")
    assert packing_obstacle(_model("llama", "sdpa"), _task(), _examples([3, 12]), compute) is None


def test_a_state_that_runs_through_a_row_is_refused() -> None:
    obstacle = packing_obstacle(_model("mamba", ""), _task(), _examples([3, 12]), CPU)
    assert obstacle is not None
    assert obstacle.startswith("the base does not run with positions that begin anew") or "apart" in obstacle


@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_a_family_that_does_not_tell_examples_by_their_positions_is_refused(name: str) -> None:
    obstacle = packing_obstacle(_model(name, "eager"), _task(), _examples([3, 12]), CPU)
    assert obstacle is not None
    assert obstacle.startswith("the base does not")


def test_attention_that_passes_over_the_boundary_is_refused() -> None:
    model: Any = _model("llama", "eager")
    inner = model.forward

    def forward(*, input_ids: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        return inner(input_ids=input_ids, **rest)

    model.forward = forward
    obstacle = packing_obstacle(model, _task(), _examples([3, 12]), CPU)
    assert obstacle is not None
    assert obstacle.startswith("the base does not keep the examples of a row apart")
    # That is no matter of positions alone: rotary ones are relative.
    assert float(obstacle.partition("change by ")[2].partition(" %")[0]) > 1


def test_no_first_token_is_learned_behind_another_example() -> None:
    examples = [
        {"row": row, "length": 3, "input_ids": [4, 5, 6], "labels": [4, 5, 6]}  # as of plain text
        for row in range(2)
    ]
    batch = _task().pack([examples])
    assert batch["labels"].tolist() == [[IGNORED, 5, 6, IGNORED, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert _task().weight(batch) == 4


def test_what_fills_a_row_up_is_an_example_of_its_own() -> None:
    examples = _examples([5, 2, 3])
    batch = _task().pack([[examples[0]], [examples[1]]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    assert batch["labels"][1, 2:].tolist() == [IGNORED] * 3


def test_the_pair_of_the_proof_is_the_shortest_and_the_longest_that_fits() -> None:
    assert packed_pair(LENGTHS, CAPACITY) == (2, 6)
    assert packed_pair(LENGTHS, 12) == (2, 4)
    assert packed_pair([16, 16], CAPACITY) is None
