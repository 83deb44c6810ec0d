"""Adapters and merged folders: old or new and never half, what is in them, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch
from tests.reliability.catalogue import case
from tests.reliability.faults import plan
from tests.reliability.recipes import refused
from tests.reliability.runs import FULL, Work, broken, hashes, leftovers, remade, run_name, small_work
from ticktune.files import sha256_file, verify_directory


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A recipe and its finished run ``whole``, merged."""
    made = small_work(tmp_path_factory.mktemp("exports"))
    assert made.train("whole").returncode == 0
    done = made.export("whole", "--merge")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def name(work: Work, request: pytest.FixtureRequest) -> str:
    """A copy of the finished and merged run."""
    work.copy("whole", name := run_name(request.node.name))
    return name


def changed(run: Path, change: Any) -> None:
    """Changes the tensors of a run's adapter, which then verifies."""
    from safetensors.torch import load_file, save_file

    def change_file(folder: Path) -> None:
        path = folder / "adapter.safetensors"
        save_file(change(load_file(path)), path)

    remade(run / "adapter", change_file)


# Crashes


@pytest.fixture(scope="module")
def calls(work: Work) -> int:
    """How often an export over an existing one touches the disk."""
    work.copy("whole", "traced")
    trace = work.folder / "trace"
    done = work.export("traced", "--merge", "--force", "--dtype", "bfloat16", plans=(f"trace={trace}",))
    assert done.returncode == 0, done.stderr
    return len(trace.read_text().splitlines())


@case("X3")
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 0.93, 0.97, 1.0])
def test_killed_while_exporting_the_old_folder_or_the_new_one_is_whole(
    share: float, work: Work, calls: int, name: str
) -> None:
    words = ("--merge", "--force", "--dtype", "bfloat16")
    merged = work.run(name) / "merged"
    before = hashes(merged)
    done = work.export(name, *words, plans=(f"KILL@disk#{max(1, round(share * calls))}",))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not broken(work.run(name))
    verify_directory(merged)
    is_new = json.loads((merged / "ticktune.json").read_text())["dtype"] == "bfloat16"
    assert is_new or hashes(merged) == before
    assert work.export(name, *words).returncode == 0
    assert json.loads((merged / "ticktune.json").read_text())["dtype"] == "bfloat16"
    assert not leftovers(work.run(name))
    verify_directory(merged)


@case("X3")
def test_what_a_killed_export_leaves_is_beside_its_folder_and_goes_with_the_next_one(
    work: Work, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = ("--merge", "--force", "--dtype", "bfloat16")
    done = work.export(name, *words, plans=("KILL@ticktune.export.save.cast_model#1",))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == []
    left = leftovers(work.run(name))
    assert len(left) == 2
    assert all(path.startswith(".tmp-merged-") for path in left)
    assert sorted(p.name for p in work.run(name).glob(".tmp-merged-*/*") if p.is_dir()) == ["control", "merged"]
    assert work.export(name, *words).returncode == 0
    assert leftovers(work.run(name)) == []


@case("X3", "C5")
@pytest.mark.parametrize("number", [1, 3, 4, 9, 20])
def test_a_disk_that_is_full_while_exporting_costs_nothing(number: int, work: Work, name: str) -> None:
    before = hashes(work.run(name))
    done = work.export(name, "--merge", "--force", "--dtype", "bfloat16", plans=(f"ENOSPC@space#{number}",))
    assert FULL.search(refused(done, 8))
    assert hashes(work.run(name)) == before
    assert not leftovers(work.run(name))


@case("X3", "C4")
def test_a_signal_while_exporting_leaves_nothing_new(work: Work, name: str) -> None:
    shutil.rmtree(work.run(name) / "merged")
    done = work.export(name, "--merge", plans=("TERM@ticktune.export.save.widen#1",))
    refused(done, 143, "stopped; nothing was written")
    assert not (work.run(name) / "merged").exists()
    assert not leftovers(work.run(name))


@case("X3")
def test_a_file_system_without_exchange_keeps_the_old_folder_too(work: Work, name: str) -> None:
    merged, words = work.run(name) / "merged", ("--merge", "--force", "--dtype", "bfloat16")
    before = hashes(merged)
    refused(work.export(name, *words, plans=("no-exchange", "ENOSPC@os.rename#2")), 8, "the disk is full")
    assert hashes(merged) == before
    assert work.export(name, *words, plans=("no-exchange",)).returncode == 0
    assert not leftovers(work.run(name))


# What is refused


@case("X4")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "encoder.1.ffn.Q"}, "encoder.1.ffn.Q is missing"),
        (lambda t: t | {"encoder.9.ffn.Q": t["encoder.1.ffn.Q"].clone()}, "encoder.9.ffn.Q has no place"),
        (lambda t: t | {"encoder.1.ffn.Q": t["encoder.1.ffn.Q"][:, 1:].contiguous()}, "(4, 31), expected (4, 32)"),
        (lambda t: t | {"encoder.1.ffn.Q": t["encoder.1.ffn.Q"].half()}, "torch.float16, expected float32"),
        (lambda t: {f"model.{k}": v for k, v in t.items()}, "is missing"),
    ],
    ids=["missing", "extra", "misshapen", "another dtype", "another prefix"],
)
def test_an_adapter_that_does_not_fit_is_refused(change: Any, said: str, work: Work, name: str) -> None:
    changed(work.run(name), change)
    done = launch("eval", f"runs/{name}", cwd=work.folder)
    refused(done, 6, "the adapter does not fit this model", said)
    assert not done.stdout


@case("X5")
def test_a_flipped_bit_is_found_by_every_command(work: Work, name: str) -> None:
    assert work.export(name).returncode == 0  # without --merge: verifies the adapter
    path = work.run(name) / "adapter/adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    for words in (("export", name), ("export", name, "--merge"), ("eval", name), ("predict", name, "w1")):
        done = launch(words[0], f"runs/{words[1]}", *words[2:], cwd=work.folder)
        refused(done, 6, "adapter.safetensors: the file is damaged")
        assert not done.stdout


@case("X9")
def test_an_export_onto_its_source_is_refused(work: Work, name: str) -> None:
    run, base = work.run(name), work.folder / "base"
    link = work.folder / f"link-{name}"
    link.symlink_to(run / "adapter")
    before, base_before = hashes(run), hashes(base)
    for place in (run / "adapter", link, f"runs/{name}/merged/../adapter"):
        for words in (("--merge",), ()):
            refused(work.export(name, *words, "--force", "-o", place), 2, "this folder is the source itself")
    refused(work.export(name, "--merge", "--force", "-o", base), 2, "this folder is the source itself")
    assert hashes(run) == before
    # The same files under other names: they get new files, and the source keeps its own.
    shutil.copytree(run / "adapter", work.folder / f"hard-{name}", copy_function=os.link)
    assert work.export(name, "--merge", "--force", "-o", work.folder / f"hard-{name}").returncode == 0
    assert hashes(run) == before
    assert hashes(base) == base_before


@case("X10")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_exported(value: float, work: Work, name: str) -> None:
    shutil.rmtree(work.run(name) / "merged")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["encoder.0.ffn.P"][0, 0] = value
        return tensors

    changed(work.run(name), spoil)
    refused(work.export(name, "--merge"), 6, "encoder.0.ffn.P holds NaN or infinity")
    assert not (work.run(name) / "merged").exists()
    assert not leftovers(work.run(name))


# What is in them


@case("X6")
def test_an_adapter_holds_what_was_trained_and_says_on_what(work: Work) -> None:
    from safetensors.torch import load_file

    run = work.run("whole")
    tensors = load_file(run / "adapter/adapter.safetensors")
    layers = [f"encoder.{i}" for i in (0, 1)]
    norms = ["encoder.norm.embedding", *(f"{layer}.norm.{kind}" for layer in layers for kind in ("attention", "ffn"))]
    assert tensors.keys() == {
        *(f"{layer}.ffn.{letter}" for layer in layers for letter in "QrP"),
        *(f"{norm}.{part}" for norm in norms for part in ("weight", "bias")),
        *(f"head.classifier.{part}" for part in ("weight", "bias")),
    }
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    facts, record = (json.loads((run / path).read_text()) for path in ("adapter/adapter.json", "run.json"))
    assert sum(t.numel() for t in tensors.values()) == record["trained_parameters"] < record["base_parameters"] / 10
    assert facts["base"]["fingerprint"] == record["hashes"]["base"]
    assert facts["training"]["data"]["train"] == {"rows": 29, "sha256": record["hashes"]["data"]["train"]}
    assert len(facts["training"]["recipe_sha256"]) == 64
    assert facts["training"]["versions"] == record["versions"]
    assert {"ticktune", "torch", "transformers"} <= record["versions"].keys()
    assert facts["task"]["state"]["labels"] == ["large", "small"]
    assert facts["task"]["tokenizer"]
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter.safetensors", "adapter.json", "README.md", "manifest.json",
    }  # fmt: skip


@case("X8")
@pytest.mark.parametrize("umask", ["022", "027", "077"])
def test_modes_follow_the_umask(umask: str, work: Work, name: str) -> None:
    work.remove(name)
    assert work.train(name, f"umask={umask}").returncode == 0
    assert work.export(name, "--merge", plans=(f"umask={umask}",)).returncode == 0
    for path in [work.run(name), *work.run(name).rglob("*")]:
        allowed = (0o777 if path.is_dir() else 0o666) & ~int(umask, 8)
        assert path.stat().st_mode & 0o777 == allowed, path


@case("X11")
def test_a_merged_folder_is_complete_and_holds_no_path_of_this_machine(work: Work) -> None:
    merged = work.run("whole") / "merged"
    assert {p.name for p in merged.iterdir()} == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "ticktune.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((merged / "config.json").read_text())["id2label"] == {"0": "large", "1": "small"}
    for path in merged.iterdir():
        for secret in (str(work.folder), str(Path.home()), "exp_avg"):
            assert secret.encode() not in path.read_bytes(), path


@case("X12")
def test_an_export_says_its_step_and_its_figures_are_those_of_eval(work: Work, name: str) -> None:
    work.remove(name)
    # Without dropout, whose draws would decide which step is the best one, and with so high a rate not the last.
    words = (
        "base.dropout=off",
        "evaluation.every=1",
        *(f"optimizer.{key}=0.1" for key in ("lr", "norm_lr", "head_lr")),
    )
    assert work.train(name, "KILL@ticktune.session.Session._show#9", words=words).returncode == -signal.SIGKILL
    assert work.train(name, words=words).returncode == 0
    assert work.export(name, "--merge").returncode == 0
    record = json.loads((work.run(name) / "run.json").read_text())
    scores = {entry["step"]: entry["metrics"]["accuracy"] for entry in record["history"]}
    assert record["chosen_step"] == max(scores, key=lambda step: (scores[step], -step)) < record["steps"]
    for folder, code in (("adapter", "adapter.json"), ("merged", "ticktune.json")):
        facts = json.loads((work.run(name) / folder / code).read_text())
        training = facts.get("adapter", facts)["training"]
        assert training["step"] == record["chosen_step"]
        card = (work.run(name) / folder / "README.md").read_text()
        assert f"| step | {record['chosen_step']} |" in card
        words = ("eval", f"runs/{name}/{folder}", "--data", "validation.jsonl")
        found = json.loads(launch(*words, cwd=work.folder).stdout)["metrics"]
        assert found == pytest.approx(training["metrics"], abs=1e-6)
        for metric, value in found.items():
            assert f"| {metric} | {value:.4f} |" in card


@case("X1", "X7")
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_tied_after_merging(tied: bool, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import tests.models as models

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=len(models.WORDS), pad_token_id=0, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    models.word_tokenizer().save_pretrained(tmp_path / "base")
    for split, step in (("train", 1), ("validation", 3)):
        (tmp_path / f"{split}.txt").write_text(" ".join(f"w{i * step % 50}" for i in range(300)))
    (tmp_path / "recipe.yaml").write_text(
        "task: causal-lm\nbase: {model: base}\nticks: {dim: 4}\n"
        "data: {train: train.txt, validation: validation.txt, max_length: 16}\n"
        "optimizer: {lr: 1e-2, norm_lr: 1e-2}\n"
        "training: {steps: 6, precision: fp32, device: cpu}\noutput: runs/tied\n"
    )
    assert launch("train", "recipe.yaml", cwd=tmp_path).returncode == 0
    done = launch("export", "runs/tied", "--merge", cwd=tmp_path, env=plan("near"))
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "runs/tied/merged"
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is tied
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@case("X1", "X11")
@pytest.mark.slow
def test_a_merged_folder_opens_in_a_fresh_process_without_ticktune(work: Work) -> None:
    script = (
        "import sys, json; from transformers import pipeline; p = pipeline('text-classification', sys.argv[1]); "
        "print(json.dumps(p(sys.argv[2:]))); assert not any(m.split('.')[0] == 'ticktune' for m in sys.modules)"
    )
    texts = ["w1 w2", "w31 w33 w30", "w2 w31"]
    words = [sys.executable, "-P", "-c", script, str(work.run("whole") / "merged"), *texts]
    done = subprocess.run(words, cwd=work.folder, capture_output=True, text=True, check=True)
    ours = launch("predict", "runs/whole", *texts, cwd=work.folder).stdout.splitlines()
    for stock, mine in zip(json.loads(done.stdout), map(json.loads, ours), strict=True):
        assert stock["label"] == mine["label"]
        assert stock["score"] == pytest.approx(mine["probability"], abs=1e-5)


@case("X2")
def test_an_adapter_is_copied_bit_for_bit(work: Work) -> None:
    assert work.export("whole", "-o", work.folder / "copied").returncode == 0
    ours, copied = work.run("whole") / "adapter", work.folder / "copied"
    assert hashes(ours) == hashes(copied)
    assert sha256_file(ours / "adapter.safetensors") == sha256_file(copied / "adapter.safetensors")
