"""Other ways of computing that a recipe asks for: each is proved on the run's own model, or refused with the reason.

What a model without weights shows is refused by the functions named ``check_…``, for ``inspect``.
"""

import functools
import heapq
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticktune.console import Console
from ticktune.errors import BaseModelError, PatchError, RecipeError
from ticktune.patch.attach import adapter_parameters, set_training
from ticktune.patch.cpu import OnCpu
from ticktune.patch.segments import Segments, has_kernel
from ticktune.patch.standins import find_prefix
from ticktune.patch.unpadded import Unpadded, without_padding
from ticktune.patch.wide import Wide
from ticktune.prepare import Prepared
from ticktune.recipe.load import LoadedRecipe
from ticktune.tasks.task import Batch, Example
from ticktune.train.ffn import wide_obstacle
from ticktune.train.graphs import Graphs, in_eighths
from ticktune.train.groups import build_optimizer
from ticktune.train.head_loss import plain_loss
from ticktune.train.packing import beginning, packed_pair, packing_obstacle
from ticktune.train.padding import padding_obstacle, prove_unpadded
from ticktune.train.prefix import PrefixCache, refuse_dropout
from ticktune.train.same_loss import loss_obstacle
from ticktune.train.steps import gradients_of

_PROOF_ROWS = 2
_UNEQUAL_ROWS = 32  # of the shortest rows the last one is longer than the first one, as a rule


@dataclass(frozen=True)
class Ways:
    """What a run can make use of.

    Args:
        cache: Keeps the result of the frozen lower layers; None: none does.
        wide: The wide form of the ticks; None: they have the split form.
        segments: How packed rows attend, or why by masks; None: rows are not packed.
        unpadded: Layers that run without padding; None: they run with it.
        on_cpu: Attention and dropout in our way, or why in torch's; None: torch's are asked for, or it is no CPU.
    """

    cache: PrefixCache | None = None
    wide: Wide | None = None
    segments: Segments | str | None = None
    unpadded: Unpadded | None = None
    on_cpu: OnCpu | str | None = None


def build_ways(prepared: Prepared, model: nn.Module, console: Console) -> Ways:
    """Proves what the recipe asks for.

    Args:
        prepared: Recipe, task and examples.
        model: With ticks.
        console: Where to print.

    Raises:
        BaseModelError: The base does not keep the examples of packed rows apart.
        RecipeError: Another way is not possible, and the recipe allows no other.
    """
    segments, unpadded = _segments(prepared, model, console), _unpadded(prepared, model)
    _try_graphs(prepared, model)
    cache, wide = _prefix_cache(prepared, model), _wide(prepared, model, console)
    return Ways(cache, wide, segments, unpadded, _on_cpu(prepared, model))


def _segments(prepared: Prepared, model: nn.Module, console: Console) -> Segments | str | None:
    """Proves that a model keeps the examples of packed rows apart: by attention inside of them, or else by masks.

    Args:
        prepared: Recipe, task and examples.
        model: With ticks.
        console: Where to print.

    Returns:
        How it attends, or why by masks; None: rows are not packed.

    Raises:
        BaseModelError: Both proofs fail.
    """
    recipe, examples, compute = prepared.loaded.recipe, prepared.examples["train"], prepared.compute
    if not recipe.training.packing:
        return None
    numbers = packed_pair(examples.lengths, recipe.data.max_length)
    if numbers is None:
        console.note("training.packing: no two examples fit into a row of data.max_length, so none is shared")
        pair = [beginning(example, recipe.data.max_length // 2) for example in examples.take([0, len(examples) - 1])]
    else:
        pair = examples.take(list(numbers))
    if recipe.training.compile and not has_kernel(compute):
        reason: str | None = "compiled layers would have a graph for each batch"
    else:
        try:
            segments, keeps_dropout = Segments(model), recipe.base.dropout == "keep"
            reason = packing_obstacle(model, prepared.task, pair, compute, segments, base_dropout=keeps_dropout)
        except PatchError as error:
            reason = error.problems[0].message
        if reason is None:
            return segments
    obstacle = packing_obstacle(model, prepared.task, pair, compute) if numbers is not None else None
    if obstacle is not None:
        where = prepared.loaded.where("training.packing")
        raise BaseModelError(obstacle, where=where, fix="set training.packing: false")
    return reason


def _prefix_cache(prepared: Prepared, model: nn.Module) -> PrefixCache | None:
    """Proves that the result of the frozen lower layers can be kept; None where the recipe does not ask for it.

    Raises:
        RecipeError: It cannot.
    """
    recipe = prepared.loaded.recipe
    if recipe.training.prefix_cache == "off":
        return None
    keeps_dropout = recipe.base.dropout == "keep"
    with _cannot_be_kept(prepared.loaded):
        return PrefixCache(
            model, prepared.task, prepared.examples["train"], prepared.compute, base_dropout=keeps_dropout
        )


def check_prefix_cache(loaded: LoadedRecipe, model: nn.Module) -> None:
    """Refuses what :func:`_prefix_cache` refuses, as far as a model without weights shows it.

    Raises:
        RecipeError: No lower layers are frozen, or their dropout acts.
    """
    if loaded.recipe.training.prefix_cache == "off":
        return
    with _cannot_be_kept(loaded):
        refuse_dropout(find_prefix(model), base_dropout=loaded.recipe.base.dropout == "keep")


@contextmanager
def _refusing(loaded: LoadedRecipe, key: str, what: str, without: str) -> Iterator[None]:
    """Says of a :class:`PatchError` which key asked for it, and what to set instead."""
    try:
        yield
    except PatchError as error:
        [problem] = error.problems
        fix = problem.fix or f"set {key}: {without}"
        raise RecipeError(f"{what}: {problem.message}", where=loaded.where(key), fix=fix) from error


def _cannot_be_kept(loaded: LoadedRecipe) -> AbstractContextManager[None]:
    return _refusing(loaded, "training.prefix_cache", "hidden states of this run cannot be kept", "off")


def check_wide(loaded: LoadedRecipe, model: nn.Module) -> None:
    """Refuses the wide form where a model's blocks have none; the model may be on the meta device.

    Raises:
        RecipeError: No tick can have it, and the recipe allows no other form.
    """
    if loaded.recipe.training.ffn == "wide":
        try:
            Wide(model)
        except PatchError as error:
            [problem] = error.problems
            raise _not_wide(loaded, problem.message) from error


def _not_wide(loaded: LoadedRecipe, reason: str) -> RecipeError:
    where = loaded.where("training.ffn")
    return RecipeError(f"ticks cannot be wide: {reason}", where=where, fix="set training.ffn: split")


def _wide(prepared: Prepared, model: nn.Module, console: Console) -> Wide | None:
    """Proves that the ticks can be computed in the products of their blocks; None where the recipe does not ask for it.

    Args:
        prepared: Recipe, task and examples.
        model: With ticks.
        console: Where to print.

    Raises:
        RecipeError: They cannot, and no other form is allowed.
    """
    training, compute = prepared.loaded.recipe.training, prepared.compute
    if training.ffn == "split":
        return None
    try:
        wide = Wide(model, compute.dtype)
        obstacle = wide_obstacle(
            model, wide, prepared.task, compute.put(collated(prepared, shortest(prepared))), compute
        )
    except PatchError as error:
        [problem] = error.problems
        obstacle = problem.message
    if obstacle is None:
        if wide.obstacles:
            console.note(f"training.ffn: {wide.blocks} ticks can be wide, others not: {'; '.join(wide.obstacles)}")
        return wide
    if training.ffn == "wide":
        raise _not_wide(prepared.loaded, obstacle)
    console.note(f"training.ffn: the split form is used, as {obstacle}")
    return None


def shortest(prepared: Prepared) -> list[Example]:
    """A few rows to prove something on."""
    examples = prepared.examples["train"]
    return examples.take(heapq.nsmallest(_PROOF_ROWS, range(len(examples)), key=examples.lengths.__getitem__))


def collated(prepared: Prepared, examples: Sequence[Example]) -> Batch:
    """A batch of training examples, as in training."""
    return prepared.task.collate(examples, seed=prepared.loaded.recipe.training.seed)


def check_unpadded(loaded: LoadedRecipe, model: nn.Module) -> None:
    """Refuses to leave out padding where :func:`_unpadded` does, as far as a model without weights shows it.

    Raises:
        RecipeError: It has several stacks of layers, or its attention is of a kind of its own.
    """
    if loaded.recipe.training.padding_free:
        with _not_unpadded(loaded):
            Unpadded(model)


def _not_unpadded(loaded: LoadedRecipe) -> AbstractContextManager[None]:
    return _refusing(loaded, "training.padding_free", "padding cannot be left out", "false")


def _unpadded(prepared: Prepared, model: nn.Module) -> Unpadded | None:
    """Proves that layers compute the same without padding; None where the recipe does not ask for it.

    Raises:
        RecipeError: They do not.
    """
    recipe, compute, lengths = prepared.loaded.recipe, prepared.compute, prepared.examples["train"].lengths
    if not recipe.training.padding_free:
        return None
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    rows = [*shortest(prepared), *prepared.examples["train"].take([longest])]
    keeps_dropout = recipe.base.dropout == "keep"
    with _not_unpadded(prepared.loaded):
        unpadded = Unpadded(model)
        batch = compute.put(without_padding(collated(prepared, rows)))
        prove_unpadded(model, unpadded, prepared.task, batch, compute, base_dropout=keeps_dropout)
    return unpadded


def _on_cpu(prepared: Prepared, model: nn.Module) -> OnCpu | str | None:
    """Proves that a model does not care what its attention is called, and computes the same with ours.

    Dropout does not act there: tests prove it in general.
    """
    training, compute, task = prepared.loaded.recipe.training, prepared.compute, prepared.task
    if compute.device.type != "cpu" or not training.fast:
        return None
    if training.compile:
        return "what is compiled has its own"
    on_cpu, examples = OnCpu(model), prepared.examples["train"]
    if not on_cpu.attends:
        return on_cpu
    shortest = heapq.nsmallest(_UNEQUAL_ROWS, range(len(examples)), key=examples.lengths.__getitem__)
    batch = compute.put(collated(prepared, examples.take([shortest[0], shortest[-1]])))

    def loss_in(context: AbstractContextManager[None]) -> Tensor:
        with context:
            return task.loss(task.forward(model, batch), batch)

    plain = functools.cache(lambda: loss_in(nullcontext()))
    named = "attention by another name"
    obstacle = loss_obstacle(model, compute, named, plain, lambda: loss_in(on_cpu.renamed()), exact=True)
    if obstacle is None:
        obstacle = loss_obstacle(model, compute, "attention of our own", plain, lambda: loss_in(on_cpu.running()))
    return on_cpu if obstacle is None else obstacle


def _try_graphs(prepared: Prepared, model: nn.Module) -> None:
    """Proves that steps of this task and model can be CUDA graphs, before anything is written.

    Raises:
        RecipeError: They cannot.
    """
    recipe, compute = prepared.loaded.recipe, prepared.compute
    if not recipe.training.cuda_graphs:
        return
    batch = collated(prepared, shortest(prepared))
    wider = in_eighths(batch, max(prepared.examples["train"].lengths), filler_of(model))
    obstacle = padding_obstacle(model, prepared.task, batch, wider, compute)
    if obstacle is not None:
        raise _no_graphs(prepared.loaded, obstacle)
    set_training(model, True, base_dropout=recipe.base.dropout == "keep")
    scaler = torch.amp.GradScaler(enabled=False)  # so that nothing overflows that need not
    run = gradients_of(model, plain_loss(prepared.task), scaler, compute, nullcontext)
    optimizer = build_optimizer(adapter_parameters(model), recipe.optimizer)
    prove_graphs(prepared, Graphs(run, optimizer, compute, wider), wider)
    for _, _, parameter in adapter_parameters(model):
        parameter.grad = None


def filler_of(model: nn.Module) -> int:
    """Id of the token that fills texts up, as the model's config has it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "pad_token_id", None) or 0


def prove_graphs(prepared: Prepared, graphs: Graphs, batch: Batch) -> None:
    """Refuses graphs whose gradients of a batch are not those without.

    Raises:
        RecipeError: They are not, or the batch cannot be recorded.
    """
    obstacle = graphs.obstacle(batch, max(1.0, prepared.task.weight(batch)))
    if obstacle is not None:
        raise _no_graphs(prepared.loaded, obstacle)


def _no_graphs(loaded: LoadedRecipe, reason: str) -> RecipeError:
    return RecipeError(reason, where=loaded.where("training.cuda_graphs"), fix="set training.cuda_graphs: false")
