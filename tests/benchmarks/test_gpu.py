"""The GPU benchmark: its formulas, its rules, and every call of it on tiny shapes."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels
from benchmarks.clock import Budget, in_turns
from benchmarks.gpu_steps import (
    REFERENCE,
    Effort,
    Loop,
    Rates,
    Subject,
    Way,
    budget_of,
    lora,
    measure,
    ticks,
    weights_of,
)
from benchmarks.shapes import SHAPES, TINY, build, floor_seconds, product_flops
from benchmarks.tokens import NextTokens, divided, drawn, in_rows, lognormal, mean_length, real_tokens
from ticktune.device import Compute
from ticktune.patch import standins
from ticktune.patch.segments import Segments
from ticktune.recipe.schema import Optimizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LLAMA = TINY["Llama-1B"]
SMALL = Effort(warm=1, turns=2, steps=1)


# Formulas


@pytest.mark.parametrize(
    ("name", "dim", "length", "weights", "head", "tokens_per_second"),
    [
        ("Llama-1B", 64, 2048, 973e6, 263e6, 118e3),
        ("Llama-8B", 64, 2048, 6.98e9, 525e6, 21.8e3),
        ("BERT-base", 64, 128, 84.9e6, 0, 1.56e6),
        ("MiniLM-L6", 32, 128, 10.6e6, 0, 9.6e6),
    ],
)
def test_floors_are_those_that_were_worked_out_by_hand(
    name: str, dim: int, length: int, weights: float, head: float, tokens_per_second: float
) -> None:
    shape = SHAPES[name]
    assert shape.weights == pytest.approx(weights, rel=5e-3)
    assert shape.head == pytest.approx(head, rel=5e-3)
    found = 1 / sum(floor_seconds(shape, length, dim).values())
    assert found == pytest.approx(tokens_per_second, rel=1e-2)


def test_full_fine_tuning_has_half_as_many_products_again() -> None:
    shape = SHAPES["Llama-1B"]
    assert product_flops(shape, full=True) == 1.5 * product_flops(shape)
    found = floor_seconds(shape, 2048, 0, full=True)
    assert found["products"] == pytest.approx(9.39e-6, rel=1e-2)
    assert found["ticks"] == 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_has_the_weights_that_the_formula_counts(name: str) -> None:
    shape = TINY[name]
    model: Any = build(shape, torch.float32, CPU)
    skipped = ("pooler", "classifier")
    linear = {
        path: module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(word in path for word in skipped)
    }
    assert sum(weight.numel() for weight in linear.values()) == shape.weights + shape.head
    for path, weight in linear.items():
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1), path


def test_the_optimizer_is_that_of_a_recipe_without_a_section() -> None:
    recipe = Optimizer().model_dump()
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(Rates()).items()} == {
        name: recipe[name] for name in dataclasses.asdict(Rates())
    }


@pytest.mark.parametrize(("name", "dim"), [("Llama-1B", 64), ("BERT-base", 64), ("MiniLM-L6", 32)])
def test_lora_is_given_as_many_parameters_as_ticks(name: str, dim: int) -> None:
    shape, meta = SHAPES[name], torch.device("meta")
    compute = Compute(meta, "bf16")
    subject = Subject("", shape, weights_of(shape, compute), {}, 1.0, 1, compute, budget_of(shape, dim))
    with meta:
        trained = sum(p.numel() for _, _, p in lora(everywhere=False, best=True)(subject).named)
    assert trained / subject.budget == pytest.approx(1, abs=0.1)


# Batches


def test_packed_and_padded_batches_hold_the_same_tokens_and_have_the_same_loss() -> None:
    task, model = NextTokens(), build(LLAMA, torch.float32, CPU).eval()
    examples = drawn(lognormal(6, 8, 32), LLAMA.vocabulary)
    padded = task.collate(examples)
    rows = in_rows([e["length"] for e in examples], 32)
    assert len(rows) < len(examples)
    packed = task.pack([[examples[i] for i in row] for row in rows])
    tokens = sum(e["length"] for e in examples)
    for batch in (padded, packed):
        assert real_tokens(batch) == tokens
        assert task.weight(batch) == tokens - len(examples)
    with torch.no_grad():
        losses = [float(task.loss(task.forward(model, batch), batch)) for batch in (padded, packed)]
        with Segments(model).running(packed):
            losses.append(float(task.loss(task.forward(model, packed), packed)))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def _note_attention(names: set[str], module: Any, args: Any) -> None:
    names.add(module.config._attn_implementation)


@pytest.mark.parametrize("attention", ["segments", "masked"])
def test_packed_rows_attend_as_a_way_says(attention: str) -> None:
    compute, lengths = Compute(CPU, "bf16"), [10, 6, 16]
    examples = drawn(lengths, LLAMA.vocabulary)
    packed = NextTokens().pack([[examples[i] for i in row] for row in in_rows(lengths, 16)])
    budget = budget_of(LLAMA, 8)
    subject = Subject("", LLAMA, weights_of(LLAMA, compute), {"packed": [[packed]]}, 1.0, 16, compute, budget)
    for adapt in (ticks(8), lora(everywhere=False, best=True)):
        loop = Loop(Way(adapt, "packed", attention=attention), subject)
        names: set[str] = set()
        for module in loop.model.modules():
            if type(module).__name__ == "LlamaAttention":
                module.register_forward_pre_hook(functools.partial(_note_attention, names))
        loop.turn(1)
        assert names == {{"segments": "ticktune_segments", "masked": "sdpa"}[attention]}


def test_batches_by_length_have_less_padding() -> None:
    lengths = lognormal(400, 32, 128)
    padding = {}
    for layout in ("random", "by length"):
        batches = divided(lengths, 8, layout)
        assert len(batches) == 50
        assert sorted(n for batch in batches for n in batch) == list(range(400))
        padding[layout] = sum(8 * max(lengths[n] for n in batch) for batch in batches) / sum(lengths)
    assert padding["by length"] < 1.2 < padding["random"]


# Rules


def test_who_begins_changes_from_round_to_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    seconds = in_turns(calls, CPU, warm=1, times=3)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert all(len(each) == 3 for each in seconds.values())


@pytest.fixture(scope="module")
def subject() -> Subject:
    compute = Compute(CPU, "bf16")
    batches = {"packed": [[NextTokens().collate(drawn([16, 16], LLAMA.vocabulary))]]}
    length = mean_length([16, 16])
    return Subject("a case", LLAMA, weights_of(LLAMA, compute), batches, length, 32, compute, budget_of(LLAMA, 8))


def test_lack_of_memory_ends_one_way_and_not_the_others(subject: Subject) -> None:
    def too_large(subject: Subject) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    ways = {REFERENCE: Way(ticks(0), "packed"), "large": Way(too_large, "packed"), "ticks": Way(ticks(8), "packed")}
    left_out: list[dict[str, str]] = []
    rows = measure(subject, ways, SMALL, Budget(100), left_out)
    assert [row["way"] for row in rows] == [REFERENCE, "ticks"]
    assert left_out == [{"what": "a case: large", "why": "out of memory"}]
    assert [row["trained"] for row in rows] == [5 * 64, 5 * 64 + 2 * 3 * 64 * 8]


def test_ways_hold_the_same_weights_and_leave_them_as_they_are(subject: Subject) -> None:
    before = [weight.clone() for weight in subject.weights]
    assert [p.data_ptr() for p in subject.model().parameters()] == [w.data_ptr() for w in subject.weights]
    own = subject.model(own=True, dtype=torch.float32)
    assert not {p.data_ptr() for p in own.parameters()} & {w.data_ptr() for w in subject.weights}
    full = Way(gpu.everything(torch.float32), "packed", full=True)
    [_, row] = measure(subject, {REFERENCE: Way(ticks(0), "packed"), "full": full}, SMALL, Budget(100), [])
    assert row["trained"] == sum(w.numel() for w in subject.weights)
    assert all(torch.equal(a, b) for a, b in zip(before, subject.weights, strict=True))


def test_what_there_is_no_time_for_is_named(subject: Subject) -> None:
    left_out: list[dict[str, str]] = []
    assert measure(subject, {REFERENCE: Way(ticks(0), "packed")}, SMALL, Budget(-1), left_out) == []
    assert left_out[0]["what"] == f"a case: {REFERENCE}"
    assert "budget" in left_out[0]["why"]


def test_bytes_are_read_from_what_ncu_writes() -> None:
    text = (
        '==PROF== Connected to process 1\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","gemm","dram__bytes.sum","byte","1,024"\n"1","add","dram__bytes.sum","byte","512"\n'
        '"1","add","gpu__time_duration.sum","ns","7"\n'
    )
    assert gpu_kernels.sum_of(text) == 1536
    with pytest.raises(RuntimeError, match="says nothing of dram__bytes.sum: ==ERROR=="):
        gpu_kernels.sum_of("==ERROR== no permission")


# Calls

_ALONE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        is_hidden = name.partition(".")[0] in ("datasets", "pydantic")
        return None if is_hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from pathlib import Path
from benchmarks import gpu
torch.set_num_threads(1)
for call in sys.argv[2:]:
    gpu.measured(call, tiny=True, device=torch.device("cpu"), seconds=300, path=Path(sys.argv[1]) / f"{call}.json")
"""

_PEERS = {
    "PEFT LoRA, FFN, best",
    "PEFT LoRA, all linear, r 16, best",
    "Trainer + PEFT LoRA, FFN, default",
    "Trainer + PEFT LoRA, all linear, r 16, default",
}
_FULL = {"full fine-tuning", "full fine-tuning, bfloat16 weights", "Trainer, full fine-tuning, default"}


def _ticks(dim: int) -> set[str]:
    return {f"ticks {dim} + norms, {form}" for form in ("split", "wide")}


_TICKS = _ticks(8)
_ENCODERS = {
    REFERENCE, "ticks, split, by length", "ticks, wide, by length", "norms only, CUDA graphs", "ticks, compiled",
    "ticks, CUDA graphs", "ticks, compiled, CUDA graphs", "ticks, AdamW foreach", "PEFT LoRA, FFN, best",
    "Trainer + PEFT LoRA, FFN, default", "full fine-tuning", "ticks, without padding, no dropout",
    "ticks, random, no dropout",
}  # fmt: skip
_LANGUAGE = {REFERENCE, *_TICKS, "PEFT LoRA, FFN, best"}
WAYS: dict[str, dict[str, set[str]]] = {
    "G1": {
        "Llama-1B, rows of 32": {
            REFERENCE, *_TICKS, *_ticks(2), *_ticks(16), *_PEERS
        },
        "Llama-1B, rows of 32, all weights": {REFERENCE, *_FULL},
        "Llama-1B, lengths of mean 8": {REFERENCE, *_TICKS, "ticks 8 + norms, split, masked", *_PEERS},
    },
    "G2": {"Llama-1B, compiled, rows of 32": _LANGUAGE | {
            "ticks, all logits", "ticks, not compiled", "PEFT LoRA, FFN, best, not compiled",
            "Trainer + PEFT LoRA, FFN, default",
        }},
    "G3": {
        f"Llama-8B, 64 tokens, rows of {length}": _LANGUAGE | {"ticks, FFN computed again"} for length in (32, 64)
    },
    "G4": {"MiniLM-L6, 4 rows of up to 16": _ENCODERS},
}  # fmt: skip
MISSING = {
    "G0": {"it needs CUDA"},
    "G1": set[str](),
    "G2": {"liger-kernel is not installed"},
    "G3": {"ticktune has no products in FP8"},
    "G4": {"ticktune trains one run in a process"},
    "G6": {"ncu needs CUDA"},
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All calls but G5, in a process that has neither datasets nor pydantic, as some machines with a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    words = [sys.executable, "-c", _ALONE, str(folder), *MISSING]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return {call: json.loads((folder / f"{call}.json").read_text(encoding="utf-8")) for call in MISSING}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("call", MISSING)
def test_a_call_measures_all_that_can_be_and_names_the_rest(call: str, documents: dict[str, Any]) -> None:
    document = documents[call]
    assert document["tiny"]
    assert {each["why"] for each in document["left_out"]} == MISSING[call]
    assert {"torch", "transformers", "peft"} <= document["versions"].keys()
    for row in document["rows"]:
        columns = gpu.TABLES[row["kind"]]
        numbers = {name: row[name] for name in columns if name not in ("case", "way") and name in row}
        assert all(math.isfinite(value) for value in numbers.values()), row
        assert row["times"] == document["steps"] == 2
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    found: dict[str, set[str]] = {}
    for row in document["rows"]:
        if row["kind"] == "step":
            found.setdefault(row["case"], set()).add(row["way"])
    assert found == WAYS.get(call, {})
    text = gpu.table(document)
    assert all(f"| {row['way']} |" in text for row in document["rows"])
    assert all(each["what"] in text and f": {each['why']}" in text for each in document["left_out"])


@pytest.mark.slow
def test_ways_of_a_case_train_the_same_tokens(documents: dict[str, Any]) -> None:
    for call in ("G1", "G2", "G3"):
        tokens: dict[str, set[float]] = {}
        for row in documents[call]["rows"]:
            tokens.setdefault(row["case"], set()).add(row["tokens_per_step"])
            if "FFN" in row["way"] and "PEFT" in row["way"]:
                assert row["budget_ratio"] == pytest.approx(1, abs=0.1)
        assert all(len(each) == 1 for each in tokens.values()), tokens


@pytest.mark.slow
def test_what_is_kept_differs_as_it_should(documents: dict[str, Any]) -> None:
    """Ticks keep less than LoRA on the same block; the loss without logits keeps none; compiled ticks are there."""
    kept = {(row["case"], row["way"]): row.get("saved_bytes_per_token") for row in documents["G1"]["rows"]}
    case = "Llama-1B, lengths of mean 8"
    ticks = "ticks 8 + norms, split"
    assert kept[case, REFERENCE] < kept[case, ticks] < kept[case, "PEFT LoRA, FFN, best"]
    kept = {row["way"]: row["saved_bytes_per_token"] for row in documents["G2"]["rows"]}
    assert kept[REFERENCE] < kept[ticks] < kept["ticks, all logits"]


@pytest.mark.slow
def test_kinds_of_the_kernels(documents: dict[str, Any]) -> None:
    rows = documents["G0"]["rows"]
    assert {row["kind"] for row in rows} == {"copy", "loss", "product", "attention"}
    assert {row["way"] for row in rows if row["kind"] == "product"} == {"no tick", "split", "wide", "tick alone"}
    assert {row["way"] for row in rows if row["kind"] == "attention"} == {"flash", "masked"}
    assert [row["way"] for row in documents["G6"]["rows"]] == list(gpu_kernels.KERNELS)


@pytest.mark.slow
def test_accuracy_by_time(data_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "G5.json"
    done = _command("--call", "G5", "--tiny", "--results", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["left_out"] == []
    assert {row["way"]: row["epoch"] for row in document["rows"]} == {
        "ticks + norms, all layers, CUDA graphs": 1,
        "ticks + norms, all layers": 1,
        "ticks + norms, upper half, prefix kept": 1,
        "PEFT LoRA": 1,
        "full fine-tuning": 1,
    }
    assert all(0 < row["accuracy"] <= 1 and row["seconds"] > 0 for row in document["rows"])
    assert done.stdout.strip() == gpu.table(document)


def _command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=_environment(),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_was_left_out_for_one_reason_is_one_line() -> None:
    parts = [{"what": f"case {number}", "why": "no time"} for number in range(8)] + [{"what": "FP8", "why": "none"}]
    assert gpu.table({"rows": [], "left_out": parts}).splitlines() == [
        "- Left out: case 0; case 1; case 2; case 3; case 4; case 5; and 2 more: no time",
        "- Left out: FP8: none",
    ]


@pytest.mark.slow
def test_one_case_is_measured_again_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "G3.json"
    options: dict[str, Any] = {"tiny": True, "device": CPU, "seconds": 60, "path": path}
    first = gpu.measured("G3", **options)
    again = gpu.measured("G3", **options, only="rows of 64")
    cases = {row["case"] for row in first["rows"]}
    assert len(cases) == 2
    assert {row["case"] for row in again["rows"]} == cases
    for row in first["rows"]:
        assert (row in again["rows"]) == ("rows of 32" in row["case"])
    first["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(first), encoding="utf-8")
    with pytest.raises(SystemExit, match="of other versions"):
        gpu.measured("G3", **options, only="rows of 64")


def test_without_a_gpu_real_shapes_are_refused(tmp_path: Path) -> None:
    done = _command("--call", "G1", "--results", str(tmp_path / "G1.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("not run: this machine has no CUDA device; --tiny")
    assert not list(tmp_path.iterdir())


# The page


def _document() -> dict[str, Any]:
    row = {"kind": "step", "case": "a case", "way": "ticks", "trained": 1234, "tokens_per_second": 98765.4}
    row |= {"ms": 1.5, "ms_p10": 1.25, "ms_p90": 2.0, "tax": 0.015, "peak_allocated_bytes": 3 << 30}
    return {
        "command": "python -m benchmarks.gpu --call G1",
        "machine": {"name": "A GPU", "clocks_under_load": {"clocks.sm": "1980"}},
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "rows": [row],
        "left_out": [{"what": "Liger", "why": "not installed"}],
    }


def test_results_become_a_section_of_the_page() -> None:
    page = "# Performance\n\nText.\n"
    assert gpu.page_with({}, page) == page
    found = gpu.page_with({"G1": _document()}, page)
    assert found.startswith("# Performance\n\nText.\n\n<!-- gpu -->\n\n## On a GPU\n")
    assert "| a case | ticks | 1,234 | 98,765 | 1.500 | 1.250 | 2.000 | 1.5 % | - | - | - | 3.00 | - | - | - |" in found
    assert "A GPU, torch 2.11.0, transformers 5.17.0, 1980 MHz after the last case." in found
    assert "- Left out: Liger: not installed" in found
    assert gpu.page_with({"G1": _document()}, found) == found


def test_the_page_says_what_the_committed_results_say() -> None:
    text = gpu.PAGE.read_text(encoding="utf-8")
    assert gpu.page_with(gpu.committed(), text) == text
    assert (gpu.BEGIN in text) == bool(gpu.committed())


def test_the_backend_of_layers_is_what_it_was_after_a_call(tmp_path: Path) -> None:
    before = standins.BACKEND
    document = gpu.measured("G6", tiny=True, device=CPU, seconds=60, path=tmp_path / "G6.json")
    assert document["backend"] == "eager"
    assert before == standins.BACKEND == "inductor"
    assert json.loads((tmp_path / "G6.json").read_text(encoding="utf-8")) == document
