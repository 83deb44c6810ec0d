"""Merging is concatenation: the widened stock model computes what base + adapter computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.models as models
from tests.reliability.catalogue import case
from tests.training import bits
from ticktune.errors import ExportError
from ticktune.export.widen import merge_obstacle, widen
from ticktune.patch.attach import Plan, adapter_parameters, adapter_state, attach, attachment_of, detach
from ticktune.patch.detect import find_layout
from ticktune.patch.layout import config_of

DIM = 5

# Family -> what the fields of width become for 5 more units, where it is not intermediate_size = 82 + 5.
# Experts need a multiple of 8; fields that are ratios grow until every block is wide enough.
STACKS = {"encoder_ffn_dim": 82 + DIM, "decoder_ffn_dim": 70 + DIM}
WIDTHS: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 82 + DIM},
    "gpt2": {"n_inner": 192 + DIM},
    "gptj": {"n_inner": 192 + DIM},
    "opt": {"ffn_dim": 82 + DIM},
    "falcon": {"ffn_hidden_size": 82 + DIM},
    "mixtral": {"intermediate_size": 88},
    "qwen3_moe": {"moe_intermediate_size": 64, "intermediate_size": 80 + DIM},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64 + DIM},
    **dict.fromkeys(("t5", "t5-gated", "mt5"), {"d_ff": 82 + DIM}),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100", "detr", "whisper"), STACKS),
    **dict.fromkeys(("dinov2", "dinov2-swiglu"), {"mlp_ratio": 3}),
    "swin": {"mlp_ratio": (24 + DIM) / 12},
    "segformer": {"mlp_ratios": [3, 4]},
    **dict.fromkeys(
        ("clip", "siglip"), {"text_config.intermediate_size": 70 + DIM, "vision_config.intermediate_size": 82 + DIM}
    ),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), {"vision_config.intermediate_size": 82 + DIM}),
    "clip_text_model": {"intermediate_size": 70 + DIM},
}
MERGING = [name for name in models.families() if name not in models.FIXED_WIDTH]


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return models.result(model(**batch))


def _merged(
    family: str, layers: Any, **options: Any
) -> tuple[nn.Module, dict[str, Tensor], Plan, dict[str, int], Tensor, Tensor, Tensor]:
    """The widened model, the base's tensors, the plan, what widen said; logits of base, adapter, merged."""
    model = models.families()[family]()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    model = model.double()
    batch = models.inputs(model, models.table()[family].kind)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, DIM, layers, **options)
    with torch.no_grad():
        for _, _, parameter in adapter_parameters(model):
            parameter.data = parameter.double()
    before = _logits(model, batch)
    models.perturb(p for _, _, p in adapter_parameters(model))
    ours = _logits(model, batch)
    plan = attachment_of(model).plan
    tensors = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    widened = widen(detach(model), plan, tensors, pad_to="none")
    widths = {w.field: w.value for w in widened}
    return model, base, plan, widths, before, ours, _logits(model, batch)


def _equal(ours: Tensor, merged: Tensor) -> bool:
    return float((ours - merged).abs().max()) <= 1e-12 * max(1.0, float(ours.abs().max()))


def _is_slice(small: Tensor, large: Tensor) -> bool:
    """Whether the base's tensor stands in the widened one, bit for bit (a fused one in its two halves)."""
    if bits(large[tuple(slice(n) for n in small.shape)]) == bits(small):
        return True
    axis = small.ndim - 2  # experts have their number first
    half, whole = small.shape[axis] // 2, large.shape[axis] // 2
    parts = torch.cat([large.narrow(axis, 0, half), large.narrow(axis, whole, half)], dim=axis)
    return bits(parts) == bits(small)


@case("X1")
@pytest.mark.parametrize("family", MERGING)
def test_merged_equals_adapter_in_fp64(family: str) -> None:
    sizes = find_layout(models.families()[family]()).sizes
    layers: Any = {stack: [0, size - 1] if stack != "decoder" else [0, 1] for stack, size in sizes.items()}
    model, base, plan, widths, before, ours, merged = _merged(family, layers)
    assert float((ours - before).abs().max()) > 0.05
    assert _equal(ours, merged), float((ours - merged).abs().max())
    assert widths == WIDTHS.get(family, {"intermediate_size": 82 + DIM})
    for field, value in widths.items():
        assert getattr(*config_of(model.config, field)) == value

    merged_state = model.state_dict()
    assert merged_state.keys() >= base.keys()
    # Where plain ticks need biases, the projections get them: zero beside what the ticks bring.
    added = merged_state.keys() - base.keys()
    assert bool(added) == (family in ("falcon", "starcoder2"))
    assert all(name.endswith(".bias") and not merged_state[name][:DIM].any() for name in added)
    layout = find_layout(model)
    norms = {id(p) for key in plan.norms for p in layout.norms[key].parameters()}
    own = norms | {id(model.get_parameter(name)) for name in plan.head}
    names = {name for name, p in model.named_parameters() if id(p) not in own}
    assert len(names) > len(base) / 3
    wider = 0
    for name in names - added:
        wider += base[name].shape != merged_state[name].shape
        assert merged_state[name].dtype == base[name].dtype
        assert _is_slice(base[name], merged_state[name]), name
    assert wider >= 2 * len(layout.ffns)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5-gated"])
def test_layers_without_a_tick_get_zeros(family: str) -> None:
    stack = "encoder" if family in ("bert", "t5-gated") else "decoder"
    model, *_ = _merged(family, {stack: [1]}, norms="none", head=False)
    for ffn in find_layout(model).ffns:
        down = ffn.down.weight if family == "gpt2" else ffn.down.weight.T
        new = down[-DIM:]
        assert new.shape == (DIM, 48)
        assert bool(new.any()) == (ffn.stack == stack and ffn.layer == 1)


def test_projections_say_their_new_sizes() -> None:
    bert = find_layout(_merged("bert", "all")[0]).ffns[0]
    assert (bert.up.out_features, bert.down.in_features) == (82 + DIM, 82 + DIM)
    gpt2 = find_layout(_merged("gpt2", "all")[0]).ffns[0]
    assert (gpt2.up.nf, gpt2.down.nx) == (192 + DIM, 192 + DIM)
    assert gpt2.up.weight.is_contiguous()


def test_widths_of_bart_stacks_differ_and_those_of_t5_are_one() -> None:
    model, *_, widths, _, ours, merged = _merged("bart", {"decoder": "all"})
    assert widths == {"decoder_ffn_dim": 70 + DIM}
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (82, 70 + DIM)
    assert _equal(ours, merged)
    model, *_, widths, _, ours, merged = _merged("bart", "all")
    assert widths == {"encoder_ffn_dim": 82 + DIM, "decoder_ffn_dim": 70 + DIM}
    assert _equal(ours, merged)
    model, *_, widths, _, ours, merged = _merged("t5", {"decoder": "last:1"})
    assert widths == {"d_ff": 82 + DIM}
    assert {ffn.width for ffn in find_layout(model).ffns} == {82 + DIM}
    assert _equal(ours, merged)


def test_t5_ticks_have_no_r() -> None:
    model = attach(models.families()["t5"](), DIM)
    assert not any(role == "r" for _, role, _ in adapter_parameters(model))


@pytest.mark.parametrize("family", ["gemma", "qwen2", "phi3", "t5-gated", "mistral"])
def test_plain_ticks_on_gated_blocks_without_biases_are_refused(family: str) -> None:
    with pytest.raises(ExportError, match=r"cannot be merged: plain ticks on gated .* need biases"):
        _merged(family, "all", form="plain")


def test_plain_ticks_on_gated_blocks_with_biases_merge() -> None:
    model, _, _, widths, before, ours, merged = _merged("llama-mlp-bias", [1], form="plain")
    assert float((ours - before).abs().max()) > 0.1
    assert _equal(ours, merged)
    assert widths == {"intermediate_size": 82 + DIM}
    biases = [ffn.up.bias[-DIM:] for ffn in find_layout(model).ffns]
    assert [bool(bias.all()) for bias in biases] == [False, True, False]


def test_obstacle_is_known_before_training() -> None:
    layout = find_layout(models.families()["qwen3"]())
    plan: dict[str, Any] = {"dim": 4, "layers": {"decoder": [0]}, "norms": [], "head": []}
    assert "need biases" in merge_obstacle(layout, Plan(form="plain", **plan))
    assert merge_obstacle(layout, Plan(form="gated", **plan)) == ""
    assert merge_obstacle(layout, Plan(form="plain", **{**plan, "dim": 0, "layers": {}})) == ""


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_norms_alone_widen_nothing(family: str) -> None:
    model, base, *_, widths, _, ours, merged = _merged(family, "none", norms="all", norm_layers="all")
    assert widths == {}
    assert model.config.intermediate_size == 82
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in base.items()}
    assert _equal(ours, merged)


def test_tick_dropout_has_no_part_in_the_merged_model() -> None:
    *_, ours, merged = _merged("bert", "all", dropout=0.5)
    assert _equal(ours, merged)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_config_says_how_positions_are_embedded(family: str) -> None:
    model, *_ = _merged(family, "all")
    assert model.config.to_dict()["position_embedding_type"] == "absolute"


def test_what_the_base_says_of_its_positions_is_left() -> None:
    model = models.families()["bert"]()
    model.config.position_embedding_type = "relative_key"
    attach(model, DIM)
    plan, tensors = attachment_of(model).plan, adapter_state(model)
    widen(detach(model), plan, tensors)
    assert model.config.position_embedding_type == "relative_key"


def test_config_of_other_families_gets_no_entry_of_positions() -> None:
    model, *_ = _merged("llama", "all")
    assert "position_embedding_type" not in model.config.to_dict()


def test_phi_has_its_width_under_both_names() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    entries = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    model = attach(PhiForCausalLM(PhiConfig(**entries, intermediate_size=192)), DIM)
    plan, tensors = attachment_of(model).plan, adapter_state(model)
    widen(detach(model), plan, tensors, pad_to="none")
    assert model.config.n_inner == model.config.intermediate_size == 192 + DIM


# The least width that does


def _widened(model: nn.Module, dim: int, **options: Any) -> dict[str, tuple[int, int]]:
    """Widths of each kind of block before and after, by the field that drives it."""
    attach(model, dim, head=False)
    models.perturb(p for _, _, p in adapter_parameters(model))
    plan, tensors = attachment_of(model).plan, {k: t.clone() for k, t in adapter_state(model).items()}
    batch = {"input_ids": torch.randint(4, 60, (2, 9))}
    with torch.no_grad():
        ours = models.result(model.eval()(**batch))
    stock = detach(model)
    before = {ffn.key: ffn.width for ffn in find_layout(stock).ffns}
    widen(stock, plan, tensors, **options)
    with torch.no_grad():
        difference = models.result(stock(**batch)) - ours
    assert float(difference.abs().max()) <= 1e-4 * float(ours.abs().max())
    return {ffn.key: (before[ffn.key], ffn.width) for ffn in find_layout(stock).ffns}


def test_blocks_of_one_and_two_widths_grow_no_more_than_they_must() -> None:
    from transformers import Gemma4TextConfig, Gemma4TextModel

    config = Gemma4TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_kv_shared_layers=2, use_double_wide_mlp=True,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16, vocab_size=64,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    assert set(_widened(Gemma4TextModel(config), 8).values()) == {(128, 192), (256, 384)}


@pytest.mark.parametrize("dim", [8, 320])
def test_a_shared_expert_of_many_units_grows_with_the_experts(dim: int) -> None:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeModel

    config = Ernie4_5_MoeConfig(
        hidden_size=64, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=2,
        moe_layer_start_index=1,
    )  # fmt: skip
    torch.manual_seed(0)
    found = _widened(Ernie4_5_MoeModel(config), dim)
    dense, experts, shared = 256 + 64 * -(-dim // 64), 64 + 64 * -(-dim // 64), 2 * (64 + 64 * -(-dim // 64))
    assert set(found.values()) == {(256, dense), (64, experts), (128, shared)}
