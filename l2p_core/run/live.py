"""A run's progress for live display: a sentence, and its loss by range of sigma in a few points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..training.step_metrics import HIGH_SIGMA, SIGMA_EDGES
from .metrics import RunMetrics, duration

POINTS = 160
"""Maximum points of a curve; beyond it, neighbouring pairs are merged."""

_RANGES = [(low, high) for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:], strict=False)]


class LossCurves:
    """Mean losses by range of sigma over windows of steps that grow with the run, so that the cost per step stays
    constant."""

    def __init__(self) -> None:
        self._window = 1
        self._points: list[_Point] = []

    def add(self, step: int, sums: list[float], counts: list[int]) -> None:
        """Add a step's errors; arguments as in `step_metrics.StepMetrics`."""
        if not self._points or self._points[-1].steps == self._window:
            if len(self._points) == POINTS:
                self._points = [first.with_(second) for first, second in _pairs(self._points)]
                self._window *= 2
            self._points.append(_Point(step, 0, [0.0] * len(_RANGES), [0] * len(_RANGES)))
        self._points[-1] = self._points[-1].with_(_Point(step, 1, sums, counts))

    def as_json(self) -> dict[str, Any]:
        """`steps`, the last of each window, and `ranges`, each with its `name`, whether it is `high` (sigma above 0.6)
        and its `values`, None if a window has no samples of the range or no finite loss."""
        ranges = [
            {
                "name": f"{low:.1f} to {high:.1f}",
                "high": low >= HIGH_SIGMA,
                "values": [point.mean(i) for point in self._points],
            }
            for i, (low, high) in enumerate(_RANGES)
        ]
        return {"steps": [point.step for point in self._points], "ranges": ranges}


class _Point:
    """The errors of some steps: the last step, the number of steps, and sums and counts of each range."""

    def __init__(self, step: int, steps: int, sums: list[float], counts: list[int]):
        self.step, self.steps, self.sums, self.counts = step, steps, sums, counts

    def with_(self, later: _Point) -> _Point:
        sums = [a + b for a, b in zip(self.sums, later.sums, strict=True)]
        counts = [a + b for a, b in zip(self.counts, later.counts, strict=True)]
        return _Point(later.step, self.steps + later.steps, sums, counts)

    def mean(self, i: int) -> float | None:
        value = self.sums[i] / self.counts[i] if self.counts[i] else math.nan
        return float(f"{value:.5g}") if math.isfinite(value) else None


def _pairs(points: list[_Point]) -> list[tuple[_Point, _Point]]:
    return list(zip(points[::2], points[1::2], strict=True))


def sentence(metrics: RunMetrics) -> str:
    """A run's status: step, time left, speed, memory."""
    parts = [f"Step {metrics.step} of {metrics.steps}"]
    if metrics.step < metrics.steps:
        parts.append(f"about {duration(metrics.seconds_left)} left")
    parts.append(f"{metrics.images_per_second:.3g} images a second")
    if metrics.memory_bytes:
        parts.append(f"{metrics.memory_bytes / 1e9:.2f} GB at most")
    return ", ".join(parts)


def arguments_of(line: Mapping[str, Any]) -> tuple[int, list[float], list[int]]:
    """The arguments of `LossCurves.add` of a line of metrics.jsonl."""
    return line["step"], line["sigma_loss"], line["sigma_count"]
