"""Merged == base + adapter, proved by stock transformers in a fresh process."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ticktune.errors import ExportError, ResourceError
from ticktune.export.stock_forward import main_tensor
from ticktune.files import FULL, full_disk

TOLERANCE = 1e-5
_PROOF = 1000  # the ticks' effect must be so many times the tolerance, else equality proves nothing
_SCRIPT = Path(__file__).with_name("stock_forward.py")

Decide = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Args:
        rows: Rows compared.
        max_difference: Largest difference of a logit between base + adapter here and the merged folder there.
        tolerance: What it may be: 1e-5 x max(1, largest logit).
        control_difference: The same for the unticked base, saved and reloaded.
        effect: Largest change of a logit by ticks and norms.
        is_conclusive: Whether the effect is at least 1000 x the tolerance.
        decisions: Predictions compared.
        changed: How many differ; only those closer than twice the largest difference may.
        near_ties: How many are that close.
        ticks: Ticks of the adapter; each expert's is one. 0: not counted.
        ticks_run: How many of them got input from the compared rows. The others' weights are compared with the merged
            ones, but nothing that they compute.
        idle_ticks: Keys of those that got none.
    """

    rows: int
    max_difference: float
    tolerance: float
    control_difference: float
    effect: float
    is_conclusive: bool
    decisions: int
    changed: int
    near_ties: int
    ticks: int = 0
    ticks_run: int = 0
    idle_ticks: list[str] = field(default_factory=list)

    def with_ticks(self, ran: Mapping[str, bool]) -> "Verification":
        """The same, with which ticks ran on the compared rows; see :func:`ticktune.patch.attach.watched_ticks`."""
        idle = [key for key, has_run in ran.items() if not has_run]
        return replace(self, ticks=len(ran), ticks_run=len(ran) - len(idle), idle_ticks=idle)

    def idle_text(self) -> str:
        """What to warn of where some ticks did not run, or an empty string."""
        if not self.idle_ticks:
            return ""
        return (
            f"{len(self.idle_ticks)} of {self.ticks} ticks got no input from the compared rows, so only their weights "
            f"were compared: {', '.join(self.idle_ticks[:3])}"
        )

    def lines(self) -> list[tuple[str, str]]:
        """The findings for a person."""
        equal = f"{self.decisions - self.changed}/{self.decisions}"
        return [
            ("rows compared", str(self.rows)),
            ("max |Δ logit|, merged against base + adapter", f"{self.max_difference:.2e}"),
            ("tolerance", f"{self.tolerance:.2e}"),
            ("control: base saved and reloaded", f"{self.control_difference:.2e}"),
            ("effect of ticks and norms", f"{self.effect:.3g}"),
            ("equal predictions", f"{equal}, {self.near_ties} near ties"),
            *([("ticks exercised", f"{self.ticks_run}/{self.ticks}")] if self.ticks else []),
        ]


def stock_logits(
    models: Sequence[tuple[Path, str, str]],
    batches: Sequence[dict[str, Tensor]],
    *,
    logits: Callable[[Mapping[str, Tensor]], Tensor] = main_tensor,
    same_ties: bool = False,
    folder: Path | None = None,
) -> list[list[Tensor]]:
    """Runs stock transformers as :func:`stock_outputs` does; returns for each model the logits of each batch.

    Args as there; ``logits`` makes one tensor of a model's outputs.
    """
    found = stock_outputs(models, batches, same_ties=same_ties, folder=folder)
    return [[logits(outputs) for outputs in model] for model in found]


def stock_outputs(
    models: Sequence[tuple[Path, str, str]],
    batches: Sequence[dict[str, Tensor]],
    *,
    same_ties: bool = False,
    folder: Path | None = None,
) -> list[list[dict[str, Tensor]]]:
    """Runs stock transformers in a fresh process.

    Args:
        models: (folder, auto class, dtype name or ``auto``) of each model.
        batches: Keyword arguments of each forward pass.
        same_ties: Whether all must tie the same weights as the first, the control.
        folder: Where inputs and outputs are put meanwhile; None: the system's folder for temporary files.

    Returns:
        For each model the floating-point outputs of each batch.

    Raises:
        ResourceError: The disk is full.
        ExportError: A folder does not load, or not exactly: a tensor is missing, unexpected or misshaped, or
            other weights are tied than in the first.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="ticktune-", dir=folder) as name:
        directory = Path(name)
        inputs = {f"{i}.{k}": v.cpu().contiguous().clone() for i, batch in enumerate(batches) for k, v in batch.items()}
        save_file(inputs, directory / "inputs.safetensors")
        request = {
            "inputs": str(directory / "inputs.safetensors"),
            "batches": len(batches),
            "threads": torch.get_num_threads(),
            "models": [
                {
                    "directory": str(folder),
                    "auto_class": auto_class,
                    "dtype": dtype,
                    "outputs": str(directory / f"outputs-{i}.safetensors"),
                }
                for i, (folder, auto_class, dtype) in enumerate(models)
            ],
        }
        (directory / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: the script's own folder stays off the import path.
        done = subprocess.run(
            [sys.executable, "-P", "-B", str(_SCRIPT), str(directory / "request.json")],
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # Ctrl-C on the terminal is ours to handle
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or len(lines) != len(models):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            full = next((number for number in FULL if os.strerror(number) in last), None)
            if full is not None:
                raise ResourceError(full_disk(full, directory), where=str(directory.parent))
            raise ExportError(f"stock transformers cannot load and run the merged folder: {last}")
        found = [json.loads(line) for line in lines]
        for (folder, _, _), said in zip(models, found, strict=True):
            check_loading({kind: names for kind, names in said.items() if kind != "tied"}, folder)
            if same_ties and said["tied"] != found[0]["tied"]:
                lost = sorted({*said["tied"]} ^ {*found[0]["tied"]})
                raise ExportError(f"tied weights differ from the base's: {', '.join(lost[:3])}", where=str(folder))
        answers: list[list[dict[str, Tensor]]] = [[{} for _ in batches] for _ in models]
        for i, answer in enumerate(answers):
            for key, tensor in sorted(load_file(directory / f"outputs-{i}.safetensors").items()):
                number, _, name = key.split(".", 2)
                answer[int(number)][name] = tensor
        return answers


def check_loading(found: dict[str, Any], folder: Path) -> None:
    """Refuses a folder that transformers loaded with a remark: what is a warning there is an error here."""
    if any(found.values()):
        kind, names = next((kind, names) for kind, names in found.items() if names)
        raise ExportError(f"the folder does not load exactly: {kind} {', '.join(names[:5])}", where=str(folder))


def compare(
    ours: Sequence[Tensor],
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    control: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    decide: Decide,
    *,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compares logits batch by batch.

    Args:
        ours: Of base + adapter in this process.
        merged: Of the merged folder in the fresh process.
        base: Of the base with the adapter's head, in this process.
        control: Of the same, saved and reloaded in the fresh process.
        masks: Which positions count, for logits by position; None: all.
        decide: The task's decisions and their margins.
        tolerance: Relative to max(1, largest logit).

    Raises:
        ExportError: A difference is over its tolerance, a prediction changed that is no near tie, or a logit
            is not finite.
    """
    counted = [_counted(a, m) for a, m in zip(ours, masks, strict=True)]
    # An infinite logit would make the tolerance infinite, and then anything would be equal.
    if not all(bool(torch.isfinite(a).all()) for a in counted):
        raise ExportError("the logits of base + adapter hold NaN or infinity")
    scale = max([1.0, *(float(a.abs().max()) for a in counted if a.numel())])
    difference = max(distance(a, b, m) for a, b, m in zip(ours, merged, masks, strict=True))
    allowed = tolerance * scale
    control_difference = max(distance(a, b, m) for a, b, m in zip(base, control, masks, strict=True))
    effect = max(distance(a, b, m) for a, b, m in zip(ours, base, masks, strict=True))
    decisions = changed = ties = 0
    for a, b, mask in zip(ours, merged, masks, strict=True):
        (mine, margin), (theirs, _) = decide(a), decide(b)
        counts = torch.ones_like(mine, dtype=torch.bool) if mask is None or mine.shape != mask.shape else mask
        close = margin < 2 * difference
        decisions += int(counts.sum())
        changed += int(((mine != theirs) & counts).sum())
        ties += int((close & counts).sum())
        if bool(((mine != theirs) & counts & ~close).any()):
            raise ExportError("a prediction of the merged folder differs from base + adapter")
    found = Verification(
        rows=sum(len(a) for a in ours),
        max_difference=difference,
        tolerance=allowed,
        control_difference=control_difference,
        effect=effect,
        is_conclusive=effect >= _PROOF * allowed,
        decisions=decisions,
        changed=changed,
        near_ties=ties,
    )
    if not control_difference <= allowed:
        raise ExportError(
            f"the unticked base differs by {control_difference:.2e} after saving and reloading (tolerance "
            f"{allowed:.2e}): transformers does not keep this model"
        )
    if not difference <= allowed:
        raise ExportError(f"the merged folder differs from base + adapter by {difference:.2e}, tolerance {allowed:.2e}")
    return found


def compare_outputs(
    ours: Sequence[dict[str, Tensor]],
    merged: Sequence[dict[str, Tensor]],
    base: Sequence[dict[str, Tensor]],
    control: Sequence[dict[str, Tensor]],
    decide: Decide,
) -> Verification:
    """Compares every output of a model: start and end logits, the embeddings of each tower.

    Each has its own tolerance, as large logits would allow anything to short embeddings.

    Args as :func:`compare`, with all outputs by name.

    Returns:
        The findings of the output that the ticks change least beside its tolerance, of those that they change; its
        predictions are those of all outputs of logits.
    """
    names = list(ours[0])
    if not names:
        raise ExportError("the model gives no tensor that could be compared")
    if not all(outputs.keys() == ours[0].keys() for outputs in (*ours, *merged, *base, *control)):
        raise ExportError(f"the merged folder's outputs are not {', '.join(names)}")
    found = {}
    for name in names:
        a, b, c, d = ([outputs[name] for outputs in which] for which in (ours, merged, base, control))
        try:
            found[name] = compare(a, b, c, d, [None] * len(ours), decide)
        except ExportError as error:
            raise ExportError(error.problems[0].message, where=f"output {name}") from error
    changed = [each for each in found.values() if each.effect > 0] or list(found.values())
    decided = [each for name, each in found.items() if "logits" in name] or [next(iter(found.values()))]
    return replace(
        min(changed, key=lambda each: each.effect / each.tolerance),
        rows=next(iter(found.values())).rows,
        decisions=sum(each.decisions for each in decided),
        changed=sum(each.changed for each in decided),
        near_ties=sum(each.near_ties for each in decided),
    )


def distance(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    """Largest difference of a logit at the positions that count; infinite where one is NaN.

    Raises:
        ExportError: The shapes differ.
    """
    if a.shape != b.shape:
        raise ExportError(f"the merged folder's logits have the shape {tuple(b.shape)}, expected {tuple(a.shape)}")
    delta = _counted((a.double() - b.double()).abs(), mask)
    if not delta.numel():
        return 0.0
    largest = float(delta.max())
    return math.inf if math.isnan(largest) else largest  # max() of Python would lose a NaN


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values at the positions that count; all where the mask is not one of positions."""
    return values if mask is None or values.shape[: mask.ndim] != mask.shape else values[mask]
