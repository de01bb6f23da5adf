"""A run's memory plan: stated, kept in the run folder, and asked how several processes train together."""

from __future__ import annotations

import dataclasses

from ..activations import Workload
from ..config import ModelConfig
from ..fit import Room, computer_memory, free_memory, refuse_if_too_much
from ..parallel import Ranks
from ..plan import Plan, plan
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
    """The plan of this process, and the training's configuration with "auto" decided.

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
    if limit is None:
        limit = free_memory(ranks.device) or memory
    room = Room(limit, memory if kind == "cuda" else None)
    if ranks.count > 1 and training.parallel == "auto":
        replicated = dataclasses.replace(training, parallel="ddp")
        found = plan(config, replicated, work, device_type=kind, processes=ranks.count)
        if room.holds(found):
            return found, replicated
        training = dataclasses.replace(training, parallel="fsdp")
    return refuse_if_too_much(config, training, work, room, device_type=kind, processes=ranks.count), training
