"""Stepping trained weights during the backward pass, each as soon as its gradient is complete.

Gradients then never accumulate; otherwise, for float32 weights, they are as large as the weights and all in memory at
the end of the backward pass. Vectors are stepped together after the backward pass: stepping each of them separately
would cost more than their gradients' memory is worth.

Clipping needs the norm of all gradients, which is not yet known, so each weight's gradient is scaled down to
`clip_norm` by itself. If the total is within `clip_norm`, neither way changes anything; above it this way clips less.

Nothing here waits for the device: norms stay tensors, and from the first non-finite loss or gradient on, a flag beside
the weights keeps the optimiser from changing anything.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..memory.exchange import Renewed
from . import adamw
from .offload import InRam
from .weights import TrainedWeights


class InBackward:
    """Steps weights during the backward pass of a step's only micro-batch.

    Between `losses` and `clip`, the norms, the flag and the masters belong to the place, which may use them in a
    thread.
    """

    def __init__(self, weights: TrainedWeights):
        self._weights, self._place = weights, weights.place
        self._arrived: set[str] = set()
        self._norms: list[Tensor] = []
        self._broken = torch.zeros((), device=next(iter(weights.masters.values())).device)
        for name, master in weights.masters.items():
            if master.ndim > 1:
                self._place.listen(name, self._take)

    def begin(self) -> None:
        self._arrived.clear()
        self._norms.clear()
        self._broken.zero_()

    def losses(self, errors: Tensor) -> None:
        # A copy, because the backward pass uses the errors at the same time.
        self._place.bring([errors.detach().clone()], self._checked)

    @torch.no_grad()
    def clip(self) -> Tensor:
        masters, vectors = self._weights.masters, self._weights.vectors
        self._place.collect(vectors)
        gradients = {name: gradient for name in vectors if (gradient := masters[name].grad) is not None}
        self._arrived.update(gradients)
        if gradients:
            norms = torch.stack(torch._foreach_norm(list(gradients.values())))
            self._norms.append(norms)
            torch._foreach_mul_(list(gradients.values()), list(self._factor(norms).unbind()))
        return torch.linalg.vector_norm(torch.cat([norm.flatten() for norm in self._norms]))

    @torch.no_grad()
    def step(self) -> None:
        """Step the vectors, and finish the step for weights that had no gradient."""
        weights = self._weights
        waited = [name for name in weights.vectors if name in self._arrived]
        without = [name for name in weights.masters if name not in self._arrived]
        for optimiser in {weights.optimiser_of[name] for name in waited}:
            optimiser.step()
        weights.set_step(without, weights.step + 1)
        weights.average(without + waited)
        weights.drop_gradients()
        self._place.renew(self._place.renewed({name: weights.masters[name] for name in waited}))

    def _take(self, name: str, gradient: Tensor) -> None:
        self._arrived.add(name)
        self._place.bring([gradient], partial(self._stepped, name))

    @torch.no_grad()
    def _checked(self, errors: list[Tensor]) -> Renewed:
        self._note(errors[0])
        return ()

    @torch.no_grad()
    def _stepped(self, name: str, gradients: list[Tensor]) -> Renewed:
        place = self._place
        if isinstance(place, InRam) and adamw.takes_pieces(self._weights.optimiser_of[name]):
            self._step_pieces(name, gradients[0], place)
        else:
            self._step_whole(name, gradients[0].float())
        return place.renewed({name: self._weights.masters[name]})

    def _step_whole(self, name: str, gradient: Tensor) -> None:
        weights, norm = self._weights, torch.linalg.vector_norm(gradient)
        self._norms.append(norm)
        self._note(norm)
        # Python can read what a CPU has computed, and skip a pass over the gradient.
        if not norm.is_cpu or norm > weights.config.clip_norm:
            gradient.mul_(self._factor(norm))
        weights.masters[name].grad = gradient
        adamw.step_unless(weights.optimiser_of[name], self._broken)
        weights.average([name], unless=self._broken)
        weights.masters[name].grad = None

    def _step_pieces(self, name: str, gradient: Tensor, place: InRam) -> None:
        weights, config = self._weights, self._weights.config
        norms = [torch.linalg.vector_norm(piece) for piece in place.pieces(gradient)]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        self._norms.append(norm)
        self._note(norm)
        if bool(self._broken):
            return
        factor = self._factor(norm) if norm > config.clip_norm else None
        scaled = (piece if factor is None else piece.mul_(factor) for piece in place.pieces(gradient))
        adamw.step_pieces(weights.optimiser_of[name], weights.masters[name], scaled)
        weights.average([name])

    def _factor(self, norm: Tensor) -> Tensor:
        """The factor that scales gradients of these norms down to `clip_norm`."""
        return (self._weights.config.clip_norm / norm).clamp(max=1)

    def _note(self, values: Tensor) -> None:
        """Disable the rest of this step if one of these values is not finite."""
        self._broken.copy_(torch.maximum(self._broken, 1 - values.isfinite().all().float()))
