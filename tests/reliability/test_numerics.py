"""Numbers: gradients, precision, learning rates, memory; what is not finite moves no weight and reaches no file."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Run
from tests.reliability.catalogue import ROOT, case
from tests.reliability.faults import plan
from tests.reliability.recipes import (
    changed_base,
    classifier,
    done_well,
    files,
    jsonl,
    labelled,
    logged,
    record,
    refused,
    weights,
    writer,
)

RAGGED = [{"prompt": "w1 " * (1 + i % 4), "response": "w2 " * (1 + i * i % 7) + f"w{i}"} for i in range(20)]


def tensors(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "adapter/adapter.safetensors")


def continued_from(run: Path, step: int) -> None:
    """Makes a complete run one that was killed after a step."""
    for path in run.glob("checkpoints/step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))


@case("N1")
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    training = {"epochs": None, "steps": 20, "batch_size": 8}  # the last batch of an epoch has four rows
    recipe = writer(tmp_path, tiny_llama, RAGGED, training=training, optimizer={"lr": 1e-3}, base={"dropout": "off"})
    for size in (8, 3, 1):
        done_well(ticktune("train", recipe, f"training.micro_batch_size={size}", f"output=by{size}", cwd=tmp_path))
    whole = tensors(tmp_path / "by8")
    for name in ("by3", "by1"):
        for key in ("loss", "grad_norm"):
            assert logged(tmp_path / name, key)[0] == pytest.approx(logged(tmp_path / "by8", key)[0], rel=1e-6)
        assert logged(tmp_path / name) == pytest.approx(logged(tmp_path / "by8"), rel=1e-5)
        assert all(torch.allclose(tensor, whole[key], atol=1e-5) for key, tensor in tensors(tmp_path / name).items())
    assert len(set(logged(tmp_path / "by8"))) == 20


@case("N2")
def test_what_is_trained_is_float32(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    from safetensors.torch import load_file

    recipe = classifier(
        tmp_path,
        tiny_bert,
        base={"dtype": "bfloat16"},
        training={"epochs": None, "steps": 20},
        checkpoints={"every": 5, "keep": 9},
    )
    done_well(ticktune("train", recipe, cwd=tmp_path))
    assert record(tmp_path / "run")["compute"]["base_dtype"] == "bfloat16"
    trained, base = tensors(tmp_path / "run"), load_file(tiny_bert / "model.safetensors")
    state = load_file(tmp_path / "run/checkpoints/step-00000010/optimizer.safetensors")
    assert {tensor.dtype for tensor in (*trained.values(), *state.values())} == {torch.float32}
    assert len({name.partition("#")[0] for name in state}) == len(trained)
    norms = [base[name].bfloat16().float() for name in base if "LayerNorm" in name]
    moved = [tensor for name, tensor in trained.items() if ".norm." in name]
    assert len(moved) == len(norms)
    assert not any(torch.equal(tensor, norm) for tensor in moved for norm in norms)
    whole = weights(tmp_path / "run")
    continued_from(tmp_path / "run", 10)
    done_well(ticktune("train", recipe, cwd=tmp_path), "going on after step 10")
    assert weights(tmp_path / "run") == whole


def all_finite(run: Path) -> bool:
    from safetensors.torch import load_file

    found = [load_file(path) for path in run.rglob("*.safetensors")]
    return all(bool(torch.isfinite(tensor).all()) for file in found for tensor in file.values())


@case("N3")
def test_a_loss_that_is_not_finite(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    def huge(tensors: dict[str, Tensor]) -> None:
        # Finite, but the mean over the features is not.
        tensors["embeddings.word_embeddings.weight"][4 + 59] = torch.tensor([3e38, -3e38]).repeat(16)

    rows = labelled(64)
    rows[40]["text"] = "w59"
    base = changed_base(tmp_path, tiny_bert, huge)
    recipe = classifier(tmp_path, base, rows, checkpoints={"every": 1, "keep": 99}, training={"epochs": 2})
    error = refused(ticktune("train", recipe, cwd=tmp_path), 5, "the loss is nan", "train.jsonl:41", "optimizer.lr")
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    step = len(saved) + 1
    assert f"step {step}:" in error
    assert 1 < step <= 8
    assert all_finite(tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists()
    before = files(tmp_path / "run/checkpoints")
    refused(ticktune("train", recipe, cwd=tmp_path), 5, f"step {step}:")
    assert files(tmp_path / "run/checkpoints") == before
    refused(ticktune("export", "run", "--merge", cwd=tmp_path), 2, "no adapter yet")


@case("N3")
def test_a_gradient_that_is_not_finite(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    def steep(tensors: dict[str, Tensor]) -> None:
        # The last norm sees no differences, and magnifies their gradients until they overflow.
        for name in ("attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias", "output.dense.bias"):
            tensors[f"encoder.layer.1.{name}"].mul_(0)
        tensors["encoder.layer.1.output.dense.weight"].mul_(0)

    base = changed_base(tmp_path, tiny_bert, steep)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-45}))
    recipe = classifier(tmp_path, base, checkpoints={"every": 1})
    error = refused(ticktune("train", recipe, cwd=tmp_path), 5, "step 1:", "the gradient of", "is not finite")
    assert "train.jsonl:" in error
    assert not (tmp_path / "run/adapter").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@case("N4")
def test_a_precision_that_the_device_cannot_do(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    words = ["train", recipe, "base.model=./not-looked-for"]
    done = ticktune(*words, "training.precision=fp16", cwd=tmp_path)
    refused(
        done, 2, "training.precision", "fp16 is not possible: this CPU has no float16 arithmetic", "use one of: fp32"
    )
    done = ticktune(*words, "training.device=cuda:77", cwd=tmp_path)
    refused(done, 2, "training.device", "cuda:77 is not there")
    assert not (tmp_path / "run/run.json").exists()


@case("N5")
def test_fp16_steps_that_are_skipped_count_and_a_resumed_run_agrees(
    tmp_path: Path, tiny_llama: Path, ticktune: Run
) -> None:
    def large(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] *= 100  # so that the first scales are too large for the gradients

    rows = [{"prompt": "w1 " * (1 + i % 4), "response": "w2 " * (1 + i * i % 7) + f"w{i}"} for i in range(32)]
    base, training = changed_base(tmp_path, tiny_llama, large), {"precision": "fp16", "batch_size": 4}
    changes = {"optimizer": {"lr": 1e-3}, "checkpoints": {"every": 3, "keep": 9}}
    recipe = writer(tmp_path, base, rows, training=training, **changes)
    done_well(ticktune("train", recipe, "output=whole", cwd=tmp_path, env=plan("fp16")))
    whole = tmp_path / "whole"
    assert record(whole)["compute"]["precision"] == "fp16"
    counted, scales = logged(whole, "skipped"), logged(whole, "scale")
    skips = [after - before for before, after in zip([0, *counted], counted, strict=False)]
    assert len(skips) == 8
    assert skips[:3] == [1, 1, 1]
    assert sum(skips) == record(whole)["skipped_steps"] < 8
    assert scales == [2.0 ** (16 - sum(skips[:step])) for step in range(8)]
    # A skipped step counts: the learning rate is that of a run that skips none.
    done_well(ticktune("train", recipe, "output=plain", "training.precision=fp32", cwd=tmp_path))
    assert logged(whole, "lr") == logged(tmp_path / "plain", "lr")
    for killed in (4, 7):
        run = tmp_path / f"run{killed}"
        fault = plan("fp16", f"KILL@ticktune.session.Session._show#{killed}")
        assert ticktune("train", recipe, f"output={run.name}", cwd=tmp_path, env=fault).returncode == -9
        done = ticktune("train", recipe, f"output={run.name}", cwd=tmp_path, env=plan("fp16"))
        done_well(done, f"going on after step {killed // 3 * 3} of 8")
        assert weights(run) == weights(whole)
        assert record(run)["skipped_steps"] == sum(skips)
        for key in ("loss", "lr", "scale", "skipped", "grad_norm"):
            assert logged(run, key) == logged(whole, key)


@case("N6")
def test_tensors_that_never_move_are_named(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    def deaf(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.layer.1.output.LayerNorm.weight"].fill_(0)
        tensors["encoder.layer.1.output.LayerNorm.bias"].fill_(0.5)

    recipe = classifier(tmp_path, tiny_bert, training={"epochs": None, "steps": 10})
    done = ticktune("train", recipe, cwd=tmp_path)
    assert "never had a gradient" not in done_well(done)
    assert record(tmp_path / "run")["idle"] == []
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 10
    assert all(0 < norm < math.inf for norm in norms)
    base = changed_base(tmp_path, tiny_bert, deaf)
    done = ticktune("train", recipe, f"base.model={base}", "norms.train=none", "output=deaf", cwd=tmp_path)
    ticks = [name for name in tensors(tmp_path / "deaf") if ".ffn." in name]
    done_well(done, f"{len(ticks)} of the trained tensors never had a gradient and are as they were: ")
    assert sorted(record(tmp_path / "deaf")["idle"]) == sorted(ticks)


def rate(name: str, step: int, total: int, warmup: int) -> float:
    """The share of the peak in a step, from 1."""
    if step <= warmup:
        return step / warmup
    done = (step - 1 - warmup) / (total - warmup)
    return {"linear": 1 - done, "cosine": math.cos(done * math.pi / 2) ** 2, "constant": 1.0}[name]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@case("N7", "N12")
def test_the_learning_rate_is_its_closed_form(tmp_path: Path, tiny_bert: Path, ticktune: Run, name: str) -> None:
    recipe = classifier(
        tmp_path,
        tiny_bert,
        optimizer={"lr": 0.01},
        schedule={"name": name, "warmup": 0.25},
        training={"epochs": None, "steps": 12},
        checkpoints={"every": 1, "keep": 99},
    )
    done_well(ticktune("train", recipe, cwd=tmp_path))
    expected = [0.01 * rate(name, step, 12, 3) for step in range(1, 13)]
    assert logged(tmp_path / "run", "lr") == pytest.approx(expected, rel=1e-12)
    last = {"linear": 0.01 / 9, "cosine": 0.01 * 2.5 / 81, "constant": 0.01}[name]
    assert expected[-1] == pytest.approx(last, rel=0.05)  # as docs/recipe.md has it
    assert "that of linear is 1/N of the peak, that of cosine about 2.5/N²" in (ROOT / "docs/recipe.md").read_text()
    continued_from(tmp_path / "run", 5)
    done_well(ticktune("train", recipe, cwd=tmp_path), "going on after step 5")
    assert logged(tmp_path / "run", "lr") == pytest.approx(expected, rel=1e-12)


@case("N8")
def test_out_of_memory_names_the_keys_to_change(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    rows = [{**row, "text": row["text"] + " w1" * 50} for row in labelled(300)] + labelled(300, start=300)
    changes = {"data": {"max_length": 64}, "checkpoints": {"every": 1}, "training": {"batch_size": 300}}
    recipe = classifier(tmp_path, tiny_bert, rows, **changes)
    run = tmp_path / "run"

    def limited() -> str:
        keys = ("lower training.micro_batch_size", "data.max_length", "or ticks.layers")
        done = ticktune("train", recipe, cwd=tmp_path, env=plan(f"memory={80 << 20}"))
        return refused(done, 8, "out of memory", "training.batch_size 300", *keys)

    assert "trying the longest rows, 300 at once with a length of up to 53" in limited()
    assert not run.joinpath("checkpoints").exists()
    done_well(ticktune("train", recipe, cwd=tmp_path))
    whole = weights(run)
    continued_from(run, 1)
    before = files(run / "checkpoints")
    # The longest rows are not tried again; they are those of step 2, or step 1 had them.
    error = limited()
    assert "step 2, 300 at once" in error or "evaluating after step" in error
    assert files(run / "checkpoints") == before
    done_well(ticktune("train", recipe, cwd=tmp_path), "going on after step 1")
    assert weights(run) == whole


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
@case("N8")
def test_other_commands_say_that_memory_is_short(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ticktune.run
    from ticktune.cli import entry

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ticktune.run, "evaluate", exhausted)
    assert entry(["eval", "run"]) == 8
    assert capsys.readouterr().err.startswith("error[resources]: out of memory\n  fix: ")


@case("N8")
def test_trying_the_longest_rows_changes_no_weight(
    tmp_path: Path, tiny_bert: Path, ticktune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune import session
    from ticktune.cli import entry

    recipe = classifier(tmp_path, tiny_bert)
    done_well(ticktune("train", recipe, cwd=tmp_path))
    left_out = []
    monkeypatch.setattr(session, "try_step", lambda *_, **__: left_out.append(1))
    monkeypatch.chdir(tmp_path)
    assert entry(["train", str(recipe), "output=without"]) == 0
    assert left_out == [1]
    assert weights(tmp_path / "without") == weights(tmp_path / "run")


@case("N9", "N10")
def test_neither_repeating_nor_evaluating_changes_a_weight(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert, training={"epochs": 2})
    changes = {"one": [], "two": [], "often": ["evaluation.every=1"], "never": ["data.validation=null"]}
    for name, words in changes.items():
        done_well(ticktune("train", recipe, f"output={name}", *words, cwd=tmp_path))
    assert len({weights(tmp_path / name) for name in changes}) == 1
    assert logged(tmp_path / "one") == logged(tmp_path / "two")
    histories = [record(tmp_path / name)["history"] for name in changes]
    assert histories[0] == histories[1]
    assert [len(history) for history in histories] == [3, 3, 7, 0]
    done_well(ticktune("train", recipe, "output=other", "training.seed=7", cwd=tmp_path))
    assert weights(tmp_path / "other") != weights(tmp_path / "one")


@case("N11")
def test_metrics_are_those_of_a_plain_reference(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    rows = labelled(7, start=500)
    recipe = classifier(tmp_path, tiny_bert, evaluation={"batch_size": 4}, training={"epochs": 3})
    jsonl(tmp_path / "validation.jsonl", rows)
    done_well(ticktune("train", recipe, cwd=tmp_path))
    done = ticktune("--json", "predict", "run", "validation.jsonl", cwd=tmp_path)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    pairs = [(row["label"], answer["label"]) for row, answer in zip(rows, answers, strict=True)]
    scores = []
    for label in ("small", "large"):
        hits = sum(pair == (label, label) for pair in pairs)
        wrong = sum((label in pair) and pair[0] != pair[1] for pair in pairs)
        scores.append(2 * hits / (2 * hits + wrong) if hits else 0.0)
    losses = [-math.log(answer["probabilities"][row["label"]]) for row, answer in zip(rows, answers, strict=True)]
    found = record(tmp_path / "run")["metrics"]
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / 7, abs=1e-6)
    assert found["f1"] == pytest.approx(sum(scores) / 2, abs=1e-6)
    assert found["loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    done = ticktune("--json", "eval", "run", cwd=tmp_path)
    assert json.loads(done.stdout)["metrics"] == pytest.approx(found, rel=1e-6, nan_ok=True)


@case("N12")
def test_nothing_to_train(tmp_path: Path, tiny_bert: Path, tiny_llama: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    nothing = ["ticks.dim=0", "norms.train=none"]
    refused(ticktune("train", recipe, *nothing, "head.train=false", cwd=tmp_path), 2, "nothing would be trained")
    refused(ticktune("train", recipe, "optimizer.lr=0", cwd=tmp_path), 2, "optimizer.lr", "above 0")
    refused(ticktune("train", recipe, "optimizer.lr=1e38", cwd=tmp_path), 2, "optimizer.lr", "1e+30")
    recipe = writer(tmp_path, tiny_llama, RAGGED)
    refused(ticktune("train", recipe, *nothing, cwd=tmp_path), 2, "nothing would be trained")
    assert not os.path.exists(tmp_path / "run/adapter")
