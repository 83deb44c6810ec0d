"""train, evaluate, predict, export: the story, one stage after the other."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ticktune.adapter import TENSORS as ADAPTER_TENSORS
from ticktune.adapter import read_facts, read_tensors
from ticktune.base import (
    BaseFiles,
    load_model,
    load_processor,
    merging_dtype,
    quiet_transformers,
    stored_dtype,
    stored_quantization,
)
from ticktune.console import Console, duration, figure, size_text, table_of
from ticktune.data.read import Rows
from ticktune.errors import (
    DataError,
    ExportError,
    Interrupted,
    MinimumMissed,
    OutputError,
    RecipeError,
    UsageError,
)
from ticktune.evaluate import predict, score
from ticktune.export.save import existing_export, trained_on_lines, verification_of, widening_of, write_merged
from ticktune.export.widen import merge_obstacle
from ticktune.files import (
    check_writable,
    is_locked,
    new_directory,
    remove_directory,
    remove_leftovers,
    save_picture,
    sha256_file,
    working,
    write_json,
    writing,
)
from ticktune.folder import RunFolder, Target, find_target, is_target, output_path
from ticktune.patch.attach import adapter_parameters, attach, attachment_of
from ticktune.prepare import (
    Loaded,
    base_of,
    encode,
    load_target,
    load_trainable,
    prepare,
    usable_rows,
)
from ticktune.quantize import MERGE_WAY_OUT
from ticktune.quantize import merge_obstacle as quantized_obstacle
from ticktune.recipe.load import LoadedRecipe
from ticktune.recipe.schema import Recipe
from ticktune.registry import TASKS
from ticktune.remarks import say_bad_rows, say_report
from ticktune.rows import drift_from_training, evaluation_rows, evidence_of, prediction_rows
from ticktune.session import Schedule, Session, begin, recipe_identity
from ticktune.signals import Signals, StopAsked, watched_signals
from ticktune.ways import build_ways

_PREDICT_BATCH = 32


def train(loaded: LoadedRecipe, console: Console, *, restart: bool = False) -> None:
    """Trains a recipe; the same call again goes on where an interrupted run stopped.

    Args:
        loaded: The recipe.
        console: Where to print.
        restart: Forget what the run folder holds of this run.

    Raises:
        TicktuneError: Of the stage that found a problem; nothing that verified before is lost.
    """
    quiet_transformers()
    refuse_several_processes()
    run = RunFolder(output_path(loaded))
    run.check_foreign()
    if not restart and _is_complete(run) and not is_locked(run.path):
        _say_complete(run, loaded, console)
        return
    with working(run.path), watched_signals() as signals:
        remove_leftovers(run.path)
        if not run.checkpoints.is_symlink():
            remove_leftovers(run.checkpoints)
        if not restart:
            if _is_complete(run):  # since we looked
                _say_complete(run, loaded, console)
                return
            run.check_links()
            _refuse_changed_recipe(run, loaded)
        _train(loaded, run, console, signals, restart)
        _say_result(run, console)


def _is_complete(run: RunFolder) -> bool:
    return bool(run.record().get("status") == "complete")


def _say_complete(run: RunFolder, loaded: LoadedRecipe, console: Console) -> None:
    """Says of a complete run of this recipe what it is; touches no file."""
    run.check_links()
    _refuse_changed_recipe(run, loaded)
    read_facts(run.adapter)
    console.note(f"{run.path}: already complete, nothing to do")
    _say_result(run, console)


def _train(loaded: LoadedRecipe, run: RunFolder, console: Console, signals: Signals, restart: bool) -> None:
    recipe = loaded.recipe
    torch.use_deterministic_algorithms(recipe.training.deterministic)
    try:
        prepared = prepare(loaded, console, signals.poll)
        plan = Schedule.of(recipe.training, prepared.examples["train"].lengths, signals.poll)
        model, fresh = load_trainable(prepared)
        signals.poll()
    except StopAsked as stop:
        raise Interrupted("stopped before the first step", signal_number=stop.number) from None
    attach_as(recipe, model, fresh)
    for note in attachment_of(model).layout.notes:
        console.note(note)
    obstacle = merge_obstacle(attachment_of(model).layout, attachment_of(model).plan)
    if obstacle:
        console.warn(f"the adapter will train, but not merge: {obstacle}")
    stored = stored_quantization(prepared.base)
    if stored is not None:
        console.warn(
            f"the adapter will train, but not merge into this base: {quantized_obstacle(stored)}; {MERGE_WAY_OUT}: "
            "ticktune export --merge --base DIR"
        )
    _check_trainable(model)
    ways = build_ways(prepared, model, console)

    if restart:  # not before: a bad row must not cost the run that it would have replaced
        _forget(run)
    begin(prepared, model, run, console)
    Session(prepared, plan, model, run, console, signals, ways).go()


def attach_as(recipe: Recipe, model: nn.Module, fresh: Sequence[str]) -> None:
    """Attaches what a recipe asks for; see :func:`ticktune.patch.attach.attach`.

    Args:
        recipe: Its ``ticks``, ``norms`` and ``head``, and ``training.fast``.
        model: The base.
        fresh: Parameters that the base's files lack.
    """
    ticks, norms = recipe.ticks, recipe.norms
    attach(
        model,
        ticks.dim,
        ticks.layers,
        norms.train,
        form=ticks.form,
        dropout=ticks.dropout,
        norm_layers=norms.layers,
        head=recipe.head.train,
        fresh=fresh,
        experts=ticks.experts,
        unshare=ticks.unshare,
        seed=recipe.training.seed,
        fast=recipe.training.fast,
    )


def _check_trainable(model: nn.Module) -> None:
    if not any(True for _ in adapter_parameters(model)):
        raise RecipeError("nothing would be trained", fix="give ticks.dim, norms.train or head.train")


def evaluate(
    target_name: str | None,
    console: Console,
    *,
    split: str | None = None,
    data: Path | None = None,
    base: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    minimums: Sequence[str] = (),
    maximums: Sequence[str] = (),
) -> None:
    """Prints the metrics of a run, an adapter or a merged folder.

    Args:
        target_name: See :func:`ticktune.folder.find_target`.
        console: Where to print.
        split: ``train``, ``validation`` or ``test``; None: test, else validation.
        data: A file with answers, instead of a split; with ``train`` as split it may be the training file.
        base: The base, where the recorded one cannot be found.
        device: As ``training.device``; None: as in training.
        precision: As ``training.precision``; None: as in training.
        minimums: ``metric=value``: at least.
        maximums: ``metric=value``: at most.

    Raises:
        MinimumMissed: A metric is outside.
        TicktuneError: Of the stage that found a problem.
    """
    quiet_transformers()
    target = find_target(target_name)
    _say_target(target, target_name, console)
    bounds = [_bound(text, True) for text in minimums] + [_bound(text, False) for text in maximums]
    rows, name = evaluation_rows(target, split, data)
    used = load_target(target, base=base, device=device, precision=precision)
    _warn_stand_in(used, console)
    known = list(used.task.metrics())
    for metric, _, at_least in bounds:
        if metric not in known:
            where = "--min" if at_least else "--max"
            raise UsageError(f"there is no metric {metric} here", where=where, fix=f"one of: {', '.join(known)}")
    if data is not None and split != "train":
        _refuse_training_file(used, rows)
    _warn_changed_rows(used, rows, name, console)
    rows = usable_rows(used.task, rows)
    say_bad_rows(rows, name, console)
    examples = encode(used.task, rows, used.processor_files)
    say_report(examples, name, used.task, console)
    metrics = score(used.model, used.task, examples, used.compute, _PREDICT_BATCH)
    scored = len(rows) - len(examples.report.unsupervised)
    console.result(
        {"split": name, "rows": scored, "metrics": metrics},
        table_of(metrics.items()),
        title=f"{target.name}: {name}, {scored} rows",
    )
    for metric, bound, at_least in bounds:
        value = metrics[metric]
        if not (value >= bound if at_least else value <= bound):
            raise MinimumMissed(
                f"{metric} is {figure(value)}, expected {'at least' if at_least else 'at most'} {bound}"
            )


def predict_rows(
    words: Sequence[str],
    console: Console,
    *,
    standard_input: Callable[[], bytes],
    base: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    draw: Path | None = None,
) -> None:
    """Prints one prediction a row.

    Args:
        words: Perhaps a run, then texts, files, folders or ``-``; none: standard input. See :func:`prediction_rows`.
        console: Where to print.
        standard_input: Reads it.
        base: The base, where the recorded one cannot be found.
        device: As ``training.device``; None: as in training.
        precision: As ``training.precision``; None: as in training.
        draw: A folder that receives each prediction as a picture, named by the row's own picture and its number; where
            it is a mask, that too.

    Raises:
        TicktuneError: Of the stage that found a problem.
    """
    quiet_transformers()
    named = bool(words) and words[0] != "-" and is_target(words[0])
    target = find_target(words[0] if named else None)
    _say_target(target, words[0] if named else None, console)
    words = words[1:] if named else words
    used = load_target(target, base=base, device=device, precision=precision)
    _warn_stand_in(used, console)
    rows = prediction_rows(words, used, standard_input)
    examples = encode(used.task, rows, used.processor_files, labelled=False)
    for number, answer in enumerate(predict(used.model, used.task, examples, used.compute, _PREDICT_BATCH)):
        if draw is not None:
            row = rows.dataset[number]
            picture = used.task.draw(row, answer)  # refused where there are no pictures
            name = f"{Path(row['image']).stem[:100]}-{number + 1}"
            save_picture(picture, draw / f"{name}.png")
            if (mask := used.task.mask(answer)) is not None:
                save_picture(mask, draw / f"{name}-mask.png")
        if rows.by_file:
            name = rows.where(number)
            console.line({rows.files[0]: name, **answer}, f"{name}: {used.task.describe(answer)}")
        else:
            console.line(answer, used.task.describe(answer))


def export(
    target_name: str | None,
    console: Console,
    *,
    merge: bool = False,
    output: Path | None = None,
    dtype: str = "base",
    pad_to: str = "auto",
    express: str = "same",
    force: bool = False,
    base: str | None = None,
    data: Path | None = None,
) -> None:
    """Writes an adapter-only or merged folder, verified by reloading.

    Args:
        target_name: A run, a recipe, or an adapter folder; see :func:`ticktune.folder.find_target`.
        console: Where to print.
        merge: Whether to build the ticks into the base's weights.
        output: The folder to write; None: ``RUN/merged`` with ``merge``, else the adapter stays where it is.
        dtype: Of the merged weights: ``base`` (as the base's files) or a torch dtype's name.
        pad_to: Multiple that merged widths are rounded up to; see :func:`ticktune.export.widen.widen`.
        express: ``same`` architecture, or ``llama``.
        force: Replace an existing folder.
        base: The base, where the recorded one cannot be found.
        data: A file with rows to compare the merged folder on, instead of the run's.

    Raises:
        ExportError: It cannot be merged, or the result is not equal; nothing is left behind.
        OutputError: The folder exists.
    """
    quiet_transformers()
    target = find_target(target_name)
    if target.kind == "merged":
        raise UsageError("this folder is merged already", where=str(target.path))
    _say_target(target, target_name, console)
    with watched_signals() as signals:
        try:
            if merge:
                wanted = _Wanted(output, dtype, pad_to, express, force, base, data)
                _export_merged(target, wanted, console, signals)
            else:
                _export_adapter(target, console, output, force, base)
        except StopAsked as stop:
            raise Interrupted("stopped; nothing was written", signal_number=stop.number) from None


def _export_adapter(target: Target, console: Console, output: Path | None, force: bool, base: str | None) -> None:
    facts = read_facts(target.path)
    if facts.task is not None:
        _warn_stand_in(load_target(target, base=base), console)
    place = target.path
    if output is not None:
        _refuse_source(output, target.path)
        import shutil

        files = [file for file in target.path.iterdir() if file.is_file() and file.name != "manifest.json"]
        needed = sum(file.stat().st_size for file in files)
        with new_directory(output, replace=force, needed=needed) as temporary:
            for file in files:
                shutil.copyfile(file, temporary / file.name)
        read_facts(output)
        place = output
    size = sum(f.stat().st_size for f in place.iterdir())
    console.result(
        {"adapter": str(place), "bytes": size, "verified": True},
        [["adapter", "size", "verified"], [str(place), size_text(size), "yes"]],
    )


@dataclass(frozen=True)
class _Wanted:
    """How a merged folder is asked for; the fields are those of :func:`export`."""

    output: Path | None
    dtype: str
    pad_to: str
    express: str
    force: bool
    base: str | None
    data: Path | None


def _export_merged(target: Target, wanted: _Wanted, console: Console, signals: Signals) -> None:
    place = wanted.output or (target.run.merged if target.run else target.path.parent / "merged")
    facts = read_facts(target.path)
    files = base_of(facts, target.recipe(), wanted.base)
    _refuse_source(place, target.path)
    _refuse_source(place, files.directory)
    own_dtype = stored_dtype(files) if wanted.dtype == "base" else wanted.dtype
    identity = sha256_file(target.path / ADAPTER_TENSORS)
    if place.exists() and not wanted.force:
        found = existing_export(place, identity, own_dtype, wanted.pad_to, wanted.express)
        if found is None:
            raise OutputError(
                "it exists already", where=str(place), fix="add --force to replace it, or choose another -o"
            )
        console.note(f"{place}: already a verified export of this adapter")
        _warn_weak_proof(found, console)
        _say_export(place, found, console)
        return
    _refuse_quantized(files)
    rows, split = evaluation_rows(target, data=wanted.data, else_train=True)
    if split == "train":
        console.note("there are no test or validation rows: the merged folder is compared on training rows")
    check_writable(place.absolute().parent)
    work = merging_dtype(files)
    used = load_target(target, base=wanted.base, device="cpu", precision="fp32", dtype=work, full_precision=True)
    _warn_stand_in(used, console)
    signals.poll()
    evidence = evidence_of(rows, used)
    signals.poll()
    trained_on = drift_from_training(target, wanted.base, evidence)
    signals.poll()
    stock, _ = load_model(files, str(facts.model_class), dtype=work, config=used.task.config())
    assert facts.task is not None
    processor = load_processor(files, TASKS[facts.task["name"]].processor)
    document = write_merged(
        place,
        stock,
        used.task.saved_processor(processor),
        read_tensors(target.path),
        facts,
        evidence,
        dtype=own_dtype,
        adapter_sha256=identity,
        pad_to=wanted.pad_to,
        express=wanted.express,
        keep_exact=own_dtype == stored_dtype(files),
        replace=wanted.force,
        trained_on=trained_on,
        extra_files=used.task.extra_files(files.directory),
        poll=signals.poll,
    )
    _warn_weak_proof(document, console)
    _say_export(place, document, console)


def refuse_several_processes() -> None:
    """Refuses a distributed launch: one device for now.

    Raises:
        RecipeError: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() not in ("", "0", "1"):
        raise RecipeError(
            f"WORLD_SIZE is {size}: ticktune trains on one device for now, several come later",
            where="environment",
            fix="start one process, without torchrun, or unset WORLD_SIZE",
        )


def _bound(text: str, at_least: bool) -> tuple[str, float, bool]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value), at_least
    except ValueError:
        option = "--min" if at_least else "--max"
        raise UsageError(
            f"expected {option} metric=number, found {text!r}", fix=f"write e.g. {option} accuracy=0.9"
        ) from None


def _refuse_changed_recipe(run: RunFolder, loaded: LoadedRecipe) -> None:
    before = run.record().get("recipe")
    if before is None:
        return
    now = recipe_identity(loaded, run)
    keys = sorted(
        key
        for key in before.keys() | now.keys()
        # A key that the version which began the run did not know yet had the effect of its default.
        if before.get(key) != now.get(key) and (key in before or loaded.says(key))
    )
    if keys:
        changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)
        raise OutputError(
            f"this folder holds a run of another recipe: {changes}",
            where=str(run.path),
            fix="choose another output, undo the change, or start over with --restart",
        )


def _forget(run: RunFolder) -> None:
    """Removes a run, checkpoints first: if this is cut off, no other recipe goes on from them."""
    for folder in (run.checkpoints, run.adapter):
        if folder.is_dir() and not folder.is_symlink():
            remove_directory(folder)
        else:
            with writing(folder):
                folder.unlink(missing_ok=True)  # of a link, the link alone
    write_json(run.record_path, {"status": "restarted"})  # it stays: without a record this would be no run's folder
    for file in (run.metrics_path, run.report_path, run.recipe_path):
        with writing(file):
            file.unlink(missing_ok=True)


def _refuse_training_file(used: Loaded, rows: Rows) -> None:
    trained_on = used.facts.training.get("data", {}).get("train")
    if trained_on is not None and trained_on["sha256"] == rows.sha256:
        raise DataError(
            "these are the training rows: a score on them says little of other rows",
            where=rows.source,
            fix="name other rows, or add --split train to measure these all the same",
        )


def _warn_changed_rows(used: Loaded, rows: Rows, name: str, console: Console) -> None:
    recorded = used.facts.training.get("data", {}).get(name)
    if recorded is not None and recorded["sha256"] != rows.sha256:
        console.warn(f"the {name} rows are not those of the training run: {rows.source} has changed")


def _refuse_quantized(files: BaseFiles) -> None:
    method = stored_quantization(files)
    if method is not None:
        raise ExportError(
            f"this adapter cannot be merged: {quantized_obstacle(method)}",
            where=f"base.model {files.name}",
            fix=f"{MERGE_WAY_OUT}: --base DIR",
        )


def _warn_stand_in(used: Loaded, console: Console) -> None:
    if used.stands_in and used.base is not None:
        console.warn(
            f"the adapter was trained on the quantised base {used.facts.base['name']}; {used.base.name} stands in for "
            "it: its shapes fit, and nothing else can be checked"
        )


def _refuse_source(place: Path, source: Path) -> None:
    if place.exists() and source.exists() and place.resolve() == source.resolve():
        raise UsageError("this folder is the source itself", where=str(place), fix="choose another -o")


def _say_target(target: Target, named: str | None, console: Console) -> None:
    if named is None:
        console.note(f"using {target.name}")


def _say_result(run: RunFolder, console: Console) -> None:
    record = run.record()
    base, tuned = record["base_metrics"], record["metrics"]
    share = 100 * record["trained_parameters"] / (record["trained_parameters"] + record["base_parameters"])
    document = {
        "run": str(run.path),
        "status": record["status"],
        "steps": record["steps"],
        "chosen_step": record["chosen_step"],
        "metric": record["metric"],
        "metrics": tuned,
        "base_metrics": base,
        "trained_parameters": record["trained_parameters"],
        "adapter": str(run.adapter),
        "seconds": record["training_seconds"],
    }
    rows = [["validation", "before", "after"]]
    rows += [
        [name, figure(base[name]), figure(tuned[name])]
        for name in tuned
        if tuned[name] is not None and base.get(name) is not None
    ]
    console.result(
        document,
        rows,
        title=f"{run.path}: {record['trained_parameters']:,} trained parameters ({share:.2f} %), "
        f"{record['steps']} steps in {duration(record['training_seconds'])}",
    )


def _warn_weak_proof(document: dict[str, Any], console: Console) -> None:
    if not document["verification"]["is_conclusive"]:
        console.warn(
            "the ticks and norms change the logits too little for the comparison to prove anything: "
            f"{document['verification']['effect']:.2e}"
        )
    if idle := verification_of(document).idle_text():
        console.warn(idle)


def _say_export(place: Path, document: dict[str, Any], console: Console) -> None:
    found = verification_of(document)
    rows = [["merged", str(place)], *map(list, found.lines())]
    if document["as"] != "same":
        rows.append(["written as", document["as"]])
    rows += [[widening.field, widening.text()] for widening in widening_of(document)]
    if document["cast"]:
        cast = document["cast"]
        rows.append([f"cast to {cast['dtype']}: max |Δ logit|", f"{cast['max_difference']:.2e}"])
        rows.append(["predictions changed by the cast", f"{cast['changed']}/{cast['decisions']}"])
    rows += map(list, trained_on_lines(document))
    shown = {k: document[k] for k in ("dtype", "as", "pad_to", "widths", "widening", "verification", "cast")}
    shown["trained_on"] = document.get("trained_on") or {}
    console.result({"merged": str(place), **shown}, rows)
