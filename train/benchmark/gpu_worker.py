"""The worker process that measures: runs the given rows and prints its results, one line of JSON each.

It is separate from the process that writes the report, so that a crash, full memory or a device in an error state ends
a measurement and not the benchmark. It exits when the device no longer answers after a failure; another worker then
continues.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...l2p_core.device import accelerator
from . import gpu_card
from .gpu_measure import Bench, Figures
from .gpu_rows import PARTS, BenchmarkPart, Measurement
from .gpu_scale import FULL, QUICK

GRACE = 30.0
"""Seconds that a measurement may overrun its part's time before the process is ended."""

NOT_FINITE = "its output, or what it is compared with, has values that are not finite"

CUT = "not run: its part was out of time"


def main() -> None:
    """Read the request from standard input, measure, print."""
    request = json.loads(sys.stdin.readline())
    gc.freeze()  # imported objects stay, so collections after each measurement need not scan them
    device = torch.device(request["device"]) if request["device"] else accelerator.default_device()
    scale = QUICK if request["quick"] else FULL
    model = Path(request["model"]) if request["model"] else None
    bench = Bench(device, scale, model, deadline=0.0, outputs={})
    ends = time.monotonic() + request["seconds"]
    _say(about={"device": gpu_card.name(bench, None)["value"], "software": gpu_card.software(bench, None)["value"]})
    wanted = set(request["rows"])
    left = [part for part in PARTS if any(measurement.key in wanted for measurement in part.measurements)]
    while left:
        part = left[0]
        now = time.monotonic()
        bench.deadline = now + (ends - now) * part.share / sum(other.share for other in left)
        if not _measure(bench, part, wanted):
            return
        left.pop(0)


def _measure(bench: Bench, part: BenchmarkPart, wanted: set[str]) -> bool:
    """Run a part's rows; False if the device is in an error state."""
    scene = _Scene(bench)
    for measurement in part.measurements:
        if measurement.key not in wanted:
            continue
        if time.monotonic() > bench.deadline:
            _say(row=measurement.key, figures={"failed": CUT})
            continue
        _say(begins=measurement.key, limit=bench.deadline - time.monotonic() + GRACE)
        started = time.monotonic()
        figures, failed = _figures(bench, measurement, scene)
        _say(row=measurement.key, figures=figures | {"seconds": time.monotonic() - started})
        if failed and not _answers(bench):
            return False
    scene.close()
    return True


class _Scene:
    """The object that neighbouring rows share, created once."""

    def __init__(self, bench: Bench):
        self._bench = bench
        self._of: Any = None
        self._made: Any = None

    def of(self, scene: Any) -> Any:
        """The result of a scene; a scene that could not be created is tried again."""
        if scene != self._of:
            self.close()
            self._made = scene.make(self._bench)
            self._of = scene
        return self._made

    def close(self) -> None:
        """Release it."""
        self._of = self._made = None
        self._bench.clean()


def _figures(bench: Bench, measurement: Measurement, scene: _Scene) -> tuple[Figures, bool]:
    """A measurement's figures, and whether it failed: an error must not keep the next measurement from running."""
    try:
        return _named(measurement.measure(bench, scene.of(measurement.scene))), False
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return {"failed": lines[0][:300], "details": "\n".join(lines)[:4000]}, True


def _named(figures: Figures) -> Figures:
    """The figures; an output that is not finite is a failure, and no number."""
    if math.isfinite(figures.get("error", 0)):
        return figures
    return {name: value for name, value in figures.items() if name != "error"} | {"failed": NOT_FINITE}


def _answers(bench: Bench) -> bool:
    """Whether the device still computes after the failed measurement's tensors have been released."""
    try:
        bench.clean()
        return float(torch.ones(2, device=bench.device).sum()) == 2
    except RuntimeError:
        return False


def _say(**message: Any) -> None:
    print(json.dumps({"l2p": message}), flush=True)


def messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """A worker's messages, from lines that may include output of libraries."""
    for line in lines:
        if line.startswith('{"l2p": '):
            yield json.loads(line)["l2p"]


if __name__ == "__main__":
    main()
