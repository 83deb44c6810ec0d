"""What a step costs, counted instead of timed: matrix products, saved tensors, kernels."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ticktune.train.memory import Kept


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products in a call; two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of what a call returns.

    Each storage counts once and whole, however many views of it are kept; the model's own parameters and buffers
    do not count. What was kept and is freed by the end of the call does not count either.
    """
    kept = Kept([*model.parameters(), *model.buffers()])
    with kept:
        result = run()
    total = kept.total
    del result
    return total


# They change how a tensor is seen, and start no kernel.
_VIEWS = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "detach", "alias", "expand",
    "slice", "select", "split", "split_with_sizes", "chunk", "unsqueeze", "squeeze", "as_strided", "unbind", "empty",
    "empty_like", "new_empty", "new_empty_strided", "empty_strided", "narrow", "is_same_size",
)  # fmt: skip


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], Any]) -> Counter[str]:
    """The operations of a call that compute something, by name; on a GPU each is one kernel or more."""
    with _Calls() as calls:
        run()
    return calls.found
