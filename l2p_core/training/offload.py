"""Trained weights, optimiser states and averages in RAM, stepped there as gradients arrive.

The device holds a working copy of each weight, in bfloat16 with precision "bf16", and gradients of a few layers at a
time: each complete gradient is copied to RAM immediately (see `memory.exchange`). With one micro-batch per step the
weight is stepped at once (see `in_backward`) and its working copy renewed during the backward pass. With several,
gradients are summed in RAM and clipped by their total norm, and all weights are stepped after the last micro-batch; a
weight's working copy is copied to the device while the next weight is stepped. Gradients in RAM are worked on piece by
piece, in the processor's cache: a whole copy in float32 would take longer than AdamW does. If blocks are streamed,
working copies of their linear layers are in RAM too and come to the device with their block (see
`memory.trained_linear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..memory import exchange
from ..memory.trained_linear import TrainedLinear
from ..sources.source import Source
from ..training_config import TrainingConfig
from . import adamw
from .in_backward import EarlyWeights

CPU = torch.device("cpu")


class OffloadedWeights(EarlyWeights):
    """float32 weights, moments and averages in RAM, and working copies in the model.

    Between `losses` and `clip`, the norms, sums and masters belong to the exchange, which may use them in its thread.

    Args:
        parameters: the model's trained parameters by name, in float32 on any device; they become the working copies.
        config: of the training.
        source: of the model.
        device: to compute on.
        streamed: layers whose working copies are streamed, by the names of their weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: TrainingConfig,
        source: Source,
        device: torch.device,
        streamed: Mapping[str, TrainedLinear],
    ):
        self.steps_early = config.accumulate == 1
        self._device = device
        self._streamed = streamed
        self._dtype = config.compute_dtype
        sizes = [parameter.numel() for parameter in parameters.values()]
        vectors = sum(parameter.numel() for parameter in parameters.values() if parameter.ndim == 1)
        self._exchange = exchange.make(device, max(*sizes, vectors), self._dtype)
        super().__init__(parameters, config, source)
        self._sums: dict[str, Tensor] = {}
        self._micro_batches: dict[str, int] = {}
        self._norms_of_sums: dict[str, Tensor] = {}
        self._sums_factor = 1.0
        self._scratch = torch.empty(min(exchange.PIECE, max(sizes)))

    def _own(self) -> dict[str, Tensor]:
        return {name: self._master(name, parameter) for name, parameter in self.parameters.items()}

    def _master(self, name: str, parameter: Tensor) -> Tensor:
        """A weight in RAM, with its working copy in its final place; no other copy remains, so that a device never
        holds all weights in float32."""
        if name in self._streamed:
            parameter.data = parameter.detach().to(CPU, torch.float32).contiguous()
            self._streamed[name].working.fill(parameter.detach())
            return parameter.detach()
        # In the order of its elements, in which its gradient is cut into pieces.
        master = parameter.detach().to(CPU, torch.float32, copy=True, memory_format=torch.contiguous_format)
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

    def losses(self, errors: Tensor) -> None:
        if self.steps_early:
            # A copy, because the backward pass uses the errors at the same time.
            self._exchange.bring([errors.detach().clone()], self._losses)

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._micro_batches.clear()
        self._norms_of_sums.clear()

    def clip(self) -> Tensor:
        waiting = {name: p.grad for name, p in self._waiting.items() if p.grad is not None}
        if waiting:
            self._exchange.bring(list(waiting.values()), partial(self._keep, list(waiting)))
        for name in waiting:
            self.parameters[name].grad = None
        self._exchange.finish()
        return self._clip(list(waiting)) if self.steps_early else self._clip_sums()

    @torch.no_grad()
    def _clip_sums(self) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`; sums are scaled down when they are used."""
        names = [name for name in self.masters if name in self._arrived]
        for name in names:
            if name not in self._norms_of_sums:  # not every micro-batch used this weight
                self._norms_of_sums[name] = torch.linalg.vector_norm(self._sums[name])
        total = torch.linalg.vector_norm(torch.stack([self._norms_of_sums[name] for name in names]))
        self._sums_factor = float((self.config.clip_norm / (total + 1e-6)).clamp(max=1))
        return total

    @torch.no_grad()
    def step(self) -> None:
        if not self.steps_early:
            self._step_sums()
        super().step()
        self._renew({name: self.masters[name] for name in self._arrived & self._waiting.keys()})

    def _step_sums(self) -> None:
        names = [name for name in self.masters if name in self._arrived]
        apart = [name for name in names if not adamw.takes_pieces(self.optimiser_of[name])]
        for name in apart:
            self.masters[name].grad = self._sums[name].mul_(self._sums_factor)
        for optimiser in {self.optimiser_of[name] for name in apart}:
            optimiser.step()

        def stepped() -> Iterator[tuple[Tensor, Tensor]]:
            for name in names:
                if name not in apart:
                    pieces = self._sums[name].view(-1).split(exchange.PIECE)
                    scaled = (piece.mul_(self._sums_factor) if self._sums_factor < 1 else piece for piece in pieces)
                    adamw.step_pieces(self.optimiser_of[name], self.masters[name], scaled)
                self._average([name])
                yield from self._renewed({name: self.masters[name]})

        self._exchange.send(stepped())
        self._exchange.finish()

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
        """Set the working copies to these weights."""
        self._exchange.send(self._renewed(weights))
        self._exchange.finish()

    def _renewed(self, weights: Mapping[str, Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Renew the working copies in RAM; returns the weights of the others with their copies."""
        for name, weight in weights.items():
            if name in self._streamed:
                self._streamed[name].working.fill(weight)
            else:
                yield weight, self.parameters[name].data

    def _take(self, name: str, gradient: Tensor) -> None:
        first = name not in self._arrived
        self._arrived.add(name)
        self._micro_batches[name] = number = self._micro_batches.get(name, 0) + 1
        last = number == self.config.accumulate
        use = partial(self._stepped, name) if self.steps_early else partial(self._summed, name, first, last)
        self._exchange.bring([gradient], use)

    # The exchange calls the following methods, with gradients in RAM.

    def _losses(self, errors: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        self._note(errors[0])
        return ()

    def _stepped(self, name: str, gradients: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        self._step_one(name, gradients[0])
        return self._renewed({name: self.masters[name]})

    @torch.no_grad()
    def _step_one(self, name: str, gradient: Tensor) -> None:
        if not adamw.takes_pieces(self.optimiser_of[name]):
            super()._step_one(name, gradient.float())
            return
        norms = [torch.linalg.vector_norm(piece) for piece in self._pieces(gradient)]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        self._norms.append(norm)
        self._note(norm)
        if bool(self._broken):
            return
        factor = self._factor(norm) if norm > self.config.clip_norm else None
        scaled = (piece if factor is None else piece.mul_(factor) for piece in self._pieces(gradient))
        adamw.step_pieces(self.optimiser_of[name], self.masters[name], scaled)
        self._average([name])

    def _pieces(self, gradient: Tensor) -> Iterator[Tensor]:
        """Flat pieces of a gradient in float32, each valid until the next."""
        for piece in gradient.flatten().split(exchange.PIECE):
            yield self._scratch[: len(piece)].copy_(piece)

    @torch.no_grad()
    def _summed(self, name: str, first: bool, last: bool, gradients: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self.masters[name])
        if first:
            self._sums[name].copy_(gradients[0])
        else:
            totals = self._sums[name].view(-1).split(exchange.PIECE)
            for total, piece in zip(totals, self._pieces(gradients[0]), strict=True):
                total.add_(piece)
        if last:
            self._norms_of_sums[name] = torch.linalg.vector_norm(self._sums[name])
        return ()

    def _keep(self, names: Sequence[str], gradients: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        for name, gradient in zip(names, gradients, strict=True):
            self.masters[name].grad = gradient.to(torch.float32, copy=True)
        return ()
