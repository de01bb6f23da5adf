"""Measurements on a device: time and memory of a call, and its kernels, waits and copies."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...l2p_core.device import accelerator
from .gpu_scale import Scale

Figures = dict[str, Any]
"""The results of a row, by the keys of `gpu_report.COLUMNS`."""

Interval = tuple[float, float]

_STREAM_WAITS = ("cudaStreamSynchronize", "hipStreamSynchronize")
_WAITS = (*_STREAM_WAITS, "cudaEventSynchronize", "hipEventSynchronize")
_COPIES = ("Memcpy HtoD", "Memcpy DtoH", "aten::copy_")
_LONGEST = 16
_NO_KERNELS = (*_COPIES, "Memcpy", "Memset")


@dataclass
class Bench:
    """What is measured, and its time limit.

    Attributes:
        device: to measure.
        scale: sizes.
        model: file with an L2P model; None uses random weights.
        deadline: end of the part's time, by `time.monotonic`.
        outputs: of earlier rows by name, to compare later ones with.
    """

    device: torch.device
    scale: Scale
    model: Path | None
    deadline: float
    outputs: dict[str, torch.Tensor]

    @property
    def gpu(self) -> Any:
        """torch.cuda or its counterpart, None for the CPU."""
        return accelerator.module(self.device) if accelerator.has_own_memory(self.device.type) else None

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.gpu:
            self.gpu.synchronize(self.device)

    def clean(self) -> None:
        """Release unused memory."""
        gc.collect()
        accelerator.empty_cache(self.device)


def timed(
    bench: Bench, step: Callable[[], object], rounds: int | None = None, warm_up: int = 1, together: int = 1
) -> Figures:
    """Median milliseconds of a call, and the allocator's peak during it.

    It waits for the device after every `together` calls, and ends early, after at least one round, when the seconds of
    the measurement or of the part are used up.
    """
    for _ in range(warm_up):
        step()
    bench.synchronise()
    accelerator.empty_cache(bench.device)
    resident = _allocated(bench)
    if bench.gpu:
        bench.gpu.reset_peak_memory_stats(bench.device)
    taken: list[float] = []
    until = min(bench.deadline, time.monotonic() + bench.scale.seconds)
    while not taken or (len(taken) < (rounds or bench.scale.rounds) and time.monotonic() < until):
        started = time.perf_counter()
        for _ in range(together):
            step()
        bench.synchronise()
        taken.append(1000 * (time.perf_counter() - started) / together)
    figures: Figures = {"ms": statistics.median(taken), "rounds": len(taken), "ms_all": taken}
    if bench.gpu:
        peak = bench.gpu.max_memory_allocated(bench.device)
        figures |= {
            "resident": resident,
            "peak": peak,
            "beyond": peak - resident,
            "reserved": bench.gpu.max_memory_reserved(bench.device),
        }
    return figures


def _allocated(bench: Bench) -> int:
    return bench.gpu.memory_allocated(bench.device) if bench.gpu else 0


def counted(bench: Bench, step: Callable[[], object]) -> Figures:
    """Kernels, waits and copies of one call, from torch's profiler."""
    activities = [ProfilerActivity.CPU]
    of_device = getattr(ProfilerActivity, bench.device.type.upper(), None)
    if of_device not in (None, ProfilerActivity.CPU):
        activities.append(of_device)
    bench.synchronise()
    with profile(activities=activities) as profiler:
        step()
        bench.synchronise()
    return of_events([_Event.of(event) for event in profiler.events()])


@dataclass(frozen=True)
class _Event:
    name: str
    start: float
    end: float
    on_device: bool

    @classmethod
    def of(cls, event: Any) -> _Event:
        on_device = event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False)
        return cls(event.name, event.time_range.start, event.time_range.end, on_device)


def of_events(events: Sequence[_Event]) -> Figures:
    """Figures from a profile's events; if no event is a device's, the CPU's operations count as kernels.

    Times are the milliseconds during which at least one copy, or kernel, is running; `hidden` is the share of the
    copying during which a kernel runs.
    """
    at_work = [event for event in events if event.on_device] or [e for e in events if e.name.startswith("aten::")]
    copies = [event for event in at_work if event.name.startswith(_COPIES)]
    kernels = [event for event in at_work if not event.name.startswith(_NO_KERNELS)]
    copying, computing = (union((event.start, event.end) for event in some) for some in (copies, kernels))
    copy_time = length(copying)
    items = [event for event in events if event.name == "aten::_local_scalar_dense"]
    if at_work and at_work[0].on_device:
        items = _reading_back(items, events)
    both = copy_time + length(computing) - length(union([*copying, *computing]))
    return {
        "longest": _longest(kernels),
        "kernels": len(kernels),
        "copies": len(copies),
        "waits": sum(event.name in _WAITS for event in events if not event.on_device),
        "items": len(items),
        "copy_ms": copy_time / 1000,
        "kernel_ms": length(computing) / 1000,
        # The CPU's operations are nested, so all of their copying would seem hidden.
        "hidden": both / copy_time if copy_time and at_work[0].on_device else None,
    }


def _reading_back(items: Sequence[_Event], events: Sequence[_Event]) -> list[_Event]:
    """The reads that wait for a stream; the others read what is in RAM, such as AdamW's counters there."""
    waits = [event for event in events if event.name in _STREAM_WAITS]
    return [item for item in items if any(item.start <= wait.start and wait.end <= item.end for wait in waits)]


def _longest(kernels: Sequence[_Event]) -> list[dict[str, Any]]:
    """The kernels that take most of the time: names, how often, and milliseconds of all together."""
    found: dict[str, list[float]] = {}
    for event in kernels:
        found.setdefault(event.name, []).append((event.end - event.start) / 1000)
    longest = sorted(found.items(), key=lambda item: sum(item[1]), reverse=True)[:_LONGEST]
    return [{"kernel": name[:120], "count": len(times), "ms": sum(times)} for name, times in longest]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge overlapping intervals; sorted."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Total length of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected value."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    return float((value - expected).norm() / expected.norm())
