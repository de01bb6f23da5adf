"""Aspect-ratio buckets: a few image sizes, so that the images of a batch share one.

All buckets have about the same area, never more, so that one memory plan holds for every batch; their sides are
multiples that the model needs, so that nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_ASPECT = 2.0
"""Maximum ratio of a bucket's longer side to its shorter one."""
_STEPS = 16
"""A square's side divided by the step between the buckets' sides, about: 64 pixels at 1024, as in SDXL (arXiv
2307.01952)."""


class ImageSize(NamedTuple):
    """Pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def sizes(area: int, multiple: int) -> list[ImageSize]:
    """The buckets for images of about `area` pixels, from the widest to the tallest.

    Args:
        area: maximum pixels of a bucket.
        multiple: of both sides; `ModelConfig.size_multiple`, the least common multiple of patch size and 2^stages.

    Raises:
        ValueError: if the area is smaller than one multiple squared.
    """
    side = math.isqrt(area) // multiple * multiple
    if multiple < 1 or side < 1:
        raise ValueError(f"The size must be at least {multiple} pixels, the multiple that the model's patches need.")
    step = multiple * max(1, round(side / _STEPS / multiple))
    wide = {side: side}  # height -> the longest width
    for width in range(side + step, area // multiple + 1, step):
        height = area // width // step * step
        if height < multiple or width > MAX_ASPECT * height:
            break
        if height < side:
            wide[height] = width  # a later width is larger and uses more of the area
    landscape = sorted((ImageSize(width, height) for height, width in wide.items()), key=lambda size: size.height)
    portrait = [ImageSize(size.height, size.width) for size in reversed(landscape) if size.width != size.height]
    return landscape + portrait


def nearest(width: int, height: int, buckets: Sequence[ImageSize]) -> ImageSize:
    """The bucket whose aspect ratio is nearest to an image's."""
    return min(buckets, key=lambda size: abs(math.log(width * size.height / (height * size.width))))


def enlargement(width: int, height: int, bucket: ImageSize) -> float:
    """How much an image is enlarged for a bucket; below 1 it is reduced."""
    return max(bucket.width / width, bucket.height / height)


def cropped_share(width: int, height: int, bucket: ImageSize) -> float:
    """The share of an image's area that the crop to its bucket removes, in [0, 1)."""
    return 1 - bucket.area / enlargement(width, height, bucket) ** 2 / (width * height)
