"""Quantised bases: which kinds there are, what each needs, and how transformers is asked for one.

Only the weights of linear projections become codes. Heads, norms and embeddings stay as they are, and what is
trained is float32 as ever; gradients reach it through the codes, which never change.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.errors import RecipeError

# Kind -> what transformers calls its method.
_METHODS = {"int8": "torchao", "bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes"}
# Bytes of a code, and of the scales that share it: one float32 for each output, or for each 64 codes.
_CODE_BYTES = {"int8": 1.0, "bnb-8bit": 1.0, "bnb-4bit": 0.5 + 4 / 64}
_WHERE = "base.quantize"


def check_possible(kind: str, device: torch.device, *, stored: str | None = None, where: str = _WHERE) -> None:
    """Refuses a quantisation that this machine cannot do.

    Args:
        kind: As in the recipe's ``base.quantize``.
        device: Where the run computes.
        stored: The method by which a base's files are quantised already, or None.
        where: Names the place in the message.

    Raises:
        RecipeError: The device cannot do it, or a package is missing.
    """
    method = stored if kind == "none" else _METHODS[kind]
    if method is None:
        return
    what = "a base quantised by bitsandbytes" if kind == "none" else kind
    # On a CPU it repacks its codes in the first forward pass, and fails at sizes that are no multiple of 64.
    if method == "bitsandbytes" and device.type != "cuda":
        raise RecipeError(
            f"{what} needs a CUDA device, and this run is on {device}",
            where=where,
            fix="use a CUDA device, or the full-precision model (on a CPU perhaps with base.quantize=int8)",
        )
    check_package(method, "these files are quantised and need" if kind == "none" else f"{kind} needs", where=where)


def check_package(method: str, what: str, *, where: str) -> None:
    """Refuses a method whose package is missing or older than transformers needs.

    Args:
        method: As transformers calls it: torchao, bitsandbytes, or another one, which transformers itself checks.
        what: Begins the message: what needs the package.
        where: Names the place in the message.

    Raises:
        RecipeError: With the command that installs it.
    """
    from transformers import utils

    has = {
        "torchao": utils.is_torchao_available,
        "bitsandbytes": lambda: utils.is_bitsandbytes_available() and utils.is_accelerate_available(),
    }
    if method in has and not has[method]():
        names = "bitsandbytes accelerate" if method == "bitsandbytes" else method
        raise RecipeError(
            f"{what} {names.replace(' ', ' and ')}, missing here or older than this transformers takes",
            where=where,
            fix=f'pip install --upgrade {names}   (or "ticktune[quantized]")',
        )


def loading_arguments(kind: str, *, keep: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` that quantise a base while it is read.

    Args:
        kind: As in the recipe's ``base.quantize``; ``none``: no arguments.
        keep: Names of the modules that stay as they are.
        dtype: How the rest is held; bitsandbytes' 4-bit products are computed in it.
        device: Where bitsandbytes puts the model; its codes are made there.
    """
    import transformers

    names = sorted(keep)
    if kind == "none":
        return {}
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # Its default changes settings of torch.compile for the whole process.
        codes = Int8WeightOnlyConfig(set_inductor_config=False)
        return {"quantization_config": transformers.TorchAoConfig(codes, modules_to_not_convert=names)}
    if kind == "bnb-8bit":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=names)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=names,
        )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def merge_obstacle(method: str) -> str:
    """Returns why nothing merges into files that are quantised.

    A code stands for a multiple of a scale that it shares with its row or block. Rows of Q and columns of P are no
    such multiples, and P's columns would share the scales of the rows of down that are there already.

    Args:
        method: As transformers calls it.
    """
    return f"the base is quantised (by {method}), and codes cannot hold the ticks exactly"


MERGE_WAY_OUT = "merge into the full-precision model that it was made from, and quantise the merged folder again"


def is_coded(tensor: Tensor) -> bool:
    """Whether a weight is codes with scales: integers, or a tensor class that wraps them."""
    return hasattr(tensor, "__tensor_flatten__") or not (tensor.is_floating_point() or tensor.is_complex())


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is codes, however it was quantised."""
    return bool(getattr(model, "is_quantized", False)) or any(is_coded(p) for p in model.parameters())


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that a weight consists of: itself, or its codes and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from plain_parts(getattr(tensor, name))
        return
    yield tensor
    # bitsandbytes: scales of 4-bit weights (perhaps quantised themselves), and of 8-bit ones.
    state = getattr(tensor, "quant_state", None)
    nested = getattr(state, "state2", None)
    for scales in (
        getattr(state, "absmax", None),
        getattr(state, "offset", None),
        getattr(nested, "absmax", None),
        getattr(tensor, "CB", None),
        getattr(tensor, "SCB", None),
    ):
        if isinstance(scales, Tensor):
            yield scales


def saved_bytes(model: nn.Module, keep: Iterable[str], kind: str, width: int) -> int:
    """Estimates the memory that a kind saves.

    Args:
        model: Not quantised; may be on the meta device.
        keep: Names of the modules that stay as they are.
        kind: As in the recipe's ``base.quantize``.
        width: Bytes of a value that is not quantised.
    """
    if kind == "none":
        return 0
    kept, saved = set(keep), 0.0
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or (
            type(module).__name__ == "Conv1D" and _METHODS[kind] == "bitsandbytes"
        )
        if is_linear and name not in kept:
            weight = module.get_parameter("weight")
            scales = 0 if kind == "bnb-4bit" else 4 * weight.shape[0]
            saved += weight.numel() * (width - _CODE_BYTES[kind]) - scales
    return int(saved)
