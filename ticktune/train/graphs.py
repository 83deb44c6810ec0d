"""Forward and backward passes as CUDA graphs, one for each shape of batch: all kernels of one start with one call.

A small model's kernels are done before the next ones are launched, so that a GPU waits for Python most of the time. A
graph is recorded once and replayed with other numbers in the same places: batches are copied into it, and gradients
stay where they are. What is trained, its gradients and AdamW's moments lie in one buffer for each role, so that an
optimizer step is a few kernels too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.device import Compute, is_out_of_memory
from ticktune.errors import first_line
from ticktune.tasks.batch import IGNORED, Batch

MOST = 64
"""Shapes that have graphs; batches of further ones are computed without."""

_LENGTHS = 8
"""Lengths that rows are padded to: the eighths of the longest."""

_WARM = 2  # runs before one is recorded: libraries choose and reserve what they need in the first
_ALLOWED, _ALLOWED_HALF = 1e-4, 5e-2  # relative; rounding is 1e-6 in float32 and 1e-2 in half precision

Run = Callable[[Batch, Tensor | float], Tensor]
"""Adds the gradients of a micro-batch, on the device, whose loss is divided by a number; returns the loss, detached."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""From a computation: what computes it again, and the tensor that then holds its result."""


class Graphs:
    """Computes gradients of micro-batches, each shape by a graph of its own.

    Args:
        run: Computes them without one.
        optimizer: What its parameters are trained by; see :attr:`optimizer`.
        compute: Device and precision.
        unused: Entries of batches that the computation makes no use of.
        record: Makes a graph; None: a CUDA graph, whose memory all graphs have in common.

    Attributes:
        optimizer: AdamW of the flat parameters, which are what is to be clipped and stepped.
    """

    def __init__(
        self,
        run: Run,
        optimizer: torch.optim.AdamW,
        compute: Compute,
        *,
        unused: Sequence[str] = (),
        record: Record | None = None,
    ) -> None:
        self.optimizer = flattened(optimizer)
        self._run = run
        self._compute = compute
        self._unused = frozenset(unused)
        self._record = record or _in_one_pool(compute.device)
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
        """
        batch = {name: value for name, value in batch.items() if name not in self._unused}
        key = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        if key not in self._graphs:
            if len(self._graphs) >= MOST:
                torch.manual_seed(seed)
                return self._run(self._compute.put(batch), self._scalar(weight))
            self._graphs[key] = self._recorded(batch, weight)
        graph = self._graphs[key]
        for name, value in batch.items():
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
            self._clip = self._record(lambda: nn.utils.clip_grad_norm_(self.parameters, most))
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

        Gradients are zero afterwards, and the random state is as before.

        Args:
            batch: A micro-batch.
            weight: What its loss is divided by.
        """
        others = [name for name, value in batch.items() if not isinstance(value, Tensor) and name not in self._unused]
        if others:
            return f"its batches hold more than tensors: {', '.join(others)}"
        device = self._compute.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            plain = self._run(self._compute.put(batch), self._scalar(weight)).clone()
            expected = [g.clone() for g in self._gradients()]
            self._zero()
            try:
                loss = self.backward(batch, weight, 0).clone()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return f"the model cannot be recorded: {first_line(error)}"
            found = [g.clone() for g in self._gradients()]
            self._zero()
        pairs = [*zip(expected, found, strict=True), (plain, loss)]
        allowed = _ALLOWED if self._compute.precision == "fp32" else _ALLOWED_HALF
        apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
        if apart <= allowed**2 * sum(float(a.double().square().sum()) for a, _ in pairs):
            return None
        return "a replayed step has other gradients"

    def _recorded(self, batch: Batch, weight: float) -> "_Graph":
        before = [g.clone() for g in self._gradients()]
        held = self._compute.put({name: value.clone() for name, value in batch.items()})
        scalar = self._scalar(weight)
        replay, loss = self._record(lambda: self._run(held, scalar))
        torch._foreach_copy_(self._gradients(), before)
        return _Graph(held, scalar, replay, loss)

    def _scalar(self, weight: float) -> Tensor:
        return torch.full((), weight, dtype=torch.float32, device=self._compute.device)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _zero(self) -> None:
        torch._foreach_zero_(self._gradients())


class _Graph:
    """A recorded computation.

    Args:
        batch: Where it reads its batch,
        weight: and what its loss is divided by.
        replay: Computes it.
        loss: Where it leaves the loss.
    """

    def __init__(self, batch: Batch, weight: Tensor, replay: Callable[[], Any], loss: Tensor) -> None:
        self.batch, self.weight, self.replay, self.loss = batch, weight, replay, loss


def _in_one_pool(device: torch.device) -> Record:
    """Records CUDA graphs. They run one after the other, so each may use the memory of the others."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
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


def flattened(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """AdamW with one parameter for each group, of which the group's own parameters become parts.

    Their values, gradients and moments are parts of its own, so that either optimizer's state is the other's: what is
    read from the given one, and saved of it, is up to date after each step of the new one. All have a gradient from
    now on, zero where nothing was computed. Learning rates are tensors, which a recorded step reads.

    Args:
        optimizer: It may have a state; its parameters have no gradients.
    """
    groups = []
    for group in optimizer.param_groups:
        members: list[nn.Parameter] = group["params"]
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in members]))
        flat.grad = torch.zeros_like(flat)
        for p, part, slope in zip(members, _parts(flat.data, members), _parts(flat.grad, members), strict=True):
            p.data, p.grad = part, slope
        rate = torch.full((), group["lr"], dtype=torch.float32, device=flat.device)
        groups.append({**group, "params": [flat], "lr": rate, "capturable": flat.device.type == "cuda"})
    found = torch.optim.AdamW(groups, fused=True)
    found._warned_capturable_if_run_uncaptured = True  # as it is before it is recorded
    for group, own in zip(optimizer.param_groups, found.param_groups, strict=True):
        members, [flat] = group["params"], own["params"]
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
    """A batch whose rows are padded further, to one of a few lengths, so that many batches have one shape.

    Args:
        batch: Collated; one with entries that this function does not know how to pad is returned as it is.
        longest: Tokens in a row at the most.
        filler: Id of the token that fills rows up.
    """
    fillers = {"input_ids": filler, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
    rows = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 2}
    if "attention_mask" not in rows or not rows.keys() <= fillers.keys():
        return batch
    unit = 8 * math.ceil(longest / (8 * _LENGTHS))

    def padded(value: Tensor, filler: int) -> Tensor:
        length = value.shape[1]
        return F.pad(value, (0, max(length, min(longest, unit * math.ceil(length / unit))) - length), value=filler)

    return batch | {name: padded(value, fillers[name]) for name, value in rows.items()}
