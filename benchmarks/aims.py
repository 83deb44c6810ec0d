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
TRAINER = "Trainer + PEFT LoRA, FFN, default"
MINILM, LLAMA = "MiniLM-L6 (384/1536, 6 layers)", "Llama of that size (512/1536, 4 layers)"


class Aim(NamedTuple):
    """One line of the table.

    Args:
        what: What was aimed at.
        aim: The number, with its sign.
        found: What was measured, with its spread.
        reached: Whether the middle of it reaches the aim; None: it was not measured.
    """

    what: str
    aim: str
    found: str
    reached: bool | None


def aims() -> Iterator[Aim]:
    """The aims that a CPU can show, from the committed results."""
    results = {path.stem: read_json(path) for path in (ROOT / "results").glob("*.json")}
    for contender, least in (
        ()
        if "speed" not in results
        else (
            (TRAINER, 6.0),
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
    for case in results["speed"]["cases"].values() if "speed" in results else ():
        ratio = case["runs"][speed.OURS][0]["kept_bytes"] / case["runs"][TRAINER][0]["kept_bytes"]
        what = f"{case['title']}, activations kept beside PEFT's LoRA by default"
        yield Aim(what, "≤ 0.5 ×", f"{ratio:.2f} ×", ratio <= 0.5)
    for shape in (MINILM, LLAMA):
        held = results["tick_tax"]["shapes"][shape]["kept_per_layer"]
        ratio = held["ticks + norms"] / held["PEFT LoRA r 16 on the feed-forward block"]
        what = f"{shape}, one more layer without dropout, the same"
        yield Aim(what, "≤ 0.5 ×", f"{ratio:.2f} ×", ratio <= 0.5)
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


BEST = "PEFT LoRA, FFN, best"
EAGER = ("ticks 64 + norms, split", "ticks 64 + norms, wide")
GRAPHS = ("ticks, CUDA graphs", "ticks, compiled, CUDA graphs")
PACKED, FULL = "lengths of mean 350", "rows of 2048"
# Call and case of the GPU benchmark, ways of which the fastest counts, and what it is aimed at in times a peer's rate.
BESIDE: tuple[tuple[str, str, tuple[str, ...], str, float], ...] = (
    ("G1", f"Llama-1B, {FULL}", EAGER, TRAINER, 3.0),
    ("G1", f"Llama-1B, {FULL}", EAGER, BEST, 1.5),
    ("G2", f"Llama-1B, compiled, {FULL}", EAGER, TRAINER, 3.0),
    ("G2", f"Llama-1B, compiled, {FULL}", EAGER, f"{BEST}, not compiled", 1.5),
    ("G2", f"Llama-1B, compiled, {PACKED}", EAGER, TRAINER, 3.0),
    ("G2", f"Llama-1B, compiled, {PACKED}", EAGER, f"{BEST}, not compiled", 1.5),
    ("G4", "MiniLM-L6, 32 rows of up to 128", GRAPHS, TRAINER, 10.0),
    ("G4", "BERT-base, 32 rows of up to 128", GRAPHS, TRAINER, 5.0),
)


def gpu_aims() -> Iterator[Aim]:
    """The aims that a GPU can show, from the committed results; what these lack was not measured."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted((ROOT / "results").glob("gpu-*.json")):
        for row in read_json(path)["rows"]:
            if row["kind"] == "step":
                rows.setdefault((path.stem.removeprefix("gpu-"), row["case"]), {})[row["way"]] = row
    for call, case, ways, peer, least in BESIDE:
        measured = rows.get((call, case), {})
        ours = _fastest(measured, ways)
        what, aim = f"{case}, real tokens/s beside: {peer}", f"≥ {least:g} ×"
        if ours is None or peer not in measured:
            yield Aim(what, aim, "not measured", None)
        else:
            ratio = ours["tokens_per_second"] / measured[peer]["tokens_per_second"]
            yield Aim(what, aim, f"{ratio:.2f} × ({ours['way']})", ratio >= least)
    for call, case in dict.fromkeys((call, case) for call, case, ways, *_ in BESIDE if ways == EAGER):
        ours = _fastest(rows.get((call, case), {}), EAGER)
        shares = f"{case}, of the roofline's rate", "≥ 80 %"
        taxes = f"{case}, ticks of dim 64 beside norms alone", "≤ 1.5 %"
        if ours is None:
            yield Aim(*shares, "not measured", None)
            yield Aim(*taxes, "not measured", None)
        else:
            share, tax = ours["of_floor"], ours["tax"]
            found = f"{100 * share:.1f} % ({ours['tokens_per_second']:,.0f} tokens/s; {ours['way']})"
            yield Aim(*shares, found, share >= 0.8)
            yield Aim(*taxes, f"{100 * tax:.1f} %", tax <= 0.015)


def _fastest(rows: dict[str, Any], ways: tuple[str, ...]) -> Any:
    found = [rows[way] for way in ways if way in rows]
    return max(found, key=lambda row: float(row["tokens_per_second"]), default=None)


def table(found: Iterable[Aim]) -> str:
    """Aims as Markdown."""
    lines = ["| what | aim | measured | |", "|---|---|---|---|"]
    said = {True: "reached", False: "missed", None: "-"}
    lines += [f"| {a.what} | {a.aim} | {a.found} | {said[a.reached]} |" for a in found]
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
