"""Trained weights stepped in the middle of the backward pass, each as soon as its gradient is complete.

Gradients never pile up then: of a model whose trained weights are float32 they are as large as these, and all there at
the end of the backward pass otherwise. torch calls a hook when a weight's gradient is complete; no later part of the
backward pass reads that weight any more.

Clipping needs the norm of all gradients, which is not known yet: each weight's gradient is scaled down to `clip_norm`
by itself. Where the total is within `clip_norm`, neither way changes anything; above it this way clips less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

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
            self._listen(name, parameter)

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        if not self.steps_early:
            return super()._optimisers()
        # One for each: a common one would look at all weights whenever one is stepped.
        return {name: adamw.make({name: master}, self.config) for name, master in self.masters.items()}

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._arrived.clear()
        self._norms.clear()

    def clip(self) -> float:
        return total_norm(self._norms) if self.steps_early else super().clip()

    @torch.no_grad()
    def step(self) -> None:
        """Finish the step for weights that had no gradient."""
        rest = self.masters.keys() - self._arrived
        self._set_step(rest, self._step + 1)
        self._average(rest)

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
        norm = float(torch.linalg.vector_norm(gradient))
        if norm > self.config.clip_norm:
            gradient.mul_(self.config.clip_norm / norm)
        self._norms.append(norm)
        # From the first gradient on that is no number nothing changes any more; the trainer stops after this pass.
        master.grad = gradient
        if math.isfinite(total_norm(self._norms)):
            self.optimiser_of[name].step()
            self._average([name])
        master.grad = None

    def _average(self, names: Iterable[str]) -> None:
        for name in names if self.averages else ():
            self.averages[name].lerp_(self.masters[name], 1 - self._decay())
