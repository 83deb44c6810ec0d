"""The training loop: a generator of one report per optimizer step.

It knows no task by name, no family and no file. Whoever iterates decides when to evaluate, save or stop.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ticktune.device import Compute, mix
from ticktune.errors import NumericsError
from ticktune.patch.attach import set_training
from ticktune.tasks.batch import Batch
from ticktune.train.graphs import Graphs, Run
from ticktune.train.groups import clip_gradients
from ticktune.train.head_loss import LossOf, plain_loss

if TYPE_CHECKING:
    from ticktune.tasks.task import Task

Around = Callable[[Batch], AbstractContextManager[Any]]
"""What the forward pass of a batch runs in."""

_MAX_SKIPPED = 16
"""fp16 steps that may be skipped in a row: from 2^16, the scaler's first scale, down to 1."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Args:
        step: Optimizer steps done, from 1.
        loss: Mean over what the task counts in this batch.
        lr: Learning rate of Q, r and U, or of the first group where there are none.
        grad_norm: Norm of the whole gradient before clipping.
        rows: Examples in the batch.
        seconds: Time since the step began.
        skipped: Whether fp16 overflowed, so that no parameter moved. The step still counts: the learning rate
            is a function of its number, and its rows are not seen again in this epoch.
        scale: The gradient scaler's scale; 1 without one.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    rows: int
    seconds: float
    skipped: bool
    scale: float


def train_steps(
    model: nn.Module,
    named: Sequence[tuple[str, nn.Parameter]],
    task: "Task",
    batches: Iterable[list[Batch]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    *,
    lr_factor: Callable[[int], float],
    clip: float | None,
    seed: int,
    base_dropout: bool = True,
    first_step: int = 0,
    loss_of: LossOf | None = None,
    around: Around = nullcontext,
    graphs: Graphs | None = None,
) -> Iterator[StepReport]:
    """Trains some parameters of a model.

    The loss of a step is the mean over the whole batch, however it is cut into micro-batches. Dropout draws
    from a generator that is seeded anew for each micro-batch by (seed, step, micro-batch), so nothing else that
    uses random numbers, and no interruption, changes the run.

    Args:
        model: With or without ticks.
        named: Names and parameters that are trained.
        task: Gives weight, forward and loss.
        batches: The batches that are still to come, each as a list of micro-batches.
        optimizer: From :func:`ticktune.train.groups.build_optimizer`.
        scaler: Active under fp16, else a pass-through.
        compute: Device and precision.
        lr_factor: Step number, from 0, to the share of the peak learning rate.
        clip: Largest norm of the gradient, or None.
        seed: The run's seed.
        base_dropout: Whether the base's own dropout acts.
        first_step: Steps that are done already.
        loss_of: How the loss of a micro-batch is computed; None: by the task's forward and loss.
        around: Gives what the forward pass of a micro-batch runs in.
        graphs: Computes the gradients, and has the optimizer, of :func:`gradients_of` this model; None: none does.

    Yields:
        A report after each optimizer step.

    Raises:
        NumericsError: A loss or gradient is not finite; the parameters are then as before the step.
    """
    parameters = [parameter for _, parameter in named]
    optimizer = optimizer if graphs is None else graphs.optimizer
    run = gradients_of(model, loss_of or plain_loss(task), scaler, compute, around)
    set_training(model, True, base_dropout=base_dropout)
    skipped_in_a_row = 0
    for step, batch in enumerate(batches, start=first_step):
        started = time.perf_counter()
        if graphs is None:
            set_training(model, True, base_dropout=base_dropout)
        factor = lr_factor(step)
        for group in optimizer.param_groups:
            if graphs is None:
                group["lr"] = group["peak_lr"] * factor
            else:
                group["lr"].fill_(group["peak_lr"] * factor)
        weight = sum(task.weight(micro) for micro in batch)
        loss = torch.zeros((), device=compute.device)
        for number, micro in enumerate(batch):
            drawn = mix(seed, step, number)
            if graphs is not None:
                loss += graphs.backward(micro, weight, drawn)
            else:
                torch.manual_seed(drawn)
                loss += run(compute.put(micro), weight)
        scaler.unscale_(optimizer)
        most = math.inf if clip is None else clip
        found = clip_gradients(parameters, most) if graphs is None else graphs.clip(most)
        value, norm = torch.stack([loss.double(), found.double()]).tolist()  # a GPU is waited for once
        overflow = scaler.is_enabled() and math.isfinite(value) and not math.isfinite(norm)
        if not overflow and not (math.isfinite(norm) and math.isfinite(value)):
            raise _not_finite(step, value, named)
        scale = float(scaler.get_scale())
        if graphs is None or scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=graphs is None)
        else:
            graphs.step()
        skipped_in_a_row = skipped_in_a_row + 1 if overflow else 0
        if skipped_in_a_row > _MAX_SKIPPED:
            raise NumericsError(
                f"fp16 overflowed in {skipped_in_a_row} steps in a row",
                where=f"step {step + 1}",
                fix="use training.precision: bf16 or fp32, or a smaller optimizer.lr",
            )
        yield StepReport(
            step=step + 1,
            loss=value,
            lr=optimizer.param_groups[0]["peak_lr"] * factor,
            grad_norm=norm,
            rows=sum(task.rows(micro) for micro in batch),
            seconds=time.perf_counter() - started,
            skipped=overflow,
            scale=scale,
        )


def try_step(
    model: nn.Module,
    task: "Task",
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    *,
    base_dropout: bool = True,
    loss_of: LossOf | None = None,
    around: Around = nullcontext,
) -> None:
    """Computes the gradients of one micro-batch and throws them away, to see whether they fit into memory.

    Weights, optimizer, scaler and the random state are as before. Args as :func:`train_steps`.
    """
    numpy_state = np.random.get_state()
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        set_training(model, True, base_dropout=base_dropout)
        torch.manual_seed(0)
        weight = max(1.0, task.weight(batch))
        gradients_of(model, loss_of or plain_loss(task), scaler, compute, around)(compute.put(batch), weight)
    np.random.set_state(numpy_state)
    optimizer.zero_grad(set_to_none=True)


def gradients_of(
    model: nn.Module, loss_of: LossOf, scaler: torch.amp.GradScaler, compute: Compute, around: Around
) -> Run:
    """How the gradients of a micro-batch are computed. Args as :func:`train_steps`."""

    def run(batch: Batch, weight: Tensor | float) -> Tensor:
        with around(batch), compute.autocast():
            loss = loss_of(model, batch) / weight
        _backward(loss, scaler)
        return loss.detach()

    return run


def _backward(loss: Tensor, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(loss).backward()


def _not_finite(step: int, loss: float, named: Sequence[tuple[str, nn.Parameter]]) -> NumericsError:
    where = f"step {step + 1}"
    fix = "lower optimizer.lr, or use training.precision: fp32"
    if not math.isfinite(loss):
        return NumericsError(f"the loss is {loss}", where=where, fix=fix)
    bad = [key for key, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    return NumericsError(f"the gradient of {', '.join(bad[:3]) or 'the model'} is not finite", where=where, fix=fix)
