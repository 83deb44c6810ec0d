"""train, evaluate, predict, export: the story, one stage after the other."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticktune import checkpoint
from ticktune.adapter import TENSORS as ADAPTER_TENSORS
from ticktune.adapter import describe_adapter, read_facts, read_tensors, write_adapter
from ticktune.base import fingerprint, load_model, load_tokenizer, quiet_transformers, stored_dtype
from ticktune.console import Console, duration, figure, table_of
from ticktune.data.batches import epoch_batches, micro_batches
from ticktune.data.read import Rows, build_rows
from ticktune.device import Compute, describe
from ticktune.errors import (
    DataError,
    Interrupted,
    MinimumMissed,
    OutputError,
    RecipeError,
    ResourceError,
    UsageError,
)
from ticktune.evaluate import compute_metrics, is_better, logits_of, predict, score
from ticktune.export.save import Evidence, existing_export, verification_of, write_merged
from ticktune.export.widen import merge_obstacle
from ticktune.files import (
    append_line,
    check_writable,
    lock,
    new_directory,
    remove_leftovers,
    sha256_file,
    sha256_json,
)
from ticktune.folder import RunFolder, Target, find_target, is_target, output_path, result_relevant
from ticktune.patch.attach import adapter_parameters, adapter_state, attach, attachment_of, load_adapter_state
from ticktune.prepare import (
    Loaded,
    Prepared,
    base_of,
    encode,
    facts_of,
    load_target,
    load_trainable,
    prepare,
    read_file,
    read_splits,
)
from ticktune.recipe.load import LoadedRecipe, load_recipe
from ticktune.registry import TASKS
from ticktune.report.card import adapter_card
from ticktune.signals import Signals, StopAsked, watched_signals
from ticktune.tasks.task import Batch
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.steps import StepReport, train_steps
from ticktune.versions import versions

_VERIFY_VALUES = 60_000_000  # logits compared at export: enough rows for a proof, few enough to hold twice
_VERIFY_ROWS = 1024
_PREDICT_BATCH = 32


def train(recipe_path: Path, overrides: Sequence[str], console: Console, *, restart: bool = False) -> None:
    """Trains a recipe; the same call again goes on where an interrupted run stopped.

    Args:
        recipe_path: The recipe.
        overrides: ``key=value`` from the command line.
        console: Where to print.
        restart: Forget what the run folder holds of this run.

    Raises:
        TicktuneError: Of the stage that found a problem; nothing that verified before is lost.
    """
    quiet_transformers()
    loaded = load_recipe(recipe_path, overrides)
    refuse_several_processes()
    run = RunFolder(output_path(loaded))
    run.check_foreign()
    check_writable(run.path)
    with lock(run.path), watched_signals() as signals:
        remove_leftovers(run.path)
        remove_leftovers(run.checkpoints)
        if restart:
            _forget(run)
        record = run.record()
        _refuse_changed_recipe(run, record, loaded)
        if record.get("status") == "complete":
            console.note(f"{run.path}: already complete, nothing to do")
            _say_result(run, console)
            return
        _train(loaded, run, console, signals)
        _say_result(run, console)


def _train(loaded: LoadedRecipe, run: RunFolder, console: Console, signals: Signals) -> None:
    recipe = loaded.recipe
    torch.use_deterministic_algorithms(recipe.training.deterministic)
    try:
        prepared = prepare(loaded, console, signals.poll)
        model, fresh = load_trainable(prepared)
        signals.poll()
    except StopAsked as stop:
        raise Interrupted("stopped before the first step", signal_number=stop.number) from None
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
        seed=recipe.training.seed,
    )
    obstacle = merge_obstacle(attachment_of(model).layout, attachment_of(model).plan)
    if obstacle:
        console.warn(f"the adapter will train, but not merge: {obstacle}")
    _check_trainable(model)

    hashes = _hashes(prepared, model)
    record = run.record()
    _refuse_changed_inputs(run, record, hashes)
    if not record:
        run.write_recipe(loaded)
        run.update(**_first_record(prepared, model, hashes))
    session = _Session(prepared, model, run, console, signals)
    session.go()


def _check_trainable(model: nn.Module) -> None:
    if not any(True for _ in adapter_parameters(model)):
        raise RecipeError("nothing would be trained", fix="give ticks.dim, norms.train or head.train")


@dataclass
class _Schedule:
    """How a run divides into steps."""

    per_epoch: int
    total: int

    @classmethod
    def of(cls, recipe: Any, examples: int) -> "_Schedule":
        per_epoch = math.ceil(examples / recipe.training.batch_size)
        steps = recipe.training.steps
        return cls(per_epoch, steps if steps is not None else per_epoch * (recipe.training.epochs or 3))

    def due(self, step: int, every: Any) -> bool:
        period = self.per_epoch if every == "epoch" else every
        return bool(step % period == 0)


class _Session:
    """One stretch of training, from the newest checkpoint or the beginning to the end or a stop."""

    def __init__(
        self, prepared: Prepared, model: nn.Module, run: RunFolder, console: Console, signals: Signals
    ) -> None:
        self.prepared, self.model, self.run, self.console, self.signals = (
            prepared,
            model,
            run,
            console,
            signals,
        )
        self.recipe = prepared.loaded.recipe
        self.compute: Compute = prepared.compute
        self.optimizer = build_optimizer(adapter_parameters(model), self.recipe.optimizer)
        self.scaler = self.compute.scaler()
        self.plan = _Schedule.of(self.recipe, len(prepared.examples["train"]))
        self.progress = checkpoint.Progress()
        self.best: dict[str, Tensor] | None = None
        row = TASKS[self.recipe.task]
        asked = self.recipe.evaluation.metric
        self.metric = prepared.task.default_metric if asked == "auto" else asked
        self.more_is_better = row.metrics[self.metric]
        micro = self.recipe.training.micro_batch_size or self.recipe.training.batch_size
        self.micro_batch_size = micro
        self.evaluation_batch = self.recipe.evaluation.batch_size or max(32, micro)

    def go(self) -> None:
        newest = checkpoint.newest_valid(self.run.checkpoints)
        if newest is not None:
            self.progress, self.best = checkpoint.restore_checkpoint(
                newest, self.model, self.optimizer, self.scaler
            )
            self.console.note(
                f"{self.run.path}: going on after step {self.progress.step} of {self.plan.total}"
            )
        self.run.trim_metrics(self.progress.step)
        self.run.update(status="running")
        try:
            if not self.progress.history:
                self._evaluate(first=True)
            with _memory_named(self.recipe):
                self._steps()
        except StopAsked as stop:
            raise self._interrupted(stop) from None
        self._finish()

    def _steps(self) -> None:
        started = time.monotonic()
        first = self.progress.step
        reports = train_steps(
            self.model,
            [(key, parameter) for key, _, parameter in adapter_parameters(self.model)],
            self.prepared.task,
            self._batches(first),
            self.optimizer,
            self.scaler,
            self.compute,
            lr_factor=lambda step: lr_factor(step, self.plan.total, self.recipe.schedule),
            clip=self.recipe.optimizer.clip,
            seed=self.recipe.training.seed,
            base_dropout=self.recipe.base.dropout == "keep",
            first_step=first,
        )
        with self.console.progress(self.plan.total, first) as bar:
            for report in reports:
                self._account(report)
                self._show(bar, report, first, started)
                is_last = report.step == self.plan.total
                if is_last or self.plan.due(report.step, self.recipe.evaluation.every):
                    self._evaluate(bar=bar)
                stop_early = self._out_of_patience()
                if is_last or stop_early or self.plan.due(report.step, self.recipe.checkpoints.every):
                    self._save()
                if stop_early:
                    bar.note(
                        f"no better {self.metric} in {self.progress.bad_evaluations} evaluations: stopping"
                    )
                    return

    def _batches(self, first: int) -> Iterator[list[Batch]]:
        examples, task = self.prepared.examples["train"], self.prepared.task
        training = self.recipe.training
        step, epoch = first, first // self.plan.per_epoch
        while step < self.plan.total:
            order = epoch_batches(examples.lengths, training.batch_size, seed=training.seed, epoch=epoch)
            for batch in order[step - epoch * self.plan.per_epoch :]:
                if step >= self.plan.total:
                    return
                yield [
                    task.collate(examples.take(part)) for part in micro_batches(batch, self.micro_batch_size)
                ]
                self.signals.poll()
                step += 1
            epoch += 1

    def _account(self, report: StepReport) -> None:
        progress = self.progress
        progress.step = report.step
        progress.skipped += report.skipped
        progress.seconds += report.seconds
        progress.rows += report.rows
        if report.step % self.recipe.logging.every == 0 or report.step in (1, self.plan.total):
            entry: dict[str, Any] = {
                "step": report.step,
                "epoch": round(report.step / self.plan.per_epoch, 4),
                "loss": report.loss,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "rows_per_second": round(report.rows / report.seconds, 2),
            }
            if self.scaler.is_enabled():
                entry |= {"scale": report.scale, "skipped": progress.skipped}
            append_line(self.run.metrics_path, entry)

    def _show(self, bar: Any, report: StepReport, first: int, started: float) -> None:
        done = report.step - first
        left = (time.monotonic() - started) / done * (self.plan.total - report.step)
        speed = report.rows / report.seconds
        bar.step(report.step, f"loss {report.loss:.4f}  lr {report.lr:.2e}  {speed:.0f} rows/s", left)

    def _evaluate(self, *, first: bool = False, bar: Any = None) -> None:
        examples = self.prepared.examples.get("validation")
        progress = self.progress
        if examples is None:
            if first:
                progress.history = [{"step": 0, "split": None, "metrics": {}}]
            return
        metrics = score(
            self.model, self.prepared.task, examples, self.compute, self.evaluation_batch, self.signals.poll
        )
        entry = {"step": progress.step, "split": "validation", "metrics": metrics}
        progress.history.append(entry)
        append_line(self.run.metrics_path, entry)
        value = metrics[self.metric]
        if is_better(value, progress.best_score, self.more_is_better):
            progress.best_score, progress.best_step, progress.bad_evaluations = value, progress.step, 0
            self.best = {key: tensor.cpu().clone() for key, tensor in adapter_state(self.model).items()}
        else:
            progress.bad_evaluations += 1
        shown = "  ".join(f"{name} {figure(number)}" for name, number in metrics.items())
        say = bar.note if bar else self.console.note
        say(f"step {progress.step}: validation {shown}")

    def _out_of_patience(self) -> bool:
        patience = self.recipe.evaluation.patience
        return patience is not None and self.progress.bad_evaluations >= patience

    def _save(self) -> Path:
        return checkpoint.save_checkpoint(
            self.run.checkpoints,
            self.model,
            self.optimizer,
            self.scaler,
            self.progress,
            self.best,
            keep=self.recipe.checkpoints.keep,
        )

    def _interrupted(self, stop: StopAsked) -> Interrupted:
        started = time.monotonic()
        saved = self._save()
        self.run.update(status="interrupted")
        seconds = time.monotonic() - started
        return Interrupted(
            f"stopped after step {self.progress.step} of {self.plan.total}; saved as {saved} in {seconds:.1f} s",
            signal_number=stop.number,
            fix="run the same command again to go on",
        )

    def _finish(self) -> None:
        progress = self.progress
        tensors = adapter_state(self.model)
        step, history = progress.step, [e for e in progress.history if e["split"]]
        if self.recipe.evaluation.save == "best" and self.best is not None and progress.best_step is not None:
            tensors, step = self.best, progress.best_step
        metrics = next((e["metrics"] for e in reversed(history) if e["step"] == step), {})
        facts = describe_adapter(
            self.model,
            self.run.record()["base"],
            model_class=self.prepared.task.auto_class,
            task=self.prepared.task_facts(),
        )
        facts.training = {
            "step": step,
            "seed": self.recipe.training.seed,
            "precision": self.compute.precision,
            "recipe_sha256": sha256_json(result_relevant(self.recipe)),
            "data": {name: {"rows": len(r), "sha256": r.sha256} for name, r in self.prepared.rows.items()},
            "metrics_split": "validation" if metrics else None,
            "metrics": metrics,
            "versions": versions(),
        }
        write_adapter(self.run.adapter, tensors, facts, adapter_card(asdict(facts)))
        self.run.update(
            status="complete",
            finished_at=_now(),
            steps=progress.step,
            chosen_step=step,
            metric=self.metric,
            metrics=metrics,
            base_metrics=history[0]["metrics"] if history else {},
            history=history,
            skipped_steps=progress.skipped,
            training_seconds=round(progress.seconds, 3),
            rows_per_second=round(progress.rows / max(progress.seconds, 1e-9), 2),
        )


def evaluate(
    target_name: str | None,
    console: Console,
    *,
    split: str | None = None,
    data: Path | None = None,
    base: str | None = None,
    minimums: Sequence[str] = (),
    maximums: Sequence[str] = (),
) -> None:
    """Prints the metrics of a run, an adapter or a merged folder.

    Args:
        target_name: See :func:`ticktune.folder.find_target`.
        console: Where to print.
        split: ``train``, ``validation`` or ``test``; None: test, else validation.
        data: A file with answers, instead of a split.
        base: The base, where the recorded one cannot be found.
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
    rows, name = _evaluation_rows(target, split, data)
    used = load_target(target, base=base)
    used.task.check(rows.as_list(), rows.where)
    examples = encode(used.task, rows, used.tokenizer_files)
    metrics = score(used.model, used.task, examples, used.compute, _PREDICT_BATCH)
    for metric, _, _ in bounds:
        if metric not in metrics:
            raise UsageError(
                f"there is no metric {metric} here", where="--min", fix=f"one of: {', '.join(metrics)}"
            )
    shown = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    console.result(
        {"split": name, "rows": len(rows), "metrics": shown},
        table_of(metrics.items()),
        title=f"{target.name}: {name}, {len(rows)} rows",
    )
    for metric, bound, at_least in bounds:
        value = metrics[metric]
        if not (value >= bound if at_least else value <= bound):
            raise MinimumMissed(
                f"{metric} is {figure(value)}, expected {'at least' if at_least else 'at most'} {bound}"
            )


def predict_rows(
    words: Sequence[str], console: Console, *, lines: Callable[[], str] = lambda: "", base: str | None = None
) -> None:
    """Prints one prediction a row.

    Args:
        words: Perhaps a run, then texts, one file, or ``-``; none: standard input.
        console: Where to print.
        lines: Reads standard input.
        base: The base, where the recorded one cannot be found.

    Raises:
        TicktuneError: Of the stage that found a problem.
    """
    quiet_transformers()
    named = bool(words) and words[0] != "-" and is_target(words[0])
    target = find_target(words[0] if named else None)
    _say_target(target, words[0] if named else None, console)
    words = words[1:] if named else words
    used = load_target(target, base=base)
    rows = _prediction_rows(words, used, lines)
    examples = encode(used.task, rows, used.tokenizer_files, labelled=False)
    for answer in predict(used.model, used.task, examples, used.compute, _PREDICT_BATCH):
        console.line(answer, _answer_text(answer))


def export(
    target_name: str | None,
    console: Console,
    *,
    merge: bool = False,
    output: Path | None = None,
    dtype: str = "base",
    force: bool = False,
    base: str | None = None,
) -> None:
    """Writes an adapter-only or merged folder, verified by reloading.

    Args:
        target_name: A run, a recipe, or an adapter folder; see :func:`ticktune.folder.find_target`.
        console: Where to print.
        merge: Whether to build the ticks into the base's weights.
        output: The folder to write; None: ``RUN/merged`` with ``merge``, else the adapter stays where it is.
        dtype: Of the merged weights: ``base`` (as the base's files) or a torch dtype's name.
        force: Replace an existing folder.
        base: The base, where the recorded one cannot be found.

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
                _export_merged(target, console, output, dtype, force, base, signals)
            else:
                _export_adapter(target, console, output, force, base)
        except StopAsked as stop:
            raise Interrupted("stopped; nothing was written", signal_number=stop.number) from None


def _export_adapter(
    target: Target, console: Console, output: Path | None, force: bool, base: str | None
) -> None:
    facts = read_facts(target.path)
    if facts.task is not None:
        load_target(target, base=base)
    place = target.path
    if output is not None:
        _refuse_source(output, target.path)
        import shutil

        with new_directory(output, replace=force) as temporary:
            for file in target.path.iterdir():
                if file.is_file() and file.name != "manifest.json":
                    shutil.copyfile(file, temporary / file.name)
        read_facts(output)
        place = output
    size = sum(f.stat().st_size for f in place.iterdir())
    console.result(
        {"adapter": str(place), "bytes": size, "verified": True},
        [["adapter", "size", "verified"], [str(place), f"{size / 1e6:.1f} MB", "yes"]],
    )


def _export_merged(
    target: Target,
    console: Console,
    output: Path | None,
    dtype: str,
    force: bool,
    base: str | None,
    signals: Signals,
) -> None:
    place = output or (target.run.merged if target.run else target.path.parent / "merged")
    facts = read_facts(target.path)
    files = base_of(facts, target.recipe(), base)
    _refuse_source(place, target.path)
    _refuse_source(place, files.directory)
    own_dtype = stored_dtype(files) if dtype == "base" else dtype
    identity = sha256_file(target.path / ADAPTER_TENSORS)
    if place.exists():
        found = existing_export(place, identity, own_dtype)
        if found is not None and not force:
            console.note(f"{place}: already a verified export of this adapter")
            _say_export(place, found, console)
            return
        if not force:
            raise OutputError(
                "it exists already", where=str(place), fix="add --force to replace it, or choose another -o"
            )
    check_writable(place.absolute().parent)
    fp32 = Compute(torch.device("cpu"), "fp32")
    used = load_target(target, base=base, compute=fp32, dtype="float32")
    signals.poll()
    evidence = _evidence(target, used, fp32)
    signals.poll()
    stock, _ = load_model(files, str(facts.model_class), dtype="float32", config=used.task.config())
    document = write_merged(
        place,
        stock,
        load_tokenizer(files),
        read_tensors(target.path),
        facts,
        evidence,
        dtype=own_dtype,
        adapter_sha256=identity,
        replace=force,
    )
    if not document["verification"]["is_conclusive"]:
        console.warn(
            "the ticks and norms change the logits too little for the comparison to prove anything: "
            f"{document['verification']['effect']:.2e}"
        )
    _say_export(place, document, console)


def _evidence(target: Target, used: Loaded, compute: Compute) -> Evidence:
    rows, _ = _evaluation_rows(target, None, None)
    examples = encode(used.task, rows, used.tokenizer_files)
    per_position = (
        getattr(used.model.config, "vocab_size", 1) if used.facts.task["name"] == "causal-lm" else 0
    )  # type: ignore[union-attr, index]
    numbers: list[int] = []
    budget = _VERIFY_VALUES
    for number in range(min(len(examples), _VERIFY_ROWS)):
        budget -= examples.lengths[number] * per_position
        if budget < 0 and numbers:
            break
        numbers.append(number)
    batches = [used.task.collate(examples.take(part)) for part in micro_batches(numbers, 16)]
    ours = logits_of(used.model, used.task, batches, compute)
    with _without_ticks(used.model):
        base = logits_of(used.model, used.task, batches, compute)

    def metrics(logits: Sequence[Tensor]) -> dict[str, float]:
        found = used.task.metrics()
        for batch, values in zip(batches, logits, strict=True):
            used.task.update(found, _Logits(values.float()), batch)
        return compute_metrics(found)

    return Evidence(
        batches=[used.task.inputs(batch) for batch in batches],
        masks=[batch["attention_mask"].bool() if per_position else None for batch in batches],
        ours=ours,
        base=base,
        decide=used.task.decide,
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


def _evaluation_rows(target: Target, split: str | None, data: Path | None) -> tuple[Rows, str]:
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
    known = [
        name for name in ("test", "validation", "train") if getattr(loaded.recipe.data, name) is not None
    ]
    if split is None:
        split = next((name for name in known if name != "train"), None)
        if split is None:
            raise DataError(
                "the recipe has no test or validation rows", where=target.name, fix="add --data FILE"
            )
    if split not in known:
        raise UsageError(
            f"the recipe has no {split} rows", where="--split", fix=f"one of: {', '.join(known)}"
        )
    return read_splits(loaded, names=(split,))[split], split


def _prediction_rows(words: Sequence[str], used: Loaded, lines: Callable[[], str]) -> Rows:
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
    column = next(c for c in ("text", "prompt", "messages") if c in used.task.options.columns)  # type: ignore[attr-defined]
    if "text_pair" in used.task.options.columns:  # type: ignore[attr-defined]
        raise UsageError("this task reads pairs of texts", fix="give a jsonl or csv file with both columns")
    records: list[tuple[int, dict[str, Any]]] = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            value: Any = [{"role": "user", "content": text}] if column == "messages" else text.rstrip("\r")
            records.append((number, {column: value}))
    if not records:
        raise DataError("there is no text to predict", where=name)
    return build_rows(records, row, {column: column}, name, labelled=False)


def _answer_text(answer: dict[str, Any]) -> str:
    if "label" in answer:
        return f"{answer['label']}\t{answer['probability']:.4f}"
    if "labels" in answer:
        return ", ".join(f"{n} {answer['probabilities'][n]:.4f}" for n in answer["labels"]) or "(none)"
    return figure(answer["value"]) if "value" in answer else str(answer["text"])


def _bound(text: str, at_least: bool) -> tuple[str, float, bool]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value), at_least
    except ValueError:
        option = "--min" if at_least else "--max"
        raise UsageError(
            f"expected {option} metric=number, found {text!r}", fix=f"write e.g. {option} accuracy=0.9"
        ) from None


def _hashes(prepared: Prepared, model: nn.Module) -> dict[str, Any]:
    facts = prepared.task_facts()
    return {
        "base": fingerprint(prepared.base, head=attachment_of(model).plan.head),
        "data": {name: rows.sha256 for name, rows in prepared.rows.items() if name != "test"},
        "tokenizer": sha256_json(facts["tokenizer"]),
    }


def _first_record(prepared: Prepared, model: nn.Module, hashes: dict[str, Any]) -> dict[str, Any]:
    trained = sum(p.numel() for _, _, p in adapter_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    base = prepared.base
    return {
        "status": "running",
        "started_at": _now(),
        "recipe": result_relevant(prepared.loaded.recipe),
        "hashes": hashes,
        "base": {
            "name": Path(base.name).name if (prepared.loaded.path.parent / base.name).is_dir() else base.name,
            "commit": base.commit,
            "fingerprint": hashes["base"],
        },
        "rows": {name: len(rows) for name, rows in prepared.rows.items()},
        "trained_parameters": trained,
        "base_parameters": total - trained,
        "compute": describe(prepared.compute) | {"base_dtype": prepared.dtype},
        "versions": versions(),
    }


def _refuse_changed_recipe(run: RunFolder, record: dict[str, Any], loaded: LoadedRecipe) -> None:
    if not record:
        return
    from ticktune.folder import relocate

    before, now = record["recipe"], result_relevant(loaded.recipe)
    then = load_recipe(run.recipe_path).recipe if run.recipe_path.exists() else loaded.recipe
    moved = result_relevant(relocate(loaded.recipe, loaded.path.parent, run.path))
    old = result_relevant(then)
    keys = sorted(key for key in old.keys() | moved.keys() if old.get(key) != moved.get(key))
    if keys:
        changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)
        raise OutputError(
            f"this folder holds a run of another recipe: {changes}",
            where=str(run.path),
            fix="choose another output, undo the change, or start over with --restart",
        )


def _refuse_changed_inputs(run: RunFolder, record: dict[str, Any], hashes: dict[str, Any]) -> None:
    before = record.get("hashes")
    if before is None:
        return
    changed = [name for name in ("base", "tokenizer") if before[name] != hashes[name]]
    changed += [f"data.{n}" for n in hashes["data"] if before["data"].get(n) != hashes["data"][n]]
    if changed:
        raise OutputError(
            f"{', '.join(changed)} changed since this run began",
            where=str(run.path),
            fix="choose another output, or start over with --restart",
        )


def _forget(run: RunFolder) -> None:
    import shutil

    for path in (run.checkpoints, run.adapter):
        shutil.rmtree(path, ignore_errors=True)
    for path in (run.record_path, run.recipe_path, run.metrics_path, run.path / "report.html"):
        path.unlink(missing_ok=True)


def _refuse_source(place: Path, source: Path) -> None:
    if place.exists() and source.exists() and place.resolve() == source.resolve():
        raise UsageError("this folder is the source itself", where=str(place), fix="choose another -o")


@contextmanager
def _memory_named(recipe: Any) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"out of memory with training.batch_size {recipe.training.batch_size} and data.max_length "
            f"{recipe.data.max_length}",
            fix="lower training.micro_batch_size, data.max_length or ticks.layers (last:N)",
        ) from error


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


def _say_export(place: Path, document: dict[str, Any], console: Console) -> None:
    found = verification_of(document)
    rows = [["merged", str(place)], *map(list, found.lines())]
    rows += [[f"new {field}", str(width)] for field, width in document["widths"].items()]
    if document["cast"]:
        cast = document["cast"]
        rows.append([f"cast to {cast['dtype']}: max |Δ logit|", f"{cast['max_difference']:.2e}"])
        rows.append(["predictions changed by the cast", f"{cast['changed']}/{cast['decisions']}"])
    shown = {k: document[k] for k in ("dtype", "widths", "verification", "cast")}
    console.result({"merged": str(place), **shown}, rows)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
