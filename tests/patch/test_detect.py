"""Detection by proof: it agrees with the table, finds what the table does not know, and refuses look-alikes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.models as models
from ticktune.errors import PatchError
from ticktune.export.widen import widen
from ticktune.patch.attach import adapter_parameters, adapter_state, attach, attachment_of, detach
from ticktune.patch.detect import detect, find_layout
from ticktune.patch.layout import FAMILIES, Ffn, Layout, find_bodies

# A convolution inside the block is in the table only: nothing but a projection is traced.
NOT_DETECTED = ("segformer",)


def _facts(ffn: Ffn) -> tuple[Any, ...]:
    modules = (ffn.up, ffn.down, ffn.gate, ffn.experts)
    dropout = ffn.dropout and (id(ffn.dropout[0]), ffn.dropout[1])
    return (ffn.key, *map(id, modules), ffn.fused, ffn.width_field, ffn.bias_field, dropout)


def _norms(layout: Layout) -> dict[str, int]:
    # Wav2Vec2's outer norm runs before or after the layers, as its config says; the table calls it final.
    return {key.replace("norm.embedding", "norm.final"): id(norm) for key, norm in layout.norms.items()}


@pytest.mark.parametrize("family", [name for name in models.families() if name not in NOT_DETECTED])
def test_the_detector_finds_what_the_table_says(family: str) -> None:
    model = models.families()[family]()
    by_table, by_proof = find_layout(model), find_layout(model, families={})
    assert by_table.ffns
    assert {_facts(f) for f in by_proof.ffns} == {_facts(f) for f in by_table.ffns}
    assert [_facts(f) for f in by_proof.aux] == [_facts(f) for f in by_table.aux]
    assert by_proof.sizes == by_table.sizes
    if family == "bert":
        assert _norms(by_proof) != {}
    if family not in ("bart", "mbart"):  # each stack has an embedding norm and, in mBART, a final one too
        assert _norms(by_proof) == _norms(by_table)
    else:
        assert by_proof.norms == by_table.norms


def test_every_row_of_the_table_has_a_small_model() -> None:
    rows = {body.model_type for build in models.families().values() for body in find_bodies(build())}
    assert set(FAMILIES) <= rows


def _unknown() -> dict[str, Callable[[], nn.Module]]:
    """Families without a row, each with something of its own."""
    import transformers as t

    size: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    glu: dict[str, Any] = {**size, "intermediate_size": 82, "num_key_value_heads": 2, "pad_token_id": 0}
    return {
        "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**glu, partial_rotary_factor=0.5)),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**glu)),  # one norm for attention and block
        "convbert": lambda: t.ConvBertForSequenceClassification(t.ConvBertConfig(**size, intermediate_size=82)),
        "nemotron": lambda: t.NemotronForCausalLM(
            t.NemotronConfig(**glu, partial_rotary_factor=0.5)
        ),  # squared relu, without a gate
        "olmoe": lambda: t.OlmoeForCausalLM(
            t.OlmoeConfig(**{**glu, "intermediate_size": 56}, num_experts=4, num_experts_per_tok=2)
        ),
        "gpt_bigcode": lambda: t.GPTBigCodeForCausalLM(
            t.GPTBigCodeConfig(n_embd=48, n_layer=3, n_head=4, vocab_size=64)
        ),
        # Experts that are modules of their own, most of which no token of one run is sent to
        "switch_transformers": lambda: t.SwitchTransformersForConditionalGeneration(
            t.SwitchTransformersConfig(
                d_model=48, num_layers=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4,
                d_kv=12, d_ff=82, vocab_size=64, num_experts=12, decoder_start_token_id=0, pad_token_id=0,
            )
        ),
        "mobilebert": lambda: t.MobileBertForSequenceClassification(
            t.MobileBertConfig(**size, intermediate_size=82, intra_bottleneck_size=48, num_feedforward_networks=3)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("family", list(_unknown()))
def test_an_unknown_family_is_found_and_merges_exactly(family: str) -> None:
    assert family not in FAMILIES
    torch.manual_seed(0)
    model = _unknown()[family]().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    batch = models.inputs(model)
    start = models.result(model(**batch)).detach()
    attach(model, 5, [0, 2], head=False)
    assert any("numerical proof" in note for note in attachment_of(model).layout.notes)
    assert torch.equal(models.result(model(**batch)), start)
    model = detach(model).double()
    before = models.result(model(**batch)).detach()
    attach(model, 5, [0, 2], head=False)
    with torch.no_grad():
        for _, _, parameter in adapter_parameters(model):
            parameter.data = parameter.double()
    models.perturb(p for _, _, p in adapter_parameters(model))
    ours = models.result(model(**batch)).detach()
    plan, tensors = attachment_of(model).plan, {k: t.clone() for k, t in adapter_state(model).items()}
    assert widen(detach(model), plan, tensors)
    merged = models.result(model(**batch)).detach()
    scale = max(1.0, float(ours.abs().max()))
    assert float((ours - merged).abs().max()) <= 1e-12 * scale
    assert float((ours - before).abs().max()) > 1e-3


def test_experts_that_are_modules_are_found_whether_or_not_a_run_reaches_them() -> None:
    model = _unknown()["switch_transformers"]()
    ffns = find_layout(model).ffns
    experts = [module for name, module in model.named_modules() if name.rpartition(".")[2].startswith("expert_")]
    assert len(experts) >= 24
    assert {id(ffn.up) for ffn in ffns if ffn.slot.startswith("experts.")} == {id(e.wi) for e in experts}
    sparse = next(ffn.layer for ffn in ffns if ffn.slot.startswith("experts."))
    in_layer = [f for f in ffns if f.stack == "encoder" and f.layer == sparse]
    names = {id(module): name for name, module in model.named_modules()}
    assert [f.slot for f in in_layer] == [f"experts.{i}" for i in range(12)]
    assert [names[id(f.up)].split(".")[-2] for f in in_layer] == [f"expert_{i}" for i in range(12)]


def test_one_tick_beside_experts_that_are_modules_is_refused() -> None:
    with pytest.raises(PatchError, match="modules of their own"):
        attach(_unknown()["switch_transformers"](), 5, experts="block", head=False)


def test_blocks_that_run_one_after_the_other_belong_to_their_layer() -> None:
    layout = find_layout(_unknown()["mobilebert"]())
    assert layout.sizes == {"encoder": 3}
    assert [ffn.slot for ffn in layout.ffns if ffn.layer == 1] == ["ffn.0", "ffn.1", "ffn2"]


def test_layers_that_only_some_inputs_run_are_found() -> None:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig())
    layout = find_layout(model)
    assert layout.sizes == {"vision_encoder": 32, "vision_global_transformer": 8, "text": 40}
    assert len(layout.ffns) == 80
    assert {f.width_field for f in layout.ffns} == {"vision_config.intermediate_size", "text_config.intermediate_size"}


def test_what_no_input_runs_is_named_as_such() -> None:
    from ticktune.patch.fields import width_fields
    from ticktune.patch.proof import prove_blocks

    model = models.families()["bert"]().double()
    blocks, trace = prove_blocks(model)
    for name in [n for n in trace.times if n.startswith("bert.encoder.layer.2.")]:
        del trace.times[name]
    first = [block for block in blocks if ".layer.2." not in block.up]
    obstacles = width_fields(model, first, trace).obstacles
    assert set(obstacles.values()) == {
        "intermediate_size is also the size of bert.encoder.layer.2.intermediate.dense.bias, which no input that is "
        "known for this model makes run"
    }


def test_a_bert_that_attends_to_another_model_trains_the_norms_of_that_too() -> None:
    from transformers import BertConfig, BertLMHeadModel

    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 82}
    config = BertConfig(**size, vocab_size=64, is_decoder=True, add_cross_attention=True)
    norms = find_layout(BertLMHeadModel(config)).norms
    assert {key.rpartition(".")[2] for key in norms} == {"embedding", "attention", "cross_attention", "ffn"}


def test_the_norm_behind_a_block_in_its_own_module_is_its_norm() -> None:
    from transformers import XLNetConfig, XLNetForSequenceClassification

    model = XLNetForSequenceClassification(XLNetConfig(d_model=48, n_layer=2, n_head=4, d_inner=82, vocab_size=64))
    norms = find_layout(model).norms
    assert [key for key in norms if ".1." in key] == ["decoder.1.norm.attention", "decoder.1.norm.ffn"]
    assert norms["decoder.1.norm.ffn"] is model.transformer.layer[1].ff.layer_norm


def test_norms_without_a_role_are_named() -> None:
    [note] = find_layout(models.families()["wav2vec2"]()).notes
    assert note == "norms of no known role stay as they are: feature_projection.layer_norm"
    assert find_layout(models.families()["bert"]()).notes == []


def test_the_norms_of_an_unknown_family_have_their_roles() -> None:
    norms = find_layout(_unknown()["stablelm"]()).norms
    assert {key.rpartition(".")[2] for key in norms} == {"attention", "ffn", "final"}
    assert {key.rpartition(".")[2] for key in find_layout(_unknown()["cohere"]()).norms} == {"attention", "final"}


def test_detection_changes_nothing() -> None:
    model = _unknown()["stablelm"]()
    config, state = copy.deepcopy(model.config), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_layout(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config.to_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_model_on_the_meta_device_is_found_too() -> None:
    with torch.device("meta"):
        model = _unknown()["stablelm"]()
    assert [ffn.width for ffn in find_layout(model).ffns] == [82] * 3


def test_what_does_not_hold_on_the_real_model_is_refused() -> None:
    model = _unknown()["stablelm"]()
    # The class computes SiLU, as the small model does; this instance computes something else.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: (args[0].relu(),))
    find_layout(model)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * 1.01,))
    with pytest.raises(PatchError, match="does not hold on this one"):
        find_layout(model)


def test_blocks_that_stand_in_the_layer_itself_are_checked_by_a_run_of_the_real_model() -> None:
    import transformers as t

    size: dict[str, Any] = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = t.BlenderbotModel(t.BlenderbotConfig(**size, **heads, encoder_ffn_dim=82, decoder_ffn_dim=70))
    assert len(find_layout(model).ffns) == 4
    assert model.training
    model.encoder.layers[0].fc2.register_forward_pre_hook(lambda m, args: (args[0] * 1.01,))
    with pytest.raises(PatchError, match="does not hold on this one"):
        find_layout(model)


class _Block(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.middle(self.up(x)))

    def middle(self, wide: Tensor) -> Tensor:
        return nn.functional.gelu(wide)


class _Normed(_Block):
    """A norm between the activation and the projection back: its units are not independent of each other."""

    def middle(self, wide: Tensor) -> Tensor:
        return nn.functional.layer_norm(nn.functional.gelu(wide), wide.shape[-1:])


class _Scaled(_Block):
    """Nearly an activation that is known."""

    def middle(self, wide: Tensor) -> Tensor:
        return nn.functional.gelu(wide) * (1 + 1e-4)


def _toy(block: type[nn.Module], in_layers: bool = True, layers: int = 3) -> nn.Module:
    from transformers import PreTrainedConfig, PreTrainedModel

    class ToyConfig(PreTrainedConfig):
        model_type = "toy"
        hidden_size: int = 32
        intermediate_size: int = 80
        num_hidden_layers: int = layers
        vocab_size: int = 64

    class ToyModel(PreTrainedModel):
        config_class = ToyConfig
        main_input_name = "input_ids"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            blocks = [block(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers)]
            if in_layers:
                self.layers = nn.ModuleList(blocks)
            else:
                self.pooler = blocks[0]
            self.post_init()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for layer in self.layers if in_layers else [self.pooler]:
                x = layer(x)
            return x

    return ToyModel(ToyConfig()).eval()


def test_a_model_that_nobody_has_seen_is_found() -> None:
    layout = find_layout(_toy(_Block))
    assert [(f.layer, f.width_field) for f in layout.ffns] == [(i, "intermediate_size") for i in range(3)]
    assert layout.ffns[0].act(torch.ones(())) == nn.functional.gelu(torch.ones(()))


@pytest.mark.parametrize("block", [_Normed, _Scaled])
def test_what_is_not_exactly_a_feed_forward_block_is_refused(block: type[_Block]) -> None:
    with pytest.raises(PatchError, match="no pair of projections is down"):
        find_layout(_toy(block))


def test_a_pair_of_projections_outside_of_layers_is_refused() -> None:
    with pytest.raises(PatchError, match="outside of any list of layers"):
        find_layout(_toy(_Block, in_layers=False))


def test_poolers_and_box_heads_are_no_blocks() -> None:
    names = {id(f.up) for f in find_layout(models.families()["yolos"](), families={}).ffns}
    heads = [m for n, m in models.families()["yolos"]().named_modules() if "bbox_predictor" in n]
    assert heads
    assert len(names) == 3
    reason = detect(models.families()["clip"]()).reason
    assert reason == "" or "feed-forward" in reason


def test_a_module_without_config_is_refused() -> None:
    with pytest.raises(PatchError, match="has no config"):
        find_layout(nn.Linear(2, 2))


class _Mixed(nn.Module):
    """Two blocks of one form: every other layer has one more, which runs first."""

    def __init__(self, hidden: int, width: int, has_extra: bool) -> None:
        super().__init__()
        self.mlp = _Block(hidden, width)
        self.extra = _Block(hidden, width) if has_extra else None

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x if self.extra is None else self.extra(x))


def test_a_block_has_its_own_tick_wherever_it_stands_in_its_layer() -> None:
    class Layer(_Mixed):
        made = 0

        def __init__(self, hidden: int, width: int) -> None:
            super().__init__(hidden, width, has_extra=type(self).made % 2 == 1)
            type(self).made += 1

    # An even number of layers, so that a second model of the class begins as the first one does.
    model = _toy(Layer, layers=4)
    layout = find_layout(model)
    names = {id(module): name for name, module in model.named_modules()}
    assert {ffn.key: names[id(ffn.down)] for ffn in layout.ffns} == {
        "encoder.0.ffn": "layers.0.mlp.down",
        "encoder.1.ffn": "layers.1.mlp.down",
        "encoder.1.ffn2": "layers.1.extra.down",
        "encoder.2.ffn": "layers.2.mlp.down",
        "encoder.3.ffn": "layers.3.mlp.down",
        "encoder.3.ffn2": "layers.3.extra.down",
    }


def test_stages_of_layers_are_no_lists_of_bare_blocks() -> None:
    from transformers import ConvNextConfig, ConvNextModel

    model = ConvNextModel(ConvNextConfig(depths=[1, 2, 2, 1], hidden_sizes=[16, 32, 48, 64]))
    assert sum(find_layout(model).sizes.values()) == 6


def test_falcons_new_layers_train_both_of_their_norms() -> None:
    from transformers import FalconConfig, FalconModel

    size: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = FalconConfig(**size, new_decoder_architecture=True, num_kv_heads=2)
    norms = find_layout(FalconModel(config)).norms
    assert [key for key in norms if ".1." in key] == ["decoder.1.norm.attention", "decoder.1.norm.ffn"]


def test_a_width_that_sizes_something_of_the_outer_model_too_is_none() -> None:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    with torch.device("meta"):
        model = VoxtralForConditionalGeneration(VoxtralConfig())
    layout = find_layout(model)
    sound = [ffn for ffn in layout.ffns if ffn.stack == "audio"]
    assert sound
    assert {ffn.width_field for ffn in sound} == {None}
    assert all("also the size of" in ffn.obstacle and "projector" in ffn.obstacle for ffn in sound)
    assert all(ffn.width_field is not None for ffn in layout.ffns if ffn.stack == "text")
