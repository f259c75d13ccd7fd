"""Line charts: inline SVG for a page without scripts, with the points beside it, from which `report.js` draws anew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter

Points = Sequence[tuple[float, float]]

_SENT = 1000  # bins of a long run that the page gets; of each the first, the least and the greatest
_BINS = 480  # more steps than this are drawn as a band from the least to the greatest of each bin
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 12, 44


@dataclass(frozen=True)
class Line:
    """One line of a chart. ``style`` is a CSS class: raw, smooth, held-out, base, plain."""

    name: str
    points: Points
    style: str
    marks: bool = False  # a dot, with its value as a tooltip, at each point
    trimmed: bool = False  # the rarest values do not set the scale


def smoothed(points: Points, share: float = 0.04) -> list[tuple[float, float]]:
    """Exponential average over about this share of the run, from where it has seen a quarter of that."""
    length = max(1.0, len(points) * share, min(8, len(points) / 4))
    keep = 1 - 1 / length
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result[int(length / 4) :]


def plot(name: str, lines: Sequence[Line], *, small: bool = False, tools: bool = False) -> str:
    """A figure of a chart: its title, its lines' names, and what the script needs. A step is the unit of its axis.

    Args:
        name: the title; of several figures on a page, each has another.
        tools: with a log scale, smoothing (where a line is smoothed), and a way back from a zoom.
    """
    lines = [line for line in lines if line.points]
    size = {"width": 400, "height": 210, "steps_shown": 3} if small else {}
    legend = "".join(f'<span class="{line.style}"><i></i>{escape(line.name)}</span>' for line in lines)
    slider = '<label>smoothing <input type="range" class="smoothing" min="-4" max="4" step="0.5" value="0"></label>'
    bar = (
        '<div class="tools" hidden><label><input type="checkbox" class="log"> log scale</label>'
        + (slider if any(line.style == "smooth" for line in lines) else "")
        + '<button type="button" class="back" hidden>whole run</button></div>'
    )
    sent = [
        {"name": line.name, "style": line.style, "marks": line.marks, "trimmed": line.trimmed, "points": _sent(line)}
        for line in lines
    ]
    data = json.dumps(sent, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    key = escape(name.lower().replace(" ", "-"))
    return (
        f'<figure class="plot" id="plot-{key}"><figcaption>{escape(name)}</figcaption>'
        f"{bar if tools else ''}{'' if small else f'<div class=legend>{legend}</div>'}{chart(lines, **size)}"
        f'<script type="application/json">{data}</script></figure>'
    )


def _sent(line: Line) -> list[tuple[float, float]]:
    """The points of a line with five digits; of a long one the extremes of each bin."""
    points = line.points
    if len(points) > 3 * _SENT:
        size = -(-len(points) // _SENT)
        bins = [points[start : start + size] for start in range(0, len(points), size)]
        value = itemgetter(1)
        chosen = [sorted({part[0], min(part, key=value), max(part, key=value)}) for part in bins]
        points = [point for part in chosen for point in part]
    return [(x, float(f"{y:.5g}")) for x, y in points]


def chart(lines: Sequence[Line], *, width: int = 940, height: int = 300, steps_shown: int = 8) -> str:
    """An SVG of all lines on one pair of axes; empty without points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [x for line in lines for x, _ in line.points]
    left, right = min(steps), max(steps)
    low, high = _range(lines)
    ticks = _ticks(low, high, 5)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x_of(x: float) -> float:
        return _LEFT + (x - left) / (right - left or 1) * (width - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return height - _BOTTOM - (min(max(y, low), high) - low) / (high - low or 1) * (height - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" class="chart">']
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in _ticks(left, right, steps_shown):
        if left <= tick <= right and tick == int(tick):
            parts.append(f'<text x="{x_of(tick):.1f}" y="{height - 25}" text-anchor="middle">{int(tick):,}</text>')
    parts.append(f'<text x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{height - 6}" text-anchor="middle">step</text>')
    for line in lines:
        if len(line.points) > _BINS and line.style == "raw":
            top, bottom = _band(line.points)
            outline = [(x_of(x), y_of(y)) for x, y in top] + [(x_of(x), y_of(y)) for x, y in reversed(bottom)]
            parts.append(f'<polygon class="band" points="{_joined(outline)}"/>')
        else:
            at = [(x_of(x), y_of(y)) for x, y in _thinned(line.points)]
            parts.append(f'<polyline class="{line.style}" points="{_joined(at)}"/>')
        for x, y in line.points if line.marks else []:
            tip = escape(f"{line.name}, step {int(x):,}: {number(y)}")
            at_x, at_y = f"{x_of(x):.1f}", f"{y_of(y):.1f}"
            parts.append(f'<circle class="{line.style}" cx="{at_x}" cy="{at_y}" r="3.5"><title>{tip}</title></circle>')
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """Three digits that count: 0.123, 12.3, 1,230, 1e-05, 4.75e+30."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    """What is worth seeing."""
    values: list[float] = []
    for line in lines:
        of_line = sorted(y for _, y in line.points)
        if line.trimmed and len(of_line) >= 50:
            of_line = of_line[len(of_line) // 100 : len(of_line) - len(of_line) // 50]
        values += [of_line[0], of_line[-1], *([0.0] if line.style == "plain" else [])]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    room = (high - low) * 0.04
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from within the range."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] or [low]


def _band(points: Points) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    size = -(-len(points) // _BINS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    middle = [part[len(part) // 2][0] for part in bins]
    top = [(x, max(y for _, y in part)) for x, part in zip(middle, bins, strict=True)]
    bottom = [(x, min(y for _, y in part)) for x, part in zip(middle, bins, strict=True)]
    return top, bottom


def _thinned(points: Points) -> Points:
    """Every so many points, and the last."""
    stride = -(-len(points) // (2 * _BINS))
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _joined(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
