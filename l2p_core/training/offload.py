"""Trained weights, optimiser states and averages in RAM, stepped there as gradients arrive.

The device holds a working copy of each weight, in bfloat16 with precision "bf16", and gradients of a few layers at a
time: each complete gradient is copied to RAM immediately (see `memory.exchange`). With one micro-batch per step the
weight is stepped at once (see `in_backward`) and its working copy renewed during the backward pass. With several,
gradients are summed in RAM and all weights are stepped after the last micro-batch (see `stepping.SummedInRam`).
Gradients in RAM are worked on piece by piece, in the processor's cache: a whole copy in float32 would take longer than
AdamW does. If blocks are streamed, working copies of their linear layers are in RAM too and come to the device with
their block (see `memory.trained_linear`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..device.accelerator import CPU
from ..memory import exchange
from ..memory.exchange import Renewed, Use
from ..memory.trained_linear import TrainedLinear
from .on_device import Take, when_complete


class InRam:
    """In RAM, with working copies in the model.

    Args:
        parameters: the model's trained parameters by name, in float32 on any device; they become the working copies.
        device: to compute on.
        dtype: of the working copies.
        streamed: layers whose working copies are streamed, by the names of their weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        streamed: Mapping[str, TrainedLinear],
    ):
        self._parameters, self._streamed = parameters, streamed
        sizes = [parameter.numel() for parameter in parameters.values()]
        vectors = sum(parameter.numel() for parameter in parameters.values() if parameter.ndim == 1)
        self._exchange = exchange.make(device, max(*sizes, vectors), dtype)
        self._scratch = torch.empty(min(exchange.PIECE, max(sizes)))
        self.masters = {name: self._master(name, parameter, device, dtype) for name, parameter in parameters.items()}

    def _master(self, name: str, parameter: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A weight in RAM, with its working copy in its final place; no other copy remains, so that a device never
        holds all weights in float32."""
        if name in self._streamed:
            parameter.data = parameter.detach().to(CPU, torch.float32).contiguous()
            self._streamed[name].working.fill(parameter.detach())
            return parameter.detach()
        # In the order of its elements, in which its gradient is cut into pieces.
        master = parameter.detach().to(CPU, torch.float32, copy=True, memory_format=torch.contiguous_format)
        parameter.data = master.to(device, dtype, copy=True)
        return master

    def listen(self, name: str, take: Take) -> None:
        if name in self._streamed:
            self._streamed[name].take = partial(take, name)
        else:
            when_complete(self._parameters[name], name, take)

    def bring(self, gradients: list[Tensor], use: Use) -> None:
        self._exchange.bring(gradients, use)

    def collect(self, names: Collection[str]) -> None:
        waiting = {name: gradient for name in names if (gradient := self._parameters[name].grad) is not None}
        if waiting:
            self._exchange.bring(list(waiting.values()), partial(self._keep, list(waiting)))
        for name in waiting:
            self._parameters[name].grad = None
        self._exchange.finish()

    def _keep(self, names: list[str], gradients: list[Tensor]) -> Renewed:
        for name, gradient in zip(names, gradients, strict=True):
            self.masters[name].grad = gradient.to(torch.float32, copy=True)
        return ()

    def pieces(self, gradient: Tensor) -> Iterator[Tensor]:
        """Flat pieces of a gradient in float32, each valid until the next."""
        for piece in gradient.flatten().split(exchange.PIECE):
            yield self._scratch[: len(piece)].copy_(piece)

    def renewed(self, weights: Mapping[str, Tensor]) -> Renewed:
        """Renews the working copies in RAM, and yields the others with their weights."""
        for name, weight in weights.items():
            if name in self._streamed:
                self._streamed[name].working.fill(weight)
            else:
                yield weight, self._parameters[name].data

    @torch.no_grad()
    def renew(self, renewed: Renewed) -> None:
        self._exchange.send(renewed)
        self._exchange.finish()

    @contextmanager
    def averages_in_place(self, averages: Mapping[str, Tensor]) -> Iterator[None]:
        self.renew(self.renewed(averages))
        try:
            yield
        finally:
            self.renew(self.renewed({name: self.masters[name] for name in averages}))
