"""Stepping trained weights after a step's last backward pass; during it, see `in_backward`.

A step calls `begin`, `losses` before each backward pass, `clip`, then `step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..distributed.sharding import whole
from ..memory import exchange
from ..memory.exchange import Renewed
from . import adamw
from .offload import InRam
from .weights import TrainedWeights


class AtEnd:
    """Sums gradients on the device."""

    def __init__(self, weights: TrainedWeights):
        self._weights = weights

    def begin(self) -> None:
        """Called before the first backward pass."""

    def losses(self, errors: Tensor) -> None:
        """Called before each backward pass, with its samples' errors (B,), on the device."""

    def clip(self) -> Tensor:
        """Called after the last backward pass: scales gradients down to `clip_norm` and returns their norm before that,
        as a scalar; all processes call this."""
        weights = self._weights
        return whole(torch.nn.utils.clip_grad_norm_(weights.masters.values(), weights.config.clip_norm))

    def step(self) -> None:
        """Update the weights by the gradients, then the averages."""
        weights = self._weights
        without = [name for name, master in weights.masters.items() if master.grad is None]
        for optimiser in weights.optimisers:
            optimiser.step()
        weights.set_step(without, weights.step + 1)
        weights.drop_gradients()
        weights.average(weights.masters)


class SummedInRam:
    """Sums the gradients of several micro-batches in RAM.

    Between a step's first backward pass and `clip`, the sums and norms belong to the exchange, which may use them in
    its thread.
    """

    def __init__(self, weights: TrainedWeights, place: InRam):
        self._weights, self._place = weights, place
        self._sums: dict[str, Tensor] = {}
        self._micro_batches: dict[str, int] = {}
        self._norms: dict[str, Tensor] = {}
        self._factor = 1.0
        for name in weights.masters:
            place.listen(name, self._take)

    def begin(self) -> None:
        self._micro_batches.clear()
        self._norms.clear()

    def losses(self, errors: Tensor) -> None:
        """Non-finite losses show in the norm that `clip` returns."""

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Clip like `torch.nn.utils.clip_grad_norm_`; sums are scaled down when they are used."""
        self._place.collect(())
        for name in self._micro_batches.keys() - self._norms.keys():  # not every micro-batch used this weight
            self._norms[name] = torch.linalg.vector_norm(self._sums[name])
        total = torch.linalg.vector_norm(torch.stack([self._norms[name] for name in self._arrived()]))
        self._factor = float((self._weights.config.clip_norm / (total + 1e-6)).clamp(max=1))
        return total

    @torch.no_grad()
    def step(self) -> None:
        weights, names = self._weights, self._arrived()
        apart = [name for name in names if not adamw.takes_pieces(weights.optimiser_of[name])]
        for name in apart:
            weights.masters[name].grad = self._sums[name].mul_(self._factor)
        for optimiser in {weights.optimiser_of[name] for name in apart}:
            optimiser.step()
        self._place.renew(self._stepped(names, apart))
        without = weights.masters.keys() - names
        weights.set_step(without, weights.step + 1)
        weights.average(without)
        weights.drop_gradients()

    def _arrived(self) -> list[str]:
        """The weights that had a gradient, in the model's order."""
        return [name for name in self._weights.masters if name in self._micro_batches]

    def _stepped(self, names: list[str], apart: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Step all but those `apart`; a weight is copied to the device while the next is stepped."""
        weights = self._weights
        for name in names:
            if name not in apart:
                pieces = self._sums[name].view(-1).split(exchange.PIECE)
                scaled = (piece.mul_(self._factor) if self._factor < 1 else piece for piece in pieces)
                adamw.step_pieces(weights.optimiser_of[name], weights.masters[name], scaled)
            weights.average([name])
            yield from self._place.renewed({name: weights.masters[name]})

    def _take(self, name: str, gradient: Tensor) -> None:
        self._micro_batches[name] = number = self._micro_batches.get(name, 0) + 1
        self._place.bring([gradient], partial(self._sum, name, number))

    @torch.no_grad()
    def _sum(self, name: str, number: int, gradients: list[Tensor]) -> Renewed:
        """Add the gradient of the micro-batch `number`, counted from 1."""
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self._weights.masters[name])
        if number == 1:
            self._sums[name].copy_(gradients[0])
        else:
            totals = self._sums[name].view(-1).split(exchange.PIECE)
            for total, piece in zip(totals, self._place.pieces(gradients[0]), strict=True):
                total.add_(piece)
        if number == self._weights.config.accumulate:
            self._norms[name] = torch.linalg.vector_norm(self._sums[name])
        return ()
