"""A program of its own, run in a fresh process: stock transformers loads folders and computes logits.

It must not import ticktune: what it proves is that nobody needs it. Usage: ``stock_forward.py REQUEST``,
where REQUEST is a JSON file: {"inputs": safetensors file with "<batch>.<argument>" tensors, "batches": count,
"models": [{"directory": …, "auto_class": …, "dtype": …, "outputs": safetensors file}]}. The outputs are
"<batch>.<place>.<output>" tensors. It prints one JSON line for each model: what from_pretrained said of missing,
unexpected and mismatched tensors, and which are tied.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model's output by name, those of inner outputs too.

    Caches, and tuples of a tensor for each layer, are left out: they are made of the same computation.
    """
    entries = output.items() if isinstance(output, Mapping) else enumerate(output)
    found: dict[str, torch.Tensor] = {}
    for name, value in entries:
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(value).items()}
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
            found[str(name)] = value
    return found


def main_tensor(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The one among a model's outputs that predictions are made of: its logits, else the first."""
    return tensors["logits"] if "logits" in tensors else next(iter(tensors.values()))


def main(request_path: str) -> None:
    """Answers one request."""
    import transformers
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    inputs = load_file(request["inputs"])
    for wanted in request["models"]:
        model, info = getattr(transformers, wanted["auto_class"]).from_pretrained(
            wanted["directory"], dtype=wanted["dtype"], output_loading_info=True, use_safetensors=True
        )
        model.eval()
        if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped kernels take no float64
        found: dict[str, Any] = {}
        for number in range(request["batches"]):
            prefix = f"{number}."
            arguments = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
            for name, value in arguments.items():
                if value.is_floating_point():
                    arguments[name] = value.to(model.dtype)
            with torch.no_grad():
                output = model(**arguments)
            # A tensor may be given out twice, and safetensors refuses memory that is shared.
            for place, (name, tensor) in enumerate(tensors_of(output).items()):
                found[f"{prefix}{place:04}.{name}"] = tensor.clone().contiguous()
        save_file(found, wanted["outputs"])
        found = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        found["tied"] = sorted(" = ".join(sorted(names)) for names in owners.values() if len(names) > 1)
        found["ticktune"] = sorted(name for name in sys.modules if name.split(".")[0] == "ticktune")
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
