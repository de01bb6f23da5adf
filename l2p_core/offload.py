"""Trained weights, optimiser states and averages in CPU memory, stepped there as gradients arrive.

The device holds a working copy of each weight, bfloat16 under "bf16", and gradients of one layer at a time: as soon as
one is complete it is taken away. With one micro-batch a step the weight is stepped at once (see `early`) and its
working copy renewed. With several, gradients are summed in CPU memory, clipped by their total, and all weights are
stepped after the last. Where blocks are streamed, working copies of their linear layers lie in CPU memory too and come
to the device with their block (see `trained_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .accelerator import has_own_memory, pinned
from .early import EarlyWeights
from .trained_linear import TrainedLinear
from .training_config import TrainingConfig

CPU = torch.device("cpu")


class OffloadedWeights(EarlyWeights):
    """float32 weights, moments and averages in CPU memory, and working copies in the model.

    Args:
        parameters: those of the model that train, by name, in float32 on any device; they become the working copies.
        config: of the training.
        device: to compute on.
        streamed: by the names of their weights, layers whose working copies are streamed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: TrainingConfig,
        device: torch.device,
        streamed: Mapping[str, TrainedLinear],
    ):
        self.steps_early = config.accumulate == 1
        self._device = device
        self._streamed = streamed
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        largest = max(parameter.numel() for parameter in parameters.values())
        # Only pinned memory is copied to and from a GPU at full speed.
        staged = has_own_memory(device.type)
        self._staging = pinned((largest,), self._dtype) if staged else None
        super().__init__(parameters, config)
        self._sums: dict[str, Tensor] = {}

    def _own(self) -> dict[str, Tensor]:
        return {name: self._master(name, parameter) for name, parameter in self.parameters.items()}

    def _master(self, name: str, parameter: Tensor) -> Tensor:
        """A weight in CPU memory, with its working copy where that belongs, and nothing of it anywhere else: a device
        never holds all of them in float32."""
        if name in self._streamed:
            parameter.data = parameter.detach().to(CPU, torch.float32)
            self._streamed[name].working.fill(parameter.detach())
            return parameter.detach()
        master = parameter.detach().to(CPU, torch.float32, copy=True)
        parameter.data = master.to(self._device, self._dtype, copy=True)
        return master

    def _listen(self, name: str, parameter: Tensor) -> None:
        if name in self._streamed:
            self._streamed[name].take = partial(self._take, name)
        else:
            super()._listen(name, parameter)

    def resumed(self, step: int) -> None:
        super().resumed(step)
        self._renew(self.masters)

    def clip(self) -> float:
        if not self.steps_early:
            for name in self._arrived:
                self.masters[name].grad = self._sums[name]
        return super().clip()

    @torch.no_grad()
    def step(self) -> None:
        if not self.steps_early:
            for optimiser in self.optimisers:
                optimiser.step()
            self._renew({name: self.masters[name] for name in self._arrived})
            self._average(self._arrived)
            self.drop_gradients()
        super().step()
        self._renew({name: self.masters[name] for name in self._arrived & self._waiting.keys()})

    @contextmanager
    def averages_in_place(self) -> Iterator[None]:
        self._renew(self.averages)
        try:
            yield
        finally:
            if self.averages:
                self._renew(self.masters)

    @torch.no_grad()
    def _renew(self, weights: Mapping[str, Tensor]) -> None:
        """Let working copies be these weights."""
        for name, weight in weights.items():
            if name in self._streamed:
                self._streamed[name].working.fill(weight)
                continue
            working = self.parameters[name].data
            if self._staging is not None:
                weight = self._staging[: weight.numel()].view(weight.shape).copy_(weight)
            working.copy_(weight)

    @torch.no_grad()
    def _take(self, name: str, gradient: Tensor) -> None:
        if self.steps_early:
            super()._take(name, gradient)
            return
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self.masters[name])
        gradient = self._to_cpu(gradient)
        if name in self._arrived:
            self._sums[name] += gradient
        else:
            self._sums[name].copy_(gradient)
        self._arrived.add(name)

    def _waited(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        assert parameter.grad is not None
        self.masters[name].grad = parameter.grad.to(CPU, torch.float32)
        parameter.grad = None
        return super()._waited(name)

    def _step_one(self, name: str, gradient: Tensor) -> None:
        super()._step_one(name, self._to_cpu(gradient).float())
        self._renew({name: self.masters[name]})

    def _to_cpu(self, gradient: Tensor) -> Tensor:
        """It in CPU memory, good until the next one is asked for."""
        if self._staging is None:
            return gradient
        return self._staging[: gradient.numel()].view(gradient.shape).copy_(gradient)
