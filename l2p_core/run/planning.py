"""A run's memory plan: stated, kept in the run folder, and asked how several processes train together."""

from __future__ import annotations

import dataclasses

import torch

from ..config import ModelConfig
from ..device.accelerator import has_own_memory
from ..device.system_memory import available_memory, computer_memory, free_memory_and_swap
from ..distributed.ranks import Ranks
from ..distributed.sharding import check_shards
from ..distributed.together import go_together
from ..memory.activations import Workload
from ..memory.fit import Change, Room, changes, fitting, free_memory, keeping_what_fits, refuse_if_too_much
from ..memory.plan import Plan, gigabytes
from ..tiny.bundled import is_tiny
from ..training.state import MAY_CHANGE
from ..training_config import TrainingConfig
from .data import image_side
from .recipe import Recipe

MAX_CAPTION = 512
"""Tokens of the longest caption that Z-Image's text encoder gives."""
_MAX_WORDS = 32
_MOST_PIXELS = 1 << 40
"""Of a micro-batch: beyond it sizes in bytes no longer fit the numbers that torch counts in."""
_LESS = 0.85
"""Share of what was planned that a run may need after its memory ran out."""


class MemoryRanOut(RuntimeError):
    """A device's memory ran out although the plan had room; the message says what to change."""


def workload(recipe: Recipe, config: ModelConfig, parts: int = 1) -> Workload:
    """A process's largest micro-batch, of which there are `parts` to one of the recipe's: no bucket is larger than the
    square, and no caption longer than the encoder's limit."""
    multiple = config.size_multiple
    side = max(multiple, image_side(recipe, config) // multiple * multiple)
    tokens = _MAX_WORDS if recipe.data.kind != "folder" or is_tiny(config) else MAX_CAPTION
    batch = max(1, recipe.data.batch_size // parts)
    if batch * side * side > _MOST_PIXELS:
        raise ValueError(
            f"A micro-batch of {batch} images of {side} x {side} pixels is more than any device holds: lower [data] "
            "batch_size or size."
        )
    return Workload(batch, side, side, tokens)


def planned(recipe: Recipe, config: ModelConfig, ranks: Ranks, limit: int | None = None) -> tuple[Plan, TrainingConfig]:
    """The plan of this process, and the training's configuration with "auto" and -1 decided.

    Replicas ("ddp") communicate least, and are chosen where they fit.

    Args:
        recipe: of the run.
        config: of the L2P model.
        ranks: the processes of the run.
        limit: bytes of the device's memory; None takes what is free, on a GPU or, without one, of RAM and swap.

    Raises:
        ValueError: if the run cannot fit the device or the computer, with the change that would make it fit, or has to
            be cut among processes, which something that it asks for is not possible with.
    """
    training, work = recipe.training, _work(recipe, config, ranks)
    kind = ranks.device.type
    memory = free_memory_and_swap() // ranks.on_machine
    free = limit or free_memory(ranks.device)
    room = Room(free or memory, memory if has_own_memory(kind) else None, kind, ranks.count)
    training = decided(config, training, work, room)
    refuse_if_too_much(config, training, work, room)
    # What is not needed shall not push others' memory out to the disk.
    spare = dataclasses.replace(room, device=free or min(memory, available_memory() // ranks.on_machine))
    training = keeping_what_fits(config, training, work, spare)
    return room.plan(config, training, work), training


def decided(config: ModelConfig, training: TrainingConfig, work: Workload, room: Room) -> TrainingConfig:
    """The training with "auto" decided: replicas, which communicate least, where they fit.

    Raises:
        ValueError: as `sharding.check_shards`, where they do not.
    """
    if room.processes == 1 or training.parallel != "auto":
        return training
    replicated = dataclasses.replace(training, parallel="ddp")
    if room.holds(room.plan(config, replicated, work)):
        return replicated
    check_shards(training, torch.device(room.device_type))
    return dataclasses.replace(training, parallel="fsdp")


def after_running_out(recipe: Recipe, config: ModelConfig, ranks: Ranks) -> MemoryRanOut:
    """What to say, and to change, when a run that had room by its plan has none.

    Args:
        recipe: of the run, its training as it was decided.
        config: of the L2P model.
        ranks: the processes of the run.
    """
    training, work = recipe.training, _work(recipe, config, ranks)
    room = Room(0, computer_memory() // ranks.on_machine, ranks.device.type, ranks.count)
    plan = room.plan(config, training, work)
    less = dataclasses.replace(room, device=round(_LESS * plan.device_bytes))
    going_on = (change for change in changes(training, work) if _goes_on(change, training, work, ranks))
    kept = next((change for change in going_on if less.holds(less.plan(config, change.training, work))), None)
    anew = fitting(config, training, work, less)
    if kept:
        advice = f"start again with {kept.words}, and it goes on there"
    elif anew:
        advice = f"begin anew with {anew[0].words}"
    else:
        advice = "train fewer blocks, or on a device with more memory"
    where = "The GPU's memory" if has_own_memory(ranks.device.type) else "RAM"
    return MemoryRanOut(
        f"{where} ran out, though the run was planned to need about {gigabytes(plan.device_bytes)} GB: other "
        f"programs may hold too much of it. What was saved last is kept. Close them, or {advice}."
    )


def _goes_on(change: Change, training: TrainingConfig, work: Workload, ranks: Ranks) -> bool:
    """Whether a run may go on with the change."""
    if not go_together(change.training, ranks.count, ranks.device):
        return False
    fields = (field.name for field in dataclasses.fields(training))
    changed = {name for name in fields if getattr(change.training, name) != getattr(training, name)}
    return change.work == work and changed <= set(MAY_CHANGE)


def _work(recipe: Recipe, config: ModelConfig, ranks: Ranks) -> Workload:
    return workload(recipe, config, ranks.part(recipe.training.accumulate, recipe.data.batch_size)[1])
