"""Line charts as inline SVG over optimizer steps: axes, ticks, labels; colours come from the page's style."""

import math
from dataclasses import dataclass
from itertools import accumulate

from ticktune.report.markup import Markup, escape, figure_text

Points = list[tuple[float, float]]

_MOST_POINTS = 800  # of a drawn line: more are not seen at this width, and make the page slow
_MOST_DOTS = 60
_WIDTH, _HEIGHT = 460, 252  # the viewBox; about the width of a phone, so that text keeps its size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, _WIDTH - 16, 28, _HEIGHT - 40  # edges of the plot


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        points: (step, value), sorted by step, all finite.
        style: Its class in the page's style sheet: ``raw``, ``main`` or ``other``.
        name: What the key calls it; a chart with one line needs none.
        has_dots: Each point is marked and tells its value under the pointer.
    """

    points: Points
    style: str
    name: str = ""
    has_dots: bool = False


def line_chart(title: str, unit: str, lines: list[Line], end: float, *, chosen: float | None = None) -> Markup:
    """Returns a figure.

    Args:
        title: Its caption.
        unit: What the vertical axis counts.
        lines: What is drawn, the last one on top.
        end: Last step of the horizontal axis, which begins at 0.
        chosen: A step to mark, on the first line.
    """
    lines = [line for line in lines if line.points]
    keys = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines if line.name)
    caption = f"<figcaption><b>{escape(title)}</b>{keys}</figcaption>"
    if not lines:
        return Markup(f'<figure>{caption}<p class="empty">Nothing was logged.</p></figure>\n')
    values = [y for line in lines for _, y in line.points]
    axes = _Axes(end if end > 0 else 1.0, _ticks(min(values), max(values), 4))
    drawn = "".join(_line(line, axes) for line in lines) + _mark(lines[0].points, chosen, axes)
    return Markup(
        f'<figure>{caption}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"\n{axes.draw(unit)}{drawn}</svg></figure>\n"
    )


def smooth(points: Points) -> Points:
    """A centred moving mean over a tenth of the points; at the ends over those that there are."""
    half = max(1, len(points) // 20)
    sums = [0.0, *accumulate(y for _, y in points)]
    smoothed = []
    for number, (x, _) in enumerate(points):
        low, high = max(0, number - half), min(len(points), number + half + 1)
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


@dataclass(frozen=True)
class _Axes:
    end: float
    levels: list[float]

    def x(self, step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * min(max(step / self.end, 0.0), 1.0)

    def y(self, value: float) -> float:
        low, high = self.levels[0], self.levels[-1]
        return _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low)

    def draw(self, unit: str) -> str:
        parts = []
        for level, label in zip(self.levels, _labels(self.levels), strict=True):
            y = self.y(level)
            parts.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for step in _ticks(0.0, self.end, 6):
            if step.is_integer() and step <= self.end:
                x = self.x(step)
                parts.append(f'<path class="axis" d="M{x:.1f} {_BOTTOM}v5"/>')
                parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{_step_label(step)}</text>')
        parts.append(f'<text x="4" y="13">{escape(unit)}</text>')
        parts.append(f'<text x="{_RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">optimizer step</text>')
        return "\n".join(parts) + "\n"


def _line(line: Line, axes: _Axes) -> str:
    points = _thin(line.points)
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    dots = ""
    if len(points) == 1 or (line.has_dots and len(points) <= _MOST_DOTS):
        dots = "\n".join(
            f'<circle class="{line.style}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3">'
            f"<title>step {x:,.0f}: {figure_text(y)}</title></circle>"
            for x, y in points
        )
    return f'<polyline class="{line.style}" points="{path}"/>\n{dots}\n'


def _mark(points: Points, chosen: float | None, axes: _Axes) -> str:
    value = next((y for x, y in reversed(points) if x == chosen), None)
    if chosen is None or value is None:
        return ""
    x, y = axes.x(chosen), axes.y(value)
    anchor, shift = ("end", -6) if x > (_LEFT + _RIGHT) / 2 else ("start", 6)
    height = _BOTTOM - 8 if y < (_TOP + _BOTTOM) / 2 else _TOP + 12
    return (
        f'<path class="mark" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>'
        f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        f'<text class="note" x="{x + shift:.1f}" y="{height}" text-anchor="{anchor}">'
        f"chosen: step {chosen:,.0f}</text>\n"
    )


def _thin(points: Points) -> Points:
    """At most _MOST_POINTS: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretches = _MOST_POINTS // 2
    kept: Points = []
    for number in range(stretches):
        low, high = number * len(points) // stretches, (number + 1) * len(points) // stretches
        part = points[low:high]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers at even distances that enclose ``low`` and ``high``, about ``count`` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-90):
        room = abs(high) / 10 or 1.0
        low, high = low - room, high + room
    wanted = (high - low) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= wanted * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _labels(levels: list[float]) -> list[str]:
    largest = max(map(abs, levels))
    if not 1e-2 <= largest < 1e5:
        return [_power_label(level) for level in levels]
    texts = [f"{level:.6g}" for level in levels]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return [f"{level:.{decimals}f}".replace("-", "\u2212") for level in levels]


def _power_label(level: float) -> str:
    if level == 0:
        return "0"
    digits, _, power = f"{level:.1e}".partition("e")
    return f"{float(digits):g}e{int(power)}".replace("-", "\u2212")


def _step_label(step: float) -> str:
    return f"{step:,.0f}" if step < 1e6 else _power_label(step)
