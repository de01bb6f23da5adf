"""Whether weights are worth saving: a save replaces a good one, and a delta is what users get.

Finite weights alone prove little: a step with a learning rate of 1 leaves finite weights from which every further step
overflows. The model is therefore also evaluated on the images that it has seen last.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..distributed.sharding import local
from ..ops.finite import is_finite
from .trainer import Trainer

NOTHING = 2.0
"""The highest mean cost per pixel of predicting zero velocity: noise has variance 1, pixels are within [-1, 1]."""
RUINED = 10.0
"""How many times worse than that, and than at the start, a model must be for its weights to be worthless."""


def all_finite(trainer: Trainer) -> bool:
    """Whether weights, averages and moments are finite in every process; all processes call this."""
    tensors = (local(tensor) for tensor in trainer.state().values())
    floats = (tensor for tensor in tensors if tensor.is_floating_point())
    return not trainer.ranks.any(not all(map(is_finite, floats)))


class Flaw(NamedTuple):
    """What is wrong with weights, as a clause, and whether further steps cannot repair it."""

    words: str
    for_good: bool


def flaw(trainer: Trainer, first_loss: float) -> Flaw | None:
    """What is wrong with a trainer's weights; None if training can continue from them. All processes call this.

    Args:
        trainer: after at least one step.
        first_loss: of the run's first step.
    """
    if not all_finite(trainer):
        return Flaw("some weights are no longer finite numbers", True)
    loss = trainer.loss_now()
    if not math.isfinite(loss):
        return Flaw("the loss of the same images is no longer a finite number", True)
    if loss > RUINED * max(NOTHING, first_loss):
        return Flaw(f"the loss of the same images is {loss:.4g}, above that of a model that predicts nothing", False)
    return None
