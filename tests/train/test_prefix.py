"""Hidden states of the frozen lower layers, kept: the same losses and gradients, and what cannot be kept is refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch import nn

import tests.models as models
from tests.training import CPU, Work, causal_lm, classification, optimizer_of, same, snapshot, steps
from ticktune.data.batches import epoch_batches, micro_batches
from ticktune.data.states import States
from ticktune.errors import PatchError, ResourceError
from ticktune.evaluate import score
from ticktune.patch.attach import adapter_parameters, attach, set_training
from ticktune.patch.standins import find_prefix
from ticktune.recipe.schema import Training
from ticktune.session import Session
from ticktune.train.prefix import NUMBERS, PrefixCache

# Single stacks of every kind: norms behind and before, joined projections, experts, windows, absolute and rotary
# positions.
TEXTS = ("bert", "roberta", "electra", "mpnet", "distilbert", "deberta-v2", "modernbert")
WRITERS = (
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "mixtral",
)


def _work(family: str, folder: Path) -> Work:
    """A tiny model of a family, whose upper of three layers will be trained, on rows of ragged length."""
    work = (classification if family in TEXTS else causal_lm)(folder)
    torch.manual_seed(1)
    work.model = models.families()[family]()
    return work


def _ticked(work: Work, layers: Any = "last:1", **options: Any) -> Work:
    attach(work.model, 4, layers, **options)
    torch.manual_seed(2)
    models.perturb([p for _, _, p in adapter_parameters(work.model)], 0.05)
    return work


def _batches(work: Work, epochs: int = 2) -> list[list[Any]]:
    """The batches of some epochs, as training has them."""
    found = []
    for epoch in range(epochs):
        for batch in epoch_batches(work.examples.lengths, 8, seed=5, epoch=epoch):
            parts = micro_batches(batch, 5)
            found.append([work.task.collate(work.examples.take(part)) | {NUMBERS: part} for part in parts])
    return found


def _trained(work: Work, around: Any = None) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms of the gradients, and what was trained."""
    # A large eps: with the usual one, AdamW's step is the sign even of rounding errors.
    optimizer = optimizer_of(work.model, lr=1e-2, eps=1e-2)
    options = {} if around is None else {"around": around}
    reports = list(steps(work, _batches(work), optimizer, base_dropout=False, **options))
    return [r.loss for r in reports], [r.grad_norm for r in reports], snapshot(work.model)


def _cache(work: Work, kind: Literal["memory", "disk"] = "memory", base_dropout: bool = False) -> PrefixCache:
    cache = PrefixCache(work.model, work.task, work.examples, CPU, base_dropout=base_dropout)
    cache.fill(kind, 7)
    return cache


@pytest.mark.parametrize("family", TEXTS + WRITERS)
def test_losses_and_gradients_are_those_without_it(family: str, tiny_bert: Path, tiny_llama: Path) -> None:
    folder = tiny_bert if family in TEXTS else tiny_llama
    dropout = 0.0 if family == "mixtral" else 0.1
    plain, kept = (_ticked(_work(family, folder), dropout=dropout) for _ in range(2))
    losses, norms, tensors = _trained(plain)
    found = _trained(kept, _cache(kept).serving)
    assert len(losses) == 6
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert found[1] == pytest.approx(norms, rel=1e-5)
    for key, tensor in tensors.items():
        torch.testing.assert_close(found[2][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_from_the_states_of_the_same_batch_they_are_the_same_bit_for_bit(tiny_bert: Path) -> None:
    """So all that differs is rounding, in products of other shapes."""
    plain, kept = (_ticked(_work("bert", tiny_bert)) for _ in range(2))
    cache = _cache(kept)

    @contextmanager
    def own_states(batch: Any) -> Iterator[None]:
        padded = batch | {NUMBERS: list(range(len(batch[NUMBERS])))}
        cache._states = States("memory", 0)
        cache._states.add(padded[NUMBERS], cache._compute(batch)[1])
        with cache.serving(padded):
            yield

    losses, norms, tensors = _trained(plain)
    found = _trained(kept, own_states)
    assert (found[0], found[1]) == (losses, norms)
    assert same(found[2], tensors)


def test_a_writer_that_classifies_begins_behind_its_prefix_too(tiny_llama: Path) -> None:
    """Its task does not say that no keys and values are to be kept, so it keeps them."""
    found = []
    for kept in (False, True):
        torch.manual_seed(0)
        work = classification(tiny_llama)
        work.model.config.pad_token_id = 0  # type: ignore[union-attr]
        found.append(_trained(_ticked(work), _cache(work).serving if kept else None)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_head_alone_begins_behind_the_last_layer(tiny_bert: Path) -> None:
    plain, kept = (_work("bert", tiny_bert) for _ in range(2))
    for work in (plain, kept):
        attach(work.model, 0, norms="none", head=True)
    cache = _cache(kept)
    assert len(cache.prefix.layers) == 3
    assert _trained(kept, cache.serving)[0] == pytest.approx(_trained(plain)[0], rel=1e-6)


def test_layers_of_the_prefix_are_not_run_and_stand_in_the_model_again_afterwards(tiny_llama: Path) -> None:
    work = _ticked(_work("llama", tiny_llama), "last:2")
    before = [type(layer) for layer in work.model.model.layers]  # type: ignore[union-attr]
    names = [name for name, _ in work.model.named_parameters()]
    examples = work.examples
    expected = score(work.model, work.task, examples, CPU, 8)
    cache = _cache(work)
    ran: list[nn.Module] = []
    for layer in work.model.model.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda module, args, output: ran.append(module))
    list(steps(work, _batches(work, 1), optimizer_of(work.model, lr=1e-12, norm_lr=1e-12), around=cache.serving))
    assert set(ran) == set(work.model.model.layers[1:])  # type: ignore[union-attr]
    assert [type(layer) for layer in work.model.model.layers] == before  # type: ignore[union-attr]
    assert [name for name, _ in work.model.named_parameters()] == names
    assert score(work.model, work.task, examples, CPU, 8) == pytest.approx(expected, rel=1e-4)


def test_they_stand_there_again_after_an_error(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    cache, layers = _cache(work), list(work.model.bert.encoder.layer)  # type: ignore[union-attr]
    with pytest.raises(KeyError), cache.serving({NUMBERS: [0]}):
        raise KeyError
    assert list(work.model.bert.encoder.layer) == layers  # type: ignore[union-attr]


# What is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_states_are_those_that_were_added(kind: Literal["memory", "disk"], dtype: torch.dtype) -> None:
    states = States(kind, 1000)
    rows = [torch.randn(length, 6).to(dtype) for length in (3, 1, 5, 2)]
    states.add([7, 2], rows[:2])
    states.add([0, 5], rows[2:])
    states.seal()
    assert all(torch.equal(a, b) for a, b in zip(states.take([7, 2, 0, 5]), rows, strict=True))
    assert torch.equal(states.take([5])[0], rows[3])


def test_on_disk_nothing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    states = States("disk", 1000)
    states.add([0], [torch.ones(1000, 32)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    states.seal()
    assert torch.equal(states.take([0])[0], torch.ones(1000, 32))


def test_more_than_memory_may_hold_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"take 5\.0 GB, and memory holds at most 4\.3 GB") as caught:
        States("memory", 5 * 10**9)
    assert "prefix_cache: disk" in caught.value.problems[0].fix


def test_more_than_the_disk_has_is_refused() -> None:
    with pytest.raises(ResourceError, match="GB are free") as caught:
        States("disk", 10**18)
    assert "make room" in caught.value.problems[0].fix


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_disk_that_fills_up_is_an_error_for_people() -> None:
    states = States("disk", 0)
    with open("/dev/full", "wb", buffering=0) as full, cast(Any, states._file):
        states._file = full
        with pytest.raises(ResourceError, match="cannot write here: No space left on device"):
            states.add([0], [torch.ones(4, 4)])


def test_the_bytes_are_known_after_the_first_batch(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    cache = PrefixCache(work.model, work.task, work.examples, CPU, base_dropout=False)
    rows = cache._compute(cache._batch([0, 1]))[1]
    assert cache._size([0, 1], rows) == sum(work.examples.lengths) * models.HIDDEN * 4


# What cannot be kept


def test_dropout_of_the_base_in_the_prefix_is_refused(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    with pytest.raises(PatchError, match="own dropout acts in its frozen layers") as caught:
        _cache(work, base_dropout=True)
    assert caught.value.problems[0].fix == "set base.dropout: off"


def test_a_base_without_dropout_may_keep_it(tiny_llama: Path) -> None:
    _cache(_ticked(_work("llama", tiny_llama)), base_dropout=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": "all"}, "the norm of the embeddings is trained"),
        ({"layers": "all", "norms": ["ffn"]}, "the lowest layer is trained"),
        ({"layers": "last:1", "norm_layers": "all"}, "the norm of the embeddings is trained"),
    ],
)
def test_what_is_trained_below_is_refused(options: dict[str, Any], reason: str, tiny_bert: Path) -> None:
    work = _work("bert", tiny_bert)
    attach(work.model, 4, **options)
    with pytest.raises(PatchError, match=reason):
        _cache(work)


@pytest.mark.parametrize(
    ("family", "layers", "reason"),
    [
        ("t5", {"decoder": "last:1"}, "several stacks of layers"),
        ("bart", {"decoder": "last:1"}, "several stacks of layers"),
    ],
)
def test_models_of_several_stacks_are_refused(family: str, layers: Any, reason: str) -> None:
    model = models.families()[family]()
    attach(model, 4, layers)
    with pytest.raises(PatchError, match=reason):
        find_prefix(model)


def test_layers_that_share_a_block_are_refused(tiny_bert: Path) -> None:
    work = _work("bert", tiny_bert)
    work.model = models.families()["albert"]()
    attach(work.model, 4, "last:1", unshare=True)
    with pytest.raises(PatchError, match="its layers share one block"):
        _cache(work)


class _Drawn:
    """A task whose inputs are drawn anew, as masked tokens are."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def collate(self, examples: Any, *, seed: int | None = None) -> Any:
        batch = self.task.collate(examples)
        generator = torch.Generator().manual_seed(seed or 0)
        batch["input_ids"] = torch.randint(4, 60, batch["input_ids"].shape, generator=generator)
        return batch


def test_inputs_that_are_drawn_anew_are_refused(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    work.task = _Drawn(work.task)
    with pytest.raises(PatchError, match="drawn anew in each step"):
        _cache(work)


def test_a_trained_tensor_below_is_found_wherever_it_stands(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    work.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(PatchError, match="a trained tensor lies below"):
        _cache(work)


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    layer = work.model.bert.encoder.layer[0]  # type: ignore[union-attr,index]
    layer.register_forward_hook(lambda module, args, output: output - output.mean(0))
    with pytest.raises(PatchError, match="depend on the other rows"):
        _cache(work)


def test_a_model_that_looks_back_at_lower_layers_is_refused(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    layers = work.model.bert.encoder.layer  # type: ignore[union-attr]
    seen: dict[str, torch.Tensor] = {}
    layers[0].register_forward_hook(lambda module, args, output: seen.update(x=output))  # type: ignore[index]
    layers[2].register_forward_hook(lambda module, args, output: output + seen.pop("x", 0.0))  # type: ignore[index]
    with pytest.raises(PatchError, match="behind its frozen layers it computes a loss of"):
        _cache(work)


def test_a_model_that_does_not_run_behind_them_is_refused(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    layers = work.model.bert.encoder.layer  # type: ignore[union-attr]
    seen: dict[str, torch.Tensor] = {}
    layers[0].register_forward_hook(lambda module, args, output: seen.update(x=output))  # type: ignore[index]
    layers[2].register_forward_hook(lambda module, args, output: output + seen.pop("x"))  # type: ignore[index]
    with pytest.raises(PatchError, match="behind its frozen layers it does not run: 'x'"):
        _cache(work)


def test_dropout_of_routed_ticks_is_refused(tiny_llama: Path) -> None:
    """Padding is routed too, and from other states to other experts, whose ticks then draw other numbers."""
    work = _ticked(_work("mixtral", tiny_llama), dropout=0.1)
    with pytest.raises(PatchError, match="behind its frozen layers it computes a loss of"):
        _cache(work)


def test_in_half_precision_it_is_close(tiny_bert: Path) -> None:
    if not _has_bf16():
        pytest.skip("this CPU does not multiply bfloat16")
    from ticktune.device import Compute

    compute = Compute(torch.device("cpu"), "bf16")
    found = []
    for kept in (False, True):
        work = _ticked(_work("bert", tiny_bert))
        options: dict[str, Any] = {}
        if kept:
            cache = PrefixCache(work.model, work.task, work.examples, compute, base_dropout=False)
            cache.fill("memory", 7)
            options["around"] = cache.serving
        optimizer = optimizer_of(work.model)
        reports = steps(work, _batches(work), optimizer, compute=compute, base_dropout=False, **options)
        found.append([r.loss for r in reports])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def _has_bf16() -> bool:
    from ticktune.device import cpu_has_bf16

    return cpu_has_bf16()


def test_filling_leaves_the_random_state_as_it_was(tiny_bert: Path) -> None:
    work = _ticked(_work("bert", tiny_bert))
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    _cache(work)
    assert torch.equal(torch.random.get_rng_state(), before)
    set_training(work.model, False)


def test_with_batches_of_tokens_it_is_not_filled_with_all_rows_at_once() -> None:
    sizes: list[int] = []
    session: Any = SimpleNamespace(
        cache=SimpleNamespace(prefix=SimpleNamespace(layers=[None]), fill=lambda kind, size, poll: sizes.append(size)),
        recipe=SimpleNamespace(training=Training(batch_size=None, batch_tokens=512, prefix_cache="memory")),
        micro_batch_size=5000,
        prepared=SimpleNamespace(examples={"train": range(5000)}),
        signals=SimpleNamespace(poll=None),
        console=SimpleNamespace(note=lambda text: None),
        _on_cpu=nullcontext,
    )
    Session._fill_cache(session)
    assert sizes == [32]
