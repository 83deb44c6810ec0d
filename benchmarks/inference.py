"""What a merged model costs beside its base when it is used: CPU time of a forward pass, and its counted FLOPs.

    OMP_NUM_THREADS=1 python -m benchmarks.inference

Models of real shapes with random weights; ticks are attached, given random values and merged in memory, as an export
does it. All are stock modules of transformers. Base and merged models take turns in one process, and each round gives
one ratio: what slows the machine down slows all of them. ``--rounds N`` measures that many rounds, ``--only SHAPE`` one
shape, keeping the rest of the file; ``--docs`` writes docs/performance.md from it.
"""

import argparse
import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks import page
from benchmarks.counting import flops
from benchmarks.tick_tax import IDS, compared, turns
from ticktune.device import Compute, describe
from ticktune.export.widen import widen
from ticktune.files import write_json
from ticktune.patch.attach import adapter_parameters, adapter_state, attach, attachment_of
from ticktune.versions import versions

RESULTS = Path(__file__).parent / "results" / "inference.json"
DIMS = (16, 64, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Shape -> (config, rows, tokens in a row, rounds).
SHAPES: dict[str, tuple[Any, int, int, int]] = {
    "MiniLM-L6 (384/1536, 6 layers)": (
        transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, **IDS
        ),
        32,
        32,
        40,
    ),
    "BERT-base (768/3072, 12 layers)": (transformers.BertConfig(**IDS), 32, 32, 12),
    "Llama of that size (512/1536, 4 layers)": (
        transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            **IDS,
        ),
        4,
        128,
        40,
    ),
}


def build(config: Any, dim: int) -> Any:
    """The stock model with ticks of this many units merged into it, in float32; 0: the base."""
    base = stock(config)
    if dim == 0:
        return base
    trained = attach(stock(config), dim, head=False)
    with torch.no_grad():
        for _, role, parameter in adapter_parameters(trained):
            if role == "P":
                parameter.normal_(std=0.02)
    widen(base, attachment_of(trained).plan, adapter_state(trained))
    ids = batch_of(config, 2, 8)
    with torch.no_grad():
        found, expected = (model(input_ids=ids).last_hidden_state for model in (base, trained))
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
        raise RuntimeError("the merged model computes something else than base and ticks")
    return base


def stock(config: Any) -> Any:
    """The base: always the same weights, and a config of its own, which a merge changes."""
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(copy.deepcopy(config)).eval()


def batch_of(config: Any, rows: int, length: int) -> Tensor:
    """Random token ids, (rows, length)."""
    return torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module, ids: Tensor) -> None:
    """One pass without gradients."""
    with torch.inference_mode():
        model(input_ids=ids)


def counted(config: Any, dim: int, ids: Tensor) -> int:
    """FLOPs of a forward pass; attention is written out, as its fused kernels are not counted alike."""
    model = build(config, dim)
    model.set_attn_implementation("eager")
    return flops(functools.partial(forward, model, ids))


def measured(config: Any, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Everything about one shape; percentages are beside the base."""
    ids, width = batch_of(config, rows, length), config.intermediate_size
    base_flops = counted(config, 0, ids)
    entry: dict[str, Any] = {"rows": rows, "length": length, "width": width, "flops": base_flops, "dims": {}}
    models = {str(dim): build(config, dim) for dim in (0, *DIMS)}
    for dim in DIMS:
        wide = int(models[str(dim)].config.intermediate_size)
        entry["dims"][str(dim)] = {
            "width": wide,
            "width_percent": round(100 * (wide - width) / width, 2),
            "flops_percent": round(100 * (counted(config, dim, ids) / base_flops - 1), 2),
        }
    entry["rounds"] = rounds
    for precision, dtype in DTYPES.items():
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(forward, model.to(dtype), ids) for name, model in models.items()
        }
        found = compared(turns(calls, rounds), "0")
        entry[precision] = {"cpu_ms": found["0"]["cpu_ms"]}
        least = found["0"]["cpu_ms_least"]
        for name, merged in entry["dims"].items():
            row = found[name]
            merged[precision] = {
                "cpu_ms": row["cpu_ms"],
                "more_percent": row["more_percent"],
                "more_percent_quartiles": row["more_percent_quartiles"],
                "least_more_percent": round(100 * (row["cpu_ms_least"] / least - 1), 2),
            }
    return entry


def section(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that these results are."""
    machine, torch_version = document["machine"], document["versions"]["torch"]
    lines = [
        f"`{document['command']}`: a {machine['cores']}-core {machine['name']}, one thread, torch {torch_version}.",
        "An export rounds the width up (to a multiple of 64 here); width is how much wider the blocks became, FLOPs",
        "what is counted of the whole model. Times are CPU time of a forward pass, beside the base in the same round:",
        "the median with its quartiles, and the fastest of all rounds beside the base's fastest.",
        "",
        "| shape, batch, rounds | dim | width | FLOPs | fp32, median | fastest | bf16, median | fastest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, entry in document["shapes"].items():
        name = f"{shape}, {entry['rows']} × {entry['length']}, {entry['rounds']}"
        for dim, row in entry["dims"].items():
            cells = [f"+{row['width_percent']:.1f} %", f"+{row['flops_percent']:.1f} %"]
            for precision in DTYPES:
                time = row[precision]
                low, high = time["more_percent_quartiles"]
                cells += [f"{time['more_percent']:+.1f} % ({low:+.1f} to {high:+.1f})"]
                cells += [f"{time['least_more_percent']:+.1f} %"]
            lines.append(f"| {name} | {dim} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is asked for and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="begins the name of one shape")
    parser.add_argument("--rounds", type=int, help="instead of those of each shape")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="measure nothing, write docs/performance.md")
    arguments = parser.parse_args()
    if arguments.docs:
        page.put("inference", section(json.loads(arguments.output.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    document: dict[str, Any] = {"shapes": {}}
    if arguments.output.exists():
        document = json.loads(arguments.output.read_text(encoding="utf-8"))
    document |= {
        "what": "CPU time and FLOPs of a forward pass, merged models beside their base",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.inference"
        + (f" --rounds {arguments.rounds}" if arguments.rounds else ""),
        "machine": describe(Compute(torch.device("cpu"), "fp32")) | {"cores": os.cpu_count()},
        "versions": versions(),
    }
    for name, (config, rows, length, rounds) in SHAPES.items():
        if arguments.only is not None and not name.startswith(arguments.only):
            continue
        sys.stderr.write(f"{name}\n")
        document["shapes"][name] = measured(config, rows, length, arguments.rounds or rounds)
        write_json(arguments.output, document)
    sys.stdout.write(json.dumps(document["shapes"], indent=1) + "\n")


if __name__ == "__main__":
    main()
