"""Attention on a CPU: forward and backward pass of ticktune's beside those that transformers offers, by length.

    OMP_NUM_THREADS=1 python -m benchmarks.attention

States of random numbers, of as many heads as MiniLM and BERT-base have, about as many tokens in each case. The three
take turns in one process; times are CPU time, one thread. ``--docs`` only writes the table into docs/performance.md.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import page
from benchmarks.tick_tax import turns
from ticktune.device import Compute, describe
from ticktune.files import read_json, write_json
from ticktune.patch.cpu import attend
from ticktune.versions import versions

RESULTS = Path(__file__).parent / "results" / "attention.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DROPOUT = (0.0, 0.1)


class Shape(NamedTuple):
    """States ``(rows, heads, length, size)``."""

    rows: int
    heads: int
    length: int
    size: int


SHAPES = [Shape(64, 12, 8, 32), Shape(32, 12, 16, 32), Shape(32, 12, 32, 32), Shape(16, 12, 64, 32),
          Shape(8, 12, 128, 64), Shape(4, 12, 256, 64), Shape(2, 12, 512, 64)]  # fmt: skip


def eager(query: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
    """As transformers writes it down; ``(b, h, s, d)``, four times."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p) @ value


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "ticktune": lambda q, k, v, p: attend(q, k, v, dropout=p),
    "sdpa": lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, dropout_p=p),
    "eager": eager,
}


def measure(shape: Shape, dtype: torch.dtype, p: float, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each kind: median, least, most."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape.rows, shape.length, shape.heads, shape.size, generator=generator) for _ in range(4))
    query, key, value, grad = (each.to(dtype).transpose(1, 2) for each in made)
    states = [each.requires_grad_(True) for each in (query, key, value)]

    def call(kind: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(kind(*states, p), states, grad)

    found = turns({name: call(kind) for name, kind in KINDS.items()}, rounds)
    return {
        name: [round(1000 * of(seconds), 2) for of in (statistics.median, min, max)] for name, seconds in found.items()
    }


def section(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that these results are."""
    machine, torch_version = document["machine"], document["versions"]["torch"]
    lines = [
        f"`{document['command']}`: a {machine['cores']}-core {machine['name']}, one thread, torch {torch_version}.",
        "",
        "| rows × heads × length × head size | precision | dropout | ticktune | sdpa | eager |",
        "|---|---|---|---|---|---|",
    ]
    for entry in document["results"]:
        times = (f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in entry["cpu_ms"].values())
        shape = " × ".join(map(str, entry["shape"]))
        lines.append(f"| {shape} | {entry['precision']} | {entry['dropout']:g} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all shapes and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="measure nothing, write docs/performance.md")
    arguments = parser.parse_args()
    if not arguments.docs:
        torch.set_num_threads(1)
        results = [
            {
                "shape": list(shape),
                "precision": name,
                "dropout": p,
                "cpu_ms": measure(shape, dtype, p, arguments.rounds),
            }
            for name, dtype in DTYPES.items()
            for p in DROPOUT
            for shape in SHAPES
        ]
        document = {
            "what": "CPU time of a forward and backward pass of attention",
            "command": "OMP_NUM_THREADS=1 python -m benchmarks.attention",
            "machine": describe(Compute(torch.device("cpu"), "bf16")) | {"cores": os.cpu_count()},
            "versions": versions(),
            "results": results,
        }
        write_json(arguments.results, document)
        sys.stdout.write(section(document) + "\n")
        return
    page.put("attention", section(read_json(arguments.results)))


if __name__ == "__main__":
    main()
