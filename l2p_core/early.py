"""Trained weights stepped in the middle of the backward pass, each as soon as its gradient is complete.

Gradients never pile up then: of a model whose trained weights are float32 they are as large as these, and all there at
the end of the backward pass otherwise. torch calls a hook when a weight's gradient is complete; no later part of the
backward pass reads that weight any more. Vectors, which are half of all weights and next to nothing of their numbers,
wait and are stepped together after it: a step of each by itself costs more than their gradients' memory is worth.

Clipping needs the norm of all gradients, which is not known yet: each weight's gradient is scaled down to `clip_norm`
by itself. Where the total is within `clip_norm`, neither way changes anything; above it this way clips less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from . import adamw
from .trained_weights import TrainedWeights, total_norm
from .training_config import TrainingConfig


class EarlyWeights(TrainedWeights):
    """float32 weights, moments and averages where the model is computed, for one micro-batch a step."""

    steps_early = True

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig):
        super().__init__(parameters, config)
        self._arrived: set[str] = set()
        self._norms: list[float] = []
        for name, parameter in self.parameters.items():
            if name not in self._waiting:
                self._listen(name, parameter)

    @cached_property
    def _waiting(self) -> dict[str, Tensor]:
        """Those of the parameters that are stepped together at the end."""
        return {
            name: parameter for name, parameter in self.parameters.items() if self.steps_early and parameter.ndim == 1
        }

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        if not self.steps_early:
            return super()._optimisers()
        # Of the others one for each: a common one would look at all weights whenever one is stepped.
        groups = [list(self._waiting)] if self._waiting else []
        groups += [[name] for name in self.masters if name not in self._waiting]
        found: dict[str, torch.optim.Optimizer] = {}
        for names in groups:
            optimiser = adamw.make({name: self.masters[name] for name in names}, self.config)
            found |= dict.fromkeys(names, optimiser)
        return found

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._arrived.clear()
        self._norms.clear()

    @torch.no_grad()
    def clip(self) -> float:
        if not self.steps_early:
            return super().clip()
        waited = [name for name, parameter in self._waiting.items() if parameter.grad is not None]
        self._arrived.update(waited)
        gradients = [self._waited(name) for name in waited]
        norms = torch.stack(torch._foreach_norm(gradients)).tolist() if gradients else []
        for gradient, norm in zip(gradients, norms, strict=True):
            self._scale(gradient, norm)
        return total_norm(self._norms)

    @torch.no_grad()
    def step(self) -> None:
        """Step the weights that waited, and finish the step for those that had no gradient."""
        without = self.masters.keys() - self._arrived
        waited = self._arrived & self._waiting.keys()
        for optimiser in {self.optimiser_of[name] for name in waited}:
            optimiser.step()
        self._set_step(without, self._step + 1)
        self._average(without | waited)
        self.drop_gradients()

    def _listen(self, name: str, parameter: Tensor) -> None:
        """Have the gradients of a weight taken when they are complete."""
        parameter.register_post_accumulate_grad_hook(partial(self._complete, name))

    def _complete(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        self._take(name, gradient)

    @torch.no_grad()
    def _take(self, name: str, gradient: Tensor) -> None:
        """Use up the gradient that a backward pass has completed."""
        self._arrived.add(name)
        self._step_one(name, gradient)

    def _step_one(self, name: str, gradient: Tensor) -> None:
        master = self.masters[name]
        self._scale(gradient, float(torch.linalg.vector_norm(gradient)))
        # From the first gradient on that is no number nothing changes any more; the trainer stops after this pass.
        master.grad = gradient
        if math.isfinite(total_norm(self._norms)):
            self.optimiser_of[name].step()
            self._average([name])
        master.grad = None

    def _waited(self, name: str) -> Tensor:
        """The gradient of a weight that waits, where it is stepped."""
        gradient = self.masters[name].grad
        assert gradient is not None
        return gradient

    def _scale(self, gradient: Tensor, norm: float) -> None:
        """Clip a gradient of this norm, and take note of it."""
        if norm > self.config.clip_norm:
            gradient.mul_(self.config.clip_norm / norm)
        self._norms.append(norm)

    def _average(self, names: Iterable[str]) -> None:
        for name in names if self.averages else ():
            self.averages[name].lerp_(self.masters[name], 1 - self._decay())
