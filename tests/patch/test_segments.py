"""Attention inside of segments: torch's own attention in each of them, by any road to it."""

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import families
from ticktune.patch import segments
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.segments import (
    DropoutError,
    Segments,
    Window,
    attention,
    by_length,
    kernel_of,
    layer_keywords,
)  # fmt: skip
from ticktune.patch.standins import Checkpointed, Compiled, layers_of, places_of, standing_in
from ticktune.tasks.batch import SEGMENTS

LENGTHS = [5, 1, 9, 9, 9, 2, 2, 17, 10]  # 64 tokens, with equal ones in a row
WINDOWS: list[Window] = [(-1, 0), (-1, -1), (3, 0), (3, 3), (0, 0), (30, 0)]
HEADS = [(4, 4), (4, 2), (6, 1)]


def _states(heads: int, groups: int, size: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Queries, keys and values ``(2, heads, 32, size)`` as projections leave them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(2, 32, count, size, generator=generator) for count in (heads, groups, groups))
    return [states.to(device, dtype).transpose(1, 2).requires_grad_(True) for states in made]


def _expected(states: list[Tensor], window: Window, scale: float | None) -> Tensor:
    """Over all tokens, with what is outside of a segment or window left out: ``(2, 32, heads, d)``."""
    query, key, value = (each.transpose(1, 2).flatten(0, 1).transpose(0, 1) for each in states)  # (heads, tokens, d)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    places = torch.arange(len(owner))
    distance = places[:, None] - places
    left, right = (len(owner) if side < 0 else side for side in window)
    seen = (owner[:, None] == owner) & (distance <= left) & (distance >= -right)
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(1, 2) * factor).masked_fill(~seen.to(query.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1).unflatten(0, (2, 32))


def _gradients(found: Tensor, states: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.device, found.dtype)
    return list(torch.autograd.grad((found * weights).sum(), states))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_a_token_sees_what_is_near_enough_in_its_segment(
    heads: int, groups: int, window: Window, scale: float | None
) -> None:
    states = _states(heads, groups, 8, torch.float64)
    found, weights = _attend(states, window, scale)
    assert weights is None
    expected = _expected(states, window, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for own, other in zip(_gradients(found, states), _gradients(expected, states), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def _attend(states: list[Tensor], window: Window, scale: float | None, **others: Any) -> tuple[Tensor, None]:
    left, right = window
    keywords = layer_keywords(LENGTHS, states[0].device) | {"is_causal": right == 0 and left != 0} | others
    if left >= 0:
        keywords |= {"sliding_window": left + 1}
    return attention(SimpleNamespace(), *states, None, scale, **keywords)  # type: ignore[arg-type]


def test_the_layer_says_whether_it_is_causal() -> None:
    states = _states(4, 4, 8, torch.float64)
    for is_causal in (True, False):
        layer: Any = SimpleNamespace(is_causal=is_causal)
        found, _ = attention(layer, *states, None, **layer_keywords(LENGTHS, torch.device("cpu")))  # type: ignore[arg-type]
        torch.testing.assert_close(found, _expected(states, (-1, 0 if is_causal else -1), None), rtol=0, atol=1e-12)


def test_segments_of_one_length_in_a_row_are_attended_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    inner = F.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return inner(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    tokens = [torch.randn(64, 4, 8) for _ in range(3)]
    by_length(*tokens, LENGTHS, None, (-1, 0))
    assert shapes == [(1, 4, 5, 8), (1, 4, 1, 8), (3, 4, 9, 8), (2, 4, 2, 8), (1, 4, 17, 8), (1, 4, 10, 8)]


def test_under_autocast_it_computes_as_torch_does() -> None:
    states = _states(4, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = _attend(states, (-1, 0), None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), _expected(states, (-1, 0), None), rtol=0, atol=2e-2)


def test_layers_are_told_ends_and_a_length_that_few_values_have() -> None:
    keywords = layer_keywords([3, 5], torch.device("cpu"))
    assert keywords["cu_seq_lens_q"].tolist() == keywords["cu_seq_lens_k"].tolist() == [0, 3, 8]
    assert keywords["cu_seq_lens_q"].dtype == torch.int32
    assert keywords["max_length_q"] == keywords["max_length_k"] == 8
    assert [layer_keywords([n], torch.device("cpu"))["max_length_q"] for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"softcap": 30.0}, "knows no softcap"),
        ({"s_aux": torch.zeros(4)}, "knows no s_aux"),
        ({"cu_seq_lens_q": None}, "not told where segments end"),
    ],
)
def test_what_it_does_not_have_is_an_error(others: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _attend(_states(4, 4, 8, torch.float32), (-1, 0), None, **others)


def test_a_window_that_a_layer_has_and_does_not_say_is_an_error() -> None:
    layer: Any = SimpleNamespace(sliding_window=4)
    with pytest.raises(ValueError, match="does not say which window"):
        attention(layer, *_states(4, 4, 8, torch.float32), None, **layer_keywords(LENGTHS, torch.device("cpu")))  # type: ignore[arg-type]


def test_keys_of_other_tokens_are_an_error() -> None:
    query, key, value = _states(4, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="other tokens"):
        _attend([query, key[:, :, :9], value[:, :, :9]], (-1, 0), None)


# The kernel


def _old(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, q: int, k: int, is_causal: Any = False, **_: Any
) -> Any:
    return ("old", is_causal)


def _called(varlen: Any, heads: int, groups: int, window: Window) -> Any:
    query, key, ends = torch.zeros(4, heads, 8), torch.zeros(4, groups, 8), torch.tensor([0, 4])
    return kernel_of(varlen)(query, key, key, ends, 4, 0.5, window, 0.0)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_kernel_is_called_as_each_version_of_torch_wants_it(heads: int, groups: int, window: Window) -> None:
    def of_2_13(
        query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, q: int, k: int, *,
        scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        return scale, window_size, enable_gqa

    def of_2_11(
        query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, q: int, k: int, *,
        scale: Any = None, window_size: Any = (-1, -1),
    ) -> Any:  # fmt: skip
        return scale, window_size

    def of_2_10(
        query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, q: int, k: int, is_causal: bool = False,
        scale: Any = None,
    ) -> Any:  # fmt: skip
        return scale, is_causal

    assert _called(of_2_13, heads, groups, window) == (0.5, window, heads != groups)
    assert _called(of_2_11, heads, groups, window) == (0.5, window)
    if window[0] < 0:
        assert _called(of_2_10, heads, groups, window) == (0.5, window[1] == 0)
    else:
        with pytest.raises(ValueError, match="no windows"):
            _called(of_2_10, heads, groups, window)


def test_the_kernel_of_this_torch_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU can say: up to the operator, which has a form without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention.varlen import varlen_attn

    run = kernel_of(varlen_attn)
    with FakeTensorMode():
        query, key = torch.empty(64, 4, 8, dtype=torch.bfloat16), torch.empty(64, 2, 8, dtype=torch.bfloat16)
        ends = torch.zeros(len(LENGTHS) + 1, dtype=torch.int32)
        for window in WINDOWS:
            found = run(query, key, key, ends, 32, 0.3, window, 0.0)
            assert (found.shape, found.dtype) == (query.shape, query.dtype)


def test_on_a_cpu_each_segment_may_attend_by_our_own_attention() -> None:
    states = _states(4, 2, 8, torch.bfloat16)
    expected = _expected([each.double() for each in states], (-1, 0), None)
    torchs, _ = _attend(states, (-1, 0), None)
    ours, _ = _attend(states, (-1, 0), None, on_cpu=True)
    assert not torch.equal(ours, torchs)
    assert _distance([ours], [expected]) < 3 * _distance([torchs], [expected])


def test_a_model_attends_by_it_where_it_is_asked_to() -> None:
    model: Any = attach(families()["llama"]().bfloat16(), 4)
    ids = torch.randint(4, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    ways: Any = Segments(model)

    def logits() -> Tensor:
        with torch.no_grad(), ways.running({SEGMENTS: [3, 5, 8, 8]}):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    before = logits()
    ways.attend_on_cpu()
    after = logits()
    assert not torch.equal(before, after)
    assert _distance([after], [before]) < 3e-2
    assert model.config._attn_implementation == "sdpa"


def test_the_kernel_has_no_dropout() -> None:
    query = torch.zeros(4, 2, 8)
    with pytest.raises(DropoutError, match="the kernel has no dropout"):
        kernel_of(_old)(query, query, query, torch.tensor([0, 4]), 4, 0.5, (-1, 0), 0.1)


def test_without_the_kernel_weights_drop_out_in_each_segment() -> None:
    states = _states(4, 2, 8, torch.float64)
    torch.manual_seed(0)
    found, _ = _attend(states, (-1, -1), None, dropout=0.5)
    plain, _ = _attend(states, (-1, -1), None)
    assert not torch.allclose(found, plain)
    # The first token of the second segment sees itself alone: its value is dropped or doubled.
    value = states[2].transpose(1, 2).flatten(0, 1)[5].repeat_interleave(2, 0)
    ratio = found.flatten(0, 1)[5] / value
    assert {round(x, 9) for x in ratio.flatten().tolist()} <= {0.0, 2.0}
    mean = torch.stack([_attend(states, (-1, -1), None, dropout=0.5)[0].detach() for _ in range(2000)]).mean(0)
    assert (mean - plain).norm() < 0.05 * plain.norm()


on_cuda = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA device, and there is none"),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("device", ["cpu", on_cuda])
def test_in_half_precision_it_is_near_to_exact_attention_in_each_segment(
    device: str, heads: int, groups: int, size: int, window: Window, dtype: torch.dtype
) -> None:
    """On CUDA by the kernel."""
    segments._register(with_kernel=device == "cuda")
    states = _states(heads, groups, size, dtype, device)
    exact = [each.detach().float().requires_grad_(True) for each in states]
    found, _ = _attend(states, window, None)
    expected = _expected(exact, window, None)
    assert found.dtype == dtype
    allowed = 2e-2 if dtype == torch.bfloat16 else 5e-3
    assert _distance([found], [expected]) < allowed
    # Beside the largest of them: where a token sees itself alone, those of queries and keys are zero.
    slopes, others = _gradients(found, states), _gradients(expected, exact)
    largest = max(float(each.norm()) for each in others)
    assert all(
        float((own.float() - other).norm()) < allowed * largest for own, other in zip(slopes, others, strict=True)
    )


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    one, other = (torch.cat([each.detach().float().flatten() for each in tensors]) for tensors in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch, where it traces
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cuda", False), ("cuda", True)])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_model_in_half_precision_is_as_near_to_the_exact_one_as_with_masks(
    name: str, device: str, compiled: bool, autocast: bool
) -> None:
    """A Llama with fewer heads of keys and a Mistral with a window, their layers computed again backwards."""
    import transformers as t

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the kernel needs a CUDA device, and there is none")
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(3)
    built: Any = (
        t.LlamaForCausalLM(t.LlamaConfig(**shape))
        if name == "llama"
        else t.MistralForCausalLM(t.MistralConfig(**shape, sliding_window=4))
    )
    with torch.no_grad():  # as sharp as a trained model's
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter *= 3
    model: Any = attach(built, 8).to(device)
    with torch.no_grad():
        for _, _, parameter in adapter_parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
    lengths = [5, 1, 9, 9, 8, 2, 2, 17, 11]  # two rows
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 32)
    batch = {"input_ids": torch.randint(4, 64, (2, 32)).to(device), "position_ids": positions.to(device)}
    exact = _slopes(model, batch)
    if not autocast:
        model.to(torch.bfloat16)

    def context() -> Any:
        return torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext()

    masked = _slopes(model, batch, context())
    ways = Segments(model)
    layers: dict[Any, Any] = {
        layer: Checkpointed(Compiled(layer) if compiled else layer, ways.again) for layer in layers_of(model)
    }
    with standing_in(places_of(model, list(layers)), layers):
        found = _slopes(model, batch, context(), ways.running({SEGMENTS: lengths}))
    for own, plain, expected in zip(found, masked, exact, strict=True):
        assert 0 < _distance(own, expected) < 2 * _distance(plain, expected) + 1e-3
    torch._dynamo.reset()


def _slopes(model: Any, batch: dict[str, Tensor], *contexts: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, and the gradients of all that is trained."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        logits = model(**batch, use_cache=False).logits
    gradients = torch.autograd.grad(logits.float().square().mean(), [p for _, _, p in adapter_parameters(model)])
    return [logits], list(gradients)
