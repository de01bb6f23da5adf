"""Checks numeric node inputs against the limits of the schema, whatever their source."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

_SHOWN = 40  # characters of a wrong value


def within_limits(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Wrap a node's `execute` to check its numbers against the limits of its inputs first.

    The host checks typed numbers, except NaN, but passes on numbers from other nodes unchecked. Violations raise
    ValueError with the input's name.
    """

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], **given: Any) -> io.NodeOutput:
        for input in (cls.SCHEMA or cls.GET_SCHEMA()).inputs:
            if isinstance(input, (io.Int.Input, io.Float.Input)) and given.get(input.id) is not None:
                _check_number(input, given[input.id])
        return execute(cls, **given)

    return checked


def _check_number(input: Any, value: Any) -> None:
    from ..l2p_core.ranges import Range

    whole = isinstance(input, io.Int.Input)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(
            f"{input.id} must be {'a whole number' if whole else 'a number'}, not {str(value)[:_SHOWN]!r}."
        )
    least = -math.inf if input.min is None else input.min
    most = math.inf if input.max is None else input.max
    number: Any = value  # numpy's numbers convert to Python's by `item`
    Range(least, most, whole).check(input.id, number.item() if hasattr(number, "item") else number)
