"""The trained weights with their optimiser and averages: on the device, stepped when all gradients are complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed import sharding
from ..distributed.sharding import local, whole
from ..sources.source import Source
from ..training_config import TrainingConfig
from . import adamw


class TrainedWeights:
    """float32 weights, moments and averages on the model's device.

    Args:
        parameters: the model's trained parameters by name, in float32.
        config: of the training.
        source: of the model.
        shared_pads: weights that not every batch uses but that always have a gradient, because several processes
            average it.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: TrainingConfig,
        source: Source,
        shared_pads: Sequence[str] = (),
    ):
        self.parameters = dict(parameters)
        self._shared_pads = shared_pads
        self.config, self.source = config, source
        self.masters = self._own()
        self.optimiser_of = self._optimisers()
        self.optimisers = list(dict.fromkeys(self.optimiser_of.values()))
        averaged = self.masters if config.ema_decay else {}
        self.averages = {name: master.detach().clone() for name, master in averaged.items()}

    def _own(self) -> dict[str, Tensor]:
        """The tensors that are optimised, averaged and saved."""
        return self.parameters

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimiser of each weight."""
        return dict.fromkeys(self.masters, adamw.make(self.masters, self.config, self.source))

    def state(self) -> dict[str, Tensor]:
        """All tensors of a save, by name; loading fills these very tensors and then calls `resumed`."""
        state = {f"parameter.{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"average.{name}": average for name, average in self.averages.items()}
        for name, master in self.masters.items():
            moments = adamw.moments(self.optimiser_of[name], master)
            state |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        return state

    def resumed(self, step: int) -> None:
        """Resume from tensors that have been filled in, after `step` steps."""
        self._set_step(self.masters, step)

    def begin(self, step: int, lr: float) -> None:
        """Called before a step's first backward pass.

        Args:
            step: steps made so far.
            lr: of this step, before each group's factor.
        """
        self._step = step
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"]

    def losses(self, errors: Tensor) -> None:
        """Called before each backward pass, with its samples' errors (B,), on the device."""

    def clip(self) -> Tensor:
        """Called after the last backward pass: scales gradients down to `clip_norm` and returns their norm before that,
        as a scalar on the device; all processes call this."""
        return whole(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip_norm))

    def needed(self) -> dict[str, Tensor]:
        """Whether any sample needed each of the pad tokens that have a gradient because processes share it."""
        tokens = {name: self.parameters[name] for name in self._shared_pads if name in self.parameters}
        return {name: whole(token.grad).any() for name, token in tokens.items() if token.grad is not None}

    def forget(self, names: Iterable[str]) -> None:
        """Exclude weights that no sample needed from the step, including its weight decay."""
        for name in names:
            self.parameters[name].grad = None

    def step(self) -> None:
        """Update the weights by the gradients, then the averages."""
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
        """Within the block the model computes with the averages."""
        if not self.averages:
            yield
            return
        if sharding.is_sharded(next(iter(self.masters.values()))):
            # FSDP2 does not share the memory of its parameters, so only elements can be exchanged.
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
        """Decay of the averages: lower at first, or they would be mostly the untrained initialisation."""
        return min(self.config.ema_decay, (1 + self._step) / (10 + self._step))
