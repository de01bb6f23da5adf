"""Trained weights that are optimised where the model computes with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from ..distributed import sharding
from ..memory.exchange import Renewed, Use

Take = Callable[[str, Tensor], None]
"""Receives a weight's name and its complete gradient, on the device."""


class OnDevice:
    """On the model's device.

    Attributes:
        masters: the float32 tensors that are optimised, averaged and saved, by name: here the model's parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.masters = dict(parameters)

    def listen(self, name: str, take: Take) -> None:
        """Have a weight's gradient taken from it when a backward pass has completed it."""
        when_complete(self.masters[name], name, take)

    def bring(self, gradients: list[Tensor], use: Use) -> None:
        """Use gradients beside the masters, in the order of these calls, then renew what the model computes with."""
        use(gradients)

    def collect(self, names: Collection[str]) -> None:
        """Wait for all uses, and move these weights' gradients from the model to the masters."""

    def renewed(self, weights: Mapping[str, Tensor]) -> Renewed:
        """These weights, each with the copy that the model computes with, if it is elsewhere."""
        return ()

    def renew(self, renewed: Renewed) -> None:
        """Fill such copies, and wait."""

    @contextmanager
    def averages_in_place(self, averages: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block, the model computes with these averages, if there are any; they hold the weights then."""
        sharding.exchange(self.masters, averages)
        try:
            yield
        finally:
            sharding.exchange(self.masters, averages)


def when_complete(parameter: Tensor, name: str, take: Take) -> None:
    """Hand a parameter's gradient to the method `take` when a backward pass has completed it; no later part of that
    pass reads the parameter."""
    # Weak: torch keeps hooks where the garbage collector does not look, so a hook that holds an object would keep its
    # weights, on the device and in RAM, until the process ends.
    taking = weakref.WeakMethod(take)

    def completed(parameter: Tensor) -> None:
        call = taking()
        assert call is not None and parameter.grad is not None, "a gradient arrived after its trainer was deleted"
        gradient, parameter.grad = parameter.grad, None
        call(name, gradient)

    parameter.register_post_accumulate_grad_hook(completed)
