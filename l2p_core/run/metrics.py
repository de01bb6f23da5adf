"""The metrics that a run reports after each step, and their record in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..device.accelerator import has_own_memory, module, name_of
from ..device.process_memory import peak_memory
from ..training.step_metrics import SIGMA_RANGES, StepMetrics

_MEMORY = 0.95  # of the mean time of a step: about the last 20


@dataclass
class RunMetrics(StepMetrics):
    """The metrics of one step of a run: `StepMetrics`, and for the whole run:

    Attributes:
        steps: of the whole run.
        images_per_second: over about the last 20 steps, saves and montages included.
        seconds_left: to the last step, at that speed.
        memory_bytes: this process's peak memory so far: GPU memory if it trains on a GPU, otherwise RAM.
        device: its name.
        pace: a key of everything that the time of a step depends on, see `pace`; "" if unknown.
    """

    steps: int = 0
    images_per_second: float = 0.0
    seconds_left: float = 0.0
    memory_bytes: int = 0
    device: str = ""
    pace: str = ""


class Clock:
    """Adds to a step's metrics the values that depend on earlier steps.

    Args:
        steps: of the whole run.
        device: that the run trains on.
        pace: see `RunMetrics`.
    """

    def __init__(self, steps: int, device: torch.device, pace: str = ""):
        self._steps, self._device, self._pace = steps, device, pace
        self._name = name_of(device)
        self._last = time.perf_counter()
        self._seconds: float | None = None

    def add(self, metrics: StepMetrics) -> RunMetrics:
        """The metrics of the step that just ended."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._seconds = took if self._seconds is None else took + _MEMORY * (self._seconds - took)
        device = self._device
        held = module(device).max_memory_allocated(device) if has_own_memory(device.type) else peak_memory()
        return RunMetrics(
            **vars(metrics),
            steps=self._steps,
            images_per_second=metrics.images / max(self._seconds, 1e-9),
            seconds_left=(self._steps - metrics.step) * self._seconds,
            memory_bytes=held,
            device=self._name,
            pace=self._pace,
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file; a truncated last line is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def loss_by_sigma(steps: Sequence[dict[str, Any]], window: int) -> tuple[list[int], dict[str, list[float]]]:
    """Mean losses per range of sigma over windows of steps: the last step of each window, and a curve per range.

    A range without samples in a window is NaN there.
    """
    ends = list(range(window, len(steps) + 1, window))
    windows = [steps[end - window : end] for end in ends]

    def mean(rows: Sequence[dict[str, Any]], i: int) -> float:
        count = sum(row["sigma_count"][i] for row in rows)
        return sum(row["sigma_loss"][i] for row in rows) / count if count else math.nan

    curves = {name: [mean(rows, i) for rows in windows] for i, name in enumerate(SIGMA_RANGES)}
    return [steps[end - 1]["step"] for end in ends], curves


def duration(seconds: float) -> str:
    """A duration as text: 45 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
