"""``ticktune.merge`` finds inputs to verify on by itself."""

from pathlib import Path

import torch

import tests.models as models
import ticktune


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
    ticktune.merge(model, tmp_path / "merged")
    merged = t.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    after = dict(merged.named_buffers())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
