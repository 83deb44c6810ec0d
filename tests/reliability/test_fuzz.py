"""A sample of the fuzz (see fuzz.py), and recipes and rows that hypothesis makes up."""

import hashlib
import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reliability.fuzz import ALLOWED, KINDS, Answer, Input, Stage, broken_weights, fuzz, make
from ticktune.recipe.load import _all_keys

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def ok(answer: Answer) -> None:
    assert not answer.is_bad, answer


def test_a_sample_of_broken_inputs_is_answered_by_documented_exit_codes(stage: Stage) -> None:
    found = fuzz(stage, seed=2, numbers=range(500), launched=6)
    assert found["bad"] == []
    assert found["inputs"] == 500
    assert len(found["exit_codes_by_kind"]) == len(KINDS)
    assert found["longest_cpu_seconds"] < 5
    answered = {int(code) for codes in found["exit_codes_by_kind"].values() for code in codes}
    assert {0, 2, 3, 4, 6} <= answered <= ALLOWED


def test_an_input_is_made_from_its_number_alone(stage: Stage) -> None:
    assert [make(1, number, stage) for number in range(50)] == [make(1, number, stage) for number in range(50)]
    assert make(1, 7, stage) != make(2, 7, stage)


def test_a_stage_is_whole_after_an_input(stage: Stage) -> None:
    before = {path: path.read_bytes() for path in stage.folder.rglob("*") if path.is_file()}
    stage.answer(
        Input("rows", ["inspect", "small.yaml"], {"few.jsonl": b"{", "base/model.safetensors": None, "new": b""})
    )
    assert {path: path.read_bytes() for path in stage.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "answer", [Answer(1, "error", 0), Answer(-1, "it hangs", 30), Answer(2, "Traceback", 0), Answer(4, "", 0)]
)
def test_a_bad_answer_is_seen(answer: Answer) -> None:
    assert answer.is_bad


def test_a_hang_and_a_bug_are_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object, **__: object) -> None:
        while True:
            pass

    monkeypatch.setattr("tests.reliability.fuzz.SECONDS", 0.2)
    monkeypatch.setattr("ticktune.run.evaluate", endless)
    assert stage.answer(Input("words", ["eval"])).code == -1
    monkeypatch.setattr("ticktune.run.evaluate", lambda *_, **__: 1 / 0)
    assert stage.answer(Input("words", ["eval"])).code == 1


LONG = "y" * 300
FOUND: list[tuple[int, list[str], dict[str, bytes | None]]] = [
    (2, ["eval", LONG], {}),
    (2, ["eval", f"{LONG}.yaml"], {}),
    (0, ["predict", LONG], {}),
    (0, ["predict", "runs/tiny", "w" * 5000], {}),
    (2, ["predict", "runs/tiny", f"{LONG}.jsonl"], {}),
    (4, ["predict", "runs/tiny", "\udcff"], {}),
    (4, ["train", "small.yaml", f"data.train={LONG}.jsonl"], {}),
    (3, ["inspect", "small.yaml", f"base.model={LONG}"], {}),
    (2, ["inspect", "small.yaml", f"data.train=${{{LONG}}}"], {}),
    (2, ["train", "small.yaml", "output=" + "/".join(["y" * 200] * 30)], {}),
    (2, ["export", "runs/tiny", "-o", LONG], {}),
    (
        6,
        ["eval"],
        {"runs/tiny/adapter/manifest.json": json.dumps({"files": {LONG: {"bytes": 1, "sha256": ""}}}).encode()},
    ),
    (6, ["train", "recipe.yaml"], {"runs/tiny/run.json": b'{"status": "complete", "metrics": "x"}'}),
    (6, ["train", "recipe.yaml"], {"runs/tiny/run.json": b'{"status": 5}'}),
    (3, ["inspect", "small.yaml"], {"base/model.safetensors": b"\x02" + b"\0" * 7 + b"[]"}),
    (3, ["inspect", "small.yaml"], {"base/model.safetensors.index.json": b'{"weight_map": {"a": 5}}'}),
    (
        3,
        ["inspect", "small.yaml"],
        {"base/model.safetensors.index.json": json.dumps({"weight_map": {"a": LONG}}).encode()},
    ),
    (3, ["inspect", "small.yaml"], {"base/tokenizer.json": b"{"}),
    (2, ["train", "odd.yaml"], {"odd.yaml": b'task: "\\ud800"\n'}),
    (2, ["train", "odd.yaml"], {"odd.yaml": b'"\\ud800": 1\n'}),
]
"""Exit code, command line and files of inputs that once ended as bugs, or would have."""


@pytest.mark.parametrize(("code", "words", "files"), FOUND, ids=lambda value: str(value)[:40])
def test_what_was_found_stays_mended(stage: Stage, code: int, words: list[str], files: dict[str, bytes | None]) -> None:
    answer = stage.answer(Input("found", words, files))
    assert answer.code == code, answer
    ok(answer)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("plan", {"dim": 2**31}),
        ("plan", {"dim": 10**30}),
        ("plan", {"dim": -1}),
        ("plan", {"layers": {"encoder": [10**30]}}),
        ("options", {"max_length": 10**30}),
        ("options", {"max_length": -1}),
        ("options", {"label_smoothing": 1e30}),
        ("options", {"threshold": 2}),
        ("state", {"labels": [1, None]}),
        ("state", {"problem": "x"}),
    ],
    ids=str,
)
def test_numbers_that_an_adapter_cannot_mean_are_refused(stage: Stage, section: str, changes: dict[str, Any]) -> None:
    folder = "runs/tiny/adapter"
    facts = json.loads(stage.read(f"{folder}/adapter.json"))
    (facts["plan"] if section == "plan" else facts["task"][section]).update(changes)
    data, manifest = json.dumps(facts).encode(), json.loads(stage.read(f"{folder}/manifest.json"))
    manifest["files"]["adapter.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files: dict[str, bytes | None] = {
        f"{folder}/adapter.json": data,
        f"{folder}/manifest.json": json.dumps(manifest).encode(),
    }
    answer = stage.answer(Input("adapter", ["eval", folder, "--data", "few.jsonl"], files))
    ok(answer)
    assert answer.code == 6, answer


def test_an_adapter_without_a_task_is_answered(stage: Stage) -> None:
    folder = "runs/tiny/adapter"
    facts, manifest = (json.loads(stage.read(f"{folder}/{name}.json")) for name in ("adapter", "manifest"))
    data = json.dumps(facts | {"task": None}).encode()
    manifest["files"]["adapter.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files: dict[str, bytes | None] = {
        f"{folder}/adapter.json": data,
        f"{folder}/manifest.json": json.dumps(manifest).encode(),
    }
    for words in (["eval", folder, "--data", "few.jsonl"], ["eval", folder], ["predict", folder, "w1"]):
        answer = stage.answer(Input("adapter", words, files))
        assert answer.code == 2, answer
    assert stage.answer(Input("adapter", ["export", folder, "--data", "few.jsonl", "--merge"], files)).code == 2


@SETTINGS
@given(values=st.dictionaries(st.sampled_from(_all_keys()), VALUES, min_size=1, max_size=4))
def test_any_value_of_any_key_is_answered(stage: Stage, values: dict[str, Any]) -> None:
    recipe = yaml.safe_load(stage.read("small.yaml"))
    for key, value in values.items():
        parent, *path = recipe, *key.split(".")
        for part in path[:-1]:
            parent[part] = parent[part] if isinstance(parent.get(part), dict) else {}
            parent = parent[part]
        parent[path[-1]] = value
    if isinstance(recipe["base"], dict) and recipe["base"].get("model") == "base":
        recipe["base"]["model"] = "./gone"  # what is still a recipe must not train
    text = yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")
    ok(stage.answer(Input("recipe", ["train", "fuzzed.yaml"], {"fuzzed.yaml": text})))


@SETTINGS
@given(rows=st.lists(st.fixed_dictionaries({"text": VALUES, "label": VALUES}), min_size=1, max_size=4))
def test_any_json_in_rows_is_answered(stage: Stage, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ok(stage.answer(Input("rows", ["inspect", "small.yaml"], {"few.jsonl": data})))
    ok(stage.answer(Input("rows", ["predict", "runs/tiny/adapter", "few.jsonl"], {"few.jsonl": data})))


@SETTINGS
@given(rng=st.randoms(use_true_random=False))
def test_any_broken_weights_are_answered(stage: Stage, rng: Any) -> None:
    data = broken_weights(rng, stage.read("base/model.safetensors"))
    ok(stage.answer(Input("base", ["inspect", "base"], {"base/model.safetensors": data})))


@SETTINGS
@given(text=st.binary(max_size=200))
def test_any_bytes_are_answered(stage: Stage, text: bytes) -> None:
    for name, words in (
        ("fuzzed.yaml", ["train", "fuzzed.yaml"]),
        ("few.jsonl", ["inspect", "small.yaml"]),
        ("rows.csv", ["inspect", "small.yaml", "data.train=rows.csv"]),
        ("runs/tiny/adapter/adapter.json", ["export", "runs/tiny"]),
        ("runs/tiny/run.json", ["eval"]),
        ("base/config.json", ["inspect", "base"]),
        ("base/tokenizer.json", ["inspect", "small.yaml"]),
        ("base/tokenizer_config.json", ["inspect", "small.yaml"]),
    ):
        ok(stage.answer(Input("bytes", words, {name: text})))
