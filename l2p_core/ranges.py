"""Valid ranges of all numbers that users enter, in recipes, on the command line and in the core's functions, and the
check of words.

Where the method sets no upper limit, the limit marks values that can only be typing errors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` to `most`, excluding an open end.

    Attributes:
        whole: whether the range contains whole numbers only.
        above: whether `least` itself is excluded.
        below: whether `most` itself is excluded.
    """

    least: float
    most: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What the value must be, as the end of a sentence; None if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.least or (self.above and value == self.least):
            return f"above {self.least}" if self.above else f"{self.least} or more"
        if value > self.most or (self.below and value == self.most):
            return f"below {self.most}" if self.below else f"at most {self.most}"
        return None

    def check(self, name: str, value: float) -> None:
        """Check that a value is in the range.

        Raises:
            ValueError: naming the value and what it must be.
        """
        problem = self.problem(value)
        if problem:
            raise ValueError(f"{name} must be {problem}, not {value}.")


def check_known(what: str, value: str, choices: Collection[str]) -> None:
    """Check that something of this name exists.

    Raises:
        ValueError: naming those that do.
    """
    if value not in choices:
        raise ValueError(f"There is no {what} {value!r}; choose one of {', '.join(choices)}.")


def check(values: Any, ranges: Mapping[str, Range]) -> None:
    """Check the fields of a dataclass against their ranges; None, which stands for a default, is always valid.

    Raises:
        ValueError: naming the first field outside its range, and what it must be.
    """
    for name, allowed in ranges.items():
        value = getattr(values, name)
        if value is not None:
            allowed.check(name, value)


def check_choices(values: Any, choices: Mapping[str, Collection[object]]) -> None:
    """Check the fields of a dataclass that must have one of several values.

    Raises:
        ValueError: naming the first field that has another, and the choices.
    """
    for name, allowed in choices.items():
        if getattr(values, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(values, name)!r}.")


def _whole(least: int, most: int) -> Range:
    return Range(least, most, whole=True)


def _above(least: float, most: float) -> Range:
    return Range(least, most, above=True)


SEED = _whole(-(1 << 63), (1 << 63) - 1)
"""Seed of a recipe or a conversion: TOML's integers have 64 bits."""
IMAGE_SEED = _whole(-(1 << 63), (1 << 64) - 1)
"""Seed of one image's noise: what torch's generators accept and ComfyUI supplies."""
SAMPLING_STEPS = _whole(1, 10_000)
CFG = Range(0, 1000)
SHIFT = _above(0, 1000)
DENOISE = _above(0, 1)
SIDE = _whole(1, 65_536)
"""Side of an image in pixels."""
TILE = _whole(1, 65_536)
"""Side of the head's tiles in pixels."""
HEAD_WIDTH = Range(1 / 64, 16)
"""Factor on the Detailer Head's widths. Every stage keeps at least one channel: at 1/64, the narrowest stage of the 1k
variant goes from 64 channels to one."""
SHARE = Range(0, 1)
PART = Range(0, 1, below=True)
"""A share below 1."""
STEPS = _whole(1, 1_000_000_000)
"""Training steps."""
COUNT = _whole(1, 1_000_000_000)
COUNT_OR_NONE = _whole(0, 1_000_000_000)
TEMPERATURE = _above(0, 5)
"""The temperature at which a language model samples."""
TOKENS = _whole(1, 1_000_000)
"""The maximum tokens of a language model's answer."""
FIRST = _whole(0, 1 << 32)
"""Index of a prompt's first image; images are seeded by it."""
BATCH = _whole(1, 1_000_000)
BLOCKS = _whole(0, 1000)
ACTIVATIONS = _whole(-1, 1000)
"""Number of blocks that keep their activations; -1 means as many as fit into memory."""
WORKERS = _whole(1, 256)
RANK = _whole(1, 65_536)
LEARNING_RATE = _above(0, 10)
FACTOR = _above(0, 1e6)
DECAY = Range(0, 100)
"""Weight decay, at a learning rate of 1."""
NORM = _above(0, 1e12)
DIVERGENCE = _above(1, 1e9)
GIGABYTES = _above(0, 1e6)
SECONDS = Range(0, 1e6)
PATCH = _whole(2, 1024)
"""Side in pixels of the patches whose borders are looked for in images."""
