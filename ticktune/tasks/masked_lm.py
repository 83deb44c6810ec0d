"""Masked language modelling: plain text in windows, some of whose tokens are hidden and guessed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.device import mix
from ticktune.errors import DataError
from ticktune.tasks.task import IGNORED, Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of, update_tokens

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Shares of BERT (arXiv 1810.04805, section 3.1): of the tokens that are guessed, and of those that are masked, or
# replaced by any other; the rest stay as they are.
_GUESSED, _MASKED, _REPLACED = 0.15, 0.8, 0.1
_FILLINGS = 5


@dataclass(frozen=True)
class MaskedLm(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        tokenizer: The base's tokenizer, a fast one with a mask token.
    """

    options: TaskOptions
    tokenizer: Any
    name: str = "masked-lm"
    auto_class: str = "AutoModelForMaskedLM"
    default_metric: str = "perplexity"
    scores_tokens: ClassVar[bool] = True

    def row_of(self, text: str) -> Row:
        """A text with masks."""
        return {"text": text.rstrip("\r")}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Any text will do."""
        return

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises, and cuts into windows of max_length, each with the special tokens of a text.

        Windows share no tokens, so each is learned once. Without labels only windows with a mask are kept.

        Raises:
            DataError: A text to fill in has no mask.
        """
        encoded = self.tokenizer(
            [row["text"] for row in rows],
            truncation=True,
            max_length=self.options.max_length,
            stride=0,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        examples: list[Example] = []
        counts = [0] * len(rows)
        for k, i in enumerate(encoded["overflow_to_sample_mapping"]):
            ids = encoded["input_ids"][k]
            example: Example = {"row": first + i, "length": len(ids), "window": counts[i]}
            example |= {name: encoded[name][k] for name in _INPUTS if name in encoded and name != "attention_mask"}
            if labelled:
                special = encoded["special_tokens_mask"][k]
                # What stands for unknown characters, or for a mask in the text, is no word to guess.
                free = [int(not s and token not in self._special) for s, token in zip(special, ids, strict=True)]
                if not any(free):
                    continue
                example["free"] = free
            elif self.tokenizer.mask_token_id not in ids:
                continue
            else:
                example["text"] = rows[i]["text"]
            counts[i] += 1
            examples.append(example)
        for i, count in enumerate(counts):
            if count == 0 and labelled:
                report.unsupervised.append(first + i)
            elif count == 0:
                raise DataError(
                    f"there is nothing to fill in: no {self.tokenizer.mask_token} in {_short(rows[i]['text'])!r}",
                    where=f"row {first + i + 1}",
                    fix=f"write {self.tokenizer.mask_token} where a token is to be guessed",
                )
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """A window as evaluation masks it, and the tokens that are guessed in it."""
        ids, labels = self._hidden(example, None)
        hidden = [self.tokenizer.decode([label]) for label in labels if label != IGNORED]
        return [("context", self.tokenizer.decode(ids)), ("learned", " ".join(hidden))]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Hides tokens and pads on the right; all tensors are (batch, seq) int64.

        Args:
            examples: The windows.
            seed: Of the tokens that are hidden; None: always the same, by the numbers of row and window.
        """
        columns: dict[str, list[list[int]]] = {n: [e[n] for e in examples] for n in _INPUTS if n in examples[0]}
        labels: list[list[int]] = []
        if "free" in examples[0]:
            hidden = [self._hidden(example, seed) for example in examples]
            columns["input_ids"] = [ids for ids, _ in hidden]
            labels = [label for _, label in hidden]
        batch: Batch = dict(
            self.tokenizer.pad(
                columns, padding=True, padding_side="right", return_tensors="pt", return_attention_mask=True
            )
        )
        if labels:
            longest = batch["input_ids"].shape[1]
            batch["labels"] = torch.tensor([each + [IGNORED] * (longest - len(each)) for each in labels])
        else:
            batch["text"] = [e["text"] for e in examples]
        return batch

    def weight(self, batch: Batch) -> float:
        """The number of tokens that are guessed."""
        return float((batch["labels"] != IGNORED).sum())

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, mask, and segment ids where the tokenizer makes them; all (batch, seq) int64."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over the guessed tokens."""
        guessed = batch["labels"] != IGNORED
        found, target = outputs.logits[guessed].float(), batch["labels"][guessed]
        return F.cross_entropy(found, target, label_smoothing=self.options.label_smoothing, reduction="sum")

    def targets(self, batch: Batch) -> Tensor:
        """The tokens that are guessed, (batch, seq)."""
        labels: Tensor = batch["labels"]
        return labels

    def counted(self, batch: Batch) -> Tensor | None:
        """The positions that are no padding, (batch, seq)."""
        mask: Tensor = batch["attention_mask"]
        return mask.bool()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token at each position, (batch, seq)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Perplexity, accuracy and loss of the guessed tokens."""
        from torchmetrics import MeanMetric
        from torchmetrics.text import Perplexity

        return nn.ModuleDict(
            {
                "perplexity": Perplexity(ignore_index=IGNORED),
                "token_accuracy": MeanMetric(),
                "loss": MeanMetric(),
            }
        )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        guessed = batch["labels"] != IGNORED
        update_tokens(metrics, logits[guessed], batch["labels"][guessed])

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The best fillings of each mask of a window."""
        probabilities = self.logits(self.forward(model, batch)).float().softmax(-1).cpu()
        answers = []
        for i, text in enumerate(batch["text"]):
            places = (batch["input_ids"][i] == self.tokenizer.mask_token_id).nonzero().flatten().tolist()
            best = [probabilities[i, place].topk(_FILLINGS) for place in places]
            masks = [
                [
                    {"token": self.tokenizer.convert_ids_to_tokens(token), "id": token, "probability": probability}
                    for token, probability in zip(each.indices.tolist(), each.values.tolist(), strict=True)
                ]
                for each in best
            ]
            answers.append({"text": text, "masks": masks})
        return answers

    def join(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """The text with the best filling of each mask, and for each mask the best fillings with probabilities."""
        masks = [mask for answer in answers for mask in answer["masks"]]
        pieces = answers[0]["text"].split(self.tokenizer.mask_token)
        text = pieces[0]
        for mask, piece in zip(masks, pieces[1:], strict=True):
            best = mask[0]
            word = self.tokenizer.decode([best["id"]]).strip()
            # A piece of WordPiece that goes on with a word belongs to the word before.
            text = text.rstrip() + word.removeprefix("##") if word.startswith("##") else text + word
            text += piece
        fillings = [[{"token": f["token"], "probability": f["probability"]} for f in mask] for mask in masks]
        return {"text": text, "masks": fillings}

    def _hidden(self, example: Example, seed: int | None) -> tuple[list[int], list[int]]:
        """Token ids with some hidden, and the labels of those.

        15 % of the free tokens, rounded, at least one: as many in every epoch, so that no batch is without any.
        """
        rng = np.random.default_rng(mix(-1 if seed is None else seed, example["row"], example["window"]))
        ids, labels = list(example["input_ids"]), [IGNORED] * example["length"]
        free = np.flatnonzero(example["free"])
        for place in rng.permutation(free)[: max(1, round(_GUESSED * len(free)))].tolist():
            labels[place] = ids[place]
            draw = rng.random()
            if draw < _MASKED:
                ids[place] = self.tokenizer.mask_token_id
            elif draw < _MASKED + _REPLACED:
                ids[place] = int(self._words[rng.integers(len(self._words))])
        return ids, labels

    @cached_property
    def _special(self) -> frozenset[int]:
        """Ids of tokens that stand for no text."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _words(self) -> "np.ndarray[Any, Any]":
        """Ids of all tokens that stand for text."""
        return np.array([token for token in range(len(self.tokenizer)) if token not in self._special])


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> MaskedLm:
    """Checks tokenizer and window.

    Raises:
        DataError: The tokenizer is slow or has no mask, or the window does not fit.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the base has only a slow tokenizer, which does not cut a text into windows",
            fix="choose a base with a tokenizer.json",
        )
    if tokenizer.mask_token is None:
        raise DataError(
            "the tokenizer has no mask token, so nothing can be hidden",
            fix="choose a base that was pretrained with masks, such as a BERT, or task: causal-lm",
        )
    special = tokenizer.num_special_tokens_to_add()
    if options.max_length <= special:
        raise DataError(
            f"data.max_length is {options.max_length}, but a window has {special} special tokens alone",
            fix="set data.max_length: 128",
        )
    positions = getattr(base_config, "max_position_embeddings", None)
    if isinstance(positions, int) and options.max_length > positions:
        raise DataError(
            f"data.max_length is {options.max_length}, but the model has {positions} positions",
            fix=f"set data.max_length: {positions}",
        )
    return restore(options, {}, tokenizer)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> MaskedLm:
    """The task; it has no state."""
    return MaskedLm(options, tokenizer)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
