"""Device, precision, threads and seeds: what the hardware can do, decided once and said."""

import hashlib
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ticktune.errors import RecipeError

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""What weights may be held in, as recipes and configs name it."""

_CXX = "clang++" if sys.platform == "darwin" else "g++"
_AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in which arithmetic a model runs.

    Args:
        device: The device of the model and its batches.
        precision: ``fp32``: plain; ``bf16``, ``fp16``: matrix products under ``torch.autocast``.
    """

    device: torch.device
    precision: Precision

    @property
    def dtype(self) -> torch.dtype | None:
        """What matrix products are computed in; None: the dtype of what is multiplied."""
        return _AUTOCAST.get(self.precision)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, active under fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def put(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch with its tensors on the device."""
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def choose_compute(
    device: str, precision: str, *, named: tuple[str, str] = ("training.device", "training.precision")
) -> Compute:
    """Turns the recipe's ``training.device`` and ``training.precision`` into a :class:`Compute`.

    Args:
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` (bf16 where the device has it, else fp16 on CUDA and fp32 on a CPU), ``fp32``,
            ``bf16`` or ``fp16``.
        named: What the two are called where they were asked for.

    Raises:
        RecipeError: The device is not there, or it cannot do the precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise RecipeError(
                f"{device} is not there: this machine has {count} CUDA devices",
                where=named[0],
                fix=f"use {named[0]}=cpu, or auto",
            )
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        can: dict[str, bool] = {"fp32": True, "bf16": has_bf16, "fp16": True}
        best: Precision = "bf16" if has_bf16 else "fp16"
    else:
        has_bf16 = cpu_has_bf16()
        can = {"fp32": True, "bf16": has_bf16, "fp16": False}
        best = "bf16" if has_bf16 else "fp32"
    if precision == "auto":
        return Compute(chosen, best)
    if not can[precision]:
        names = ", ".join(name for name, possible in can.items() if possible)
        reason = "has no native bfloat16 arithmetic" if precision == "bf16" else "has no float16 arithmetic"
        raise RecipeError(
            f"{precision} is not possible: this {'GPU' if chosen.type == 'cuda' else 'CPU'} {reason}",
            where=named[1],
            fix=f"use one of: {names}, or auto",
        )
    return Compute(chosen, precision)  # type: ignore[arg-type]


def cpu_has_bf16() -> bool:
    """Returns whether this CPU multiplies bfloat16 natively (AVX512-BF16, AMX, or Arm's BF16)."""
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if facts:
        return any(facts.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch < 2.12
    return bool(probe()) if probe else False


def check_compiler(device: torch.device, where: str) -> None:
    """Refuses to compile a model where no compiler is installed.

    Args:
        device: Where the model runs.
        where: What asks for it.

    Raises:
        RecipeError: The compiler that torch would call is not there.
    """
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", (_CXX,))
    names = [os.environ[variable]] if os.environ.get(variable) else list(usual)
    if not any(shutil.which(name) for name in names):
        raise RecipeError(
            f"torch compiles layers with {' or '.join(names)}, which is not installed",
            where=where,
            fix=f"install {names[0]}, name a compiler in the environment variable {variable}, or set "
            "training.compile: false",
        )


def check_graphs(device: torch.device, where: str) -> None:
    """Refuses CUDA graphs on another device.

    Args:
        device: Where the model runs.
        where: What asks for them.

    Raises:
        RecipeError: It is no CUDA device.
    """
    if device.type != "cuda":
        raise RecipeError(
            f"CUDA graphs need a CUDA device, found {device}", where=where, fix="set training.cuda_graphs: false"
        )


def mix(*numbers: int | str) -> int:
    """A 63-bit seed from several numbers: a pure function, so nothing has to be stored to resume."""
    text = ":".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; a CPU's allocator has no class of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")
    if not isinstance(error, RuntimeError):
        return False
    # oneDNN says no more where it gets no memory; what it cannot compute has no primitive descriptor.
    return str(error) == "could not create a primitive" or any(text in str(error) for text in texts)


def describe(compute: Compute) -> dict[str, Any]:
    """Facts of the machine for the run record."""
    name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else _cpu_name()
    return {
        "device": str(compute.device),
        "name": name,
        "precision": compute.precision,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
