"""Rotary positions on three axes (caption order, image row, image column), as the NextDiT family places its tokens.

Caption token i sits at (1 + i, 0, 0); image token (row, column) at (caption length + 1, row, column), where the caption
length includes padding; image pad tokens sit at the origin.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..patch import padded_size

_KEPT = 8
"""Tables that are kept of each kind: those of a sampling, and not one of every combination of captions that a training
has met. For a batch of eight images of 1024 pixels with unequal captions, one takes 19 MB of the device."""

Rope = Tensor
"""Cosines and sines, (B or 1, 1, tokens, head_dim / 2, 2), float32."""


class Positions(NamedTuple):
    """How tokens are placed.

    Attributes:
        axes: channels of a head that each axis turns.
        theta: base of the frequencies.
        token_multiple: an image is padded to a multiple of this many tokens.
    """

    axes: tuple[int, int, int]
    theta: float
    token_multiple: int


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved channel pairs of (B, heads, N, head_dim) by each token's angles, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Compilers fuse real arithmetic into its neighbours, but not complex arithmetic.
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        # A single pass over memory, the minimum without a compiler.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).to(x.dtype)


@lru_cache(_KEPT)
def caption_rope(positions: Positions, length: int, device: torch.device) -> Rope:
    """The table of a caption's tokens, for a padded length."""
    with torch.inference_mode(False), torch.no_grad():
        table = _unturned(length, positions, device)
        table[:, : positions.axes[0] // 2] = _axis(positions.axes[0], positions.theta, length + 1, device)[1:]
        return table[None, None]


@lru_cache(_KEPT)
def image_rope(positions: Positions, grid: tuple[int, int], caption: int, device: torch.device) -> Rope:
    """The table of an image's tokens, padding included, beside a caption of the given padded length.

    Args:
        grid: the image's tokens as (rows, columns).
    """
    axes, theta = positions.axes, positions.theta
    first, second = axes[0] // 2, (axes[0] + axes[1]) // 2
    image = grid[0] * grid[1]
    # Tables created in a host's inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        table = _unturned(padded_size(image, positions.token_multiple), positions, device)
        cells = table[:image].unflatten(0, grid)
        cells[:, :, :first] = _axis(axes[0], theta, caption + 2, device)[-1]
        cells[:, :, first:second] = _axis(axes[1], theta, grid[0], device)[:, None]
        cells[:, :, second:] = _axis(axes[2], theta, grid[1], device)
        return table[None, None]


@lru_cache(_KEPT)
def joint_rope(positions: Positions, grid: tuple[int, int], captions: tuple[int, ...], device: torch.device) -> Rope:
    """The table of sequences [image, caption] with captions of these padded lengths; one row if they are equal.

    Beyond a sample's own caption the table is that of a longer one; nothing reads those tokens.
    """
    longest = max(captions)
    beside = caption_rope(positions, longest, device)
    with torch.inference_mode(False), torch.no_grad():
        if min(captions) == longest:
            return torch.cat([image_rope(positions, grid, longest, device), beside], dim=2)
        rows = [torch.cat([image_rope(positions, grid, length, device), beside], dim=2) for length in captions]
        return torch.cat(rows)


def _unturned(tokens: int, positions: Positions, device: torch.device) -> Tensor:
    """Tables (tokens, head_dim / 2, 2) of the origin."""
    table = torch.zeros(tokens, sum(positions.axes) // 2, 2, device=device)
    table[..., 0] = 1
    return table


@lru_cache(maxsize=256)
def _axis(dim: int, theta: float, count: int, device: torch.device) -> Tensor:
    """Tables (count, dim / 2, 2) of the positions 0 to count - 1, computed in float64 on the CPU because not every
    device has float64."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)
