"""Stepping trained weights during the backward pass, each as soon as its gradient is complete.

Gradients then never accumulate; otherwise, for float32 weights, they are as large as the weights and all in memory at
the end of the backward pass. torch calls a hook when a weight's gradient is complete; no later part of the backward
pass reads that weight. Vectors, which are half of all weights and almost none of their elements, are stepped together
after the backward pass: stepping each of them separately would cost more than their gradients' memory is worth.

Clipping needs the norm of all gradients, which is not yet known, so each weight's gradient is scaled down to
`clip_norm` by itself. If the total is within `clip_norm`, neither way changes anything; above it this way clips less.

Nothing here waits for the device: norms stay tensors, and from the first non-finite loss or gradient on, a flag beside
the weights keeps the optimiser from changing anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..sources.source import Source
from ..training_config import TrainingConfig
from . import adamw
from .weights import TrainedWeights


class EarlyWeights(TrainedWeights):
    """float32 weights, moments and averages on the model's device, for one micro-batch per step."""

    steps_early = True
    """Whether weights change during the backward pass; a subclass may sum several micro-batches instead."""

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig, source: Source):
        super().__init__(parameters, config, source)
        self._arrived: set[str] = set()
        self._norms: list[Tensor] = []
        self._broken = torch.zeros((), device=next(iter(self.masters.values())).device)
        for name, parameter in self.parameters.items():
            if name not in self._waiting:
                self._listen(name, parameter)

    @cached_property
    def _waiting(self) -> dict[str, Tensor]:
        """The parameters that are stepped together at the end."""
        return {
            name: parameter for name, parameter in self.parameters.items() if self.steps_early and parameter.ndim == 1
        }

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        if not self.steps_early:
            return super()._optimisers()
        # One optimiser for each of the others: a common one would look at all weights at every step.
        groups = [list(self._waiting)] if self._waiting else []
        groups += [[name] for name in self.masters if name not in self._waiting]
        found: dict[str, torch.optim.Optimizer] = {}
        for names in groups:
            optimiser = adamw.make({name: self.masters[name] for name in names}, self.config, self.source)
            found |= dict.fromkeys(names, optimiser)
        return found

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._arrived.clear()
        self._norms.clear()
        self._broken.zero_()

    @torch.no_grad()
    def losses(self, errors: Tensor) -> None:
        if self.steps_early:
            self._note(errors.detach())

    def clip(self) -> Tensor:
        return self._clip([name for name, parameter in self._waiting.items() if parameter.grad is not None])

    @torch.no_grad()
    def _clip(self, waited: list[str]) -> Tensor:
        """`clip`, with `waited` the waiting weights that have a gradient."""
        if not self.steps_early:
            return super().clip()
        self._arrived.update(waited)
        if waited:
            gradients = [gradient for name in waited if (gradient := self.masters[name].grad) is not None]
            norms = torch.stack(torch._foreach_norm(gradients))
            self._norms.append(norms)
            torch._foreach_mul_(gradients, list(self._factor(norms).unbind()))
        return torch.linalg.vector_norm(torch.cat([norm.flatten() for norm in self._norms]))

    @torch.no_grad()
    def step(self) -> None:
        """Step the waiting weights, and finish the step for those that had no gradient."""
        without = self.masters.keys() - self._arrived
        waited = self._arrived & self._waiting.keys()
        for optimiser in {self.optimiser_of[name] for name in waited}:
            optimiser.step()
        self._set_step(without, self._step + 1)
        self._average(without | waited)
        self.drop_gradients()

    def _listen(self, name: str, parameter: Tensor) -> None:
        """Have a weight's gradients taken when they are complete."""
        # Weak: torch keeps hooks where the garbage collector does not look, so a hook that holds this object would keep
        # its weights, on the device and in RAM, until the process ends.
        complete = weakref.WeakMethod(self._complete)

        def completed(parameter: Tensor) -> None:
            call = complete()
            assert call is not None, "a gradient arrived after its trainer was deleted"
            call(name, parameter)

        parameter.register_post_accumulate_grad_hook(completed)

    def _complete(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        self._take(name, gradient)

    def _take(self, name: str, gradient: Tensor) -> None:
        """Consume the gradient that a backward pass has completed."""
        self._arrived.add(name)
        self._step_one(name, gradient)

    @torch.no_grad()
    def _step_one(self, name: str, gradient: Tensor) -> None:
        master, norm = self.masters[name], torch.linalg.vector_norm(gradient)
        self._norms.append(norm)
        self._note(norm)
        # Python can read what a CPU has computed, and skip a pass over the gradient.
        if not norm.is_cpu or norm > self.config.clip_norm:
            gradient.mul_(self._factor(norm))
        master.grad = gradient
        adamw.step_unless(self.optimiser_of[name], self._broken)
        self._average([name], 1 - self._broken)
        master.grad = None

    def _factor(self, norm: Tensor) -> Tensor:
        """The factor that scales gradients of these norms down to `clip_norm`."""
        return (self.config.clip_norm / norm).clamp(max=1)

    def _note(self, values: Tensor) -> None:
        """Disable the rest of this step if one of these values is not finite."""
        self._broken.copy_(torch.maximum(self._broken, 1 - values.isfinite().all().float()))

    def _average(self, names: Iterable[str], share: Tensor | float = 1.0) -> None:
        """Move averages towards the weights, by this share (0 or 1) of the usual amount."""
        for name in names if self.averages else ():
            self.averages[name].lerp_(self.masters[name], (1 - self._decay()) * share)
