"""Recipe -> rows, task, examples and base: everything that stands before a model is trained or used."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter
from torch import nn

from ticktune.adapter import AdapterFacts, attach_adapter, check_base, parse_facts, read_facts, shapes_fingerprint
from ticktune.base import (
    BaseFiles,
    check_vocabulary,
    fingerprint,
    load_config,
    load_model,
    load_processor,
    locate_base,
    stored_quantization,
    training_dtype,
    without_weights,
)
from ticktune.console import Console
from ticktune.data.batches import split_rows
from ticktune.data.encode import Encoded, encode_rows, processor_identity
from ticktune.data.read import Rows, read_rows
from ticktune.device import Compute, choose_compute
from ticktune.errors import BaseModelError, CheckpointError, DataError, Problem, RecipeError, UsageError, first_line
from ticktune.export.save import FACTS as MERGED_FACTS
from ticktune.files import read_json, verify_directory
from ticktune.folder import Target
from ticktune.patch.attach import unquantized_modules
from ticktune.quantize import check_possible, is_coded, loading_arguments
from ticktune.recipe.load import LoadedRecipe
from ticktune.recipe.schema import Data, Source
from ticktune.registry import TASKS
from ticktune.tasks.task import Task, TaskOptions, build_task, restore_task

Poll = Callable[[], None]


def _no_poll() -> None:
    return None


@dataclass
class Prepared:
    """All that training starts from.

    Args:
        loaded: The recipe.
        compute: Device and precision.
        base: The base's files.
        dtype: How the frozen weights are held.
        processor: The base's tokenizer, image processor or feature extractor.
        task: The task, configured.
        rows: Split -> rows.
        examples: Split -> examples.
    """

    loaded: LoadedRecipe
    compute: Compute
    base: BaseFiles
    dtype: str
    processor: Any
    task: Task
    rows: dict[str, Rows]
    examples: dict[str, Encoded] = field(default_factory=dict)

    def task_facts(self) -> dict[str, Any]:
        """What an adapter records of the task."""
        recipe = self.loaded.recipe
        return {
            "name": recipe.task,
            "state": self.task.state(),
            "options": asdict(self.task.options),
            "columns": recipe.data.columns,
            "tokenizer": processor_identity(self.base.directory),
        }


def prepare(loaded: LoadedRecipe, console: Console, poll: Poll = _no_poll) -> Prepared:
    """Does everything cheap before anything expensive: device, rows, tokenizer, labels, examples.

    Raises:
        TicktuneError: Of the stage that found a problem.
    """
    recipe = loaded.recipe
    compute = choose_compute(recipe.training.device, recipe.training.precision)
    check_possible(recipe.base.quantize, compute.device)
    rows = read_splits(loaded, poll)
    base = locate_base(recipe.base.model, revision=recipe.base.revision, relative_to=loaded.path.parent)
    method = stored_quantization(base)
    check_possible("none", compute.device, stored=method, where=f"base.model {base.name}")
    if recipe.base.quantize != "none" and method is not None:
        raise RecipeError(
            f"the files of {base.name} are quantised already (by {method}), found {recipe.base.quantize}",
            where=loaded.where("base.quantize"),
            fix="set base.quantize: none, or name the full-precision model",
        )
    processor = load_processor(base, TASKS[recipe.task].processor)
    train = rows["train"]
    options = TaskOptions(
        columns=train.columns,
        max_length=recipe.data.max_length,
        problem=recipe.problem,
        max_new_tokens=recipe.evaluation.generate.max_new_tokens,
        num_beams=recipe.evaluation.generate.num_beams,
        overlap=recipe.data.overlap,
        answer=recipe.evaluation.generate.answer,
        threshold=recipe.evaluation.threshold,
        class_weights=recipe.loss.weights,
        label_smoothing=recipe.loss.label_smoothing,
        augment=recipe.data.augment.model_dump(),
        classes=recipe.data.classes,
        max_seconds=recipe.data.max_seconds,
        vocabulary=recipe.data.vocabulary,
        language=recipe.data.language,
        separator=recipe.data.separator,
    )
    task = build_task(recipe.task, options, train.records(), train.where, processor, load_config(base))
    for name in rows:
        task.check(rows[name].records(), rows[name].where)
    _check_metric(loaded, task)
    _warn_overlap(rows, console)
    dtype = training_dtype(recipe.base.dtype, base, compute.precision, compute.device.type)
    prepared = Prepared(loaded, compute, base, dtype, processor, task, rows)
    for name in ("train", "validation"):
        if name in rows:
            prepared.examples[name] = encode(task, rows[name], base.directory, poll=poll)
            say_report(prepared.examples[name], name, task.limit(), console)
    return prepared


def read_splits(loaded: LoadedRecipe, poll: Poll = _no_poll, names: tuple[str, ...] = ()) -> dict[str, Rows]:
    """Reads the splits that a recipe names; a fraction is taken out of the training rows.

    Args:
        loaded: The recipe.
        poll: Called now and then.
        names: Only these splits; empty: all.

    Raises:
        DataError: Of the first file that cannot be used.
    """
    recipe, seed = loaded.recipe, loaded.recipe.training.seed
    wanted = names or ("train", "validation", "test")
    sources = {n: s for n in ("train", "validation", "test") if (s := getattr(recipe.data, n)) is not None}
    needs_train = "train" in wanted or any(s.fraction is not None for n, s in sources.items() if n in wanted)
    rows: dict[str, Rows] = {}
    for name, source in sources.items():
        if source.fraction is None and (name in wanted or (name == "train" and needs_train)):
            rows[name] = _read(loaded, name, source, poll)
    shares = {n: s.fraction for n, s in sources.items() if s.fraction is not None}
    if shares and "train" in rows:
        train, left = rows["train"], list(range(len(rows["train"])))
        if len(left) <= len(shares):
            raise DataError(
                "too few rows to take a fraction of them",
                where=train.source,
                fix="name a file for each split; a txt file is one row unless sample_by: line is given",
            )
        for name, share in shares.items():
            rest, chosen = split_rows(len(left), min(0.99, share * len(train) / len(left)), seed=seed, name=name)
            rows[name] = train.select([left[i] for i in chosen])
            left = [left[i] for i in rest]
        rows["train"] = train.select(left)
    return {name: rows[name] for name in ("train", "validation", "test") if name in rows and name in wanted}


def encode(task: Task, rows: Rows, processor_files: Path, *, labelled: bool = True, poll: Poll = _no_poll) -> Encoded:
    """Tokenises a split; see :func:`ticktune.data.encode.encode_rows`."""
    identity = [task.name, asdict(task.options), task.state(), processor_identity(processor_files)]
    return encode_rows(task, rows, identity, labelled=labelled, poll=poll)


@dataclass
class Loaded:
    """A trained model that is ready to be used.

    Args:
        model: Base and adapter, or a merged folder's stock model.
        task: The task, as it was trained.
        facts: The adapter's facts.
        compute: Device and precision.
        processor_files: Folder of the tokenizer, image processor or feature extractor.
        base: The base's files; None for a merged folder.
        stands_in: Whether ``base`` is a full-precision model in the place of the quantised one of training.
    """

    model: nn.Module
    task: Task
    facts: AdapterFacts
    compute: Compute
    processor_files: Path
    base: BaseFiles | None
    stands_in: bool = False


def load_target(
    target: Target,
    *,
    base: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    dtype: str | None = None,
    full_precision: bool = False,
) -> Loaded:
    """Loads an adapter on its base, or a merged folder.

    Args:
        target: From :func:`ticktune.folder.find_target`.
        base: The base, where the recorded one cannot be found.
        device: Where to compute, as ``training.device`` says it; None: as in training.
        precision: As ``training.precision`` says it; None: as in training.
        dtype: How weights are held; None: as in training.
        full_precision: Do not quantise the base, though training did.

    Raises:
        BaseModelError: The base is another one. A full-precision ``base`` may stand in for one whose files are
            quantised, where its shapes fit.
        RecipeError: This machine cannot quantise as training did.
        CheckpointError: The folder is damaged.
    """
    if base is not None and target.kind == "merged":
        raise UsageError("a merged folder needs no base", where="--base")
    loaded = target.recipe()
    trained = (loaded.recipe.training.device, loaded.recipe.training.precision) if loaded else ("auto", "auto")
    named = (
        "--device" if device or not loaded else "training.device",
        "--precision" if precision else "training.precision",
    )
    compute = choose_compute(device or trained[0], precision or trained[1], named=named)
    facts = facts_of(target)
    if facts.task is None or facts.model_class is None:
        raise UsageError(
            "the adapter was saved without a task, so there is nothing to evaluate it by",
            where=str(target.path),
            fix="use ticktune.load_adapter in Python",
        )
    if target.kind == "merged":
        files = BaseFiles(str(target.path), target.path)
        held = dtype or training_dtype("auto", files, "fp32", compute.device.type)
        kind, stands_in = "none", False
    else:
        files = base_of(facts, loaded, base)
        asked = loaded.recipe.base.dtype if loaded else "auto"
        held = dtype or training_dtype(asked, files, compute.precision, compute.device.type)
        kind = "none" if full_precision else facts.base.get("quantize") or "none"
    task = task_of(facts, load_processor(files, TASKS[facts.task["name"]].processor))
    if target.kind == "adapter":
        may_stand_in = base is not None and stored_quantization(files) is None
        shapes = (
            shapes_fingerprint(without_weights(files, facts.model_class, task.config()))
            if may_stand_in and facts.base.get("stored_quantization") is not None
            else None
        )
        found = fingerprint(files, head=facts.plan["head"])
        stands_in = not check_base(facts, found, str(target.path), shapes=shapes)
    model, fresh = _load(files, facts.model_class, task.config(), held, kind, compute.device)
    unknown = sorted(set(fresh) - set(facts.plan["head"] if target.kind == "adapter" else ()))
    if unknown:
        raise BaseModelError(f"the parameter {unknown[0]} is in no file: its values would be random", where=target.name)
    if target.kind == "adapter":
        attach_adapter(model, target.path, facts)
    return Loaded(
        model.to(compute.device),
        task,
        facts,
        compute,
        files.directory,
        files if target.kind == "adapter" else None,
        stands_in,
    )


def facts_of(target: Target) -> AdapterFacts:
    """Verifies the folder and reads the adapter's facts.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if target.kind == "adapter":
        return read_facts(target.path)
    verify_directory(target.path)
    path = target.path / MERGED_FACTS
    document = read_json(path)
    return parse_facts(document.get("adapter") if isinstance(document, dict) else None, str(path))


def base_of(facts: AdapterFacts, loaded: LoadedRecipe | None, override: str | None) -> BaseFiles:
    """Finds the base of an adapter: as given, as the run's recipe says, or as the adapter recorded it."""
    if override is not None:
        return locate_base(override)
    name, commit, folder = facts.base["name"], facts.base["commit"], Path()
    if loaded is not None:
        name, commit, folder = loaded.recipe.base.model, loaded.recipe.base.revision, loaded.path.parent
    try:
        return locate_base(name, revision=commit, relative_to=folder)
    except BaseModelError as error:
        fixes = [Problem(p.message, p.where, "say where it is now: --base DIR") for p in error.problems]
        raise BaseModelError(fixes) from error


def task_of(facts: AdapterFacts, processor: Any) -> Task:
    """The task as it was trained.

    Raises:
        CheckpointError: The state that the adapter recorded is none of this task.
    """
    assert facts.task is not None
    entries, state = facts.task["options"], facts.task["state"]
    options = TaskOptions(**{**entries, "columns": tuple(entries["columns"])})
    try:
        task = restore_task(facts.task["name"], options, state, processor)
        for name, kind in get_type_hints(type(task)).items():
            if name in state:
                TypeAdapter(kind).validate_python(getattr(task, name))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the recorded state of the task {facts.task['name']} is damaged: {first_line(error)}"
        ) from error
    return task


def load_trainable(prepared: Prepared) -> tuple[nn.Module, list[str]]:
    """Loads the base for training; returns it with the names of the parameters that its checkpoint lacks.

    Raises:
        BaseModelError: It cannot be loaded, or is quantised in a way that passes no gradients.
        RecipeError: Nothing in it can be quantised as the recipe asks.
    """
    recipe = prepared.loaded.recipe
    model, fresh = _load(
        prepared.base,
        prepared.task.auto_class,
        prepared.task.config(),
        prepared.dtype,
        recipe.base.quantize,
        prepared.compute.device,
        seed=recipe.training.seed,
    )
    if TASKS[recipe.task].processor == "tokenizer":
        check_vocabulary(model, prepared.processor, prepared.base)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise BaseModelError(
            f"it is quantised by {stored_quantization(prepared.base)} in a way that passes no gradients to ticks",
            where=f"base.model {prepared.base.name}",
            fix="use the full-precision model, and base.quantize where memory is short",
        )
    if recipe.base.quantize != "none" and not any(is_coded(p) for p in model.parameters()):
        raise RecipeError(
            f"{recipe.base.quantize} quantises linear projections, and a {type(model).__name__} has none outside of "
            "its head",
            where=prepared.loaded.where("base.quantize"),
            fix="set base.quantize: none",
        )
    return model.to(prepared.compute.device), fresh


def _load(
    base: BaseFiles,
    auto_class: str,
    config: dict[str, Any],
    dtype: str,
    kind: str,
    device: torch.device,
    *,
    seed: int = 42,
) -> tuple[nn.Module, list[str]]:
    """Loads a base, quantised as asked for, or as its files are."""
    method = stored_quantization(base)
    keep: list[str] = []
    loading: dict[str, Any] = {}
    if kind != "none" or method is not None:
        keep = unquantized_modules(without_weights(base, auto_class, config))
    check_possible(kind, device, stored=method, where=f"base.model {base.name}" if kind == "none" else "base.quantize")
    if kind != "none":
        loading = loading_arguments(kind, keep=keep, dtype=getattr(torch, dtype), device=device)
    elif method == "bitsandbytes":
        loading = {"device_map": {"": str(device)}}
    return load_model(base, auto_class, dtype=dtype, config=config, seed=seed, loading=loading, keep=keep)


def read_file(path: Path, facts: AdapterFacts, *, labelled: bool, poll: Poll = _no_poll) -> Rows:
    """Reads a file that a command names, with the columns of the adapter's recipe; a txt file is one row a line."""
    assert facts.task is not None
    return read_rows(
        Source(path=str(path)), TASKS[facts.task["name"]], facts.task["columns"], labelled=labelled, poll=poll
    )


def _read(loaded: LoadedRecipe, name: str, source: Source, poll: Poll) -> Rows:
    data: Data = loaded.recipe.data
    row = TASKS[loaded.recipe.task]
    whole = row.documents if source.sample_by == "auto" else source.sample_by == "document"
    try:
        return read_rows(
            source,
            row,
            data.columns,
            relative_to=loaded.path.parent,
            split=name,
            whole_text=whole,
            poll=poll,
        )
    except RecipeError as error:
        raise RecipeError(
            str(error.problems[0].message), where=loaded.where(f"data.{name}"), fix=error.problems[0].fix
        ) from error
    except DataError as error:
        named = [type(p)(p.message, f"{p.where} ({loaded.where(f'data.{name}')})", p.fix) for p in error.problems]
        raise DataError(named) from error


def _check_metric(loaded: LoadedRecipe, task: Task) -> None:
    asked, known = loaded.recipe.evaluation.metric, list(task.metrics())
    if asked != "auto" and asked not in known:
        raise RecipeError(
            f"these rows make a problem with the metrics {', '.join(known)}, found {asked}",
            where=loaded.where("evaluation.metric"),
        )


def _warn_overlap(rows: dict[str, Rows], console: Console) -> None:
    counts = {name: Counter(map(_digest, rows[name].records())) for name in ("validation", "test") if name in rows}
    found = dict.fromkeys(counts, 0)
    for row in map(_digest, rows["train"].records() if counts else ()):
        for name, count in counts.items():
            found[name] += count.pop(row, 0)
    for name, both in found.items():
        if both:
            share = 100 * both / len(rows[name])
            console.warn(f"{both} of the {len(rows[name])} {name} rows ({share:.1f} %) are training rows too")


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(repr(row).encode(), digest_size=16).digest()


def say_report(examples: Encoded, name: str, limit: str, console: Console) -> None:
    """Warns of what was cut, left out or unknown on the way from rows to examples.

    Args:
        examples: Of the rows.
        name: Of the split or file.
        limit: From :meth:`ticktune.tasks.task.Task.limit`.
        console: Where to print.
    """
    report, count = examples.report, len(examples.source)
    if report.truncated:
        share = 100 * len(report.truncated) / count
        places = ", ".join(examples.source.where(i) for i in report.truncated[:3])
        cut = f", {report.cut_ends} of them at the end of what is learned" if report.cut_ends else ""
        console.warn(
            f"{name}: {len(report.truncated)} of {count} rows ({share:.1f} %) are longer than "
            f"{limit} and were cut{cut}: {places}"
        )
    if report.unsupervised:
        places = ", ".join(examples.source.where(i) for i in report.unsupervised[:3])
        because = f" ({report.why})" if report.why else ""
        console.warn(
            f"{name}: {len(report.unsupervised)} rows have nothing to learn from{because} and were left out: {places}"
        )
    if report.unknown:
        total = sum(report.unknown.values())
        frequent = sorted(report.unknown, key=lambda item: -report.unknown[item])
        console.warn(
            f"{name}: {total} of {report.items} items ({100 * total / report.items:.1f} %) are unknown to the base, "
            f"{len(frequent)} different ones: {', '.join(frequent[:5])}{', ...' if len(frequent) > 5 else ''}"
        )
