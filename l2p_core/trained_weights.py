"""The weights that train, with their optimiser and averages: on the device, stepped when all gradients are there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from . import adamw, sharding
from .sharding import local, whole
from .training_config import TrainingConfig

_PADS = ("x_pad_token", "cap_pad_token")


class TrainedWeights:
    """float32 weights, moments and averages where the model is computed.

    Args:
        parameters: those of the model that train, by name, in float32.
        config: of the training.
    """

    steps_early = False
    """Whether weights change during the backward pass already, so that a loss must be looked at before it."""

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig):
        self.parameters = dict(parameters)
        self.config = config
        self.masters = self._own()
        self.optimiser = adamw.make(self.masters, config)
        averaged = self.masters if config.ema_decay else {}
        self.averages = {name: master.detach().clone() for name, master in averaged.items()}

    def _own(self) -> dict[str, Tensor]:
        """What is optimised, averaged and saved."""
        return self.parameters

    def state(self) -> dict[str, Tensor]:
        """Everything a save holds, by name; loading fills these very tensors, and calls `resumed`."""
        state = {f"parameter.{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"average.{name}": average for name, average in self.averages.items()}
        for name, master in self.masters.items():
            moments = adamw.moments(self.optimiser, master)
            state |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        return state

    def resumed(self, step: int) -> None:
        """Go on from what has been filled in, made by so many steps."""
        for master in self.masters.values():
            adamw.set_step(self.optimiser, master, step)

    def begin(self, step: int, lr: float) -> None:
        """Before a step's first backward pass.

        Args:
            step: how many have been made.
            lr: of this one, before each group's factor.
        """
        self._step = step
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["scale"]

    def clip(self) -> float:
        """After the last backward pass: the gradient's norm, before it is scaled down to `clip_norm`; all processes
        call this."""
        for name in _PADS:
            # A token that no sample needed stays as it is, without weight decay. Several processes give each a
            # gradient always, of zeros then.
            token = self.parameters.get(name)
            if token is not None and token.grad is not None and not bool(whole(token.grad).any()):
                token.grad = None
        return float(whole(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip_norm)))

    def step(self) -> None:
        """Change the weights by the gradients, and the averages after them."""
        without = [master for master in self.masters.values() if master.grad is None]
        self.optimiser.step()
        for master in without:
            adamw.set_step(self.optimiser, master, self._step + 1)
        self.drop_gradients()
        if self.averages:
            averages = [local(average) for average in self.averages.values()]
            masters = [local(master.detach()) for master in self.masters.values()]
            torch._foreach_lerp_(averages, masters, 1 - self._decay())

    def drop_gradients(self) -> None:
        """Forget them."""
        self.optimiser.zero_grad()

    @contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """Within it the model computes with the averages."""
        if not self.averages:
            yield
            return
        if sharding.is_sharded(next(iter(self.masters.values()))):
            # FSDP2 keeps the memory of its parameters to itself, so that only numbers can be exchanged.
            sharding.exchange(self.masters, self.averages)
            try:
                yield
            finally:
                sharding.exchange(self.masters, self.averages)
            return
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, average in self.averages.items():
            self.parameters[name].data = average
        try:
            yield
        finally:
            for name, data in own.items():
                self.parameters[name].data = data

    def _decay(self) -> float:
        """Of the averages: a young one would otherwise be mostly the untrained initialisation."""
        return min(self.config.ema_decay, (1 + self._step) / (10 + self._step))


def total_norm(norms: list[float]) -> float:
    """The norm of tensors that have these."""
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if all(map(math.isfinite, norms)) else math.nan
