"""Layers without padding: losses and gradients are those of padded rows, or leaving it out is refused."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import families, perturb, word_tokenizer
from tests.training import CPU
from ticktune.device import Compute
from ticktune.errors import PatchError
from ticktune.patch import segments
from ticktune.patch.attach import adapter_parameters, attach
from ticktune.patch.standins import Checkpointed, Compiled, layers_of, places_of, standing_in
from ticktune.patch.unpadded import TOKENS, Unpadded, without_padding
from ticktune.tasks.batch import SEGMENTS, Batch
from ticktune.tasks.task import TaskOptions
from ticktune.tasks.text_classification import TextClassification
from ticktune.train.head_loss import plain_loss
from ticktune.train.padding import prove_unpadded

LENGTHS = [5, 11, 2, 11, 9, 3, 12, 2]
ENCODERS = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "distilbert", "albert"]
ENCODERS += ["modernbert", "llama"]


def _task() -> TextClassification:
    return TextClassification(TaskOptions(("text", "label"), 16), "single", ("a", "b"), word_tokenizer())


def _batch(lengths: list[int] = LENGTHS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.arange(len(lengths)) % 2
    return without_padding({"input_ids": ids * mask, "attention_mask": mask, "target": labels})


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers as t

    built: dict[str, Any] = {
        # Heads of 16, as the kernel wants a multiple of 8.
        "bert": lambda: t.BertForSequenceClassification(
            t.BertConfig(
                vocab_size=64, hidden_size=48, intermediate_size=82, num_hidden_layers=3, num_attention_heads=3
            )
        ),
        # Windows of two tokens on each side, far shorter than the texts.
        "modernbert": lambda: t.ModernBertForSequenceClassification(
            t.ModernBertConfig(
                vocab_size=64, hidden_size=48, intermediate_size=82, num_hidden_layers=4, num_attention_heads=3,
                pad_token_id=0, local_attention=4, global_attn_every_n_layers=2,
            )
        ),
        "llama": lambda: t.LlamaForSequenceClassification(
            t.LlamaConfig(
                vocab_size=64, hidden_size=48, intermediate_size=82, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(4)
    model: Any = (built[name] if name in built else families()[name])().eval()
    with torch.no_grad():  # as sharp as a trained model's, so that a leak shows
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 3
    model = attach(model, 4).to(dtype)
    perturb(parameter for _, _, parameter in adapter_parameters(model))
    return model


def _slopes(
    model: Any, unpadded: Unpadded | None, layers: dict[nn.Module, nn.Module], batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    with (
        standing_in(places_of(model, list(layers)), layers),
        nullcontext() if unpadded is None else unpadded.running(batch),
    ):
        loss = plain_loss(_task())(model, batch)
    parameters = [parameter for _, _, parameter in adapter_parameters(model)]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(slope is not None and slope.any() for slope in found)
    return loss.detach(), [torch.zeros((), device=loss.device) if slope is None else slope for slope in found]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_those_of_padded_rows(name: str, dtype: torch.dtype, again: bool) -> None:
    model = _model(name, dtype)
    unpadded = Unpadded(model)
    layers: dict[nn.Module, nn.Module] = (
        {layer: Checkpointed(layer, unpadded.again) for layer in layers_of(model)} if again else {}
    )
    seen = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape), with_kwargs=True
        )
        for layer in layers_of(model)
    ]
    loss, slopes = _slopes(model, unpadded, layers, _batch())
    assert set(seen) == {(1, sum(LENGTHS), 48)}
    calls = 3 if name == "albert" else len(handles)  # its layers share one block
    assert len(seen) == calls * (2 if again else 1)
    for handle in handles:
        handle.remove()
    expected, others = _slopes(model, None, {}, _batch())
    # A Llama's norms compute in float32, whatever the model's dtype.
    of_loss, of_slope = (1e-12, 1e-11) if dtype == torch.float64 and name != "llama" else (2e-6, 5e-5)
    torch.testing.assert_close(loss, expected, rtol=of_loss, atol=0)
    largest = max(float(slope.abs().max()) for slope in others)
    for found, slope in zip(slopes, others, strict=True):
        torch.testing.assert_close(found, slope, rtol=0, atol=of_slope * largest)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_what_computes_the_same_is_proved_and_left_as_it_was(name: str, precision: Any) -> None:
    model = _model(name)
    names, state = model.state_dict().keys(), torch.random.get_rng_state()
    compute = Compute(torch.device("cpu"), precision)
    prove_unpadded(model, Unpadded(model), _task(), _batch([2, 3, 12]), compute, base_dropout=False)
    assert model.state_dict().keys() == names
    assert not any(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def _obstacle(model: Any, unpadded: Unpadded, *, base_dropout: bool = False) -> PatchError:
    with pytest.raises(PatchError) as caught:
        prove_unpadded(model, unpadded, _task(), _batch([2, 3, 12]), CPU, base_dropout=base_dropout)
    return caught.value


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_attention_of_its_own_kind_is_refused(name: str) -> None:
    model = _model(name)
    [problem] = _obstacle(model, Unpadded(model)).problems
    assert problem.message.startswith("its layers do not run without padding") or "states behind" in problem.message


def test_texts_that_see_each_other_are_refused() -> None:
    model = _model("bert")
    unpadded = Unpadded(model)
    running = unpadded.running
    unpadded.running = lambda batch: running(batch | {SEGMENTS: [sum(batch[SEGMENTS])]})  # type: ignore[method-assign]
    [problem] = _obstacle(model, unpadded).problems
    assert problem.message.startswith("without padding the states behind its layers change by")


def test_dropout_in_attention_is_refused_where_the_kernel_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("bert")
    prove_unpadded(model, Unpadded(model), _task(), _batch([2, 3, 12]), CPU, base_dropout=True)
    by_length = segments.by_length

    def kernel(*args: Any, **options: Any) -> Tensor:
        if args[-1]:
            raise segments.DropoutError("the kernel has no dropout")
        return by_length(*args, **options)

    monkeypatch.setattr(segments, "by_length", kernel)
    [problem] = _obstacle(model, Unpadded(model), base_dropout=True).problems
    assert problem.message == "the base's own dropout acts in its attention"
    assert problem.fix == "set base.dropout: off"
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.0
    prove_unpadded(model, Unpadded(model), _task(), _batch([2, 3, 12]), CPU, base_dropout=True)


def test_several_stacks_are_refused() -> None:
    model = attach(families()["bart"](), 4)
    with pytest.raises(PatchError, match="several stacks of layers"):
        Unpadded(model)


def test_tokens_are_gathered_by_the_length_of_their_text() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1]])
    batch = without_padding({"attention_mask": mask})
    assert batch[SEGMENTS] == [1, 2, 3, 3]
    assert batch[TOKENS].tolist() == [4, 12, 14, 0, 1, 2, 9, 10, 11]
    assert batch["attention_mask"] is mask


def test_what_is_returned_is_padded_with_zeros() -> None:
    model = _model("distilbert")
    batch = _batch([3, 5])
    with torch.no_grad(), Unpadded(model).running(batch):
        states = model.distilbert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert states.shape == (2, 5, 48)
    assert not states[0, 3:].any()
    assert states[1].any(-1).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch, where it traces
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cuda", False), ("cuda", True)])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_in_half_precision_it_is_as_near_to_the_exact_loss_as_with_padding(
    name: str, device: str, compiled: bool, autocast: bool
) -> None:
    """On CUDA by the kernel."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the kernel needs a CUDA device, and there is none")
    model = _model(name).to(device)
    exact, half = Compute(torch.device(device), "fp32"), Compute(torch.device(device), "bf16" if autocast else "fp32")
    batch = exact.put(_batch())
    _, expected = _slopes(model, None, {}, batch)
    if not autocast:
        model.to(torch.bfloat16)
    unpadded = Unpadded(model)
    layers: dict[nn.Module, nn.Module] = {
        layer: Checkpointed(Compiled(layer) if compiled else layer, unpadded.again) for layer in layers_of(model)
    }
    with half.autocast():
        (_, padded), (_, found) = _slopes(model, None, {}, batch), _slopes(model, unpadded, layers, batch)
    change, rounding = _distance(found, expected), _distance(padded, expected)
    assert 0 < change < 2 * rounding + 1e-3
    prove_unpadded(model, unpadded, _task(), batch, half, base_dropout=False)
    torch._dynamo.reset()


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    one, other = (torch.cat([each.float().flatten() for each in tensors]) for tensors in (found, expected))
    return float((one - other).norm() / other.norm())
