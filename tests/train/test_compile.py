"""Compiled layers: the same losses and gradients, one graph for all layers and lengths, and errors for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.models as models
from tests.training import Work, causal_lm, classification, optimizer_of, snapshot, steps
from ticktune.device import check_compiler
from ticktune.errors import RecipeError
from ticktune.patch import standins
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.standins import Checkpointed, Compiled, layers_of, places_of, standing_in

# torch hides it where it traces, from those who see warnings, not from those to whom they are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs and their backward passes as for inductor, run operation by operation: no compiler is called."""
    monkeypatch.setattr(standins, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _work(family: str, tiny_bert: Path, tiny_llama: Path) -> Work:
    work = classification(tiny_bert) if family == "bert" else causal_lm(tiny_llama)
    torch.manual_seed(1)
    work.model = models.families()[family]()
    attach(work.model, 4, "last:2")
    torch.manual_seed(2)
    models.perturb([p for _, _, p in adapter_parameters(work.model)], 0.05)
    return work


def _around(work: Work, checkpointed: bool = False) -> Any:
    layers = layers_of(work.model)
    stand_ins: dict[nn.Module, nn.Module] = {layer: Compiled(layer) for layer in layers}
    if checkpointed:
        stand_ins = {layer: Checkpointed(inner) for layer, inner in stand_ins.items()}
    places = places_of(work.model, layers)

    @contextmanager
    def around(batch: Any) -> Iterator[None]:
        with standing_in(places, stand_ins):
            yield

    return around


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpointed"), [("bert", False), ("llama", True)])
def test_losses_and_gradients_are_those_without_it_and_layers_and_lengths_share_graphs(
    family: str, checkpointed: bool, tiny_bert: Path, tiny_llama: Path
) -> None:
    found = []
    for compiled in (False, True):
        work = _work(family, tiny_bert, tiny_llama)
        batches = work.batches(6)
        assert len({batch[0]["input_ids"].shape for batch in batches}) > 2
        options = {"around": _around(work, checkpointed)} if compiled else {}
        reports = list(steps(work, batches, optimizer_of(work.model, eps=1e-2), base_dropout=False, **options))
        found.append(([r.loss for r in reports], [r.grad_norm for r in reports], snapshot(work.model)))
    counters = torch._dynamo.utils.counters
    # Layers with ticks and without, below what trains and above; not one for each length.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for key, tensor in found[0][2].items():
        torch.testing.assert_close(found[1][2][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_what_cannot_be_compiled_is_an_error_for_people(
    tiny_bert: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no space left for code")

    monkeypatch.setattr(standins, "BACKEND", broken)
    work = _work("bert", tiny_bert, tiny_llama)
    with pytest.raises(RecipeError, match="a BertLayer cannot be compiled") as caught:
        list(steps(work, work.batches(6)[:1], optimizer_of(work.model), around=_around(work)))
    assert caught.value.problems[0].fix == "set training.compile: false"


@pytest.mark.parametrize(("device", "names"), [("cpu", "g++|clang++"), ("cuda", "gcc or clang")])
def test_a_missing_compiler_is_an_error_for_people(
    device: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="is not installed") as caught:
        check_compiler(torch.device(device), "recipe.yaml:9 training.compile")
    [problem] = caught.value.problems
    assert any(name in problem.message for name in names.split("|"))
    assert problem.where == "recipe.yaml:9 training.compile"
    assert "training.compile: false" in problem.fix


def test_the_compiler_that_the_environment_names_is_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(RecipeError, match="my-compiler, which is not installed"):
        check_compiler(torch.device("cpu"), "x")
    (tmp_path / "my-compiler").write_text("")
    (tmp_path / "my-compiler").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compiler(torch.device("cpu"), "x")


def test_a_layer_with_a_tick_does_not_run_the_graph_of_one_without() -> None:
    """In one model, and in two of a process: their layers have the same code, and differ by hooks alone."""
    for layers in ("none", "last:1", "all"):
        model = attach(models.families()["llama"](), 4, layers, norm_layers="all")
        ticks = [(key, p) for key, role, p in adapter_parameters(model) if role in ("Q", "U", "P")]
        for key, parameter in ticks:
            if key.endswith(".P"):
                nn.init.normal_(parameter)
        ids = torch.arange(3, 19).view(2, 8)
        plain = model(input_ids=ids, use_cache=False).logits
        found = layers_of(model)
        with standing_in(places_of(model, found), {layer: Compiled(layer) for layer in found}):
            compiled = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled, plain)
        compiled.sum().backward()
        assert not [key for key, parameter in ticks if parameter.grad is None], layers
