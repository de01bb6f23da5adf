"""Values for the weights that a source does not have: the patch embedder and the Detailer Head."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

INITS = ("random",)

_CHUNK = 1 << 20


def random_values(name: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[Tensor]:
    """The values of one weight or bias of a linear layer or convolution, as flat float32 chunks.

    The published code leaves these layers as torch makes them: uniform within 1 / sqrt(fan_in), weight and bias
    alike (`torch.nn.Linear.reset_parameters`). Each tensor has a generator of its own, seeded with
    ``seed ^ crc32(name)`` of its ComfyUI key, so that its values depend on nothing else in the model.
    """
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    weight = shapes[name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name]
    bound = 1 / math.sqrt(math.prod(weight[1:]))
    remaining = math.prod(shapes[name])
    while remaining:
        count = min(remaining, _CHUNK)
        yield torch.empty(count).uniform_(-bound, bound, generator=generator)
        remaining -= count
