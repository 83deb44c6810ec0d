"""Causal language modelling: plain text, prompt and response, or chat messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.errors import BaseModelError, DataError, RecipeError, first_line
from ticktune.limits import limited
from ticktune.tasks.answers import find_answer, is_same
from ticktune.tasks.batch import SEGMENTS
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

_MAX_RENDERED = 10_000_000  # characters; a template that makes more is broken or hostile
# One conversation takes milliseconds.
_RENDER_SECONDS, _RENDER_BYTES = 10.0, 1 << 30


class NextToken(Task):
    """What tasks share whose model says what comes next at each position."""

    def weight(self, batch: Batch) -> float:
        """The number of tokens that are predicted and learned."""
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, and mask or, of packed rows, positions; all (batch, seq) int64."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels; ``logits`` is (batch, seq, vocabulary)."""
        return model(**self.inputs(batch), use_cache=False)

    def targets(self, batch: Batch) -> Tensor:
        """The next token at each position, (batch, seq); there is none at the last."""
        return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def counted(self, batch: Batch) -> Tensor | None:
        """The positions that are no padding, (batch, seq)."""
        mask: Tensor = batch["attention_mask"]
        return mask.bool()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable next token at each position, (batch, seq)."""
        return best_of(logits)


@dataclass(frozen=True)
class CausalLm(NextToken):
    """The task, configured.

    Args:
        options: What the recipe says; its columns are ``text``, or ``prompt`` and ``response``, or
            ``messages``.
        tokenizer: The base's tokenizer.
    """

    options: TaskOptions
    tokenizer: Any
    name: str = "causal-lm"
    auto_class: str = "AutoModelForCausalLM"
    default_metric: str = "perplexity"
    scores_tokens: ClassVar[bool] = True
    cut: ClassVar[str] = "the beginning of the prompt, or the end of the response or conversation"

    def row_of(self, text: str) -> Row:
        """The text to continue, the prompt, or the user's turn of a conversation."""
        text = text.rstrip("\r")
        if "messages" in self.options.columns:
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt" if "prompt" in self.options.columns else "text": text}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows that are no conversation, or whose response lacks the answer that the recipe looks for."""
        for i, row in enumerate(rows):
            if "messages" in row:
                _check_messages(row["messages"], where(i))
            pattern = self.options.answer
            if pattern is not None and "prompt" not in row:
                raise DataError(
                    f"evaluation.generate.answer looks in responses to prompts, found the columns {', '.join(row)}",
                    where=where(i),
                    fix="give prompt and response columns here too",
                )
            if pattern is not None and "response" in row and find_answer(pattern, str(row["response"])) is None:
                raise DataError(
                    f"expected a match of evaluation.generate.answer, {pattern}, in the response, found none",
                    where=where(i),
                    fix="mend the pattern or the row",
                )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises.

        Plain text and its end-of-text token are cut into windows of max_length that share
        one token. A prompt that
        is too long together with its response loses its beginning; a response that is too long alone loses
        its end. In conversations the assistant's turns are learned, each with its end-of-turn token.
        """
        examples: list[Example] = []
        stops = self._stops() if labelled else set()
        for i, row in enumerate(rows):
            number = first + i
            if "messages" in row:
                _check_messages(row["messages"], f"row {number + 1}")  # rows to predict are not checked before
                parts = [self._conversation(row["messages"], labelled)]
                limit_from_start = True
            elif "prompt" in row:
                parts = [self._prompt_and_response(row, labelled)]
                limit_from_start = False
            elif labelled:
                windows = self._windows(str(row["text"]))
                examples += [self._example(number, w, w) for w in windows]
                report.count_end(bool(windows))
                if not windows:
                    report.unsupervised.append(number)
                continue
            else:
                parts = [(self._start(str(row["text"])), [])]
                limit_from_start = False
            for ids, labels in parts:
                made = self._cut(number, ids, labels, report, labelled, limit_from_start)
                if labelled:
                    report.count_end(any(label in stops for example in made for label in example["labels"][1:]))
                examples += [example | self._to_answer(row, labelled) for example in made]
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The text in pieces: what is only read, and what is learned, with special tokens."""
        pieces: list[tuple[str, list[int]]] = []
        for i, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
            kind = "learned" if i and label != IGNORED else "context"  # the first token is never predicted
            if not pieces or pieces[-1][0] != kind:
                pieces.append((kind, []))
            pieces[-1][1].append(token)
        return [(kind, self.tokenizer.decode(ids)) for kind, ids in pieces]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right (labelled) or left (to be continued); all tensors are (batch, seq) int64.

        Where answers are looked for, ``prompt_ids`` and ``prompt_mask`` are the prompts, to be continued, and
        ``answers`` what must be found then.
        """
        on_right, pad = "labels" in examples[0], self.tokenizer.pad_token_id
        ids = [e["input_ids"] for e in examples]
        batch: Batch = {
            "input_ids": padded(ids, pad, on_right=on_right),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, on_right=on_right),
        }
        if on_right:
            batch["labels"] = padded([e["labels"] for e in examples], IGNORED, on_right=on_right)
        if "prompt_ids" in examples[0]:
            prompts = [e["prompt_ids"] for e in examples]
            batch["prompt_ids"] = padded(prompts, pad, on_right=False)
            batch["prompt_mask"] = padded([[1] * len(row) for row in prompts], 0, on_right=False)
            batch["answers"] = [e["answer"] for e in examples]
        return batch

    def pack(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Examples one after the other, each with positions from 0, by which transformers keeps them apart.

        Token ids, positions and labels are (rows, seq) int64; what fills a row up is like one more example. SEGMENTS
        are the lengths of them all. No first token is learned, as in :meth:`collate`.
        """
        ids = [[token for example in row for token in example["input_ids"]] for row in rows]
        labels = [[label for e in row for label in (IGNORED, *e["labels"][1:])] for row in rows]
        longest = max(map(len, ids))
        lengths = [
            [*(example["length"] for example in row), longest - len(filled)]
            for row, filled in zip(rows, ids, strict=True)
        ]
        return {
            "input_ids": padded(ids, self.tokenizer.pad_token_id, on_right=True),
            "position_ids": torch.tensor([[place for length in row for place in range(length)] for row in lengths]),
            "labels": padded(labels, IGNORED, on_right=True),
            SEGMENTS: [length for row in lengths for length in row if length],
            "examples": sum(map(len, rows)),
        }

    def rows(self, batch: Batch) -> int:
        """The number of examples in a batch."""
        return int(batch.get("examples", len(batch["input_ids"])))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy of the next token, summed over the learned tokens."""
        return token_loss(outputs.logits[:, :-1], batch["labels"][:, 1:], self.options.label_smoothing)

    def metrics(self) -> Any:
        """Metrics of torchmetrics over the learned tokens, and over the answers where they are looked for."""
        from torchmetrics import MeanMetric
        from torchmetrics.text import Perplexity

        answers = {} if self.options.answer is None else {"exact_match": MeanMetric()}
        return nn.ModuleDict(
            {
                "perplexity": Perplexity(ignore_index=IGNORED),
                "token_accuracy": MeanMetric(),
                **answers,
                "loss": MeanMetric(),
            }
        )

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        targets = self.targets(batch)
        learned = targets != IGNORED
        update_tokens(metrics, logits[learned], targets[learned])

    def update_by_generation(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds to exact_match whether the continuation of each prompt has the answer of the response."""
        if self.options.answer is None:
            return
        texts = self._continue(model, batch["prompt_ids"], batch["prompt_mask"])
        for text, expected in zip(texts, batch["answers"], strict=True):
            metrics["exact_match"].update(float(is_same(find_answer(self.options.answer, text), expected)))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The continuation of each example, up to max_new_tokens, and the answer in it where one is looked for."""
        texts = self._continue(model, batch["input_ids"], batch["attention_mask"])
        pattern = self.options.answer
        if pattern is None:
            return [{"text": text} for text in texts]
        return [{"text": text, "answer": find_answer(pattern, text)} for text in texts]

    def _continue(self, model: nn.Module, ids: Tensor, mask: Tensor) -> list[str]:
        width = ids.shape[1]
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=room(model, self.options.max_new_tokens, width),
            num_beams=self.options.num_beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts: list[str] = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts

    def _windows(self, text: str) -> list[list[int]]:
        ids = [*self._start(text), self.tokenizer.eos_token_id]
        limit = self.options.max_length
        # One token of overlap: the first token of a window is never predicted, the last of the one before is.
        windows = [ids[at : at + limit] for at in range(0, len(ids) - 1, limit - 1)]
        return [window for window in windows if len(window) > 1]

    def _stops(self) -> set[int]:
        """The tokens that end a text, or, where a chat template has others, a turn."""
        added = self.tokenizer.added_tokens_decoder
        special = (
            {number for number, token in added.items() if token.special}
            if "messages" in self.options.columns
            else set()
        )
        return {self.tokenizer.eos_token_id} | special

    def _start(self, text: str) -> list[int]:
        # With the tokens that the tokenizer puts before a text (<s>), without one that it puts after it.
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _prompt_and_response(self, row: Row, labelled: bool) -> tuple[list[int], list[int]]:
        prompt = self._start(str(row["prompt"]))
        if not labelled:
            return prompt, []
        response = self.tokenizer(str(row["response"]), add_special_tokens=False, verbose=False)["input_ids"]
        response = [*response, self.tokenizer.eos_token_id]
        return prompt + response, [IGNORED] * len(prompt) + response

    def _conversation(self, messages: list[dict[str, str]], labelled: bool) -> tuple[list[int], list[int]]:
        if not labelled:
            return self._render(_without_answer(messages), prompt=True), []
        ids = self._render(messages, prompt=False)
        labels = [IGNORED] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], prompt=True)
            until = self._render(messages[: i + 1], prompt=False)
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise DataError(
                    "the model's chat template does not render a conversation as its beginning and a rest, "
                    "so the assistant's turns cannot be told apart",
                    fix="use prompt and response columns, or a tokenizer with a plain chat template",
                )
            labels[len(before) : len(until)] = ids[len(before) : len(until)]
        return ids, labels

    def _render(self, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
        try:
            with limited(_RENDER_SECONDS, _RENDER_BYTES):
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of the base's author: anything can go wrong in it
            raise DataError(f"the model's chat template refuses a conversation: {first_line(error)}") from error
        if len(text) > _MAX_RENDERED:
            raise DataError(f"the chat template makes {len(text)} characters of one conversation")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _cut(
        self,
        number: int,
        ids: list[int],
        labels: list[int],
        report: EncodingReport,
        labelled: bool,
        keep_start: bool,
    ) -> list[Example]:
        limit = self.options.max_length
        if not labelled:
            return [self._example(number, self._to_continue(ids), None)]
        if len(ids) > limit:
            report.truncated.append(number)
            answer = sum(label != IGNORED for label in labels)
            if keep_start or answer >= limit:
                # One token of context stays, so that the first learned token is predicted from something.
                start = 0 if keep_start else max(0, len(ids) - answer - 1)
                ids, labels = ids[start : start + limit], labels[start : start + limit]
                report.cut_ends += 1
            else:
                ids, labels = ids[-limit:], labels[-limit:]
        if all(label == IGNORED for label in labels[1:]):
            report.unsupervised.append(number)
            return []
        return [self._example(number, ids, labels)]

    def _to_continue(self, ids: list[int]) -> list[int]:
        # Nothing to continue is continued from the token that begins, or ends, a text.
        begin = self.tokenizer.bos_token_id
        return ids[-self.options.max_length :] or [self.tokenizer.eos_token_id if begin is None else begin]

    def _to_answer(self, row: Row, labelled: bool) -> Example:
        if self.options.answer is None or not labelled:
            return {}
        prompt = self._to_continue(self._start(str(row["prompt"])))
        return {"prompt_ids": prompt, "answer": find_answer(self.options.answer, str(row["response"]))}

    def _example(self, number: int, ids: list[int], labels: list[int] | None) -> Example:
        example: Example = {"row": number, "length": len(ids), "input_ids": ids}
        return example if labels is None else example | {"labels": labels}


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> CausalLm:
    """Checks that the tokenizer can end a text, and can render a conversation where that is needed.

    Raises:
        BaseModelError: It cannot end a text.
        DataError: It cannot render a conversation.
        RecipeError: Answers are looked for where there are no prompts.
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "its tokenizer has no end-of-text token, so the model could not learn to stop",
            where="base.model",
            fix="name one as eos_token in its tokenizer_config.json",
        )
    if "messages" in options.columns and not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template for the column messages",
            fix="use prompt and response columns, or a base with a chat template",
        )
    if options.answer is not None and "prompt" not in options.columns:
        raise RecipeError(
            f"answers are looked for in responses to prompts, found the columns {', '.join(options.columns)}",
            where="evaluation.generate.answer",
            fix="use prompt and response columns, or leave it out",
        )
    check_positions(options, base_config)
    return restore(options, {}, tokenizer)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> CausalLm:
    """The task; it has no state."""
    return CausalLm(options, tokenizer)


def check_positions(options: TaskOptions, base_config: Any) -> None:
    """Refuses examples that are longer than the model.

    Raises:
        DataError: It has fewer positions than max_length.
    """
    positions = getattr(base_config, "max_position_embeddings", None)
    if isinstance(positions, int) and options.max_length > positions:
        raise DataError(
            f"data.max_length is {options.max_length}, but the model has {positions} positions",
            fix=f"set data.max_length: {positions}",
        )


def padded(rows: Sequence[list[int]], value: int, *, on_right: bool) -> Tensor:
    """Rows of several lengths -> (rows, longest) int64, filled up with a value on the right or left."""
    longest = max(map(len, rows))
    fills = [[value] * (longest - len(row)) for row in rows]
    filled = [row + fill if on_right else fill + row for row, fill in zip(rows, fills, strict=True)]
    return torch.tensor(filled, dtype=torch.long)


def _check_messages(messages: Any, where: str) -> None:
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise DataError("expected messages to be a list of {role, content}", where=where)
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise DataError("expected role and content to be text", where=where)


def _without_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
