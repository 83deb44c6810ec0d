"""Families beyond the table's first rows, through the command line: found by proof, written as a Llama, experts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tests.models as models
from tests.end_to_end.support import classification
from tests.reliability.catalogue import case
from ticktune.cli import entry

TEXT = {"train": "train.txt", "validation": "validation.txt", "max_length": 16}


def _save(folder: Path, name: str) -> Path:
    """Saves a tiny model with a word tokenizer; some of its families have a row in the table, others none."""
    import torch
    import transformers as t

    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    glu: dict[str, Any] = {**size, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    config = {
        "stablelm": lambda: t.StableLmConfig(**glu),
        "mistral": lambda: t.MistralConfig(**glu, sliding_window=None),
        "mixtral": lambda: t.MixtralConfig(**glu, num_local_experts=4),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(
            **glu, moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False
        ),
        "albert": lambda: t.AlbertConfig(**size, intermediate_size=48, embedding_size=16, pad_token_id=0),
    }[name]()
    torch.manual_seed(0)
    auto = t.AutoModel if name == "albert" else t.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / name)
    models.word_tokenizer().save_pretrained(folder / name)
    return folder / name


def _recipe(folder: Path, base: Path, ticks: str = "{dim: 4}") -> Path:
    (folder / "train.txt").write_text(" ".join(f"w{i % 60}" for i in range(900)))
    (folder / "validation.txt").write_text(" ".join(f"w{i % 60}" for i in range(200)))
    path = folder / "recipe.yaml"
    path.write_text(
        f"task: causal-lm\nbase: {{model: {base}}}\nticks: {ticks}\ndata: {json.dumps(TEXT)}\n"
        "optimizer: {lr: 3e-2, norm_lr: 3e-2}\n"
        "training: {steps: 12, batch_size: 8, precision: fp32, device: cpu}\noutput: runs/tiny\n"
    )
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert entry([str(word) for word in words]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def _same_score(capsys: pytest.CaptureFixture[str]) -> None:
    """The merged folder scores what the run scores."""
    ours, merged = _answer(capsys, "eval", "runs/tiny"), None
    merged = _answer(capsys, "eval", "runs/tiny/merged", "--data", "validation.txt")
    assert merged["metrics"]["perplexity"] == pytest.approx(ours["metrics"]["perplexity"], rel=1e-5)


@case("X1")
def test_a_family_without_a_row_is_trained_and_merged(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(work, _save(work, "stablelm"))
    assert entry(["train", str(recipe)]) == 0
    assert "feed-forward blocks of stablelm were found by numerical proof" in capsys.readouterr().err
    document = _answer(capsys, "export", "--merge")
    assert document["widths"] == {"intermediate_size": 64}  # 48 + 4, rounded up to what 48 is a multiple of
    assert document["widening"][0]["padding"] == 12
    assert document["verification"]["max_difference"] <= document["verification"]["tolerance"]
    assert document["verification"]["is_conclusive"]
    _same_score(capsys)


@case("X1")
def test_plain_ticks_on_a_mistral_merge_as_a_llama(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(work, _save(work, "mistral"), "{dim: 4, form: plain}")
    assert entry(["train", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert "will train, but not merge" in said
    assert "export --merge --as llama" in said
    assert entry(["export", "--merge"]) == 6
    assert "export --merge --as llama" in capsys.readouterr().err
    assert not (work / "runs/tiny/merged").exists()
    document = _answer(capsys, "export", "--merge", "--as", "llama", "--pad-to", "64")
    assert (document["as"], document["widths"]) == ("llama", {"intermediate_size": 64})
    config = json.loads((work / "runs/tiny/merged/config.json").read_text())
    assert (config["architectures"], config["mlp_bias"]) == (["LlamaForCausalLM"], True)
    _same_score(capsys)
    # The same call again finds its own work; another width is another export.
    assert _answer(capsys, "export", "--merge", "--as", "llama", "--pad-to", "64")["widths"] == document["widths"]
    assert entry(["export", "--merge", "--as", "llama", "--pad-to", "128"]) == 7
    assert "--force" in capsys.readouterr().err


@case("X1")
@pytest.mark.parametrize("experts", ["each", "block"])
def test_experts_are_ticked_and_merged(work: Path, capsys: pytest.CaptureFixture[str], experts: str) -> None:
    recipe = _recipe(work, _save(work, "mixtral"), f"{{dim: 8, experts: {experts}}}")
    trained = _answer(capsys, "train", recipe)
    assert trained["metrics"]["perplexity"] < trained["base_metrics"]["perplexity"]
    document = _answer(capsys, "export", "--merge")
    assert document["verification"]["max_difference"] <= document["verification"]["tolerance"]
    assert document["widths"] == {"intermediate_size": 64}
    _same_score(capsys)


@case("X1")
@pytest.mark.parametrize("unshare", [False, True])
def test_layers_that_share_a_block_share_a_tick_or_not(
    work: Path, capsys: pytest.CaptureFixture[str], unshare: bool
) -> None:
    recipe = classification(work, _save(work, "albert"), ticks={"dim": 8, "unshare": unshare})
    trained = _answer(capsys, "train", recipe)
    assert trained["metrics"]["loss"] < trained["base_metrics"]["loss"]
    document = _answer(capsys, "export", "--merge")
    assert document["verification"]["max_difference"] <= document["verification"]["tolerance"]
    config = json.loads((work / "runs/tiny/merged/config.json").read_text())
    assert config["num_hidden_groups"] == (2 if unshare else 1)
    ours = _answer(capsys, "eval", "runs/tiny", "--split", "test")
    merged = _answer(capsys, "eval", "runs/tiny/merged", "--data", "test.jsonl")
    assert merged["metrics"]["loss"] == pytest.approx(ours["metrics"]["loss"], rel=1e-4)


def test_a_config_is_enough_to_inspect(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("stablelm", "mistral", "mixtral", "albert"):
        _save(work, name)
        (work / name / "model.safetensors").unlink()
    found = {name: _answer(capsys, "inspect", work / name, "--dim", "4") for name in ("stablelm", "mistral", "mixtral")}
    ticks = {name: (d["blocks"][0]["plain"], d["blocks"][0]["gated_ticks"]) for name, d in found.items()}
    assert ticks == {
        "stablelm": ("trains, does not merge", "merges"),
        "mistral": ("merges with --as llama", "merges"),
        "mixtral": ("", "merges"),
    }
    assert "numerical proof" in found["stablelm"]["notes"][0]
    assert found["stablelm"]["trained_parameters"]["ticks"] == 2 * 3 * 4 * 32
    assert found["mixtral"]["trained_parameters"]["ticks"] == 2 * 4 * 3 * 4 * 32
    assert found["mixtral"]["memory_bytes"]["trained"] == 16 * sum(found["mixtral"]["trained_parameters"].values())
    assert found["mistral"]["norms"] == {"decoder": {"attention": 2, "ffn": 2, "final": 1}}
    shutil.rmtree(work / "stablelm")
    (work / "stablelm").mkdir()
    assert entry(["inspect", str(work / "stablelm")]) == 3
    assert "no config.json" in capsys.readouterr().err


def test_inspect_refuses_one_tick_beside_experts_where_train_does(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(work, _save(work, "qwen2_moe"), "{dim: 4, experts: block}")
    for verb in ("inspect", "train"):
        capsys.readouterr()
        assert entry([verb, str(recipe)]) == 3
        said = capsys.readouterr().err
        assert "the routing weights of a token sum to 0." in said
        assert "fix: set ticks.experts: each" in said


def test_inspect_says_what_one_tick_beside_the_experts_of_a_base_does(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name in ("mixtral", "qwen2_moe"):
        (_save(work, name) / "model.safetensors").unlink()
        found[name] = _answer(capsys, "inspect", work / name)
    blocks = {name: [(b["gated_ticks"], b["beside_experts"]) for b in d["blocks"]] for name, d in found.items()}
    assert blocks == {"mixtral": [("merges", "merges")], "qwen2_moe": [("merges", "refused"), ("merges", "")]}
    # The plain form is refused on the whole of a model that has gated experts.
    assert [b["plain"] for b in found["qwen2_moe"]["blocks"]] == ["", ""]
    assert found["qwen2_moe"]["obstacles"] == found["mixtral"]["refused"] == []
    assert found["qwen2_moe"]["refused"][0].startswith("ticks.experts: block: the routing weights of a token sum to 0.")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_inspect_breaks_no_name_at_80_columns(
    name: str, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune.console import Console
    from ticktune.inspect import inspect_base

    console = Console()
    console.json = False  # as on a terminal
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    inspect_base(str(_save(work, name)), console)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[1:])) <= 80  # the first is the folder's path
    words = shown.split()
    field = "shared_expert_intermediate_size" if name == "qwen2_moe" else "intermediate_size"
    assert words.count(field) == 1
    assert "each: merges" in shown
    assert ("block: refused" if name == "qwen2_moe" else "block: merges") in shown


def test_inspect_names_a_class_that_is_not_of_transformers(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune.console import Console
    from ticktune.inspect import inspect_base

    path = _save(work, "mistral") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["OurModel"]}))
    console = Console()
    console.json = False
    monkeypatch.setenv("COLUMNS", "140")
    capsys.readouterr()
    inspect_base(str(path.parent), console)
    assert "MistralModel; OurModel, which the config names, is no model of transformers" in capsys.readouterr().out


def test_inspect_shows_tables_to_a_person(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune.console import Console
    from ticktune.inspect import inspect_base

    console = Console()
    console.json = False  # as on a terminal
    monkeypatch.setenv("COLUMNS", "140")
    capsys.readouterr()
    inspect_base(str(_save(work, "mistral")), console, dim=4)
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "32 -> 48",
        "gated SiLU, no biases",
        "intermediate_size",
        "gated: merges",
        "2 attention, 2 ffn, 1 final",
        "trained with dim 4",
    ):
        assert text in shown


@case("X1")
@pytest.mark.parametrize("family", ["stablelm", "mixtral"])
def test_a_base_in_float64_is_merged_without_rounding(
    work: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = _save(work, family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    embeddings = model.get_input_embeddings().weight
    embeddings.data += 1e-12
    model.save_pretrained(base)
    assert entry(["train", str(_recipe(work, base))]) == 0
    document = _answer(capsys, "export", "--merge")
    assert (document["dtype"], document["cast"]) == ("float64", {})
    assert document["verification"]["max_difference"] <= document["verification"]["tolerance"]
    weights = load_file(work / "runs/tiny/merged/model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], embeddings)
    _same_score(capsys)


def test_experts_without_tokens_are_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["train", str(_recipe(work, _save(work, "mixtral")))]) == 0
    found = _answer(capsys, "export", "--merge")["verification"]
    assert (found["ticks"], found["ticks_run"], found["idle_ticks"]) == (8, 8, [])
    (work / "few.txt").write_text("w1")
    capsys.readouterr()
    assert entry(["export", "--merge", "--force", "--data", "few.txt"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["verification"]
    assert 4 <= found["ticks_run"] < found["ticks"] == 8
    assert f"only their weights were compared: {', '.join(found['idle_ticks'][:3])}" in said.err
    assert entry(["export", "--merge", "--data", "few.txt"]) == 0  # found again, and said again
    assert "only their weights were compared" in capsys.readouterr().err
