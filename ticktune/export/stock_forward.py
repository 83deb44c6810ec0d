"""A program of its own, run in a fresh process: stock transformers loads folders and computes logits.

It must not import ticktune: what it proves is that nobody needs it. Usage: ``stock_forward.py REQUEST``,
where REQUEST is a JSON file: {"inputs": safetensors file with "<batch>.<argument>" tensors, "batches": count,
"models": [{"directory": …, "auto_class": …, "dtype": …, "outputs": safetensors file}]}. It prints one JSON line for
each model: what from_pretrained said of missing, unexpected and mismatched tensors, and which are tied.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(request_path: str) -> None:
    """Answers one request."""
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
        logits = {}
        for number in range(request["batches"]):
            prefix = f"{number}."
            arguments = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
            for name, value in arguments.items():
                if value.is_floating_point():
                    arguments[name] = value.to(model.dtype)
            with torch.no_grad():
                output = model(**arguments)
            logits[str(number)] = (output.logits if hasattr(output, "logits") else output[0]).contiguous()
        save_file(logits, wanted["outputs"])
        found = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        found["tied"] = sorted(" = ".join(sorted(names)) for names in owners.values() if len(names) > 1)
        found["ticktune"] = sorted(name for name in sys.modules if name.split(".")[0] == "ticktune")
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
