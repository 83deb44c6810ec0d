"""Rules between keys; returns every problem at once."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ticktune.errors import Problem
from ticktune.recipe.schema import Recipe
from ticktune.registry import TASKS, TaskRow, tasks_with

Where = Callable[[tuple[str | int, ...]], str]


def check(values: dict[str, Any], recipe: Recipe | None, where: Where) -> list[Problem]:
    """Checks what one key says about another.

    Args:
        values: The recipe as plain values; used for the task even where the rest did not validate.
        recipe: The validated recipe, or None when a single value is wrong already.
        where: Gives the place of a path of keys.

    Returns:
        The problems, in no particular order.
    """
    problems: list[Problem] = []

    def wrong(key: str, message: str, fix: str = "") -> None:
        problems.append(Problem(message, where(tuple(key.split("."))), fix))

    task = values.get("task")
    row = TASKS.get(task) if isinstance(task, str) else None
    if isinstance(task, str) and row is None:
        near = difflib.get_close_matches(task, TASKS, 1)
        wrong(
            "task",
            f"there is no task {task}" if near else f"expected one of {', '.join(TASKS)}, found {task}",
            f"did you mean {near[0]}?" if near else "",
        )
    if recipe is None or row is None:
        return problems
    _check_keys(recipe, row, wrong)
    _check_data(recipe, row, wrong)
    _check_classes(recipe, wrong)
    _check_training(recipe, row, wrong)
    if recipe.base.quantize.startswith("bnb-") and recipe.training.device == "cpu":
        wrong("base.quantize", f"{recipe.base.quantize} needs a CUDA device, found training.device cpu", "use int8")
    return problems


def _check_keys(recipe: Recipe, row: TaskRow, wrong: Callable[..., None]) -> None:
    """Refuses keys that this task would not look at."""
    for key in sorted(frozenset().union(*(other.keys for other in TASKS.values())) - row.keys):
        *sections, name = key.split(".")
        section: Any = recipe
        for part in sections:
            section = getattr(section, part)
        if getattr(section, name) != type(section).model_fields[name].default:
            wrong(key, f"{recipe.task} makes no use of it, only {tasks_with(key)}", "remove it")


def _check_data(recipe: Recipe, row: TaskRow, wrong: Callable[..., None]) -> None:
    data = recipe.data
    for name in ("train", "validation", "test"):
        source = getattr(data, name)
        if source is None:
            continue
        kinds = [k for k in ("path", "hub", "fraction") if getattr(source, k) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none of them"
            wrong(f"data.{name}", f"expected one of path, hub or fraction, found {found}")
        if name == "train" and source.fraction is not None:
            wrong("data.train.fraction", "only validation and test can be a share of the training rows")
        if source.fraction is not None:
            for key, value in (("limit", source.limit), ("sample_by", source.sample_by)):
                if value != type(source).model_fields[key].default:
                    wrong(f"data.{name}.{key}", "a share of the training rows makes no use of it", "remove it")
        elif source.sample_by != "auto" and Path(source.path or "").suffix.lower() != ".txt":
            wrong(f"data.{name}.sample_by", "only a txt file is cut into rows", "remove it")
        if source.hub is None and (source.config or source.split or source.revision):
            wrong(f"data.{name}", "config, split and revision are only for hub data sets")
    same = _same_source(data.train, data.validation), _same_source(data.train, data.test)
    for name, is_same in zip(("validation", "test"), same, strict=True):
        if is_same and not data.allow_training_rows:
            fix = "name other rows, or {fraction: 0.1}; or set data.allow_training_rows: true"
            wrong(f"data.{name}", "these are the training rows", fix)
    fractions = [s.fraction for s in (data.validation, data.test) if s is not None and s.fraction is not None]
    if sum(fractions) >= 1:
        wrong("data", "the fractions leave no rows to train on")
    known = frozenset().union(*row.columns) | row.optional_columns
    for column, name in data.columns.items():
        if column not in known:
            near = difflib.get_close_matches(column, known, 1)
            wrong(
                f"data.columns.{column}",
                f"{recipe.task} has no such column; it knows {', '.join(sorted(known))}",
                f"did you mean {near[0]}?" if near else "",
            )
        if re.search(r"\{[^{}]*[^\w\s{}-][^{}]*\}", name):
            wrong(f"data.columns.{column}", f"only plain {{column}} names can stand in a template, found {name}")
    if data.separator is not None and recipe.problem in ("single", "regression"):
        wrong("data.separator", f"expected problem: multi or auto beside it, found {recipe.problem}")
    named = frozenset(data.columns) & known - row.optional_columns
    if named and not any(named <= columns for columns in row.columns):
        sets = " or ".join("+".join(sorted(columns)) for columns in row.columns)
        wrong("data.columns", f"expected {sets}, found {'+'.join(sorted(named))}")


def _check_classes(recipe: Recipe, wrong: Callable[..., None]) -> None:
    classes = recipe.data.classes
    if not classes:
        return
    if recipe.task == "semantic-segmentation" and not 2 <= len(classes) <= 255:
        wrong("data.classes", f"expected 2 to 255 classes, found {len(classes)}")
    owner: dict[int, str] = {}
    for name, values in classes.items():
        for value in values:
            if owner.setdefault(value, name) != name:
                wrong(f"data.classes.{name}", f"the number {value} is in the class {owner[value]} already")


def _same_source(one: Any, other: Any) -> bool:
    if other is None or other.fraction is not None:
        return False
    if one.path is not None:
        return bool(one.path == other.path)
    return (one.hub, one.config, one.split or "train") == (other.hub, other.config, other.split)


def _check_training(recipe: Recipe, row: TaskRow, wrong: Callable[..., None]) -> None:
    training = recipe.training
    if training.epochs is not None and training.steps is not None:
        wrong("training.steps", "give epochs or steps, not both")
    if training.batch_size is not None and training.batch_tokens is not None:
        wrong("training.batch_tokens", "give batch_size or batch_tokens, not both", "set training.batch_size: null")
    if training.batch_size is None and training.batch_tokens is None:
        wrong("training.batch_size", "expected a number, or batch_tokens beside it, found null")
    if training.batch_tokens is not None and training.batch_tokens < recipe.data.max_length:
        wrong(
            "training.batch_tokens",
            f"expected at least data.max_length = {recipe.data.max_length}, found {training.batch_tokens}",
            f"raise it to {recipe.data.max_length} or more, or lower data.max_length",
        )
    if training.batch_size is not None and (training.micro_batch_size or 0) > training.batch_size:
        wrong(
            "training.micro_batch_size",
            f"expected at most batch_size = {training.batch_size}, found {training.micro_batch_size}",
        )
    for key in ("packing", "padding_free", "prefix_cache", "ffn", "compile", "cuda_graphs"):
        if getattr(training, key) != type(training).model_fields[key].default and not training.fast:
            wrong(f"training.{key}", "it is one of the ways that training.fast: false switches off", "remove it")
    if training.ffn == "wide" and (recipe.ticks.dim == 0 or recipe.ticks.dropout):
        why = "hidden units are dropped out" if recipe.ticks.dropout else "there are no ticks"
        wrong("training.ffn", f"ticks cannot be wide: {why}", "set training.ffn: split")
    if recipe.ticks.dim == 0 and recipe.norms.train == "none" and recipe.head.train is False:
        wrong("ticks.dim", "nothing would be trained: no ticks, no norms, no head")
    for key, why in (
        ("batch_tokens", "every batch has a shape of its own"),
        ("packing", "where the examples of a row end is read on the CPU"),
        ("padding_free", "every batch has a shape of its own"),
        ("prefix_cache", "what is kept of a row is read by its number"),
        ("gradient_checkpointing", "a layer that is computed again reads the state of a random generator"),
    ):
        if training.cuda_graphs and getattr(training, key) != type(training).model_fields[key].default:
            wrong("training.cuda_graphs", f"with training.{key}, {why}", "switch one of them off")
    if training.cuda_graphs and training.ffn == "auto":
        why = "with training.ffn auto, its trial would time steps that are not recorded"
        wrong("training.cuda_graphs", why, "set training.ffn: split, or wide")
    if training.prefix_cache != "off":
        if training.packing:
            fix = "switch one of them off"
            wrong("training.prefix_cache", "what is kept of a row is not that of a packed row", fix)
        if training.padding_free:
            wrong("training.prefix_cache", "what is kept is of padded rows", "switch one of them off")
        if recipe.data.augment != type(recipe.data.augment)():
            fix = "set training.prefix_cache: off"
            wrong("training.prefix_cache", "data.augment changes the rows in every epoch, so nothing can be kept", fix)
        if recipe.ticks.dim > 0 and recipe.ticks.layers == "all":
            fix = "set ticks.layers: last:N"
            wrong("training.prefix_cache", "ticks.layers is all: no layer is frozen whose result could be kept", fix)
    metric = recipe.evaluation.metric
    if metric != "auto" and metric not in row.metrics:
        near = difflib.get_close_matches(metric, row.metrics, 1)
        wrong(
            "evaluation.metric",
            f"{recipe.task} has the metrics {', '.join(row.metrics)}, found {metric}",
            f"did you mean {near[0]}?" if near else "",
        )
    if recipe.evaluation.patience is not None and recipe.data.validation is None:
        wrong("evaluation.patience", "early stopping needs data.validation")
    bad = re.search(r"[\x00-\x1f\x7f]", recipe.output)
    if bad or any(len(part.encode()) > 255 for part in recipe.output.split("/")):
        wrong("output", "the path holds a control character or a name of more than 255 bytes")
