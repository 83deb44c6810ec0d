"""What is said of configs that transformers does not take: the entry, what was found and expected, what to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from ticktune.cli import entry

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], **SIZES}
MEND = "correct it in config.json"
# name -> the file's content, what is said, and what to do
CASES: dict[str, tuple[Any, str, str]] = {
    "empty": ("", "config.json: the config is damaged: it is empty", "get the file anew"),
    "no JSON": ('{"model_type": "bert",\n"x": }', "config.json:2: the config is damaged: it is no JSON", "anew"),
    "deep": ("[" * 100_000, "nested too deep", "get the file anew"),
    "no UTF-8": (b"\xff\xfe{}", "it is no text in UTF-8", "get the file anew"),
    "a list": ("[1, 2]", "not a JSON object: found a list, expected names and values in braces", "anew"),
    "null": ("null", "not a JSON object: found null", "get the file anew"),
    "nothing in it": ({}, "its config has no model_type", 'add it to config.json, for example "model_type": "bert"'),
    "family": ({"model_type": "nonsense"}, 'says model_type "nonsense", which is no family', "install a transformers"),
    "misspelt family": ({"model_type": "brt"}, 'model_type "brt"', "correct it in config.json (did you mean bert?)"),
    "family of a part": (
        {"model_type": "llava", "vision_config": {"model_type": "nonsense"}},
        'says vision_config.model_type "nonsense", which is no family',
        MEND,
    ),
    "code of its own": ({"auto_map": {"AutoModel": "m.M"}}, "code of its own (auto_map in its config)", "transformers"),
    "type": ({**BERT, "hidden_size": "x"}, 'config.json: its config says hidden_size "x", expected an integer', MEND),
    "null where a number is": ({**BERT, "hidden_size": None}, "hidden_size null, expected an integer", MEND),
    "type in a part": (
        {"model_type": "clip", "text_config": {"hidden_size": "x"}},
        'its config says text_config.hidden_size "x", expected an integer',
        MEND,
    ),
    "type of a part": (
        {"model_type": "clip", "text_config": "x"},
        'its config says text_config "x", expected an object or null',
        MEND,
    ),
    "dtype": ({**BERT, "dtype": "foo"}, 'says dtype "foo", expected float32, bfloat16 or float16', MEND),
    "negative size": ({**BERT, "hidden_size": -5}, "its config says hidden_size -5, expected 1 or more", MEND),
    "no heads": ({**BERT, "num_attention_heads": 0}, "says num_attention_heads 0, expected 1 or more", MEND),
    "sizes that do not fit": (
        {**BERT, "num_attention_heads": 7},
        "transformers builds no BertModel of its config (ValueError: The hidden size (32) is not a multiple",
        MEND,
    ),
    "activation": ({**BERT, "hidden_act": "gleu"}, 'hidden_act "gleu", which is no activation', MEND),
    "no layers": (
        {**BERT, "num_hidden_layers": -1},
        "this BertModel has no layers, as num_hidden_layers is -1 in its config",
        "correct num_hidden_layers in its config.json",
    ),
    "classes as text": (
        {**BERT, "architectures": "BertModel"},
        'architectures is "BertModel", expected a list of names of classes, such as ["BertModel"]',
        MEND,
    ),
    "classes as numbers": ({**BERT, "architectures": [3]}, "architectures is [3], expected a list of names", MEND),
    "class of another family": (
        {**BERT, "architectures": ["LlamaForCausalLM"]},
        'the class LlamaForCausalLM (architectures), which is a llama, and says model_type "bert"',
        "correct that one of the two",
    ),
    "composite without a class": (
        {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert"}},
        "its config names no class (architectures), and transformers has no AutoModel of the family encoder-decoder",
        'add the class to config.json: "architectures": ["EncoderDecoderModel"]',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_config_is_said_to_be_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said, fix = CASES[name]
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert entry(["inspect", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    first, _, second = error.partition("\n  fix: ")
    assert said in first
    assert fix in second
    assert str(tmp_path) in first or name == "no layers"
    for raw in ("Traceback", "object has no attribute", "Unrecognized", "<class", "Validation error"):
        assert raw not in error
    assert len(error) < 600


@pytest.mark.parametrize("model_type", ["bert", "clip", "llava", "mllama", "encoder-decoder"])
def test_a_config_of_the_family_alone_is_inspected(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"model_type": model_type}
    if model_type == "encoder-decoder":
        parts = {"encoder": {"model_type": "bert", **SIZES}, "decoder": {"model_type": "bert", **SIZES}}
        entries = {**entries, **parts, "architectures": ["EncoderDecoderModel"]}  # type: ignore[dict-item]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert entry(["inspect", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["trained_parameters"]["ticks"] > 0
