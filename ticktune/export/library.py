"""``ticktune.merge``: merging for people who train with a loop of their own."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ticktune.errors import ExportError, first_line
from ticktune.export.save import cast_model, express_as_llama, not_exact_in, refuse_not_finite, room_for
from ticktune.export.stock_forward import main_tensor, tensors_of
from ticktune.export.verify import Verification, compare_outputs, stock_outputs
from ticktune.export.widen import check_pad_to, put_head, widen
from ticktune.files import new_directory, temporary_beside
from ticktune.patch.attach import (
    adapter_state,
    attach_plan,
    attachment_of,
    base_state,
    detach,
    load_adapter_state,
    watched_ticks,
)
from ticktune.patch.shrink import example_inputs
from ticktune.quantize import MERGE_WAY_OUT, is_quantized, merge_obstacle

_SEEDS = 4  # batches of random inputs, so that most experts get tokens


def merge(
    model: nn.Module,
    directory: str | Path,
    *,
    inputs: Sequence[dict[str, Tensor]] = (),
    tokenizer: Any = None,
    pad_to: int | str = "auto",
    express: Literal["same", "llama"] = "same",
) -> Verification:
    """Builds a model's ticks, norms and head into a stock checkpoint, and proves it in a fresh process.

    The model itself stays as it is.

    Args:
        model: From :func:`ticktune.attach`, trained.
        directory: A new folder; it appears as a whole, or not at all.
        inputs: Keyword arguments of forward passes to compare on; empty: random token ids, pixels or sound,
            chosen so that as many ticks run as can.
        tokenizer: Saved beside the weights, where there is one.
        pad_to: Multiple that widths are rounded up to: a number, ``none``, or ``auto``; see
            :func:`ticktune.export.widen.widen`.
        express: ``llama``: write a Mistral, Qwen2 or Phi-3 as the Llama that it is, where plain ticks merge.

    Returns:
        What the comparison found. A warning names ticks that got no input from the compared rows.

    Raises:
        PatchError: The model has no ticks.
        ExportError: The architecture cannot hold them, the base is quantised, an argument means nothing, the model
            takes none of the random inputs, or the merged folder is not equal; none is left.
        OutputError: The folder exists.
    """
    _check_arguments(inputs, tokenizer, pad_to, express)
    plan = attachment_of(model).plan
    if is_quantized(model):
        method = getattr(model, "quantization_method", None)
        raise ExportError(
            f"this adapter cannot be merged: {merge_obstacle(str(getattr(method, 'value', method) or 'integers'))}",
            fix=f"{MERGE_WAY_OUT}: save_adapter(model, DIR), then load_adapter(full, DIR) and merge that; with "
            "full_precision=True where the quantised model was loaded from files of its own",
        )
    tensors = {key: tensor.cpu() for key, tensor in adapter_state(model).items()}
    refuse_not_finite(tensors)
    dtype = _most_frequent_dtype(base_state(model))
    stock: Any = detach(copy.deepcopy(model).cpu()).eval()
    has_double = any(tensor.dtype == torch.float64 for tensor in stock.state_dict().values())
    work = torch.float64 if has_double else torch.float32  # in which no base tensor is rounded
    stock = _in_dtype(stock, work)
    _stock_class(stock)
    put_head(stock, plan, tensors)
    place, needed = Path(directory), room_for(stock, tensors, dtype)
    with temporary_beside(place, needed) as aside, new_directory(place, needed=needed) as temporary:
        control = aside / "control"
        if express == "llama":
            stock = express_as_llama(stock)
        stock_class = _stock_class(stock)
        stock.save_pretrained(control)
        # Loaded again: buffers that no file holds may have been rounded in the model's own dtype.
        stock = _in_dtype(type(stock).from_pretrained(control, dtype=work).eval(), work)
        attach_plan(stock, plan)
        load_adapter_state(stock, tensors)
        stock.to(work)
        batches = [_as_the_model(batch, stock) for batch in inputs] or _random_inputs(stock)
        with watched_ticks(stock) as ran:
            ours = _outputs(stock, batches)
        base = _outputs(detach(stock), batches)
        exact = not_exact_in(stock, dtype) - set(plan.head)
        widen(stock, plan, tensors, pad_to=pad_to)
        final = temporary if dtype == work else aside / "merged"
        stock.save_pretrained(final)
        in_work = str(work).removeprefix("torch.")
        reloaded, merged = stock_outputs(
            [(control, stock_class, in_work), (final, stock_class, in_work)], batches, same_ties=True, folder=aside
        )
        found = compare_outputs(ours, merged, base, reloaded, _argmax).with_ticks(ran)
        if dtype != work:
            cast_model(stock, dtype, exact)
            stock.save_pretrained(temporary)
            [cast] = stock_outputs([(temporary, stock_class, "auto")], batches, folder=aside)
            if not all(torch.isfinite(main_tensor(outputs)).all() for outputs in cast):
                raise ExportError(f"the merged model's logits are not finite in {dtype}")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    if not found.is_conclusive:
        warnings.warn(f"the ticks and norms change too little for a proof: {found.effect:.2e}", stacklevel=2)
    if idle := found.idle_text():
        warnings.warn(idle, stacklevel=2)
    return found


def _check_arguments(inputs: Any, tokenizer: Any, pad_to: Any, express: Any) -> None:
    """Refuses what means nothing before anything is computed."""
    check_pad_to(pad_to)
    if express not in ("same", "llama"):
        raise ExportError(f"express is {express!r}, expected same or llama")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ExportError(f"the tokenizer is a {type(tokenizer).__name__}, expected one of transformers")
    fix = "give a list of dicts of tensors: the keyword arguments of one forward pass each"
    if not isinstance(inputs, list | tuple):
        raise ExportError(f"inputs is a {type(inputs).__name__}, expected a list", fix=fix)
    for number, batch in enumerate(inputs):
        if not isinstance(batch, Mapping) or not batch:
            raise ExportError(f"inputs[{number}] is {batch!r:.60}, expected keyword arguments of the model", fix=fix)
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"inputs[{number}][{name!r}] is a {type(value).__name__}, expected a tensor",
                    fix=fix,
                )


def _most_frequent_dtype(base: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the base's own values."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in base.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Casts a model, and makes its experts take float64, which the grouped kernels do not."""
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.to(dtype)


def _as_the_model(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch on the CPU, its floating-point tensors in the dtype of a model's weights."""
    dtype = next(model.parameters()).dtype
    return {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def _outputs(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return [{k: v.clone() for k, v in tensors_of(model(**batch)).items()} for batch in batches]


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[-1] < 2:
        flat = logits.squeeze(-1)
        return torch.zeros_like(flat, dtype=torch.long), torch.full_like(flat, torch.inf)
    best = logits.topk(2, dim=-1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]


def _stock_class(model: nn.Module) -> str:
    import transformers

    name = type(model).__name__
    if not hasattr(transformers, name):
        raise ExportError(f"{name} is not a class of transformers, so no stock checkpoint can hold it")
    return name


def _random_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """Random inputs of those that a model with ticks takes: the ones from which most of its ticks get something.

    Raises:
        ExportError: It takes none.
    """
    best, most, reason = -1, -1, "none is known for its arguments"
    choices = _choices(model, 0)
    for number, choice in enumerate(choices):
        try:
            with watched_ticks(model) as ran:
                [outputs] = _outputs(model, [choice])
        except Exception as error:  # noqa: BLE001 - any class of any version may stand here
            reason = first_line(error)
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values()):
            reason = "its outputs hold NaN or infinity"
        elif sum(ran.values()) > most:
            best, most = number, sum(ran.values())
            if most == len(ran):
                break
    if best < 0:
        raise ExportError(
            f"a {type(model).__name__} takes no random inputs: {reason}",
            fix="give inputs=[...], the keyword arguments of forward passes",
        )
    return [choices[best], *(_choices(model, seed)[best] for seed in range(1, _SEEDS))]


def _choices(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """Inputs that a model may take; those with images and their places in the text first."""
    choices = example_inputs(model, seed=seed)
    return [*(placed for choice in choices for placed in _with_places(model, choice)), *choices]


def _with_places(model: nn.Module, choice: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same text behind as many image tokens as the images of a row have features, where a model wants these."""
    config: Any = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None or not {"input_ids", "pixel_values"} <= choice.keys() or not hasattr(model, "get_image_features"):
        return []
    try:
        with torch.no_grad():
            found = model.get_image_features(pixel_values=choice["pixel_values"])  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - any class of any version may stand here
        return []
    features = getattr(found, "pooler_output", found)
    ids = choice["input_ids"]
    count = sum(part.shape[:-1].numel() for part in (features if isinstance(features, list | tuple) else [features]))
    longer = {"input_ids": torch.cat([ids.new_full((len(ids), count // len(ids)), token), ids], dim=1)}
    if "attention_mask" in choice:
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    return [{**choice, **longer}]
