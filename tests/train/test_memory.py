"""Gradient checkpointing: the same losses and gradients, less memory, and the figures that are said of it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tests.models as models
from tests.training import Work, causal_lm, classification, optimizer_of, same, snapshot, steps
from ticktune.patch.attach import adapter_parameters, attach, set_training
from ticktune.patch.standins import Checkpointed, layers_of, places_of, standing_in
from ticktune.train.memory import measured

FAMILIES = ("bert", "deberta-v2", "modernbert", "albert", "llama", "gemma2", "gpt2", "mixtral", "falcon")
_WRITERS = ("llama", "gemma2", "gpt2", "mixtral", "falcon")


def _work(family: str, tiny_bert: Path, tiny_llama: Path, layers: Any = "all") -> Work:
    is_writer = family in _WRITERS
    work = causal_lm(tiny_llama) if is_writer else classification(tiny_bert)
    torch.manual_seed(1)
    work.model = models.families()[family]()
    attach(work.model, 4, layers, dropout=0.1)
    torch.manual_seed(2)
    models.perturb([p for _, _, p in adapter_parameters(work.model)], 0.05)
    return work


def _around(work: Work) -> Any:
    layers = layers_of(work.model)
    places, stand_ins = places_of(work.model, layers), {layer: Checkpointed(layer) for layer in layers}

    @contextmanager
    def around(batch: Any) -> Iterator[None]:
        with standing_in(places, stand_ins):
            yield

    return around


@pytest.mark.parametrize("base_dropout", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_without_it(
    family: str, base_dropout: bool, tiny_bert: Path, tiny_llama: Path
) -> None:
    """Bit for bit: the layer that is computed again draws the same numbers for its dropouts."""
    found = []
    for checkpointed in (False, True):
        work = _work(family, tiny_bert, tiny_llama)
        options = {"around": _around(work)} if checkpointed else {}
        reports = list(steps(work, work.batches(12, 5), optimizer_of(work.model), base_dropout=base_dropout, **options))
        found.append(([r.loss for r in reports], [r.grad_norm for r in reports], snapshot(work.model)))
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_writer_that_classifies_fills_no_cache_twice(family: str, tiny_llama: Path) -> None:
    """Its task does not say that no keys and values are to be kept, so it keeps them."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        work = classification(tiny_llama)
        config = models.table()[family].config
        config.pad_token_id = 0
        assert config.use_cache
        work.model = transformers.AutoModelForSequenceClassification.from_config(config)
        attach(work.model, 4)
        with measured(work.model, layers_of(work.model)) as kept:
            outputs = work.task.forward(work.model, work.batches(24)[0][0])
        del outputs
        options = {"around": _around(work)} if checkpointed else {}
        reports = list(steps(work, work.batches(12), optimizer_of(work.model), **options))
        found.append(([r.loss for r in reports], kept.plain))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_trained_tensor_has_a_gradient_and_nothing_else(
    family: str, layers: str, tiny_bert: Path, tiny_llama: Path
) -> None:
    work = _work(family, tiny_bert, tiny_llama, layers)
    set_training(work.model, True)
    [batch] = work.batches(24)
    seen: list[bool] = []
    work.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: seen.append(output.requires_grad)
    )
    with _around(work)(batch[0]):
        work.task.loss(work.task.forward(work.model, batch[0]), batch[0]).backward()
    trained = {key: p for key, _, p in adapter_parameters(work.model)}
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []
    ids = {id(p) for p in trained.values()}
    assert all(p.grad is None for p in work.model.parameters() if id(p) not in ids)
    assert not work.model.get_input_embeddings().weight.requires_grad  # type: ignore[operator]
    # The output of the embeddings needs a gradient only where a norm behind them is trained.
    assert seen == [False]


def test_layers_are_run_again_in_the_backward_pass(tiny_bert: Path, tiny_llama: Path) -> None:
    work = _work("llama", tiny_bert, tiny_llama)
    ran: list[int] = []
    for number, layer in enumerate(layers_of(work.model)):
        layer.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
    set_training(work.model, True)
    [batch] = work.batches(24)
    with _around(work)(batch[0]):
        loss = work.task.loss(work.task.forward(work.model, batch[0]), batch[0])
    assert ran == [0, 1, 2]
    loss.backward()
    assert ran[:3] == [0, 1, 2]
    assert len(ran) >= 3


def _kept(work: Work, around: Any) -> int:
    """Bytes that a forward pass leaves in memory, counted by the objects that are alive."""
    counts, bytes_of = Counter[int](), dict[int, int]()

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.key = tensor.detach(), tensor.untyped_storage()._cdata
            bytes_of[self.key] = tensor.untyped_storage().nbytes()
            counts[self.key] += 1

        def __del__(self) -> None:
            counts[self.key] -= 1

    set_training(work.model, True, base_dropout=False)
    [batch] = work.batches(24)
    with around(batch[0]), torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = work.task.loss(work.task.forward(work.model, batch[0]), batch[0])
    own = {p.untyped_storage()._cdata for p in [*work.model.parameters(), *work.model.buffers()]}
    kept = {key: bytes_of[key] for key, count in counts.items() if count and key not in own}
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_figures_are_what_is_kept(family: str, tiny_bert: Path, tiny_llama: Path) -> None:
    from contextlib import nullcontext

    work = _work(family, tiny_bert, tiny_llama)
    set_training(work.model, True, base_dropout=False)
    [batch] = work.batches(24)
    with measured(work.model, layers_of(work.model)) as found:
        loss = work.task.loss(work.task.forward(work.model, batch[0]), batch[0])
    del loss
    assert len(found.layers) == 3
    assert found.plain == pytest.approx(_kept(work, nullcontext), rel=0.02)
    assert found.outside + found.inputs == pytest.approx(_kept(work, _around(work)), rel=0.01)
    assert found.checkpointed < 0.6 * found.plain
