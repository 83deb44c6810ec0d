"""Mixed precision on CUDA beside the CPU: MiniLM and stories260K in fp32, bf16 and fp16.

    TICKTUNE_DATA=… TICKTUNE_MODELS=… python -m benchmarks.gpu_check

Each of them trains the same rows with the same seed through the command line; losses and metrics are compared with
the CPU's fp32, and every adapter is exported and verified. Writes benchmarks/results/gpu_check.json.
Without CUDA it says so and ends with exit code 2; ``--device cpu`` tries the script itself. ``--docs`` writes the table
into docs/performance.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from ticktune.device import Compute, describe
from ticktune.files import read_json, write_json
from ticktune.versions import versions

ROOT = Path(__file__).parent
RECIPES = ROOT.parent / "recipes"
RESULTS = ROOT / "results" / "gpu_check.json"

# Short runs: enough steps for a loss that means something, few enough for a CPU.
CASES: dict[str, list[str]] = {
    "sst2": [
        "data.train.limit=1000",
        "training.epochs=2",
        "optimizer.lr=1e-3",
        "base.dropout=off",
        "data.validation={path: '${TICKTUNE_DATA}/sst2/validation.jsonl', limit: 400}",
    ],
    "stories": ["training={steps: 40, batch_size: 8}"],
}
# How far a metric may be from the CPU's fp32: sampling of a few rows near the border, and rounding.
TOLERANCE = {"sst2": ("accuracy", 0.02), "stories": ("perplexity", 1.0)}


def one(case: str, device: str, precision: str, folder: Path) -> dict[str, Any]:
    """Trains, exports and verifies one case; returns its losses, metrics and verification."""
    output = folder / f"{case}-{device}-{precision}"
    words = [f"training.device={device}", f"training.precision={precision}", "logging.every=1", f"output={output}"]
    started = time.perf_counter()
    trained = ticktune("train", str(RECIPES / f"{case}.yaml"), *CASES[case], *words)
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    merged = ticktune("export", str(output), "--merge")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {
        "case": case,
        "device": device,
        "precision": precision,
        "metrics": trained["metrics"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "skipped_steps": record["skipped_steps"],
        "rows_per_second": record["rows_per_second"],
        "seconds": round(seconds, 1),
        "verification": merged["verification"],
    }


def ticktune(*words: str) -> dict[str, Any]:
    """Runs the command line and returns its JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", "ticktune", "--quiet", *words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"ticktune {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def table(document: dict[str, Any]) -> str:
    """The checks as Markdown."""
    facts, found = document["machine"], document["versions"]
    lines = [f"{facts['name']}, torch {found['torch']}, transformers {found['transformers']}:", ""]
    lines += ["| recipe, shortened | precision | metric | on the CPU in fp32 | on CUDA | first loss differs by | |"]
    lines += ["|---" * 7 + "|"]
    for check in document["checks"]:
        numbers = f"{check['cpu_fp32']:.5g} | {check['found']:.5g} | {check['first_loss_difference']:.1g}"
        said = "within its tolerance" if check["ok"] else "**not** within its tolerance"
        lines.append(f"| {check['case']} | {check['precision']} | {check['metric']} | {numbers} | {said} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all cases and says whether each is within its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--docs", action="store_true", help="run nothing, write docs/performance.md")
    arguments = parser.parse_args()
    if arguments.docs:
        page.put("gpu check", table(read_json(RESULTS)))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("not run: this machine has no CUDA device\n")
        raise SystemExit(2)
    precisions = ["fp32", "bf16", "fp16"] if arguments.device == "cuda" else ["bf16"]
    compute = Compute(torch.device(arguments.device), "fp32")
    document: dict[str, Any] = {"machine": describe(compute), "versions": versions(), "runs": [], "checks": []}
    wanted = [(case, *way) for case in CASES for way in [("cpu", "fp32"), *((arguments.device, p) for p in precisions)]]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {each: pool.submit(one, *each, Path(name)) for each in wanted}
        for case, device, precision in wanted:
            run = futures[case, device, precision].result()
            document["runs"].append(run)
            if (device, precision) == ("cpu", "fp32"):
                reference = run
                continue
            metric, allowed = TOLERANCE[case]
            gap = abs(run["metrics"][metric] - reference["metrics"][metric])
            first = abs(run["losses"][0] - reference["losses"][0])
            document["checks"].append(
                {
                    "case": case,
                    "precision": precision,
                    "metric": metric,
                    "cpu_fp32": reference["metrics"][metric],
                    "found": run["metrics"][metric],
                    "first_loss_difference": first,
                    "ok": gap <= allowed and first < 0.05,
                }
            )
            sys.stderr.write(json.dumps(document["checks"][-1]) + "\n")
            write_json(arguments.output, document)
    if not all(check["ok"] for check in document["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
