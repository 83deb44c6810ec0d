"""Training states on disk: save, verify, find the newest, restore. Takes no part in the loop."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.console import Console
from ticktune.errors import CheckpointError, NumericsError, PatchError
from ticktune.files import new_directory, read_json, remove_directory, verify_directory, write_json
from ticktune.patch.attach import adapter_parameters, adapter_state, load_adapter_state, not_finite
from ticktune.weights import load_weights, tensor_bytes

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_DAMAGED = "damaged-"


@dataclass
class Progress:
    """What a run remembers besides tensors.

    Args:
        step: Optimizer steps done.
        best_step: Step of the best evaluation, or None.
        best_score: Its score.
        bad_evaluations: Evaluations since then.
        skipped: Steps that fp16 skipped.
        seconds: Time spent training, over all starts.
        rows: Rows that were trained on.
        history: Every evaluation: {"step": …, "split": …, "metrics": {…}}.
        unlogged: Lines that a full disk kept out of the log; they are written when the run goes on.
        ffn: How the ticks are computed, ``split`` or ``wide``; None: not chosen yet.
    """

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    bad_evaluations: int = 0
    skipped: int = 0
    seconds: float = 0.0
    rows: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    unlogged: list[dict[str, Any]] = field(default_factory=list)
    ffn: str | None = None


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    best: dict[str, Tensor] | None,
    *,
    keep: int,
) -> Path:
    """Writes ``directory/step-00000400`` as a whole, verifies it, and retires the oldest.

    Args:
        directory: The run's checkpoints folder.
        model: With ticks.
        optimizer: Its state is saved by parameter key.
        scaler: Its state is saved when it is active.
        progress: See there.
        best: The best adapter's tensors so far, if any.
        keep: How many of the newest stay.

    Raises:
        ResourceError: The disk is full.
        CheckpointError: What was written does not read back.
        NumericsError: A tensor holds NaN or infinity; nothing is written.
    """
    from safetensors.torch import save_file

    target = directory / f"step-{progress.step:08d}"
    tensors, state = adapter_state(model), _optimizer_tensors(model, optimizer)
    check_finite(tensors | state, f"step {progress.step}")
    needed = tensor_bytes(tensors) + tensor_bytes(state) + tensor_bytes(best or {})
    with new_directory(target, replace=True, needed=needed) as temporary:
        save_file(_on_cpu(tensors), temporary / "adapter.safetensors")
        save_file(_on_cpu(state), temporary / "optimizer.safetensors")
        if best is not None:
            save_file(_on_cpu(best), temporary / "best.safetensors")
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                "progress": asdict(progress),
                "scaler": scaler.state_dict(),
            },
        )
    verify_directory(target)
    for old in find_checkpoints(directory)[keep:]:
        remove_directory(old)
    return target


def checkpoint_bytes(model: nn.Module, *, with_best: bool) -> int:
    """About how large a checkpoint becomes: what is trained, two moments of AdamW, and the best adapter so far."""
    return tensor_bytes(adapter_state(model)) * (4 if with_best else 3)


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Refuses to write what no run could go on from.

    Args:
        tensors: By name.
        where: Names the step.

    Raises:
        NumericsError: One holds NaN or infinity.
    """
    name = not_finite(tensors)
    if name is not None:
        raise NumericsError(
            f"{name.replace('#', ', the optimizer state ')} holds NaN or infinity after the update, and is not saved",
            where=where,
            fix="lower optimizer.lr, or set optimizer.clip: 1.0",
        )


def find_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the newest step first; none is opened."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(directory: Path) -> Path | None:
    """Returns the newest checkpoint that verifies; a damaged one is put aside as ``damaged-…`` with a warning.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    found = find_checkpoints(directory)
    for path in found:
        try:
            verify_directory(path)
        except CheckpointError as error:
            aside = path.with_name(f"{_DAMAGED}{path.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = path.with_name(f"{_DAMAGED}{path.name}-{number}")
            path.rename(aside)
            Console().warn(f"{error}; put aside as {aside.name}, an older checkpoint is used")
            continue
        return path
    if found or any(directory.glob(f"{_DAMAGED}*")):
        raise CheckpointError(
            "all checkpoints are damaged",
            where=str(directory),
            fix="start again with: ticktune train --restart",
        )
    return None


def restore_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Puts a verified checkpoint back.

    Returns:
        The progress, and the best adapter's tensors so far, if any.

    Raises:
        CheckpointError: It is from a newer version, or does not fit the model.
    """
    state = read_json(path / "state.json")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint has the format {state.get('format')}, this version reads {FORMAT}",
            where=str(path),
            fix="use the version of ticktune that wrote it (run.json names it), or start again with --restart",
        )
    try:
        load_adapter_state(model, load_weights(path / "adapter.safetensors"))
    except PatchError as error:
        raise CheckpointError(f"the checkpoint does not fit this model: {error}", where=str(path)) from error
    _restore_optimizer(path, model, optimizer, load_weights(path / "optimizer.safetensors"))
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    best = path / "best.safetensors"
    return Progress(**state["progress"]), load_weights(best) if best.exists() else None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for key, _, parameter in adapter_parameters(model):
        for name, value in optimizer.state.get(parameter, {}).items():
            # Parameters that lie in one buffer have one count of steps, and a file no two names for a tensor.
            tensors[f"{key}#{name}"] = value.clone() if name == "step" else value
    return tensors


def _restore_optimizer(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = {key: parameter for key, _, parameter in adapter_parameters(model)}
    for name, tensor in tensors.items():
        key, _, kind = name.rpartition("#")
        if key not in parameters:
            raise CheckpointError(f"the optimizer state {name} has no place in this model", where=str(path))
        optimizer.state[parameters[key]][kind] = tensor.to(parameters[key].device)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
