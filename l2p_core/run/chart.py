"""Line charts as SVG, for self-contained pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

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
    scale = (lambda value: math.log10(max(value, _LEAST))) if logarithmic else float
    values = [scale(value) for line in lines.values() for value in line if math.isfinite(value)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11" role="img">',
        f'<text x="{_LEFT}" y="16" font-size="13" fill="currentColor">{html.escape(title)}</text>',
    ]
    if values:
        low, high = min(values), max(values)
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
        first, last = steps[0], max(steps[-1], steps[0] + 1)

        def place(step: int, value: float) -> tuple[float, float]:
            x = _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
            return x, HEIGHT - _BOTTOM - (scale(value) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

        parts += _axes(first, last, low, high, logarithmic)
        for i, (name, line) in enumerate(lines.items()):
            parts += _line([place(s, v) if math.isfinite(v) else None for s, v in zip(steps, line, strict=True)], i)
            x = _LEFT + i * (WIDTH - _LEFT - _RIGHT) / max(3, len(lines))
            colour = _COLOURS[i % len(_COLOURS)]
            # The name in the page's own colour: not every line colour is readable on light and on dark.
            parts.append(f'<rect x="{x:.0f}" y="26" width="10" height="8" fill="{colour}"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="34" fill="currentColor">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _line(points: Sequence[tuple[float, float] | None], number: int) -> list[str]:
    """The segments between gaps, each a polyline; a single point is a dot."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    colour, parts = _COLOURS[number % len(_COLOURS)], []
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            parts.append(f'<circle cx="{stretch[0][0]:.1f}" cy="{stretch[0][1]:.1f}" r="2" fill="{colour}"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def _axes(first: int, last: int, low: float, high: float, logarithmic: bool) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for i in range(5):
        share = i / 4
        y, value = bottom - share * (bottom - _TOP), low + share * (high - low)
        label = 10**value if logarithmic else value
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" stroke-opacity="0.2"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{label:.3g}</text>')
    # Each step once, where it is: a short run has fewer than five.
    for step in sorted({round(first + i / 4 * (last - first)) for i in range(5)}):
        x = _LEFT + (step - first) / (last - first) * (right - _LEFT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="currentColor">{step}</text>')
    return parts
