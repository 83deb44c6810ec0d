"""What is odd about rows is counted, once for each row."""

import re
from typing import Any

from ticktune.data.audit import audit
from ticktune.data.read import Rows, build_rows
from ticktune.registry import TASKS


def rows_of(task: str, *records: dict[str, Any]) -> Rows:
    return build_rows(enumerate(records, start=1), TASKS[task], {}, "a.jsonl")


def test_repeated_contradicted_and_shared_rows() -> None:
    train = [("a", "x"), ("b", "x"), ("a", "x"), ("b", "y"), ("b", "y"), ("c", "x")]
    test = [("c", "x"), ("a", "y"), ("a", "x"), ("a", "x")]
    splits = {
        name: rows_of("text-classification", *({"text": text, "label": label} for text, label in pairs))
        for name, pairs in (("test", test), ("train", train))
    }
    assert audit(splits, TASKS["text-classification"]) == {
        "train": {"repeated": 2, "contradicted": 3, "control": 0},
        "test": {"repeated": 1, "contradicted": 3, "control": 0, "training": 3},
    }


def test_two_answers_in_text_do_not_contradict_each_other() -> None:
    rows = rows_of("causal-lm", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"})
    assert audit({"train": rows}, TASKS["causal-lm"])["train"] == {"repeated": 0, "contradicted": 0, "control": 0}


def test_control_tokens_are_found_in_every_text() -> None:
    control = re.compile(re.escape("</s>"))
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in ("a", "a</s>")]
    chat = rows_of("causal-lm", *({"messages": messages} for messages in turns))
    prompts = rows_of("causal-lm", {"prompt": "a </s>", "response": "</s>"}, {"prompt": "a", "response": "b</s>"})
    for rows, expected in ((chat, 1), (prompts, 2)):
        assert audit({"train": rows}, TASKS["causal-lm"], control)["train"]["control"] == expected
