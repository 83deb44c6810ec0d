"""Extractive question answering: the piece of a context that answers a question."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import DataError
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MAX_ANSWER = 30
"""Longest answer in tokens, as in BERT's run_squad.py."""
_BEST = 3
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        tokenizer: The base's tokenizer, a fast one.
    """

    options: TaskOptions
    tokenizer: Any
    name: str = "question-answering"
    auto_class: str = "AutoModelForQuestionAnswering"
    default_metric: str = "f1"

    def config(self) -> dict[str, Any]:
        """One output for starts and one for ends, and the pad token."""
        return {"num_labels": 2, "pad_token_id": self.tokenizer.pad_token_id}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows whose answers are not in their context, and questions that leave no room for it.

        Raises:
            DataError: Naming the first such row.
        """
        for i, row in enumerate(rows):
            for text, start in read_answers(row["answers"], where(i)):
                found = row["context"][start : start + len(text)]
                if found != text:
                    at = row["context"].find(text)
                    raise DataError(
                        f"expected the answer {_short(text)!r} at character {start} of the context, "
                        f"found {_short(found)!r}",
                        where=where(i),
                        fix="it is not in the context" if at < 0 else f"it starts at character {at}",
                    )
        self._check_room([row["question"] for row in rows], where)

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises question and context; a long context becomes windows that share ``overlap`` tokens.

        The first answer is learned: by its first and last token in each window that holds all of it, by the first
        token (that of the class) in the others.
        """
        questions = [row["question"].strip() for row in rows]
        self._check_room(questions, lambda i: f"row {first + i + 1}")
        encoded = self.tokenizer(
            questions,
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.options.max_length,
            stride=self.options.overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        owners = encoded["overflow_to_sample_mapping"]
        examples: list[Example] = []
        for k, i in enumerate(owners):
            context = rows[i]["context"]
            inside = [part == 1 for part in encoded.sequence_ids(k)]
            offsets = encoded["offset_mapping"][k]
            example: Example = {"row": first + i, "length": len(inside)}
            example |= {name: encoded[name][k] for name in _INPUTS if name in encoded and name != "attention_mask"}
            # Where each token of the context stands in it, -1 at all others.
            example["starts"] = [start if is_in else -1 for (start, _), is_in in zip(offsets, inside, strict=True)]
            example["ends"] = [end if is_in else -1 for (_, end), is_in in zip(offsets, inside, strict=True)]
            example["context"] = context
            if labelled:
                answers = read_answers(rows[i]["answers"], f"row {first + i + 1}")
                text, start = answers[0]
                low = 0 if owners[k - 1 : k] != [i] else None
                high = len(context) if owners[k + 1 : k + 2] != [i] else None
                example["target"] = _target(example, start, start + len(text), low, high)
                example["answers"] = [answer for answer, _ in answers]
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """Question and window with their special tokens, and the answer in it."""
        first, last = example["target"]
        start, end = example["starts"][first], example["ends"][last]
        answer = example["context"][start:end] if start >= 0 else "(not in this window)"
        return [("context", self.tokenizer.decode(example["input_ids"])), ("learned", answer)]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right.

        Token ids, masks, ``starts`` and ``ends`` are (batch, seq) int64, ``row`` is (batch,), ``target`` (batch, 2);
        contexts and answers stay lists.
        """
        columns = {name: [e[name] for e in examples] for name in _INPUTS if name in examples[0]}
        batch: Batch = dict(
            self.tokenizer.pad(
                columns, padding=True, padding_side="right", return_tensors="pt", return_attention_mask=True
            )
        )
        longest = batch["input_ids"].shape[1]
        for name in ("starts", "ends"):
            batch[name] = torch.tensor([e[name] + [-1] * (longest - e["length"]) for e in examples])
        batch["row"] = torch.tensor([e["row"] for e in examples])
        batch["context"] = [e["context"] for e in examples]
        if "target" in examples[0]:
            batch["target"] = torch.tensor([e["target"] for e in examples])
            batch["answers"] = [e["answers"] for e in examples]
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, mask, and segment ids where the tokenizer makes them; all (batch, seq) int64."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Start and end of the answer, (batch, seq, 2)."""
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean cross entropy of start and end over the tokens of a window, summed over windows."""
        return self._loss(self.logits(outputs), batch, self.options.label_smoothing)

    def _loss(self, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
        real = batch["attention_mask"].bool()[..., None]
        # Without the padding, so that the loss does not depend on what else is in the batch.
        logs = logits.float().masked_fill(~real, -torch.inf).log_softmax(1)
        right = logs.gather(1, batch["target"][:, None, :]).squeeze(1)
        even = logs.masked_fill(~real, 0.0).sum(1) / real.sum(1)
        each: Tensor = -((1 - smoothing) * right + smoothing * even).mean(-1)
        return each.sum()

    def counted(self, batch: Batch) -> Tensor | None:
        """The positions that are no padding, (batch, seq)."""
        mask: Tensor = batch["attention_mask"]
        return mask.bool()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable start and end among all positions, (batch, 2)."""
        return best_of(logits.transpose(1, 2))

    def metrics(self) -> Any:
        """Exact match and F1 of words as in SQuAD's script, over rows; loss over windows."""
        from torchmetrics import MeanMetric

        kind = _answer_score()
        return nn.ModuleDict({"exact_match": kind(2), "f1": kind(3), "loss": MeanMetric()})

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch; of the windows of a row the one with the best answer counts."""
        found = []
        for i, (spans, _) in enumerate(self._spans(logits, batch)):
            text, score = (spans[0]["text"], spans[0]["logit"]) if spans else ("", -torch.inf)
            answers = batch["answers"][i]
            found.append([float(batch["row"][i]), score, exact_match(text, answers), word_f1(text, answers)])
        scores = torch.tensor(found, dtype=torch.float64)
        metrics["exact_match"].update(scores)
        metrics["f1"].update(scores)
        metrics["loss"].update(self._loss(logits, batch, 0.0) / len(logits), weight=len(logits))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The best spans of each window with the sum of their logits, and the log of the sum over all its spans."""
        found = self._spans(self.logits(self.forward(model, batch)), batch)
        return [{"spans": spans, "total": total} for spans, total in found]

    def join(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """The best answer of all windows, and the next best.

        Its ``score`` is its probability among all spans of up to 30 tokens in all windows; ``start`` and ``end`` count
        characters of the context.
        """
        total = torch.logsumexp(torch.tensor([answer["total"] for answer in answers], dtype=torch.float64), 0)
        spans: dict[tuple[int, int], dict[str, Any]] = {}
        for span in sorted((s for answer in answers for s in answer["spans"]), key=lambda s: -s["logit"]):
            spans.setdefault((span["start"], span["end"]), span)
        best = [
            {
                "answer": span["text"],
                "score": float(torch.exp(span["logit"] - total)),
                "start": span["start"],
                "end": span["end"],
            }
            for span in list(spans.values())[:_BEST]
        ]
        return {**(best[0] if best else {"answer": "", "score": 0.0, "start": 0, "end": 0}), "n_best": best}

    def describe(self, answer: dict[str, Any]) -> str:
        """The answer, its probability and its place."""
        place = f"  at {answer['start']}-{answer['end']}" if answer["answer"] else ""
        return f"{answer['answer'] or '(none)'}  {answer['score']:.4f}{place}"

    def _spans(self, logits: Tensor, batch: Batch) -> list[tuple[list[dict[str, Any]], float]]:
        """Of each window the best spans, and the log of the sum of exp over all spans."""
        starts, ends = batch["starts"].cpu(), batch["ends"].cpu()
        inside = ends > starts
        logits = logits.float().cpu()
        seq = logits.shape[1]
        allowed = inside[:, :, None] & inside[:, None, :]
        allowed &= torch.ones(seq, seq, dtype=torch.bool).triu().tril(_MAX_ANSWER - 1)
        scores = (logits[:, :, None, 0] + logits[:, None, :, 1]).masked_fill(~allowed, -torch.inf).flatten(1)
        totals = scores.logsumexp(1)
        best = scores.topk(min(_BEST, scores.shape[1]))
        found = []
        for i, context in enumerate(batch["context"]):
            spans = []
            for value, place in zip(best.values[i].tolist(), best.indices[i].tolist(), strict=True):
                if value == -torch.inf:
                    break
                start, end = int(starts[i, place // seq]), int(ends[i, place % seq])
                spans.append({"start": start, "end": end, "text": context[start:end], "logit": value})
            found.append((spans, float(totals[i])))
        return found

    def _check_room(self, questions: Sequence[str], where: Callable[[int], str]) -> None:
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        lengths = self.tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
        for i, ids in enumerate(lengths):
            room = self.options.max_length - special - len(ids)
            if room <= self.options.overlap:
                raise DataError(
                    f"the question has {len(ids)} tokens, which leaves {max(room, 0)} for the context; windows that "
                    f"share data.overlap = {self.options.overlap} tokens need more",
                    where=where(i),
                    fix=f"raise data.max_length, now {self.options.max_length}, or lower data.overlap",
                )


def read_answers(value: Any, where: str) -> list[tuple[str, int]]:
    """Texts of the answers to a question, and the character of the context where each starts.

    Args:
        value: ``{"text": [...], "answer_start": [...]}``, or a list of ``{"text": ..., "answer_start": ...}``.
        where: ``file:line`` of the row.

    Raises:
        DataError: It is neither, or empty.
    """
    texts: Any = None
    starts: Any = None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        texts = [item.get("text") for item in value]
        starts = [item.get("answer_start", item.get("start")) for item in value]
    is_whole = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not is_whole or not all(isinstance(t, str) and type(s) is int for t, s in zip(texts, starts, strict=True)):
        raise DataError(
            f"expected answers with texts and starts, found {_short(repr(value))}",
            where=where,
            fix='write {"text": ["Paris"], "answer_start": [17]}, or a list of {"text": ..., "answer_start": ...}',
        )
    if not texts or not all(text.strip() for text in texts) or any(start < 0 for start in starts):
        raise DataError(
            f"expected an answer that stands in the context, found {_short(repr(value))}",
            where=where,
            fix="remove questions without an answer",
        )
    return list(zip(texts, starts, strict=True))


def normalized(text: str) -> str:
    """An answer as SQuAD's script compares it: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the true ones, else 0."""
    return float(any(normalized(answer) == normalized(truth) for truth in truths))


def word_f1(answer: str, truths: Sequence[str]) -> float:
    """F1 of the answer's words against those of the true answer that it fits best."""
    return max(_word_f1(normalized(answer).split(), normalized(truth).split()) for truth in truths)


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> QuestionAnswering:
    """Checks the tokenizer.

    Raises:
        DataError: It does not say where its tokens stand in a text.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the base has only a slow tokenizer, which does not say where a token stands in the context",
            fix="choose a base with a tokenizer.json",
        )
    return restore(options, {}, tokenizer)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> QuestionAnswering:
    """The task; it has no state."""
    return QuestionAnswering(options, tokenizer)


def _target(example: Example, start: int, end: int, low: int | None, high: int | None) -> list[int]:
    """First and last token of an answer in a window, or 0 and 0 where it is not, or not all, inside.

    Args:
        example: With starts and ends of its tokens.
        start: Of the answer, in characters.
        end: Of the answer.
        low: Where the window begins; None: with its first token.
        high: Where it ends; None: with its last token.
    """
    tokens = [(k, a, b) for k, (a, b) in enumerate(zip(example["starts"], example["ends"], strict=True)) if a >= 0]
    touched = [k for k, a, b in tokens if a < end and b > start]
    if not touched:
        return [0, 0]
    low = tokens[0][1] if low is None else low
    high = tokens[-1][2] if high is None else high
    return [touched[0], touched[-1]] if low <= start and end <= high else [0, 0]


def _word_f1(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    same = sum((Counter(answer) & Counter(truth)).values())
    return 2 * same / (len(answer) + len(truth))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _answer_score() -> Any:
    """The class of the answers' metrics; torchmetrics is imported late."""
    from torchmetrics import Metric

    class AnswerScore(Metric):  # type: ignore[misc]
        """Mean over rows of a score of the best answer among the row's windows.

        Args:
            column: Of the score in what :meth:`update` is given.
        """

        full_state_update = False
        is_differentiable = False
        higher_is_better = True

        def __init__(self, column: int) -> None:
            super().__init__()
            self.column = column
            self.add_state("found", default=[], dist_reduce_fx="cat")

        def update(self, found: Tensor) -> None:
            """Adds windows, (windows, columns) float64: row, sum of the answer's logits, scores."""
            self.found.append(found)

        def compute(self) -> Tensor:
            """The mean; NaN without rows."""
            found = self.found if isinstance(self.found, list) else [self.found]
            best: dict[float, tuple[float, float]] = {}
            for line in (line for part in found for line in part.tolist()):
                row, logit = line[:2]
                if row not in best or logit > best[row][0]:
                    best[row] = logit, line[self.column]
            return torch.tensor([score for _, score in best.values()]).mean()

    return AnswerScore
