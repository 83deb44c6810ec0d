"""Which rows a command works on, and what a merged folder is compared on."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.data.batches import micro_batches
from ticktune.data.media import SUFFIXES as MEDIA
from ticktune.data.read import SUFFIXES, Rows, build_rows, text_lines
from ticktune.errors import BaseModelError, DataError, RecipeError, UsageError
from ticktune.evaluate import compute_metrics, logits_of
from ticktune.export.save import Evidence, drift_of
from ticktune.folder import Target
from ticktune.patch.attach import adapter_parameters, adapter_state, attachment_of, load_adapter_state, watched_ticks
from ticktune.prepare import Loaded, encode, facts_of, facts_with_task, load_target, read_file, read_splits, usable_rows
from ticktune.registry import TASKS
from ticktune.tasks.task import Batch

_VERIFY_VALUES = 60_000_000  # logits compared at export: enough rows for a proof, few enough to hold twice
_VERIFY_ROWS = 1024
_VERIFY_BATCH = 16


def evaluation_rows(
    target: Target, split: str | None = None, data: Path | None = None, *, else_train: bool = False
) -> tuple[Rows, str]:
    """Reads rows with answers.

    Args:
        target: The run, adapter or merged folder.
        split: A split of the run's recipe; None: test, else validation.
        data: A file instead.
        else_train: Whether the training rows will do where there is no other split.

    Returns:
        The rows, and the name of the split or file.

    Raises:
        UsageError: The recipe has no such split, or there is no recipe and no file.
        DataError: The rows cannot be used.
    """
    if data is not None:
        return read_file(data, facts_with_task(target), labelled=True), data.name
    loaded = target.recipe()
    fix = "add --data FILE"
    if loaded is None:
        raise UsageError("this folder belongs to no run, so its data are not known", where=target.name, fix=fix)
    known = [name for name in ("test", "validation", "train") if getattr(loaded.recipe.data, name) is not None]
    if split is None:
        split = known[0]
        if split == "train" and not else_train:
            raise DataError("the recipe has no test or validation rows", where=target.name, fix=fix)
    if split not in known:
        raise UsageError(f"the recipe has no {split} rows", where="--split", fix=f"one of: {', '.join(known)}")
    return read_splits(loaded, names=(split,))[split], split


def prediction_rows(words: Sequence[str], used: Loaded, standard_input: Callable[[], bytes]) -> Rows:
    """Reads rows without answers; every text is a row, an empty one too, and so is every picture or sound.

    Args:
        words: Texts; pictures or sounds, and folders of them; one file of rows; or ``-``. None: standard input.
        used: The model, for its task's columns.
        standard_input: Reads it.

    Raises:
        UsageError: A file is not there or not alone, or plain text was given to a task of several columns.
        DataError: There is no text, or it is not UTF-8.
    """
    assert used.facts.task is not None
    row = TASKS[used.facts.task["name"]]
    if not words or list(words) == ["-"]:
        texts, name = text_lines(standard_input(), "standard input"), "standard input"
    elif media := _media_among(words, row.file_columns):
        texts, name = media, "command line"
    elif (file := _file_among(words)) is not None:
        if file.suffix in SUFFIXES and file.suffix != ".txt":
            return read_file(file, used.facts, labelled=False)
        texts, name = text_lines(file.read_bytes(), str(file)), str(file)
    else:
        texts, name = list(words), "command line"
    if not any(text.strip() for text in texts):
        raise DataError("there is no text to predict", where=name)
    records = [(number, used.task.row_of(text)) for number, text in enumerate(texts, start=1)]
    columns = {column: column for column in records[0][1]}
    rows = build_rows(records, row, columns, name, labelled=False)
    return replace(rows, by_file=bool(rows.files) and name == "command line")


def _media_among(words: Sequence[str], columns: Collection[str]) -> list[str]:
    """The pictures or sounds that the words and the folders among them are, for a task that reads such; else none."""
    endings = tuple(ending for column in columns for ending in MEDIA.get(column, ()))
    files: list[str] = []
    for word in words if endings else ():
        if os.path.isdir(word):
            inside = sorted(str(path) for path in Path(word).rglob("*") if path.name.lower().endswith(endings))
            if not inside:
                raise UsageError(f"the folder holds no file that ends in {', '.join(endings)}", where=word)
            files += inside
        elif word.lower().endswith(endings):
            files.append(word)
        else:
            return []
    return files


def _file_among(words: Sequence[str]) -> Path | None:
    """The file that the words name, if they do; a slip must not become a text to predict."""
    for word in words:
        path = Path(word)
        is_file = bool(word) and os.path.exists(word) and not os.path.isdir(word)
        if (is_file or word == "-") and len(words) > 1:
            raise UsageError("give one file or -, or texts, not both", where=word)
        if is_file:
            return path
        looks_like_one = not any(c.isspace() for c in word) and (
            path.suffix in SUFFIXES or ("/" in word.strip("/") and os.path.isdir(path.parent))
        )
        if looks_like_one:
            raise UsageError(
                "there is no such file or run", where=word, fix="text like this can come by standard input"
            )
    return None


def evidence_of(rows: Rows, used: Loaded) -> Evidence:
    """Computes what a merged folder must reproduce.

    Args:
        rows: Rows with answers.
        used: Base and adapter, float32 or wider.
    """
    task = used.task
    examples = encode(task, usable_rows(task, rows), used.processor_files)
    batches: list[Batch] = []
    ours: list[Tensor] = []
    values = 0
    ran: dict[str, bool] = {}
    for numbers in micro_batches(range(min(len(examples), _VERIFY_ROWS)), _VERIFY_BATCH):
        batch = task.collate(examples.take(numbers))
        with watched_ticks(used.model) as now:
            [logits] = logits_of(used.model, task, [batch], used.compute)
        values += logits.numel()
        if values > _VERIFY_VALUES and batches:
            break
        batches.append(batch)
        ours.append(logits)
        ran = {key: ran.get(key, False) or has_run for key, has_run in now.items()}
    with _without_ticks(used.model):
        base = logits_of(used.model, task, batches, used.compute)

    def metrics(logits: Sequence[Tensor]) -> dict[str, float]:
        found = task.metrics()
        for batch, values in zip(batches, logits, strict=True):
            task.update(found, values.float(), batch)
        # Those of generated text are not made of logits, and stay undefined.
        return {name: value for name, value in compute_metrics(found).items() if value == value}

    return Evidence(
        batches=[task.inputs(batch) for batch in batches],
        masks=[task.counted(batch) for batch in batches],
        ours=ours,
        base=base,
        logits=task.logits,
        decide=task.decide,
        metrics=metrics,
        ran=ran,
    )


def drift_from_training(target: Target, base: str | None, evidence: Evidence) -> dict[str, Any]:
    """Measures what full precision changes for an adapter that was trained on a quantised base.

    Args:
        target: The run or adapter.
        base: The base, where the recorded one cannot be found.
        evidence: Of the full-precision base + adapter, which the merged folder must equal.

    Returns:
        ``quantization``; ``drift``, empty where the quantised model cannot be loaded here; ``not_measured``: why.
        An empty dict where training quantised nothing.
    """
    facts = facts_of(target).base
    stored, kind = facts.get("stored_quantization"), facts.get("quantize") or "none"
    if stored is None and kind == "none":
        return {}
    found: dict[str, Any] = {"quantization": stored or kind, "drift": {}, "not_measured": None}
    try:
        used = load_target(target, base=base if stored is None else None)
    except (BaseModelError, RecipeError) as error:
        return found | {"not_measured": error.problems[0].message}
    with torch.no_grad():
        outputs = (used.model(**used.compute.put(batch)) for batch in evidence.batches)
        before = [evidence.logits(found).float().cpu() for found in outputs]
    return found | {"drift": drift_of(evidence, before, evidence.ours)}


@contextmanager
def _without_ticks(model: nn.Module) -> Iterator[None]:
    """The base with the trained head: P = 0, and the norms as they were."""
    record = attachment_of(model)
    kept = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    plain = dict(kept)
    for key, role, _ in adapter_parameters(model):
        if role == "P":
            plain[key] = torch.zeros_like(kept[key])
        elif key in record.frozen_norms:
            plain[key] = record.frozen_norms[key].detach().float()
    load_adapter_state(model, plain)
    try:
        yield
    finally:
        load_adapter_state(model, kept)
