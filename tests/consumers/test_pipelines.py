"""Stock pipelines on merged folders say what the same pipelines say of base + adapter in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ticktune
from tests.consumers.conftest import Record
from tests.consumers.support import Agreement, agreement, attach, randomised, sizes, train
from tests.models import word_tokenizer

pytestmark = [pytest.mark.consumers, pytest.mark.filterwarnings("ignore")]

Inputs = Sequence[Any]


def _flatten(value: Any) -> tuple[list[float], list[Any]]:
    """Numbers and all else of a pipeline's output, in the order of its keys."""
    if isinstance(value, dict):
        parts = [_flatten(value[key]) for key in sorted(value)]
    elif isinstance(value, list | tuple):
        parts = [_flatten(item) for item in value]
    elif isinstance(value, float | np.floating):
        return [float(value)], []
    else:
        return [], [value]
    return [n for numbers, _ in parts for n in numbers], [w for _, words in parts for w in words]


def compare(
    task: str,
    model: nn.Module,
    inputs: Inputs,
    folder: Path,
    *,
    parts: dict[str, Any],
    batches: Sequence[dict[str, Any]] = (),
    call: dict[str, Any] | None = None,
    form: str = "auto",
    numbers: Callable[[Any], Any] | None = None,
) -> Agreement:
    """Runs one pipeline on base + adapter and on the merged folder.

    Args:
        task: The pipeline's.
        model: The stock base.
        inputs: What the pipeline is given, one after another.
        folder: Where to merge.
        parts: Tokenizer, image processor or feature extractor of the pipeline.
        batches: What the merged folder is verified on; empty: random tokens or pixels.
        call: Options of the pipeline's call.
        form: Of the ticks.
        numbers: Pipeline -> numbers, where its output has none.
    """
    from transformers import pipeline

    def say(pipe: Any) -> tuple[Any, Any]:
        outputs = [pipe(one, **(call or {})) for one in inputs]
        values, words = _flatten(outputs)
        return (numbers(pipe) if numbers else [np.array(values)]), words

    own = pipeline(task, model=attach(model, form=form), device="cpu", **parts)
    assert own.model is model
    without, _ = say(own)
    train(model)
    ours, our_words = say(own)
    ticktune.merge(model, folder, inputs=batches)
    for part in parts.values():
        part.save_pretrained(folder)
    stock = pipeline(task, model=str(folder), device="cpu")
    assert type(stock) is type(own)
    assert type(stock.model) is type(model)
    theirs, their_words = say(stock)
    assert their_words == our_words
    return agreement(theirs, ours, without)


def _minilm(folder: Path, auto: str, **entries: Any) -> tuple[nn.Module, Any]:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto).from_pretrained(folder, **entries)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.2)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


SENTENCES = ["a fine film", "Anna Smith went to Paris in the rain", "my parcel is late again"]


def test_text_classification(minilm: Path, tmp_path: Path, record: Record) -> None:
    labels = {0: "bad", 1: "so-so", 2: "good"}
    model, tokenizer = _minilm(minilm, "AutoModelForSequenceClassification", id2label=labels)
    # All labels in their own order: a list sorted by score would turn around at near ties.
    call = {"top_k": None, "function_to_apply": "softmax"}
    found = compare("text-classification", model, SENTENCES, tmp_path / "m", parts={"tokenizer": tokenizer}, call=call)
    record("transformers pipeline", "transformers", "text-classification: BERT (MiniLM-L6)", "real", "scores", found)


def test_token_classification(minilm: Path, tmp_path: Path, record: Record) -> None:
    model, tokenizer = _minilm(minilm, "AutoModelForTokenClassification", num_labels=5)
    found = compare("token-classification", model, SENTENCES, tmp_path / "m", parts={"tokenizer": tokenizer})
    record("transformers pipeline", "transformers", "token-classification: BERT (MiniLM-L6)", "real", "scores", found)


def test_feature_extraction(minilm: Path, tmp_path: Path, record: Record) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    found = compare("feature-extraction", model, SENTENCES, tmp_path / "m", parts={"tokenizer": tokenizer})
    record("transformers pipeline", "transformers", "feature-extraction: BERT (MiniLM-L6)", "real", "features", found)


def test_fill_mask(tmp_path: Path, record: Record) -> None:
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    model = randomised(RobertaForMaskedLM(RobertaConfig(**sizes())), 0.2)
    tokenizer = word_tokenizer()
    tokenizer.mask_token = "w59"
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # only one that was loaded leaves the new mask token out of texts
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    found = compare(
        "fill-mask",
        model,
        ["w1 w2 w59 w3", "w59 w9"],
        tmp_path / "m",
        parts={"tokenizer": tokenizer},
        call={"top_k": 5},
    )
    record("transformers pipeline", "transformers", "fill-mask: RoBERTa", "random", "scores", found)


@pytest.mark.parametrize("form", ["gated", "plain"])
def test_text_generation(form: str, stories: Path, tmp_path: Path, record: Record) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    prompts = ["Once upon a time", "Lily wanted a", "The dog"]

    def logits(pipe: Any) -> list[Any]:
        with torch.no_grad():
            return [pipe.model(**pipe.tokenizer(prompt, return_tensors="pt")).logits for prompt in prompts]

    found = compare(
        "text-generation",
        model,
        prompts,
        tmp_path / "m",
        parts={"tokenizer": tokenizer},
        call={"max_new_tokens": 32, "do_sample": False},
        form=form,
        numbers=logits,
    )
    what = "texts; logits of prompts"
    record("transformers pipeline", "transformers", f"text-generation: Llama, {form} ticks", "real", what, found)


def test_image_classification(tmp_path: Path, record: Record) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    entries = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    torch.manual_seed(0)
    shape = {k: v for k, v in sizes().items() if not k.endswith("_token_id") and k != "vocab_size"}
    model = randomised(ViTForImageClassification(ViTConfig(**shape, **entries)), 0.2)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    found = compare(
        "image-classification",
        model,
        [image.fromarray(one) for one in pixels],
        tmp_path / "m",
        parts={"image_processor": ViTImageProcessor(size={"height": 16, "width": 16})},
        call={"top_k": 5},
    )
    record("transformers pipeline", "transformers", "image-classification: ViT", "random", "scores", found)


def _sounds() -> list[Any]:
    return [np.random.default_rng(n).normal(size=4000).astype(np.float32) for n in range(3)]


def _wav2vec2(**entries: Any) -> Any:
    from transformers import Wav2Vec2Config

    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}
    return Wav2Vec2Config(**sizes(**convolutions, **positions, **entries))


def test_audio_classification(tmp_path: Path, record: Record) -> None:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    model = randomised(Wav2Vec2ForSequenceClassification(_wav2vec2(num_labels=4)), 0.1)
    found = compare(
        "audio-classification",
        model,
        _sounds(),
        tmp_path / "m",
        parts={"feature_extractor": Wav2Vec2FeatureExtractor()},
        call={"top_k": 4},
    )
    record("transformers pipeline", "transformers", "audio-classification: Wav2Vec2", "random", "scores", found)


def test_automatic_speech_recognition(tmp_path: Path, record: Record) -> None:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    torch.manual_seed(0)
    model = randomised(Wav2Vec2ForCTC(_wav2vec2()), 0.1)

    def logits(pipe: Any) -> list[Any]:
        with torch.no_grad():
            return [
                pipe.model(**pipe.feature_extractor(s, return_tensors="pt", sampling_rate=16000)).logits
                for s in _sounds()
            ]

    found = compare(
        "automatic-speech-recognition",
        model,
        _sounds(),
        tmp_path / "m",
        parts={"feature_extractor": Wav2Vec2FeatureExtractor(), "tokenizer": word_tokenizer()},
        numbers=logits,
    )
    what = "texts; logits"
    record("transformers pipeline", "transformers", "automatic-speech-recognition: Wav2Vec2", "random", what, found)
