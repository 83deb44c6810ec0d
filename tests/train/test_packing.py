"""Packed rows: each example's logits, loss and gradient are those that it has alone, or packing is refused."""

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import HIDDEN, families, perturb, word_tokenizer
from tests.training import CPU
from ticktune.data.batches import packed_rows
from ticktune.device import Compute
from ticktune.errors import PatchError
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.segments import Segments
from ticktune.patch.standins import Checkpointed, layers_of, places_of, standing_in
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import IGNORED, Batch, Example, TaskOptions
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
    if attention and attention != "segments":
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
    ("name", "attention"),
    [(name, a) for a in ("eager", "sdpa", "segments") for name in (EAGER if a == "eager" else SDPA)],
)


def _attending(model: nn.Module, attention: str, batch: Batch) -> AbstractContextManager[None]:
    return Segments(model).running(batch) if attention == "segments" else nullcontext()


@isolated
def test_packed_logits_are_those_of_each_example_alone(name: str, attention: str) -> None:
    model, task, rows = _model(name, attention), _task(), _rows(_examples())
    assert len(rows) < len(LENGTHS)
    assert any(len(row) > 2 for row in rows)
    batch = task.pack(rows)
    with torch.no_grad():
        with _attending(model, attention, batch):
            packed = task.forward(model, batch).logits
        for row, found in zip(rows, packed, strict=True):
            at = 0
            for example in row:
                alone = task.forward(model, task.collate([example])).logits[0]
                own = found[at : at + example["length"]]
                torch.testing.assert_close(own, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))
                at += example["length"]


def _slopes(
    model: Any, task: CausalLm, fast: bool, attention: str, layers: dict[nn.Module, nn.Module] | None = None
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The loss and the gradient of every trained parameter: of padded rows, and of packed ones."""
    examples = _examples()
    batches = [task.collate(examples), task.pack(_rows(examples))]
    assert task.weight(batches[0]) == task.weight(batches[1])
    assert task.rows(batches[0]) == task.rows(batches[1]) == len(LENGTHS)
    loss_of = head_loss(task, Head(model.get_output_embeddings())) if fast else plain_loss(task)
    found = []
    for batch in batches:
        model.zero_grad()
        stand_ins = {} if batch is batches[0] or layers is None else layers
        with (
            nullcontext() if batch is batches[0] else _attending(model, attention, batch),
            standing_in(places_of(model, list(stand_ins)), stand_ins),
        ):
            loss = loss_of(model, batch)
        loss.backward()
        slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), slopes))
    return found


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma", "sdpa"), ("gemma3-window", "sdpa")]
    + [(name, "segments") for name in SDPA],
)
def test_loss_and_gradients_are_those_of_padded_rows(name: str, attention: str, fast: bool) -> None:
    model = attach(_model(name, attention), 4)
    perturb(parameter for _, _, parameter in adapter_parameters(model))
    # In segments the order of sums is another one than over padded rows.
    _check_same(_slopes(model, _task(), fast, attention), 2e-6, 5e-5 if attention == "segments" else 1e-5)


def _check_same(slopes: list[tuple[Tensor, dict[str, Tensor]]], of_loss: float, of_gradient: float) -> None:
    (padded, expected), (packed, found) = slopes
    torch.testing.assert_close(packed, padded, rtol=of_loss, atol=0)
    assert found.keys() == expected.keys()
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for key, slope in expected.items():
        torch.testing.assert_close(found[key], slope, rtol=0, atol=of_gradient * largest, msg=key)


# Gemma's norms compute in float32.
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("gpt2", "sdpa")]
    + [(name, "segments") for name in ("llama", "gpt2", "mistral-window", "gpt_neox")],
)
def test_in_float64_they_are_the_same_but_for_its_last_digits(name: str, attention: str) -> None:
    model: Any = _model(name, attention, torch.float64)
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_output_embeddings().weight.detach().clone(), requires_grad=False
    )
    _check_same(_slopes(model, _task(), True, attention), 1e-12, 1e-11)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_layers_that_are_computed_again_attend_by_segments_again(name: str) -> None:
    model: Any = attach(_model(name, "segments", torch.float64), 4).double()
    perturb(parameter for _, _, parameter in adapter_parameters(model))
    segments, runs = Segments(model), []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda *_: runs.append(model.config._attn_implementation))
    layers: dict[nn.Module, nn.Module] = {layer: Checkpointed(layer, segments.again) for layer in layers_of(model)}
    _check_same(_slopes(model, _task(), True, "segments", layers), 1e-12, 1e-11)
    count = len(layers)
    assert runs == ["sdpa"] * count + ["ticktune_segments"] * 2 * count
    assert model.config._attn_implementation == "sdpa"


@isolated
def test_what_is_isolated_is_proved(name: str, attention: str) -> None:
    model = _model(name, attention)
    segments = Segments(model) if attention == "segments" else None
    assert packing_obstacle(model, _task(), _examples([3, 12]), CPU, segments, base_dropout=False) is None
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_acts_in_attention_inside_of_segments() -> None:
    model = _model("gpt2", "sdpa")
    assert packing_obstacle(model, _task(), _examples([3, 12]), CPU, Segments(model), base_dropout=True) is None


def test_the_proof_holds_under_bf16_too() -> None:
    compute = Compute(torch.device("cpu"), "bf16")
    model = _model("llama", "sdpa")
    assert packing_obstacle(model, _task(), _examples([3, 12]), compute) is None
    assert packing_obstacle(model, _task(), _examples([3, 12]), compute, Segments(model)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma2", "attention inside of segments: it knows no softcap"),
        ("bloom", "does not keep the examples of a row apart"),
    ],
)
def test_what_cannot_attend_by_segments_says_why(name: str, said: str) -> None:
    model = _model(name, "")
    state = torch.random.get_rng_state()
    obstacle = packing_obstacle(model, _task(), _examples([3, 12]), CPU, Segments(model))
    assert obstacle is not None
    assert said in obstacle
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation != "ticktune_segments"


def test_kinds_of_layers_that_are_not_known_are_refused() -> None:
    with pytest.raises(PatchError, match="layers of the kind linear_attention"):
        Segments(_model("mamba", ""))
    with pytest.raises(PatchError, match="not one of transformers' own"):
        Segments(nn.Linear(2, 2))


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
    assert batch["segments"] == [5, 2, 3]


def test_the_pair_of_the_proof_is_the_shortest_and_the_longest_that_fits() -> None:
    assert packed_pair(LENGTHS, CAPACITY) == (2, 6)
    assert packed_pair(LENGTHS, 12) == (2, 4)
    assert packed_pair([16, 16], CAPACITY) is None
