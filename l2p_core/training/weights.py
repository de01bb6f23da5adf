"""The weights that train, with their optimiser and averages: on the device, stepped when all gradients are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed import sharding
from ..distributed.sharding import local, whole
from ..training_config import TrainingConfig
from . import adamw


class TrainedWeights:
    """float32 weights, moments and averages where the model is computed.

    Args:
        parameters: those of the model that train, by name, in float32.
        config: of the training.
        shared_pads: weights that not every batch uses and that have a gradient always, because several processes
            average it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig, shared_pads: Sequence[str] = ()):
        self.parameters = dict(parameters)
        self._shared_pads = shared_pads
        self.config = config
        self.masters = self._own()
        self.optimiser_of = self._optimisers()
        self.optimisers = list(dict.fromkeys(self.optimiser_of.values()))
        averaged = self.masters if config.ema_decay else {}
        self.averages = {name: master.detach().clone() for name, master in averaged.items()}

    def _own(self) -> dict[str, Tensor]:
        """What is optimised, averaged and saved."""
        return self.parameters

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Of each weight, the optimiser that it belongs to."""
        return dict.fromkeys(self.masters, adamw.make(self.masters, self.config))

    def state(self) -> dict[str, Tensor]:
        """Everything a save holds, by name; loading fills these very tensors, and calls `resumed`."""
        state = {f"parameter.{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"average.{name}": average for name, average in self.averages.items()}
        for name, master in self.masters.items():
            moments = adamw.moments(self.optimiser_of[name], master)
            state |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        return state

    def resumed(self, step: int) -> None:
        """Go on from what has been filled in, made by so many steps."""
        self._set_step(self.masters, step)

    def begin(self, step: int, lr: float) -> None:
        """Before a step's first backward pass.

        Args:
            step: how many have been made.
            lr: of this one, before each group's factor.
        """
        self._step = step
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"]

    def losses(self, errors: Tensor) -> None:
        """Before each backward pass: its samples' errors (B,), on the device."""

    def clip(self) -> Tensor:
        """After the last backward pass: the gradient's norm, before it is scaled down to `clip_norm`, as a scalar that
        nobody waits for; all processes call this."""
        return whole(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip_norm))

    def needed(self) -> dict[str, Tensor]:
        """Of the pad tokens that have a gradient because processes share it, whether any sample needed them."""
        tokens = {name: self.parameters[name] for name in self._shared_pads if name in self.parameters}
        return {name: whole(token.grad).any() for name, token in tokens.items() if token.grad is not None}

    def forget(self, names: Iterable[str]) -> None:
        """Leave weights that no sample needed as they are, without weight decay."""
        for name in names:
            self.parameters[name].grad = None

    def step(self) -> None:
        """Change the weights by the gradients, and the averages after them."""
        without = [name for name, master in self.masters.items() if master.grad is None]
        for optimiser in self.optimisers:
            optimiser.step()
        self._set_step(without, self._step + 1)
        self.drop_gradients()
        if self.averages:
            averages = [local(average) for average in self.averages.values()]
            masters = [local(master.detach()) for master in self.masters.values()]
            torch._foreach_lerp_(averages, masters, 1 - self._decay())

    def drop_gradients(self) -> None:
        """Forget them."""
        for master in self.masters.values():
            master.grad = None

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

    def _set_step(self, names: Iterable[str], step: int) -> None:
        for name in names:
            adamw.set_step(self.optimiser_of[name], self.masters[name], step)

    def _decay(self) -> float:
        """Of the averages: a young one would otherwise be mostly the untrained initialisation."""
        return min(self.config.ema_decay, (1 + self._step) / (10 + self._step))
