"""A run's memory plan: stated, kept in the run folder, and asked how several processes train together."""

from __future__ import annotations

import dataclasses

from ..accelerator import has_own_memory
from ..activations import Workload
from ..config import ModelConfig
from ..fit import Room, available_memory, computer_memory, free_memory, keeping_what_fits, refuse_if_too_much
from ..parallel import Ranks
from ..plan import Plan
from ..tiny.words import CAPTION_DIM
from ..training_config import TrainingConfig
from .data import image_side
from .recipe import Recipe

MAX_CAPTION = 512
"""Tokens of the longest caption that Z-Image's text encoder gives."""
_MAX_WORDS = 32


def workload(recipe: Recipe, config: ModelConfig, parts: int = 1) -> Workload:
    """A process's largest micro-batch, of which there are `parts` to one of the recipe's: no bucket is larger than the
    square, and no caption longer than the encoder's limit."""
    multiple = config.size_multiple
    side = max(multiple, image_side(recipe, config) // multiple * multiple)
    tokens = _MAX_WORDS if config.caption_dim == CAPTION_DIM else MAX_CAPTION
    return Workload(max(1, recipe.data.batch_size // parts), side, side, tokens)


def planned(recipe: Recipe, config: ModelConfig, ranks: Ranks, limit: int | None = None) -> tuple[Plan, TrainingConfig]:
    """The plan of this process, and the training's configuration with "auto" and -1 decided.

    Replicas ("ddp") communicate least, and are chosen where they fit.

    Args:
        recipe: of the run.
        config: of the L2P model.
        ranks: the processes of the run.
        limit: bytes of the device's memory; None takes what is free on a GPU, and all that a computer without one has.

    Raises:
        ValueError: if the run cannot fit the device or the computer, with the change that would make it fit.
    """
    training = recipe.training
    work = workload(recipe, config, ranks.part(training.accumulate, recipe.data.batch_size)[1])
    kind = ranks.device.type
    memory = computer_memory() // ranks.on_machine
    free = limit or free_memory(ranks.device)
    room = Room(free or memory, memory if has_own_memory(kind) else None, kind, ranks.count)
    if ranks.count > 1 and training.parallel == "auto":
        replicated = dataclasses.replace(training, parallel="ddp")
        fits = room.holds(room.plan(config, replicated, work))
        training = replicated if fits else dataclasses.replace(training, parallel="fsdp")
    refuse_if_too_much(config, training, work, room)
    # What is not needed shall not push others' memory out to the disk.
    spare = dataclasses.replace(room, device=free or min(memory, available_memory() // ranks.on_machine))
    training = keeping_what_fits(config, training, work, spare)
    return room.plan(config, training, work), training
