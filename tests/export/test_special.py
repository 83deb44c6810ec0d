"""What is special about some architectures: biases to be added, shared blocks, experts, other names, ratios."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.models as models
from tests.reliability.catalogue import case
from ticktune.errors import ExportError, PatchError
from ticktune.export.express import as_llama
from ticktune.export.save import express_as_llama
from ticktune.export.stock_forward import tensors_of
from ticktune.export.widen import Widening, merge_obstacle, widen
from ticktune.patch.attach import (
    Plan,
    adapter_parameters,
    adapter_state,
    attach,
    attachment_of,
    base_state,
    detach,
)
from ticktune.patch.detect import find_layout

DIM = 5
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def _double(model: nn.Module) -> nn.Module:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model.double()


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return models.result(model(**batch))


def _tuned(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Plan, dict[str, Tensor], Tensor]:
    """Attaches random ticks in float64; returns plan, tensors and logits, and takes them off again."""
    before = _logits(model, batch)
    attach(model, DIM, **{"head": False, **options})
    with torch.no_grad():
        for _, _, parameter in adapter_parameters(model):
            parameter.data = parameter.double()
    models.perturb(p for _, _, p in adapter_parameters(model))
    ours = _logits(model, batch)
    assert float((ours - before).abs().max()) > 0.01
    plan, tensors = attachment_of(model).plan, {key: t.clone() for key, t in adapter_state(model).items()}
    detach(model)
    assert torch.equal(_logits(model, batch), before)
    return plan, tensors, ours


def _equal(ours: Tensor, merged: Tensor, tolerance: float = 1e-12) -> bool:
    return float((ours - merged).abs().max()) <= tolerance * max(1.0, float(ours.abs().max()))


def _merged(
    family: str, *, pad_to: int | str = "none", tolerance: float = 1e-12, **options: Any
) -> tuple[nn.Module, list[Widening]]:
    model = _double(models.families()[family]())
    batch = models.inputs(model, models.table()[family].kind)
    plan, tensors, ours = _tuned(model, batch, **options)
    found = widen(model, plan, tensors, pad_to=pad_to)
    assert _equal(ours, _logits(model, batch), tolerance)
    return model, found


# Biases that the config can switch on


@case("X1")
@pytest.mark.parametrize("family", ["llama", "smollm3", "granite", "modernbert"])
def test_plain_ticks_bring_the_biases_that_the_config_can_have(family: str) -> None:
    model, _ = _merged(family, layers=[1], form="plain")
    assert model.config.mlp_bias is True
    for ffn in find_layout(model).ffns:
        bias = ffn.up.bias if ffn.fused is None else ffn.up.bias[ffn.width :]
        one = torch.zeros(DIM) if ffn.layer != 1 else torch.ones(DIM)
        assert torch.equal(bias[-DIM:].float(), one)
        assert not bias[:-DIM].any()


@case("X1")
@pytest.mark.parametrize(("family", "field"), [("falcon", "bias"), ("starcoder2", "use_bias")])
def test_plain_blocks_without_biases_get_them_for_r(family: str, field: str) -> None:
    model, _ = _merged(family)
    assert getattr(model.config, field) is True
    assert all(ffn.up.bias[-DIM:].all() and not ffn.up.bias[:-DIM].any() for ffn in find_layout(model).ffns)


# Families that are a Llama under another name


def _llama_like(family: str, **changes: Any) -> nn.Module:
    import transformers as t

    config = models.table()[family].config.to_dict() | changes
    config.pop("model_type", None)
    build = {"mistral": t.MistralForCausalLM, "qwen2": t.Qwen2ForCausalLM, "phi3": t.Phi3ForCausalLM}[family]
    torch.manual_seed(0)
    return build(type(models.table()[family].config)(**config)).eval()


@case("X1")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 512, "max_position_embeddings": 512}),
        ("mistral", {"sliding_window": None, "head_dim": 16, "rope_parameters": ROPE}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": ROPE}),
        ("qwen2", {}),
        ("phi3", {}),
    ],
)
def test_as_llama_computes_the_same_and_takes_plain_ticks(family: str, changes: dict[str, Any]) -> None:
    model = _llama_like(family, **changes).double()
    models.perturb((p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")), 0.1)
    batch = models.inputs(model, "text")
    base = _logits(model, batch)
    llama = as_llama(model)
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert torch.equal(_logits(llama, batch), base)
    plan, tensors, ours = _tuned(model, batch, form="plain")
    with pytest.raises(ExportError, match="export --merge --as llama"):
        widen(model, plan, tensors)
    widen(llama, plan, tensors, pad_to="none")
    assert _equal(ours, _logits(llama, batch))
    tied = bool(changes.get("tie_word_embeddings"))
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


def test_a_sliding_window_is_no_llama() -> None:
    model = _llama_like("mistral", sliding_window=4, max_position_embeddings=64)
    with pytest.raises(ExportError, match="sliding window of 4 tokens and 64 positions is no Llama"):
        as_llama(model)
    attach(model, DIM, form="plain")
    found = merge_obstacle(attachment_of(model).layout, attachment_of(model).plan)
    assert "--as llama" not in found  # known before training, and not promised
    detach(model)
    # What the refusal spares: such a model written as a Llama differs, and the numbers would say so too.
    model.config.sliding_window = None
    llama = as_llama(model)
    model.config.sliding_window = 4
    ids = torch.randint(4, 64, (2, 9))
    assert float((_logits(llama, {"input_ids": ids}) - _logits(model, {"input_ids": ids})).abs().max()) > 1e-3


def test_as_llama_is_checked_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama_like("qwen2")
    models.perturb(p for n, p in model.named_parameters() if n.endswith("bias"))
    from ticktune.export import express

    kept = express._renamed
    monkeypatch.setattr(express, "_renamed", lambda k, v, c: [(n, t * (1 + 1e-3)) for n, t in kept(k, v, c)])
    with pytest.raises(ExportError, match="written as a Llama the base differs by"):
        express_as_llama(model)


@case("X1")
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("mistral", "QuestionAnswering"),
        ("qwen2", "QuestionAnswering"),
        ("qwen2", "SequenceClassification"),
        ("mistral", "SequenceClassification"),
        ("mistral", "TokenClassification"),
        ("qwen2", "Model"),
    ],
)
def test_every_head_that_llama_has_is_checked_and_written(family: str, head: str) -> None:
    import transformers as t

    config = models.table()[family].config.to_dict() | {"pad_token_id": None}
    config.pop("model_type")
    name = {"mistral": "Mistral", "qwen2": "Qwen2"}[family] + (head if head == "Model" else f"For{head}")
    torch.manual_seed(0)
    model = getattr(t, name)(type(models.table()[family].config)(**config)).eval()
    llama = express_as_llama(model)
    assert type(llama).__name__.startswith("Llama")
    ids = torch.randint(4, 60, (1, 9))
    with torch.no_grad():
        before, after = tensors_of(model(input_ids=ids)), tensors_of(llama(input_ids=ids))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_end_logits_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as t

    from ticktune.export import save

    torch.manual_seed(0)
    model = t.Qwen2ForQuestionAnswering(models.table()["qwen2"].config).eval()
    kept = save.as_llama

    def off(model: nn.Module) -> nn.Module:
        llama = kept(model)
        llama.get_parameter("qa_outputs.bias").data[1] += 1e-3
        return llama

    monkeypatch.setattr(save, "as_llama", off)
    with pytest.raises(ExportError, match="output end_logits: written as a Llama"):
        express_as_llama(model)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
def test_scaled_positions_are_not_written_as_a_llama(rope: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="linear rotary positions"):
        as_llama(_llama_like("mistral", sliding_window=None, rope_parameters=rope))


def test_other_families_are_not_written_as_a_llama() -> None:
    with pytest.raises(ExportError, match="a gemma model cannot be written as a Llama"):
        as_llama(models.families()["gemma"]())


# Shared blocks


def test_one_tick_serves_all_layers_that_share_a_block() -> None:
    model, found = _merged("albert")
    assert find_layout(model).sizes == {"encoder": 1}
    assert model.config.num_hidden_groups == 1
    assert found[0].after == [82 + DIM]


def test_unshared_layers_have_a_tick_each() -> None:
    model, _ = _merged("albert", unshare=True, layers=[0, 2], norms="all")
    assert model.config.num_hidden_groups == 3
    downs = [ffn.down.weight for ffn in find_layout(model).ffns]
    assert len(downs) == 3
    assert torch.equal(downs[0][:, :82], downs[2][:, :82])
    assert not torch.equal(downs[0][:, 82:], downs[2][:, 82:])
    assert not downs[1][:, 82:].any()


def test_unsharing_is_undone() -> None:
    model = models.families()["albert"]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, DIM, unshare=True, head=False)
    held = base_state(model)
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], before[name]) for name in before)
    detach(model)
    assert model.config.num_hidden_groups == 1
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: tuple(p.shape) for n, p in before.items()}
    with pytest.raises(PatchError, match="the encoder has the layers 0 to 2"):
        attach(model, DIM, [7], unshare=True)
    assert model.config.num_hidden_groups == 1


def test_only_shared_layers_are_unshared() -> None:
    with pytest.raises(PatchError, match="share no block"):
        attach(models.families()["bert"](), DIM, unshare=True)


# Experts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_every_expert_has_its_own_tick(family: str) -> None:
    model = models.families()[family]()
    attach(model, DIM, [0])
    keys = {key for key, _, _ in adapter_parameters(model) if ".experts." in key}
    assert keys == {f"decoder.0.experts.{e}.{letter}" for e in range(4) for letter in "QUP"}


def test_ticks_of_experts_follow_the_routing() -> None:
    model = models.families()["mixtral"]().eval()
    attach(model, DIM, [1], norms="none")
    ticks, ffn = attachment_of(model).ticks["decoder.1.experts"], attachment_of(model).layout.ffns[1]
    models.perturb(p for _, _, p in adapter_parameters(model))
    x = torch.randn(6, 48)
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 3], [0, 2]])
    weights = torch.rand(6, 2)
    with torch.no_grad():
        whole = ffn.down(x, index, weights)
        handle = attachment_of(model).handles[0]
        handle.remove()
        base = ffn.down(x, index, weights)
        expected = base.clone()
        for row in range(6):
            for place in range(2):
                expected[row] += weights[row, place] * ticks[index[row, place]](x[row])
    assert float((whole - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((whole - base).abs().max()) > 0.1


@case("X1")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_tick_beside_the_experts_is_the_same_tick_in_each(family: str) -> None:
    # The routers compute in float32, so their weights sum to one up to its rounding.
    model, _ = _merged(family, experts="block", layers=[0], tolerance=1e-6)
    module = find_layout(model).ffns[0].down
    tick = module.down_proj[:, :, -8:]
    assert tick.any()
    assert all(torch.equal(tick[e], tick[0]) for e in range(4))


def test_one_tick_beside_experts_whose_weights_do_not_sum_to_one_is_refused() -> None:
    model = models.families()["qwen2_moe"]()  # norm_topk_prob: false
    with pytest.raises(PatchError, match=r"routing weights of a token sum to 0\.\d+ to .*, not to one") as e:
        attach(model, DIM, experts="block")
    assert e.value.problems[0].fix == "set ticks.experts: each"
    assert attachment_of(model, missing_ok=True) is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_a_model_without_weights_is_answered_as_one_with_them(family: str) -> None:
    real = models.families()[family]()
    with torch.device("meta"):
        bare = type(real)(real.config)
    state = torch.random.get_rng_state()
    refusals = []
    for model in (real, bare):
        try:
            attach(model, DIM, experts="block")
            refusals.append("")
        except PatchError as error:
            refusals.append(str(error).split(" sum to ")[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert refusals == ["the routing weights of a token" if family == "qwen2_moe" else ""] * 2


def test_a_refusal_without_weights_says_where_it_was_seen() -> None:
    with torch.device("meta"):
        bare = type(models.families()["qwen2_moe"]())(models.table()["qwen2_moe"].config)
    with pytest.raises(PatchError, match="seen on a small model of its class, as this one has no weights") as e:
        attach(bare, DIM, experts="block")
    assert e.value.problems[0].fix == "set ticks.experts: each"


def test_a_block_that_multiplies_what_its_experts_give_is_refused_one_tick_beside_them() -> None:
    model = models.families()["mixtral"]()
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, output: 2.5 * output)
    with pytest.raises(PatchError, match=r"does not leave their block as it is \(it is multiplied by 2\.5\)"):
        attach(model, DIM, experts="block")
    attach(model, DIM, [0, 2], experts="block")


def test_experts_that_are_given_something_else_are_refused_one_tick_beside_them() -> None:
    model = models.families()["mixtral"]()
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
    with pytest.raises(PatchError, match="the experts are not given what goes into their block"):
        attach(model, DIM, experts="block")


def test_routing_is_looked_at_without_the_noise_of_training() -> None:
    model = models.families()["mixtral"]()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.3
    model.train()
    attach(model, DIM, experts="block")
    assert all(module.training for module in model.modules())


def test_a_block_of_experts_that_does_not_run_alone_is_refused_one_tick_beside_them() -> None:
    model = models.families()["mixtral"]()
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, args, output: 1 / 0)
    with pytest.raises(PatchError, match="could not be seen: the block does not run alone"):
        attach(model, DIM, experts="block")


def test_ticks_of_gated_experts_are_gated() -> None:
    with pytest.raises(PatchError, match="ticks of gated experts are gated"):
        attach(models.families()["mixtral"](), DIM, form="plain")


def test_experts_are_always_a_multiple_of_eight_wide() -> None:
    _, [found] = _merged("mixtral", pad_to="none", layers=[0])
    assert (found.before, found.after, found.padding) == ([80], [88], 8)  # the layer without a tick has zeros only


# Every tick stands in its wider block


@pytest.mark.parametrize(
    ("family", "letters"),
    [
        ("bert", "QrP"),
        ("gpt2", "QrP"),
        ("t5", "QP"),
        ("llama-mlp-bias", "QUP"),
        ("phi3", "QUP"),
        ("modernbert", "QUP"),
        ("mixtral", "QUP"),
        ("segformer", "QrP"),
    ],
)
def test_a_unit_that_is_lost_is_refused_whatever_runs(
    family: str, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune.export import widen as module

    model = attach(models.families()[family](), DIM, head=False)
    models.perturb(p for _, _, p in adapter_parameters(model))
    plan, tensors = attachment_of(model).plan, {key: t.clone() for key, t in adapter_state(model).items()}
    stock = detach(model)
    lost = [key for key in tensors if key.endswith(".P")][-1].removesuffix(".P")
    kept = module._units
    for letter in letters:

        def without(key: str, *args: Any, letter: str = letter) -> Any:
            parts = kept(key, *args)
            if key == lost:
                parts["QUPr".index(letter)].zero_()
            return parts

        monkeypatch.setattr(module, "_units", without)
        with pytest.raises(ExportError, match=f"the tensor {lost}.{letter} does not stand in the wider block"):
            widen(copy.deepcopy(stock), plan, tensors)


# Widths


@pytest.mark.parametrize(("pad_to", "width"), [("none", 87), ("auto", 88), ("64", 128), (256, 256)])
def test_widths_are_rounded_up_with_zero_units(pad_to: int | str, width: int) -> None:
    model, [found] = _merged("bert", pad_to=pad_to)
    assert (found.field, found.value, found.before, found.after) == ("intermediate_size", width, [82], [width])
    assert (found.units, found.padding) == (DIM, width - 87)
    assert found.cost_percent == pytest.approx(100 * (width - 82) / 82)
    for ffn in find_layout(model).ffns:
        assert ffn.down.weight[:, 82:87].any()
        assert not ffn.down.weight[:, 87:].any()
        assert not ffn.up.weight[87:].any()
    assert f"82 -> {width}" in found.text()


def test_a_ratio_grows_all_stages_and_says_what_it_costs() -> None:
    model, [found] = _merged("swin", layers="first:1")
    assert (found.field, found.before, found.after) == ("mlp_ratio", [24, 48], [29, 58])
    assert found.padding == 10  # of the second stage, which has no tick
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()
    _, [found] = _merged("dinov2")
    assert (found.value, found.before, found.after) == (3, [96], [144])
    assert "+50.00 %" in found.text()


def test_the_pooling_head_grows_with_the_tower() -> None:
    model, _ = _merged("siglip_vision_model")
    assert model.vision_model.head.mlp.fc1.out_features == 82 + DIM


def test_a_width_that_drives_something_else_is_refused() -> None:
    model = models.families()["siglip_vision_model"]()
    attach(model, DIM, head=False)
    plan, tensors = attachment_of(model).plan, adapter_state(model)
    detach(model)
    # As if the pooling head were not known: the config's width would change it all the same.
    import ticktune.export.widen as module

    kept = module.find_layout

    def without_aux(model: nn.Module) -> Any:
        layout = kept(model)
        layout.aux.clear()
        return layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_layout", without_aux)
        with pytest.raises(ExportError, match=r"also changes tensors .*: vision_model.head.mlp.fc1.bias"):
            widen(model, plan, tensors)


# Both kinds of blocks in one model


def test_a_model_of_plain_and_gated_blocks_has_ticks_of_both_forms() -> None:
    import transformers as t

    text = t.LlamaConfig(**{k: v for k, v in models.table()["llama"].config.to_dict().items() if k != "model_type"})
    vision = models.table()["clip"].config.vision_config
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = _double(t.LlavaForConditionalGeneration(config).eval())
    ids = torch.randint(4, 60, (2, 24))
    ids[:, :16] = 63
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    layout = find_layout(model)
    assert {f.stack: f.is_gated for f in layout.ffns} == {"vision": False, "text": True}
    plan, tensors, ours = _tuned(model, batch)
    assert plan.form == "auto"
    assert {key.rpartition(".")[2] for key in tensors if key.startswith("text.0.ffn")} == {"Q", "U", "P"}
    assert {key.rpartition(".")[2] for key in tensors if key.startswith("vision.0.ffn")} == {"Q", "r", "P"}
    found = widen(model, plan, tensors, pad_to="none")
    assert [w.field for w in found] == ["text_config.intermediate_size", "vision_config.intermediate_size"]
    assert _equal(ours, _logits(model, batch))


# What does not merge


def test_a_fixed_width_is_said_before_training() -> None:
    model = attach(models.families()["bloom"](), DIM)
    record = attachment_of(model)
    assert "fixes the width" in merge_obstacle(record.layout, record.plan)


# What has no block gets no tick, and says so


def _hybrid() -> nn.Module:
    """Layers of different kinds; some have no feed-forward block."""
    import transformers as t

    torch.manual_seed(0)
    config = t.NemotronHConfig(
        hidden_size=48,
        vocab_size=64,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=82,
        mamba_num_heads=4,
        mamba_head_dim=12,
        n_groups=1,
        ssm_state_size=8,
    )
    return t.NemotronHForCausalLM(config).eval()


def test_layers_without_a_block_are_named_and_not_in_the_plan() -> None:
    model = attach(_hybrid(), DIM)
    record = attachment_of(model)
    blocks = [ffn.layer for ffn in record.layout.ffns]
    assert 0 < len(blocks) < 4
    assert list(record.plan.layers.values()) == [blocks]
    assert any("without a feed-forward block get no tick" in note for note in record.layout.notes)


def test_ticks_only_where_there_is_no_block_are_refused() -> None:
    model = _hybrid()
    ticked = {ffn.layer for ffn in find_layout(model).ffns}
    with pytest.raises(PatchError, match="none of the chosen layers has a feed-forward block"):
        attach(model, DIM, [i for i in range(4) if i not in ticked], norms="none")
    assert attachment_of(model, missing_ok=True) is None
    assert all(p.requires_grad for p in model.parameters())


def test_ticks_of_a_model_without_memory_take_none() -> None:
    import transformers as t

    with torch.device("meta"):
        model = t.MixtralForCausalLM(models.table()["mixtral"].config)
    attach(model, DIM)
    assert {p.device.type for _, role, p in adapter_parameters(model) if role != "norm"} == {"meta"}
