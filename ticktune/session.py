"""One stretch of training: from the newest checkpoint, or the beginning, to the end or a stop."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ticktune import checkpoint
from ticktune.adapter import describe_adapter, shapes_fingerprint, write_adapter
from ticktune.base import fingerprint, stored_quantization, without_weights
from ticktune.console import Console, figure
from ticktune.data.batches import epoch_batches, micro_batches, sorted_batches
from ticktune.device import Compute, describe, is_out_of_memory, mix
from ticktune.errors import Interrupted, NumericsError, OutputError, Problem, ResourceError
from ticktune.evaluate import is_better, score
from ticktune.files import append_line, finite, free_bytes, sha256_json, write_text
from ticktune.folder import RunFolder, relocate, result_relevant
from ticktune.patch.attach import adapter_parameters, adapter_state, attachment_of
from ticktune.prepare import Prepared
from ticktune.recipe.load import LoadedRecipe
from ticktune.registry import TASKS
from ticktune.report.card import adapter_card
from ticktune.report.page import report_page
from ticktune.signals import Signals, StopAsked
from ticktune.tasks.task import Batch
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.steps import StepReport, train_steps, try_step
from ticktune.versions import versions

_IDLE_STEPS = 10  # Q and U have no gradient while P is zero, in the first step


def begin(prepared: Prepared, model: nn.Module, run: RunFolder, console: Console) -> None:
    """Records what a run starts from, or refuses to go on from something else; another machine is said and recorded.

    Args:
        prepared: Rows, task and base.
        model: With ticks.
        run: The run's folder, new or interrupted.
        console: Where to print.

    Raises:
        OutputError: Base, tokenizer or rows changed since the run began.
    """
    hashes = _hashes(prepared, model)
    before = run.record().get("hashes")
    if before is None:
        run.update(**_first_record(prepared, model, run, hashes))
    else:
        changed = [name for name in ("base", "tokenizer") if before[name] != hashes[name]]
        changed += [f"data.{n}" for n in hashes["data"] if before["data"].get(n) != hashes["data"][n]]
        if changed:
            raise OutputError(
                f"{', '.join(changed)} changed since this run began",
                where=str(run.path),
                fix="choose another output, or start over with --restart",
            )
        _say_other_machine(run, machine(prepared), console)
    if not run.recipe_path.exists():
        run.write_recipe(prepared.loaded)


def recipe_identity(loaded: LoadedRecipe, run: RunFolder) -> dict[str, Any]:
    """The result-relevant keys of a recipe, its paths as they are written in the run's folder."""
    return result_relevant(relocate(loaded.recipe, loaded.path.parent, run.path))


@dataclass
class Schedule:
    """How a run divides into steps.

    Args:
        per_epoch: Steps in an epoch.
        total: Steps in the run.
    """

    per_epoch: int
    total: int

    @classmethod
    def of(cls, recipe: Any, examples: int) -> "Schedule":
        """The schedule of a recipe over so many training examples; 3 epochs where it says nothing."""
        per_epoch = math.ceil(examples / recipe.training.batch_size)
        steps = recipe.training.steps
        return cls(per_epoch, steps if steps is not None else per_epoch * (recipe.training.epochs or 3))

    def due(self, step: int, every: Any) -> bool:
        """Whether something that happens ``every`` so many steps, or every epoch, happens after ``step``."""
        period = self.per_epoch if every == "epoch" else every
        return bool(step % period == 0)


class Session:
    """Drives the loop: when to log, evaluate, save and stop.

    Args:
        prepared: Rows, task and base.
        model: With ticks.
        run: The run's folder, locked.
        console: Where to print.
        signals: Polled between steps and in evaluations.
    """

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
        self.plan = Schedule.of(self.recipe, len(prepared.examples["train"]))
        self.progress = checkpoint.Progress()
        self.best: dict[str, Tensor] | None = None
        row = TASKS[self.recipe.task]
        asked = self.recipe.evaluation.metric
        self.metric = prepared.task.default_metric if asked == "auto" else asked
        self.more_is_better = row.metrics[self.metric]
        micro = self.recipe.training.micro_batch_size or self.recipe.training.batch_size
        self.micro_batch_size = micro
        self.evaluation_batch = self.recipe.evaluation.batch_size or max(32, micro)
        self._work = "starting"  # what is being done, for messages
        self._batch: Sequence[int] = ()

    def go(self) -> None:
        """Trains to the end, and writes the adapter, the record and the report.

        Raises:
            Interrupted: A signal came; the state is saved.
            NumericsError: A loss or gradient is not finite; the last checkpoint stands.
            CheckpointError: All checkpoints are damaged.
            ResourceError: Out of memory or disk.
        """
        newest = checkpoint.newest_valid(self.run.checkpoints)
        if newest is not None:
            self.progress, self.best = checkpoint.restore_checkpoint(newest, self.model, self.optimizer, self.scaler)
            self.console.note(f"{self.run.path}: going on after step {self.progress.step} of {self.plan.total}")
        self.run.trim_metrics(self.progress.step, {entry["step"] for entry in self.progress.history})
        self.run.update(status="running")
        try:
            with self._memory_named():
                self._warn_little_space()
                if newest is None:
                    self._try_longest()
                if not self.progress.history:
                    self._evaluate(first=True)
                elif self.progress.history[-1]["step"] < self.progress.step and self._evaluation_is_due():
                    self._evaluate()  # a stop came between the step and its evaluation
                    self._save()
                if not self._out_of_patience():
                    self._steps()
        except StopAsked as stop:
            raise self._interrupted(stop) from None
        self._finish()

    def _warn_little_space(self) -> None:
        size = checkpoint.checkpoint_bytes(self.model, with_best="validation" in self.prepared.examples)
        free = free_bytes(self.run.path)
        if free < 2 * size:  # a new one is written before an old one is removed
            self.console.warn(
                f"{self.run.path}: {free:,} bytes free, and two checkpoints take about {2 * size:,}: free some space, "
                "or training may stop with a full disk"
            )

    def _try_longest(self) -> None:
        """Tries a micro-batch of the longest rows, so that a lack of memory shows before anything is computed."""
        examples, task = self.prepared.examples["train"], self.prepared.task
        numbers = next(iter(sorted_batches(examples.lengths, self.micro_batch_size)))
        self._work = f"trying the longest rows, {self._described(numbers)}"
        try_step(
            self.model,
            task,
            task.collate(examples.take(numbers), seed=self.recipe.training.seed),
            self.optimizer,
            self.scaler,
            self.compute,
            base_dropout=self.recipe.base.dropout == "keep",
        )

    def _described(self, numbers: Sequence[int]) -> str:
        longest = max(self.prepared.examples["train"].lengths[number] for number in numbers)
        return f"{min(len(numbers), self.micro_batch_size)} at once with a length of up to {longest}"

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
        with self.console.progress(self.plan.total, first) as bar, self._rows_named():
            for report in reports:
                self._account(report)
                self._show(bar, report, first, started)
                is_last = report.step == self.plan.total
                if self._evaluation_is_due():
                    self._evaluate(bar=bar)
                stop_early = self._out_of_patience()
                if is_last or stop_early or self.plan.due(report.step, self.recipe.checkpoints.every):
                    self._save()
                if stop_early:
                    bar.note(f"no better {self.metric} in {self.progress.bad_evaluations} evaluations: stopping")
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
                seed = mix(training.seed, "collate", step)
                parts = enumerate(micro_batches(batch, self.micro_batch_size))
                self._batch = batch
                self._work = f"step {step + 1}, {self._described(batch)}"
                yield [task.collate(examples.take(part), seed=mix(seed, number)) for number, part in parts]
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
        self._work = f"evaluating after step {progress.step}, {self.evaluation_batch} rows at once"
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

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        has_rows = "validation" in self.prepared.examples
        return has_rows and (step == self.plan.total or self.plan.due(step, self.recipe.evaluation.every))

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

    @contextmanager
    def _memory_named(self) -> Iterator[None]:
        """Says of a lack of memory what was being done, and which keys to change."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = "evaluation.batch_size" if self._work.startswith("evaluating") else "training.micro_batch_size"
            raise ResourceError(
                f"out of memory: {self._work} (training.batch_size {self.recipe.training.batch_size}, "
                f"data.max_length {self.recipe.data.max_length})",
                where=str(self.run.path),
                fix=f"lower {size}, data.max_length, or ticks.layers (last:N)",
            ) from error

    @contextmanager
    def _rows_named(self) -> Iterator[None]:
        """Says of numbers that are not finite which rows they came with."""
        try:
            yield
        except NumericsError as error:
            examples = self.prepared.examples["train"]
            rows = dict.fromkeys(example["row"] for example in examples.take(list(self._batch)))
            places = ", ".join(examples.source.where(row) for row in list(rows)[:8])
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            problems = [Problem(f"{p.message}; its rows are {places}{more}", p.where, p.fix) for p in error.problems]
            raise NumericsError(problems) from error

    def _interrupted(self, stop: StopAsked) -> Interrupted:
        started = time.monotonic()
        saved = self._save()
        self.run.update(status="interrupted")
        seconds = time.monotonic() - started
        return Interrupted(
            f"stopped after step {self.progress.step} of {self.plan.total}; saved as {saved} in {seconds:.1f} s",
            signal_number=stop.number,
            fix=f"to go on, run: {self.prepared.loaded.command}",
        )

    def _finish(self) -> None:
        progress = self.progress
        tensors = adapter_state(self.model)
        step, history = progress.step, [e for e in progress.history if e["split"]]
        if self.recipe.evaluation.save == "best" and self.best is not None and progress.best_step is not None:
            tensors, step = self.best, progress.best_step
        checkpoint.check_finite(tensors, f"step {step}")
        idle = self._idle()
        if idle:
            self.console.warn(
                f"{len(idle)} of the trained tensors never had a gradient and are as they were: {', '.join(idle[:5])}"
            )
        metrics: dict[str, float] = next((e["metrics"] for e in reversed(history) if e["step"] == step), {})
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
        entries = {
            "status": "complete",
            "finished_at": now(),
            "steps": progress.step,
            "chosen_step": step,
            "metric": self.metric,
            "metrics": metrics,
            "base_metrics": history[0]["metrics"] if history else {},
            "history": history,
            "skipped_steps": progress.skipped,
            "idle": idle,
            "training_seconds": round(progress.seconds, 3),
            "rows_per_second": round(progress.rows / max(progress.seconds, 1e-9), 2),
        }
        recipe_text = self.run.recipe_path.read_text(encoding="utf-8")
        page = report_page(finite(self.run.record() | entries), self.run.metrics(), recipe_text)
        write_text(self.run.report_path, page)
        self.run.update(**entries)  # last: a run that says complete has all its files

    def _idle(self) -> list[str]:
        """Keys of the tensors whose gradient was zero in every step; of fewer than ten steps nothing is said."""
        if self.progress.step < _IDLE_STEPS:
            return []
        means = {key: self.optimizer.state.get(p, {}).get("exp_avg") for key, _, p in adapter_parameters(self.model)}
        return [key for key, mean in means.items() if mean is None or not mean.any()]


def _hashes(prepared: Prepared, model: nn.Module) -> dict[str, Any]:
    facts = prepared.task_facts()
    return {
        "base": fingerprint(prepared.base, head=attachment_of(model).plan.head),
        "data": {name: rows.sha256 for name, rows in prepared.rows.items() if name != "test"},
        "tokenizer": sha256_json(facts["tokenizer"]),
    }


def _first_record(prepared: Prepared, model: nn.Module, run: RunFolder, hashes: dict[str, Any]) -> dict[str, Any]:
    trained = sum(p.numel() for _, _, p in adapter_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    base, task = prepared.base, prepared.task
    stored = stored_quantization(base)
    # Of a model without ticks: unsharing layers changes its config.
    shapes = None if stored is None else shapes_fingerprint(without_weights(base, task.auto_class, task.config()))
    return {
        "status": "running",
        "started_at": now(),
        "recipe": recipe_identity(prepared.loaded, run),
        "hashes": hashes,
        "base": {
            "name": base.public_name,
            "commit": base.commit,
            "fingerprint": hashes["base"],
            "quantize": prepared.loaded.recipe.base.quantize,
            "stored_quantization": stored,
            "shapes": shapes,
        },
        "rows": {name: len(rows) for name, rows in prepared.rows.items()},
        "rows_report": prepared.report,
        "trained_parameters": trained,
        "base_parameters": total - trained,
        **machine(prepared),
    }


def machine(prepared: Prepared) -> dict[str, Any]:
    """What a result depends on besides recipe, base and rows."""
    return {"compute": describe(prepared.compute) | {"base_dtype": prepared.dtype}, "versions": versions()}


def _say_other_machine(run: RunFolder, here: dict[str, Any], console: Console) -> None:
    if not checkpoint.find_checkpoints(run.checkpoints):
        run.update(**here)  # it begins only now
        return
    record = run.record()
    before = record.get("continued", [record])[-1]
    changes = sorted(
        f"{name} {old.get(name)} -> {new.get(name)}"
        for old, new in ((before[part], here[part]) for part in here)
        for name in old.keys() | new.keys()
        if old.get(name) != new.get(name)
    )
    if changes:
        console.warn(f"the run goes on with {', '.join(changes)}: the result need not be bitwise the same")
        run.update(continued=[*record.get("continued", []), {"at": now(), **here}])


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
