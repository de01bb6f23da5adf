"""Line charts as SVG, for self-contained pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 44, 28
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
_LEAST = 1e-12  # a logarithmic axis has no zero


def chart(title: str, steps: Sequence[int], lines: Mapping[str, Sequence[float]], *, logarithmic: bool = False) -> str:
    """A chart of lines over training steps.

    Args:
        title: above it.
        steps: of the values, increasing.
        lines: {name: a value for each step}; NaN leaves a gap.
        logarithmic: the scale of the values.

    Returns:
        An `<svg>` element, which contains only the title if no value is finite.
    """
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11" role="img">',
        f'<text x="{_LEFT}" y="16" font-size="13" fill="currentColor">{html.escape(title)}</text>',
    ]
    if values:
        axes = _Axes.around(steps, values, logarithmic)
        parts += _grid(axes)
        for i, (name, line) in enumerate(lines.items()):
            colour = _COLOURS[i % len(_COLOURS)]
            parts += _line(axes, steps, line, colour)
            # The name in the page's own colour: not every line colour is readable on light and on dark.
            x = _LEFT + i * (WIDTH - _LEFT - _RIGHT) / max(3, len(lines))
            parts.append(f'<rect x="{x:.0f}" y="26" width="10" height="8" fill="{colour}"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="34" fill="currentColor">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axes:
    """The range of steps, and that of values, which are logarithms on a logarithmic axis."""

    first: int
    last: int
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def around(cls, steps: Sequence[int], values: Sequence[float], logarithmic: bool) -> _Axes:
        """The axes that hold all values, with a margin above and below."""
        low, high = _scaled(min(values), logarithmic), _scaled(max(values), logarithmic)
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        return cls(steps[0], max(steps[-1], steps[0] + 1), low - margin, high + margin, logarithmic)

    def x(self, step: int) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (_scaled(value, self.logarithmic) - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(max(value, _LEAST)) if logarithmic else float(value)


def _line(axes: _Axes, steps: Sequence[int], line: Sequence[float], colour: str) -> list[str]:
    """The segments between gaps, each a polyline; a single point is a dot."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, line, strict=True):
        if math.isfinite(value):
            stretches[-1].append((axes.x(step), axes.y(value)))
        else:
            stretches.append([])
    parts = []
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            parts.append(f'<circle cx="{stretch[0][0]:.1f}" cy="{stretch[0][1]:.1f}" r="2" fill="{colour}"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def _grid(axes: _Axes) -> list[str]:
    """Five lines with their values, and up to five steps below."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for i in range(5):
        share = i / 4
        y, value = bottom - share * (bottom - _TOP), axes.low + share * (axes.high - axes.low)
        label = 10**value if axes.logarithmic else value
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" stroke-opacity="0.2"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{label:.3g}</text>')
    # Each step once, where it is: a short run has fewer than five.
    for step in sorted({round(axes.first + i / 4 * (axes.last - axes.first)) for i in range(5)}):
        parts.append(
            f'<text x="{axes.x(step):.1f}" y="{bottom + 16}" text-anchor="middle" fill="currentColor">{step}</text>'
        )
    return parts
