"""Sequence to sequence: a source text and the target text that is written for it, as in translation and summaries."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.task import (
    IGNORED,
    Batch,
    EncodingReport,
    Example,
    Row,
    Task,
    TaskOptions,
    best_of,
    room,
    token_loss,
    update_tokens,
)

_WRITTEN = ("bleu", "chrf", "rouge_l")


@dataclass(frozen=True)
class Seq2SeqLm(Task):
    """The task, configured.

    Args:
        options: What the recipe says; its columns are ``source`` and ``target``.
        tokenizer: The base's tokenizer.
        start: The token that the decoder begins with; None: the last token of the target, a language code, as mBART
            has it.
    """

    options: TaskOptions
    tokenizer: Any
    start: int | None
    name: str = "seq2seq-lm"
    auto_class: str = "AutoModelForSeq2SeqLM"
    scores_tokens: ClassVar[bool] = True
    default_metric: str = "perplexity"

    def state(self) -> dict[str, Any]:
        """The token that the decoder begins with."""
        return {"start": self.start}

    def row_of(self, text: str) -> Row:
        """The source."""
        return {"source": text.rstrip("\r")}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows without a source, or with an empty target.

        Raises:
            DataError: Naming the first such row.
        """
        for i, row in enumerate(rows):
            for name in ("source", "target"):
                if name in row and not str(row[name]).strip():
                    raise DataError(
                        f"expected text as {name}, found {row[name]!r}",
                        where=where(i),
                        fix="fill it in or remove the row",
                    )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises; a source or target that is too long loses its end, a target its end token with it.

        A model that never sees the end of a cut text does not learn to stop there.
        """
        limit = self.options.max_length
        sources = [str(row["source"]) for row in rows]
        whole = self.tokenizer(sources, verbose=False)["input_ids"]
        cut = self.tokenizer(sources, truncation=True, max_length=limit)["input_ids"]
        targets = self._targets([str(row["target"]) for row in rows]) if labelled else []
        examples: list[Example] = []
        for i, row in enumerate(rows):
            # An empty source, and a tokenizer that adds nothing to it: an encoder needs one token at least.
            ids = cut[i] or [self._end if self._end is not None else self.tokenizer.pad_token_id]
            example: Example = {"row": first + i, "input_ids": ids, "length": len(ids)}
            is_cut = len(whole[i]) > limit
            if labelled:
                labels = targets[i][:limit]
                if len(targets[i]) > limit:
                    is_cut = True
                    report.cut_ends += 1
                report.count_end(self._end in labels[-2:])
                begin = targets[i][-1] if self.start is None else self.start
                example |= {
                    "decoder_input_ids": [begin, *labels[:-1]],
                    "labels": labels,
                    "reference": str(row["target"]),
                    "length": max(len(ids), len(labels)),
                }
            if is_cut:
                report.truncated.append(first + i)
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """Source and target with their special tokens."""
        return [
            ("context", self.tokenizer.decode(example["input_ids"])),
            ("learned", self.tokenizer.decode(example["labels"])),
        ]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right.

        Token ids and mask are (batch, source) int64, decoder ids and labels (batch, target) int64; ``references`` are
        the targets as they were written.
        """
        pad = int(self.tokenizer.pad_token_id)
        sources = [e["input_ids"] for e in examples]
        batch: Batch = {
            "input_ids": _padded(sources, pad),
            "attention_mask": _padded([[1] * len(ids) for ids in sources], 0),
        }
        if "labels" in examples[0]:
            batch |= {
                "decoder_input_ids": _padded([e["decoder_input_ids"] for e in examples], pad),
                "labels": _padded([e["labels"] for e in examples], IGNORED),
                "references": [e["reference"] for e in examples],
            }
        return batch

    def weight(self, batch: Batch) -> float:
        """The number of target tokens."""
        return float((batch["labels"] != IGNORED).sum())

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids and mask of the source, and what the decoder reads of the target."""
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        return {name: batch[name] for name in names if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels; ``logits`` is (batch, target, vocabulary)."""
        return model(**self.inputs(batch), use_cache=False)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over the target's tokens."""
        return token_loss(outputs.logits, batch["labels"], self.options.label_smoothing)

    def targets(self, batch: Batch) -> Tensor:
        """The target's tokens, (batch, target)."""
        labels: Tensor = batch["labels"]
        return labels

    def counted(self, batch: Batch) -> Tensor | None:
        """The positions of the target that are no padding, (batch, target)."""
        return batch["labels"] != IGNORED  # type: ignore[no-any-return]

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token at each position, (batch, target)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Metrics of torchmetrics: over the target's tokens, and over the generated texts."""
        from torchmetrics import MeanMetric
        from torchmetrics.text import Perplexity, ROUGEScore, SacreBLEUScore

        return nn.ModuleDict(
            {
                "perplexity": Perplexity(ignore_index=IGNORED),
                "token_accuracy": MeanMetric(),
                "loss": MeanMetric(),
                "bleu": _Written(SacreBLEUScore()),
                "chrf": _Written(ChrF()),
                "rouge_l": _Written(ROUGEScore(rouge_keys=("rougeL",)), "rougeL_fmeasure"),
            }
        )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch to the metrics of the target's tokens."""
        learned = batch["labels"] != IGNORED
        update_tokens(metrics, logits[learned], batch["labels"][learned])

    def update_by_generation(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds a batch to BLEU, chrF and ROUGE-L, by the texts that a beam search writes."""
        texts = self._generate(model, batch)
        for name in _WRITTEN:
            metrics[name].update(texts, batch["references"])

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The text that the model writes for each source, up to max_new_tokens."""
        return [{"text": text} for text in self._generate(model, batch)]

    def _generate(self, model: nn.Module, batch: Batch) -> list[str]:
        start = {} if self.start is None else {"decoder_start_token_id": self.start}
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=room(model, self.options.max_new_tokens, 1),  # a token starts it
            num_beams=self.options.num_beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._end,
            **start,
        )
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    @property
    def _end(self) -> int | None:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return self.tokenizer.sep_token_id if end is None else end  # type: ignore[no-any-return]

    def _targets(self, texts: list[str]) -> list[list[int]]:
        # text_target: some tokenizers have another vocabulary for the target, or other tokens around it.
        found: list[list[int]] = self.tokenizer(text_target=texts, verbose=False)["input_ids"]
        # A language code may stand behind the end.
        return [ids if self._end in ids[-2:] else [*ids, self._end] for ids in found]  # type: ignore[list-item]


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> Seq2SeqLm:
    """Reads off the base how its decoder begins.

    Raises:
        DataError: The model has fewer positions than max_length.
        BaseModelError: The base is no encoder and decoder, does not say how its decoder begins, or its tokenizer
            cannot end a text.
    """
    if not getattr(base_config, "is_encoder_decoder", False):
        raise BaseModelError(
            f"it is a {base_config.model_type} model, expected one with an encoder and a decoder",
            where="base.model",
            fix="use a base such as T5, BART or Marian, or the task causal-lm",
        )
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise BaseModelError(
            "its tokenizer has no end-of-text token, so the model could not learn to stop",
            where="base.model",
            fix="name one as eos_token in its tokenizer_config.json",
        )
    positions = getattr(base_config, "max_position_embeddings", None)
    if isinstance(positions, int) and options.max_length > positions:
        raise DataError(
            f"data.max_length is {options.max_length}, but the model has {positions} positions",
            fix=f"set data.max_length: {positions}",
        )
    start = getattr(base_config, "decoder_start_token_id", None)
    if base_config.model_type == "mbart":
        start = None
    elif start is None:
        raise BaseModelError(
            "its config does not say which token the decoder begins with",
            where="base.model",
            fix="set decoder_start_token_id in its config.json",
        )
    return Seq2SeqLm(options, tokenizer, start)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> Seq2SeqLm:
    """The task as :meth:`Seq2SeqLm.state` recorded it."""
    return Seq2SeqLm(options, tokenizer, state["start"])


class ChrF:
    """chrF of all texts together, from 0 to 1 (Popovic 2015), as sacreBLEU computes it.

    F2 of the mean precision and the mean recall of runs of 1 to 6 characters without spaces. torchmetrics 1.9 leaves
    out the references of the texts that have nothing in common with theirs, which flatters a model that writes nothing.
    """

    orders = range(1, 7)

    def __init__(self) -> None:
        self.counts = [[0, 0, 0] for _ in self.orders]

    def update(self, texts: list[str], references: list[list[str]]) -> None:
        """Adds texts, each with one reference."""
        for text, (reference,) in zip(texts, references, strict=True):
            for n, counts in zip(self.orders, self.counts, strict=True):
                ours, theirs = _runs(text, n), _runs(reference, n)
                found = ((ours & theirs).total(), ours.total(), theirs.total())
                counts[:] = [a + b for a, b in zip(counts, found, strict=True)]

    def compute(self) -> float:
        """The score; 0 where nothing agrees."""
        used = [counts for counts in self.counts if counts[1] and counts[2]]
        precision = sum(hits / made for hits, made, _ in used) / max(1, len(used))
        recall = sum(hits / wanted for hits, _, wanted in used) / max(1, len(used))
        return 5 * precision * recall / (4 * precision + recall) if precision else 0.0


class _Written(nn.Module):
    """A metric of texts; NaN, not 0, where no text was generated."""

    def __init__(self, metric: Any, key: str | None = None) -> None:
        super().__init__()
        self.metric, self.key, self.is_empty = metric, key, True

    def update(self, texts: list[str], references: list[str]) -> None:
        """Adds texts, each with one reference."""
        self.is_empty = False
        self.metric.update(texts, [[reference] for reference in references])

    def compute(self) -> float:
        """The score of all texts."""
        if self.is_empty:
            return math.nan
        score = self.metric.compute()
        return float(score if self.key is None else score[self.key])


def _runs(text: str, n: int) -> Counter[str]:
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)
