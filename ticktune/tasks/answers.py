"""The answer inside a text: found by a pattern of the recipe, and compared as text or as a number."""

import regex

from ticktune.errors import RecipeError

MAX_TEXT = 20_000  # characters that are looked at, from the start
_SECONDS = 1.0  # a pattern that backtracks without end is stopped; re of Python cannot be


def find_answer(pattern: str, text: str) -> str | None:
    """The first group of the pattern's first match, stripped; None where there is no match.

    Args:
        pattern: A regular expression with a group.
        text: Its first 20,000 characters are looked at.

    Raises:
        RecipeError: The search took more than a second.
    """
    text = text[:MAX_TEXT]
    try:
        match = regex.search(pattern, text, timeout=_SECONDS)
    except TimeoutError as error:
        raise RecipeError(
            f"searching {len(text)} characters for {pattern!r} takes more than {_SECONDS:.0f} s",
            where="evaluation.generate.answer",
            fix="avoid repetitions inside of repetitions, such as (a+)+",
        ) from error
    return None if match is None or match[1] is None else str(match[1]).strip()


def is_same(found: str | None, expected: str | None) -> bool:
    """Whether two answers are the same text, or the same number: 1,000 is 1000.0, and 5. is 5."""
    if found is None or expected is None:
        return False
    one, other = _number(found), _number(expected)
    return found == expected if one is None or other is None else one == other


def _number(text: str) -> float | None:
    plain = text.replace(",", "").rstrip(".")
    return float(plain) if regex.fullmatch(r"[-+]?(\d{1,300}(\.\d{1,300})?|\.\d{1,300})", plain, regex.ASCII) else None
