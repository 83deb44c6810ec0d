"""The task's own norms: float32 masters in the model's own modules."""

import pytest
import torch
from torch import nn

import tests.models as models
from tests.training import optimizer_of
from ticktune.errors import PatchError
from ticktune.patch.attach import adapter_parameters, attach, detach
from ticktune.patch.norms import own_parameters, train_norm


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma", "t5"])
def test_trained_norms_are_float32_masters_with_the_values_of_the_base(family: str) -> None:
    model = models.families()[family]().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    attach(model, 0, norms="all", norm_layers="all", head=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert len(trained) == sum(role == "norm" for _, role, _ in adapter_parameters(model))
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].float())
    assert {name: type(module) for name, module in model.named_modules()} == classes


@pytest.mark.parametrize("family", ["bert", "llama", "gemma", "t5", "gpt2"])
def test_bfloat16_base_with_float32_norms_runs_outside_autocast(family: str) -> None:
    model = attach(models.families()[family]().to(torch.bfloat16), 4, norms="all", head=False)
    norms = {id(p) for _, role, p in adapter_parameters(model) if role == "norm"}
    dtypes = []
    for module in model.modules():
        if any(id(p) in norms for p in module.parameters(recurse=False)):
            module.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    logits = model(**models.inputs(model)).logits
    assert logits.dtype == torch.bfloat16
    assert dtypes
    assert set(dtypes) == {torch.bfloat16}
    logits.float().square().sum().backward()
    for _, role, parameter in adapter_parameters(model):
        if role == "norm":
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32


def test_gemma_norm_multiplies_by_one_plus_w() -> None:
    model = models.families()["gemma"]()
    attach(model, 0, norms=["final"], head=False)
    norm = model.get_submodule("model.norm")
    x = torch.randn(4, 48)
    with torch.no_grad():
        norm.weight.fill_(0.5)
        expected = 1.5 * x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        torch.testing.assert_close(norm(x), expected)


def test_llama_norm_multiplies_by_w() -> None:
    model = models.families()["llama"]()
    attach(model, 0, norms=["final"], head=False)
    norm = model.get_submodule("model.norm")
    x = torch.randn(4, 48)
    with torch.no_grad():
        norm.weight.fill_(0.5)
        expected = 0.5 * x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma", "t5", "qwen3"])
def test_every_norm_of_a_bfloat16_base_moves_in_twenty_steps(family: str) -> None:
    """A gamma held in bfloat16 would round each of these updates away (see the next test)."""
    model = models.families()[family]().to(torch.bfloat16)
    roles = ["attention", "ffn", "q", "k", "final"] if family == "qwen3" else "all"
    attach(model, 4, norms=roles)
    optimizer = optimizer_of(model, norm_lr=1e-4, lr=1e-4)
    before = {key: p.detach().clone() for key, role, p in adapter_parameters(model) if role == "norm"}
    batch = models.inputs(model)
    target = torch.randn_like(model(**batch).logits.float())
    for _ in range(20):
        (model(**batch).logits.float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before
    for key, role, parameter in adapter_parameters(model):
        assert parameter.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in optimizer.state[parameter].values())
        if role == "norm":
            assert (parameter != before[key]).float().mean() > 0.9, key
    assert len(optimizer.state) == len(list(adapter_parameters(model)))


def test_bfloat16_gamma_would_not_move() -> None:
    gamma = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([gamma], lr=1e-4, weight_decay=0)
    for _ in range(20):
        gamma.grad = torch.ones_like(gamma)
        optimizer.step()
    assert torch.equal(gamma, torch.ones_like(gamma))


def test_detach_of_norms_alone_gives_bfloat16_back() -> None:
    model = attach(models.families()["llama"]().to(torch.bfloat16), 0, norms="all", head=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_norm_with_another_parameter_is_refused() -> None:
    norm = nn.LayerNorm(4)
    norm.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(PatchError, match="LayerNorm has the parameters weight, bias, scale"):
        own_parameters(norm)


def test_cast_of_the_output_can_be_undone() -> None:
    norm = nn.LayerNorm(4).to(torch.bfloat16)
    x = torch.randn(2, 4)  # float32, as no base of this dtype would give it
    handles = train_norm(norm)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    for handle in handles:
        handle.remove()
    assert not norm._forward_hooks


def test_layer_norm_gets_a_float32_input_where_the_kernel_takes_no_mixture() -> None:
    # The meta device stands for a GPU: what matters is which dtypes reach the kernel and come back.
    norm = nn.LayerNorm(4).to("meta", torch.bfloat16)
    seen = []
    train_norm(norm)
    norm.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    assert norm(torch.empty(2, 4, dtype=torch.bfloat16, device="meta")).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_trained_norms_run_on_a_base_in_float64(family: str) -> None:
    model = models.families()[family]().double()
    batch = models.inputs(model)
    with torch.no_grad():
        before = models.result(model(**batch))
        attach(model, 4, norms="all", head=False)
        after = models.result(model(**batch))
    assert after.dtype == torch.float64
    assert float((after - before).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))  # the masters are float32
