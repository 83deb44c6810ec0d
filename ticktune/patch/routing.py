"""Whether one tick beside a block of experts is the same tick in every expert, so that it can be merged into them.

It is where the block hands its experts what went into it, the routing weights w of a token sum to one, and the sum
over the experts leaves the block as it is: Σ_e w_e tick(x) = tick(x). The block is run to see it; where it has no
weights, a block of a small model of its class answers, which has the same code and switches.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import first_line
from ticktune.patch.layout import Ffn
from ticktune.patch.proof import residual
from ticktune.patch.shrink import small_models

_LARGE = 1000.0  # times what a block computes, so that the difference of two runs is not lost in rounding
_TOKENS = 16


def routing_obstacle(model: nn.Module, ffns: Sequence[Ffn]) -> str:
    """Returns why one tick beside blocks of experts cannot be merged into these, or an empty string.

    Neither the model nor torch's random state is changed.

    Args:
        model: A transformers model, perhaps on the meta device.
        ffns: Its blocks that are asked for, all of experts.
    """
    real = [ffn for ffn in ffns if ffn.device.type != "meta"]
    found = (_obstacle(ffn.experts, ffn.down, ffn.hidden_size) for ffn in real if ffn.experts is not None)
    seen, where = next((text for text in found if text), ""), ""
    if not seen and len(real) < len(ffns):
        seen = _of_small(model, [ffn for ffn in ffns if ffn.device.type == "meta"])
        where = " (seen on a small model of its class, as this one has no weights)"
    return f"{seen}, so one tick beside the experts cannot be merged into them{where}" if seen else ""


def _of_small(model: nn.Module, ffns: Sequence[Ffn]) -> str:
    """The same of the blocks that stand under the same names in a small model, whatever the numbers in these."""
    names = {id(module): name for name, module in model.named_modules()}
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(names[id(ffn.down)])) for ffn in ffns}
    try:
        for small in small_models(type(model), model.config):
            modules = dict(small.named_modules())
            found = [[n for n in modules if re.fullmatch(p, n) and _is_experts(modules[n])] for p in patterns]
            if not all(found):
                continue
            paths = [name for some in found for name in some]
            texts = (_obstacle(modules[p.rpartition(".")[0]], modules[p], _hidden_size(modules[p])) for p in paths)
            return next((text for text in texts if text), "")
    except ValueError as error:
        return f"its routing weights could not be seen: no small model of its class can be built ({error})"
    return "its routing weights could not be seen: a small model of its class has no such experts"


def _is_experts(module: nn.Module) -> bool:
    return getattr(module, "down_proj", None) is not None and module.get_parameter("down_proj").ndim == 3


def _hidden_size(experts: nn.Module) -> int:
    return int(experts.get_parameter("down_proj").shape[1])


def _obstacle(block: nn.Module, experts: nn.Module, hidden_size: int) -> str:
    first = next(experts.parameters())
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 0.02
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, hidden_size, generator=generator).to(first.device, first.dtype)
    added = (_LARGE * torch.randn(_TOKENS, hidden_size, generator=generator)).to(first.device, first.dtype)
    try:
        given, weights, plain = _run(block, experts, x, None)
        _, _, changed = _run(block, experts, x, added)
    except Exception as error:  # noqa: BLE001 - any class of any version may stand here, and the reason is reported
        return f"its routing weights could not be seen: the block does not run alone ({first_line(error)})"
    sums = weights.float().sum(-1)
    if float((sums - 1).abs().max()) > tolerance:
        low, high = f"{float(sums.min()):.3g}", f"{float(sums.max()):.3g}"
        return f"the routing weights of a token sum to {low if low == high else f'{low} to {high}'}, not to one"
    if given.numel() != x.numel() or residual(given.reshape(x.shape), x) > tolerance:
        return "the experts are not given what goes into their block"
    left = (changed - plain).double().reshape(added.shape)
    factor = float((left * added.double()).sum() / added.double().square().sum())
    if abs(factor - 1) > tolerance or residual(left, added) > max(tolerance, 10 * torch.finfo(first.dtype).eps):
        return f"what the experts give does not leave their block as it is (it is multiplied by {factor:.3g})"
    return ""


def _run(block: nn.Module, experts: nn.Module, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the experts are given, their weights, and what the block gives with ``added`` to what they give."""
    seen: list[tuple[Tensor, Tensor]] = []
    third = list(inspect.signature(experts.forward).parameters)[2:3]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        weights = args[2] if len(args) > 2 else kwargs[third[0]]
        given = args[0] if args else next(iter(kwargs.values()))
        seen.append((given.detach().clone(), weights.detach().clone()))
        return output if added is None else output + added.reshape(output.shape)

    handle = experts.register_forward_hook(after, with_kwargs=True)
    # Training would add noise to what is routed.
    training = [module for module in block.modules() if module.training]
    try:
        block.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = block(x.clone())
    finally:
        handle.remove()
        for module in training:
            module.training = True
    if not seen:
        raise ValueError("its experts are not called")
    given, weights = seen[0]
    return given, weights, output[0] if isinstance(output, tuple) else output
