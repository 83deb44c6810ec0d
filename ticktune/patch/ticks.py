"""The mathematics of ticks, in pure torch.

A feed-forward block (FFN) maps hidden -> wide -> hidden: *up* (and *gate*) into the wide space, *down* out of
it. Papers on adapters swap the two words; here Q and U lead up and P leads down.

Legend of shapes: ``h`` hidden_size, ``t`` the tick's dim, ``...`` any leading dimensions (batch, seq).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["plain", "gated"]


def plain_tick(
    x: Tensor,
    P: Tensor,
    Q: Tensor,
    r: Tensor | None,
    act: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    """P σ(Qx + r): the parallel adapter of He et al. 2021 (arXiv 2110.04366) with s = 1 and no output bias.

    Args:
        x: The FFN's input, ``(..., h)``.
        P: ``(h, t)``.
        Q: ``(t, h)``.
        r: ``(t,)``, or None where the FFN's own projections have no bias.
        act: σ, the FFN's own activation.
        dropout: Applied to the hidden units.

    Returns:
        ``(..., h)``, in the dtype of ``x`` or of autocast.
    """
    hidden = F.linear(x, Q.to(x.dtype), None if r is None else r.to(x.dtype))
    hidden = dropout(act(hidden))
    return F.linear(hidden, P.to(hidden.dtype))


def gated_tick(
    x: Tensor,
    P: Tensor,
    Q: Tensor,
    U: Tensor,
    act: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
    *,
    together: bool = False,
) -> Tensor:
    """P (σ(Qx) ⊙ Ux): the same widening on a gated FFN, down(σ(gate x) ⊙ up x); no bias is needed.

    Args and result as :func:`plain_tick`; U is ``(t, h)``. ``together``: one product with Q and U, which reads x once.
    """
    if together:
        gate, up = F.linear(x, torch.cat([Q, U]).to(x.dtype)).chunk(2, dim=-1)
    else:
        gate, up = F.linear(x, Q.to(x.dtype)), F.linear(x, U.to(x.dtype))
    hidden = dropout(act(gate) * up)
    return F.linear(hidden, P.to(hidden.dtype))


def drop_probability(dropout: tuple[nn.Module, str] | None) -> float:
    """With which probability a block drops its hidden units now.

    Args:
        dropout: Module and attribute name of that dropout (a probability or an ``nn.Dropout``), or None.
    """
    return 0.0 if dropout is None or not dropout[0].training else probability_of(dropout)


def probability_of(dropout: tuple[nn.Module, str]) -> float:
    """The probability of a dropout, whether it acts now or not. Args as :func:`drop_probability`."""
    own: Any = getattr(*dropout)
    return float(getattr(own, "p", own))


class Tick(nn.Module):
    """A tick beside one FFN, in split form: the base's projections are untouched and run as before.

    It reads the input of the FFN's up projection and adds to the output of its down projection, through two
    forward hooks on those modules; so every dropout, residual and norm around them acts as it will on the
    merged model. All parameters are float32 whatever the base's dtype, and are cast to the input's dtype
    in the forward pass.

    Args:
        hidden_size: ``h``.
        dim: ``t``, at least 1.
        form: ``plain`` or ``gated``.
        bias: Whether a plain tick has r.
        act: The FFN's own activation (the module itself, not a copy).
        base_dropout: Module and attribute name of the dropout that the FFN applies to its hidden units (a
            probability or an ``nn.Dropout``), or None. It acts on the tick's units alike.
        dropout: The tick's own dropout on its hidden units, in [0, 1).
        generator: Draws Q and U, uniform in ±1/√h: ``kaiming_uniform(a=√5)``, as He et al. use it. P and r
            are zero, so the function is unchanged at first.
        device: Where the parameters live.
        fast: Whether a gated tick computes Qx and Ux together.
    """

    def __init__(
        self,
        hidden_size: int,
        dim: int,
        *,
        form: Form,
        bias: bool,
        act: Callable[[Tensor], Tensor],
        base_dropout: tuple[nn.Module, str] | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        fast: bool = False,
    ) -> None:
        super().__init__()
        self.form: Form = form
        self.dropout = dropout
        self.fast = fast
        # In tuples: registered as submodules they would appear a second time in the model's state dict.
        self._act = (act,)
        self._base_dropout = base_dropout
        self._input: Tensor | None = None

        def uniform() -> nn.Parameter:
            if torch.device(device).type == "meta":  # values would take memory, and be thrown away
                return nn.Parameter(torch.empty(dim, hidden_size, device=device))
            bound = 1 / math.sqrt(hidden_size)
            values = torch.empty(dim, hidden_size).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values.to(device))

        self.Q = uniform()
        self.r = nn.Parameter(torch.zeros(dim, device=device)) if bias and form == "plain" else None
        self.U = uniform() if form == "gated" else None
        self.P = nn.Parameter(torch.zeros(hidden_size, dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the tick adds to FFN(x); ``(..., h)`` -> ``(..., h)``."""
        if self.U is not None:
            return gated_tick(x, self.P, self.Q, self.U, self._act[0], self._drop, together=self.fast)
        return plain_tick(x, self.P, self.Q, self.r, self._act[0], self._drop)

    def attach(self, up: nn.Module, down: nn.Module) -> list[Any]:
        """Hooks the tick between ``up`` and ``down``; returns the handles that undo it."""
        return [
            up.register_forward_pre_hook(self._capture, with_kwargs=True),
            down.register_forward_hook(self._add),
        ]

    # Bound methods, not closures: a deep copy of the model then calls the copied tick.
    def _capture(self, up: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else next(iter(kwargs.values()))

    def _add(self, down: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, self._input = self._input, None
        assert x is not None, "down was called without up"
        added: Tensor = self(x)
        return output + added.to(output.dtype)

    def _drop(self, hidden: Tensor) -> Tensor:
        hidden = F.dropout(hidden, drop_probability(self._base_dropout))
        return F.dropout(hidden, self.dropout, training=self.training)


class ExpertTicks(nn.ModuleList):
    """A tick beside each expert of a block that routes tokens to experts.

    A token's experts add up with the routing weights, and so do their ticks: Σ_e w_e (FFN_e(x) + tick_e(x)).

    Args:
        ticks: One :class:`Tick` for each expert, in order.
    """

    def attach(self, experts: nn.Module) -> list[Any]:
        """Hooks the ticks on the module that computes the routed experts; returns the handles that undo it."""
        return [experts.register_forward_hook(self._add, with_kwargs=True)]

    def _add(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        x, index, weights = (*args, *(kwargs[name] for name in names[len(args) :]))[:3]
        added = torch.zeros_like(output)
        for number, tick in enumerate(self):
            rows, place = torch.where(index == number)
            if len(rows):
                share = tick(x[rows]) * weights[rows, place, None]
                added = added.index_add(0, rows, share.to(added.dtype))
        return output + added
