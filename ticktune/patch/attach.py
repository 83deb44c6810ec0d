"""Ticks and trained norms on one model instance: attach, detach, parameters by role."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ticktune.errors import PatchError
from ticktune.patch.detect import find_layout
from ticktune.patch.fast import LeanUnits
from ticktune.patch.layout import Ffn, Layout, Shared, unshare_layers
from ticktune.patch.norms import lean_norm, own_parameters, train_norm
from ticktune.patch.routing import routing_obstacle
from ticktune.patch.ticks import ExpertTicks, Form, Tick
from ticktune.quantize import is_coded

Role = Literal["Q", "r", "P", "U", "norm", "head"]

_RECORD = "_ticktune_attachment"
# Slots of one role: a recipe names the role and means both.
_SLOTS = {"attention": ("attention", "attention_post"), "ffn": ("ffn", "ffn_post")}
_NOT_BY_DEFAULT = ("q", "k")
# Parts inside the body that belong to the task, not to the pretrained function of the layers.
_BODY_HEADS = ("pooler.*",)
_LAYERS = re.compile(r"(first|last):(\d+)|(\d+)-(\d+)")


@dataclass(frozen=True)
class Plan:
    """Exactly what is put on a model; an adapter records it.

    Args:
        form: Form of the ticks; ``auto``: each has that of its own block, as the model's blocks are of both.
        dim: Hidden units of each tick; 0 = none.
        layers: Stack -> numbers of the layers that get a tick.
        norms: Keys of the trained norms.
        head: Names of the trained head parameters.
        experts: ``each``: a tick in every expert; ``block``: one beside the whole block of experts.
        unshare: Whether each layer got its own copy of a block that the layers share.
    """

    form: Form | Literal["auto"]
    dim: int
    layers: dict[str, list[int]]
    norms: list[str]
    head: list[str]
    experts: Literal["each", "block"] = "each"
    unshare: bool = False


@dataclass
class Attachment:
    """What was put on a model, and how to undo it.

    Args:
        plan: What was asked for.
        layout: The model's feed-forward blocks and norms.
        ticks: Key of the block -> tick, or ticks of its experts.
        norms: Norm key -> module.
        frozen_norms: Norm parameter key -> the base's own tensor.
        frozen_head: Head parameter name -> the base's own tensor, in the base's dtype.
        head_buffers: (module, name, the base's own tensor) of buffers beside trained head parameters.
        handles: Hooks to remove.
        required_grad: Base parameters that required a gradient before.
        shared: What the layers shared before ``unshare``, or None.
    """

    plan: Plan
    layout: Layout
    ticks: dict[str, Tick | ExpertTicks] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    frozen_norms: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen_head: dict[str, nn.Parameter] = field(default_factory=dict)
    head_buffers: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    required_grad: list[str] = field(default_factory=list)
    shared: Shared | None = None


def attach(
    model: nn.Module,
    dim: int = 64,
    layers: Any = "all",
    norms: Any = "all",
    *,
    form: str = "auto",
    dropout: float = 0.0,
    norm_layers: Any = "same",
    head: Literal["auto"] | bool = "auto",
    fresh: Iterable[str] = (),
    experts: Literal["each", "block"] = "each",
    unshare: bool = False,
    seed: int = 42,
    layout: Layout | None = None,
    fast: bool = True,
) -> nn.Module:
    """Freezes a model and puts ticks, trained norms and a trained head on this instance.

    The function that the model computes does not change. Any torch loop can then train the parameters that
    require gradients.

    Args:
        model: A transformers model.
        dim: Hidden units of each tick; 0 = no ticks.
        layers: Which layers get a tick: ``all``, ``none``, ``last:3``, ``first:2``, ``4-11``, a list of numbers,
            or a dict of these by stack.
        norms: ``all``, ``none``, or a list of roles (embedding, attention, cross_attention, ffn, final, q, k).
        form: ``auto`` (plain on plain blocks, gated on gated ones), ``plain`` or ``gated``.
        dropout: Dropout on the ticks' hidden units, in [0, 1).
        norm_layers: ``same`` (as ``layers``) or a selection of its own.
        head: ``auto``: the parameters in ``fresh`` and an existing classification or regression head;
            True: the whole head; False: nothing.
        fresh: Names of parameters that the checkpoint lacked.
        experts: In mixtures of experts, a tick in ``each`` expert, or one beside the whole ``block``, which merges
            where the routing weights of a token sum to one.
        unshare: Where layers share one block (ALBERT), give each its own copy and its own tick.
        seed: Seed of the ticks' initial values.
        layout: Where its blocks and norms are; None: :func:`~ticktune.patch.detect.find_layout` finds them.
        fast: Use backward passes of our own (:mod:`ticktune.patch.fast`) where they can be; False: autograd's, which
            a second derivative (``create_graph``) and forward-mode derivatives need.

    Returns:
        The same model.

    Raises:
        PatchError: The family is unknown, a layer or stack does not exist, the form does not fit, or a number
            is out of its range.
    """
    _check_arguments(dim, dropout, experts, seed)
    fresh = tuple(fresh)
    _refuse_second(model)
    shared = unshare_layers(model) if unshare else None
    try:
        layout = layout or find_layout(model)
        chosen = _with_block(select_layers(layers, layout.sizes), layout) if dim > 0 else {}
        has_ticks = any(chosen.values())
        trained = head_names(model, head, fresh)
        plan = Plan(
            form=choose_form(form, layout),
            dim=dim if has_ticks else 0,
            layers=chosen if has_ticks else {},
            norms=_outside_head(select_norms(norms, norm_layers, layers, layout), layout, model, trained),
            head=trained,
            experts=experts,
            unshare=unshare,
        )
        return _attach(model, Attachment(plan, layout, shared=shared), dropout, seed, fast)
    except BaseException:
        if shared is not None:
            shared.restore()
        raise


def attach_plan(model: nn.Module, plan: Plan, *, dropout: float = 0.0, seed: int = 42, fast: bool = True) -> nn.Module:
    """Puts exactly what a plan says on a model; see :func:`attach`.

    Raises:
        PatchError: The model has no place for it.
    """
    _refuse_second(model)
    shared = unshare_layers(model) if plan.unshare else None
    try:
        return _attach(model, Attachment(plan, find_layout(model), shared=shared), dropout, seed, fast)
    except BaseException:
        if shared is not None:
            shared.restore()
        raise


def _check_arguments(dim: Any, dropout: Any, experts: Any, seed: Any) -> None:
    # True is an int to Python, and 2.5 units would fail far from here.
    if not _is_whole(dim) or dim < 0:
        raise PatchError(f"ticks.dim is {dim!r}, expected a whole number of at least 0")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise PatchError(f"ticks.dropout is {dropout!r}, expected a number in [0, 1)")
    if experts not in ("each", "block"):
        raise PatchError(f"there are no ticks for experts={experts!r}", fix="use each or block")
    if not _is_whole(seed):
        raise PatchError(f"the seed is {seed!r}, expected a whole number")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_second(model: nn.Module) -> None:
    if attachment_of(model, missing_ok=True):
        raise PatchError("this model has ticks already", fix="call ticktune.detach(model) first")


def _attach(model: nn.Module, record: Attachment, dropout: float, seed: int, fast: bool) -> nn.Module:
    plan = record.plan
    _check_plan(model, plan, record.layout)
    record.required_grad = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        _change(model, record, dropout, seed, fast)
    except BaseException:
        _change_back(model, record)
        raise
    setattr(model, _RECORD, record)
    return model


def _change(model: nn.Module, record: Attachment, dropout: float, seed: int, fast: bool) -> None:
    """Puts everything in its place; the record holds what was done so far, for :func:`_change_back`."""
    plan = record.plan
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for ffn in record.layout.ffns:
        if not has_tick(plan, ffn):
            continue
        if ffn.experts is not None and plan.experts == "each":
            experts = ExpertTicks(_tick(ffn, plan, dropout, generator, fast) for _ in range(ffn.count)).train(
                model.training
            )
            ffn.down.tick = record.ticks[ffn.key] = experts
            record.handles += experts.attach(ffn.down)
        else:
            first, last = _ends(ffn)
            tick = _tick(ffn, plan, dropout, generator, fast).train(model.training)
            last.tick = record.ticks[ffn.key] = tick
            record.handles += tick.attach(first, last)

    for ffn in record.layout.ffns if fast else ():
        if ffn.experts is None and ffn.conv is None:
            record.handles += LeanUnits(ffn.act, ffn.dropout, ffn.fused).attach(ffn.up, ffn.down, ffn.gate)

    for key in plan.norms:
        norm = record.layout.norms[key]
        record.frozen_norms |= {f"{key}.{name}": norm.get_parameter(name) for name in own_parameters(norm)}
        record.handles += train_norm(norm, fast=fast)
        record.norms[key] = norm
    for key, norm in record.layout.norms.items():
        if fast and key not in record.norms:
            record.handles += lean_norm(norm)

    owners: dict[int, nn.Module] = {}
    for name in plan.head:
        owner, leaf = _owner(model, name)
        frozen = owner.get_parameter(leaf)
        record.frozen_head[name] = frozen
        setattr(owner, leaf, nn.Parameter(frozen.detach().float().clone()))
        owners[id(owner)] = owner
    for owner in owners.values():
        record.handles.append(owner.register_forward_pre_hook(_in_own_dtype))
        # A batch norm of float32 parameters wants its running statistics so too.
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                record.head_buffers.append((owner, name, buffer))
                setattr(owner, name, buffer.float())


def _change_back(model: nn.Module, record: Attachment) -> None:
    for handle in record.handles:
        handle.remove()
    for ffn in record.layout.ffns:
        if ffn.key in record.ticks:
            del (ffn.down if isinstance(record.ticks[ffn.key], ExpertTicks) else _ends(ffn)[1]).tick
    for key, tensor in record.frozen_norms.items():
        norm_key, _, name = key.rpartition(".")
        setattr(record.layout.norms[norm_key], name, tensor)
    for name, tensor in record.frozen_head.items():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, tensor)
    for owner, name, buffer in record.head_buffers:
        setattr(owner, name, buffer)
    for name in record.required_grad:
        model.get_parameter(name).requires_grad_(True)


def detach(model: nn.Module) -> nn.Module:
    """Takes ticks, trained norms and head off again; the base's own tensors return, byte for byte."""
    record = attachment_of(model)
    _change_back(model, record)
    if record.shared is not None:
        record.shared.restore()
    delattr(model, _RECORD)
    return model


def attachment_of(model: nn.Module, *, missing_ok: bool = False) -> Any:
    """Returns the model's :class:`Attachment`.

    Raises:
        PatchError: It has none and ``missing_ok`` is false.
    """
    record = vars(model).get(_RECORD)
    if record is None and not missing_ok:
        raise PatchError("this model has no ticks", fix="call ticktune.attach(model) first")
    return record


def _single_ticks(record: Attachment) -> Iterator[tuple[str, Tick]]:
    """(key, tick) of every tick, those of experts one by one."""
    for key, ticks in record.ticks.items():
        if isinstance(ticks, ExpertTicks):
            yield from ((f"{key}.{i}", tick) for i, tick in enumerate(ticks))  # type: ignore[misc]
        else:
            yield key, ticks


@contextmanager
def watched_ticks(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Watches which ticks run: key of each tick, and of each expert's -> whether any token has reached it."""
    ticks = dict(_single_ticks(attachment_of(model)))
    ran = dict.fromkeys(ticks, False)

    def watch(key: str) -> Any:
        def hook(tick: nn.Module, args: tuple[Tensor, ...]) -> None:
            ran[key] = ran[key] or args[0].numel() > 0

        return hook

    handles = [tick.register_forward_pre_hook(watch(key)) for key, tick in ticks.items()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, Role, nn.Parameter]]:
    """Yields (key in the adapter file, role, parameter) of everything that is trained, in a fixed order."""
    record = attachment_of(model)
    for name, tick in _single_ticks(record):
        for role in ("Q", "r", "U", "P"):
            parameter = getattr(tick, role)
            if parameter is not None:
                yield f"{name}.{role}", role, parameter
    for key, norm in record.norms.items():
        for name in own_parameters(norm):
            yield f"{key}.{name}", "norm", norm.get_parameter(name)
    for name in record.plan.head:
        yield f"head.{name}", "head", model.get_parameter(name)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trained tensors by their key in the adapter file, detached, not copied."""
    return {key: parameter.detach() for key, _, parameter in adapter_parameters(model)}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies tensors into the attached parameters, all of them and nothing else.

    Raises:
        PatchError: A tensor is missing, not expected, or of another shape or dtype.
    """
    parameters = {key: parameter for key, _, parameter in adapter_parameters(model)}
    for key in sorted(parameters.keys() | state.keys()):
        if key not in state:
            raise PatchError(f"the tensor {key} is missing")
        if key not in parameters:
            raise PatchError(f"the tensor {key} has no place in this model")
        if state[key].shape != parameters[key].shape:
            raise PatchError(
                f"the tensor {key} has the shape {tuple(state[key].shape)}, expected {tuple(parameters[key].shape)}"
            )
        if state[key].dtype != torch.float32:
            raise PatchError(f"the tensor {key} is {state[key].dtype}, expected float32")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's own parameters by name, without ticks and head, as they were before attaching."""
    record = attachment_of(model, missing_ok=True)
    frozen: dict[int, Tensor] = {}
    if record:
        for key, tensor in record.frozen_norms.items():
            norm_key, _, name = key.rpartition(".")
            frozen[id(record.norms[norm_key].get_parameter(name))] = tensor
    ticks = {id(p) for tick in (record.ticks.values() if record else ()) for p in tick.parameters()}
    head = set(record.plan.head) if record else set()
    shared = record.shared if record else None
    named = model.named_parameters() if shared is None else shared.named_parameters(model)
    return {
        name: frozen.get(id(parameter), parameter).detach()
        for name, parameter in named
        if id(parameter) not in ticks and name not in head
    }


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor that holds NaN or infinity, None where none does."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def set_training(model: nn.Module, training: bool, *, base_dropout: bool = True) -> None:
    """Puts the model into training or evaluation mode.

    The running means of batch norms are part of the frozen base: they are used, and stay as they are.

    Args:
        model: With or without ticks.
        training: Whether dropout acts.
        base_dropout: With False the base stays in evaluation mode while the ticks train.
    """
    model.train(training and base_dropout)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    record = attachment_of(model, missing_ok=True)
    for tick in record.ticks.values() if record else ():
        tick.train(training)


def select_layers(selection: Any, sizes: dict[str, int], *, key: str = "ticks.layers") -> dict[str, list[int]]:
    """Turns a layer selection into layer numbers for each stack.

    Args:
        selection: ``all``, ``none``, ``last:3``, ``first:2``, ``4-11``, a list, or a dict of these by stack; a
            stack that the dict leaves out gets none.
        sizes: Stack name -> number of layers.
        key: What the selection is called in a recipe, for messages.

    Raises:
        PatchError: A stack or layer does not exist.
    """
    if isinstance(selection, dict):
        for stack in selection:
            if stack not in sizes:
                raise PatchError(f"{key}: there is no stack {stack}", fix=f"this model has: {', '.join(sizes)}")
        return {stack: _numbers(selection.get(stack, "none"), stack, size, key) for stack, size in sizes.items()}
    return {stack: _numbers(selection, stack, size, key) for stack, size in sizes.items()}


def select_norms(roles: Any, norm_layers: Any, tick_layers: Any, layout: Layout) -> list[str]:
    """Returns the keys of the norms to train, in the layout's order.

    Args:
        roles: ``all``, ``none`` or a list of roles; ``all`` leaves out q and k.
        norm_layers: ``same`` or a selection as in :func:`select_layers`.
        tick_layers: What ``same`` means; the embedding norm is then trained only when this is ``all``.
        layout: The model's norms.

    Raises:
        PatchError: A layer does not exist, or the model has no norm of a named role.
    """
    if isinstance(roles, str) and roles not in ("all", "none"):
        roles = [part.strip() for part in roles.split(",")]
    if roles not in ("all", "none") and not (
        isinstance(roles, list | tuple | set) and all(isinstance(role, str) for role in roles)
    ):
        raise PatchError(f"norms is {roles!r}, expected roles of norms", fix="use all, none or a list of roles")
    if roles == "none":
        return []
    is_same = isinstance(norm_layers, str) and norm_layers == "same"
    selection = tick_layers if is_same else norm_layers
    chosen = select_layers(selection, layout.sizes, key="ticks.layers" if is_same else "norms.layers")
    if roles == "all":
        wanted = None
    else:
        wanted = {slot for role in roles for slot in _SLOTS.get(role, (role,))}
        present = {key.rsplit(".")[-1] for key in layout.norms}
        for role in roles:
            if not present & set(_SLOTS.get(role, (role,))):
                raise PatchError(f"this model has no {role} norm", fix=f"it has: {', '.join(sorted(present))}")
    keys = []
    for key in layout.norms:
        stack, *_, slot = key.split(".")
        if slot in _NOT_BY_DEFAULT if wanted is None else slot not in wanted:
            continue
        if slot == "final":
            keys.append(key)
        elif slot == "embedding":
            if selection == "all" or (isinstance(selection, dict) and selection.get(stack) == "all"):
                keys.append(key)
        elif int(key.split(".")[1]) in chosen[stack]:
            keys.append(key)
    return keys


def _outside_head(keys: list[str], layout: Layout, model: nn.Module, head: list[str]) -> list[str]:
    """The norms that are no part of the trained head: BEiT's last norm stands in its pooler."""
    owned = {id(model.get_parameter(name)) for name in head}
    return [key for key in keys if not any(id(p) in owned for p in layout.norms[key].parameters(recurse=False))]


def choose_form(form: str, layout: Layout) -> Form | Literal["auto"]:
    """Returns the tick form: ``auto`` follows the model's own blocks.

    Raises:
        PatchError: Gated ticks were asked for on plain blocks, or there is no such form.
    """
    if form not in ("auto", "plain", "gated"):
        raise PatchError(f"there is no form {form!r} of ticks", fix="use auto, plain or gated")
    kinds = {ffn.is_gated for ffn in layout.ffns}
    if form == "gated" and kinds != {True}:
        raise PatchError(
            "gated ticks need gated feed-forward blocks, and this model's are "
            + ("plain" if kinds == {False} else "of both kinds"),
            fix="set ticks.form: auto",
        )
    if form == "plain" and any(ffn.experts is not None and ffn.is_gated for ffn in layout.ffns):
        raise PatchError("ticks of gated experts are gated", fix="set ticks.form: auto")
    if form == "auto" and len(kinds) == 1:
        return "gated" if kinds == {True} else "plain"
    return form  # type: ignore[return-value]  # one of the three words


def _with_block(chosen: dict[str, list[int]], layout: Layout) -> dict[str, list[int]]:
    """The chosen layers that have a feed-forward block; the layout's notes name the others.

    Raises:
        PatchError: None of them has one.
    """
    having = {(ffn.stack, ffn.layer) for ffn in layout.ffns}
    found = {stack: [n for n in numbers if (stack, n) in having] for stack, numbers in chosen.items()}
    without = {stack: [n for n in numbers if (stack, n) not in having] for stack, numbers in chosen.items()}
    text = "; ".join(f"{stack} {', '.join(map(str, numbers))}" for stack, numbers in without.items() if numbers)
    if text and not any(found.values()):
        raise PatchError(
            f"none of the chosen layers has a feed-forward block: {text}", fix="choose others with ticks.layers"
        )
    if text:
        layout.notes.append(f"layers without a feed-forward block get no tick: {text}")
    return found


def has_tick(plan: Plan, ffn: Ffn) -> bool:
    """Whether a plan puts ticks on a block."""
    return plan.dim > 0 and ffn.layer in plan.layers.get(ffn.stack, ())


def form_of(plan: Plan, ffn: Ffn) -> Form:
    """The form of the tick that a plan puts on a block."""
    if plan.form == "auto":
        return "gated" if ffn.is_gated else "plain"
    return plan.form


def head_names(model: nn.Module, train: Literal["auto"] | bool, fresh: Iterable[str] = ()) -> list[str]:
    """Returns the names of the head's parameters that are trained.

    Args:
        model: A transformers model.
        train: ``auto``, True or False, as in :func:`attach`.
        fresh: Names of parameters that the checkpoint lacked.

    Raises:
        PatchError: The checkpoint lacks parameters that are not part of a head, or True was asked for on a
            model whose only head is a language-model head.
    """
    if train != "auto" and not isinstance(train, bool):
        raise PatchError(f"head is {train!r}, expected auto, True or False")
    own = head_candidates(model)
    for name in fresh:
        if name not in own:
            raise PatchError(
                f"the checkpoint lacks the base parameter {name}: its values would be random",
                fix="use a checkpoint of this architecture",
            )
    if train is False:
        return []
    if train is True and not own:
        raise PatchError(
            "this model has no task head; its language-model head is part of the base",
            fix="set head.train: auto",
        )
    outside = set(_outside_body(model))
    return [name for name in own if train is True or name in outside or name in set(fresh)]


def head_candidates(model: nn.Module) -> list[str]:
    """Returns the parameters that may be a task head: outside the body, or its pooler; no language-model head."""
    body_prefix = _body_prefix(model)
    inside = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(body_prefix)
        and any(fnmatch.fnmatchcase(name.removeprefix(body_prefix), pattern) for pattern in _BODY_HEADS)
    ]
    return inside + _outside_body(model)


def unquantized_modules(model: nn.Module) -> list[str]:
    """Names of the modules that no quantisation may touch: those of any head, and the pooler."""
    inside = _body_prefix(model)
    names = {name.rpartition(".")[0] for name in head_candidates(model)}
    names |= {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(inside)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names |= {name for name, module in model.named_modules() if module is output}
    return sorted(names - {""})


def _outside_body(model: nn.Module) -> list[str]:
    body_prefix = _body_prefix(model)
    if not body_prefix or _has_language_head(model):
        return []
    return [name for name, _ in model.named_parameters() if not name.startswith(body_prefix)]


def _body_prefix(model: nn.Module) -> str:
    body = getattr(model, "base_model", model)
    return "" if body is model else next(f"{name}." for name, child in model.named_modules() if child is body)


def _has_language_head(model: nn.Module) -> bool:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return embeddings is not None


def _tick(ffn: Ffn, plan: Plan, dropout: float, generator: torch.Generator, fast: bool) -> Tick:
    form = form_of(plan, ffn)
    return Tick(
        ffn.hidden_size,
        plan.dim,
        form=form,
        # A plain tick has r wherever the merged block can hold it; on a gated block it needs no slot to train.
        bias=form == "plain" and (ffn.has_bias or ffn.bias_field is not None or ffn.is_gated),
        act=ffn.act,
        base_dropout=ffn.dropout,
        dropout=dropout,
        generator=generator,
        device=ffn.device,
        fast=fast,
    )


def _ends(ffn: Ffn) -> tuple[nn.Module, nn.Module]:
    """The modules that a single tick of a block reads from and adds to."""
    if ffn.experts is not None:
        return ffn.experts, ffn.experts
    return ffn.gate if ffn.gate is not None else ffn.up, ffn.down


def _check_plan(model: nn.Module, plan: Plan, layout: Layout) -> None:
    choose_form(plan.form, layout)
    beside = [ffn for ffn in layout.ffns if ffn.experts is not None and has_tick(plan, ffn)]
    if plan.experts == "block" and any(f.slot.startswith("experts.") and has_tick(plan, f) for f in layout.ffns):
        raise PatchError(
            "one tick beside the experts is for experts that lie in one tensor, and these are modules of their own",
            fix="set ticks.experts: each",
        )
    if plan.experts == "block" and (obstacle := routing_obstacle(model, beside)):
        raise PatchError(obstacle, fix="set ticks.experts: each")
    select_layers(plan.layers, layout.sizes)
    for key in plan.norms:
        if key not in layout.norms:
            raise PatchError(f"this model has no norm {key}")
        own_parameters(layout.norms[key])
    parameters = dict(model.named_parameters())
    for name in plan.head:
        if name not in parameters:
            raise PatchError(f"this model has no head parameter {name}")
        if is_coded(parameters[name]):
            raise PatchError(
                f"the head parameter {name} is quantised, so it cannot be trained",
                fix="set head.train: false, or use a base whose head is not quantised",
            )


def _numbers(selection: Any, stack: str, size: int, key: str) -> list[int]:
    if isinstance(selection, str) and selection in ("all", "none"):
        return list(range(size)) if selection == "all" else []
    match = _LAYERS.fullmatch(selection) if isinstance(selection, str) else None
    if match is not None and match[1]:
        count = int(match[2])
        numbers = list(range(count)) if match[1] == "first" else list(range(size - count, size))
    elif match is not None and int(match[3]) <= int(match[4]):
        numbers = list(range(int(match[3]), int(match[4]) + 1))
    elif isinstance(selection, list | tuple | range) and all(map(_is_whole, selection)):
        numbers = list(selection)
    else:
        raise PatchError(
            f"{key} {selection!r} is no selection of layers",
            fix="use all, none, last:3, first:2, 4-11 or a list of numbers",
        )
    outside = [n for n in numbers if not 0 <= n < size]
    if outside:
        raise PatchError(f"{key} {selection}: the {stack} has the layers 0 to {size - 1}", fix="choose among these")
    return numbers


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _in_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # A float32 head on a half-precision body, outside autocast.
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
