"""Whether a training run fits into memory, and what to change if it does not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..config import PixelConfig
from ..device import accelerator
from ..distributed.together import go_together
from ..ranges import BATCH
from ..sources import source_of
from ..training_config import TrainingConfig
from .activations import Workload
from .plan import DEVICE_OVERHEAD, MemoryPlan, gigabytes, plan


class DoesNotFit(ValueError):
    """A run needs more memory than there is; the message says what would make it fit."""


@dataclass(frozen=True)
class Room:
    """The memory that a process of a run may use.

    Attributes:
        device: bytes of the device's memory; for a CPU, of system memory.
        ram: free bytes of RAM beside a GPU, free swap included; None means unlimited.
        device_type: kind of device, such as "cuda" or "cpu".
        processes: number of processes that train together.
    """

    device: int
    ram: int | None = None
    device_type: str = "cuda"
    processes: int = 1

    def plan(self, config: PixelConfig, training: TrainingConfig, work: Workload) -> MemoryPlan:
        """How much memory a run needs here; arguments as for `plan.plan`."""
        return plan(config, training, work, device_type=self.device_type, processes=self.processes)

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether the planned run fits."""
        return plan.device_bytes <= self.device and (self.ram is None or plan.ram_bytes <= self.ram)

    def __str__(self) -> str:
        ram = "" if self.ram is None else f", and {gigabytes(self.ram)} GB of free RAM, swap included"
        return f"{gigabytes(self.device)} GB{ram}"


@dataclass(frozen=True)
class MemoryChange:
    """A change that reduces a run's memory: in words of the recipe, and the resulting settings."""

    words: str
    training: TrainingConfig
    work: Workload


_SAVINGS: tuple[tuple[str, object, int], ...] = (
    ("keep_activations", 0, 1),
    ("gradient_checkpointing", True, 1),
    ("frozen", "fp8", 2),
    ("optimiser_bits", 8, 2),
    ("step_early", True, 2),
    ("offload", True, 4),
    ("stream", True, 4),
)
"""Settings that reduce device memory, and their relative cost in time or exactness."""

_USED = 0.85
"""The share of the memory that activations may fill."""

_BACK: tuple[tuple[str, object, int], ...] = (("stream", False, 1), ("offload", False, 2))
"""Settings that reduce the use of RAM, likewise."""


def memory_changes(training: TrainingConfig, work: Workload) -> Iterator[MemoryChange]:
    """No change, then ever larger ones: settings, then smaller micro-batches, then smaller images with all settings."""
    if training.keep_activations < 0:
        training = dataclasses.replace(training, keep_activations=0)
    possible = [
        (name, value, cost)
        for name, value, cost in _SAVINGS
        if getattr(training, name) != value and not (training.policy == "all" and name == "frozen")
    ]
    sets = _combinations([*possible, *(setting for setting in _BACK if getattr(training, setting[0]) != setting[1])])
    for batch in dict.fromkeys((work.batch, 1)):
        for chosen in sets:
            if _go_together(chosen, training, training.accumulate * work.batch // batch):
                yield _change(training, work, work._replace(batch=batch), chosen)
    possible = [setting for setting in possible if setting[0] != "step_early"]  # offloading saves as much
    for share in (3 / 4, 1 / 2, 1 / 4):
        smaller = work._replace(batch=1, height=_scaled(work.height, share), width=_scaled(work.width, share))
        yield _change(training, work, smaller, tuple(possible))


def _combinations(settings: Sequence[tuple[str, object, int]]) -> list[tuple[tuple[str, object, int], ...]]:
    """No, some and all settings, ordered by cost."""
    sets = [chosen for count in range(len(settings) + 1) for chosen in combinations(settings, count)]
    return sorted(sets, key=lambda chosen: sum(cost for *_, cost in chosen))


def _go_together(settings: Iterable[tuple[str, object, int]], training: TrainingConfig, accumulate: int) -> bool:
    new = {name: value for name, value, _ in settings}
    stream, offload = new.get("stream", training.stream), new.get("offload", training.offload)
    if training.policy == "all" and stream and not offload:
        return False
    return "step_early" not in new or (accumulate == 1 and "offload" not in new)


def _change(
    training: TrainingConfig, work: Workload, smaller: Workload, settings: Iterable[tuple[str, object, int]]
) -> MemoryChange:
    new: dict[str, object] = {}
    size = {}
    if smaller.height != work.height:
        size["size"] = round((smaller.height * smaller.width) ** 0.5)
    if smaller.batch != work.batch:
        size["batch_size"] = smaller.batch
        new["accumulate"] = min(training.accumulate * work.batch // smaller.batch, int(BATCH.most))
        if training.step_early:  # which works with one micro-batch alone
            new["step_early"] = False
    new |= {name: value for name, value, _ in settings}
    words = " and ".join(f"{name} = {json.dumps(value)}" for name, value in {**size, **new}.items())
    return MemoryChange(words, dataclasses.replace(training, **new), smaller)  # type: ignore[arg-type]


def _scaled(side: int, share: float) -> int:
    return max(64, int(side * share) // 64 * 64)


def fitting(
    config: PixelConfig,
    training: TrainingConfig,
    work: Workload,
    room: Room,
) -> tuple[MemoryChange, MemoryPlan] | None:
    """The smallest change, ideally none, with which a run fits; None if there is none."""
    for change in memory_changes(training, work):
        if not go_together(change.training, room.processes, torch.device(room.device_type)):
            continue
        found = room.plan(config, change.training, change.work)
        if room.holds(found):
            return change, found
    return None


def refuse_if_too_much(
    config: PixelConfig,
    training: TrainingConfig,
    work: Workload,
    room: Room,
) -> MemoryPlan:
    """The plan of a run that fits.

    Raises:
        DoesNotFit: with the smallest change that would make it fit.
    """
    wanted = room.plan(config, training, work)
    if room.holds(wanted):
        return wanted
    each = f" for each of {room.processes} processes" if room.processes > 1 else ""
    sentence = f"{wanted.sentence(room.device_type)} There are {room}{each}."
    found = fitting(config, training, work, room)
    if found is None:
        raise DoesNotFit(
            f"{sentence} No setting makes it fit: train fewer blocks, use a device or computer with more memory, or "
            'several devices with torchrun and parallel = "fsdp".'
        )
    change, smaller = found
    ram = f" and {gigabytes(smaller.ram_bytes)} GB of RAM" if smaller.ram_bytes else ""
    raise DoesNotFit(
        f"{sentence} It would fit with {change.words}: then about {gigabytes(smaller.device_bytes)} GB{ram}."
    )


def keeping_what_fits(
    config: PixelConfig,
    training: TrainingConfig,
    work: Workload,
    room: Room,
) -> TrainingConfig:
    """The configuration of a run that fits, with `keep_activations` decided if it is -1: nothing is checkpointed if the
    activations of all blocks, of the refiners and of the head fit."""
    if training.keep_activations >= 0:
        return training
    # A plan may be off by a seventh, and keeping fewer activations only costs time.
    used = dataclasses.replace(room, device=round(room.device * _USED))
    trunk = len(source_of(config).blocks(config, trunk=True))
    keeping = [dataclasses.replace(training, keep_activations=count) for count in reversed(range(1, trunk + 1))]
    for chosen in [dataclasses.replace(keeping[0], gradient_checkpointing=False), *keeping]:
        if used.holds(used.plan(config, chosen, work)):
            return chosen
    return dataclasses.replace(training, keep_activations=0)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process may use, including what it already holds; None for a CPU."""
    if not accelerator.has_own_memory(device.type):
        return None
    gpu = accelerator.module(device)
    free = accelerator.free_bytes(device)
    # Memory that torch's allocator holds unused is free for it; memory of the context is not.
    return free + gpu.memory_reserved(device) - gpu.memory_allocated(device) + DEVICE_OVERHEAD
