"""All random choices about one training sample, as a pure function of the run's seed and the sample's number.

Nothing depends on earlier draws, so a resumed run, or a run whose samples are spread over several processes, draws
exactly what an uninterrupted single process draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass
class Draw:
    """One sample's noise level index, its noise (C, H, W) and whether its caption is dropped."""

    sigma_index: int
    noise: Tensor
    drop_caption: bool


def draw(
    run_seed: int,
    number: int,
    shape: torch.Size,
    *,
    levels: int,
    dropout: float,
    own_seed: int | None,
    out: Tensor | None = None,
) -> Draw:
    """Draw for the sample `number` of a run.

    Args:
        run_seed: the run's seed.
        number: the sample's number, counted over all epochs.
        shape: (C, H, W) of its noise.
        levels: number of noise levels to choose from, uniformly.
        dropout: probability of dropping the caption.
        own_seed: the seed that the source drew this image's noise from; None uses the run's.
        out: (C, H, W) float32 tensor of the caller to write the noise into.
    """
    generator = torch.Generator().manual_seed(mixed(run_seed, number))
    sigma_index = int(torch.randint(levels, (), generator=generator))
    drop_caption = float(torch.rand((), generator=generator)) < dropout
    if own_seed is not None:
        generator = torch.Generator().manual_seed(own_seed)
    return Draw(sigma_index, torch.randn(shape, generator=generator, out=out), drop_caption)


def mixed(seed: int, number: int) -> int:
    """Mix two numbers into one of 64 bits, so that neighbouring numbers are unrelated (the finaliser of SplitMix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
