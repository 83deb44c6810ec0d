"""HTML from values of outside: text is escaped where it enters, numbers that are none become a dash."""

import html
import math

from ticktune.console import clean, clean_lines, figure

DASH = "\u2013"
_MINUS = "\u2212"


class Markup(str):
    """HTML that the report has built; any other text is escaped by :func:`escape`."""


def escape(value: object) -> Markup:
    """Returns a value as HTML, for an element or a quoted attribute; nothing at all is a dash.

    Args:
        value: Anything; :class:`Markup` is left as it is, control characters are made visible.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_storable(clean(value)))) if value not in (None, "") else Markup(DASH)


def escape_lines(text: str) -> Markup:
    """Like :func:`escape` for a text of several lines."""
    return Markup(html.escape(_storable(clean_lines(text.replace("\r\n", "\n").expandtabs(4)))))


def finite(value: object) -> float | None:
    """The number that can be printed and drawn, else None.

    Args:
        value: Anything; a truth value, NaN, infinity, or a number beyond 1e100 is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e100 < value < 1e100 else None


def figure_text(value: object) -> str:
    """A measured number with about five significant digits, or a dash."""
    number = finite(value)
    if number is None:
        return DASH
    if 10 <= abs(number) < 1e9:
        text = f"{number:,.{max(0, 4 - math.floor(math.log10(abs(number))))}f}"
    else:
        text = figure(number)
    return text.replace("-", _MINUS, 1 if number < 0 else 0)


def count_text(value: object) -> str:
    """A count with thousands separated, or a dash."""
    number = finite(value)
    return DASH if number is None else f"{number:,.0f}"


def _storable(text: str) -> str:
    # A lone surrogate is legal in JSON, but no file in UTF-8 can hold it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
