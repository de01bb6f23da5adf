"""What every number that a user gives may be: the ranges of recipes, of the command line and of the core's functions.

Upper ends that nothing in the method demands are where a value can only be a slip of the keyboard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` to `most`; without an end itself where it is open.

    Attributes:
        whole: whether only whole numbers belong to it.
    """

    least: float
    most: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What a value that is not in the range must be, as the end of a sentence; None for one that is."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.least or (self.above and value == self.least):
            return f"above {self.least}" if self.above else f"{self.least} or more"
        if value > self.most or (self.below and value == self.most):
            return f"below {self.most}" if self.below else f"at most {self.most}"
        return None

    def check(self, name: str, value: float) -> None:
        """Hold a value to the range.

        Raises:
            ValueError: with the value's name and what it must be.
        """
        problem = self.problem(value)
        if problem:
            raise ValueError(f"{name} must be {problem}, not {value}.")


def check(values: Any, ranges: Mapping[str, Range]) -> None:
    """Hold the fields of a dataclass to their ranges; None, which stands for a default, is in all of them.

    Raises:
        ValueError: naming the first field that is not in its range, and what it must be.
    """
    for name, allowed in ranges.items():
        value = getattr(values, name)
        if value is not None:
            allowed.check(name, value)


def _whole(least: int, most: int) -> Range:
    return Range(least, most, whole=True)


def _above(least: float, most: float) -> Range:
    return Range(least, most, above=True)


SEED = _whole(-(1 << 63), (1 << 63) - 1)
"""Of a recipe or a conversion: TOML's integers have 64 bits."""
IMAGE_SEED = _whole(-(1 << 63), (1 << 64) - 1)
"""Of one image's noise: what torch's generators take, and ComfyUI gives."""
SAMPLING_STEPS = _whole(1, 10_000)
CFG = Range(0, 1000)
SHIFT = _above(0, 1000)
DENOISE = _above(0, 1)
SIDE = _whole(1, 65_536)
"""Pixels of an image's side."""
TILE = _whole(1, 65_536)
"""Pixels of the side of the head's tiles."""
HEAD_WIDTH = Range(1 / 64, 16)
"""Factor on the Detailer Head's widths: of the 1k variant, whose narrowest stage has 64 channels, one is left at 1/64.
Every stage keeps one channel at least."""
SHARE = Range(0, 1)
PART = Range(0, 1, below=True)
"""A share of less than all."""
STEPS = _whole(1, 1_000_000_000)
"""Of training."""
COUNT = _whole(1, 1_000_000_000)
COUNT_OR_NONE = _whole(0, 1_000_000_000)
FIRST = _whole(0, 1 << 32)
"""Number of a prompt's first image; images are seeded by it."""
BATCH = _whole(1, 1_000_000)
BLOCKS = _whole(0, 1000)
ACTIVATIONS = _whole(-1, 1000)
"""Of how many blocks activations are kept; -1 is as many as there is room for."""
WORKERS = _whole(1, 256)
RANK = _whole(1, 65_536)
LEARNING_RATE = _above(0, 10)
FACTOR = _above(0, 1e6)
DECAY = Range(0, 100)
"""Of weights, at a learning rate of 1."""
NORM = _above(0, 1e12)
DIVERGENCE = _above(1, 1e9)
GIGABYTES = _above(0, 1e6)
SECONDS = Range(0, 1e6)
