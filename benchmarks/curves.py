"""Loss curves of several contenders in one drawing: an SVG of its own, drawn as the run report draws its charts."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ticktune.report.chart import Line, line_chart

WINDOW = 3
"""Steps of the moving median."""
_COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce", "#4b5563")
_WIDTH, _HEIGHT, _LEFT, _LINE = 460, 252, 52, 16  # of the chart, and of the key below it
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.axis{stroke:#ddd;fill:none}polyline{fill:none;stroke-width:1.6}"
    + "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(_COLOURS))
)


def moving_median(values: Sequence[float]) -> list[float]:
    """The median of a window around each value; at the ends of what is there of it."""
    half = WINDOW // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def drawing(title: str, losses: Mapping[str, Sequence[float]]) -> str:
    """An SVG file of losses over steps.

    Args:
        title: For readers who cannot see it.
        losses: Of each step, by the contender's name; at most five.
    """
    lines = [
        Line([(step, value) for step, value in enumerate(moving_median(one), start=1)], f"c{number}")
        for number, one in enumerate(losses.values())
    ]
    chart: Any = line_chart(title, "loss", lines, max(map(len, losses.values())))
    _, _, rest = chart.partition('<svg viewBox="')
    body = rest.partition("</svg>")[0].partition(">")[2]
    height = _HEIGHT + _LINE * len(losses) + 8
    key = "".join(
        f'<path class="c{i}" stroke-width="2" d="M{_LEFT} {_HEIGHT + _LINE * i + 8}h20"/>'
        f'<text x="{_LEFT + 28}" y="{_HEIGHT + _LINE * i + 12}">{name}</text>\n'
        for i, name in enumerate(losses)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">\n'
        f'<title>{title}</title>\n<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{body}{key}</svg>\n"
    )
