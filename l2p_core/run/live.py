"""A run's progress for live display: a sentence, and its loss by range of sigma in a few points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..training.step_metrics import HIGH_SIGMA, SIGMA_RANGES
from .metrics import RunMetrics, duration

POINTS = 160
"""Maximum points of a curve; beyond it, neighbouring pairs are merged."""


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
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [first.with_(second) for first, second in pairs]
                self._window *= 2
            self._points.append(_Point(step, 0, [0.0] * len(SIGMA_RANGES), [0] * len(SIGMA_RANGES)))
        self._points[-1] = self._points[-1].with_(_Point(step, 1, sums, counts))

    def as_json(self) -> dict[str, Any]:
        """`steps`, the last of each window, and `ranges`, each with its `name`, whether it is `high` (sigma above 0.6)
        and its `values`, None if a window has no samples of the range or no finite loss."""
        ranges = [
            {"name": name, "high": low >= HIGH_SIGMA, "values": [point.mean(i) for point in self._points]}
            for i, (name, low) in enumerate(SIGMA_RANGES.items())
        ]
        return {"steps": [point.step for point in self._points], "ranges": ranges}


class _Point(NamedTuple):
    """The errors of some steps: the last step, the number of steps, and sums and counts of each range."""

    step: int
    steps: int
    sums: list[float]
    counts: list[int]

    def with_(self, later: _Point) -> _Point:
        sums = [a + b for a, b in zip(self.sums, later.sums, strict=True)]
        counts = [a + b for a, b in zip(self.counts, later.counts, strict=True)]
        return _Point(later.step, self.steps + later.steps, sums, counts)

    def mean(self, i: int) -> float | None:
        value = self.sums[i] / self.counts[i] if self.counts[i] else math.nan
        return float(f"{value:.5g}") if math.isfinite(value) else None


def sentence(metrics: RunMetrics) -> str:
    """A run's status: step, time left, speed, memory."""
    parts = [f"Step {metrics.step} of {metrics.steps}"]
    if metrics.step < metrics.steps:
        parts.append(f"about {duration(metrics.seconds_left)} left")
    parts.append(f"{metrics.images_per_second:.3g} images per second")
    if metrics.memory_bytes:
        parts.append(f"{metrics.memory_bytes / 1e9:.2f} GB at most")
    return ", ".join(parts)


def arguments_of(line: Mapping[str, Any]) -> tuple[int, list[float], list[int]]:
    """The arguments of `LossCurves.add` of a line of metrics.jsonl."""
    return line["step"], line["sigma_loss"], line["sigma_count"]
