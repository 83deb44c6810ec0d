"""The artefact: what was trained, as safetensors and JSON; saved whole, loaded strictly."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ticktune.base import BaseFiles, fingerprint, fingerprint_in_memory, stored_quantization
from ticktune.errors import BaseModelError, CheckpointError, NumericsError, PatchError
from ticktune.files import (
    as_record,
    new_directory,
    read_json,
    sha256_json,
    verify_directory,
    write_json,
    write_text,
)
from ticktune.patch.attach import (
    Plan,
    adapter_state,
    attach_plan,
    attachment_of,
    base_state,
    detach,
    head_candidates,
    load_adapter_state,
    not_finite,
)
from ticktune.patch.fields import shapes_of
from ticktune.quantize import is_quantized
from ticktune.registry import TASKS
from ticktune.report.card import adapter_card
from ticktune.tasks.task import TaskOptions
from ticktune.weights import load_weights, tensor_bytes

FORMAT = 1
TENSORS = "adapter.safetensors"
FACTS = "adapter.json"


@dataclass
class AdapterFacts:
    """What an adapter says of itself; fields that its maker did not know are null.

    Args:
        format: Version of this format.
        base: Name, commit and fingerprint of the base; how it was quantised for training (``quantize``); where its
            files are quantised, by which method (``stored_quantization``) and a hash of the shapes that they stand for.
        model_class: The transformers auto class that the adapter belongs to.
        plan: Form and dim of the ticks, the layers that have one, the trained norms, the trained head.
        task: Name, state, options and columns of the task.
        training: Versions, seed, step, metrics, hashes of data and recipe.
    """

    base: dict[str, Any]
    plan: dict[str, Any]
    format: int = FORMAT
    model_class: str | None = None
    task: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _BaseFacts:
    name: str
    fingerprint: str
    commit: str | None = None
    quantize: Literal["none", "int8", "bnb-8bit", "bnb-4bit"] | None = None
    stored_quantization: str | None = None
    shapes: str | None = None


@dataclass(frozen=True)
class _TaskFacts:
    name: str
    state: dict[str, Any]
    options: dict[str, Any]
    columns: dict[str, str]
    tokenizer: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Split:
    rows: int
    sha256: str


@dataclass(frozen=True)
class _TrainingFacts:
    data: dict[str, _Split] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def describe_adapter(
    model: nn.Module,
    base: dict[str, Any],
    *,
    model_class: str | None = None,
    task: dict[str, Any] | None = None,
) -> AdapterFacts:
    """Collects the facts of an attached model.

    Args:
        model: With ticks.
        base: Name, commit and fingerprint of the base.
        model_class: The transformers auto class.
        task: The task's facts.
    """
    return AdapterFacts(base, asdict(attachment_of(model).plan), model_class=model_class, task=task)


def write_adapter(
    directory: Path, tensors: dict[str, Tensor], facts: AdapterFacts, card: str, *, replace: bool = True
) -> None:
    """Writes an adapter folder as a whole.

    Args:
        directory: Where it shall stand.
        tensors: From :func:`ticktune.patch.attach.adapter_state`.
        facts: From :func:`describe_adapter`.
        card: The text of README.md.
        replace: Put an existing folder aside.

    Raises:
        ResourceError: The disk is full.
        OutputError: The folder exists and ``replace`` is false.
    """
    from safetensors.torch import save_file

    with new_directory(directory, replace=replace, needed=tensor_bytes(tensors)) as temporary:
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(whole, temporary / TENSORS, metadata={"format": "pt"})
        write_json(temporary / FACTS, asdict(facts))
        write_text(temporary / "README.md", card)


def read_facts(directory: Path) -> AdapterFacts:
    """Verifies an adapter folder and reads its facts.

    Raises:
        CheckpointError: A file is missing, damaged, or from a newer version.
    """
    if not (directory / FACTS).is_file():
        raise CheckpointError(f"there is no {FACTS} here: not an adapter", where=str(directory))
    verify_directory(directory)
    entries = read_json(directory / FACTS)
    if isinstance(entries, dict) and entries.get("format") != FORMAT:
        raise CheckpointError(
            f"the adapter has the format {entries.get('format')}, this version reads {FORMAT}",
            where=str(directory),
            fix="use the version of ticktune that wrote it (adapter.json names it)",
        )
    return parse_facts(entries, str(directory / FACTS))


def parse_facts(entries: Any, where: str) -> AdapterFacts:
    """Checks what an adapter says of itself: a manifest proves that its files are whole, not who wrote them.

    Raises:
        CheckpointError: An entry is missing, unknown, or of another type.
    """
    try:
        facts = as_record(AdapterFacts, entries)
        as_record(Plan, facts.plan)
        as_record(_BaseFacts, facts.base)
        as_record(_TrainingFacts, {k: v for k, v in facts.training.items() if k in ("data", "metrics", "versions")})
        if facts.task is not None:
            task = as_record(_TaskFacts, facts.task)
            as_record(TaskOptions, task.options)
            if task.name not in TASKS:
                raise ValueError(f"the task {task.name!r} is unknown")
    except ValueError as error:
        raise CheckpointError(f"what the adapter says of itself is damaged: {error}", where=where) from error
    return facts


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Reads an adapter's tensors, float32.

    Raises:
        CheckpointError: The file is missing or damaged, or names a tensor twice.
    """
    return load_weights(directory / TENSORS)


def attach_adapter(model: nn.Module, directory: Path, facts: AdapterFacts) -> None:
    """Attaches what the facts describe and loads the tensors, all of them and nothing else.

    Raises:
        CheckpointError: The adapter does not fit this model, which then is as it was.
    """
    tensors, plan = read_tensors(directory), Plan(**facts.plan)
    dims = {tensor.shape[:1].numel() for name, tensor in tensors.items() if name.endswith(".Q")}
    if plan.dim and any(plan.layers.values()) and plan.dim not in dims:  # before memory is asked for
        raise CheckpointError(
            f"{FACTS} says that the ticks have dim {plan.dim}, the tensors have {sorted(dims) or 'none'}",
            where=str(directory),
        )
    try:
        attach_plan(model, plan)
        try:
            load_adapter_state(model, tensors)
        except PatchError:
            detach(model)
            raise
    except PatchError as error:
        raise CheckpointError(f"the adapter does not fit this model: {error}", where=str(directory)) from error


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Saves what was attached to a model and trained.

    Args:
        model: From :func:`ticktune.attach`.
        directory: The adapter folder; an existing adapter there is replaced as a whole.

    Raises:
        PatchError: The model has no ticks.
        NumericsError: A tensor holds NaN or infinity; nothing is written.
        OutputError: The folder exists and is no adapter.
        ResourceError: The disk is full.
    """
    tensors = adapter_state(model)
    if (name := not_finite(tensors)) is not None:
        raise NumericsError(
            f"the tensor {name} holds NaN or infinity, and is not saved",
            where=str(directory),
            fix="load an adapter that was saved before, and lower the learning rate",
        )
    facts = describe_adapter(model, _base_facts(model, attachment_of(model).plan.head))
    write_adapter(Path(directory), tensors, facts, adapter_card(asdict(facts)))


def load_adapter(model: nn.Module, directory: str | Path, *, full_precision: bool = False) -> nn.Module:
    """Puts a saved adapter on a freshly loaded base.

    Args:
        model: The same base that the adapter was trained on.
        directory: The adapter folder.
        full_precision: The adapter was trained on a base whose files are quantised, and ``model`` is the model that
            they were made from. Only its shapes can be checked then.

    Returns:
        The same model, with the adapter attached.

    Raises:
        BaseModelError: It is another base.
        CheckpointError: The adapter is damaged or does not fit.
    """
    path = Path(directory)
    facts = read_facts(path)
    found = _base_facts(model, facts.plan["head"])["fingerprint"]
    stands_in = full_precision and not is_quantized(model)
    check_base(facts, found, str(directory), shapes=shapes_fingerprint(model) if stands_in else None)
    attach_adapter(model, path, facts)
    return model


def check_base(facts: AdapterFacts, found: str, where: str, *, shapes: str | None = None) -> bool:
    """Refuses another base than the one that the adapter was trained on.

    Args:
        facts: The adapter's.
        found: Fingerprint of the base.
        where: Names the adapter in the message.
        shapes: From :func:`shapes_fingerprint`, of a full-precision model that may stand in for a base whose files
            are quantised; None: nothing may.

    Returns:
        Whether it is the very same base, and no stand-in.

    Raises:
        BaseModelError: With both fingerprints.
    """
    expected = facts.base["fingerprint"]
    if expected == found:
        return True
    is_quantized_base = facts.base.get("stored_quantization") is not None
    if is_quantized_base and shapes is not None:
        if shapes == facts.base.get("shapes"):
            return False
        raise BaseModelError(
            f"the tensors of this base have other shapes than those of {facts.base['name']}, "
            "which the adapter was trained on",
            where=where,
            fix="use the full-precision model that the quantised one was made from",
        )
    raise BaseModelError(
        f"the adapter was trained on another base: {facts.base['name']} with the fingerprint "
        f"{expected[:16]}…, found {found[:16]}…",
        where=where,
        fix="use the base that is recorded in adapter.json",
    )


def shapes_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and shapes of the tensors that a model of this class and config has, heads left out.

    Codes of quantised weights are packed; these are the shapes of what they stand for.
    """
    heads = set(head_candidates(model))
    shapes = shapes_of(type(model), model.config)
    return sha256_json({name: list(shape) for name, shape in sorted(shapes.items()) if name not in heads})


def _base_facts(model: nn.Module, head: list[str]) -> dict[str, Any]:
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    directory = _files_of(name)
    if directory is not None:
        files = BaseFiles(name, directory)
        stored = stored_quantization(files)
        return {
            "name": Path(name).name if Path(name).is_dir() else name,
            "commit": None,
            "fingerprint": fingerprint(files, head=head),
            "quantize": None,
            "stored_quantization": stored,
            "shapes": None if stored is None else shapes_fingerprint(model),
        }
    tensors = {key: tensor for key, tensor in base_state(model).items() if key not in head}
    return {"name": name, "commit": None, "fingerprint": fingerprint_in_memory(tensors)}


def _files_of(name: str) -> Path | None:
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name.count("/") <= 1 and not name.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        return Path(cached).parent if isinstance(cached, str) else None
    return None
