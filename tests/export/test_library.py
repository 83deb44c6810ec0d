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
