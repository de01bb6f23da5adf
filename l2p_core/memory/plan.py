"""How much memory a training run needs, computed from shapes before anything is loaded.

Sizes are in bytes; in sentences 1 GB is 10^9. `DEVICE_OVERHEAD` covers the GPU's own software and the fragmentation of
its allocator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import ModelConfig
from ..deltas import low_rank as lora
from ..device.accelerator import has_own_memory
from ..freeze import trainable_names
from ..model import key_shapes
from ..ops.eight_bit import FACTOR_BYTES
from ..sources import source_of
from ..training_config import TrainingConfig
from . import activations
from .activations import StepPart, Workload
from .block_store import streams, wanted
from .block_stream import pinned_bytes
from .checkpointing import kept_blocks
from .exchange import BUFFERS

GB = 10**9
DEVICE_OVERHEAD = 6 * GB // 10
_HEADER_BYTES = 256  # upper limit of a tensor's entry in a file's header
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256  # elements of a tensor; see `adamw`


@dataclass(frozen=True)
class Plan:
    """Bytes that a process of a run needs at its peak.

    Attributes:
        device: bytes of the device's memory by purpose.
        computer: bytes of RAM by purpose, beside the program itself.
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
        """The needs as a sentence."""
        of = "GPU memory" if has_own_memory(device_type) else "memory"
        sentence = f"Needs about {gigabytes(self.device_bytes)} GB of {of}: {listed(self.device)}"
        if self.computer_bytes:
            sentence += f"; and {gigabytes(self.computer_bytes)} GB of RAM: {listed(self.computer)}"
        return sentence + "."


def plan(
    config: ModelConfig, training: TrainingConfig, work: Workload, *, device_type: str = "cuda", processes: int = 1
) -> Plan:
    """Plan a run.

    Args:
        config: of the L2P model.
        training: its settings; `parallel` "auto" counts as "ddp", and `keep_activations` -1 as 0.
        work: a process's micro-batch.
        device_type: kind of device, such as "cuda" or "cpu".
        processes: number of processes that train together.
    """
    return _Planner(config, training, work, device_type, processes).plan()


def saved_sizes(config: ModelConfig, training: TrainingConfig) -> tuple[int, int]:
    """Bytes of a run's state and of its delta on disk; arguments as for `plan`."""
    planner = _Planner(config, training, Workload(1, 0, 0, 0), "cpu", 1)
    of_each = len(planner.trained) * _HEADER_BYTES
    kept = len(planner.shapes) * _HEADER_BYTES
    averages = 4 * planner.numbers if training.ema_decay else 0
    moments = planner._moments()
    return 4 * planner.numbers + averages + moments + 4 * of_each, 4 * planner.numbers + of_each + kept


class _Planner:
    def __init__(self, config: ModelConfig, training: TrainingConfig, work: Workload, device_type: str, processes: int):
        self.config, self.training, self.work = config, training, work
        self.source = source_of(config)
        self.device_type, self.processes = device_type, processes
        self.shapes: dict[str, tuple[int, ...]] = key_shapes(config)
        self.trained = trainable_names(config, training.blocks, training.policy)
        if training.policy == "lora":
            layers = lora.adapted_layers(config, self.trained)
            adapters = lora.adapter_shapes(config, layers, training.lora_rank)
            self.shapes |= adapters
            self.trained |= set(adapters)
        self.numbers = sum(self._numbers(name) for name in self.trained)
        self.trained_blocks = {self._block(name) for name in self.trained if not lora.is_adapter(name)}
        self.compute = 2 if training.precision == "bf16" else 4
        self.stored = wanted(training)

    def plan(self) -> Plan:
        training = self.training
        moments, averages = self._moments(), 4 * self.numbers if training.ema_decay else 0
        device, computer = self._weights()
        largest = max(self._numbers(name) for name in self.trained)
        taken = training.offload and has_own_memory(self.device_type)
        peak = activations.peak(
            self._parts(),
            checkpointing=training.gradient_checkpointing,
            gradients=self._gradients,
            all_along=training.accumulate > self.processes or self.processes > 1,
            # Being copied, see `exchange`.
            in_flight=BUFFERS * self.compute * largest if taken else None,
        )
        if training.offload:
            computer |= {
                "optimiser": moments,
                "averages": averages,
                "gradients": 4 * (self.numbers if training.accumulate > 1 else largest),
            }
            if taken:
                device["gradients"] = peak.gradients
                computer["gradients"] += BUFFERS * pinned_bytes([self.compute * largest])
        else:
            share = self.processes if training.parallel == "fsdp" else 1
            device["frozen weights"] //= 1 if self.stored else share
            device["trained weights"] //= share
            device |= {"optimiser": moments // share, "averages": averages // share}
            device["gradients"] = peak.gradients // share
            if share > 1:
                # The current block and the next one, whole.
                device["gathered blocks"] = 2 * self.compute * self._largest_block()
        device["activations"] = peak.activations
        if has_own_memory(self.device_type):
            device["the GPU's driver"] = DEVICE_OVERHEAD
            return Plan(device, computer)
        # A CPU has one memory.
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

    def _weights(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of the weights in use, on the device and in RAM."""
        device = {"frozen weights": 0, "trained weights": 0}
        computer = {"trained weights": 4 * self.numbers} if self.training.offload else {}
        blocks: dict[str, int] = {}
        for name, shape in self.shapes.items():
            kind = "trained weights" if name in self.trained else "frozen weights"
            size, block = self._width(name) * self._numbers(name), self._block(name)
            if self._is_stored(name) and streams(self.training, block in self.trained_blocks):
                blocks[block] = blocks.get(block, 0) + size
            else:
                device[kind] += size
            if self._is_float8(name):
                device[kind] += FACTOR_BYTES * shape[0]  # one factor per row, which is never streamed
        if blocks:
            homes = list(blocks.values())
            device["streamed weights"] = 2 * max(homes)
            computer["streamed weights"] = pinned_bytes(homes) if has_own_memory(self.device_type) else sum(homes)
        return device, computer

    def _width(self, name: str) -> int:
        """Bytes of one element of a weight, as stored for computing."""
        if name in self.trained:
            return self.compute if self.training.offload else 4
        if self._is_float8(name):
            return 1
        return 2 if self.training.frozen == "fp8" and self._is_stored(name) else self.compute

    def _is_float8(self, name: str) -> bool:
        frozen = self._block(name) not in self.trained_blocks
        return (
            frozen and self.training.frozen == "fp8" and self._is_stored(name) and not self.source.is_never_8_bit(name)
        )

    def _is_stored(self, name: str) -> bool:
        """Whether it is the weight of a layer that `block_store` replaces."""
        block = self._block(name)
        if not block or len(self.shapes[name]) != 2 or lora.is_adapter(name):
            return False
        return streams(self.training, trained=True) if block in self.trained_blocks else self.stored

    def _block(self, name: str) -> str:
        """The block of a weight, or an empty text."""
        return self.source.block_of(name)

    def _largest_block(self) -> int:
        sizes: dict[str, int] = {}
        for name in self.shapes:
            block = self._block(name) or ".".join(name.split(".")[:2])
            sizes[block] = sizes.get(block, 0) + self._numbers(name)
        return max(sizes.values())

    def _parts(self) -> tuple[StepPart, ...]:
        trunk = list(self.source.blocks(self.config, trunk=True))
        kept = {f"{trunk[number]}." for number in kept_blocks(self.config, self.training)}
        parts = tuple(
            dataclasses.replace(part, checkpointed=False) if kept.intersection(part.names) else part
            for part in activations.parts_for(self.config, self.training, self.work)
        )
        if not self.stored:
            return parts
        # Stored weights are converted to the compute dtype one at a time.
        frozen = [shape for name, shape in self.shapes.items() if name not in self.trained and len(shape) == 2]
        largest = max(map(_product, frozen), default=0)
        temporary = 0 if self.training.frozen == "full" else self.compute * largest
        return tuple(
            dataclasses.replace(part, traced=part.traced._replace(peak=part.traced.peak + temporary))
            if part.frozen
            else part
            for part in parts
        )

    def _gradients(self, part: StepPart) -> int:
        taken = self.training.offload and has_own_memory(self.device_type)
        if not part.names or (not taken and (self.training.offload or self.training.step_early)):
            return 0
        width = self.compute if taken else 4
        return width * sum(self._numbers(name) for name in self.trained if name.startswith(part.names))


def _product(shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers


def listed(sizes: dict[str, int]) -> str:
    """The items that make up a hundredth of the total or more, in GB, as a phrase."""
    least = sum(sizes.values()) / 100
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items() if size and size >= least)


def gigabytes(size: int) -> str:
    """Bytes in GB, as text."""
    return f"{size / GB:.1f}" if size >= GB / 10 else f"{size / GB:.2g}"
