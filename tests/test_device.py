"""Device, precision and seeds."""

import hashlib
from typing import Any

import pytest
import torch

from ticktune import device
from ticktune.device import Compute, choose_compute, describe, is_out_of_memory, mix
from ticktune.errors import RecipeError


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)


def cpu_bf16(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: has)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_is_bf16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    cpu_bf16(monkeypatch, has_bf16)
    assert choose_compute("auto", "auto") == Compute(torch.device("cpu"), expected)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_cuda")
def test_bf16_on_a_cpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_bf16(monkeypatch, False)
    with pytest.raises(RecipeError, match="this CPU has no native bfloat16 arithmetic") as caught:
        choose_compute("cpu", "bf16")
    problem = caught.value.problems[0]
    assert (problem.where, problem.fix) == ("training.precision", "use one of: fp32, or auto")


@pytest.mark.usefixtures("no_cuda")
def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_bf16(monkeypatch, True)
    with pytest.raises(RecipeError, match="fp16 is not possible: this CPU has no float16") as caught:
        choose_compute("cpu", "fp16")
    assert caught.value.problems[0].fix == "use one of: fp32, bf16, or auto"


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is not there: this machine has 0 CUDA devices") as caught:
        choose_compute(name, "auto")
    problem = caught.value.problems[0]
    assert (problem.where, problem.fix) == ("training.device", "use training.device=cpu, or auto")


@pytest.mark.usefixtures("two_old_gpus")
def test_auto_takes_the_gpu_and_fp16_where_it_has_no_bf16() -> None:
    assert choose_compute("auto", "auto") == Compute(torch.device("cuda"), "fp16")


@pytest.mark.usefixtures("two_old_gpus")
def test_bf16_on_an_old_gpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="this GPU has no native bfloat16 arithmetic"):
        choose_compute("cuda", "bf16")


@pytest.mark.usefixtures("two_old_gpus")
def test_a_gpu_number_beyond_the_last_is_refused() -> None:
    assert choose_compute("cuda:1", "fp32").device.index == 1
    with pytest.raises(RecipeError, match="cuda:2 is not there: this machine has 2 CUDA devices"):
        choose_compute("cuda:2", "fp32")


@pytest.mark.parametrize(
    ("facts", "expected"), [({"amx_bf16": True}, True), ({"avx512_f": True, "amx_bf16": False}, False)]
)
def test_native_bf16_is_read_off_the_capabilities(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
    assert device.cpu_has_bf16() is expected


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_have_the_dtype_of_the_precision(precision: Any, dtype: torch.dtype) -> None:
    with Compute(torch.device("cpu"), precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_gradients(precision: Any, enabled: bool) -> None:
    assert Compute(torch.device("cpu"), precision).scaler().is_enabled() is enabled


def test_put_moves_tensors_and_keeps_the_rest() -> None:
    batch = Compute(torch.device("meta"), "fp32").put({"a": torch.ones(2), "b": "text"})
    assert (batch["a"].device.type, batch["b"]) == ("meta", "text")


def test_a_mixed_seed_is_a_hash_of_its_numbers() -> None:
    digest = hashlib.sha256(b"42:epoch:7").digest()
    assert mix(42, "epoch", 7) == int.from_bytes(digest[:8], "big") // 2


def test_mixed_seeds_fit_into_a_generator_and_differ() -> None:
    seeds = {mix(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_the_order_and_borders_of_mixed_numbers_count() -> None:
    assert len({mix(1, 2), mix(2, 1), mix(12), mix("1", "", "2")}) == 4


def test_a_description_says_what_was_used() -> None:
    facts = describe(Compute(torch.device("cpu"), "fp32"))
    assert facts["name"]
    assert (facts["device"], facts["precision"], facts["threads"]) == ("cpu", "fp32", torch.get_num_threads())


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("could not create a primitive"), True),  # of oneDNN
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: BaseException, found: bool) -> None:
    assert is_out_of_memory(error) is found
