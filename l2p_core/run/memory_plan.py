"""A run's memory plan: stated, stored in the run folder, and used to choose how several processes train together."""

from __future__ import annotations

import dataclasses

import torch

from ..config import PixelConfig
from ..device.accelerator import has_own_memory
from ..device.system_memory import available_memory, free_memory_and_swap, total_memory_and_swap
from ..distributed.ranks import Ranks
from ..distributed.sharding import check_shards
from ..distributed.together import go_together
from ..memory.activations import Workload
from ..memory.plan import MemoryPlan, gigabytes
from ..memory.room import (
    MemoryChange,
    Room,
    fitting,
    free_memory,
    keeping_what_fits,
    memory_changes,
    refuse_if_too_much,
)
from ..sources import source_of
from ..tiny.bundled import is_tiny
from ..training.state import MAY_CHANGE
from ..training_config import TrainingConfig
from .data import image_side
from .recipe import Recipe

_MAX_WORDS = 32
"""Tokens of the tiny model's longest captions."""
_MOST_PIXELS = 1 << 40
"""Maximum pixels of a micro-batch: beyond it, sizes in bytes exceed torch's integers."""
_LESS = 0.85
"""Share of the planned memory that a run may need after its memory ran out."""


class MemoryRanOut(RuntimeError):
    """A device's memory ran out although the plan fitted; the message says what to change."""


def workload(recipe: Recipe, config: PixelConfig, ranks: Ranks) -> Workload:
    """A process's largest micro-batch: no bucket is larger than the square, and no caption longer than the encoder's
    limit. Errors as for `Ranks.part`, and if no device can hold it."""
    _, parts = ranks.part(recipe.training.accumulate, recipe.data.batch_size)
    multiple = config.size_multiple
    side = max(multiple, image_side(recipe, config) // multiple * multiple)
    of_words = recipe.data.kind != "folder" or is_tiny(config)
    tokens = _MAX_WORDS if of_words else source_of(config).encoder.max_tokens
    batch = max(1, recipe.data.batch_size // parts)
    if batch * side * side > _MOST_PIXELS:
        raise ValueError(
            f"A micro-batch of {batch} images of {side} x {side} pixels exceeds what any device can hold: lower [data] "
            "batch_size or size."
        )
    return Workload(batch, side, side, tokens)


def planned(
    recipe: Recipe, config: PixelConfig, ranks: Ranks, limit: int | None = None
) -> tuple[MemoryPlan, TrainingConfig]:
    """The plan of this process, and the training's configuration with "auto" and -1 decided.

    Replicas ("ddp") communicate least and are chosen if they fit.

    Args:
        recipe: of the run.
        config: of the L2P model.
        ranks: the processes of the run.
        limit: bytes of the device's memory; None uses what is free, of GPU memory or, without a GPU, of RAM and swap.

    Raises:
        DoesNotFit: if the run cannot fit into GPU memory or RAM, with the change that would make it fit.
        ValueError: if it has to be sharded but requests a setting that does not work with sharding.
    """
    training, work = recipe.training, workload(recipe, config, ranks)
    kind = ranks.device.type
    memory = free_memory_and_swap() // ranks.on_machine
    free = limit or free_memory(ranks.device)
    room = Room(free or memory, memory if has_own_memory(kind) else None, kind, ranks.count)
    training = decided(config, training, work, room)
    refuse_if_too_much(config, training, work, room)
    # Memory that is not needed must not push other programs' memory into swap.
    spare = dataclasses.replace(room, device=free or min(memory, available_memory() // ranks.on_machine))
    training = keeping_what_fits(config, training, work, spare)
    return room.plan(config, training, work), training


def decided(config: PixelConfig, training: TrainingConfig, work: Workload, room: Room) -> TrainingConfig:
    """The training with "auto" decided: replicas, which communicate least, if they fit.

    Raises:
        ValueError: as for `sharding.check_shards`, if they do not fit.
    """
    if room.processes == 1 or training.parallel != "auto":
        return training
    replicated = dataclasses.replace(training, parallel="ddp")
    if room.holds(room.plan(config, replicated, work)):
        return replicated
    check_shards(training, torch.device(room.device_type))
    return dataclasses.replace(training, parallel="fsdp")


def after_running_out(recipe: Recipe, config: PixelConfig, ranks: Ranks) -> MemoryRanOut:
    """The error, with a change to make, when a run that fitted by its plan runs out of memory.

    Args:
        recipe: of the run, with its training decided.
        config: of the L2P model.
        ranks: the processes of the run.
    """
    training, work = recipe.training, workload(recipe, config, ranks)
    room = Room(0, total_memory_and_swap() // ranks.on_machine, ranks.device.type, ranks.count)
    plan = room.plan(config, training, work)
    less = dataclasses.replace(room, device=round(_LESS * plan.device_bytes))
    resumable = (change for change in memory_changes(training, work) if _may_resume(change, training, work, ranks))
    kept = next((change for change in resumable if less.holds(less.plan(config, change.training, work))), None)
    anew = fitting(config, training, work, less)
    if kept:
        advice = f"start again with {kept.words} to resume"
    elif anew:
        advice = f"begin the run anew with {anew[0].words}"
    else:
        advice = "train fewer blocks, or use a device with more memory"
    where = "The GPU's memory" if has_own_memory(ranks.device.type) else "RAM"
    return MemoryRanOut(
        f"{where} ran out, although the plan was about {gigabytes(plan.device_bytes)} GB: other programs may use too "
        f"much of it. The last save is kept. Close other programs, or {advice}."
    )


def _may_resume(change: MemoryChange, training: TrainingConfig, work: Workload, ranks: Ranks) -> bool:
    """Whether a run can be resumed with the change."""
    if not go_together(change.training, ranks.count, ranks.device):
        return False
    fields = (field.name for field in dataclasses.fields(training))
    changed = {name for name in fields if getattr(change.training, name) != getattr(training, name)}
    return change.work == work and changed <= set(MAY_CHANGE)
