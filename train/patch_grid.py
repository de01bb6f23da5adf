"""The patch-grid ratio: how much of an image's detail lies on the borders between patches.

Converted models show a grid of the patch size; for images without one the ratio is about 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_grid_ratio(images: Tensor, patch_size: int) -> float:
    """Mean squared difference of neighbouring pixels across patch borders, over that inside patches.

    Args:
        images: (B, C, H, W), any range; H and W above `patch_size`.
        patch_size: pixels, 2 or more.

    Returns:
        About 1 without a grid, above it with one; NaN for images without any detail inside patches.

    Raises:
        ValueError: if an image has no border between patches, or a patch no interior.
    """
    if patch_size < 2 or min(images.shape[-2:]) <= patch_size:
        height, width = images.shape[-2:]
        raise ValueError(
            f"The patch-grid ratio compares borders with insides, but {width}x{height} pixels in patches of "
            f"{patch_size} have only one of them: use larger images or another patch size."
        )
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for dim in (-2, -1):
        energy = images.double().cpu().diff(dim=dim).square().transpose(dim, -1)
        # Difference i is between pixels i and i + 1: a border where i + 1 begins a patch.
        border = (torch.arange(energy.shape[-1]) + 1) % patch_size == 0
        for row, chosen in enumerate((border, ~border)):
            sums[row] += energy[..., chosen].sum()
            counts[row] += energy[..., chosen].numel()
    at_borders, inside = (sums / counts).tolist()
    return at_borders / inside if inside else float("nan")
