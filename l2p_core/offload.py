"""Trained weights, optimiser states and averages in CPU memory, stepped there as gradients arrive.

The device holds a working copy of each weight, bfloat16 under "bf16", and gradients of one layer at a time: torch calls
a hook when a weight's gradient is complete, in the middle of the backward pass, and the hook takes it away. With one
micro-batch a step the weight is stepped at once and its working copy renewed, which no later part of the backward pass
reads any more. With several, gradients are summed in CPU memory and all weights are stepped after the last.

Clipping needs the norm of all gradients, which is not known while weights are stepped early: then each weight's
gradient is scaled down to `clip_norm` by itself. Where the total is within `clip_norm`, neither way changes anything;
above it this way clips less. Summed gradients are clipped by their total, as without offloading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from . import adamw
from .trained_weights import TrainedWeights, total_norm
from .training_config import TrainingConfig

CPU = torch.device("cpu")


class OffloadedWeights(TrainedWeights):
    """float32 weights, moments and averages in CPU memory, and working copies in the model.

    Args:
        parameters: those of the model that train, by name, in float32 on any device; they become the working copies.
        config: of the training.
        device: to compute on.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig, device: torch.device):
        self.steps_early = config.accumulate == 1
        self._device = device
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        largest = max(parameter.numel() for parameter in parameters.values())
        # Only pinned memory is copied to and from a GPU at full speed.
        self._staging = torch.empty(largest, dtype=self._dtype, pin_memory=True) if device.type == "cuda" else None
        super().__init__(parameters, config)
        self._sums: dict[str, Tensor] = {}
        self._arrived: set[str] = set()
        self._norms: list[float] = []
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _own(self) -> dict[str, Tensor]:
        masters = {}
        for name, parameter in self.parameters.items():
            # One after the other, each freeing where it came from: a device never holds all of them in float32.
            masters[name] = parameter.detach().to(CPU, torch.float32, copy=True)
            parameter.data = masters[name].to(self._device, self._dtype, copy=True)
        return masters

    def resumed(self, step: int) -> None:
        super().resumed(step)
        self._renew(self.masters)

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._arrived.clear()
        self._norms.clear()

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        """Take the gradient that a backward pass has completed off the device."""
        assert parameter.grad is not None
        gradient = self._to_cpu(parameter.grad)
        parameter.grad = None
        if self.steps_early:
            self._arrived.add(name)
            self._step_one(name, gradient.float())
        elif name in self._arrived:
            self._sums[name] += gradient
        else:
            self._arrived.add(name)
            if name not in self._sums:
                self._sums[name] = torch.empty_like(self.masters[name])
            self._sums[name].copy_(gradient)

    def _step_one(self, name: str, gradient: Tensor) -> None:
        master = self.masters[name]
        master.grad = gradient
        self._norms.append(float(torch.nn.utils.clip_grad_norm_([master], self.config.clip_norm)))
        # From the first gradient on that is no number nothing changes any more; the trainer stops after this pass.
        if math.isfinite(total_norm(self._norms)):
            self.optimiser.step()
            self._renew({name: master})
            self._average([name])
        master.grad = None

    def clip(self) -> float:
        if self.steps_early:
            return total_norm(self._norms)
        for name in self._arrived:
            self.masters[name].grad = self._sums[name]
        return super().clip()

    @torch.no_grad()
    def step(self) -> None:
        rest = self.masters.keys() - self._arrived
        if not self.steps_early:
            self.optimiser.step()
            self._renew({name: self.masters[name] for name in self._arrived})
            self._average(self._arrived)
            self.drop_gradients()
        for name in rest:
            adamw.set_step(self.optimiser, self.masters[name], self._step + 1)
        self._average(rest)

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
            working = self.parameters[name].data
            if self._staging is not None:
                weight = self._staging[: weight.numel()].view(weight.shape).copy_(weight)
            working.copy_(weight)

    def _average(self, names: set[str] | list[str]) -> None:
        for name in names if self.averages else ():
            self.averages[name].lerp_(self.masters[name], 1 - self._decay())

    def _to_cpu(self, gradient: Tensor) -> Tensor:
        """It in CPU memory, good until the next one is asked for."""
        if self._staging is None:
            return gradient
        return self._staging[: gradient.numel()].view(gradient.shape).copy_(gradient)
