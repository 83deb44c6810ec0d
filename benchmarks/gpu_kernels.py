"""Single products, attention, copies and losses on a GPU: what G0 and G6 of the GPU benchmark measure."""

import csv
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import Budget, in_turns, spread
from benchmarks.gpu_steps import Effort, NotHereError, attempt
from benchmarks.shapes import Shape
from ticktune.train.head_loss import Head, linear_cross_entropy

Row = dict[str, Any]
LeftOut = list[dict[str, str]]
METRIC = "dram__bytes.sum"


def drawn(device: torch.device, *sizes: int) -> Tensor:
    """Random numbers in bfloat16, N(0, 0.02); never zeros, with which a GPU clocks higher."""
    return torch.randn(*sizes, device=device, dtype=torch.bfloat16) * 0.02


def rows_of(
    kind: str, case: str, calls: dict[str, Callable[[], Any]], device: torch.device, effort: Effort, repeat: int = 5
) -> list[Row]:
    """One row for each of some calls that take turns; short ones are repeated between two points of a GPU's clock."""
    repeat = repeat if device.type == "cuda" else 1
    seconds = in_turns(calls, device, warm=effort.warm, times=effort.turns * effort.steps, repeat=repeat)
    return [{"kind": kind, "case": case, "way": name, **spread(own)} for name, own in seconds.items()]


# Products


def products(
    shapes: dict[str, Shape], tokens: list[int], dims: list[int], device: torch.device, effort: Effort,
    budget: Budget, left_out: LeftOut,
) -> list[Row]:  # fmt: skip
    """The first products of a feed-forward block with a tick beside them, as two products and as one.

    Forward, the gradient of the input, and the tick's own gradient, whose result is only dim high.
    """
    rows: list[Row] = []
    for count in tokens:
        for name, shape in shapes.items():
            for dim in dims:
                case = f"{name}, {count} tokens, dim {dim}"
                if budget.allows(2.0, f"products: {case}", left_out):
                    calls = _products(shape, count, dim, device)
                    for direction, ways in calls.items():
                        make = functools.partial(rows_of, "product", f"{case}, {direction}", ways, device, effort)
                        for row in attempt(f"products: {case}", left_out, make) or []:
                            height = dim if row["way"] != "no tick" else 0
                            height += (shape.ffn_matrices - 1) * shape.width if row["way"] != "tick alone" else 0
                            rows.append(
                                row | {"flops_per_second": 2 * count * shape.hidden * height / row["ms"] * 1000}
                            )
    return rows


def _products(shape: Shape, tokens: int, dim: int, device: torch.device) -> dict[str, dict[str, Callable[[], Any]]]:
    """Direction -> way -> call."""
    width = (shape.ffn_matrices - 1) * shape.width  # gate and up
    x, up = drawn(device, tokens, shape.hidden), drawn(device, width, shape.hidden)
    gradient = drawn(device, tokens, width)
    if dim == 0:
        return {
            "forward": {"no tick": lambda: F.linear(x, up)},
            "gradient of the input": {"no tick": lambda: gradient @ up},
        }
    Q, of_tick = drawn(device, dim, shape.hidden), drawn(device, tokens, dim)
    wide, wide_gradient = torch.cat([up, Q]), torch.cat([gradient, of_tick], 1)
    return {
        "forward": {
            "no tick": lambda: F.linear(x, up),
            "split": lambda: (F.linear(x, up), F.linear(x, Q)),
            "wide": lambda: F.linear(x, wide),
        },
        "gradient of the input": {
            "no tick": lambda: gradient @ up,
            "split": lambda: (gradient @ up).addmm_(of_tick, Q),
            "wide": lambda: wide_gradient @ wide,
        },
        "gradient of the tick": {"tick alone": lambda: of_tick.t() @ x},
    }


# Attention


def attention(
    cases: list[tuple[int, int, int]], tokens: int, device: torch.device, effort: Effort,
    budget: Budget, left_out: LeftOut,
) -> list[Row]:  # fmt: skip
    """Forward and backward passes of causal attention.

    Args:
        cases: (size of a head, heads, length).
        tokens: In all.
        device: Where.
        effort: How much is measured.
        budget: Of the call.
        left_out: Gets what is left out, and why.
    """
    rows: list[Row] = []
    for size, heads, length in cases:
        case = f"head {size}, length {length}"
        if not budget.allows(2.0, f"attention: {case}", left_out):
            continue
        sizes = (max(1, tokens // length), heads, length, size, device)
        tried = {
            way: attempt(f"attention by {way}: {case}", left_out, functools.partial(_tried, make, *sizes))
            for way, make in _ATTENTION.items()
        }
        calls = {way: call for way, call in tried.items() if call is not None}
        if calls:
            flops = 3.5 * 4 * tokens * length * size * heads / 2
            for row in rows_of("attention", case, calls, device, effort):
                rows.append(row | {"flops_per_second": flops / row["ms"] * 1000})
    return rows


def _tried(make: Callable[..., Callable[[], Any]], *sizes: Any) -> Callable[[], Any]:
    call = make(*sizes)
    call()
    return call


def _inputs(rows: int, heads: int, length: int, size: int, device: torch.device) -> list[Tensor]:
    return [drawn(device, rows, heads, length, size).requires_grad_(True) for _ in range(3)]


def _both(result: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The backward pass; nothing is added to gradients of earlier ones."""
    torch.autograd.grad(result, (q, k, v), q)


def _flash(rows: int, heads: int, length: int, size: int, device: torch.device) -> Callable[[], Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _inputs(rows, heads, length, size, device)

    def run() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            _both(F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)

    return run


def _masked(rows: int, heads: int, length: int, size: int, device: torch.device) -> Callable[[], Any]:
    """With a mask, as packed and padded rows have one."""
    q, k, v = _inputs(rows, heads, length, size, device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def run() -> None:
        _both(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)

    return run


def _varlen(rows: int, heads: int, length: int, size: int, device: torch.device) -> Callable[[], Any]:
    from torch.nn.attention.varlen import varlen_attn

    if device.type != "cuda":
        raise NotHereError("it needs CUDA")
    q, k, v = (drawn(device, rows * length, heads, size).requires_grad_(True) for _ in range(3))
    ends = torch.arange(0, rows * length + 1, length, device=device, dtype=torch.int32)
    try:
        varlen_attn(q, k, v, ends, ends, length, length, window_size=(-1, 0))
        causal: dict[str, Any] = {"window_size": (-1, 0)}
    except TypeError:  # before torch 2.11
        causal = {"is_causal": True}

    def run() -> None:
        _both(varlen_attn(q, k, v, ends, ends, length, length, **causal), q, k, v)

    return run


def _flex(rows: int, heads: int, length: int, size: int, device: torch.device) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise NotHereError("it needs CUDA")
    if length != 2048:
        raise NotHereError("it is compiled for each length, and measured at 2048 alone")
    q, k, v = _inputs(rows, heads, length, size, device)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> None:
        _both(compiled(q, k, v, block_mask=mask), q, k, v)

    return run


_ATTENTION: dict[str, Callable[..., Callable[[], Any]]] = {
    "flash": _flash,
    "masked": _masked,
    "varlen": _varlen,
    "flex": _flex,
}


# Copies and losses


def copies(numbers: int, device: torch.device, effort: Effort) -> list[Row]:
    """How fast the device copies its own memory."""
    source = drawn(device, numbers)
    target = torch.empty_like(source)
    rows = rows_of("copy", f"{2 * numbers} bytes", {"copy": lambda: target.copy_(source)}, device, effort)
    return [row | {"bytes_per_second": 2 * 2 * numbers / row["ms"] * 1000} for row in rows]


def losses(
    hidden: int, vocabulary: int, tokens: int, chunks: list[int], device: torch.device, effort: Effort
) -> list[Row]:
    """Ticktune's loss without logits by chunks of many sizes, and the plain loss: forward and backward."""
    linear = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(drawn(device, vocabulary, hidden))
    states = drawn(device, tokens, hidden).requires_grad_(True)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)

    def chunked(size: int, compiled: bool) -> None:
        loss = linear_cross_entropy(states, targets, Head(linear), chunk=size, compiled=compiled)
        torch.autograd.grad(loss, states)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(linear(states).float(), targets, reduction="sum"), states)

    calls: dict[str, Callable[[], Any]] = {"all logits": plain}
    for compiled in (False, True):
        for size in chunks:
            name = f"chunks of {size}{', compiled' if compiled else ''}"
            calls[name] = functools.partial(chunked, size, compiled)
    case = f"{tokens} tokens, hidden {hidden}, vocabulary {vocabulary}"
    flops = 4 * tokens * hidden * vocabulary  # logits and the gradient of the states
    rows = rows_of("loss", case, calls, device, effort, repeat=1)
    return [row | {"flops_per_second": flops / row["ms"] * 1000} for row in rows]


def product_rate(device: torch.device, size: int, effort: Effort) -> Row:
    """The rate of one large product, which others are held against."""
    x, y = drawn(device, size, size), drawn(device, size, size)
    [row] = rows_of("product", f"{size}³", {"square": lambda: x @ y}, device, effort)
    return row | {"flops_per_second": 2 * size**3 / row["ms"] * 1000}


# Bytes of memory, by ncu


class Kernel:
    """A kernel whose traffic is counted.

    Args:
        run: What is counted.
        expected: Bytes by formula: what must be read and written at least.
    """

    def __init__(self, run: Callable[[], Any], expected: int) -> None:
        self.run, self.expected = run, expected


def kernel(name: str, shape: Shape, tokens: int, dim: int, device: torch.device) -> Kernel:
    """The products of a feed-forward block (``split``, ``wide``) or the loss of a chunk (``loss``), in bfloat16."""
    d = shape.hidden
    if name in ("loss", "loss, compiled"):
        linear = nn.Linear(d, shape.vocabulary, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.copy_(drawn(device, shape.vocabulary, d))
        states, targets = drawn(device, tokens, d).requires_grad_(True), torch.arange(tokens, device=device) % 7
        # The head twice, logits written once and read for the softmax, its result written and read by the product.
        expected = 2 * (2 * shape.vocabulary * d + 4 * tokens * shape.vocabulary + 3 * tokens * d)
        compiled = name != "loss"

        def run() -> None:
            loss = linear_cross_entropy(states, targets, Head(linear), chunk=tokens, compiled=compiled)
            torch.autograd.grad(loss, states)

        return Kernel(run, expected)
    width = (shape.ffn_matrices - 1) * shape.width
    ways = _products(shape, tokens, dim, device)["forward"]
    reads = 1 if name == "wide" else 2
    return Kernel(ways[name], 2 * (reads * tokens * d + (width + dim) * d + tokens * (width + dim)))


KERNELS = ("split", "wide", "loss", "loss, compiled")


def traffic(
    shape: Shape, tokens: int, dim: int, device: torch.device, effort: Effort, left_out: LeftOut, command: list[str]
) -> list[Row]:
    """Time and bytes of each kernel, by formula and as ncu counts them in a process of its own."""
    rows: list[Row] = []
    for name in KERNELS:
        subject = kernel(name, shape, tokens, dim, device)
        [row] = rows_of("kernel", f"{tokens} tokens, dim {dim}", {name: subject.run}, device, effort)
        row |= {"expected_bytes": subject.expected, "bytes_per_second": subject.expected / row["ms"] * 1000}
        counted = attempt(
            f"ncu: {name}", left_out, functools.partial(counted_bytes, [*command, "--kernel", name], device)
        )
        rows.append(row | ({"counted_bytes": counted} if counted is not None else {}))
    return rows


def counted_bytes(words: list[str], device: torch.device) -> int:
    """Bytes that ncu sees going to and from the device's memory in a command's profiled part.

    Raises:
        NotHereError: There is no ncu.
        RuntimeError: It fails.
    """
    if device.type != "cuda" or shutil.which("ncu") is None:
        raise NotHereError("ncu is not installed" if device.type == "cuda" else "ncu needs CUDA")
    options = ["--clock-control", "none", "--metrics", METRIC, "--csv", "--print-units", "base"]
    command = ["ncu", *options, "--profile-from-start", "off", sys.executable, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=90, cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("ncu did not end within 90 s") from error
    if done.returncode:
        raise RuntimeError(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    return sum_of(done.stdout)


def sum_of(text: str) -> int:
    """The sum of the metric over all kernels in what ncu writes.

    Raises:
        RuntimeError: The metric is not there.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    values = [
        float(row["Metric Value"].replace(",", ""))
        for row in csv.DictReader(io.StringIO("\n".join(lines)))
        if row["Metric Name"] == METRIC
    ]
    if not values:
        raise RuntimeError(f"ncu says nothing of {METRIC}: {text[-300:]}")
    return round(sum(values))


def profile(subject: Kernel) -> None:
    """Runs a kernel warm, once of it under the profiler."""
    for _ in range(3):
        subject.run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    subject.run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
