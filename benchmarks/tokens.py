"""Random tokens in batches of every layout, and tasks over them: the training loop without a tokenizer or a recipe."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.data.batches import epoch_batches, packed_rows
from ticktune.tasks.batch import IGNORED, SEGMENTS, Batch


class NextTokens:
    """What comes next, as ``causal-lm`` has it: of each example all tokens but the first are learned."""

    options = SimpleNamespace(label_smoothing=0.0)

    def rows(self, batch: Batch) -> int:
        """Examples."""
        return int(batch["examples"])

    def weight(self, batch: Batch) -> float:
        """Tokens that are learned; counted when the batch was made, so that no step waits for the device."""
        return float(batch["learned"])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids, and the mask of padded or the positions of packed rows."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels."""
        return model(**self.inputs(batch), use_cache=False)

    def targets(self, batch: Batch) -> Tensor:
        """The next token at each position; none at the last."""
        return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def logits(self, outputs: Any) -> Tensor:
        """(batch, seq, vocabulary)."""
        logits: Tensor = outputs.logits
        return logits

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy in float32, summed over what is learned."""
        logits, labels = outputs.logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def pack(self, rows: Sequence[Sequence[dict[str, Any]]]) -> Batch:
        """Examples one after the other, positions beginning anew with each."""
        ids = _padded([[token for e in row for token in e["input_ids"]] for row in rows], 0)
        labels = _padded([[n for e in row for n in (IGNORED, *e["input_ids"][1:])] for row in rows], IGNORED)
        lengths = [[e["length"] for e in row] for row in rows]
        lengths = [[*row, ids.shape[1] - sum(row)] for row in lengths]  # what fills a row up is one more
        positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
        segments = [length for row in lengths for length in row if length]
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels, SEGMENTS: segments}
        return _counted(batch, sum(map(len, rows)))

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """A row for each example, padded on the right."""
        ids = _padded([e["input_ids"] for e in examples], 0)
        mask = _padded([[1] * e["length"] for e in examples], 0)
        labels = ids.masked_fill(mask == 0, IGNORED)
        return _counted({"input_ids": ids, "attention_mask": mask, "labels": labels}, len(examples))


class Classes:
    """Rows of random tokens, one of two classes each."""

    options = SimpleNamespace(label_smoothing=0.0)

    def rows(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["labels"])

    def weight(self, batch: Batch) -> float:
        """Rows, as float."""
        return float(len(batch["labels"]))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Runs the model without labels."""
        return model(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over the rows."""
        return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="sum")

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Pads on the right."""
        return {
            "input_ids": _padded([e["input_ids"] for e in examples], 0),
            "attention_mask": _padded([[1] * e["length"] for e in examples], 0),
            "labels": torch.tensor([e["row"] % 2 for e in examples]),
        }


def drawn(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of these lengths, their tokens drawn evenly."""
    rng = np.random.default_rng(seed)
    return [
        {"row": row, "length": length, "input_ids": rng.integers(3, vocabulary, length).tolist()}
        for row, length in enumerate(lengths)
    ]


def lognormal(count: int, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Lengths as texts have them: lognormal with sigma 0.8, between 4 and the longest."""
    sigma = 0.8
    values = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [int(value) for value in np.clip(values.round(), 4, longest)]


def up_to(lengths: Sequence[int], tokens: int) -> list[int]:
    """As many of the lengths, from the first, as a number of tokens holds; at least one."""
    fitting = int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))
    return list(lengths[: max(1, fitting)])


def in_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row of so many tokens; ticktune's own division."""
    return packed_rows(lengths, capacity)


def divided(lengths: Sequence[int], rows: int, layout: str) -> list[list[int]]:
    """Batches of so many rows: ``random`` as they come, ``by length`` in ticktune's own order."""
    if layout == "by length":
        return [batch for batch in epoch_batches(lengths, rows, seed=0, epoch=0) if len(batch) == rows]
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    return [order[i : i + rows] for i in range(0, len(order) - rows + 1, rows)]


def real_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    return int(batch["tokens"] if "tokens" in batch else batch["attention_mask"].sum())


def mean_length(lengths: Sequence[int]) -> float:
    """The length that attention costs of: sum of squares / sum."""
    return sum(n * n for n in lengths) / sum(lengths)


def _counted(batch: Batch, examples: int) -> Batch:
    labels = batch["labels"]
    learned = int((labels[:, 1:] != IGNORED).sum())
    packed = "position_ids" in batch
    tokens = int((labels != IGNORED).sum()) + (examples if packed else 0)
    return batch | {"examples": examples, "learned": learned, "tokens": tokens}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
