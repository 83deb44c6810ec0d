"""Forward and backward passes as CUDA graphs, one for each shape of batch: all kernels of one start with one call.

A small model's kernels are done before the next ones are launched, so that a GPU waits for Python most of the time. A
graph is recorded once and replayed with other numbers in the same places: batches are copied into it, and gradients
stay where they are. What is trained, its gradients and AdamW's moments lie in one buffer for each role, so that an
optimizer step is a few kernels too.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import RecipeError, first_line
from ticktune.tasks.batch import IGNORED, Batch
from ticktune.train.groups import clip_gradients

MOST_GRAPHS = 64
"""Shapes that have graphs; batches of further ones are computed without."""

_LENGTHS = 8
"""Lengths that rows are padded to: the eighths of the longest."""

_PROOFS = 3  # with other random numbers each
_NUDGE = 1e-2  # what is trained is moved by so much for the proof: where P is zero, Q and r have no gradient
_WARM = 2  # runs before one is recorded: libraries choose and reserve what they need in the first
_ALLOWED, _ALLOWED_HALF = 1e-3, 1e-1  # relative; rounding is 1e-6 in float32 and 1e-2 in half precision

Run = Callable[[Batch, Tensor | float], Tensor]
"""Adds the gradients of a micro-batch, on the device, whose loss is divided by a number; returns the loss, detached."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""From a computation: what computes it again, and the tensor that then holds its result."""


class Graphs:
    """Computes gradients of micro-batches, each shape by a graph of its own, of the batch's tensors alone.

    Args:
        run: Computes them without one.
        optimizer: Of what is trained; see :func:`flatten`.
        compute: Device and precision.
        batch: A micro-batch, which shows what has a gradient; what has none stays as it is.
        record: Makes a graph; None: a CUDA graph, whose memory all graphs have in common.

    Attributes:
        optimizer: AdamW of the flat parameters, which are what is to be clipped and stepped.
    """

    def __init__(
        self, run: Run, optimizer: torch.optim.AdamW, compute: Compute, batch: Batch, *, record: Record | None = None
    ) -> None:
        self._run = run
        self._compute = compute
        self._record = record or _in_one_pool(compute.device)
        watched = _Watched(compute.put(batch))
        with self._random_state_kept():
            run(watched, 1.0)
        self._read = [name for name in batch if name in watched.read]
        self._without = [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]
        self.optimizer = flatten(optimizer)
        self._graphs: dict[Any, _Graph] = {}
        self._clip: tuple[Callable[[], Any], Tensor] | None = None
        self._step: Callable[[], Any] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The flat parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def shapes(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def backward(self, batch: Batch, weight: float, seed: int) -> Tensor:
        """Adds the gradients of a micro-batch.

        Args:
            batch: On the CPU or on the device.
            weight: What its loss is divided by.
            seed: Of dropout.

        Returns:
            The loss, a scalar; it is overwritten by the next call.

        Raises:
            RecipeError: The computation cannot be recorded.
        """
        tensors = {name: batch[name] for name in self._read}
        others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if others:
            raise _not_recorded(f"its loss reads what is no tensor: {', '.join(others)}")
        key = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                torch.manual_seed(seed)
                loss = self._run(self._compute.put(batch), self._scalar(weight))
                self._check_gradients()
                return loss
            self._graphs[key] = self._recorded(tensors, weight)
        graph = self._graphs[key]
        for name, value in tensors.items():
            graph.batch[name].copy_(value, non_blocking=True)
        graph.weight.fill_(weight)
        torch.manual_seed(seed)
        graph.replay()
        return graph.loss

    def clip(self, most: float) -> Tensor:
        """Scales all gradients so that their norm is at most this; the same number in every call.

        Returns:
            The norm before, a scalar; it is overwritten by the next call.
        """
        if self._clip is None:
            before = [g.clone() for g in self._gradients()]
            self._clip = self._record(lambda: clip_gradients(self.parameters, most))
            torch._foreach_copy_(self._gradients(), before)
        replay, norm = self._clip
        replay()
        return norm

    def step(self) -> None:
        """Lets the optimizer make a step, and sets the gradients to zero."""
        if self._step is None:
            held = [*self._gradients(), *(p.data for p in self.parameters)]
            held += [value for state in self.optimizer.state.values() for value in state.values()]
            before = [value.clone() for value in held]
            self._step, _ = self._record(self._stepped)
            for value, earlier in zip(held, before, strict=True):
                value.copy_(earlier)
        self._step()

    def _stepped(self) -> Tensor:
        self.optimizer.step()
        self._zero()
        rate: Tensor = self.optimizer.param_groups[0]["lr"]
        return rate

    def obstacle(self, batch: Batch, weight: float) -> str | None:
        """Why gradients cannot come from graphs; None: those of a micro-batch are the same with one and without.

        What is trained is moved a little meanwhile. Gradients are zero afterwards, and the random state is as before.

        Args:
            batch: A micro-batch.
            weight: What its loss is divided by.
        """
        allowed = _ALLOWED if self._compute.precision == "fp32" else _ALLOWED_HALF
        before, generator = [p.detach().clone() for p in self.parameters], torch.Generator().manual_seed(0)
        try:
            for p in self.parameters:
                p.data.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device), alpha=_NUDGE)
            with self._random_state_kept():
                for seed in range(_PROOFS):
                    torch.manual_seed(seed)
                    expected = self._kept(self._run(self._compute.put(batch), self._scalar(weight)))
                    found = self._kept(self.backward(batch, weight, seed))
                    for one, other in zip(found, expected, strict=True):
                        if float((one - other).norm()) > allowed * float(other.norm()):
                            return "a replayed step has other gradients"
                    # Other numbers in the same places: what a record keeps of a batch would show.
                    weight *= 3
                    batch = {n: v.roll(1, 0) if isinstance(v, Tensor) and v.dim() else v for n, v in batch.items()}
        except RecipeError as error:
            return error.problems[0].message
        finally:
            self._zero()
            for p, value in zip(self.parameters, before, strict=True):
                p.data.copy_(value)
        return None

    def _kept(self, loss: Tensor) -> list[Tensor]:
        """A loss and the gradients that came with it, which are zero then.

        What fp16 cannot hold, which the scaler's first scale may bring about, counts as zero.
        """
        found = [part.double().nan_to_num(0.0, 0.0, 0.0) for part in (loss, *self._gradients())]
        self._zero()
        return found

    def _recorded(self, tensors: Batch, weight: float) -> "_Graph":
        before = [g.clone() for g in self._gradients()]
        held = self._compute.put({name: value.clone() for name, value in tensors.items()})
        scalar = self._scalar(weight)
        drawn = _drawn_on_the_host()
        try:
            replay, loss = self._record(lambda: self._run(held, scalar))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # ending one fails too
            raise _not_recorded(first_line(cause)) from error
        if self._compute.device.type == "cuda" and _drawn_on_the_host() != drawn:
            raise _not_recorded("it draws random numbers on the CPU, as those who leave out layers do")
        self._check_gradients()
        torch._foreach_copy_(self._gradients(), before)
        return _Graph(held, scalar, replay, loss)

    def _check_gradients(self) -> None:
        if any(p.grad is not None for p in self._without):
            raise _not_recorded("what has a gradient is not the same in all batches")

    def _scalar(self, weight: float) -> Tensor:
        return torch.full((), weight, dtype=torch.float32, device=self._compute.device)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _zero(self) -> None:
        torch._foreach_zero_(self._gradients())

    def _random_state_kept(self) -> AbstractContextManager[None]:
        device = self._compute.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _Watched(dict[str, Any]):
    """A batch that knows which of its entries were read."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[name] if name in self else default

    def items(self) -> Any:
        """As of a dict; all are read."""
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        """As of a dict; all are read."""
        self.read.update(self)
        return super().values()


class _Graph(NamedTuple):
    """A recorded computation.

    Args:
        batch: Where it reads its batch,
        weight: and what its loss is divided by.
        replay: Computes it.
        loss: Where it leaves the loss.
    """

    batch: Batch
    weight: Tensor
    replay: Callable[[], Any]
    loss: Tensor


def _not_recorded(reason: str) -> RecipeError:
    return RecipeError(
        f"a step cannot be recorded as a CUDA graph: {reason}",
        where="training.cuda_graphs",
        fix="set training.cuda_graphs: false; where the run has begun, start over with --restart",
    )


def _drawn_on_the_host() -> tuple[Any, ...]:
    """The state of the generators whose numbers a graph would keep."""
    numpy_state: Any = np.random.get_state()
    return torch.random.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()


def _in_one_pool(device: torch.device) -> Record:
    """Records CUDA graphs. They run one after the other, so each may use the memory of the others."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(_WARM):
                    run()
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                loss = run()
        return graph.replay, loss

    return record


def flatten(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Puts what an optimizer trains into one buffer for each group, and returns AdamW of these.

    Values, gradients and moments of the group's parameters become parts of the flat ones, so that either optimizer's
    state is the other's: what is read from the given one, and saved of it, is up to date after each step of the new
    one. Learning rates are tensors, which a recorded step reads.

    Args:
        optimizer: It may have a state. Parameters without a gradient are left alone, as AdamW leaves them.
    """
    chosen = [(group, [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
    chosen = [(group, members) for group, members in chosen if members]
    groups = []
    for group, members in chosen:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in members]))
        flat.grad = torch.zeros_like(flat)
        for p, part, slope in zip(members, _parts(flat.data, members), _parts(flat.grad, members), strict=True):
            p.data, p.grad = part, slope
        rate = torch.full((), group["lr"], dtype=torch.float32, device=flat.device)
        groups.append({**group, "params": [flat], "lr": rate, "capturable": flat.device.type == "cuda"})
    found = torch.optim.AdamW(groups, fused=True)
    found._warned_capturable_if_run_uncaptured = True  # as it is before it is recorded
    for (_, members), own in zip(chosen, found.param_groups, strict=True):
        [flat] = own["params"]
        states = [optimizer.state.get(p, {}) for p in members]
        steps = [float(state["step"]) for state in states if state]
        step = torch.full((), max(steps, default=0.0), dtype=torch.float32, device=flat.device)
        found.state[flat] = {"step": step}
        for name in ("exp_avg", "exp_avg_sq"):
            moments = [state.get(name, torch.zeros_like(p)).flatten() for state, p in zip(states, members, strict=True)]
            found.state[flat][name] = torch.cat(moments)
        for number, p in enumerate(members):
            optimizer.state[p] = {
                name: value if name == "step" else _parts(value, members)[number]
                for name, value in found.state[flat].items()
            }
    return found


def _parts(flat: Tensor, members: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in members])
    return [part.view(p.shape) for part, p in zip(parts, members, strict=True)]


def in_eighths(batch: Batch, longest: int, filler: int) -> Batch:
    """A batch whose texts are padded further, to one of a few lengths, so that many batches have one shape.

    Args:
        batch: Collated; one without an attention mask of texts is returned as it is.
        longest: Tokens in a text at the most; longer ones stay as they are.
        filler: Id of the token that fills texts up.
    """
    fillers = {"input_ids": filler, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or "input_ids" not in batch:
        return batch
    unit, length = 8 * math.ceil(longest / (8 * _LENGTHS)), mask.shape[1]
    more = max(length, min(longest, unit * math.ceil(length / unit))) - length
    return batch | {
        name: F.pad(batch[name], (0, more), value=value)
        for name, value in fillers.items()
        if name in batch and batch[name].shape == mask.shape
    }
