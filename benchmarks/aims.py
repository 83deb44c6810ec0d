"""What speed was aimed at, on a CPU and on a GPU, and what the committed results say of it.

    python -m benchmarks.aims --docs

measures nothing: it reads benchmarks/results and writes the table into docs/performance.md.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import page, speed
from ticktune.files import read_json

ROOT = Path(__file__).parent
MINILM, LLAMA = "MiniLM-L6 (384/1536, 6 layers)", "Llama of that size (512/1536, 4 layers)"


class Aim(NamedTuple):
    """One line of the table.

    Args:
        what: What was aimed at.
        aim: The number, with its sign.
        found: What was measured, with its spread.
        reached: Whether the middle of it reaches the aim.
    """

    what: str
    aim: str
    found: str
    reached: bool


def aims() -> Iterator[Aim]:
    """The aims that a CPU can show, from the committed results."""
    results = {path.stem: read_json(path) for path in (ROOT / "results").glob("*.json")}
    for contender, least in (
        ()
        if "speed" not in results
        else (
            ("Trainer + PEFT LoRA, FFN, default", 6.0),
            ("Trainer + PEFT LoRA, FFN, best", 1.5),
            ("ticktune's loop, full fine-tuning", 1.4),
        )
    ):
        times = speed.ratios(results["speed"]["cases"]["minilm"], contender)
        middle = statistics.median(times)
        found = f"{middle:.2f} × ({min(times):.2f} to {max(times):.2f})"
        yield Aim(f"MiniLM on SST-2, real tokens/s beside: {contender}", f"≥ {least:g} ×", found, middle >= least)
    tax = results["tick_tax"]["shapes"][MINILM]["bf16"]["forms"]["ticks + norms"]
    low, high = tax["more_percent_quartiles"]
    found = f"{tax['more_percent']:.1f} % ({low:.1f} to {high:.1f})"
    yield Aim("MiniLM, a step with ticks of dim 64 beside norms alone", "≤ 6 %", found, tax["more_percent"] <= 6)
    for precision in ("fp32", "bf16"):
        kept = results["steps"]["results"][precision]["speedup_of_a_kept_prefix"]
        for beside, ratio in kept.items():
            what = f"MiniLM, upper half with a kept prefix {beside}, {precision}"
            yield Aim(what, "≥ 1.9 ×", f"{ratio:.2f} ×", ratio >= 1.9)
    for shape in (MINILM, LLAMA):
        held = results["tick_tax"]["shapes"][shape]["kept_per_layer"]
        ratio = held["ticks + norms"] / held["PEFT LoRA r 16 on the feed-forward block"]
        yield Aim(f"{shape}, activations kept beside PEFT's LoRA by default", "≤ 0.5 ×", f"{ratio:.2f} ×", ratio <= 0.5)
    for shape, entry in results["inference"]["shapes"].items():
        wider = entry["dims"]["64"]
        for precision in ("fp32", "bf16"):
            more = wider[precision]["more_percent"]
            low, high = wider[precision]["more_percent_quartiles"]
            most = wider["width_percent"] + 1
            what = f"{shape}, merged dim 64 beside the base, {precision}"
            yield Aim(what, f"≤ {most:.1f} %", f"{more:.1f} % ({low:.1f} to {high:.1f})", more <= most)
    seconds = results["startup"]["seconds"]
    for command, stage, most in (
        ("help", "", 1.0),
        ("recipe error", "", 1.0),
        ("train, first time", "overhead", 3.0),
        ("train, rows in the cache", "overhead", 3.0),
    ):
        taken = (seconds[command][stage] if stage else seconds[command])["cpu_seconds"]
        yield Aim(
            f"start: {command}{' beyond imports and weights' if stage else ''}",
            f"≤ {most:g} s",
            f"{taken:.2f} s",
            taken <= most,
        )


TRAINER = "Trainer + PEFT LoRA, FFN, default"
_LIMIT = "norms only"
# Call of the GPU benchmark, case, what is compared with, and how many times its real tokens/s are aimed at.
_BESIDE = (
    ("G2", "Llama-1B, compiled, lengths of mean 350", TRAINER, 3.0),
    ("G2", "Llama-1B, compiled, lengths of mean 350", "PEFT LoRA, FFN, best, not compiled", 1.5),
    ("G2", "Llama-1B, compiled, rows of 2048", "PEFT LoRA, FFN, best, not compiled", 1.5),
    ("G4", "MiniLM-L6, 32 rows of up to 128", TRAINER, 10.0),
    ("G4", "BERT-base, 32 rows of up to 128", TRAINER, 5.0),
)


def gpu_aims() -> Iterator[Aim]:
    """The aims that a GPU can show, from those committed results that there are."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted((ROOT / "results").glob("gpu-*.json")):
        for row in read_json(path)["rows"]:
            if row["kind"] == "step":
                rows.setdefault((path.stem.removeprefix("gpu-"), row["case"]), {})[row["way"]] = row
    for call, case, peer, least in _BESIDE:
        ways = rows.get((call, case), {})
        ours = _fastest(ways)
        if ours is not None and peer in ways:
            ratio = ours["tokens_per_second"] / ways[peer]["tokens_per_second"]
            what = f"{case}: {ours['way']}, real tokens/s beside: {peer}"
            yield Aim(what, f"≥ {least:g} ×", f"{ratio:.2f} ×", ratio >= least)
    for call, case in (("G1", "Llama-1B, rows of 2048"), ("G2", "Llama-1B, compiled, rows of 2048")):
        ways = rows.get((call, case), {})
        ours = _fastest(ways)
        if ours is None:
            continue
        share, rate = ours["of_floor"], ours["tokens_per_second"]
        found = f"{100 * share:.1f} % ({rate:,.0f} tokens/s)"
        yield Aim(f"{case}: {ours['way']}, of the roofline's rate", "≥ 80 %", found, share >= 0.8)
        if "tax" in ours:
            what = f"{case}: {ours['way']}, slower than norms alone"
            yield Aim(what, "≤ 1.5 %", f"{100 * ours['tax']:.1f} %", ours["tax"] <= 0.015)


def _fastest(ways: dict[str, Any]) -> Any:
    """The way with ticks that trains most tokens in a second, of the dim that the peers are sized by."""
    ours = [row for way, row in ways.items() if way.startswith(("ticks 64", "ticks,"))]
    return max(ours, key=lambda row: float(row["tokens_per_second"]), default=None)


def table(found: Iterable[Aim]) -> str:
    """Aims as Markdown."""
    lines = ["| what | aim | measured | |", "|---|---|---|---|"]
    lines += [f"| {a.what} | {a.aim} | {a.found} | {'reached' if a.reached else 'missed'} |" for a in found]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md")
    if parser.parse_args().docs:
        page.put("aims", table(aims()))
        page.put("gpu aims", table(gpu_aims()))
    else:
        sys.stdout.write(f"{table(aims())}\n\n{table(gpu_aims())}\n")


if __name__ == "__main__":
    main()
