"""Which rows a command works on, and what a merged folder is compared on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ticktune.data.batches import micro_batches
from ticktune.data.read import Rows, build_rows
from ticktune.device import Compute
from ticktune.errors import DataError, UsageError
from ticktune.evaluate import compute_metrics, logits_of
from ticktune.export.save import Evidence
from ticktune.folder import Target
from ticktune.patch.attach import adapter_state, attachment_of, load_adapter_state
from ticktune.prepare import Loaded, encode, facts_of, read_file, read_splits
from ticktune.registry import TASKS
from ticktune.tasks.task import Batch

_VERIFY_VALUES = 60_000_000  # logits compared at export: enough rows for a proof, few enough to hold twice
_VERIFY_ROWS = 1024
_VERIFY_BATCH = 16


def evaluation_rows(target: Target, split: str | None = None, data: Path | None = None) -> tuple[Rows, str]:
    """Reads rows with answers.

    Args:
        target: The run, adapter or merged folder.
        split: A split of the run's recipe; None: test, else validation, never train.
        data: A file instead.

    Returns:
        The rows, and the name of the split or file.

    Raises:
        UsageError: The recipe has no such split, or there is no recipe and no file.
        DataError: The rows cannot be used.
    """
    facts = facts_of(target)
    if data is not None:
        return read_file(data, facts, labelled=True), data.name
    loaded = target.recipe()
    if loaded is None:
        raise UsageError(
            "this folder belongs to no run, so its data are not known",
            where=target.name,
            fix="add --data FILE",
        )
    known = [name for name in ("test", "validation", "train") if getattr(loaded.recipe.data, name) is not None]
    if split is None:
        split = next((name for name in known if name != "train"), None)
        if split is None:
            raise DataError("the recipe has no test or validation rows", where=target.name, fix="add --data FILE")
    if split not in known:
        raise UsageError(f"the recipe has no {split} rows", where="--split", fix=f"one of: {', '.join(known)}")
    return read_splits(loaded, names=(split,))[split], split


def prediction_rows(words: Sequence[str], used: Loaded, lines: Callable[[], str]) -> Rows:
    """Reads rows without answers.

    Args:
        words: Texts, one file, or ``-``; none: standard input.
        used: The model, for its task's columns.
        lines: Reads standard input.

    Raises:
        UsageError: Plain text was given to a task that needs several columns.
        DataError: There is no text.
    """
    facts = used.facts
    assert facts.task is not None
    row = TASKS[facts.task["name"]]
    if len(words) == 1 and words[0] != "-" and Path(words[0]).is_file():
        path = Path(words[0])
        if path.suffix != ".txt":
            return read_file(path, facts, labelled=False)
        texts, name = path.read_text(encoding="utf-8-sig").split("\n"), str(path)
    elif not words or list(words) == ["-"]:
        texts, name = lines().split("\n"), "standard input"
    else:
        texts, name = list(words), "command line"
    records = [(number, used.task.row_of(text)) for number, text in enumerate(texts, start=1) if text.strip()]
    if not records:
        raise DataError("there is no text to predict", where=name)
    return build_rows(records, row, {column: column for column in records[0][1]}, name, labelled=False)


def evidence_of(target: Target, used: Loaded, compute: Compute) -> Evidence:
    """Computes what a merged folder must reproduce, on the run's evaluation rows.

    Args:
        target: The adapter.
        used: Base and adapter, float32.
        compute: Where to compute.
    """
    task = used.task
    rows, _ = evaluation_rows(target)
    examples = encode(task, rows, used.tokenizer_files)
    batches: list[Batch] = []
    ours: list[Tensor] = []
    values = 0
    for numbers in micro_batches(range(min(len(examples), _VERIFY_ROWS)), _VERIFY_BATCH):
        batch = task.collate(examples.take(numbers))
        [logits] = logits_of(used.model, task, [batch], compute)
        values += logits.numel()
        if values > _VERIFY_VALUES and batches:
            break
        batches.append(batch)
        ours.append(logits)
    with _without_ticks(used.model):
        base = logits_of(used.model, task, batches, compute)

    def metrics(logits: Sequence[Tensor]) -> dict[str, float]:
        found = task.metrics()
        for batch, values in zip(batches, logits, strict=True):
            task.update(found, _Logits(values.float()), batch)
        return compute_metrics(found)

    return Evidence(
        batches=[task.inputs(batch) for batch in batches],
        masks=[task.counted(batch) for batch in batches],
        ours=ours,
        base=base,
        decide=task.decide,
        metrics=metrics,
    )


@dataclass(frozen=True)
class _Logits:
    logits: Tensor


@contextmanager
def _without_ticks(model: nn.Module) -> Iterator[None]:
    """The base with the trained head: P = 0, and the norms as they were."""
    record = attachment_of(model)
    kept = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    plain = dict(kept)
    for key in kept:
        if key.endswith(".ffn.P"):
            plain[key] = torch.zeros_like(kept[key])
        elif key in record.frozen_norms:
            plain[key] = record.frozen_norms[key].detach().float()
    load_adapter_state(model, plain)
    try:
        yield
    finally:
        load_adapter_state(model, kept)
