"""Small models that learn a part of the real data first, as no pretrained weights of their kind are at hand.

A recipe names the Hub model that a person would use; a test gives it one of these instead. Each is trained from
nothing for some seconds on rows that the fine-tuning does not see or does not ask about, so what is fine-tuned has
learned something real, at a small scale.
"""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Batches = Iterator[dict[str, Tensor]]


def learn(model: nn.Module, batches: Callable[[], Batches], steps: int, lr: float = 1e-3) -> nn.Module:
    """Trains a whole model from nothing with AdamW and a one-cycle learning rate; returns it in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    step = 0
    while step < steps:
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == steps:
                break
    return model.eval()


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yields row numbers in batches, in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order.split(size)


def digits(folder: Path, split: str, names: str) -> tuple[list[Path], Tensor]:
    """Files of written digits and their places in ``names``."""
    files = [(path, names.index(n)) for n in names for path in sorted((folder / "mnist_3k" / split / n).iterdir())]
    return [path for path, _ in files], torch.tensor([label for _, label in files])


def image_model(data: Path, target: Path, config: Any, processor: Any, *, steps: int = 250) -> Path:
    """Trains an image classifier of any architecture on the digits 0 to 4, and saves its body and image processor.

    Args:
        data: Folder of the data sets.
        target: Where the model is saved.
        config: Of a small model.
        processor: The image processor.
        steps: Of training.
    """
    from PIL import Image
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    config.num_labels = 5
    model = AutoModelForImageClassification.from_config(config)
    paths, labels = digits(data, "train", "01234")
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = processor(images, return_tensors="pt")["pixel_values"]

    def batches() -> Batches:
        for rows in shuffled(len(labels), 32, int(torch.randint(1 << 30, ()))):
            yield {"pixel_values": pixels[rows], "labels": labels[rows]}

    learn(model, batches, steps)
    model.base_model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


def captions(data: Path, name: str, first: int, last: int) -> list[tuple[str, str]]:
    """Pairs of an English caption and its German translation, of a split of Multi30k."""
    lines = (data / "multi30k_en_de" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[first:last]
    return [(row["en"], row["de"]) for row in map(json.loads, filter(None, lines))]


def subword_tokenizer(texts: list[str], size: int) -> Any:
    """A byte-pair tokenizer of ``size`` tokens, learned from texts; it ends a text with ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


def denoiser(data: Path, target: Path, *, steps: int = 400) -> Path:
    """Trains a small BART to restore captions, English and German ones, of which it sees some words; saves it.

    That is how BART itself was pretrained, at a small scale: it knows both languages a little, and never saw which
    caption translates which. The captions are those from the 4,000th on.
    """
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    texts = [text for pair in captions(data, "train", 4000, 10000) for text in pair]
    tokenizer = subword_tokenizer(texts, 1000)
    config = BartConfig(
        vocab_size=1000, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128, dropout=0.0,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    whole = [torch.tensor(ids[:64]) for ids in tokenizer(texts)["input_ids"]]
    generator = torch.Generator().manual_seed(0)

    def batches() -> Batches:
        for rows in shuffled(len(whole), 32, 0):
            labels = [whole[row] for row in rows.tolist()]
            seen = [ids[(torch.rand(len(ids), generator=generator) > 0.3) | (ids == 1)] for ids in labels]
            source = nn.utils.rnn.pad_sequence(seen, batch_first=True, padding_value=0)
            answer = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            yield {"input_ids": source, "attention_mask": (source != 0).long(), "labels": answer}

    learn(model, batches, steps, lr=4e-3)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def digit_scenes(data: Path, target: Path, split: str, names: str, count: int, *, size: int, seed: int) -> Path:
    """Writes darkened pieces of photographs with a written digit on each, and metadata.jsonl with its box.

    Args:
        data: Folder of the data sets.
        target: Folder to write.
        split: Of the digits and of the photographs.
        names: The digits that occur; one stands in each scene.
        count: Number of scenes.
        size: Pixels of a scene's sides.
        seed: Of what is random.
    """
    import json

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    paths, labels = digits(data, split, names)
    marks = [np.asarray(Image.open(path).convert("L")) for path in paths]
    photographs = [np.asarray(Image.open(p).convert("RGB")) for p in sorted((data / "coco128" / split).glob("*.jpg"))]
    target.mkdir(parents=True)
    lines = []
    for number in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        y, x = rng.integers(0, photograph.shape[0] - size), rng.integers(0, photograph.shape[1] - size)
        scene = photograph[y : y + size, x : x + size] * 0.15
        choice = int(rng.integers(len(marks)))
        rows, columns = np.nonzero(marks[choice] > 40)
        mark = marks[choice][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        height = int(rng.integers(size // 2, size * 3 // 4))
        width = max(size // 6, min(size - 1, round(height * mark.shape[1] / mark.shape[0])))
        left, top = int(rng.integers(0, size - width)), int(rng.integers(0, size - height))
        ink = np.asarray(Image.fromarray(mark).resize((width, height)), dtype=float)[..., None] / 255
        place = (slice(top, top + height), slice(left, left + width))
        scene[place] = scene[place] * (1 - ink) + rng.uniform(180, 255, 3) * ink
        objects = {"bbox": [[left, top, width, height]], "category": [names[int(labels[choice])]]}
        Image.fromarray(scene.astype(np.uint8)).save(target / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects}))
    (target / "metadata.jsonl").write_text("\n".join(lines))
    return target


def detection_model(data: Path, folder: Path, *, size: int, steps: int = 950) -> Path:
    """Trains a small DETR on scenes of the digits 0 to 4, and saves it whole, with its image processor.

    Args:
        data: Folder of the data sets.
        folder: Where the scenes and the model, in ``base``, are saved.
        size: Pixels of a scene's sides.
        steps: Of training.
    """
    import json

    from PIL import Image
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig

    torch.manual_seed(0)
    scenes = digit_scenes(data, folder / "pretraining", "train", "01234", 4000, size=size, seed=1)
    rows = [json.loads(line) for line in (scenes / "metadata.jsonl").read_text().splitlines()]
    processor = DetrImageProcessorPil(size={"height": size, "width": size}, do_pad=False)
    images = [Image.open(scenes / row["file_name"]) for row in rows]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    labels = []
    for row in rows:
        boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float32) / size
        boxes = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)
        names = torch.tensor([int(name) for name in row["objects"]["category"]])
        labels.append({"class_labels": names, "boxes": boxes})
    stages = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    attention = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = DetrConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=2,
        **attention,
        dropout=0.0,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**stages, out_features=["stage3"]),
        num_labels=5,
        bbox_loss_coefficient=2,
        giou_loss_coefficient=1,
    )
    model = DetrForObjectDetection(config)

    def batches() -> Batches:
        for chosen in shuffled(len(rows), 32, int(torch.randint(1 << 30, ()))):
            yield {"pixel_values": pixels[chosen], "labels": [labels[i] for i in chosen]}  # type: ignore[dict-item]

    learn(model, batches, steps, lr=1.5e-3)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


def spoken(data: Path, split: str, digits: str) -> tuple[list[Any], list[int]]:
    """Waveforms of spoken digits at 8 kHz, and which digit each is."""
    import soundfile

    rows = [json.loads(line) for line in (data / "fsdd" / split / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if str(row["label"]) in digits]
    files = [data / "fsdd" / split / row["file_name"] for row in rows]
    return [soundfile.read(file, dtype="float32")[0] for file in files], [row["label"] for row in rows]


def small_wav2vec2(**entries: Any) -> Any:
    """Config of a small model of waveforms at 8 kHz that gives 50 frames a second."""
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(
        **{
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "conv_dim": (64, 64, 96),
            "conv_kernel": (80, 4, 4),
            "conv_stride": (20, 2, 4),
            "conv_bias": True,
            "num_feat_extract_layers": 3,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 96,
            "layerdrop": 0.0,
            "apply_spec_augment": False,
            **entries,
        }
    )


def hear_pitches(model: nn.Module) -> None:
    """Sets the first convolution to windowed waves of evenly heard pitches, as ears have it: half the way is made."""
    convolution = model.get_parameter("wav2vec2.feature_extractor.conv_layers.0.conv.weight")
    count, _, width = convolution.shape
    lowest, highest = (2595 * math.log10(1 + hertz / 700) for hertz in (100, 3800))
    hertz = 700 * (10 ** (torch.linspace(lowest, highest, count // 2) / 2595) - 1)
    angles = 2 * math.pi * hertz[:, None] / 8000 * (torch.arange(width) - (width - 1) / 2)
    window = torch.hann_window(width, periodic=False)
    with torch.no_grad():
        convolution[:, 0] = torch.cat([angles.cos(), angles.sin()]) * window


def sound_model(data: Path, target: Path, config: Any, *, steps: int = 300) -> Path:
    """Trains a classifier of waveforms on the spoken digits 0 to 4, and saves its body and feature extractor.

    Args:
        data: Folder of the data sets.
        target: Where the model is saved.
        config: Of a small model for sound at 8 kHz.
        steps: Of training.
    """
    from transformers import AutoModelForAudioClassification, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    config.num_labels = 5
    model = AutoModelForAudioClassification.from_config(config)
    hear_pitches(model)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    sounds, labels = spoken(data, "train", "01234")

    def batches() -> Batches:
        for rows in shuffled(len(labels), 16, int(torch.randint(2**31, ()))):
            inputs = extractor([sounds[i] for i in rows], sampling_rate=8000, padding=True, return_tensors="pt")
            yield {**inputs, "labels": torch.tensor([labels[i] for i in rows])}

    learn(model, batches, steps, 2e-3)
    model.base_model.save_pretrained(target)
    extractor.save_pretrained(target)
    return target


def transcript_model(data: Path, target: Path, config: Any, *, steps: int = 300) -> Path:
    """Trains a model to write the spoken digits 0 to 4 as words (CTC), and saves its body and feature extractor.

    Args:
        data: Folder of the data sets.
        target: Where the model is saved.
        config: Of a small model for sound at 8 kHz.
        steps: Of training.
    """
    from transformers import AutoModelForCTC, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    letters = ["<pad>", *sorted({letter for word in WORDS[:5] for letter in word})]
    config.vocab_size, config.pad_token_id, config.ctc_loss_reduction = len(letters), 0, "mean"
    config.ctc_zero_infinity = True
    model = AutoModelForCTC.from_config(config)
    hear_pitches(model)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    sounds, labels = spoken(data, "train", "01234")
    written = [torch.tensor([letters.index(letter) for letter in WORDS[label]]) for label in labels]

    def batches() -> Batches:
        for rows in shuffled(len(labels), 16, int(torch.randint(2**31, ()))):
            inputs = extractor([sounds[i] for i in rows], sampling_rate=8000, padding=True, return_tensors="pt")
            texts = nn.utils.rnn.pad_sequence([written[i] for i in rows], batch_first=True, padding_value=-100)
            yield {**inputs, "labels": texts}

    learn(model, batches, steps, 3e-3)
    model.base_model.save_pretrained(target)
    extractor.save_pretrained(target)
    return target


def small_bert(vocabulary: int, *, layers: int = 3) -> Any:
    """Config of a small BERT for texts of up to 128 tokens."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def wordpiece_tokenizer(texts: list[str], size: int, target: Path, *, letters: int = 1000) -> Any:
    """A BERT tokenizer of up to ``size`` tokens, saved: the most frequent letters and words of texts.

    A Chinese character is a word. The trainer of ``tokenizers`` would learn other tokens in each run.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    inner = BertWordPieceTokenizer(lowercase=True)
    split = (inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(text)) for text in texts)
    words = Counter(word for pieces in split for word, _ in pieces)
    first, later = Counter[str](), Counter[str]()
    for word, count in words.items():
        first.update(dict.fromkeys(word, count))
        later.update(dict.fromkeys(word[1:], count))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *frequent(first)[:letters]]
    tokens += [f"##{letter}" for letter in frequent(later)[:letters]]
    tokens += [word for word in frequent(words) if len(word) > 1]
    vocabulary = {token: number for number, token in enumerate(tokens[:size])}
    target.mkdir(parents=True, exist_ok=True)
    BertWordPieceTokenizer(vocabulary, lowercase=True).save(str(target / "tokenizer.json"))
    tokenizer = BertTokenizerFast(tokenizer_file=str(target / "tokenizer.json"))
    tokenizer.save_pretrained(target)
    return tokenizer


def frequent(counts: Counter[str]) -> list[str]:
    """The most frequent first; of those that are as frequent, in their own order."""
    return sorted(counts, key=lambda text: (-counts[text], text))


def masked_model(data: Path, target: Path, *, steps: int = 140) -> Path:
    """Trains a small BERT on English captions, and saves it with a WordPiece tokenizer that knows Shakespeare's too.

    It learns which words are frequent and a little of what stands beside them: real, at a small scale.

    Args:
        data: Folder of the data sets.
        target: Where the model is saved, its head for masked words included.
        steps: Of training.
    """
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    texts = [english for english, _ in captions(data, "train", 0, 10000)]
    plays = (data / "tinyshakespeare/train.txt").read_text(encoding="utf-8").split("\n")
    tokenizer = wordpiece_tokenizer([*texts, *plays], 2000, target)
    ids = torch.tensor(tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 62 * 62].view(-1, 62)
    ends = [torch.full((len(windows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    windows = torch.cat([ends[0], windows, ends[1]], dim=1)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Batches:
        for rows in shuffled(len(windows), 32, int(torch.randint(1 << 30, (), generator=generator))):
            chosen = windows[rows]
            hidden = torch.rand(chosen.shape, generator=generator) < 0.15
            hidden[:, [0, -1]] = False
            masked = torch.where(hidden, tokenizer.mask_token_id, chosen)
            yield {"input_ids": masked, "labels": torch.where(hidden, chosen, -100)}

    learn(BertForMaskedLM(small_bert(len(tokenizer))), batches, steps, lr=2e-3).save_pretrained(target)
    return target


def reviews(data: Path, split: str, *, hotels: bool) -> list[dict[str, Any]]:
    """Chinese reviews with their labels: those of hotels, by the words of that trade, or the others."""
    lines = (data / "chnsenticorp" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = map(json.loads, filter(None, lines))
    return [
        row for row in rows if bool(re.search("酒店|房间|宾馆|入住|前台|早餐|客房|饭店|大堂", row["text"])) == hotels
    ]


def review_model(data: Path, target: Path, *, steps: int = 250) -> Path:
    """Trains a small BERT of Chinese characters to tell praise of hotels from blame, and saves its body.

    Args:
        data: Folder of the data sets.
        target: Where the model and its tokenizer are saved.
        steps: Of training.
    """
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    rows = reviews(data, "train", hotels=True)
    texts = [row["text"] for row in rows]
    tokenizer = wordpiece_tokenizer(
        [*texts, *(row["text"] for row in reviews(data, "train", hotels=False))], 6000, target
    )
    inputs = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    labels = torch.tensor([int(row["label"]) for row in rows])

    def batches() -> Batches:
        for chosen in shuffled(len(rows), 32, int(torch.randint(1 << 30, ()))):
            yield {**{name: values[chosen] for name, values in inputs.items()}, "labels": labels[chosen]}

    model = learn(BertForSequenceClassification(small_bert(len(tokenizer), layers=2)), batches, steps, lr=2e-3)
    model.base_model.save_pretrained(target)
    return target


def item_model(data: Path, folder: Path) -> Path:
    """Writes rows of MovieLens by people, and a small Llama of films that learned from the people of the base part.

    Both by the scripts that the recipe names.

    Args:
        data: Folder of the data sets.
        folder: Where the rows and the model, in ``base``, are saved.
    """
    scripts, base = Path(__file__).parents[2] / "scripts", folder / "base"
    for words in (["item_rows.py", data / "ml_latest_small", folder], ["item_model.py", folder / "base.jsonl", base]):
        script = [sys.executable, str(scripts / words[0]), *map(str, words[1:])]
        subprocess.run(script, check=True, capture_output=True)
    return base
