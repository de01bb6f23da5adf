"""The trained weights with their optimisers and averages.

Two independent choices make up a run: the place where weights are optimised (`on_device`, `offload`), and when
gradients become steps (`stepping`, `in_backward`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..distributed.sharding import local
from ..sources.source import Source
from ..training_config import TrainingConfig
from . import adamw
from .offload import InRam
from .on_device import OnDevice


class TrainedWeights:
    """float32 weights, moments and averages.

    Args:
        place: where they are.
        config: of the training.
        source: of the model.

    Attributes:
        vectors: the names of the weights with one dimension: half of all weights, almost none of their elements.
        step: number of steps made before the current one.
    """

    def __init__(self, place: OnDevice | InRam, config: TrainingConfig, source: Source):
        self.place, self.config = place, config
        self.masters = place.masters
        self.vectors = [name for name, master in self.masters.items() if master.ndim == 1]
        groups = [list(self.masters)]
        if config.steps_in_backward:
            # One optimiser for each of the others: a common one would look at all weights at every step.
            groups = [self.vectors, *([name] for name in self.masters if name not in self.vectors)]
        self.optimiser_of: dict[str, torch.optim.Optimizer] = {}
        for names in filter(None, groups):
            optimiser = adamw.make({name: self.masters[name] for name in names}, config, source)
            self.optimiser_of |= dict.fromkeys(names, optimiser)
        self.optimisers = list(dict.fromkeys(self.optimiser_of.values()))
        averaged = self.masters if config.ema_decay else {}
        self.averages = {name: master.detach().clone() for name, master in averaged.items()}
        self.step = 0

    def state(self) -> dict[str, Tensor]:
        """All tensors of a save, by name; loading fills these tensors in place and then calls `resumed`."""
        state = {f"parameter.{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"average.{name}": average for name, average in self.averages.items()}
        for name, master in self.masters.items():
            moments = adamw.moments(self.optimiser_of[name], master)
            state |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        return state

    def resumed(self, step: int) -> None:
        """Resume from tensors that have been filled in, after `step` steps."""
        self.set_step(self.masters, step)
        self.place.renew(self.place.renewed(self.masters))

    def begin_at(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights, and their averages, before the first step."""
        for name, weight in weights.items():
            for own in (self.masters[name].detach(), self.averages.get(name)):
                if own is not None:
                    own.copy_(weight)
        self.place.renew(self.place.renewed({name: self.masters[name] for name in weights}))

    def begin(self, step: int, lr: float) -> None:
        """Called before a step's first backward pass.

        Args:
            step: steps made so far.
            lr: of this step, before each group's factor.
        """
        self.step = step
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"]

    def set_step(self, names: Iterable[str], step: int) -> None:
        """Set the number of steps that the bias correction of these weights' moments assumes."""
        for name in names:
            adamw.set_step(self.optimiser_of[name], self.masters[name], step)

    def average(self, names: Collection[str], unless: Tensor | None = None) -> None:
        """Move averages towards the weights, unless this scalar beside them is 1 rather than 0."""
        if not self.averages or not names:
            return
        # Lower at first, or the averages would be mostly the untrained initialisation.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averages = [local(self.averages[name]) for name in names]
        masters = [local(self.masters[name].detach()) for name in names]
        if unless is None:
            torch._foreach_lerp_(averages, masters, 1 - decay)
        else:
            for average, master in zip(averages, masters, strict=True):
                average.lerp_(master, (1 - decay) * (1 - unless))

    def drop_gradients(self) -> None:
        """Forget them."""
        for master in self.masters.values():
            master.grad = None
