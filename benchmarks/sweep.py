"""Every model type of transformers, without the table: is it detected, and does it merge exactly?

    python benchmarks/sweep.py                  what benchmarks/results/sweep.json lacks
    python benchmarks/sweep.py --fresh          everything again
    python benchmarks/sweep.py gpt2 whisper     these again

For each type that AutoModel can build, a small random model of the type's default config gets ticks and norms with
random values, is merged, saved, and loaded again by the stock class; then all floating outputs are compared. Each
type runs in a worker with limits of memory and time, so one that dies costs nothing but itself.
"""

import argparse
import collections
import json
import os
import platform
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sweep.json"
GIBIBYTES, SECONDS = 12, 180  # of address space, and for one type with everything that is done to it
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}  # times the largest output, where that is above 1
LOOSE = 1e-6  # in float64, of models that compute some of their steps in float32 whatever the dtype
EFFECT = 1000  # how many tolerances the ticks must change the outputs by, or the comparison shows nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only these")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    types = options.types or all_types()
    done = {} if options.fresh or not options.results.exists() else json.loads(options.results.read_text())["types"]
    worker = Worker()
    for name in types:
        if options.types or name not in done:
            done[name] = worker.run(name)
            print(name, done[name]["status"], done[name].get("reason", ""), flush=True)
            write(options.results, done)
    worker.stop()
    write(options.results, done)
    print(json.dumps(counts(done), indent=2))


def all_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def counts(done: dict[str, Any]) -> dict[str, int]:
    return dict(collections.Counter(result["status"] for result in done.values()).most_common())


def write(path: Path, done: dict[str, Any]) -> None:
    from importlib.metadata import version

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python benchmarks/sweep.py",
        "hardware": f"{os.cpu_count()}-core {processor()}",
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "tolerance": TOLERANCE | {"float64, where a model computes in float32": LOOSE},
        "counts": counts(done),
        "types": dict(sorted(done.items())),
    }
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return " ".join(name.split()[:2]) or platform.machine()


class Worker:
    """A process that takes types and gives results; replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> dict[str, Any]:
        """Returns the result of one type."""
        if self.process is None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        start = time.monotonic()
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return {**json.loads(line), "seconds": round(time.monotonic() - start, 1)}
        self.process.kill()
        code, self.process = self.process.wait(), None
        reason = f"the worker ended with {code}" if ready else f"it takes more than {SECONDS} s"
        return {"status": "worker died", "reason": reason, "seconds": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        """Lets the process end."""
        if self.process is not None:
            self.process.communicate()


def work() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some models print
    for line in sys.stdin:
        try:
            result = sweep(line.strip())
        except (Exception, MemoryError) as error:  # noqa: BLE001 - it is recorded
            result = {"status": "error", "reason": short(error)}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def sweep(name: str) -> dict[str, Any]:
    """Detects, merges and compares one model type."""
    import torch

    from ticktune.errors import TicktuneError
    from ticktune.export.widen import widen
    from ticktune.patch.attach import adapter_state, attach, attachment_of, detach

    try:
        model, inputs, reason = small_and_inputs(name)
    except Exception as error:  # noqa: BLE001 - it is recorded
        return {"status": "cannot be built", "reason": short(error)}
    result: dict[str, Any] = {}
    layout = observed(model, result)
    if layout is None:
        return {"status": "not detected", **result}
    if inputs is None:
        return {"status": "cannot be run", "reason": reason, **result}
    dtype = next(model.parameters()).dtype  # float64, but for what does not run in it
    base, again = outputs(model, inputs), outputs(model, inputs)
    layers, left_out = mergeable(layout)
    if left_out:
        result["without ticks"] = left_out
    if not layers:
        return {"status": "does not merge", "reason": "; ".join(dict.fromkeys(left_out.values())), **result}
    attach(model, 5, layers, "all", norm_layers="all", head=False, layout=layout)
    plan = attachment_of(model).plan
    randomize(model)
    wanted = outputs(model, inputs)
    tensors = {key: value.clone() for key, value in adapter_state(model).items()}
    detach(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/base")
        try:
            control, _ = reloaded(model, f"{folder}/base", dtype)
        except Exception as error:  # noqa: BLE001 - it is recorded
            return {
                "status": "control fails",
                "reason": f"the model itself does not load again: {short(error)}",
                **result,
            }
        result["control"] = difference(base, outputs(control, inputs))
        adapted, _ = reloaded(model, f"{folder}/base", torch.float32)
        inputs32 = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        wanted32 = adapted_outputs(adapted, plan, tensors, inputs32)
        try:
            widen(model, plan, tensors, layout=layout)
        except TicktuneError as error:
            return {"status": "does not merge", "reason": str(error), **result}
        model.save_pretrained(f"{folder}/merged")
        merged, loading = reloaded(model, f"{folder}/merged", dtype)
        merged32, _ = reloaded(model, f"{folder}/merged", torch.float32)
    result |= {
        str(dtype).removeprefix("torch."): difference(wanted, outputs(merged, inputs)),
        "float32": difference(wanted32, outputs(merged32, inputs32)),
        "rounding": difference(wanted32, wanted),
        "repeat": difference(base, again),
        "effect": difference(wanted, base),
        # Of the finite ones: masked positions are -inf, and would make any difference small.
        "largest": max((float(x[x.isfinite()].abs().max()) for x in wanted if x.isfinite().any()), default=0.0),
    }
    return judged(result, loading)


def judged(result: dict[str, Any], loading: dict[str, Any]) -> dict[str, Any]:
    """Adds the status, and the reason where it is not plainly exact."""
    scale, effect, off32 = max(1.0, result["largest"]), result["effect"], result["float32"]
    strict, single, loose = TOLERANCE["float64"] * scale, TOLERANCE["float32"] * scale, LOOSE * scale
    off = result.get("float64", 0.0)
    if result["repeat"] > (strict if "float64" in result else single):
        status, reason = "control fails", "two runs of the model itself differ"
    elif not result["control"] <= loose:
        status, reason = "control fails", "the model itself, saved and loaded, computes something else"
    elif effect == 0:
        status, reason = "control fails", "the outputs do not depend on the blocks"
    elif loading:
        status, reason = "wrong", f"loading info {loading}"
    elif "float64" not in result and off32 <= single and effect >= EFFECT * single:
        status, reason = "exact in float32", "it does not run in float64"
    elif off <= strict and result["control"] <= strict and off32 <= single and effect >= EFFECT * strict:
        status, reason = "exact", ""
    elif off <= strict and off32 <= result["rounding"] and effect >= EFFECT * strict:
        status, reason = "exact in float64", "in float32 it is off by no more than the adapter's own rounding"
    elif off <= loose and off32 <= single and effect >= EFFECT * loose:
        status, reason = "exact in float32", "it computes some of its steps in float32 whatever its dtype"
    elif max(off, off32) <= min(result["rounding"], effect / EFFECT):
        status = "exact to its rounding"
        reason = "it computes in float32 whatever its dtype, and is off by no more than the adapter's own rounding"
    else:
        status, reason = "wrong", "the merged model computes something else than the adapter"
    if status.startswith("exact") and "without ticks" in result:
        status += ", in part"
    return {"status": status, **({"reason": reason} if reason else {}), **result}


def small_and_inputs(name: str) -> tuple[Any, Any, str]:
    """A small random model of a type's default config, inputs that it takes, and why it takes none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from ticktune.patch.shrink import small_models

    classes = MODEL_MAPPING_NAMES[name]
    cls = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    first = None
    config = CONFIG_MAPPING[name]()
    for model in small_models(cls, config):
        inputs, reason = running_inputs(model)
        if inputs is not None:
            return model, inputs, ""
        first = first or (model, None, reason)
    assert first is not None
    return first


def observed(model: Any, result: dict[str, Any]) -> Any:
    """Finds the layout without the table and notes what it holds, and what finding it cost or changed."""
    import torch

    from ticktune.errors import PatchError
    from ticktune.patch.detect import find_layout

    before = (model.config.to_json_string(use_diff=False), torch.random.get_rng_state().tolist())
    start = time.monotonic()
    layout = None
    try:
        layout = find_layout(model, families={})
    except PatchError as error:
        result["reason"] = error.args[0].removeprefix("no feed-forward block was found: ")
    result["detection_seconds"] = round(time.monotonic() - start, 2)
    after = (model.config.to_json_string(use_diff=False), torch.random.get_rng_state().tolist())
    if before != after:
        raise AssertionError("finding the layout changed the model's config or torch's random state")
    if layout is not None:
        kinds = collections.Counter(kind_of(ffn) for ffn in layout.ffns)
        result |= {"blocks": dict(kinds), "layers": layout.sizes, "norms": len(layout.norms)}
        result["width"] = sorted({str(ffn.width_field) for ffn in layout.ffns})
    return layout


def kind_of(ffn: Any) -> str:
    kind = "fused" if ffn.fused else "gated" if ffn.is_gated else "plain"
    return f"{kind} experts" if ffn.experts is not None else kind


def running_inputs(model: Any) -> tuple[Any, str]:
    from ticktune.patch.shrink import example_inputs

    reason, start = "", time.monotonic()
    for inputs in example_inputs(model):
        if time.monotonic() - start > SECONDS / 6:
            break
        try:
            if not any(x.isnan().any() for x in outputs(model, inputs)):
                return inputs, ""
            reason = reason or "a small random model of it computes NaN"
        except Exception as error:  # noqa: BLE001 - it is recorded
            reason = reason or short(error)
    return None, reason or "no inputs are known for it"


def mergeable(layout: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The stacks whose every block can be widened, and the others with the reason."""
    from ticktune.export.widen import merge_obstacle
    from ticktune.patch.attach import Plan, choose_form

    reasons = {}
    for stack, size in layout.sizes.items():
        plan = Plan(choose_form("auto", layout), 5, {stack: list(range(size))}, [], [])
        if reason := merge_obstacle(layout, plan):
            reasons[stack] = reason
    ticked = {ffn.stack for ffn in layout.ffns} - reasons.keys()
    return {stack: "all" for stack in layout.sizes if stack in ticked}, reasons


def randomize(model: Any) -> None:
    import torch

    from ticktune.patch.attach import adapter_parameters

    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _, _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(dtype) + 0.3 * torch.randn(parameter.shape, dtype=dtype)


def adapted_outputs(model: Any, plan: Any, tensors: dict[str, Any], inputs: dict[str, Any]) -> list[Any]:
    """What the adapter computes beside a base in float32."""
    from ticktune.patch.attach import adapter_parameters, attach
    from ticktune.patch.detect import find_layout

    layout = find_layout(model, families={})
    attach(model, plan.dim, plan.layers, "all", norm_layers="all", head=False, layout=layout)
    for key, _, parameter in adapter_parameters(model):
        parameter.data = tensors[key].float()
    return outputs(model, inputs)


def reloaded(model: Any, folder: str, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """A stock model from a folder, with what its loading complained about."""
    loaded, loading = type(model).from_pretrained(folder, output_loading_info=True, dtype=dtype)
    for module in loaded.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):  # as the small model runs: float64 has no grouped kernels
            config._experts_implementation = config._attn_implementation = "eager"
    return loaded.eval(), {key: sorted(map(str, value))[:3] for key, value in loading.items() if value}


def outputs(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """All floating tensors of a forward pass, in float64."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return list(tensors_in(model(**inputs)))


def tensors_in(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value.double()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def difference(a: list[Any], b: list[Any]) -> float:
    """The largest one; equal infinities, as masks have them, are no difference."""
    import torch

    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    apart = [torch.where((x == y) | (x.isnan() & y.isnan()), 0, (x - y).abs()) for x, y in zip(a, b, strict=True)]
    largest = max((float(x.nan_to_num(nan=float("inf")).max()) for x in apart if x.numel()), default=0.0)
    return float(f"{largest:.3g}")


def short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
