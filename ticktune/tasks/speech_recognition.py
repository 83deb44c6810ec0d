"""Speech recognition: sound -> text, by frames (CTC: wav2vec 2.0, HuBERT, WavLM) or by generation (Whisper)."""

import json
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import DataError
from ticktune.files import read_json
from ticktune.tasks.sounds import (
    Convolutions,
    change_sound,
    check_sounds,
    convolutions_of,
    count_samples,
    frames_of,
    read_sound,
    shortest_of,
    sound_inputs,
    unmasked,
)
from ticktune.tasks.task import IGNORED, Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of, token_loss

_PAD, _UNKNOWN, _SPACE = "<pad>", "<unk>", "|"
_MULTILINGUAL = 51865  # tokens from which on a Whisper knows several languages
_GENERATION = "generation_config.json"
_PROMPT = 4  # tokens that Whisper's generation begins with: start, language, task, no timestamps


@dataclass(frozen=True)
class _Speech(Task):
    """What both kinds share.

    Args:
        options: What the recipe says.
        extractor: The base's feature extractor.
        tokenizer: Its own, or one of the transcripts' characters.
        entries: Further entries of the model's config.
    """

    options: TaskOptions
    extractor: Any
    tokenizer: Any
    entries: dict[str, Any]
    name: str = "speech-recognition"
    auto_class: str = "AutoModelForCTC"
    default_metric: str = "wer"

    def config(self) -> dict[str, Any]:
        """A base's own masking of frames is off."""
        return self.entries

    def row_of(self, text: str) -> Row:
        """A sound's path."""
        return {"audio": text.strip()}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses files that are no sound, and transcripts that are empty or that the vocabulary cannot write.

        Raises:
            DataError: Naming the first such row.
        """
        for i, row in enumerate(rows):
            text = _plain(row["text"])
            if not text:
                raise DataError("the transcript is empty", where=where(i), fix="fill it in or remove the row")
            self.check_text(text, where(i))
        check_sounds([row["audio"] for row in rows], where)

    @abstractmethod
    def check_text(self, text: str, where: str) -> None:
        """Refuses a transcript that the vocabulary cannot write."""

    @property
    @abstractmethod
    def longest(self) -> float:
        """Seconds of the longest sound."""

    def _length(self, row: Row, place: int, report: EncodingReport) -> int:
        """Samples of a row's sound, after cutting."""
        samples, longest = count_samples(row["audio"], self.extractor.sampling_rate), self._longest_samples
        if samples > longest:
            report.truncated.append(place)
            report.cut_ends += 1
        return min(samples, longest)

    @property
    def _longest_samples(self) -> int:
        return max(1, int(self.longest * self.extractor.sampling_rate))

    def _sounds(self, examples: Sequence[Example], seed: int | None) -> list[Any]:
        rate = self.extractor.sampling_rate
        return [
            change_sound(read_sound(e["audio"], rate, self.longest), self.options.augment, seed, e["row"])
            for e in examples
        ]

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The sound's path, its length, and the transcript as its tokens have it."""
        seconds = example["length"] / self.extractor.sampling_rate
        return [("context", f"{example['audio']} ({seconds:.2f} s)"), ("learned", self._written(example["labels"]))]

    @abstractmethod
    def _written(self, ids: list[int]) -> str:
        """Tokens as text."""

    def weight(self, batch: Batch) -> float:
        """The number of learned tokens."""
        return float((batch["labels"] != IGNORED).sum())

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token of each frame or position, (batch, positions)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Word and character error rates (edits / words or characters of the transcripts), and loss by token."""
        from torchmetrics import MeanMetric
        from torchmetrics.text import CharErrorRate, WordErrorRate

        return nn.ModuleDict({"wer": WordErrorRate(), "cer": CharErrorRate(), "loss": MeanMetric()})

    def _count_texts(self, metrics: Any, found: list[str], batch: Batch) -> None:
        for name in ("wer", "cer"):
            metrics[name].update(found, batch["texts"])

    def _count_loss(self, metrics: Any, loss: Tensor, batch: Batch) -> None:
        count = self.weight(batch)
        metrics["loss"].update(loss / count, weight=count)


@dataclass(frozen=True)
class CtcRecognition(_Speech):
    """A token for each frame, or none; equal neighbours are one.

    Args:
        convolutions: From samples to frames.
        vocabulary: Tokens of a vocabulary made of the transcripts' characters; empty: the base's own.
    """

    convolutions: Convolutions = ()  # type: ignore[assignment]
    vocabulary: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The size of a vocabulary of the task's own, and the token that means none."""
        own = {"vocab_size": len(self.vocabulary)} if self.vocabulary else {}
        return {**self.entries, **own, "pad_token_id": self.tokenizer.pad_token_id}

    def state(self) -> dict[str, Any]:
        """Vocabulary, and what the base's config says of its inputs."""
        return {
            "kind": "ctc",
            "convolutions": [list(pair) for pair in self.convolutions],
            "vocabulary": list(self.vocabulary),
            "entries": self.entries,
        }

    def saved_processor(self, processor: Any) -> Any:
        """The feature extractor together with the vocabulary."""
        from transformers import Wav2Vec2Processor

        return Wav2Vec2Processor(self.extractor, self.tokenizer) if self.vocabulary else processor

    @property
    def longest(self) -> float:
        """Seconds, as the recipe says."""
        return self.options.max_seconds

    def limit(self) -> str:
        """Seconds."""
        return f"data.max_seconds = {self.longest:g} seconds"

    def check_text(self, text: str, where: str) -> None:
        """Refuses characters that the vocabulary lacks.

        Raises:
            DataError: Naming them.
        """
        unknown = sorted({c for c in text if self._ids(c) == [self.tokenizer.unk_token_id] or c == _SPACE})
        if unknown:
            known = [token for token in self.tokenizer.get_vocab() if len(token) == 1 and token != _SPACE]
            other_case = all(c.swapcase() in known for c in unknown)
            source = "training transcripts'" if self.vocabulary else "base's"
            raise DataError(
                f"the {source} vocabulary lacks {', '.join(map(repr, unknown))}, in {text[:60]!r}",
                where=where,
                fix="write the transcripts in the other case"
                if other_case
                else "remove these characters"
                if self.vocabulary
                else "remove them, or set data.vocabulary: rows",
            )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes path, samples and tokens; a transcript that does not fit its sound's frames is unsupervised."""
        examples: list[Example] = []
        for i, row in enumerate(rows):
            length = self._length(row, first + i, report)
            example: Example = {"row": first + i, "length": length, "audio": row["audio"]}
            if labelled:
                text = _plain(row["text"])
                ids = self._ids(text)
                # Equal neighbours need a frame between them that is none.
                needed = len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))
                if int(self._frames([example])) < needed:
                    report.unsupervised.append(first + i)
                    report.why = "their transcripts are longer than what can be heard: a character needs a frame"
                    continue
                example |= {"labels": ids, "text": text}
            examples.append(example)
        return examples

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Waveforms (batch, samples) float32; frames (batch,) and labels (batch, tokens) int64; texts."""
        shortest = shortest_of(self.convolutions, self.extractor.sampling_rate)
        batch: Batch = dict(sound_inputs(self.extractor, self._sounds(examples, seed), shortest))
        batch["frames"] = self._frames(examples)
        if "labels" in examples[0]:
            batch["labels"] = _padded([e["labels"] for e in examples], IGNORED)
            batch["texts"] = [e["text"] for e in examples]
        return batch

    def _frames(self, examples: Sequence[Example]) -> Tensor:
        shortest = shortest_of(self.convolutions, self.extractor.sampling_rate)
        return frames_of(torch.tensor([max(e["length"], shortest) for e in examples]), self.convolutions)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Waveforms, and the mask where the model takes one."""
        return {name: batch[name] for name in ("input_values", "attention_mask") if name in batch}

    def counted(self, batch: Batch) -> Tensor | None:
        """The frames that are no padding, (batch, frames)."""
        most = int(frames_of(torch.tensor(batch["input_values"].shape[1]), self.convolutions))
        frames: Tensor = batch["frames"]
        return torch.arange(most, device=frames.device) < frames[:, None]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Connectionist temporal classification, summed over rows."""
        return self._loss(outputs.logits, batch)

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"]
        scores = logits.float().log_softmax(-1).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's own kernel takes neither every blank nor int64
            return F.ctc_loss(
                scores,
                labels.clamp(min=0),
                batch["frames"],
                (labels != IGNORED).sum(-1),
                blank=self.tokenizer.pad_token_id,
                reduction="sum",
                zero_infinity=True,
            )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        self._count_texts(metrics, self._heard(logits, batch), batch)
        self._count_loss(metrics, self._loss(logits, batch), batch)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The transcript of each sound."""
        return [{"text": text} for text in self._heard(self.logits(self.forward(model, batch)), batch)]

    def _heard(self, logits: Tensor, batch: Batch) -> list[str]:
        best = logits.argmax(-1).tolist()
        # The tokenizer itself joins equal neighbours, then drops the token for none, which must not go first.
        return [
            _plain(self.tokenizer.decode(row[:frames], skip_special_tokens=False))
            for row, frames in zip(best, batch["frames"].tolist(), strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _written(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, group_tokens=False))


@dataclass(frozen=True)
class GeneratedRecognition(_Speech):
    """A text generated from the sound's spectrogram.

    Args:
        start: The token that the decoder starts from.
        positions: Tokens that it can write at most.
    """

    auto_class: str = "AutoModelForSpeechSeq2Seq"
    start: int = 0
    positions: int = 448

    def state(self) -> dict[str, Any]:
        """What the base's config says of its decoder."""
        return {"kind": "generated", "start": self.start, "positions": self.positions, "entries": self.entries}

    @property
    def longest(self) -> float:
        """Seconds, as the recipe says or as the model reads at once."""
        return float(min(self.options.max_seconds, self.extractor.chunk_length))

    def limit(self) -> str:
        """Seconds and tokens."""
        tokens = f"data.max_length = {self.options.max_length} tokens"
        return f"data.max_seconds = {self.longest:g} seconds, or {tokens},"

    def check_text(self, text: str, where: str) -> None:
        """Nothing: such a vocabulary writes any text."""

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes path, samples and tokens; of the tokens, those that generation is given are not learned."""
        examples: list[Example] = []
        for i, row in enumerate(rows):
            length = self._length(row, first + i, report)
            example: Example = {"row": first + i, "length": length, "audio": row["audio"]}
            if labelled:
                text = _plain(row["text"])
                ids, given = self._ids(text)
                limit = self.options.max_length
                if len(ids) > limit and (not report.truncated or report.truncated[-1] != first + i):
                    report.truncated.append(first + i)
                    report.cut_ends += 1
                report.count_end(len(ids) <= limit)
                labels = [IGNORED] * given + ids[given:]
                example |= {
                    "decoder_input_ids": [self.start, *ids[:-1]][:limit],
                    "labels": labels[:limit],
                    "text": text,
                }
            examples.append(example)
        return examples

    def _ids(self, text: str) -> tuple[list[int], int]:
        """What the decoder writes after its start, and how many of these tokens it is given."""
        prefix = list(getattr(self.tokenizer, "prefix_tokens", ()))
        ids = [*prefix, *self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        if prefix[:1] == [self.start]:
            return ids[1:], len(prefix) - 1
        return ids, len(prefix)

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Spectrograms (batch, bins, frames) float32; decoder_input_ids and labels (batch, tokens) int64; texts."""
        sounds = self._sounds(examples, seed)
        batch: Batch = {"input_features": sound_inputs(self.extractor, sounds, 1, whole=True)["input_features"]}
        if "labels" in examples[0]:
            end = self.tokenizer.eos_token_id
            batch["decoder_input_ids"] = _padded([e["decoder_input_ids"] for e in examples], end)
            batch["labels"] = _padded([e["labels"] for e in examples], IGNORED)
            batch["texts"] = [e["text"] for e in examples]
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms, and what the decoder has written so far."""
        return {name: batch[name] for name in ("input_features", "decoder_input_ids") if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels; ``logits`` is (batch, tokens, vocabulary)."""
        return model(**self.inputs(batch), use_cache=False)

    def targets(self, batch: Batch) -> Tensor:
        """The transcript's tokens, (batch, tokens)."""
        labels: Tensor = batch["labels"]
        return labels

    def counted(self, batch: Batch) -> Tensor | None:
        """The learned tokens, (batch, tokens)."""
        learned: Tensor = batch["labels"] != IGNORED
        return learned

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over the learned tokens."""
        return self._loss(outputs.logits, batch, self.options.label_smoothing)

    def _loss(self, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
        return token_loss(logits, batch["labels"], smoothing)

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch's loss."""
        self._count_loss(metrics, self._loss(logits, batch, 0.0), batch)

    def update_by_generation(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds a batch's error rates."""
        self._count_texts(metrics, self._heard(model, batch), batch)

    def extra_files(self, base_directory: Path) -> dict[str, str]:
        """The base's defaults of generation, with the language: else a pipeline guesses it from each sound."""
        file = base_directory / _GENERATION
        if self.options.language is None or not file.is_file():
            return {}
        defaults = {**read_json(file), "language": self.options.language, "task": "transcribe"}
        return {_GENERATION: json.dumps(defaults, indent=2) + "\n"}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The transcript of each sound."""
        return [{"text": text} for text in self._heard(model, batch)]

    def _heard(self, model: nn.Module, batch: Batch) -> list[str]:
        language = self.options.language
        found = model.generate(  # type: ignore[operator]
            input_features=batch["input_features"],
            max_new_tokens=min(self.options.max_new_tokens, self.positions - _PROMPT),
            num_beams=self.options.num_beams,
            do_sample=False,
            **({"language": language, "task": "transcribe"} if language else {}),
        )
        return [_plain(text) for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]

    def _written(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([i for i in ids if i != IGNORED]))


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], processor: Any, base_config: Any
) -> _Speech:
    """Chooses the kind by the base, and the vocabulary of a base without one by the transcripts.

    Raises:
        DataError: The base can be used in neither way, or the options do not fit it.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    state: dict[str, Any] = {"entries": unmasked(base_config)}
    if getattr(base_config, "is_encoder_decoder", False):
        _check_generated(options, tokenizer, base_config)
        start, positions = base_config.decoder_start_token_id, base_config.max_target_positions
        return restore(options, {**state, "kind": "generated", "start": start, "positions": positions}, processor)
    convolutions = convolutions_of(base_config)
    if not convolutions:
        raise DataError(
            f"a {base_config.model_type} reads no waveforms by frames",
            fix="use a base such as facebook/wav2vec2-base-960h or openai/whisper-tiny.en",
        )
    if options.label_smoothing:
        raise DataError(
            f"loss.label_smoothing is not defined for CTC, found {options.label_smoothing:g}", fix="set it to 0"
        )
    if options.language is not None:
        raise DataError(f"data.language is for Whisper alone, found {options.language}", fix="remove it")
    vocabulary: list[str] = []
    if tokenizer is None or options.vocabulary == "rows":
        characters = {c for row in rows for c in _plain(row["text"])} - {" ", _SPACE}
        vocabulary = [_PAD, _UNKNOWN, _SPACE, *sorted(characters)]
    state |= {"kind": "ctc", "convolutions": convolutions, "vocabulary": vocabulary}
    return restore(options, state, processor)


def restore(options: TaskOptions, state: dict[str, Any], processor: Any) -> _Speech:
    """The task as its ``state`` recorded it."""
    extractor = getattr(processor, "feature_extractor", processor)
    tokenizer: Any = getattr(processor, "tokenizer", None)
    entries = state["entries"]
    if state["kind"] == "generated":
        if options.language:
            tokenizer.set_prefix_tokens(language=options.language, task="transcribe", predict_timestamps=False)
        return GeneratedRecognition(
            options, extractor, tokenizer, entries, start=state["start"], positions=state["positions"]
        )
    vocabulary = tuple(state["vocabulary"])
    convolutions = [(kernel, stride) for kernel, stride in state["convolutions"]]
    tokenizer = _tokenizer_of(vocabulary) if vocabulary else tokenizer
    return CtcRecognition(options, extractor, tokenizer, entries, convolutions=convolutions, vocabulary=vocabulary)


def _check_generated(options: TaskOptions, tokenizer: Any, base_config: Any) -> None:
    if tokenizer is None:
        raise DataError("the base has no tokenizer, which a model that generates text needs")
    if options.vocabulary == "rows":
        raise DataError("a model that generates text keeps its vocabulary", fix="remove data.vocabulary")
    if options.max_length > base_config.max_target_positions:
        raise DataError(
            f"data.max_length is {options.max_length}, but the model writes {base_config.max_target_positions} tokens",
            fix=f"set data.max_length: {base_config.max_target_positions}",
        )
    several = base_config.vocab_size >= _MULTILINGUAL
    if several and options.language is None:
        raise DataError("the base knows several languages", fix="say which is spoken, as in data.language: english")
    if options.language is not None and not several:
        raise DataError(f"the base knows one language, found data.language: {options.language}", fix="remove it")


def _tokenizer_of(vocabulary: Sequence[str]) -> Any:
    """A tokenizer of single characters; transformers reads its tokens from a file."""
    from transformers import Wav2Vec2CTCTokenizer

    with tempfile.TemporaryDirectory(prefix="ticktune-") as name:
        file = Path(name) / "vocab.json"
        file.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(file),
            bos_token=None,
            eos_token=None,
            unk_token=_UNKNOWN,
            pad_token=_PAD,
            word_delimiter_token=_SPACE,
        )


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)
