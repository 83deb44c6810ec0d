"""Writes a merged folder: widened, verified, cast, and only then put in its place."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.adapter import AdapterFacts
from ticktune.device import DTYPES
from ticktune.errors import ExportError
from ticktune.export.express import as_llama, probe
from ticktune.export.stock_forward import tensors_of
from ticktune.export.verify import TOLERANCE, Decide, Verification, compare, distance, stock_logits
from ticktune.export.widen import Widening, put_head, widen
from ticktune.files import new_directory, read_json, temporary_beside, verify_directory, write_json, write_text
from ticktune.patch.attach import Plan
from ticktune.report.card import merged_card
from ticktune.weights import tensor_bytes

FACTS = "ticktune.json"


@dataclass(frozen=True)
class Evidence:
    """What the merged folder is compared on.

    Args:
        batches: Keyword arguments of the model, on the CPU.
        masks: Which positions of each batch count; None: all.
        ours: Logits of base + adapter on them.
        base: Logits of the base with the adapter's head.
        logits: What makes one tensor of a model's outputs by name.
        decide: The task's decisions.
        metrics: Logits of all batches -> the task's metrics; empty where there are no answers.
        ran: Key of each tick -> whether it ran on the batches; empty: not watched.
    """

    batches: Sequence[dict[str, Tensor]]
    masks: Sequence[Tensor | None]
    ours: Sequence[Tensor]
    base: Sequence[Tensor]
    logits: Callable[[Mapping[str, Tensor]], Tensor]
    decide: Decide
    metrics: Callable[[Sequence[Tensor]], dict[str, float]]
    ran: Mapping[str, bool] = field(default_factory=dict)


def write_merged(
    target: Path,
    model: nn.Module,
    processor: Any,
    tensors: dict[str, Tensor],
    facts: AdapterFacts,
    evidence: Evidence,
    *,
    dtype: str,
    adapter_sha256: str,
    pad_to: str = "auto",
    express: str = "same",
    keep_exact: bool = False,
    replace: bool = False,
    trained_on: dict[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Merges, verifies, and writes a folder that stock transformers opens.

    Merging and verifying happen in the model's dtype; the cast comes last, and what it costs is reported.

    Args:
        target: The folder; it appears as a whole, or not at all.
        model: The stock base under the adapter's class, float32 or wider, label map in its config. It is used
            up.
        processor: Tokenizer, image processor or feature extractor, saved beside the weights; None: nothing is.
        tensors: The adapter's tensors.
        facts: The adapter's facts.
        evidence: What to compare on.
        dtype: Of the saved weights.
        adapter_sha256: Recorded, to recognise the same export again.
        pad_to: See :func:`ticktune.export.widen.widen`.
        express: ``same`` architecture, or ``llama``; see :mod:`ticktune.export.express`.
        keep_exact: Whether base tensors that ``dtype`` would round stay wider: those that the base's own files
            hold in a wider dtype than most, such as the biases of some routers.
        replace: Whether an existing folder is put aside.
        trained_on: Where training held the base as codes: which, and the drift from there, for the records.
        extra_files: Further files, name -> text; see :meth:`ticktune.tasks.task.Task.extra_files`.
        poll: Called between the stages, so that a signal is noticed.

    Returns:
        What ``ticktune.json`` in the folder says.

    Raises:
        ExportError: The architecture cannot hold it, or the comparison failed; no folder is left.
        OutputError: The folder exists and ``replace`` is false.
    """
    plan = Plan(**facts.plan)
    auto_class = facts.model_class or type(model).__name__
    refuse_not_finite(tensors)
    needed = room_for(model, tensors, DTYPES[dtype])
    with (
        temporary_beside(target, needed) as aside,
        new_directory(target, replace=replace, needed=needed) as temporary,
    ):
        control, whole = aside / "control", aside / "merged"
        put_head(model, plan, tensors)
        if express == "llama":
            model = express_as_llama(model)
        _save(model, control)
        work = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
        exact = not_exact_in(model, DTYPES[dtype]) - set(plan.head) if keep_exact else set[str]()
        widened = widen(model, plan, tensors, pad_to=pad_to)
        final = temporary if dtype == work else whole
        _save(model, final)
        reloaded, merged = stock_logits(
            [(control, auto_class, work), (final, auto_class, work)],
            evidence.batches,
            logits=evidence.logits,
            same_ties=True,
            folder=aside,
        )
        poll()
        found = compare(evidence.ours, merged, evidence.base, reloaded, evidence.masks, evidence.decide)
        found = found.with_ticks(evidence.ran)
        cast: dict[str, Any] = {}
        if dtype != work:
            cast_model(model, DTYPES[dtype], exact)
            _save(model, temporary)
            [cast_logits] = stock_logits(
                [(temporary, auto_class, "auto")], evidence.batches, logits=evidence.logits, folder=aside
            )
            cast = _cast_drift(evidence, merged, cast_logits, dtype)
        if processor is not None:
            processor.save_pretrained(temporary)
        for name, text in (extra_files or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(temporary / name, text)
        document = {
            "format": 1,
            "adapter_sha256": adapter_sha256,
            "dtype": dtype,
            "pad_to": pad_to,
            "as": express,
            "widths": {w.field: w.value for w in widened},
            "widening": [asdict(w) for w in widened],
            "verification": asdict(found),
            "cast": cast,
            "trained_on": trained_on or {},
            "adapter": asdict(facts),
        }
        write_json(temporary / FACTS, document)
        write_text(
            temporary / "README.md", merged_card(asdict(facts), dict([*found.lines(), *trained_on_lines(document)]))
        )
    return document


def existing_export(
    target: Path, adapter_sha256: str, dtype: str, pad_to: str = "auto", express: str = "same"
) -> dict[str, Any] | None:
    """Returns what an existing folder says of itself when it is a verified export of the same adapter.

    Raises:
        CheckpointError: It is one of ours, but damaged.
    """
    if not (target / FACTS).is_file():
        return None
    verify_directory(target)
    document: dict[str, Any] = read_json(target / FACTS)
    asked = {"adapter_sha256": adapter_sha256, "dtype": dtype, "pad_to": pad_to, "as": express}
    return document if all(document.get(key) == value for key, value in asked.items()) else None


def verification_of(document: dict[str, Any]) -> Verification:
    """The comparison that a merged folder records."""
    return Verification(**document["verification"])


def trained_on_lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What a merged folder records of a quantised base of training, for a person."""
    found = document.get("trained_on") or {}
    if not found:
        return []
    lines = [
        (
            "trained on",
            f"a base quantised by {found['quantization']}, merged into the full-precision base; quantise the merged "
            "folder again if you need it quantised",
        )
    ]
    drift = found["drift"]
    if not drift:
        return [*lines, ("drift from training to merged", f"not measured: {found['not_measured']}")]
    lines += [
        ("max |Δ logit|, merged against the quantised model", f"{drift['max_difference']:.2e}"),
        ("predictions changed by full precision", f"{drift['changed']}/{drift['decisions']}"),
    ]
    after = drift["metrics_after"]
    return lines + [
        (f"{name}, quantised -> merged", f"{value:.4f} -> {after[name]:.4f}")
        for name, value in drift["metrics_before"].items()
    ]


def widening_of(document: dict[str, Any]) -> list[Widening]:
    """What merging did to the widths, as a merged folder records it."""
    return [Widening(**entry) for entry in document["widening"]]


def express_as_llama(model: nn.Module) -> nn.Module:
    """Writes a model as a Llama and checks on random tokens that it computes the same.

    Raises:
        ExportError: It is no Llama under another name.
    """
    llama = as_llama(model)
    batch = probe(model)
    with torch.no_grad():
        before, after = tensors_of(model.eval()(**batch)), tensors_of(llama(**batch))
    if before.keys() != after.keys():
        raise ExportError(f"written as a Llama the base gives {', '.join(after)}, expected {', '.join(before)}")
    for name, tensor in before.items():
        difference = distance(tensor, after[name], None)
        allowed = TOLERANCE * max(1.0, float(tensor.abs().max()))
        if not difference <= allowed:
            raise ExportError(
                f"written as a Llama the base differs by {difference:.2e} on random tokens, tolerance {allowed:.2e}",
                where=f"output {name}",
            )
    return llama


def _save(model: nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)  # type: ignore[operator]


def drift_of(evidence: Evidence, before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """What changes from one set of logits to another: largest difference, predictions, metrics.

    Args:
        evidence: Gives masks, decisions and metrics.
        before: Logits of each of its batches.
        after: The others.
    """
    total = changed = 0
    for a, b, mask in zip(before, after, evidence.masks, strict=True):
        mine, theirs = evidence.decide(a.float())[0], evidence.decide(b.float())[0]
        counts = torch.ones_like(mine, dtype=torch.bool) if mask is None or mine.shape != mask.shape else mask
        total += int(counts.sum())
        changed += int(((mine != theirs) & counts).sum())
    return {
        "max_difference": max(distance(a, b, m) for a, b, m in zip(before, after, evidence.masks, strict=True)),
        "decisions": total,
        "changed": changed,
        "metrics_before": evidence.metrics(before),
        "metrics_after": evidence.metrics(after),
    }


def _cast_drift(evidence: Evidence, before: Sequence[Tensor], after: Sequence[Tensor], dtype: str) -> dict[str, Any]:
    if math.isinf(max(distance(a, b, m) for a, b, m in zip(before, after, evidence.masks, strict=True))):
        raise ExportError(f"in {dtype} the logits are not finite", fix="export with --dtype float32")
    return {"dtype": dtype, **drift_of(evidence, before, after)}


def not_exact_in(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Returns the names of the tensors that a dtype cannot hold without rounding."""
    return {
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    }


def cast_model(model: nn.Module, dtype: torch.dtype, exact: Collection[str]) -> None:
    """Casts a model in place, except for the tensors that must stay as they are."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name in exact}
    model.to(dtype)
    for name, tensor in kept.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        getattr(owner, leaf).data = tensor


def room_for(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """About how many bytes merging takes on the disk: copies before and after, and that in another dtype.

    Args:
        model: The stock base, in the dtype of the work.
        tensors: The adapter's.
        dtype: Of the merged folder.
    """
    before = tensor_bytes({name: p for name, p in model.named_parameters() if p.is_floating_point()})
    work = next(p.dtype for p in model.parameters() if p.is_floating_point())
    after = before + sum(t.numel() for t in tensors.values()) * work.itemsize
    return before + after + (0 if dtype == work else after * dtype.itemsize // work.itemsize)


def refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    """Refuses to export NaN or infinity.

    Raises:
        ExportError: Naming the tensor.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ExportError(f"the tensor {name} holds NaN or infinity")
