"""Whether a training run fits into memory, and what to change if it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import psutil
import torch

from .activations import Workload
from .config import ModelConfig
from .plan import DEVICE_OVERHEAD, Plan, gigabytes, plan
from .training_config import TrainingConfig


@dataclass(frozen=True)
class Change:
    """What may be changed for a run to need less memory: in words of the recipe, and what becomes of the run."""

    words: str
    training: TrainingConfig
    work: Workload


_SAVINGS: tuple[tuple[str, object, int], ...] = (
    ("gradient_checkpointing", True, 1),
    ("frozen", "fp8", 2),
    ("optimiser_bits", 8, 2),
    ("step_early", True, 2),
    ("offload", True, 4),
    ("stream", True, 4),
)
"""Settings that need less memory, and what each costs of time or exactness beside the others."""


def changes(training: TrainingConfig, work: Workload) -> Iterator[Change]:
    """Nothing, then ever more: settings alone, then smaller micro-batches, then smaller images with all settings."""
    possible = [
        (name, value, cost)
        for name, value, cost in _SAVINGS
        if getattr(training, name) != value and not (training.policy == "all" and name in ("frozen", "stream"))
    ]
    sets = _combinations(possible)
    for batch in dict.fromkeys((work.batch, 1)):
        for chosen in sets:
            if _go_together(chosen, training.accumulate * work.batch // batch):
                yield _change(training, work, work._replace(batch=batch), chosen)
    possible = [setting for setting in possible if setting[0] != "step_early"]  # offloading does as much
    for share in (3 / 4, 1 / 2, 1 / 4):
        smaller = work._replace(batch=1, height=_scaled(work.height, share), width=_scaled(work.width, share))
        yield _change(training, work, smaller, tuple(possible))


def _combinations(settings: Sequence[tuple[str, object, int]]) -> list[tuple[tuple[str, object, int], ...]]:
    """None, some and all of them, by what they cost."""
    sets = [chosen for count in range(len(settings) + 1) for chosen in combinations(settings, count)]
    return sorted(sets, key=lambda chosen: sum(cost for *_, cost in chosen))


def _go_together(settings: Iterable[tuple[str, object, int]], accumulate: int) -> bool:
    names = {name for name, *_ in settings}
    return "step_early" not in names or (accumulate == 1 and "offload" not in names)


def _change(
    training: TrainingConfig, work: Workload, smaller: Workload, settings: Iterable[tuple[str, object, int]]
) -> Change:
    new: dict[str, object] = {}
    size = {}
    if smaller.height != work.height:
        size["size"] = round((smaller.height * smaller.width) ** 0.5)
    if smaller.batch != work.batch:
        size["batch_size"] = smaller.batch
        new["accumulate"] = training.accumulate * work.batch // smaller.batch
    new |= {name: value for name, value, _ in settings}
    words = " and ".join(f"{name} = {_toml(value)}" for name, value in {**size, **new}.items())
    return Change(words, dataclasses.replace(training, **new), smaller)  # type: ignore[arg-type]


def _scaled(side: int, share: float) -> int:
    return max(64, int(side * share) // 64 * 64)


def fitting(
    config: ModelConfig,
    training: TrainingConfig,
    work: Workload,
    limit: int,
    *,
    device_type: str = "cuda",
    processes: int = 1,
) -> tuple[Change, Plan] | None:
    """The least change with which a run fits into `limit` bytes of a device's memory; None if there is none."""
    for change in changes(training, work):
        if processes > 1 and (change.training.offload or change.training.step_early):
            continue
        found = plan(config, change.training, change.work, device_type=device_type, processes=processes)
        if found.device_bytes <= limit:
            return change, found
    return None


def refuse_if_too_much(
    config: ModelConfig,
    training: TrainingConfig,
    work: Workload,
    limit: int,
    *,
    device_type: str = "cuda",
    processes: int = 1,
) -> Plan:
    """The plan of a run that fits into `limit` bytes of a device's memory.

    Raises:
        ValueError: if it does not, with the least change that would make it fit.
    """
    wanted = plan(config, training, work, device_type=device_type, processes=processes)
    if wanted.device_bytes <= limit:
        return wanted
    sentence = f"{wanted.sentence(device_type)} There are {gigabytes(limit)} GB."
    found = fitting(config, training, work, limit, device_type=device_type, processes=processes)
    if found is None:
        raise ValueError(
            f"{sentence} No setting makes it fit: train fewer blocks, on a device with more memory, or on several with "
            'parallel = "fsdp".'
        )
    change, smaller = found
    computer = f" and {gigabytes(smaller.computer_bytes)} GB of the computer's memory" if smaller.computer_bytes else ""
    raise ValueError(
        f"{sentence} It would fit with {change.words}: then about {gigabytes(smaller.device_bytes)} GB{computer}."
    )


_COMPUTER_SAVINGS: tuple[tuple[str, object, int], ...] = (
    ("optimiser_bits", 8, 1),
    ("stream", False, 1),
    ("offload", False, 2),
)
"""Settings that need less of the computer's memory, where some of what a GPU works with lies there."""


def refuse_if_too_much_of_the_computer(
    config: ModelConfig, training: TrainingConfig, work: Workload, memory: int, limit: int, *, processes: int = 1
) -> None:
    """Hold a run on a GPU to `memory` bytes that the computer has for each process.

    Args:
        limit: bytes of the GPU's memory, which what is proposed instead has to fit as well.

    Raises:
        ValueError: if it needs more, with the least change that would make it fit.
    """
    wanted = plan(config, training, work, processes=processes)
    if wanted.computer_bytes <= memory:
        return
    sentence = f"{wanted.sentence()} This computer has {gigabytes(memory)} GB for it, swap included."
    possible = [setting for setting in _COMPUTER_SAVINGS if getattr(training, setting[0]) != setting[1]]
    for chosen in _combinations(possible):
        change = _change(training, work, work, chosen)
        found = plan(config, change.training, work, processes=processes)
        if found.computer_bytes <= memory and found.device_bytes <= limit:
            raise ValueError(f"{sentence} It would fit with {change.words}.")
    raise ValueError(f"{sentence} No setting makes it fit: train fewer blocks, or on a computer with more memory.")


def computer_memory() -> int:
    """Bytes of memory that this computer has, swap included."""
    return psutil.virtual_memory().total + psutil.swap_memory().total


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process may use, what it holds already included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator holds without using it is free to it, what the context takes is taken.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) + DEVICE_OVERHEAD


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
