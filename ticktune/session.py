"""One stretch of training: from the newest checkpoint, or the beginning, to the end or a stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ticktune import checkpoint
from ticktune.adapter import describe_adapter, shapes_fingerprint, write_adapter
from ticktune.base import fingerprint, stored_quantization, without_weights
from ticktune.console import Console, figure, size_text
from ticktune.data.batches import Epochs, largest_packed, largest_padded, micro_batches, packed_rows
from ticktune.device import Compute, describe, is_out_of_memory, mix
from ticktune.errors import (
    Interrupted,
    NumericsError,
    OutputError,
    Problem,
    ResourceError,
)
from ticktune.evaluate import is_better, score
from ticktune.files import append_line, finite, free_bytes, sha256_json, write_text
from ticktune.folder import RunFolder, relocate, result_relevant
from ticktune.patch.attach import adapter_parameters, adapter_state, attachment_of, set_training
from ticktune.patch.cpu import OnCpu
from ticktune.patch.segments import Segments
from ticktune.patch.standins import Checkpointed, Compiled, Context, layers_of, places_of, standing_in
from ticktune.patch.unpadded import Unpadded, without_padding
from ticktune.patch.wide import Wide
from ticktune.prepare import Prepared
from ticktune.recipe.load import LoadedRecipe
from ticktune.recipe.schema import Training
from ticktune.registry import TASKS
from ticktune.report.card import adapter_card
from ticktune.report.page import report_page
from ticktune.signals import Signals, StopAsked
from ticktune.tasks.task import Batch, Task
from ticktune.train.ffn import Trial, timed
from ticktune.train.graphs import Graphs, in_eighths
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.head_loss import Head, ends_of, find_head, head_loss, plain_loss
from ticktune.train.memory import Activations, measured
from ticktune.train.prefix import NUMBERS
from ticktune.train.steps import StepReport, gradients_of, train_steps, try_step
from ticktune.versions import versions
from ticktune.ways import Ways, collated, filler_of, prove_graphs, shortest

_PLAIN, _CHUNKED = "plain", "chunked"
_MASKED, _BY_SEGMENTS = "masked", "segments"
_TORCHS, _OURS = "torch", "ticktune"
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
        epochs: The batches.
        total: Steps in the run.
    """

    epochs: Epochs
    total: int

    @classmethod
    def of(cls, training: Training, lengths: Sequence[int], poll: Callable[[], None] = lambda: None) -> "Schedule":
        """The schedule of a recipe over training examples of some lengths; 3 epochs where it says nothing.

        Args:
            training: Of the recipe.
            lengths: Of the training examples.
            poll: Called before each epoch whose batches are counted: a tenth of a second for a million examples.
        """
        epochs = Epochs(lengths, training.batch_size, training.batch_tokens, training.seed, training.packing, poll)
        return cls(epochs, training.steps if training.steps is not None else epochs.end((training.epochs or 3) - 1))

    def due(self, step: int, every: Any) -> bool:
        """Whether something that happens ``every`` so many steps, or every epoch, happens after ``step``."""
        return bool(self.epochs.find(step)[1] == step if every == "epoch" else step % every == 0)

    def passed(self, step: int) -> float:
        """The epochs that are done after so many steps, with their fractions."""
        epoch, start = self.epochs.find(step)
        return epoch + (step - start) / (self.epochs.end(epoch) - start)


class Session:
    """Drives the loop: when to log, evaluate, save and stop.

    Args:
        prepared: Rows, task and base.
        plan: How the run divides into steps.
        model: With ticks.
        run: The run's folder, locked.
        console: Where to print.
        signals: Polled between steps and in evaluations.
        ways: Of computing, that were proved.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Schedule,
        model: nn.Module,
        run: RunFolder,
        console: Console,
        signals: Signals,
        ways: Ways,
    ) -> None:
        self.prepared, self.plan, self.model, self.run, self.console, self.signals = (
            prepared,
            plan,
            model,
            run,
            console,
            signals,
        )
        self.recipe = prepared.loaded.recipe
        self.compute: Compute = prepared.compute
        self.optimizer = build_optimizer(adapter_parameters(model), self.recipe.optimizer)
        self.scaler = self.compute.scaler()
        self.progress = checkpoint.Progress()
        self.best: dict[str, Tensor] | None = None
        row = TASKS[self.recipe.task]
        asked = self.recipe.evaluation.metric
        self.metric = prepared.task.default_metric if asked == "auto" else asked
        self.more_is_better = row.metrics[self.metric]
        training = self.recipe.training
        rows = training.micro_batch_size or training.batch_size
        self.micro_batch_size = rows or len(prepared.examples["train"])  # of so many tokens: a whole batch
        self.evaluation_batch = self.recipe.evaluation.batch_size or max(32, rows or 0)
        self.loss_of = plain_loss(prepared.task)
        self.cache = ways.cache
        self._wide = ways.wide
        self._ffn: Context = nullcontext  # what ticks of the chosen form run in,
        self._again: Context = nullcontext  # and what they do when a layer is computed again
        self._found_segments, self._found_on_cpu = ways.segments, ways.on_cpu
        self._on_cpu: Context = nullcontext  # what attention and dropout run in
        self._segments: Segments | Unpadded | None = ways.unpadded  # by which texts attend that share a row
        self._layers = layers_of(model) if training.compile or training.gradient_checkpointing else []
        self._places = places_of(model, self._layers)
        self._stand_ins = self._built_stand_ins()
        self._longest = max(prepared.examples["train"].lengths)
        self._activations: Activations | None = None  # of the longest rows
        self._work = "starting"  # what is being done, for messages
        self._batch: Sequence[int] = ()

    def _built_stand_ins(self) -> dict[nn.Module, nn.Module]:
        training = self.recipe.training
        found = {layer: layer for layer in self._layers}
        if training.compile:
            found = {layer: Compiled(layer) for layer in self._layers}
        if training.gradient_checkpointing:
            found = {layer: Checkpointed(inner, self._computed_again) for layer, inner in found.items()}
        return found

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
        logged, unlogged = self.run.metrics(), self.progress.unlogged
        self.progress.unlogged = []
        for entry in unlogged:
            if entry not in logged:
                self._log(entry)
        try:
            with self._memory_named():
                self._warn_little_space()
                loss = self._choose_loss(goes_on=newest is not None)
                attention = self._choose_attention(goes_on=newest is not None)
                kernels = self._choose_kernels(goes_on=newest is not None)
                self.run.update(status="running", loss=loss, **attention, **kernels, **self._choose_ffn())
                # What is compiled depends on the rows that come first: they are the same in every stretch.
                if newest is None or self.recipe.training.compile:
                    self._try_longest()
                if not self.progress.history:
                    self._evaluate(first=True)
                elif self.progress.history[-1]["step"] < self.progress.step and self._evaluation_is_due():
                    self._evaluate()  # a stop came between the step and its evaluation
                    self._save()
                if not self._out_of_patience() and self.progress.step < self.plan.total:
                    self._fill_cache()
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

    def _choose_loss(self, *, goes_on: bool) -> str:
        """Takes the loss without its logits where the model's head is proved; a run goes on as it began.

        Returns:
            What the record says of it.
        """
        # A run of a version that did not record it had the plain loss.
        before: str = self.run.record().get("loss", _PLAIN) if goes_on else _CHUNKED
        if before != _CHUNKED:
            return before
        if not self.recipe.training.fast:
            return _PLAIN
        task = self.prepared.task
        if type(task).targets is Task.targets:
            return f"{_PLAIN}: it is not that of a language-model head"
        if self.recipe.training.cuda_graphs:
            return f"{_PLAIN}: a CUDA graph cannot leave out positions that have no label"
        self._work = "trying the shortest rows"
        batch = collated(self.prepared, ends_of(shortest(self.prepared)))
        head = find_head(self.model, task, self.compute.put(batch), self.compute)
        if isinstance(head, Head):
            compiled = self.recipe.training.compile and self.compute.device.type == "cuda"
            self.loss_of = head_loss(task, head, compiled=compiled)
            return _CHUNKED
        if goes_on:
            self.console.warn(f"the run goes on with all logits, as {head}: the result need not be bitwise the same")
        return f"{_PLAIN}: {head}"

    def _choose_attention(self, *, goes_on: bool) -> dict[str, str]:
        """Lets packed rows attend by segments where that is proved; a run goes on as it began.

        Returns:
            What the record says of it.
        """
        found = self._found_segments
        if found is None:
            return {}
        said = self._proved_way("attention", _BY_SEGMENTS, _MASKED, "masked attention", found, goes_on=goes_on)
        if isinstance(found, Segments) and said == _BY_SEGMENTS:
            self._segments = found
        return {"attention": said}

    def _choose_kernels(self, *, goes_on: bool) -> dict[str, str]:
        """Lets a model on a CPU attend and drop out in our way; a run goes on as it began.

        Returns:
            What the record says of it.
        """
        found = self._found_on_cpu
        if found is None:
            return {}
        said = self._proved_way("cpu_kernels", _OURS, _TORCHS, "torch's attention", found, goes_on=goes_on)
        if isinstance(found, OnCpu) and said == _OURS:
            self._on_cpu = found.running
            if self._segments is not None:
                self._segments.attend_on_cpu()
        return {"cpu_kernels": said}

    def _proved_way(self, key: str, way: str, plain: str, shown: str, found: object, *, goes_on: bool) -> str:
        """What the record says under a key: the way, or the plain one, in which the run began or as ours is not proved.

        Args:
            key: Of the record; a run of a version that did not write it went the plain way.
            way: What it says of our way,
            plain: and of the plain one,
            shown: which is called so in messages.
            found: Our way, or the reason why it is not possible.
            goes_on: Whether the run goes on.
        """
        before: str = self.run.record().get(key, plain) if goes_on else way
        if before != way or not isinstance(found, str):
            return before
        if goes_on:
            self.console.warn(f"the run goes on with {shown}, as {found}: the result need not be bitwise the same")
        return f"{plain}: {found}"

    def _choose_ffn(self) -> dict[str, Any]:
        """Computes ticks as the recipe or a trial says; a run goes on as it began.

        Returns:
            What the record says of it.
        """
        entries: dict[str, Any] = {}
        before = self.progress.ffn or self.run.record().get("ffn")
        if before is None and self._wide is not None and self.recipe.training.ffn == "auto":
            self._work = "timing ticks in split and wide form"
            trial = self._tried(self._wide)
            before = trial.choice
            entries["ffn_trial"] = asdict(trial)
            self.console.note(
                f"training.ffn: {before}; a micro-batch took {trial.split:.3g} s split, and {trial.wide:.3g} s wide"
            )
        wanted = before or ("split" if self._wide is None else "wide")
        if wanted == "wide" and self._wide is None:
            self.console.warn("the run goes on with ticks in split form: the result need not be bitwise the same")
            wanted = "split"
        self.progress.ffn = wanted
        self._use(self._wide if wanted == "wide" else None)
        if wanted == "split" and self._wide is not None:
            self._wide.release()
        return entries | {"ffn": wanted}

    def _use(self, wide: Wide | None) -> None:
        """Computes the ticks in wide form from now on; None: in split form."""
        self._ffn, self._again = (nullcontext, nullcontext) if wide is None else (wide.running, wide.again)

    def _tried(self, wide: Wide) -> Trial:
        """Times a micro-batch of middle length in both forms."""
        lengths, batches = self.prepared.examples["train"].lengths, self.plan.epochs.batches(0)
        middle = sorted(batches, key=lambda numbers: max(lengths[n] for n in numbers))[len(batches) // 2]
        batch = self._collate(next(iter(micro_batches(middle, self.micro_batch_size))), self.recipe.training.seed)

        def step(form: Wide | None) -> None:
            self.signals.poll()
            self._use(form)
            try_step(
                self.model,
                self.prepared.task,
                batch,
                self.optimizer,
                self.scaler,
                self.compute,
                base_dropout=self.recipe.base.dropout == "keep",
                loss_of=self.loss_of,
                around=self._around,
            )

        return timed(lambda: step(None), lambda: step(wide), self.compute.device)

    def _try_longest(self) -> None:
        """Tries the largest micro-batches, so that a lack of memory shows before anything is computed."""
        training, lengths = self.recipe.training, self.prepared.examples["train"].lengths
        if training.packing:
            tried = largest_packed(
                self.plan.epochs,
                self.plan.total,
                self.micro_batch_size,
                self.recipe.data.max_length,
                self.signals.poll,
            )
        else:
            tried = largest_padded(lengths, self.micro_batch_size, training.batch_tokens)
        measures = training.gradient_checkpointing and not training.compile
        found: list[tuple[Activations, list[int]]] = []
        for numbers in tried:
            self._work = f"trying the longest rows, {self._described(numbers)}"
            try_step(
                self.model,
                self.prepared.task,
                self._collate(numbers, training.seed),
                self.optimizer,
                self.scaler,
                self.compute,
                base_dropout=self.recipe.base.dropout == "keep",
                loss_of=self.loss_of,
                around=self._measured if measures else self._around,
            )
            if self._activations is not None:
                found.append((self._activations, numbers))
        if found:
            kept, numbers = max(found, key=lambda each: each[0].checkpointed)
            self.run.update(
                activations={
                    "rows": len(numbers),
                    "length": max(lengths[number] for number in numbers),
                    "bytes": kept.checkpointed,
                    "bytes_without_checkpointing": kept.plain,
                }
            )
            self.console.note(
                f"gradient checkpointing keeps {size_text(kept.checkpointed)} of activations instead of "
                f"{size_text(kept.plain)}, for {self._described(numbers)}"
            )

    @contextmanager
    def _measured(self, batch: Batch) -> Iterator[None]:
        # The form inside: in the places of its projections the model hides the weights, which are no activations.
        with (
            measured(self.model, self._layers, self._computed_again) as self._activations,
            self._on_cpu(),
            self._attending(batch),
            self._ffn(),
        ):
            yield

    def _fill_cache(self) -> None:
        """Computes what is kept of the frozen lower layers, anew in each stretch."""
        if self.cache is None:
            return
        # Where a batch is so many tokens, a micro-batch is not so many rows.
        training = self.recipe.training
        started, size = time.monotonic(), max(32, training.micro_batch_size or training.batch_size or 0)
        count = len(self.cache.prefix.layers)
        layers = "layer" if count == 1 else f"{count} layers"
        self._work = f"computing the lowest {layers} of the longest rows, {size} at once"
        kind = training.prefix_cache
        with self._on_cpu():
            self.cache.fill(kind, size, self.signals.poll)  # type: ignore[arg-type]  # it is not off
        seconds = time.monotonic() - started
        rows = len(self.prepared.examples["train"])
        self.console.note(
            f"the lowest {layers} {'is' if count == 1 else 'are'} computed for {rows:,} rows, once: {seconds:.1f} s"
        )

    @contextmanager
    def _around(self, batch: Batch) -> Iterator[None]:
        """What stands in the place of layers in a forward pass of training."""
        with ExitStack() as stack:
            stack.enter_context(self._ffn())
            stack.enter_context(self._on_cpu())
            stack.enter_context(standing_in(self._places, self._stand_ins))
            stack.enter_context(self._attending(batch))  # around what stands in the places of layers
            if self.cache is not None and NUMBERS in batch:
                stack.enter_context(self.cache.serving(batch))
            yield

    def _attending(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self._segments is None else self._segments.running(batch)

    @contextmanager
    def _computed_again(self) -> Iterator[None]:
        """What a layer is computed again in, in a backward pass."""
        segments = nullcontext() if self._segments is None else self._segments.again()
        with self._again(), self._on_cpu(), segments:
            yield

    def _collate(self, numbers: list[int], seed: int) -> Batch:
        """A micro-batch of these training examples."""
        task, examples = self.prepared.task, self.prepared.examples["train"].take(numbers)
        if not self.recipe.training.packing:
            batch = task.collate(examples, seed=seed)
            if self.recipe.training.padding_free:
                return without_padding(batch)
            return self._in_few_shapes(batch) if self.recipe.training.cuda_graphs else batch
        rows = packed_rows([example["length"] for example in examples], self.recipe.data.max_length)
        return task.pack([[examples[i] for i in row] for row in rows])

    def _in_few_shapes(self, batch: Batch) -> Batch:
        return in_eighths(batch, self._longest, filler_of(self.model))

    def _built_graphs(self) -> Graphs | None:
        """Lets gradients come from CUDA graphs; None where the recipe does not ask for it.

        Raises:
            RecipeError: They cannot in this run's form and with its compiled layers.
        """
        if not self.recipe.training.cuda_graphs:
            return None
        self._work = "recording the shortest rows"
        set_training(self.model, True, base_dropout=self.recipe.base.dropout == "keep")
        run = gradients_of(self.model, self.loss_of, self.scaler, self.compute, self._around)
        batch = self._in_few_shapes(collated(self.prepared, shortest(self.prepared)))
        graphs = Graphs(run, self.optimizer, self.compute, batch)
        prove_graphs(self.prepared, graphs, batch)
        return graphs

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
            loss_of=self.loss_of,
            around=self._around,
            graphs=self._built_graphs(),
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
        training = self.recipe.training
        step = first
        epoch, start = self.plan.epochs.find(first)
        while step < self.plan.total:
            for batch in self.plan.epochs.batches(epoch)[step - start :]:
                if step >= self.plan.total:
                    return
                seed = mix(training.seed, "collate", step)
                parts = enumerate(micro_batches(batch, self.micro_batch_size))
                self._batch = batch
                self._work = f"step {step + 1}, {self._described(batch)}"
                yield [self._collate(part, mix(seed, number)) | {NUMBERS: part} for number, part in parts]
                self.signals.poll()
                step += 1
            epoch, start = epoch + 1, step

    def _account(self, report: StepReport) -> None:
        progress = self.progress
        progress.step = report.step
        progress.skipped += report.skipped
        progress.seconds += report.seconds
        progress.rows += report.rows
        if report.step % self.recipe.logging.every == 0 or report.step in (1, self.plan.total):
            entry: dict[str, Any] = {
                "step": report.step,
                "epoch": round(self.plan.passed(report.step), 4),
                "loss": report.loss,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "rows_per_second": round(report.rows / report.seconds, 2),
            }
            if self.scaler.is_enabled():
                entry |= {"scale": report.scale, "skipped": progress.skipped}
            self._log(entry)

    def _log(self, entry: dict[str, Any]) -> None:
        """Writes a line of the log; if the disk is full, the state is saved first, for which there may be room."""
        try:
            append_line(self.run.metrics_path, entry)
        except ResourceError:
            self.progress.unlogged.append(entry)
            with suppress(ResourceError):  # then the checkpoint before stands, and the log's error is the one to say
                self._save()
            raise

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
            self.model,
            self.prepared.task,
            examples,
            self.compute,
            self.evaluation_batch,
            self.signals.poll,
            fast=self.recipe.training.fast,
        )
        entry = {"step": progress.step, "split": "validation", "metrics": metrics}
        progress.history.append(entry)
        value = metrics[self.metric]
        if is_better(value, progress.best_score, self.more_is_better):
            progress.best_score, progress.best_step, progress.bad_evaluations = value, progress.step, 0
            self.best = {key: tensor.cpu().clone() for key, tensor in adapter_state(self.model).items()}
        else:
            progress.bad_evaluations += 1
        self._log(entry)
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
            training = self.recipe.training
            per_step = (
                f"batch_tokens {training.batch_tokens}"
                if training.batch_tokens
                else f"batch_size {training.batch_size}"
            )
            raise ResourceError(
                f"out of memory: {self._work} (training.{per_step}, data.max_length {self.recipe.data.max_length})",
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
