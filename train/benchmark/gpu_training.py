"""Training steps of the whole model with the recipes' memory settings: time, the plan beside the allocator's peak, and
how much of the copying is hidden behind computing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ...l2p_core.checkpoint import open_checkpoint
from ...l2p_core.device.accelerator import CPU
from ...l2p_core.device.system_memory import free_memory_and_swap
from ...l2p_core.distributed.ranks import Ranks
from ...l2p_core.memory import placement
from ...l2p_core.memory.activations import Workload
from ...l2p_core.memory.checkpointing import kept_blocks
from ...l2p_core.memory.compiled import compile_blocks
from ...l2p_core.memory.plan import DEVICE_OVERHEAD, gigabytes, plan
from ...l2p_core.memory.room import Room, free_memory, keeping_what_fits
from ...l2p_core.run import recipe as recipes
from ...l2p_core.run.find import find
from ...l2p_core.training import adamw
from ...l2p_core.training import loading as training_model
from ...l2p_core.training.batch import Batch
from ...l2p_core.training.trainer import Trainer
from ...l2p_core.training_config import TrainingConfig
from .gpu_measure import Bench, Figures, counted, timed
from .gpu_weights import random_model

_MANY = 1000  # steps, more than are ever run


@dataclass(frozen=True)
class Training:
    """Measures a step.

    Attributes:
        recipe: a bundled one, whose [training] section is used.
        accumulate: micro-batches per step, in place of the recipe's.
        stream: whether blocks are streamed.
        compiled: whether blocks are compiled.
    """

    recipe: str
    accumulate: int
    stream: bool = False
    compiled: bool = False

    def __call__(self, bench: Bench, _: Any) -> Figures:
        config = open_checkpoint(bench.model).pixel_config() if bench.model is not None else bench.scale.config("1k")
        side = max(config.size_multiple, bench.scale.training_side // config.size_multiple * config.size_multiple)
        work = Workload(1, side, side, bench.scale.caption)
        training = dataclasses.replace(
            recipes.load(find(self.recipe)).training,
            steps=_MANY,
            accumulate=self.accumulate,
            stream=self.stream,
            blocks=bench.scale.blocks,
        )
        training, changed = _with_library(training)
        memory = free_memory(bench.device) or psutil.virtual_memory().total
        training = keeping_what_fits(config, training, work, Room(memory, None, bench.device.type))
        planned = plan(config, training, work, device_type=bench.device.type)
        left = free_memory_and_swap()
        if planned.ram_bytes > left:  # the system would swap, or end processes
            raise ValueError(f"It needs {gigabytes(planned.ram_bytes)} GB of RAM, and {gigabytes(left)} GB are free.")
        ranks = Ranks(device=bench.device)
        if bench.model is not None:
            model = training_model.load(bench.model, training, ranks)
        else:
            weights = placement.of_run(config, training)
            model = random_model(config, bench.device, weights, CPU if training.offload else None)
        trainer = Trainer(model, training, ranks=ranks)
        if self.compiled:
            compile_blocks(model, backend=bench.scale.backend)
        step = _steps(trainer, _OneImage(work, config.caption_dim))
        figures = timed(bench, step, rounds=3, warm_up=2 if self.compiled else 1)
        figures["after"] = _after_backward(bench, trainer, step)
        overhead = DEVICE_OVERHEAD if bench.gpu else 0
        figures |= {
            "predicted": planned.device_bytes - overhead,
            "planned": planned.device,
            "computer": planned.ram_bytes,
            "in_computer": trainer.bytes_in_ram,
            "note": "; ".join(filter(None, [_kept(config, training), *changed])),
        }
        # The plan covers everything on the device, weights included.
        if "peak" in figures:
            figures["beyond"] = figures["peak"]
        return figures | counted(bench, step)


class _OneImage:
    """The same random image and caption in every micro-batch."""

    def __init__(self, work: Workload, width: int):
        generator = torch.Generator().manual_seed(0)
        self._pixels = torch.rand(1, 3, work.height, work.width, generator=generator) * 2 - 1
        self._caption = torch.randn(work.caption_tokens, width, generator=generator)

    def batch(self, number: int) -> Batch:
        return Batch(self._pixels, [self._caption], [number], [None])


def _steps(trainer: Trainer, batches: _OneImage) -> Callable[[], object]:
    running = trainer.run(batches)
    return lambda: next(running)


def _after_backward(bench: Bench, trainer: Trainer, step: Callable[[], object]) -> float:
    """Milliseconds of a step after the device has completed its last backward pass."""
    began: list[float] = []
    stepping: Any = trainer._stepping
    clip = stepping.clip

    def watched() -> torch.Tensor:
        bench.synchronise()
        began.append(time.perf_counter())
        return clip()

    stepping.clip = watched
    try:
        step()
        bench.synchronise()
    finally:
        del stepping.clip
    return 1000 * (time.perf_counter() - began[0])


def _with_library(training: TrainingConfig) -> tuple[TrainingConfig, list[str]]:
    """Uses 32-bit moments if the library for 8-bit ones is missing."""
    try:
        adamw.check_installed(training)
    except ValueError:
        return dataclasses.replace(training, optimiser_bits=32), ["32-bit moments, as bitsandbytes is not installed"]
    return training, []


def _kept(config: Any, training: TrainingConfig) -> str:
    if not training.gradient_checkpointing:
        return "nothing is recomputed"
    return f"{len(kept_blocks(config, training))} of {config.n_layers} blocks keep their activations"
