"""Values for the weights that a source does not have: the patch embedder and the Detailer Head."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .config import HEAD

FITTED = "fitted"
INITS = ("random", "scaled", FITTED)
"""How new weights can begin.

random: as the published code leaves them, which is how torch makes its layers: uniform within 1 / sqrt(fan_in), weight
    and bias alike (`torch.nn.Linear.reset_parameters`).
scaled: the head's convolutions hand on the variance they receive, SiLU included, and have no bias. Torch's choice loses
    most of it in every layer, so a head of eight or more starts with its output all but constant.
fitted: the patch embedder as close to the source's as pixels allow, see `patch_pairs`; the head as "scaled", until it
    is fitted when training begins, see `head_fit`.
"""

# E[silu(g x)^2] = 1 for a standard normal x.
_SILU_GAIN = 1.56

_CHUNK = 1 << 20


def random_values(
    name: str, shapes: Mapping[str, tuple[int, ...]], seed: int, init: str = "random"
) -> Iterator[Tensor]:
    """The values of one weight or bias of a linear layer or convolution, as flat float32 chunks.

    Each tensor has a generator of its own, seeded with ``seed ^ crc32(name)`` of its ComfyUI key, so that its values
    depend on nothing else in the model.
    """
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    weight = shapes[name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name]
    bound = _gain(name, init) / math.sqrt(math.prod(weight[1:]))
    size = math.prod(shapes[name])
    for start in range(0, size, _CHUNK):
        yield torch.empty(min(size - start, _CHUNK)).uniform_(-bound, bound, generator=generator)


def _gain(name: str, init: str) -> float:
    """The bound of a tensor's uniform distribution, in units of 1 / sqrt(fan_in)."""
    part, _, layer = name.partition(".")
    if init == "random" or part != HEAD or layer.startswith("out_conv"):
        return 1.0
    if name.endswith(".bias"):
        return 0.0
    # A uniform distribution within b has the variance b^2 / 3. The convolutions after upsampling have no SiLU.
    return math.sqrt(3) * (1.0 if layer.startswith("up") else _SILU_GAIN)
