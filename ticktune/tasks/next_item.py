"""Next item: what somebody takes next, by a causal language model whose tokens are items.

A row is a person: the items in the order in which they were taken. Each is predicted from those before it. As in the
field (SASRec, arXiv 1808.09781, and libraries since), an item is ranked among all items of the vocabulary, not among a
sample of them, and what the person already has is no candidate, unless training rows have an item twice: then people
take things again, and all stay candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import DataError
from ticktune.tasks.causal_lm import NextToken, check_positions, padded
from ticktune.tasks.task import IGNORED, Batch, EncodingReport, Example, Row, TaskOptions, token_loss

TOP = 10
"""Items that are predicted, and places that count for hit10 and ndcg10."""
_SHOWN = 5


@dataclass(frozen=True)
class NextItem(NextToken):
    """The task, configured.

    Args:
        options: What the recipe says; its columns are ``items``, and perhaps ``history``.
        tokenizer: The base's tokenizer: each token but the special ones is an item.
        repeats: Whether an item that somebody has is a candidate still.
    """

    options: TaskOptions
    tokenizer: Any
    repeats: bool = False
    name: str = "next-item"
    auto_class: str = "AutoModelForCausalLM"
    default_metric: str = "ndcg10"

    def state(self) -> dict[str, Any]:
        """Whether items are taken again."""
        return {"repeats": self.repeats}

    def row_of(self, text: str) -> Row:
        """The items of a line, oldest first, with white space between them."""
        return {"items": text.split()}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows that are no lists of items.

        Raises:
            DataError: Naming the first such row.
        """
        for i, row in enumerate(rows):
            _check_row(row, where(i))

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Items -> tokens, in windows of max_length.

        Every item of the column ``items`` is predicted once, in training and in evaluation, from what stands before
        it: the begin token, where the tokenizer has one, the row's ``history``, which is only read, and the items.
        Windows share one token and end where the row ends, so the last items, those that are asked for where a
        row is one person's next step, have a whole window before them. An unknown item is the unknown token; it is
        not learned, and counts as a miss where it is to be predicted.

        Without labels the history is continued, or the items of a row without one: from its last max_length - 1 tokens,
        which are what the item after them is predicted from in evaluation.
        """
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        examples: list[Example] = []
        for number, row in enumerate(rows, start=first):
            _check_row(row, f"row {number + 1}")  # rows to predict are not checked before
            history, items = row.get("history", []), row.get("items", [])
            if not labelled:
                history, items = (history if "history" in row else items), []
            ids, unknown = self._ids([*history, *items])
            report.items += len(ids)
            for name in unknown:
                report.unknown[name] = report.unknown.get(name, 0) + 1
            ids, read = begin + ids, len(begin) + len(history)
            if not labelled:
                ids = ids or [self._unknown]  # nothing to continue, and no token that begins
                start = max(0, len(ids) + 1 - self.options.max_length)  # the next item would fill the window
                examples.append(self._example(number, ids, start, len(ids)) | {"unknown": unknown})
                continue
            spans = [(start, end) for start, end in _windows(len(ids), self.options.max_length) if end > read]
            for start, end in spans:
                labels = [IGNORED if place < read else ids[place] for place in range(start, end)]
                examples.append(self._example(number, ids, start, end) | {"labels": labels})
            if not spans:
                report.unsupervised.append(number)
                report.why = "there is no item to predict, or nothing before it"
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The items in pieces: what is only read, and what is learned, with special tokens."""
        pieces: list[tuple[str, list[str]]] = []
        tokens = self.tokenizer.convert_ids_to_tokens(example["input_ids"])
        for i, (token, label) in enumerate(zip(tokens, example["labels"], strict=True)):
            is_learned = i > 0 and label not in (IGNORED, self._unknown)
            kind = "learned" if is_learned else "context"
            if not pieces or pieces[-1][0] != kind:
                pieces.append((kind, []))
            pieces[-1][1].append(token)
        return [(kind, " ".join(names)) for kind, names in pieces]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right.

        Token ids, mask and ``labels`` are (batch, seq) int64; ``prior``, (batch, most) int64, are the tokens before
        the window; ``unknown`` are the names of unknown items where there are no labels.
        """
        pad = int(self.tokenizer.pad_token_id)
        ids = [e["input_ids"] for e in examples]
        batch: Batch = {
            "input_ids": padded(ids, pad, on_right=True),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, on_right=True),
            "prior": padded([e["prior"] for e in examples], pad, on_right=True),
        }
        if "labels" in examples[0]:
            batch["labels"] = padded([e["labels"] for e in examples], IGNORED, on_right=True)
        else:
            batch["unknown"] = [e["unknown"] for e in examples]
        return batch

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy of the next item, summed over the known items to predict.

        The weight counts the unknown ones too, so that it is never 0.
        """
        target = self._target(batch)
        return token_loss(outputs.logits[:, :-1], target, self.options.label_smoothing)

    def targets(self, batch: Batch) -> Tensor:
        """The known next item at each position, (batch, seq); there is none at the last."""
        return F.pad(self._target(batch), (0, 1), value=IGNORED)

    def metrics(self) -> Any:
        """Means over the items to predict.

        hit10, ndcg10 and mrr are those of one right answer, at its place among the candidates; equal scores share the
        middle of their places. ``unknown`` is the share of unknown items, which are misses. Perplexity and loss
        are those of the known items among all tokens.
        """
        from torchmetrics import MeanMetric
        from torchmetrics.text import Perplexity

        means = {name: MeanMetric() for name in ("hit10", "ndcg10", "mrr", "unknown", "loss")}
        return nn.ModuleDict({**means, "perplexity": Perplexity(ignore_index=IGNORED)})

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        place = self.places(logits, batch)
        hit = place <= TOP
        gain = torch.where(hit, 1 / torch.log2(1 + place), 0.0)
        target = self._target(batch)
        known = target != IGNORED
        count = len(place)
        shares = {"hit10": hit.float(), "ndcg10": gain, "mrr": 1 / place}
        for name, values in shares.items():
            metrics[name].update(values)
        metrics["unknown"].update(1 - known.sum() / count, weight=count)
        if known.any():
            scores = logits[:, :-1].float()
            metrics["perplexity"].update(scores, target)
            metrics["loss"].update(F.cross_entropy(scores[known], target[known], reduction="none"))

    def places(self, logits: Tensor, batch: Batch) -> Tensor:
        """Where each item to predict stands among the candidates.

        Args:
            logits: (batch, seq, vocabulary).
            batch: From :meth:`collate`, with labels.

        Returns:
            (items,) float32, row by row: from 1, in halves where scores are equal; infinite where the item is no
            candidate, as it is unknown or was there before.
        """
        rows, at = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        scores = self._candidates(logits[rows, at], batch, rows, at)
        own = scores.gather(1, batch["labels"][rows, at + 1][:, None])
        place = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        # Not above minus infinity: no candidate, or no number.
        return place.masked_fill(~(own[:, 0] > -math.inf), math.inf)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The ten most probable next items and their probabilities, which sum to one over all candidates.

        ``unknown`` are the items of the history that the base does not know.
        """
        last = batch["attention_mask"].sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        logits = self.logits(self.forward(model, batch))
        scores = self._candidates(logits[rows, last], batch, rows, last)
        best = scores.topk(min(TOP, scores.shape[1]))
        shares = scores.softmax(-1).gather(1, best.indices)
        answers: list[dict[str, Any]] = []
        for ids, values, probabilities, unknown in zip(
            best.indices.tolist(), best.values.tolist(), shares.tolist(), batch["unknown"], strict=True
        ):
            found = [
                {"item": self.tokenizer.convert_ids_to_tokens(token), "probability": probability}
                for token, value, probability in zip(ids, values, probabilities, strict=True)
                if value > -math.inf
            ]
            answers.append({"items": found, "unknown": unknown})
        return answers

    def describe(self, answer: dict[str, Any]) -> str:
        """The first few items with their probabilities, and what is unknown."""
        found = ", ".join(f"{one['item']} {one['probability']:.3f}" for one in answer["items"][:_SHOWN])
        unknown = f"  (unknown: {', '.join(answer['unknown'])})" if answer["unknown"] else ""
        return (found or "(none)") + unknown

    @property
    def _unknown(self) -> int:
        return int(self.tokenizer.unk_token_id)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return vocabulary_of(self.tokenizer)

    def _ids(self, items: Sequence[Any]) -> tuple[list[int], list[str]]:
        """Tokens of items, and the names of those that are unknown."""
        names = [str(item) for item in items]
        unknown = [name for name in names if name not in self._vocabulary]
        return [self._vocabulary.get(name, self._unknown) for name in names], unknown

    def _example(self, number: int, ids: list[int], start: int, end: int) -> Example:
        prior = [] if self.repeats else sorted(set(ids[:start]))
        return {"row": number, "length": end - start, "input_ids": ids[start:end], "prior": prior}

    def _target(self, batch: Batch) -> Tensor:
        """The known items to predict, (batch, seq - 1)."""
        labels: Tensor = batch["labels"][:, 1:]
        return labels.masked_fill(labels == self._unknown, IGNORED)

    def _candidates(self, logits: Tensor, batch: Batch, rows: Tensor, at: Tensor) -> Tensor:
        """Scores of what can come next, float32; minus infinity is what cannot.

        Args:
            logits: (positions, vocabulary).
            batch: From :meth:`collate`.
            rows: Row in the batch of each position.
            at: Place in the row of each position.
        """
        ids, device = batch["input_ids"], logits.device
        width = ids.shape[1]
        # The place from which on a token is no candidate.
        since = torch.full((len(ids), logits.shape[-1]), -1, device=device)
        since[:, torch.tensor(list(self._vocabulary.values()), device=device)] = width
        if not self.repeats:
            places = torch.arange(width, device=device).expand_as(ids)
            since.scatter_reduce_(1, ids, places, "amin")
            since.scatter_(1, batch["prior"], -1)
        return logits.float().masked_fill(since[rows] <= at[:, None], -math.inf)


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Item -> token, of all tokens that are not special."""
    special = set(tokenizer.all_special_ids)
    return {name: token for name, token in tokenizer.get_vocab().items() if token not in special}


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> NextItem:
    """Reads off the training rows whether items are taken again.

    Raises:
        DataError: Rows that are no lists of items, or a base that knows none of them or has no unknown token.
    """
    if tokenizer.unk_token_id is None:
        raise DataError(
            "the tokenizer has no token for unknown items",
            fix="give it an unk_token, or make a base with scripts/item_model.py",
        )
    for i, row in enumerate(rows):
        _check_row(row, where(i))
    vocabulary = vocabulary_of(tokenizer)
    people = [[*row.get("history", []), *row["items"]] for row in rows]
    names = [str(item) for items in people for item in items]
    if not any(name in vocabulary for name in names):
        raise DataError(
            f"the base knows none of the {len(names)} items of the training rows, such as {names[:3]}; it knows "
            f"{list(vocabulary)[:3]}",
            fix="use a base whose tokens are the items, such as scripts/item_model.py makes",
        )
    check_positions(options, base_config)
    repeats = any(len({str(item) for item in items}) < len(items) for items in people)
    return NextItem(options, tokenizer, repeats)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> NextItem:
    """The task as :meth:`NextItem.state` recorded it."""
    return NextItem(options, tokenizer, state["repeats"])


def _windows(count: int, limit: int) -> list[tuple[int, int]]:
    """Start and end of windows of a row's tokens: all but the first token are predicted in one of them."""
    windows = []
    end = count
    while end > 1:
        start = max(0, end - limit)
        windows.append((start, end))
        end = start + 1  # the first token of a window is predicted in the one before
    return windows[::-1]


def _check_row(row: Row, where: str) -> None:
    for column in ("history", "items"):
        if column not in row:
            continue
        if not isinstance(row[column], list):
            raise DataError(
                f"expected a list of items in the column {column}, found {_short(row[column])}",
                where=where,
                fix='write the rows as JSON Lines, such as {"items": ["a", "b"]}',
            )
        for item in row[column]:
            if isinstance(item, bool) or not isinstance(item, str | int):
                raise DataError(
                    f"expected an item as text or whole number in the column {column}, found {_short(item)}",
                    where=where,
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
