"""Runs of a causal model: with and without logits, with batches of tokens and packed rows, killed and resumed."""

import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.end_to_end.support import write_recipe
from tests.models import WORDS, save_tiny_llama, word_tokenizer
from tests.reliability.faults import plan
from ticktune.files import sha256_file

BATCHES: dict[str, dict[str, Any]] = {
    "of rows": {"batch_size": 8, "micro_batch_size": 3},
    "of tokens": {"batch_tokens": 96, "micro_batch_size": 4},
    "packed": {"batch_size": 8, "micro_batch_size": 5, "packing": True},
    "of tokens, packed": {"batch_tokens": 96, "packing": True},
}

KILL = "KILL@ticktune.session.Session._show#9"  # in the second epoch, between two checkpoints


def write_texts(folder: Path, name: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first = rng.randrange(20)
        words = [f"w{first + i}" for i in range(rng.randint(2, 12))]  # counting up can be learned
        rows.append(json.dumps({"prompt": words[0], "response": " ".join(words[1:])}))
    (folder / name).write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and a recipe."""
    folder = tmp_path_factory.mktemp("fast")
    save_tiny_llama(folder / "base")
    write_texts(folder, "train.jsonl", 45, 1)
    write_texts(folder, "validation.jsonl", 16, 2)
    recipe = {
        "task": "causal-lm",
        "base": {"model": "base"},
        "ticks": {"dim": 4, "dropout": 0.1},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 24},
        "optimizer": {"lr": 1e-2, "norm_lr": 1e-2},
        "training": {"epochs": 3, "precision": "fp32", "device": "cpu"},
        "checkpoints": {"every": 2},
        "logging": {"every": 1},
    }
    write_recipe(folder, recipe, {})
    return folder


def words_of(training: dict[str, Any]) -> list[str]:
    return [f"training.{key}={json.dumps(value)}" for key, value in training.items()]


def models_folder() -> Path:
    folder = os.environ.get("TICKTUNE_MODELS")
    if not folder:
        pytest.skip("TICKTUNE_MODELS is not set: it names the folder with stories260K-hf/")
    return Path(folder)


def train(
    ticktune: Run,
    work: Path,
    name: str,
    training: dict[str, Any],
    *plans: str,
    code: int = 0,
    words: Sequence[str] = (),
) -> Path:
    done = ticktune(
        "train", "recipe.yaml", f"output=runs/{name}", *words_of(training), *words, cwd=work, env=plan(*plans)
    )
    assert done.returncode == code, done.stderr
    return work / "runs" / name


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def adapter(run: Path) -> str:
    return sha256_file(run / "adapter/adapter.safetensors")


@pytest.mark.parametrize("kind", BATCHES)
def test_a_killed_run_goes_on_to_the_same_weights(kind: str, work: Path, ticktune: Run) -> None:
    name = kind.replace(", ", "-").replace(" ", "-")
    whole = train(ticktune, work, f"{name}-whole", BATCHES[kind])
    stopped = train(ticktune, work, f"{name}-stopped", BATCHES[kind], KILL, code=-signal.SIGKILL)
    assert not (stopped / "adapter").exists()
    train(ticktune, work, f"{name}-stopped", BATCHES[kind])
    assert adapter(stopped) == adapter(whole)
    assert losses(stopped) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    assert record(whole)["loss"] == "chunked"
    assert record(whole).get("attention") == ("segments" if "packing" in BATCHES[kind] else None)


@pytest.mark.parametrize("kind", ["of rows", "of tokens"])
def test_the_plain_ways_end_with_the_same_losses(kind: str, work: Path, ticktune: Run) -> None:
    name = kind.replace(" ", "-")
    fast = train(ticktune, work, f"{name}-fast", BATCHES[kind])
    plain = train(ticktune, work, f"{name}-plain", {**BATCHES[kind], "fast": False})
    assert (record(fast)["loss"], record(plain)["loss"]) == ("chunked", "plain")
    assert (record(fast)["cpu_kernels"], record(plain).get("cpu_kernels")) == ("ticktune", None)
    assert adapter(fast) != adapter(plain)  # or the fast way was not taken
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)


def test_packed_rows_train_on_the_same_examples_in_a_step(work: Path, ticktune: Run) -> None:
    run = train(ticktune, work, "packed-rows", {"batch_size": 8, "packing": True, "epochs": 1})
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert record(run)["steps"] == 6


@pytest.mark.parametrize("base", ["base", "stories260K-hf"])
def test_a_packed_run_that_recorded_no_attention_goes_on_with_masks_to_the_same_losses(
    base: str, work: Path, ticktune: Run
) -> None:
    """As one of a version that had no other."""
    training = {**BATCHES["of tokens, packed"], "gradient_checkpointing": True}
    folder = work / base if base == "base" else models_folder() / base
    words = (f"base.model={folder}", "optimizer.lr=1e-3", *words_of(training))
    whole, stopped = (
        train(ticktune, work, f"{name}-{base}", {}, *plans, code=code, words=words)
        for name, plans, code in (("by-segments", (), 0), ("by-masks", (KILL,), -signal.SIGKILL))
    )
    entries = record(stopped)
    assert entries.pop("attention") == record(whole)["attention"] == "segments"
    (stopped / "run.json").write_text(json.dumps(entries))
    train(ticktune, work, stopped.name, {}, words=words)
    assert record(stopped)["attention"] == "masked"
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)
    assert adapter(stopped) != adapter(whole)  # or the masks were not there


def test_layers_that_are_computed_again_make_no_difference_to_packed_rows(work: Path, ticktune: Run) -> None:
    packed = {**BATCHES["packed"], "epochs": 1}
    once = train(ticktune, work, "packed-once", packed)
    again = train(ticktune, work, "packed-again", {**packed, "gradient_checkpointing": True})
    assert adapter(once) == adapter(again)
    assert record(again)["activations"]["bytes"] < record(again)["activations"]["bytes_without_checkpointing"]


def test_compiled_layers_attend_by_masks_on_a_cpu(work: Path, ticktune: Run) -> None:
    stop = "TERM@ticktune.session.Session._try_longest#1"
    training = {**BATCHES["packed"], "compile": True}
    run = train(ticktune, work, "packed-compiled", training, stop, code=128 + signal.SIGTERM)
    assert record(run)["attention"] == "masked: compiled layers would have a graph for each batch"
    assert record(run)["cpu_kernels"] == "torch: what is compiled has its own"


def test_with_dropout_in_attention_packed_rows_attend_by_segments_too(work: Path, ticktune: Run) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS)}
    model = GPT2LMHeadModel(GPT2Config(**shape, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    model.save_pretrained(work / "gpt2")
    word_tokenizer().save_pretrained(work / "gpt2")
    found = {}
    for dropout in ("keep", "off"):
        words = ("base.model=gpt2", f"base.dropout={dropout}", *words_of({**BATCHES["packed"], "epochs": 1}))
        found[dropout] = train(ticktune, work, f"packed-gpt2-{dropout}", {}, words=words)
        assert record(found[dropout])["attention"] == "segments"
    assert losses(found["keep"]) != losses(found["off"])
    assert losses(found["keep"]) == pytest.approx(losses(found["off"]), rel=0.1)


def test_a_signal_while_steps_are_counted_stops_before_the_first_one(work: Path, ticktune: Run) -> None:
    counting = "TERM@ticktune.data.batches.count_batches#2"
    stopped = train(ticktune, work, "counting", {"batch_tokens": 96}, counting, code=128 + signal.SIGTERM)
    assert not (stopped / "run.json").exists()
    train(ticktune, work, "counting", {"batch_tokens": 96})
    assert adapter(stopped) == adapter(train(ticktune, work, "counted", {"batch_tokens": 96}))


def test_what_is_tried_is_the_largest_micro_batch(work: Path, ticktune: Run) -> None:
    """Two rows of 12 tokens, as the longest one, of 13, is alone in its batch."""
    run = train(ticktune, work, "largest", {"batch_tokens": 24, "gradient_checkpointing": True, "epochs": 1})
    assert (record(run)["activations"]["rows"], record(run)["activations"]["length"]) == (2, 12)


def test_a_run_that_recorded_no_way_goes_on_by_the_plain_one(work: Path, ticktune: Run) -> None:
    """As one of a version that knew no other."""
    whole = train(ticktune, work, "before-whole", {"batch_size": 8, "fast": False})
    stopped = train(ticktune, work, "before", {"batch_size": 8, "fast": False}, KILL, code=-signal.SIGKILL)
    entries = record(stopped)
    del entries["loss"]
    entries.pop("cpu_kernels", None)
    for key in ("fast", "packing", "batch_tokens"):
        del entries["recipe"][f"training.{key}"]
    (stopped / "run.json").write_text(json.dumps(entries))
    train(ticktune, work, "before", {"batch_size": 8})
    # Another version rounds differently elsewhere too.
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)
    assert record(stopped)["loss"] == "plain"
    assert record(stopped)["cpu_kernels"] == "torch"


def test_a_base_that_does_not_keep_examples_apart_is_refused_before_the_run_begins(
    tmp_path: Path, ticktune: Run
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(1)
    shape: dict[str, Any] = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS)}
    BloomForCausalLM(BloomConfig(**shape, pad_token_id=0, bos_token_id=2, eos_token_id=3)).save_pretrained(
        tmp_path / "base"
    )
    word_tokenizer().save_pretrained(tmp_path / "base")
    write_texts(tmp_path, "train.jsonl", 20, 1)
    recipe = {"task": "causal-lm", "base": {"model": "base"}, "data": {"train": "train.jsonl"}}
    write_recipe(tmp_path, recipe, {"training": {"packing": True, "device": "cpu"}})
    done = ticktune("train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 3
    assert "the base does not" in done.stderr
    assert "training.packing: false" in done.stderr
    assert not (tmp_path / "runs/recipe/run.json").exists()


def test_rows_that_fill_their_windows_are_told_not_to_share(work: Path, ticktune: Run) -> None:
    words = ["train", "recipe.yaml", "output=runs/full", "training.packing=true", "training.epochs=1"]
    (work / "long.txt").write_text(" ".join(f"w{i % 60}" for i in range(24 + 23 * 3 - 2)) + "\n")
    done = ticktune(*words, "data.train=long.txt", "data.validation=null", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "no two examples fit into a row" in done.stderr
    assert record(work / "runs/full")["attention"] == "segments"
