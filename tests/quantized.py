"""Bases with int8 codes, in memory and on disk."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ticktune.patch.attach import unquantized_modules
from ticktune.quantize import is_coded, loading_arguments, plain_parts


def load_int8(folder: Path, auto: str = "AutoModelForSequenceClassification", **entries: Any) -> nn.Module:
    """A saved tiny model, quantised while it is read as a recipe would."""
    import transformers

    cls = getattr(transformers, auto)
    keep = unquantized_modules(cls.from_pretrained(folder, **entries))
    loading = loading_arguments("int8", keep=keep, dtype=torch.float32, device=torch.device("cpu"))
    model: nn.Module = cls.from_pretrained(folder, **entries, **loading)
    return model.eval()


def int8_copy(source: Path, folder: Path, *, labels: int = 2) -> None:
    """Saves ``folder/full``, a classifier on the body in ``source``, and ``folder/int8``, the same as codes."""
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    model.save_pretrained(folder / "full")
    load_int8(folder / "full").save_pretrained(folder / "int8")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for target in ("full", "int8"):
            shutil.copyfile(source / name, folder / target / name)


def codes(model: nn.Module) -> dict[str, bytes]:
    """The bytes of all codes and scales."""
    return {
        name: b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in plain_parts(parameter))
        for name, parameter in model.named_parameters()
        if is_coded(parameter)
    }
