"""Gradients of a training step: plain, compiled, or on NVIDIA's GPUs as a CUDA graph.

A model this small spends most of a step launching kernels, and a graph launches them at once. On a CPU, half the time
goes into reading and writing memory between matrix products, which compiled code saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3

Losses = Callable[[Any], tuple[Tensor, Tensor]]
"""Maps a named tuple of tensors to a result and the loss. Shapes are fixed, nothing is read back, and no random numbers
are drawn."""


def gradients_of(
    losses: Losses, parameters: Sequence[nn.Parameter], device: torch.device, compiled: bool = False
) -> Callable[[Any], Tensor]:
    """A function that sets the parameters' gradients and returns the result.

    Args:
        losses: of a step's inputs.
        parameters: all that the loss depends on.
        device: where the inputs are; on NVIDIA's GPUs a graph is recorded.
        compiled: compile the losses elsewhere, which needs a C++ compiler on a CPU.
    """
    if device.type == "cuda":
        return _Graphed(losses, parameters)
    return _Plain(torch.compile(losses) if compiled else losses, parameters)


class _Plain:
    def __init__(self, losses: Losses, parameters: Sequence[nn.Parameter]):
        self._losses, self._parameters = losses, parameters

    def __call__(self, inputs: Any) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        result, loss = self._losses(inputs)
        loss.backward()
        return result.detach()


class _Graphed:
    """Recorded at the first call; the gradients' memory belongs to the graph, and every call writes them anew."""

    def __init__(self, losses: Losses, parameters: Sequence[nn.Parameter]):
        self._plain, self._parameters = _Plain(losses, parameters), parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None

    def __call__(self, inputs: Any) -> Tensor:
        if self._graph is None:
            self._record(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        assert self._graph is not None and self._result is not None, "recorded"
        self._graph.replay()
        return self._result.clone()

    def _record(self, inputs: Any) -> None:
        kept = type(inputs)(*(tensor.clone() for tensor in inputs))
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what libraries and caches allocate once must not belong to the graph
            for _ in range(WARM_UP):
                self._plain(kept)
        torch.cuda.current_stream().wait_stream(beside)
        for parameter in self._parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._plain(kept)
        self._graph, self._inputs = graph, kept
