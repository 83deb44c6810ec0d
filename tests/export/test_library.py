"""``ticktune.merge`` finds inputs to verify on by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.models as models
import ticktune
from tests.reliability.catalogue import case
from ticktune.errors import ExportError
from ticktune.export import library
from ticktune.export.verify import compare_outputs
from ticktune.patch.attach import adapter_state, attachment_of
from ticktune.patch.detect import find_layout


@case("X1")
def test_a_model_of_sound_merges_without_given_inputs(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 82}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**shape, **convolutions, **positions)).eval()
    ticktune.attach(model, dim=8)
    models.perturb(p for p in model.parameters() if p.requires_grad)
    found = ticktune.merge(model, tmp_path / "merged")
    assert found.is_conclusive
    assert found.max_difference <= found.tolerance


def test_a_base_tensor_that_is_held_wider_than_the_others_is_not_rounded(tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ids = {"vocab_size": 64, "pad_token_id": 0}
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    heads = {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    heads |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    config = t.DeepseekV3Config(**size, **ids, **experts, **heads, moe_intermediate_size=32, n_shared_experts=1)
    base = t.DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for name, buffer in base.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.rand(buffer.shape)  # as its checkpoints hold it, and transformers keeps it
    base.save_pretrained(tmp_path / "base")
    model = t.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert before
    assert {b.dtype for b in before.values()} == {torch.float32}
    ticktune.attach(model, 4, [1])
    models.perturb(p for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=r"decoder\.1\.experts\.\d"):  # which the random bias leaves out
        ticktune.merge(model, tmp_path / "merged")
    merged = t.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    after = dict(merged.named_buffers())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def _tuned(model: nn.Module, **options: Any) -> nn.Module:
    ticktune.attach(model.eval(), 4, **options)
    models.perturb(p for p in model.parameters() if p.requires_grad)
    return model


def _llava(**changes: Any) -> nn.Module:
    import transformers as t

    text = {k: v for k, v in models.table()["llama"].config.to_dict().items() if k != "model_type"}
    vision = models.table()["clip"].config.vision_config
    config = t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=vision, image_token_index=63, **changes)
    return t.LlavaForConditionalGeneration(config)


def _blip2() -> nn.Module:
    import transformers as t

    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "ffn_dim": 82, "vocab_size": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
    config = t.Blip2Config(
        vision_config={**size, "intermediate_size": 82, "image_size": 32, "patch_size": 8},
        qformer_config={**size, "intermediate_size": 82, "encoder_hidden_size": 48, "vocab_size": 64},
        text_config=t.OPTConfig(**text, pad_token_id=0, bos_token_id=2, eos_token_id=3).to_dict(),
        num_query_tokens=4,
        image_token_index=63,
    )
    return t.Blip2ForConditionalGeneration(config)


def _encoder_decoder() -> nn.Module:
    import transformers as t

    encoder = models.table()["bert"].config
    decoder = t.BertConfig(**{**encoder.to_dict(), "is_decoder": True, "add_cross_attention": True})
    return t.EncoderDecoderModel(t.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))


SEVERAL_INPUTS = {
    "clip": lambda: models.families()["clip"](),
    "siglip": lambda: models.families()["siglip"](),
    "llava": _llava,
    "blip2": _blip2,
    "encoder-decoder": _encoder_decoder,
}


@case("X1")
@pytest.mark.parametrize("name", list(SEVERAL_INPUTS))
def test_a_model_of_several_inputs_merges_without_given_ones_and_all_its_towers_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _tuned(SEVERAL_INPUTS[name]())
    found = ticktune.merge(model, tmp_path / "merged")
    assert found.is_conclusive
    assert found.max_difference <= found.tolerance
    assert found.ticks == found.ticks_run == len(attachment_of(model).ticks)
    assert ("ticks exercised", f"{found.ticks}/{found.ticks}") in found.lines()


def test_a_model_that_takes_no_random_inputs_asks_for_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "example_inputs", lambda model, seed: [{"pixel_values": torch.zeros(1)}])
    with pytest.raises(
        ExportError, match="BertForSequenceClassification takes no random inputs: You must specify"
    ) as e:
        ticktune.merge(_tuned(models.families()["bert"]()), tmp_path / "merged")
    assert "inputs=" in e.value.problems[0].fix
    assert list(tmp_path.iterdir()) == []


def _question_answering() -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    return t.BertForQuestionAnswering(models.table()["bert"].config)


def test_every_output_is_compared_not_the_first_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tuned(_question_answering())
    found = ticktune.merge(model, tmp_path / "merged")
    assert found.decisions == 2 * found.rows  # a start and an end in each row
    kept = library.widen

    def without_end(stock: nn.Module, *args: Any, **options: Any) -> Any:
        done = kept(stock, *args, **options)
        stock.get_parameter("qa_outputs.bias").data[1] += 1e-2  # the end logits alone
        return done

    monkeypatch.setattr(library, "widen", without_end)
    with pytest.raises(ExportError, match="differs from base") as e:
        ticktune.merge(model, tmp_path / "other")
    assert e.value.problems[0].where == "output end_logits"


def test_outputs_of_a_tower_count_by_their_own_size() -> None:
    ours = {"logits_per_image": torch.full((2, 2), 100.0), "image_embeds": torch.full((2, 2), 0.5)}
    base = {name: tensor + 1 for name, tensor in ours.items()}
    merged = {**ours, "image_embeds": ours["image_embeds"] + 1e-4}
    assert compare_outputs([ours], [ours], [base], [base], library._argmax).tolerance == pytest.approx(1e-3)
    with pytest.raises(ExportError, match="output image_embeds: the merged folder differs"):
        compare_outputs([ours], [merged], [base], [base], library._argmax)


def test_outputs_that_no_tick_reaches_do_not_weaken_the_proof_and_weak_ones_do() -> None:
    logits, other = torch.tensor([[3.0, 1.0]]), torch.ones(1, 2)
    ours = {"logits": logits, "encoder_last_hidden_state": other}
    for effect, is_conclusive in ((0.0, True), (1e-4, False)):
        base = {"logits": logits + 1, "encoder_last_hidden_state": other + effect}
        found = compare_outputs([ours], [ours], [base], [base], library._argmax)
        assert found.is_conclusive == is_conclusive
        assert (found.rows, found.decisions) == (1, 1)


def test_ticks_that_no_row_reaches_are_named_and_stand_in_the_folder_all_the_same(tmp_path: Path) -> None:
    model = _tuned(models.families()["mixtral"](), norms="none")
    tensors = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    with pytest.warns(UserWarning, match=r"ticks got no input from the compared rows, .*: decoder\.\d\.experts\.\d"):
        found = ticktune.merge(model, tmp_path / "merged", inputs=[{"input_ids": torch.tensor([[5]])}])
    assert found.ticks == 12
    assert found.ticks_run == 6  # one token goes to two experts of four in each layer
    assert len(found.idle_ticks) == 6
    assert ("ticks exercised", "6/12") in found.lines()
    import transformers as t

    merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for ffn in find_layout(merged).ffns:
        for number in range(4):
            gate, up = ffn.down.gate_up_proj[number].chunk(2)
            down, key = ffn.down.down_proj[number], f"{ffn.key}.{number}"
            assert torch.equal(gate[80:84], tensors[f"{key}.Q"])
            assert torch.equal(up[80:84], tensors[f"{key}.U"])
            assert torch.equal(down[:, 80:84], tensors[f"{key}.P"])


def test_a_vision_tower_without_images_is_no_exercise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _tuned(_llava())
    ids = torch.randint(4, 60, (2, 8))
    with pytest.warns(UserWarning, match=r"3 of 6 ticks .*: vision\.0\.ffn, vision\.1\.ffn, vision\.2\.ffn"):
        found = ticktune.merge(model, tmp_path / "merged", inputs=[{"input_ids": ids}])
    assert (found.ticks, found.ticks_run) == (6, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_to": 0}, "pad_to is 0, expected"),
        ({"pad_to": -7}, "pad_to is -7, expected"),
        ({"pad_to": "x"}, "pad_to is 'x', expected"),
        ({"pad_to": True}, "pad_to is True, expected"),
        ({"pad_to": 8.0}, "pad_to is 8.0, expected"),
        ({"express": "Llama"}, "express is 'Llama', expected same or llama"),
        ({"inputs": {"input_ids": torch.ones(1, 2)}}, "inputs is a dict, expected a list"),
        ({"inputs": [torch.ones(1, 2)]}, r"inputs\[0\] is tensor"),
        ({"inputs": [{}]}, r"inputs\[0\] is {}"),
        ({"inputs": [{"input_ids": [[1, 2]]}]}, r"inputs\[0\]\['input_ids'\] is a list, expected a tensor"),
        ({"tokenizer": "bert"}, "the tokenizer is a str"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = ticktune.attach(models.families()["bert"](), 4)
    with pytest.raises(ExportError, match=message):
        ticktune.merge(model, tmp_path / "merged", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_is_the_bases_also_where_nothing_is_frozen(tmp_path: Path) -> None:
    import transformers as t

    model = _tuned(models.families()["bert"]().to(torch.bfloat16)).requires_grad_(True)
    ticktune.merge(model, tmp_path / "merged")
    assert t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@case("X1")
@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_a_base_in_float64_is_not_rounded(family: str, tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    model = models.families()[family]().double()
    for parameter in model.parameters():
        parameter.data += 1e-12 * torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if family == "mixtral":
        model.set_experts_implementation("eager")
    found = ticktune.merge(_tuned(model, head=False), tmp_path / "merged")
    assert found.is_conclusive
    assert found.max_difference < 1e-12
    merged = getattr(t, models.table()[family].auto).from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float64
    for ffn in find_layout(model).ffns:
        name = next(n for n, m in model.named_modules() if m is ffn.down)
        leaf = "down_proj" if ffn.experts is not None else "weight"
        assert torch.equal(merged.get_parameter(f"{name}.{leaf}")[..., : ffn.width], before[f"{name}.{leaf}"])
    embeddings = next(n for n in before if n.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    assert torch.equal(merged.get_parameter(embeddings), before[embeddings])
