"""The distance between two sets of images, by their patches: for a world in which a caption has no one clean image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 3
"""Of the Laplacian pyramid: the finest details, those twice and four times as large."""
PATCH, PATCHES, DIRECTIONS = 7, 64, 256
"""Pixels of a patch's side, patches of each image and level, directions that they are projected on."""


def patch_distance(images: Tensor, reference: Tensor) -> float:
    """The sliced Wasserstein distance of patches (Karras et al., arXiv 1710.10196, section 5), 0 for equal sets.

    It is the mean over the levels of a Laplacian pyramid, in standard deviations of the reference's patches there. The
    places of the patches and the directions are the same in every call.

    Args:
        images: (B, 3, H, W) in [-1, 1], sides of 4 * `PATCH` or more that are multiples of 4.
        reference: as many images of the same size.
    """
    found = zip(_levels(images.float()), _levels(reference.float()), strict=True)
    return sum(_distance(*level, seed) for seed, level in enumerate(found)) / LEVELS


def _levels(images: Tensor) -> list[Tensor]:
    """Differences to the next coarser level, from the finest."""
    found = []
    for _ in range(LEVELS):
        coarse = F.avg_pool2d(images, 2)
        smooth = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        found.append(images - smooth)
        images = coarse
    return found


def _distance(images: Tensor, reference: Tensor, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(side - PATCH + 1, (len(reference), PATCHES), generator=generator) for side in reference.shape[-2:]
    )
    directions = torch.randn(reference.shape[1] * PATCH**2, DIRECTIONS, generator=generator)
    directions = directions / directions.norm(dim=0)
    ours, theirs = (_patches(pixels, rows, columns) for pixels in (images, reference))
    mean, deviation = theirs.mean(0), theirs.std(0)
    one, two = (((patches - mean) / deviation) @ directions for patches in (ours, theirs))
    return float((one.sort(dim=0).values - two.sort(dim=0).values).abs().mean())


def _patches(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B * PATCHES, 3 * PATCH * PATCH), from the top left corners given for each image."""
    offsets = torch.arange(PATCH)
    image = torch.arange(len(images))[:, None, None, None]
    found = images.movedim(1, -1)[
        image, (rows[..., None] + offsets)[..., :, None], (columns[..., None] + offsets)[..., None, :]
    ]
    return found.flatten(2).flatten(0, 1)
