"""A run's progress for live display: a sentence, and its loss by range of sigma in a few points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..training.step_metrics import HIGH_SIGMA, SIGMA_RANGES
from .metrics import RunMetrics, duration

POINTS = 160
"""Maximum points of a curve; beyond it, neighbouring pairs are merged."""


class LossCurves:
    """Mean losses by range of sigma over windows of steps that grow with the run, so that the cost per step stays
    constant."""

    def __init__(self) -> None:
        self._window, self._added = 1, 0
        self._steps: list[int] = []  # the last of each window
        self._totals: list[np.ndarray] = []  # of each window, the sums and counts of each range

    def add(self, step: int, sums: list[float], counts: list[int]) -> None:
        """Add a step's errors; arguments as in `step_metrics.StepMetrics`."""
        if self._added % self._window == 0:
            if len(self._steps) == POINTS:
                self._steps = self._steps[1::2]
                self._totals = [a + b for a, b in zip(self._totals[::2], self._totals[1::2], strict=True)]
                self._window *= 2
            self._steps.append(step)
            self._totals.append(np.zeros((2, len(SIGMA_RANGES))))
        self._added += 1
        self._steps[-1] = step
        self._totals[-1] += [sums, counts]

    def as_json(self) -> dict[str, Any]:
        """`steps`, the last of each window, and `ranges`, each with its `name`, whether it is `high` (sigma above 0.6)
        and its `values`, None if a window has no samples of the range or no finite loss."""
        ranges = [
            {"name": name, "high": low >= HIGH_SIGMA, "values": [_mean(*total[:, i]) for total in self._totals]}
            for i, (name, low) in enumerate(SIGMA_RANGES.items())
        ]
        return {"steps": list(self._steps), "ranges": ranges}


def _mean(total: float, count: float) -> float | None:
    value = total / count if count else math.nan
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
