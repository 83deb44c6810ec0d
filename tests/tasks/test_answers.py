"""Answers inside texts: found, compared, and never searched without end."""

import pytest

from ticktune.errors import RecipeError
from ticktune.tasks.answers import MAX_TEXT, find_answer, is_same

GSM = r"####\s*(-?[0-9.,]+)"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 1 + 1 = 2\n#### 2", "2"),
        ("#### -1,250.5 and then #### 3", "-1,250.5"),
        ("it is 2", None),
        ("", None),
        ("x" * MAX_TEXT + "#### 2", None),
    ],
)
def test_the_answer_is_the_first_group_of_the_first_match(text: str, answer: str | None) -> None:
    assert find_answer(GSM, text) == answer


def test_a_group_that_takes_no_part_in_the_match_is_no_answer() -> None:
    assert find_answer("yes|(no)", "yes") is None
    assert find_answer("is( .*)", "it is  so ") == "so"


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("4", "4", True),
        ("1,000", "1000.0", True),
        ("5.", "5", True),
        ("four", "four", True),
        ("four", "Four", False),
        ("4", "5", False),
        ("4", "four", False),
        (None, "4", False),
        ("4", None, False),
        (".", ",", False),
        ("9" * 400, "9" * 400, True),
        ("nan", "nan", True),
    ],
)
def test_answers_are_the_same_as_text_or_as_a_number(found: str | None, expected: str | None, same: bool) -> None:
    assert is_same(found, expected) is same


def test_a_pattern_that_backtracks_without_end_is_stopped() -> None:
    with pytest.raises(RecipeError, match="takes more than 1 s") as caught:
        find_answer(r"(a|aa)+$", "a" * 200 + "b")
    assert caught.value.problems[0].where == "evaluation.generate.answer"
