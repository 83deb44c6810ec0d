"""The frozen base costs nothing that it need not: no casts of its weights, no gradients, no graph below what trains."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tests.models as models
from tests.training import Work, causal_lm, classification, optimizer_of, steps
from ticktune.device import Compute, cpu_has_bf16
from ticktune.patch.attach import adapter_parameters, attach

BF16 = Compute(torch.device("cpu"), "bf16")
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU does not multiply bfloat16")


class _Copies(TorchDispatchMode):
    """Counts conversions of some tensors to another dtype or device."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched = watched
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone):
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() in self.watched:
                    self.found[self.watched[argument.untyped_storage().data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


def _work(family: str, folder: Path, dtype: torch.dtype) -> Work:
    work = (causal_lm if family in ("llama", "qwen3", "gpt2") else classification)(folder)
    torch.manual_seed(1)
    work.model = models.families()[family]().to(dtype)
    return work


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


@needs_bf16
@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gpt2", "llama", "qwen3"])
def test_no_weight_of_the_base_is_cast_in_a_step(family: str, layers: str, tiny_bert: Path, tiny_llama: Path) -> None:
    """Under autocast a float32 weight would be cast again in every step; these are held in bfloat16 once."""
    work = _work(family, tiny_llama if family in ("llama", "qwen3", "gpt2") else tiny_bert, torch.bfloat16)
    attach(work.model, 4, layers)
    frozen = _frozen(work.model)
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    with _Copies({p.untyped_storage().data_ptr(): name for name, p in frozen.items()}) as copies:
        list(steps(work, work.batches(12, 6), optimizer_of(work.model), compute=BF16))
    assert {name for name in copies.found if frozen[name].ndim > 1} == set()
    # What autocast computes in float32 reads the vectors of a frozen norm so; these are not worth a second copy.
    norms = {name.rpartition(".")[0] for name in copies.found}
    assert all(type(work.model.get_submodule(name)) is nn.LayerNorm for name in norms)
    assert len(norms) <= (0 if layers == "all" else 10)


@needs_bf16
def test_the_count_of_casts_sees_one(tiny_bert: Path) -> None:
    work = _work("bert", tiny_bert, torch.float32)
    attach(work.model, 4)
    weight = work.model.bert.encoder.layer[0].intermediate.dense.weight  # type: ignore[union-attr,index]
    with _Copies({weight.untyped_storage().data_ptr(): "w"}) as copies:
        list(steps(work, work.batches(12)[:1], optimizer_of(work.model), compute=BF16))
    assert copies.found["w"] >= 1


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_no_tensor_of_the_base_has_a_gradient(family: str, tiny_bert: Path, tiny_llama: Path) -> None:
    work = _work(family, tiny_bert if family == "bert" else tiny_llama, torch.float32)
    attach(work.model, 4)
    frozen = _frozen(work.model)
    list(steps(work, work.batches(12), optimizer_of(work.model)))
    assert all(p.grad is None for p in frozen.values())
    embeddings = work.model.get_input_embeddings().weight  # type: ignore[operator]
    assert not embeddings.requires_grad
    trained = [p for _, _, p in adapter_parameters(work.model)]
    assert not {id(p) for p in trained} & {id(p) for p in frozen.values()}


@pytest.mark.parametrize(
    ("family", "path"), [("bert", "bert.encoder.layer"), ("llama", "model.layers"), ("gpt2", "transformer.h")]
)
def test_nothing_is_kept_or_computed_backwards_below_the_lowest_trained_layer(
    family: str, path: str, tiny_bert: Path, tiny_llama: Path
) -> None:
    work = _work(family, tiny_bert if family == "bert" else tiny_llama, torch.float32)
    attach(work.model, 4, "last:1")
    layers = work.model.get_submodule(path)
    kept: list[int] = []
    graphs: dict[int, bool] = {}
    at = [0]

    def before(number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            at[0] = number

        return hook

    def after(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            graphs[number] = (output[0] if isinstance(output, tuple) else output).requires_grad

        return hook

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(number))
        layer.register_forward_hook(after(number))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(at[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        list(steps(work, work.batches(24), optimizer_of(work.model)))
    assert graphs == {0: False, 1: False, 2: True}
    assert set(kept) == {2}
