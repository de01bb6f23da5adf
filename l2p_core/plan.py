"""What a training run needs of memory, computed from shapes before anything is loaded, and what to change if it is too
much.

Sizes are in bytes; in sentences 1 GB is 10^9. What a GPU's own software takes, and what its allocator loses
between tensors, is counted as `DEVICE_OVERHEAD`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import psutil
import torch

from . import activations, lora
from .activations import Part, Workload
from .config import ModelConfig
from .freeze import trainable_names
from .model import key_shapes
from .training_config import TrainingConfig

GB = 10**9
DEVICE_OVERHEAD = 6 * GB // 10
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256  # numbers of a tensor; see `adamw`
_NEVER_FLOAT8 = "adaLN_modulation"


@dataclass(frozen=True)
class Plan:
    """Bytes that a process of a run needs at its worst moment.

    Attributes:
        device: by what they are for, of the device's memory.
        computer: the same of the computer's memory, beside the program itself.
    """

    device: dict[str, int]
    computer: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def computer_bytes(self) -> int:
        return sum(self.computer.values())

    def sentence(self, device_type: str = "cuda") -> str:
        """What is needed, in words."""
        of = "GPU memory" if device_type == "cuda" else "memory"
        sentence = f"Needs about {_gb(self.device_bytes)} GB of {of}: {_listed(self.device)}"
        if self.computer_bytes:
            sentence += f"; and {_gb(self.computer_bytes)} GB of the computer's memory: {_listed(self.computer)}"
        return sentence + "."


def plan(
    config: ModelConfig, training: TrainingConfig, work: Workload, *, device_type: str = "cuda", processes: int = 1
) -> Plan:
    """Plan a run.

    Args:
        config: of the L2P model.
        training: how it is trained; of `parallel`, "auto" counts as "ddp".
        work: a process's micro-batch.
        device_type: "cuda" or "cpu".
        processes: that train together.
    """
    return _Planner(config, training, work, device_type, processes).plan()


class _Planner:
    def __init__(self, config: ModelConfig, training: TrainingConfig, work: Workload, device_type: str, processes: int):
        self.config, self.training, self.work = config, training, work
        self.device_type, self.processes = device_type, processes
        self.shapes: dict[str, tuple[int, ...]] = key_shapes(config)
        self.trained = trainable_names(config, training.blocks, training.policy)
        self.frozen = {name: shape for name, shape in self.shapes.items() if name not in self.trained}
        if training.policy == "lora":
            layers = lora.adapted_layers(config, self.trained)
            adapters = lora.adapter_shapes(config, layers, training.lora_rank)
            self.shapes |= adapters
            self.trained |= set(adapters)
        self.compute = 2 if training.precision == "bf16" else 4
        self.stored = training.frozen == "fp8" or training.stream

    def plan(self) -> Plan:
        training = self.training
        numbers = sum(self._numbers(name) for name in self.trained)
        moments, averages = self._moments(), 4 * numbers if training.ema_decay else 0
        on_device, on_computer = self._frozen_weights()
        peak = activations.peak(
            self._parts(),
            checkpointing=training.gradient_checkpointing,
            gradients=self._gradients,
            all_along=training.accumulate > self.processes or self.processes > 1,
        )
        device = {"frozen weights": on_device}
        computer = {"frozen weights": on_computer}
        if training.offload:
            device |= {"trained weights": self.compute * numbers}
            largest = max(self._numbers(name) for name in self.trained)
            computer |= {
                "trained weights": 4 * numbers,
                "optimiser": moments,
                "averages": averages,
                "gradients": 4 * (numbers if training.accumulate > 1 else largest),
            }
        else:
            share = self.processes if training.parallel == "fsdp" else 1
            device = {"frozen weights": on_device // (1 if self.stored else share)}
            device |= {"trained weights": 4 * numbers // share, "optimiser": moments // share}
            device |= {"averages": averages // share, "gradients": peak.gradients // share}
            if share > 1:
                # The block that is computed and the one that comes next, whole.
                device["gathered blocks"] = 2 * self.compute * self._largest_block()
        device["activations"] = peak.activations
        if self.device_type == "cuda":
            device["CUDA itself"] = DEVICE_OVERHEAD
            return Plan(device, computer)
        # There is one memory.
        names = dict.fromkeys([*device, *computer])
        return Plan({name: device.get(name, 0) + computer.get(name, 0) for name in names}, {})

    def _numbers(self, name: str) -> int:
        return _product(self.shapes[name])

    def _moments(self) -> int:
        def size(numbers: int) -> int:
            if self.training.optimiser_bits == 32 or numbers < _EIGHT_BIT_FROM:
                return 8 * numbers
            return 2 * (numbers + 4 * -(-numbers // _EIGHT_BIT_BLOCK))

        return sum(size(self._numbers(name)) for name in self.trained)

    def _frozen_weights(self) -> tuple[int, int]:
        """Bytes on the device and in the computer's memory."""
        blocks: dict[str, int] = {}
        beside = 0
        for name, shape in self.frozen.items():
            block = self._frozen_block(name)
            if not (self.stored and block and len(shape) == 2):
                beside += self.compute * _product(shape)
                continue
            eight = self.training.frozen == "fp8" and _NEVER_FLOAT8 not in name
            width = 1 if eight else 2 if self.training.frozen == "fp8" else self.compute
            beside += 4 * shape[0] if eight else 0
            blocks[block] = blocks.get(block, 0) + width * _product(shape)
        if not self.training.stream or not blocks:
            return beside + sum(blocks.values()), 0
        home = sum(blocks.values())
        # torch rounds pinned memory up to a power of two.
        return beside + 2 * max(blocks.values()), 1 << (home - 1).bit_length() if self.device_type == "cuda" else home

    def _frozen_block(self, name: str) -> str:
        """The block with no trained weight that a weight is in, or nothing."""
        part, _, rest = name.partition(".")
        block = f"{part}.{rest.partition('.')[0]}."
        in_block = part in ("layers", "noise_refiner", "context_refiner")
        full = {own for own in self.trained if not lora.is_adapter(own)}
        return block if in_block and not any(own.startswith(block) for own in full) else ""

    def _largest_block(self) -> int:
        sizes: dict[str, int] = {}
        for name in self.shapes:
            block = ".".join(name.split(".")[:2])
            sizes[block] = sizes.get(block, 0) + self._numbers(name)
        return max(sizes.values())

    def _parts(self) -> tuple[Part, ...]:
        parts = activations.parts_for(self.config, self.training, self.work)
        if not self.stored:
            return parts
        # A stored weight is turned into the numbers of the computation, one at a time.
        largest = max((_product(shape) for name, shape in self.frozen.items() if len(shape) == 2), default=0)
        temporary = 0 if self.training.frozen == "full" else self.compute * largest
        return tuple(
            dataclasses.replace(part, traced=part.traced._replace(peak=part.traced.peak + temporary))
            if part.frozen
            else part
            for part in parts
        )

    def _gradients(self, part: Part) -> int:
        if self.training.offload or self.training.step_early or not part.names:
            return 0
        return 4 * sum(self._numbers(name) for name in self.trained if name.startswith(part.names))


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
    sentence = f"{wanted.sentence(device_type)} There are {_gb(limit)} GB."
    found = fitting(config, training, work, limit, device_type=device_type, processes=processes)
    if found is None:
        raise ValueError(
            f"{sentence} No setting makes it fit: train fewer blocks, on a device with more memory, or on several with "
            'parallel = "fsdp".'
        )
    change, smaller = found
    computer = f" and {_gb(smaller.computer_bytes)} GB of the computer's memory" if smaller.computer_bytes else ""
    raise ValueError(
        f"{sentence} It would fit with {change.words}: then about {_gb(smaller.device_bytes)} GB{computer}."
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
    sentence = f"{wanted.sentence()} This computer has {_gb(memory)} GB for it, swap included."
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


def _product(shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _listed(sizes: dict[str, int]) -> str:
    """What takes a hundredth of it all or more, in GB."""
    least = sum(sizes.values()) / 100
    return ", ".join(f"{what} {_gb(size)}" for what, size in sizes.items() if size and size >= least)


def _gb(size: int) -> str:
    return f"{size / GB:.1f}" if size >= GB / 10 else f"{size / GB:.2g}"
