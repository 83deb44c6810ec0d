"""Training steps of a shape in many ways, which take turns on one device: what G1 to G4 of the GPU benchmark measure.

All frozen ways of a shape hold the same weights of the base together, so that many of them stay on the device at once.
"""

import functools
import itertools
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.clock import Budget, Clock, Memory, spread
from benchmarks.counting import saved_bytes
from benchmarks.shapes import Shape, attention_flops, build, floor_seconds, mfu4, product_flops, take_weights
from benchmarks.tokens import Classes, NextTokens, real_tokens
from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import TicktuneError, first_line
from ticktune.patch.attach import adapter_parameters, attach, set_training
from ticktune.patch.segments import Segments
from ticktune.patch.standins import Checkpointed, Compiled, places_of, standing_in
from ticktune.patch.unpadded import Unpadded, without_padding
from ticktune.patch.wide import Wide
from ticktune.tasks.batch import SEGMENTS, Batch
from ticktune.train.graphs import Graphs, in_eighths
from ticktune.train.groups import build_optimizer
from ticktune.train.head_loss import Head, LossOf, find_head, head_loss, hidden_states, plain_loss
from ticktune.train.steps import gradients_of, train_steps

Around = Callable[[], AbstractContextManager[Any]]
"""What a forward pass runs in."""

REFERENCE = "norms only"
"""The way that others are compared with: no adapter on the products at all."""


class NotHereError(Exception):
    """Something that a measurement needs is not there; the message says what."""


FAILURES = (
    NotHereError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    OSError,
    TicktuneError,
)
"""What one way may end with while the others go on: it is recorded, with the reason."""

TICK_FORMS: dict[str, Callable[[nn.Module, torch.dtype | None], Around]] = {
    "split": lambda model, dtype: nullcontext,
    "wide": lambda model, dtype: _wide(model, dtype),
}
"""How a tick's products stand beside the base's -> from the model and the dtype of products, what a pass runs in."""


@dataclass(frozen=True)
class Rates:
    """The optimizer's options, as a recipe without an ``optimizer`` section has them."""

    lr: float = 2e-4
    p_lr_ratio: float = 4.0
    norm_lr: float = 1e-3
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        warm: Steps of a way before those that count; in the last of them memory is measured.
        turns: Turns of each way that count.
        steps: Steps of a turn: as many as there are batches, so that all turns train the same tokens.
    """

    warm: int = 5
    turns: int = 4
    steps: int = 5


class Subject(NamedTuple):
    """What all ways of a case train on.

    Args:
        case: Its name in the table.
        shape: The model's sizes.
        weights: Of the base, in bfloat16, on the device.
        batches: By layout, the micro-batches of each of as many steps as a turn has.
        length: What attention costs of.
        longest: Tokens in a row at the most.
        compute: Device and precision.
        budget: Parameters that adapters should train.
    """

    case: str
    shape: Shape
    weights: list[Tensor]
    batches: dict[str, list[list[Batch]]]
    length: float
    longest: int
    compute: Compute
    budget: int

    @property
    def task(self) -> Any:
        """The task of the shape."""
        return NextTokens() if self.shape.causal else Classes()

    def model(self, *, own: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The base; with ``own``, with weights of its own instead of those that all ways hold."""
        model = build(self.shape, dtype, self.compute.device)
        take_weights(model, [w.to(dtype, copy=True) for w in self.weights] if own else self.weights)
        return model


class Adapted(NamedTuple):
    """A model that is ready for training.

    Args:
        model: The model.
        named: What is trained: (name, role, parameter).
        form: What a forward pass runs in.
    """

    model: nn.Module
    named: list[tuple[str, Any, nn.Parameter]]
    form: Around = nullcontext


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        adapt: Makes the model.
        layout: Key of the subject's batches.
        loss: ``ours``: without logits where that is possible; ``plain``; ``liger``; ``model``: the model's own.
        layers: ``eager``; ``compiled``, each by itself; ``checkpointed``, its feed-forward block.
        graphs: Whether steps are CUDA graphs.
        autocast: Whether products of float32 tensors are made in bfloat16.
        trainer: Whether transformers' Trainer runs the steps, else ticktune's loop.
        adamw: ``fused`` or ``foreach``.
        attention: Of packed rows: by ``segments``, or ``masked``.
        padding_free: Whether layers run without padding.
        dropout: Whether the base's own dropout acts.
        dim: Of the ticks, for the floor.
        full: Whether all weights are trained.
    """

    adapt: Callable[[Subject], Adapted]
    layout: str
    loss: str = "ours"
    layers: str = "eager"
    graphs: bool = False
    autocast: bool = True
    trainer: bool = False
    adamw: str = "fused"
    attention: str = "segments"
    padding_free: bool = False
    dropout: bool = True
    dim: int = 0
    full: bool = False


# How models are made


def ticks(dim: int, form: str = "split") -> Callable[[Subject], Adapted]:
    """Ticks of a dim and all norms; dim 0: norms alone."""

    def adapt(subject: Subject) -> Adapted:
        model = subject.model()
        attach(model, dim, fresh=_fresh(model), seed=0)
        return Adapted(model, list(adapter_parameters(model)), TICK_FORMS[form](model, torch.bfloat16))

    return adapt


def _wide(model: nn.Module, dtype: torch.dtype | None) -> Around:
    """All ticks in wide form.

    Raises:
        NotHereError: Some cannot be.
    """
    wide = Wide(model, dtype)
    if wide.obstacles:
        raise NotHereError(f"ticks cannot be wide: {'; '.join(wide.obstacles)}")
    return wide.running


def lora(*, everywhere: bool, rank: int | None = None, best: bool) -> Callable[[Subject], Adapted]:
    """LoRA of PEFT on the feed-forward blocks or on all projections.

    Args:
        everywhere: On all projections.
        rank: None: the one with about as many parameters as the subject's budget.
        best: Adapters in the base's dtype; by default PEFT casts them, and what they read, to float32.
    """

    def adapt(subject: Subject) -> Adapted:
        from peft import LoraConfig, get_peft_model

        model, causal = subject.model(), subject.shape.causal
        ends = ("gate_proj", "up_proj", "down_proj") if causal else ("intermediate.dense", "output.dense")
        targets = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and ".layer" in name
            and (everywhere or (name.endswith(ends) and "attention" not in name))
        }
        of_one = sum(module.in_features + module.out_features for module in targets.values())
        r = rank or max(1, round(subject.budget / of_one))
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM" if causal else "SEQ_CLS"
        )
        return _all_trained(get_peft_model(model, config, autocast_adapter_dtype=not best))

    return adapt


def everything(dtype: torch.dtype) -> Callable[[Subject], Adapted]:
    """All weights, trained as float32 or, with less memory and precision, as bfloat16."""
    return lambda subject: _all_trained(subject.model(own=True, dtype=dtype).requires_grad_(True))


def _all_trained(model: nn.Module) -> Adapted:
    named = [(n, "Q" if p.ndim > 1 else "r", p) for n, p in model.named_parameters() if p.requires_grad]
    return Adapted(model, named)


def _fresh(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith("classifier")]


# How they are run


class Loop:
    """Steps of ticktune's own loop."""

    def __init__(self, way: Way, subject: Subject) -> None:
        self.model, named, self._form = way.adapt(subject)
        self.parameters = [p for _, _, p in named]
        self._compute = subject.compute if way.autocast else replace(subject.compute, precision="fp32")
        self._batches = subject.batches[way.layout]
        if way.graphs:
            longest = subject.longest
            self._batches = [[in_eighths(micro, longest, 0) for micro in batch] for batch in self._batches]
        if way.padding_free:
            self._batches = [[without_padding(micro) for micro in batch] for batch in self._batches]
        self.tokens = [sum(map(real_tokens, batch)) for batch in self._batches]
        self._clock = Clock(subject.compute.device)
        self._stand_ins = _stand_ins(self.model, way.layers, subject.shape)
        self._places = places_of(self.model, list(self._stand_ins))
        is_packed = any(SEGMENTS in micro for batch in self._batches for micro in batch)
        self._segments: Segments | Unpadded | None = None
        if is_packed and way.attention == "segments":
            self._segments = (Unpadded if way.padding_free else Segments)(self.model)
        self.loss, self._loss_of = _loss_of(way, subject, self.model, self._batches[0][0], self._compute)
        self._optimizer = build_optimizer(named, Rates())  # type: ignore[arg-type]
        if way.adamw == "foreach":
            for group in self._optimizer.param_groups:
                group |= {"fused": False, "foreach": True}
        scaler = self._compute.scaler()
        graphs = None
        if way.graphs:
            set_training(self.model, True, base_dropout=way.dropout)
            run = gradients_of(self.model, self._loss_of, scaler, self._compute, self._around)
            on_gpu = self._compute.device.type == "cuda"
            record = None if on_gpu else run_again
            graphs = Graphs(run, self._optimizer, self._compute, self._batches[0][0], record=record)
        self._steps = train_steps(
            self.model,
            [(name, p) for name, _, p in named],
            subject.task,
            itertools.cycle(self._batches),
            self._optimizer,
            scaler,
            self._compute,
            lr_factor=lambda step: 1.0,
            clip=1.0,
            seed=0,
            base_dropout=way.dropout,
            loss_of=self._loss_of,
            around=self._around,
            graphs=graphs,
        )

    def _around(self, batch: Batch) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self._form())
        stack.enter_context(standing_in(self._places, self._stand_ins))
        if self._segments is not None:
            stack.enter_context(self._segments.running(batch))
        return stack

    def turn(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(count):
            self._clock.start()
            next(self._steps)
            seconds.append(self._clock.stop())
        return seconds

    def held(self) -> int:
        """Bytes of the model and of the optimizer's moments."""
        return _held(self.model, self._optimizer)

    def saved_per_token(self) -> float:
        """Bytes that the first forward pass keeps for the backward pass, for each real token."""
        batch = self._compute.put(self._batches[0][0])

        def run() -> Tensor:
            with self._around(batch), self._compute.autocast():
                return self._loss_of(self.model, batch)

        return saved_bytes(self.model, run) / real_tokens(batch)

    def close(self) -> None:
        """Lets go of everything."""
        self._steps.close()  # type: ignore[attr-defined]


class Trained:
    """Steps of transformers' Trainer, in a thread that waits between two turns."""

    loss = "model"

    def __init__(self, way: Way, subject: Subject) -> None:
        import transformers

        self.model, named, _ = way.adapt(subject)
        self.parameters = [p for _, _, p in named]
        self._batches = subject.batches[way.layout]
        self.tokens = [sum(map(real_tokens, batch)) for batch in self._batches]
        self._clock = Clock(subject.compute.device)
        self._compute = subject.compute
        self._asked: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[BaseException | float] = queue.Queue()
        work = self

        class Gate(transformers.TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                work._wait(control)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                work._done.put(work._clock.stop())
                work._wait(control)

        self._folder = tempfile.TemporaryDirectory()
        names = ("input_ids", "attention_mask", "labels")
        batches = [{name: micro[name] for name in names} for batch in self._batches for micro in batch]
        options = transformers.TrainingArguments(
            self._folder.name,
            max_steps=1_000_000,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(self._batches[0]),
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            bf16=way.autocast,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=0,
            disable_tqdm=True,
            use_cpu=subject.compute.device.type == "cpu",
            dataloader_pin_memory=subject.compute.device.type == "cuda",
            remove_unused_columns=False,
        )
        self._trainer = transformers.Trainer(
            model=self.model,
            args=options,
            train_dataset=_Batches(batches),
            data_collator=lambda features: features[0],  # an item of the set is a whole micro-batch
            callbacks=[Gate()],
        )
        self._trainer.remove_callback(transformers.PrinterCallback)
        self._trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(self._trainer.train_dataset)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:  # noqa: BLE001 - whoever asked for the step gets it
            self._done.put(error)

    def _wait(self, control: Any) -> None:
        """Until another step is asked for."""
        if self._asked.get():
            self._clock.start()
        else:
            control.should_training_stop = True

    def turn(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(count):
            self._asked.put(True)
            found = self._done.get()
            if isinstance(found, BaseException):
                raise found
            seconds.append(found)
        return seconds

    def held(self) -> int:
        """Bytes of the model and of the optimizer's moments."""
        return _held(self.model, self._trainer.optimizer)

    def saved_per_token(self) -> float:
        """Bytes that the first forward pass keeps for the backward pass, for each real token."""
        batch = self._compute.put(self._batches[0][0])
        names = ("input_ids", "attention_mask", "labels")

        def run() -> Any:
            with self._compute.autocast():
                return self.model(**{name: batch[name] for name in names})

        return saved_bytes(self.model, run) / real_tokens(batch)

    def close(self) -> None:
        """Ends the thread."""
        self._asked.put(False)
        self._thread.join(60)
        self._folder.cleanup()


def _held(model: nn.Module, optimizer: Any) -> int:
    """Bytes of a model, which may share them with others, and of an optimizer's state; each storage counts once."""
    moments = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *moments)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Batches(torch.utils.data.Dataset[Any]):
    """Batches, over and over."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> Any:
        return self._batches[number % len(self._batches)]


def _stand_ins(model: nn.Module, kind: str, shape: Shape) -> dict[nn.Module, nn.Module]:
    if kind == "eager":
        return {}
    [layers] = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == shape.layers]
    if kind == "compiled":
        _allow_graphs()
        return {layer: Compiled(layer) for layer in layers}
    assert kind == "checkpointed", kind
    blocks: list[Any] = [layer.mlp for layer in layers]
    return {block: Checkpointed(block) for block in blocks}


def _allow_graphs() -> None:
    """Lets the ways of a case have a graph each, and makes it an error where torch would go on without compiling."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _loss_of(way: Way, subject: Subject, model: nn.Module, batch: Batch, compute: Compute) -> tuple[str, LossOf]:
    """The name of the loss that is taken, and the loss."""
    task = subject.task
    if way.loss == "model":
        return "model", lambda model, batch: _own_loss(model, task, batch)
    if way.loss == "plain" or not subject.shape.causal or way.full:
        return "plain", plain_loss(task)
    if way.loss == "liger":
        return "liger", _liger(task, model)
    found = find_head(model, task, compute.put(batch), compute)
    if not isinstance(found, Head):
        raise ValueError(f"the loss without logits is not possible: {found}")
    return "ours", head_loss(task, found, compiled=way.layers == "compiled")


def _own_loss(model: nn.Module, task: Any, batch: Batch) -> Tensor:
    """The loss that a transformers model computes itself, as a sum."""
    inputs = task.inputs(batch) if hasattr(task, "inputs") else {n: batch[n] for n in ("input_ids", "attention_mask")}
    loss: Tensor = model(**inputs, labels=batch["labels"]).loss * task.weight(batch)
    return loss


def run_again(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """What stands for a CUDA graph on a CPU: the same computation."""
    loss = run().clone()
    return lambda: loss.copy_(run()), loss


def _liger(task: Any, model: nn.Module) -> LossOf:
    """Liger's fused loss of the same hidden states."""
    if find_spec("liger_kernel") is None:
        raise NotHereError("liger-kernel is not installed")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    head = Head(model.get_output_embeddings())  # type: ignore[operator]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        states = hidden_states(model, task, batch, head).flatten(0, -2)
        states = states.to(head.linear.weight.dtype)
        targets = task.targets(batch).flatten()
        found: Tensor = liger_fused_linear_cross_entropy(states, head.linear.weight, targets, reduction="sum")
        return found

    return loss


# Measuring


class _Ready(NamedTuple):
    run: Any
    way: Way
    facts: dict[str, Any]
    step_seconds: float
    turns: list[list[float]]


def measure(
    subject: Subject, ways: dict[str, Way], effort: Effort, budget: Budget, left_out: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Lets ways take turns; one row for each that ran.

    Args:
        subject: What is trained.
        ways: By name, in order of worth; those for which no time is left are left out.
        effort: How much is measured.
        budget: Of the call.
        left_out: Gets what is left out, and why.
    """
    ready: dict[str, _Ready] = {}
    memory = Memory(subject.compute.device)
    longest = 0.0
    for name, way in ways.items():
        what = f"{subject.case}: {name}"
        if not budget.allows(_round_seconds(ready, effort) + 1.3 * longest, what, left_out):
            continue
        begun = budget.used
        found = attempt(what, left_out, functools.partial(_prepare, subject, way, effort, memory))
        if found is not None:
            ready[name] = found
        memory.forget()
        longest = max(longest, budget.used - begun)
    try:
        _take_turns(subject.case, ready, effort, budget, memory, left_out)
        limits = {each.way.graphs: each for name, each in ready.items() if name.startswith(REFERENCE)}
        return [_row(subject, name, each, limits.get(each.way.graphs)) for name, each in ready.items() if each.turns]
    finally:
        while ready:
            ready.popitem()[1].run.close()
        if any(way.layers == "compiled" for way in ways.values()):
            torch._dynamo.reset()  # graphs hold what they were made of
        memory.forget()


def _prepare(subject: Subject, way: Way, effort: Effort, memory: Memory) -> _Ready:
    """Builds a way and warms it up."""
    begun = time.monotonic()
    run: Any = (Trained if way.trainer else Loop)(way, subject)
    try:
        built = time.monotonic()
        run.turn(1)
        first = time.monotonic()
        facts: dict[str, Any] = {
            "build_seconds": round(built - begun, 3),
            "first_step_seconds": round(first - built, 3),
            "loss": run.loss,
            "trained": sum(p.numel() for p in run.parameters),
        }
        if effort.warm > 2:
            run.turn(effort.warm - 2)
        if way.layers != "checkpointed":  # torch's checkpoint hides what it keeps
            facts["saved_bytes_per_token"] = round(run.saved_per_token(), 1)
        last: list[float] = []
        rise = memory.rise(lambda: last.extend(run.turn(1)))
        if rise is not None:
            facts |= {"peak_allocated_bytes": run.held() + rise[0], "peak_reserved_bytes": run.held() + rise[1]}
    except BaseException:
        run.close()
        raise
    return _Ready(run, way, facts, last[0], [])


def _take_turns(
    case: str,
    ready: dict[str, _Ready],
    effort: Effort,
    budget: Budget,
    memory: Memory,
    left_out: list[dict[str, str]],
) -> None:
    for number in range(effort.turns):
        names = list(ready)
        first = number % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            if not budget.allows(0.0, f"{case}: {name}, turns after {number} of {effort.turns}", left_out):
                continue
            turn = attempt(f"{case}: {name}", left_out, functools.partial(ready[name].run.turn, effort.steps))
            if turn is None:
                ready.pop(name).run.close()
                memory.forget()
            else:
                ready[name].turns.append(turn)


def attempt(what: str, left_out: list[dict[str, str]], run: Callable[[], Any]) -> Any:
    """What a call returns; None where it fails, which is noted with the reason, lack of memory told apart."""
    try:
        return run()
    except FAILURES as error:
        told = first_line(error) if isinstance(error, NotHereError) else f"{type(error).__name__}: {first_line(error)}"
        why = "out of memory" if is_out_of_memory(error) else told
        left_out.append({"what": what, "why": why})
        return None


def _round_seconds(ready: dict[str, _Ready], effort: Effort) -> float:
    """About how long the turns of all ways will take that are ready."""
    return effort.turns * effort.steps * sum(each.step_seconds for each in ready.values())


def _row(subject: Subject, name: str, found: _Ready, reference: _Ready | None) -> dict[str, Any]:
    shape, way = subject.shape, found.way
    tokens = sum(found.run.tokens)
    rates = [tokens / sum(turn) for turn in found.turns]
    rate = statistics.median(rates)
    row = {
        "kind": "step",
        "case": subject.case,
        "way": name,
        **found.facts,
        **spread(list(itertools.chain(*found.turns))),
        "tokens_per_step": round(tokens / len(found.run.tokens), 1),
        "tokens_per_second": round(rate, 1),
        "mfu4": mfu4(rate, shape, subject.length),
        "of_floor": rate * sum(floor_seconds(shape, subject.length, way.dim, full=way.full).values()),
        "flops_per_second": rate * (product_flops(shape, full=way.full) + 3 * attention_flops(shape, subject.length)),
        "budget_ratio": round(found.facts["trained"] / subject.budget, 3),
    }
    if reference is not None and reference is not found:
        base = [sum(reference.run.tokens) / sum(turn) for turn in reference.turns]
        row["tax"] = statistics.median(1 - own / other for own, other in zip(rates, base, strict=False))
    return row


def budget_of(shape: Shape, dim: int) -> int:
    """Parameters of ticks of this dim, all norms and a classifier."""
    with torch.device("meta"):
        model = build(shape, torch.bfloat16, torch.device("meta"))
    attach(model, dim, fresh=_fresh(model), seed=0)
    return sum(p.numel() for _, _, p in adapter_parameters(model))


def weights_of(shape: Shape, compute: Compute) -> list[Tensor]:
    """A base's weights in bfloat16, to be held by all ways of a shape."""
    return [p.data for p in build(shape, torch.bfloat16, compute.device).parameters()]
