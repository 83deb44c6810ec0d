"""What a step costs, counted instead of timed: matrix products, saved tensors, kernels."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products in a call; two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        # Detached: a saved result would hold the record that holds it.
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of what a call returns.

    Each storage counts once and whole, however many views of it are kept; the model's own parameters and buffers
    do not count. What was kept and is freed by the end of the call does not count either.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = run()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    del result
    return sum(size for pointer, size in storages.items() if pointer not in own)


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
