"""The loss without logits: the plain loss and its gradients to rounding, and no tensor of all logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import HIDDEN, LAYERS, families, inputs, perturb
from tests.training import CPU, CPU_FP16, causal_lm, optimizer_of, snapshot, steps
from ticktune.device import Compute
from ticktune.evaluate import score
from ticktune.patch import standins
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.masked_lm import MaskedLm
from ticktune.tasks.next_item import NextItem
from ticktune.tasks.seq2seq_lm import Seq2SeqLm
from ticktune.tasks.task import IGNORED, Batch, Task, TaskOptions, token_loss, update_tokens
from ticktune.train import head_loss
from ticktune.train.head_loss import Head, ends_of, find_head, linear_cross_entropy, plain_loss

CPU_BF16 = Compute(torch.device("cpu"), "bf16")
POSITIONS, VOCABULARY = (3, 7), 19


def _states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*POSITIONS, 5, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _targets() -> Tensor:
    targets = torch.randint(VOCABULARY, POSITIONS, generator=torch.Generator().manual_seed(2))
    targets[0, :4] = targets[2, 5:] = IGNORED
    return targets


def _head(*, bias: bool = False, dtype: torch.dtype = torch.float64, **shape: Any) -> Head:
    torch.manual_seed(3)
    return Head(nn.Linear(5, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False), **shape)


def _reference(states: Tensor, targets: Tensor, head: Head, smoothing: float) -> Tensor:
    """All logits, written out in float64."""
    logits = head.linear(states)
    if head.offset is not None:
        logits = logits + head.offset
    logits = logits * head.scale
    if head.cap is not None:
        logits = torch.tanh(logits / head.cap) * head.cap
    options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "sum"}
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "offset": {"offset": torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)[None]},
    "bias and offset": {"bias": True, "offset": torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)},
    "scale": {"scale": 0.3},
    "cap": {"cap": 0.7},
    "scale and cap": {"scale": 2.5, "cap": 1.5, "bias": True},
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_those_of_all_logits(shape: str, chunk: int | None, smoothing: float) -> None:
    head, targets, states = _head(**SHAPES[shape]), _targets(), _states()
    expected = _reference(states, targets, head, smoothing)
    [slope] = torch.autograd.grad(expected, states)
    found = linear_cross_entropy(states, targets, head, smoothing, chunk=chunk)
    [own] = torch.autograd.grad(3 * found, states)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(own, 3 * slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_loss_and_gradient_are_those_of_all_logits(
    shape: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_compiled("aot_eager", shape, smoothing, monkeypatch)


@pytest.mark.slow
def test_inductor_compiles_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_compiled("inductor", "scale and cap", 0.1, monkeypatch)


def _check_compiled(backend: str, shape: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "BACKEND", backend)
    head, targets, states = _head(**SHAPES[shape]), _targets(), _states()
    expected = _reference(states, targets, head, smoothing)
    [slope] = torch.autograd.grad(expected, states)
    for chunk in (4, None):
        found = linear_cross_entropy(states, targets, head, smoothing, chunk=chunk, compiled=True)
        [own] = torch.autograd.grad(3 * found, states)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(own, 3 * slope, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            alone = linear_cross_entropy(states.detach(), targets, head, smoothing, chunk=chunk, compiled=True)
        torch.testing.assert_close(alone, expected.detach(), rtol=1e-13, atol=1e-13)


def test_gradient_is_that_of_finite_differences() -> None:
    head, targets = _head(bias=True, scale=1.3, cap=2.0), _targets()
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, targets, head, 0.2, chunk=5), [_states()])


def test_float32_agrees_to_rounding() -> None:
    head, targets, states = _head(dtype=torch.float32), _targets(), _states(torch.float32)
    plain = token_loss(head.linear(states), targets)
    found = linear_cross_entropy(states, targets, head, chunk=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    expected, own = (torch.autograd.grad(loss, states)[0] for loss in (plain, found))
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compute", [CPU_BF16, CPU_FP16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_to_float64_as_all_logits_are(compute: Compute) -> None:
    head, targets, states = _head(dtype=torch.float32), _targets(), _states(torch.float32)
    exact_head = Head(nn.Linear(5, VOCABULARY, bias=False, dtype=torch.float64))
    exact_head.linear.weight.data = head.linear.weight.double()
    exact = torch.autograd.grad(_reference(states.double(), targets, exact_head, 0.0), states)[0]
    with compute.autocast():
        plain, found = token_loss(head.linear(states), targets), linear_cross_entropy(states, targets, head)
    assert found.dtype == torch.float32
    scale = 1024.0  # as a gradient scaler does
    slopes = [torch.autograd.grad(loss * scale, states)[0] / scale for loss in (plain, found)]
    assert slopes[1].dtype == torch.float32
    errors = [float((slope - exact).norm() / exact.norm()) for slope in slopes]
    assert errors[1] <= 1.2 * errors[0] < 0.02


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    states = _states()
    loss = linear_cross_entropy(states, torch.full(POSITIONS, IGNORED), _head())
    loss.backward()
    assert float(loss.detach()) == 0
    assert states.grad is not None
    assert not states.grad.any()


# On models


def _task(kind: str, smoothing: float = 0.0) -> Task:
    def options(*columns: str) -> TaskOptions:
        return TaskOptions(columns, 16, label_smoothing=smoothing)

    if kind == "seq2seq":
        return Seq2SeqLm(options("source", "target"), None, 2)
    if kind == "masked":
        return MaskedLm(options("text"), None)
    if kind == "items":
        return NextItem(options("items"), SimpleNamespace(unk_token_id=11), True)
    return CausalLm(options("prompt", "response"), None)


def _work(name: str) -> tuple[nn.Module, Batch, str]:
    """A tiny model with ticks that do something, a batch with labels at some positions, and the kind of its task."""
    import transformers as t

    torch.manual_seed(5)
    common: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    common |= {"vocab_size": 64, "intermediate_size": 82}
    own: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**common)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**common)),
        "modernbert": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(**common, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
        ),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**common, pad_token_id=0, logit_scale=0.25)),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**common, pad_token_id=0, logits_scaling=8.0)),
    }
    model = own[name]() if name in own else families()[name]()
    model = model.eval()
    if "MaskedLM" in type(model).__name__:
        for parameter in model.get_output_embeddings().parameters():  # type: ignore[operator]
            perturb([parameter], 0.1)
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_()  # type: ignore[operator,union-attr]
    attach(model, 4)
    perturb(parameter for _, _, parameter in adapter_parameters(model))
    batch: Batch = inputs(model)
    seq2seq = "decoder_input_ids" in batch
    labels = (batch["decoder_input_ids"] if seq2seq else batch["input_ids"]).clone()
    labels[:, ::3] = IGNORED
    batch["labels"] = labels
    return model, batch, "seq2seq" if seq2seq else "masked" if "MaskedLM" in type(model).__name__ else "causal"


MODELS = ["llama", "gpt2", "gemma2", "cohere", "granite", "mixtral", "t5", "marian", "bert", "roberta", "modernbert"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_the_fast_loss_of_a_model_is_the_plain_one(name: str, smoothing: float) -> None:
    model, batch, kind = _work(name)
    task = _task(kind, smoothing)
    head = find_head(model, task, batch, CPU)
    assert isinstance(head, Head), head
    slopes = []
    for loss_of in (plain_loss(task), head_loss.head_loss(task, head)):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        trained = {key: p.grad for key, _, p in adapter_parameters(model) if p.grad is not None}
        slopes.append((loss.detach(), trained))
        assert all(p.grad is None for p in head.linear.parameters())
    (plain, expected), (found, own) = slopes
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=0)
    assert own.keys() == expected.keys()
    largest = max(float(slope.abs().max()) for slope in expected.values())
    assert largest > 0.01
    for key, slope in expected.items():
        torch.testing.assert_close(own[key], slope, rtol=1e-4, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize(
    ("name", "scale", "cap", "has_offset"),
    [
        ("llama", 1.0, None, False),
        ("gemma2", 1.0, 30.0, False),
        ("cohere", 0.25, None, False),
        ("granite", 0.125, None, False),
        ("marian", 1.0, None, True),
    ],
)
@pytest.mark.parametrize("compute", [CPU, CPU_BF16], ids=["fp32", "bf16"])
def test_the_proof_finds_how_logits_are_made(
    name: str, scale: float, cap: float | None, has_offset: bool, compute: Compute
) -> None:
    model, batch, kind = _work(name)
    head = find_head(model, _task(kind), batch, compute)
    assert isinstance(head, Head), head
    assert (head.scale, head.cap, head.offset is not None) == (scale, cap, has_offset)


def test_the_next_item_is_learned_without_logits_and_unknown_items_are_not() -> None:
    model, batch, _ = _work("llama")
    batch["labels"][0, 1] = 11
    task = _task("items")
    head = find_head(model, task, batch, CPU)
    assert isinstance(head, Head), head
    found = head_loss.head_loss(task, head)(model, batch)
    torch.testing.assert_close(found, plain_loss(task)(model, batch), rtol=2e-6, atol=0)


def _trained(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def _squared(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.square())


def _own_class(model: Any) -> None:
    model.lm_head = type("Scaled", (nn.Linear,), {})(HIDDEN, 64, bias=False).requires_grad_(False)


def _beside(model: Any) -> None:
    """Logits that depend on more than what goes into the output embeddings."""
    inner = model.forward

    def forward(**arguments: Any) -> Any:
        output = inner(**arguments)
        output.logits = output.logits + arguments["input_ids"][..., None]
        return output

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_trained, "the output embeddings are trained"),
        (_squared, "its logits are something else"),
        (_own_class, "the output embeddings are no plain linear projection"),
        (_beside, "its logits are something else"),
    ],
)
def test_what_is_not_proved_is_told(change: Callable[[Any], None], reason: str) -> None:
    model, batch, kind = _work("llama")
    change(model)
    found = find_head(model, _task(kind), batch, CPU)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_a_task_with_another_loss_is_left_alone() -> None:
    from ticktune.tasks.text_classification import TextClassification

    model, batch, _ = _work("llama")
    task = TextClassification(TaskOptions(("text", "label"), 16), "single", ("a", "b"), None)
    assert find_head(model, task, batch, CPU) == "the loss is not that of a language-model head"


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_all_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as t

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = t.LlamaForCausalLM(t.LlamaConfig(**shape, num_attention_heads=2, vocab_size=4096)).eval()
    attach(model, 4)
    ids = torch.randint(4096, (4, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    task = _task("causal")
    head = find_head(model, task, batch, CPU)
    assert isinstance(head, Head), head
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 16)
    largest = []
    for loss_of in (plain_loss(task), head_loss.head_loss(task, head)):
        with _Largest() as watch:
            loss_of(model, batch).backward()
        largest.append(watch.elements)
    assert largest[0] >= 4 * 31 * 4096
    assert largest[1] <= max(16 * 4096, head.linear.weight.numel())


def test_a_chunk_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_loss.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 5)
    sizes: list[int] = []
    inner = head_loss._chunk_loss

    def watched(z: Tensor, *rest: Any) -> Any:
        sizes.append(len(z))
        return inner(z, *rest)

    monkeypatch.setattr(head_loss, "_chunk_loss", watched)
    linear_cross_entropy(_states(), _targets(), _head())
    assert sizes == [5, 5, 5]


def test_it_is_the_same_under_gradient_checkpointing() -> None:
    model, batch, kind = _work("llama")
    task = _task(kind)
    head = find_head(model, task, batch, CPU)
    assert isinstance(head, Head), head
    model.train()
    slopes = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.zero_grad()
        head_loss.head_loss(task, head)(model, batch).backward()
        slopes.append({key: p.grad for key, _, p in adapter_parameters(model)})
    assert slopes[0].keys() == slopes[1].keys()
    for key, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][key], slope, rtol=1e-6, atol=1e-9, msg=key)


def test_training_with_it_ends_with_the_same_weights(tiny_llama: Path) -> None:
    ends = []
    for fast in (False, True):
        work = causal_lm(tiny_llama, rows=12)
        attach(work.model, 4)
        before = snapshot(work.model)
        batches = work.batches(6, 3)
        head = find_head(work.model, work.task, batches[0][0], CPU)
        assert isinstance(head, Head), head
        loss_of = head_loss.head_loss(work.task, head) if fast else None
        optimizer = optimizer_of(work.model, lr=0.01, norm_lr=0.01, eps=1e-2)
        losses = [report.loss for report in steps(work, batches, optimizer, loss_of=loss_of)]
        ends.append((losses, snapshot(work.model)))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-6)
    for key, plain in ends[0][1].items():
        moved = float((plain - before[key]).norm())
        assert float((ends[1][1][key] - plain).norm()) <= 1e-4 * moved + 1e-9, key


# In evaluation


@dataclass(frozen=True)
class _Rows:
    """One example for each row of a batch, which the task below puts together again."""

    batch: Batch

    @property
    def lengths(self) -> list[int]:
        return [int((row != IGNORED).sum()) for row in self.batch["labels"]]

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def take(self, numbers: list[int]) -> list[Any]:
        return [{name: values[number] for name, values in self.batch.items()} for number in numbers]


def _score(model: nn.Module, kind: str, batch: Batch, compute: Compute = CPU, **options: Any) -> dict[str, float]:
    def collate(examples: list[Any], **_: Any) -> Batch:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    task = _task(kind, 0.1)
    object.__setattr__(task, "collate", collate)
    object.__setattr__(task, "update_by_generation", lambda *_: None)
    rows: Any = _Rows(batch)
    return {key: v for key, v in score(model, task, rows, compute, 3, **options).items() if not math.isnan(v)}


@pytest.mark.parametrize("compute", [CPU, CPU_BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_all_logits(
    name: str, trained: bool, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, kind = _work(name)
    model.get_output_embeddings().requires_grad_(trained)  # type: ignore[operator]
    plain = _score(model, kind, batch, compute, fast=False)
    parts: list[int] = []

    def watched(metrics: Any, logits: Tensor, targets: Tensor) -> None:
        parts.append(len(targets))
        update_tokens(metrics, logits, targets)

    monkeypatch.setattr("ticktune.evaluate.update_tokens", watched)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 4)
    found = _score(model, kind, batch, compute)
    assert found.keys() == plain.keys() == {"perplexity", "token_accuracy", "loss"}
    assert found == pytest.approx(plain, rel=1e-6 if compute is CPU else 1e-2)
    assert found["token_accuracy"] == pytest.approx(plain["token_accuracy"], rel=1e-6)
    targets = _task(kind).targets(batch)
    assert targets is not None
    assert sum(parts) == int((targets != IGNORED).sum())
    assert max(parts) == 4


def test_scores_are_those_of_the_whole_in_double_precision() -> None:
    model, batch, kind = _work("llama")
    with torch.no_grad():
        logits = model.double()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    batch["labels"][0, 1:] = logits[0, :-1].argmax(-1)  # so that some are right
    labels = _task(kind).targets(batch)
    assert labels is not None
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    loss = F.cross_entropy(logits, labels)
    model.float()
    expected = {"loss": loss, "perplexity": loss.exp(), "token_accuracy": (logits.argmax(-1) == labels).float().mean()}
    assert expected["token_accuracy"] > 0.1
    assert _score(model, kind, batch) == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_a_head_that_is_not_proved_is_scored_by_all_logits() -> None:
    model, batch, kind = _work("llama")
    expected = _score(model, kind, batch)
    model.lm_head.register_forward_hook(lambda module, args, output: 9 * (9 * output).sin())  # type: ignore[union-attr]
    found = _score(model, kind, batch)
    assert found == _score(model, kind, batch, fast=False)
    assert found != pytest.approx(expected, rel=1e-3)


def test_a_head_is_proved_on_few_positions_of_long_rows(tiny_llama: Path) -> None:
    work = causal_lm(tiny_llama)
    example = {"row": 0, "length": 500, "input_ids": list(range(500)), "labels": [*range(500)]}
    [end] = ends_of([example])
    assert end["input_ids"] == end["labels"] == list(range(436, 500))
    short = work.examples.take([0])
    assert ends_of(short) == short
    no_labels = [{"row": 0, "length": 500, "input_ids": list(range(500)), "prior": 7}]
    assert ends_of(no_labels) == no_labels  # its positions are counted from the beginning
