"""How much memory a training run needs, computed from shapes before anything is loaded.

Sizes are in bytes; in sentences 1 GB is 10^9. `DEVICE_OVERHEAD` covers the GPU's own software and the fragmentation of
its allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import PixelConfig
from ..device.accelerator import has_own_memory
from ..sources import source_of
from ..training_config import TrainingConfig
from . import activations, placement
from .activations import Workload
from .block_stream import pinned_bytes
from .checkpointing import kept_blocks
from .exchange import BUFFERS, PIECE

GB = 10**9
DEVICE_OVERHEAD = 6 * GB // 10
_HEADER_BYTES = 256  # upper limit of a tensor's entry in a file's header
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256  # elements of a tensor; see `adamw`


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a process of a run needs at its peak.

    Attributes:
        device: bytes of the device's memory by purpose.
        ram: bytes of RAM by purpose, beside the program itself.
    """

    device: dict[str, int]
    ram: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())

    def sentence(self, device_type: str = "cuda") -> str:
        """The needs as a sentence."""
        of = "GPU memory" if has_own_memory(device_type) else "memory"
        sentence = f"Needs about {gigabytes(self.device_bytes)} GB of {of}: {listed(self.device)}"
        if self.ram_bytes:
            sentence += f"; and {gigabytes(self.ram_bytes)} GB of RAM: {listed(self.ram)}"
        return sentence + "."


def plan(
    config: PixelConfig, training: TrainingConfig, work: Workload, *, device_type: str = "cuda", processes: int = 1
) -> MemoryPlan:
    """Plan a run.

    Args:
        config: of the L2P model.
        training: its settings; `parallel` "auto" counts as "ddp", and `keep_activations` -1 as 0.
        work: a process's micro-batch.
        device_type: kind of device, such as "cuda" or "cpu".
        processes: number of processes that train together.
    """
    return _Planner(config, training, work, device_type, processes).plan()


def saved_sizes(config: PixelConfig, training: TrainingConfig) -> tuple[int, int]:
    """Bytes of a run's state and of its delta on disk; arguments as for `plan`."""
    planner = _Planner(config, training, Workload(1, 0, 0, 0), "cpu", 1)
    of_each = len(planner.trained) * _HEADER_BYTES
    kept = len(planner.weights) * _HEADER_BYTES
    state = 4 * planner.elements + planner._averages() + planner._moments() + 4 * of_each
    return state, 4 * planner.elements + of_each + kept


class _Planner:
    def __init__(self, config: PixelConfig, training: TrainingConfig, work: Workload, device_type: str, processes: int):
        self.config, self.training, self.work = config, training, work
        self.device_type, self.processes = device_type, processes
        self.weights = placement.of_run(config, training)
        self.trained = {name: weight for name, weight in self.weights.items() if weight.trains}
        self.elements = sum(weight.elements for weight in self.trained.values())
        self.largest = max((weight.elements for weight in self.trained.values()), default=0)
        self.compute = training.compute_dtype.itemsize

    def plan(self) -> MemoryPlan:
        device = placement.device_bytes(self.weights)
        ram = {"trained weights": 4 * self.elements} if self.training.offload else {}
        homes = placement.streamed_bytes(self.weights)
        if homes:
            ram["streamed weights"] = pinned_bytes(homes) if has_own_memory(self.device_type) else sum(homes)
        step = activations.step_of(self.config, self.training, self.work)
        trunk = list(source_of(self.config).blocks(self.config, trunk=True))
        kept = {trunk[number] for number in kept_blocks(self.config, self.training)}
        recomputes = self.training.gradient_checkpointing
        peak = activations.peak(step, lambda block: recomputes and block not in kept, self._gradients)
        if self.training.offload:
            self._add_optimiser_in_ram(device, ram, peak.gradients)
        else:
            self._add_optimiser_on_device(device, peak.gradients)
        device["activations"] = peak.activations
        if has_own_memory(self.device_type):
            device["the GPU's driver"] = DEVICE_OVERHEAD
            return MemoryPlan(device, ram)
        # A CPU has one memory.
        names = dict.fromkeys([*device, *ram])
        return MemoryPlan({name: device.get(name, 0) + ram.get(name, 0) for name in names}, {})

    def _add_optimiser_in_ram(self, device: dict[str, int], ram: dict[str, int], gradients: int) -> None:
        """Offloaded: moments, averages and gradients are in RAM; a GPU holds gradients until they are copied."""
        # bitsandbytes steps whole weights.
        widened = self.largest if self.training.optimiser_bits == 8 else min(PIECE, self.largest)
        ram["optimiser"], ram["averages"] = self._moments(), self._averages()
        ram["gradients"] = 4 * (self.elements if self.training.accumulate > 1 else widened)
        if has_own_memory(self.device_type):
            device["gradients"] = gradients
            ram["gradients"] += BUFFERS * pinned_bytes([self.compute * self.largest])

    def _add_optimiser_on_device(self, device: dict[str, int], gradients: int) -> None:
        """Moments, averages and gradients beside the weights; with FSDP every process holds its share of all these."""
        share = self.processes if self.training.parallel == "fsdp" else 1
        if not any(weight.replaced for weight in self.weights.values()):  # FSDP2 does not cut what `block_store` holds
            device["frozen weights"] //= share
        device["trained weights"] //= share
        device["optimiser"], device["averages"] = self._moments() // share, self._averages() // share
        device["gradients"] = gradients // share
        if share > 1:
            # The current block and the next one, whole.
            device["gathered blocks"] = 2 * self.compute * self._largest_block()

    def _averages(self) -> int:
        return 4 * self.elements if self.training.ema_decay else 0

    def _moments(self) -> int:
        def size(elements: int) -> int:
            if self.training.optimiser_bits == 32 or elements < _EIGHT_BIT_FROM:
                return 8 * elements
            return 2 * (elements + 4 * -(-elements // _EIGHT_BIT_BLOCK))

        return sum(size(weight.elements) for weight in self.trained.values())

    def _largest_block(self) -> int:
        sizes: dict[str, int] = {}
        for name, weight in self.weights.items():
            block = weight.block or ".".join(name.split(".")[:2])
            sizes[block] = sizes.get(block, 0) + weight.elements
        return max(sizes.values())

    def _gradients(self, made: int, total: int) -> int:
        """Bytes of gradients on the device when so many elements of `total` are complete."""
        training = self.training
        if training.offload and has_own_memory(self.device_type):
            return self.compute * min(made, BUFFERS * self.largest)  # being copied, see `exchange`
        if training.offload or training.step_early:
            return 0
        all_along = training.accumulate > self.processes or self.processes > 1
        return 4 * (total if all_along else made)


def listed(sizes: dict[str, int]) -> str:
    """The items that make up a hundredth of the total or more, in GB, as a phrase."""
    least = sum(sizes.values()) / 100
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items() if size and size >= least)


def gigabytes(size: int) -> str:
    """Bytes in GB, as text."""
    return f"{size / GB:.1f}" if size >= GB / 10 else f"{size / GB:.2g}"
