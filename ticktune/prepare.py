"""Recipe -> rows, task, examples and base: everything that stands before a model is trained or used."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter
from torch import nn

from ticktune.adapter import AdapterFacts, attach_adapter, check_base, parse_facts, read_facts, shapes_fingerprint
from ticktune.base import (
    BaseFiles,
    check_vocabulary,
    code_not_run,
    fingerprint,
    load_config,
    load_model,
    load_processor,
    locate_base,
    padded_with,
    stored_quantization,
    training_dtype,
    without_weights,
)
from ticktune.console import Console
from ticktune.data.audit import audit
from ticktune.data.batches import split_rows
from ticktune.data.encode import Encoded, encode_rows, processor_identity
from ticktune.data.read import BadRows, Rows, read_rows
from ticktune.device import Compute, check_compiler, check_graphs, choose_compute
from ticktune.errors import BaseModelError, CheckpointError, DataError, Problem, RecipeError, UsageError, first_line
from ticktune.export.save import FACTS as MERGED_FACTS
from ticktune.files import read_json, verify_directory
from ticktune.folder import Target
from ticktune.patch.attach import unquantized_modules
from ticktune.patch.segments import has_kernel
from ticktune.quantize import check_possible, is_coded, loading_arguments
from ticktune.recipe.load import LoadedRecipe
from ticktune.recipe.schema import Data, Source
from ticktune.registry import TASKS
from ticktune.remarks import say_bad_rows, say_counts, say_report
from ticktune.tasks.task import Task, TaskOptions, build_task, restore_task

Poll = Callable[[], None]
_CHECKED = 1024  # rows that are checked at once where some may be left out


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
        report: Split -> counts of what is odd about its rows.
        examples: Split -> examples.
    """

    loaded: LoadedRecipe
    compute: Compute
    base: BaseFiles
    dtype: str
    processor: Any
    task: Task
    rows: dict[str, Rows]
    report: dict[str, dict[str, int]] = field(default_factory=dict)
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
    if recipe.training.compile:
        check_compiler(compute.device, loaded.where("training.compile"))
    if recipe.training.cuda_graphs:
        check_graphs(compute.device, loaded.where("training.cuda_graphs"))
    if recipe.training.padding_free and recipe.training.compile and not has_kernel(compute):
        raise RecipeError(
            "without padding, compiled layers would have a graph for each batch here",
            where=loaded.where("training.padding_free"),
            fix="switch one of padding_free and compile off",
        )
    rows = read_splits(loaded, poll)
    _refuse_training_rows(loaded, rows)
    base = _locate_base(loaded)
    method = stored_quantization(base)
    check_possible("none", compute.device, stored=method, where=f"base.model {base.name}")
    if recipe.base.quantize != "none" and method is not None:
        raise RecipeError(
            f"the files of {base.name} are quantised already (by {method}), found {recipe.base.quantize}",
            where=loaded.where("base.quantize"),
            fix="set base.quantize: none, or name the full-precision model",
        )
    row = TASKS[recipe.task]
    processor = load_processor(base, row.processor)
    if own := code_not_run(base):
        console.note(own)
    if pad := padded_with(processor):
        console.note(f"{base.name}: its tokenizer has no pad token, so {pad} fills up short rows, where it is masked")
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
    task, rows["train"] = _build(recipe.task, options, train, processor, load_config(base))
    for name in rows:
        rows[name] = usable_rows(task, rows[name])
        say_bad_rows(rows[name], name, console)
    _check_metric(loaded, task)
    report = audit(rows, row, _control_tokens(processor) if row.processor == "tokenizer" else None)
    for name, counts in report.items():
        say_counts(counts, name, len(rows[name]), console)
        counts["left_out"] = len(rows[name].bad)
    dtype = training_dtype(recipe.base.dtype, base, compute.precision, compute.device.type)
    prepared = Prepared(loaded, compute, base, dtype, processor, task, rows, report)
    for name in ("train", "validation"):
        if name in rows:
            examples = encode(task, rows[name], base.directory, poll=poll)
            say_report(examples, name, task, console)
            report[name] |= {"cut": len(examples.report.truncated), "unsupervised": len(examples.report.unsupervised)}
            prepared.examples[name] = examples
    _refuse_endless(prepared.examples["train"], task)
    return prepared


def _build(name: str, options: TaskOptions, rows: Rows, processor: Any, base_config: Any) -> tuple[Task, Rows]:
    """The task, and the training rows that it is made from."""
    bad = BadRows(rows.max_bad, rows.bad)
    numbers: Sequence[int] = range(len(rows))
    while True:
        chosen = _chosen(rows, numbers)
        try:
            task = build_task(name, options, chosen.records(), chosen.where, processor, base_config)
        except DataError as error:
            numbers = _without(error, chosen, numbers, bad)
            if not numbers:
                raise
        else:
            return task, replace(chosen, bad=tuple(bad.found))


def usable_rows(task: Task, rows: Rows) -> Rows:
    """The rows that the task does not refuse, where some may be left out.

    Raises:
        DataError: Of the first row that may not be left out.
    """
    if not rows.max_bad:
        task.check(rows.records(), rows.where)
        return rows
    bad, kept = BadRows(rows.max_bad, rows.bad), list[int]()
    for start in range(0, len(rows), _CHECKED):
        numbers: Sequence[int] = range(start, min(start + _CHECKED, len(rows)))
        while numbers:
            part = rows.select(numbers)
            try:
                task.check(part.records(), part.where)
                break
            except DataError as error:
                numbers = _without(error, part, numbers, bad)
        kept += numbers
    if not kept:
        raise DataError(bad.found[:1])
    return replace(_chosen(rows, kept), bad=tuple(bad.found))


def _without(error: DataError, rows: Rows, numbers: Sequence[int], bad: BadRows) -> list[int]:
    """The numbers without that of the row that an error is about; an error about no row is raised."""
    place = rows.find(error.problems[0].where)
    if place is None:
        raise error
    bad.leave_out(error)
    return [*numbers[:place], *numbers[place + 1 :]]


def _chosen(rows: Rows, numbers: Sequence[int]) -> Rows:
    return rows if len(numbers) == len(rows) else rows.select(numbers)


def _refuse_training_rows(loaded: LoadedRecipe, rows: dict[str, Rows]) -> None:
    """Refuses validation and test rows that are read from the training file."""
    if loaded.recipe.data.allow_training_rows:
        return
    for name in ("validation", "test"):
        source = getattr(loaded.recipe.data, name)
        if name in rows and source.fraction is None and rows[name].sha256 == rows["train"].sha256:
            raise DataError(
                f"these are the training rows: {rows[name].source} holds the same as {rows['train'].source}",
                where=loaded.where(f"data.{name}"),
                fix="name other rows, or {fraction: 0.1}; to measure the training rows all the same, set "
                "data.allow_training_rows: true",
            )


def _locate_base(loaded: LoadedRecipe) -> BaseFiles:
    """Finds the base; an error names its place in the recipe."""
    base = loaded.recipe.base
    try:
        return locate_base(base.model, revision=base.revision, relative_to=loaded.path.parent)
    except BaseModelError as error:
        place = loaded.where("base.model")
        own = f"base.model {base.model}"
        problems = [
            Problem(p.message, f"{place} {base.model}" if p.where == own else f"{p.where} ({place})", p.fix)
            for p in error.problems
        ]
        raise type(error)(problems) from error


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds a tokenizer's control tokens in a text; its mask and unknown tokens are for people to write."""
    written = {tokenizer.mask_token, tokenizer.unk_token}
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - written
    return re.compile("|".join(map(re.escape, sorted(tokens)))) if tokens else None


def _refuse_endless(examples: Encoded, task: Task) -> None:
    """Refuses to train a model that writes and would never learn to stop."""
    report = examples.report
    if report.ends != 0:
        return
    if report.cut_ends:
        reason = f"all of them lost their end when they were cut to {task.limit()}"
        fix = "raise data.max_length"
    else:
        reason = "the chat template puts no control token behind an answer"
        fix = "use prompt and response columns, or a base whose chat template ends each turn"
    raise DataError(f"no row shows the model where to stop: {reason}", where=examples.source.source, fix=fix)


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
            rows[name] = replace(train.select([left[i] for i in chosen]), bad=())
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
    facts = facts_with_task(target)
    assert facts.task is not None
    assert facts.model_class is not None
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
        attach_adapter(model, target.path, facts, fast=loaded.recipe.training.fast if loaded else True)
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


def facts_with_task(target: Target) -> AdapterFacts:
    """As :func:`facts_of`, of an adapter that a recipe trained.

    Raises:
        CheckpointError: As there.
        UsageError: The adapter was saved in Python, and knows no task.
    """
    facts = facts_of(target)
    if facts.task is None or facts.model_class is None:
        raise UsageError(
            "the adapter was saved without a task, so there is nothing to evaluate it by",
            where=str(target.path),
            fix="use ticktune.load_adapter in Python",
        )
    return facts


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
            max_bad=data.max_bad_rows if data.on_bad_row == "skip" else 0,
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
    asked = loaded.recipe.evaluation.metric
    if asked == "auto":
        return  # the metrics' package takes a second to import
    known = list(task.metrics())
    if asked not in known:
        raise RecipeError(
            f"these rows make a problem with the metrics {', '.join(known)}, found {asked}",
            where=loaded.where("evaluation.metric"),
        )
