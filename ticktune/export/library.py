"""``ticktune.merge``: merging for people who train with a loop of their own."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ticktune.errors import ExportError
from ticktune.export.save import cast_model, express_as_llama, not_exact_in, refuse_not_finite
from ticktune.export.verify import Verification, compare, stock_logits
from ticktune.export.widen import widen
from ticktune.files import new_directory
from ticktune.patch.attach import adapter_state, attach_plan, attachment_of, detach, load_adapter_state
from ticktune.patch.shrink import example_inputs
from ticktune.quantize import MERGE_WAY_OUT, is_quantized, merge_obstacle

_ROWS, _LENGTH = 4, 16


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
        inputs: Keyword arguments of forward passes to compare on; empty: random token ids, pixels or sound.
        tokenizer: Saved beside the weights, where there is one.
        pad_to: Multiple that widths are rounded up to: a number, ``none``, or ``auto``; see
            :func:`ticktune.export.widen.widen`.
        express: ``llama``: write a Mistral, Qwen2 or Phi-3 as the Llama that it is, where plain ticks merge.

    Returns:
        What the comparison found.

    Raises:
        PatchError: The model has no ticks.
        ExportError: The architecture cannot hold them, the base is quantised, or the merged folder is not equal; none
            is left.
        OutputError: The folder exists.
    """
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
    dtype = _most_frequent_dtype(model)
    stock = detach(copy.deepcopy(model).cpu()).float().eval()
    _stock_class(stock)
    with torch.no_grad():
        for name in plan.head:
            stock.get_parameter(name).copy_(tensors[f"head.{name}"])
    with tempfile.TemporaryDirectory(prefix="ticktune-") as name, new_directory(Path(directory)) as temporary:
        control = Path(name) / "control"
        if express == "llama":
            stock = express_as_llama(stock)
        stock_class = _stock_class(stock)
        stock.save_pretrained(control)  # type: ignore[operator]
        # Loaded again as float32: buffers that no file holds may have been rounded in the model's own dtype.
        stock = type(stock).from_pretrained(control, dtype=torch.float32).eval()  # type: ignore[attr-defined]
        batches = [{k: v.cpu() for k, v in batch.items()} for batch in inputs] or [_random_inputs(stock)]
        base = _logits(stock, batches)
        attach_plan(stock, plan)
        load_adapter_state(stock, tensors)
        ours = _logits(stock, batches)
        exact = not_exact_in(detach(stock), dtype) - set(plan.head)
        widen(stock, plan, tensors, pad_to=pad_to)
        final = temporary if dtype == torch.float32 else Path(name) / "merged"
        stock.save_pretrained(final)
        reloaded, merged = stock_logits(
            [(control, stock_class, "float32"), (final, stock_class, "float32")], batches, same_ties=True
        )
        found = compare(ours, merged, base, reloaded, [None] * len(batches), _argmax)
        if dtype != torch.float32:
            cast_model(stock, dtype, exact)
            stock.save_pretrained(temporary)
            [cast] = stock_logits([(temporary, stock_class, "auto")], batches)
            if not all(torch.isfinite(logits).all() for logits in cast):
                raise ExportError(f"the merged model's logits are not finite in {dtype}")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return found


def _most_frequent_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the values that are not trained; float32 where all are."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _logits(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    return [output.logits if hasattr(output, "logits") else output[0] for output in outputs]


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


def _random_inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main not in ("input_ids", "pixel_values"):  # sound, which has a shape of its own in each family
        return next(choice for choice in example_inputs(model) if main in choice)
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        shape = (_ROWS, config.num_channels, size, size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(0, config.vocab_size, (_ROWS, _LENGTH), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch
