"""Token classification: a tag for each word of a text, and the entities that the tags mark."""

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import DataError
from ticktune.tasks.classes import balanced_weights, check_known, class_loss, label_config, read_labels, shared
from ticktune.tasks.task import IGNORED, Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of
from ticktune.versions import require

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTSIDE = "O"
# IOB1, IOB2 and their relatives with marked ends (IOBES, BILOU).
_MARKED = re.compile(r"[BIESLU]-.+")
_HAN = "\u3400-\u9fff\uf900-\ufaff"
# Where a plain text has its words: Han characters alone, words with what stands inside them (don't, 3.5, a.b/c), a
# mark of their kind in front (@name, #topic), other marks by themselves.
_WORD = re.compile(rf"[{_HAN}]|[@#]?[^\W{_HAN}](?:[^\s{_HAN}]*[^\W{_HAN}])?|[^\w\s]+")


@dataclass(frozen=True)
class Span:
    """An entity.

    Args:
        label: Its type.
        first: Number of its first word.
        last: Number of its last word.
    """

    label: str
    first: int
    last: int


@dataclass(frozen=True)
class _Window:
    """Words of a row that fit into one example; those from ``own_first`` to before ``own_end`` are predicted in it."""

    first: int
    end: int
    own_first: int
    own_end: int


@dataclass(frozen=True)
class TokenClassification(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        labels: The tags in the order of the logits.
        tokenizer: The base's tokenizer, a fast one.
        weights: Weight of each tag in the loss; None: all 1.
    """

    options: TaskOptions
    labels: tuple[str, ...]
    tokenizer: Any
    weights: tuple[float, ...] | None = None
    name: str = "token-classification"
    auto_class: str = "AutoModelForTokenClassification"

    @property
    def default_metric(self) -> str:
        """F1 of the entities; accuracy where tags mark none, such as parts of speech."""
        return "f1" if marks_entities(self.labels) else "token_accuracy"

    def config(self) -> dict[str, Any]:
        """The label map and the pad token."""
        return {**label_config(self.labels), "pad_token_id": self.tokenizer.pad_token_id}

    def state(self) -> dict[str, Any]:
        """Tags and their weights."""
        return {"labels": list(self.labels), "weights": None if self.weights is None else list(self.weights)}

    def row_of(self, text: str) -> Row:
        """The words of a line; the line goes with them, so that offsets count in it."""
        text = text.rstrip("\r")
        return {"tokens": _WORD.findall(text), "text": text}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows whose words and tags do not go together, unknown tags, and words that fit into no example.

        Raises:
            DataError: Naming the first such row.
        """
        found: dict[str, int] = {}  # tag -> the first row that has it
        for i, row in enumerate(rows):
            _check_row(row, where(i))
            for tag in row["tags"]:
                found.setdefault(tag, i)
        check_known(list(found), self.labels, lambda k: where(list(found.values())[k]))
        # A word has no more tokens than bytes and a mark of its beginning: few are worth the tokenizer's time.
        long = [i for i, row in enumerate(rows) if any(len(t.encode()) + 2 > self._room for t in row["tokens"])]
        for i, (counts, tokens) in zip(long, self._counted_words([rows[i]["tokens"] for i in long]), strict=True):
            self._check_fit(counts, tokens, where(i))

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises word by word; the first token of a word carries its tag.

        A row that is longer than max_length becomes several examples that share up to ``overlap`` tokens, in whole
        words. Each word is learned, and predicted, in one of them only: where it has most words around it.
        """
        for i, row in enumerate(rows):
            _check_words(row, "tokens", f"row {first + i + 1}")  # rows to predict are not checked before
        planned: list[tuple[int, list[str], _Window]] = []
        for i, (counts, tokens) in enumerate(self._counted_words([row["tokens"] for row in rows])):
            self._check_fit(counts, tokens, f"row {first + i + 1}")
            if not tokens and labelled:
                report.unsupervised.append(first + i)
                continue
            windows = _windows(counts, self._room, self.options.overlap)
            planned += [(i, tokens, window) for window in windows]
        if not planned:
            return []
        encoded = self.tokenizer(
            [tokens[w.first : w.end] for _, tokens, w in planned], is_split_into_words=True, verbose=False
        )
        examples: list[Example] = []
        for k, (i, _, window) in enumerate(planned):
            row = rows[i]
            text = row["text"] if "text" in row else " ".join(row["tokens"])
            starts = _places(row["tokens"], text, f"row {first + i + 1}")
            own = range(window.own_first, window.own_end)
            example: Example = {"row": first + i}
            example |= {name: encoded[name][k] for name in _INPUTS if name in encoded and name != "attention_mask"}
            example["words"] = _first_tokens(encoded.word_ids(k), window)
            if not example["input_ids"]:  # an empty line, and a tokenizer that adds nothing to it
                example |= {"input_ids": [self._filler], "words": [-1]}
                example |= {"token_type_ids": [0]} if "token_type_ids" in example else {}
            example |= {
                "length": len(example["input_ids"]),
                "text": text,
                "starts": [starts[word] for word in own],
                "ends": [starts[word] + len(row["tokens"][word]) for word in own],
            }
            if labelled:
                tags = [self.labels.index(tag) for tag in row["tags"]]
                example["labels"] = [tags[word] if word >= 0 else IGNORED for word in example["words"]]
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The text with its special tokens, and its words with their tags."""
        tags = [self.labels[label] for label in example["labels"] if label != IGNORED]
        spans = zip(example["starts"], example["ends"], tags, strict=True)
        words = [f"{example['text'][start:end]}/{tag}" for start, end, tag in spans]
        return [("context", self.tokenizer.decode(example["input_ids"])), ("learned", " ".join(words))]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads on the right.

        Token ids, masks, ``words`` (number of the word that a token is the first of, else -1) and ``labels`` are
        (batch, seq) int64, ``row`` is (batch,); text and offsets stay lists.
        """
        columns = {name: [e[name] for e in examples] for name in _INPUTS if name in examples[0]}
        batch: Batch = dict(
            self.tokenizer.pad(
                columns, padding=True, padding_side="right", return_tensors="pt", return_attention_mask=True
            )
        )
        longest = batch["input_ids"].shape[1]

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([e[name] + [value] * (longest - e["length"]) for e in examples])

        batch["words"] = padded("words", -1)
        batch["row"] = torch.tensor([e["row"] for e in examples])
        if "labels" in examples[0]:
            batch["labels"] = padded("labels", IGNORED)
        return batch | {name: [e[name] for e in examples] for name in ("text", "starts", "ends")}

    def weight(self, batch: Batch) -> float:
        """The number of words that are learned."""
        return float((batch["labels"] != IGNORED).sum())

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, mask, and segment ids where the tokenizer makes them; all (batch, seq) int64."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over words."""
        return self._loss(outputs.logits, batch)

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        learned = batch["labels"] != IGNORED
        return class_loss(logits[learned], batch["labels"][learned], self.weights, self.options.label_smoothing)

    def counted(self, batch: Batch) -> Tensor | None:
        """The tokens that decide on a word, (batch, seq)."""
        words: Tensor = batch["words"]
        return words >= 0

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tag at each token, (batch, seq)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Precision, recall and F1 of whole entities (same words, same type), accuracy of the tags, and loss."""
        from torchmetrics import MeanMetric

        kind = _entity_score()
        scores = {name: kind(name, self.labels) for name in ("f1", "precision", "recall")}
        return nn.ModuleDict({**scores, "token_accuracy": MeanMetric(), "loss": MeanMetric()})

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch; the tags of a row are put together when all its windows are there."""
        learned = batch["labels"] != IGNORED
        target, words = batch["labels"][learned], batch["words"][learned]
        if not len(target):
            return
        predicted = logits[learned].argmax(-1)
        rows = batch["row"][:, None].expand_as(learned)[learned]
        found = torch.stack([rows, words, target, predicted], dim=1)
        for name in ("f1", "precision", "recall"):
            metrics[name].update(found)
        metrics["token_accuracy"].update((predicted == target).float().mean(), weight=len(target))
        metrics["loss"].update(self._loss(logits, batch) / len(target), weight=len(target))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Of each example its text, and place, tag and probability of each word that it decides on."""
        probabilities = self.logits(self.forward(model, batch)).float().softmax(-1).cpu()
        best = probabilities.max(-1)
        answers = []
        for i, (starts, ends) in enumerate(zip(batch["starts"], batch["ends"], strict=True)):
            places = (batch["words"][i] >= 0).nonzero().flatten().tolist()
            words = [
                {
                    "start": start,
                    "end": end,
                    "tag": self.labels[int(best.indices[i, place])],
                    "score": float(best.values[i, place]),
                }
                for place, start, end in zip(places, starts, ends, strict=True)
            ]
            answers.append({"text": batch["text"][i], "words": words})
        return answers

    def join(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """The entities of a row, and the tag of each of its words.

        An entity has its ``label``, ``text``, ``score`` (the mean probability of its words' tags), ``start`` and
        ``end`` in characters: of the line, or of the tokens with a space between them.
        """
        text = answers[0]["text"]
        words = sorted((word for answer in answers for word in answer["words"]), key=lambda word: word["start"])
        entities = []
        for span in spans_of([word["tag"] for word in words], marked=marks_entities(self.labels)):
            inside = words[span.first : span.last + 1]
            start, end = inside[0]["start"], inside[-1]["end"]
            score = sum(word["score"] for word in inside) / len(inside)
            entities.append({"label": span.label, "text": text[start:end], "start": start, "end": end, "score": score})
        return {"entities": entities, "tags": [word["tag"] for word in words]}

    def describe(self, answer: dict[str, Any]) -> str:
        """Each entity with its type, score and place."""
        found = [f"{e['text']} ({e['label']} {e['score']:.2f} at {e['start']}-{e['end']})" for e in answer["entities"]]
        return ", ".join(found) or "(none)"

    @property
    def _room(self) -> int:
        """Tokens that an example has for words."""
        return _room(self.tokenizer, self.options)

    @property
    def _filler(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id) if end is None else end

    def _counted_words(self, rows: Sequence[list[str]]) -> Iterator[tuple[list[int], list[str]]]:
        """Of each row the number of tokens of each word, and the words as the tokenizer takes them.

        A word of which the tokenizer leaves nothing (a lone control character) becomes its unknown token: every word
        has a tag. Tokenizers that tell a word inside a text by the space before it get that space.
        """
        space = _space_before(self.tokenizer)
        spaced = [[space * (k > 0) + token for k, token in enumerate(tokens)] for tokens in rows]
        if not spaced:
            return
        encoded = self.tokenizer(spaced, is_split_into_words=True, add_special_tokens=False, verbose=False)
        for i, tokens in enumerate(spaced):
            counts = [0] * len(tokens)
            for word in encoded.word_ids(i):
                if word is not None:
                    counts[word] += 1
            unknown = self.tokenizer.unk_token or self.tokenizer.eos_token
            yield (
                [max(1, count) for count in counts],
                [token if count else unknown for token, count in zip(tokens, counts, strict=True)],
            )

    def _check_fit(self, counts: list[int], tokens: list[str], where: str) -> None:
        for word, count in enumerate(counts):
            if count > self._room:
                raise DataError(
                    f"the word {_short(tokens[word].strip())!r} has {count} tokens, but an example has room for "
                    f"{self._room} with data.max_length = {self.options.max_length}",
                    where=where,
                    fix=f"set data.max_length: {self.options.max_length - self._room + count}, or mend the word",
                )


def marks_entities(labels: Sequence[str]) -> bool:
    """Whether tags mark where entities begin and go on (B-person, I-person), rather than name each word's kind."""
    inside = [label for label in labels if label != _OUTSIDE]
    return bool(inside) and all(_MARKED.fullmatch(label) for label in inside)


def spans_of(tags: Sequence[str], *, marked: bool) -> list[Span]:
    """The entities of a row's tags.

    An entity begins with B, S or U, after another type, and after an end (E, L, S, U); an I without a beginning begins
    one, as in conlleval. Of tags without such marks, each that is not O is an entity of one word.

    Args:
        tags: One for each word.
        marked: See :func:`marks_entities`.
    """
    if not marked:
        return [Span(tag, i, i) for i, tag in enumerate(tags) if tag != _OUTSIDE]
    spans: list[Span] = []
    is_open = False
    for i, tag in enumerate(tags):
        if tag == _OUTSIDE:
            is_open = False
            continue
        mark, label = tag[0], tag[2:]
        if is_open and mark not in "BSU" and spans[-1].label == label:
            spans[-1] = Span(label, spans[-1].first, i)
        else:
            spans.append(Span(label, i, i))
        is_open = mark not in "ESLU"
    return spans


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> TokenClassification:
    """Reads the tags off the training rows.

    Raises:
        DataError: Rows without tags, a single tag, or windows that could not go forward.
        UsageError: nervaluate is not installed.
    """
    require("nervaluate", "entities")
    if not tokenizer.is_fast:
        raise DataError(
            "the base has only a slow tokenizer, which does not say which word a token belongs to",
            fix="choose a base with a tokenizer.json",
        )
    names: list[str] = []
    ends = array("q")  # of each row among the tags
    for i, row in enumerate(rows):
        _check_row(row, where(i))
        names += map(shared, row["tags"])
        ends.append(len(names))
    labels = read_labels(names, base_config, lambda k: where(bisect_right(ends, k) if names else 0))
    room = _room(tokenizer, options)
    if options.overlap >= room:
        raise DataError(
            f"data.overlap is {options.overlap}, but an example has room for {room} tokens of words with "
            f"data.max_length = {options.max_length}: the windows of a long row would not go forward",
            fix=f"set data.overlap: {room // 2}",
        )
    weights = tuple(balanced_weights(names, labels)) if options.class_weights == "balanced" else None
    return TokenClassification(options, labels, tokenizer, weights)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> TokenClassification:
    """The task as :meth:`TokenClassification.state` recorded it."""
    weights = state["weights"]
    return TokenClassification(options, tuple(state["labels"]), tokenizer, None if weights is None else tuple(weights))


def _check_words(row: Row, column: str, where: str) -> None:
    one = "tag" if column == "tags" else "word"
    if not isinstance(row[column], list):
        raise DataError(
            f"expected a list of {one}s in the column {column}, found {_short(repr(row[column]))}", where=where
        )
    for item in row[column]:
        if not isinstance(item, str) or (column == "tags" and not item.strip()):
            raise DataError(
                f"expected a {one} as text in the column {column}, found {item!r}",
                where=where,
                fix="write the names of the tags, such as B-person, not their numbers" if column == "tags" else "",
            )


def _check_row(row: Row, where: str) -> None:
    for column in ("tokens", "tags"):
        _check_words(row, column, where)
    tokens, tags = len(row["tokens"]), len(row["tags"])
    if tokens != tags:
        raise DataError(f"expected a tag for each word, found {tokens} tokens and {tags} tags", where=where)
    if "text" in row:
        _places(row["tokens"], row["text"], where)


def _places(tokens: Sequence[str], text: str, where: str) -> list[int]:
    """Where each token starts in a text, in characters."""
    starts, at = [], 0
    for token in tokens:
        start = text.find(token, at)
        if start < 0:
            raise DataError(
                f"the column text does not hold the token {_short(token)!r} after character {at}",
                where=where,
                fix="leave text out of data.columns: offsets then count in the tokens with a space between them",
            )
        starts.append(start)
        at = start + len(token)
    return starts


def _windows(counts: Sequence[int], room: int, overlap: int) -> list[_Window]:
    """Cuts words into windows.

    Args:
        counts: Tokens of each word, each at most ``room``.
        room: Tokens of a window.
        overlap: Most tokens that a window shares with the one before.
    """
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    total = len(counts)
    pieces: list[tuple[int, int]] = []
    first = end = 0
    while not pieces or end < total:
        while end < total and edges[end + 1] - edges[first] <= room:
            end += 1
        pieces.append((first, end))
        # The next window takes in at least one new word, and as many of these as the overlap allows.
        new = edges[end + 1] - edges[end] if end < total else 0
        first = end
        while first > pieces[-1][0] + 1 and edges[end] - edges[first - 1] <= min(overlap, room - new):
            first -= 1
    best = [(-1, 0)] * total  # tokens around the word on its poorer side, and the window
    for k, (left, right) in enumerate(pieces):
        for word in range(left, right):
            # A row's own beginning and end are no lack of context.
            before = edges[word] - edges[left] if left else edges[-1]
            after = edges[right] - edges[word + 1] if right < total else edges[-1]
            if min(before, after) > best[word][0]:
                best[word] = min(before, after), k
    windows = []
    for k, (a, b) in enumerate(pieces):
        own = [word for word in range(a, b) if best[word][1] == k]
        if own:  # else others see all of its words better
            windows.append(_Window(a, b, own[0], own[-1] + 1))
    return windows or [_Window(0, 0, 0, 0)]


def _first_tokens(word_ids: Sequence[int | None], window: _Window) -> list[int]:
    """Of each token the number of the word that it is the first of and that the window decides on, else -1."""
    found, before = [], None
    for word in word_ids:
        number = -1 if word is None or word == before else window.first + word
        found.append(number if window.own_first <= number < window.own_end else -1)
        before = word
    return found


def _room(tokenizer: Any, options: TaskOptions) -> int:
    return int(options.max_length - tokenizer.num_special_tokens_to_add())


def _space_before(tokenizer: Any) -> str:
    """A space where the tokenizer gives words of a list other tokens than words of a text (RoBERTa, GPT-2)."""
    in_text = tokenizer("a a", add_special_tokens=False)["input_ids"]
    in_list = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return "" if in_text == in_list else " "


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _entity_score() -> Any:
    """The class of the entities' metrics; torchmetrics is imported late."""
    from torchmetrics import Metric

    class EntityScore(Metric):  # type: ignore[misc]
        """Micro precision, recall or F1 of entities by nervaluate's strict matching: same words, same type.

        Args:
            kind: ``precision``, ``recall`` or ``f1``.
            labels: The tags in the order of their numbers.
        """

        full_state_update = False
        is_differentiable = False
        higher_is_better = True

        def __init__(self, kind: str, labels: Sequence[str]) -> None:
            super().__init__()
            self.kind, self.labels = kind, labels
            self.add_state("found", default=[], dist_reduce_fx="cat")

        def update(self, found: Tensor) -> None:
            """Adds words, (words, 4) int64: row, place in the row, tag, predicted tag."""
            self.found.append(found)

        def compute(self) -> Tensor:
            """The score over all rows; 0 where there is no entity."""
            from nervaluate.loaders import DictLoader
            from nervaluate.strategies import StrictEvaluation

            correct = predicted = true = 0
            for tags in self._rows():
                spans = [
                    [
                        {"label": span.label, "start": span.first, "end": span.last}
                        for span in spans_of([self.labels[i] for i in column], marked=marks_entities(self.labels))
                    ]
                    for column in tags
                ]
                given, guessed = DictLoader().load(spans)
                result, _ = StrictEvaluation().evaluate(given, guessed, list(self.labels))
                correct, predicted, true = correct + result.correct, predicted + result.actual, true + result.possible
            precision, recall = correct / max(predicted, 1), correct / max(true, 1)
            f1 = 2 * correct / max(predicted + true, 1)
            return torch.tensor({"precision": precision, "recall": recall, "f1": f1}[self.kind])

        def _rows(self) -> Iterator[tuple[list[int], list[int]]]:
            """Tags and predicted tags of each row, in the order of its words."""
            found = self.found if isinstance(self.found, list) else [self.found]
            words = sorted(tuple(word) for part in found for word in part.tolist())
            for _, group in groupby(words, key=lambda word: word[0]):
                mine = list(group)
                yield [word[2] for word in mine], [word[3] for word in mine]

    return EntityScore
