"""Near-duplicates among images, by their thumbnails."""

from __future__ import annotations

import numpy as np

from .measure import Array

LIMIT = 4 / 255
"""Root mean square difference of two thumbnails, in [0, 1], below which their images count as near-duplicates."""
_BLOCK = 1024  # images compared at a time with all others: 20,000 thumbnails make tables of 80 MB


def near_duplicates(thumbnails: Array) -> list[tuple[int, int]]:
    """For each image with a near-duplicate before it, the pair (that earlier image, this one).

    The number of pairs is the number of images that could go without a kind of image being lost, give or take chains.

    Args:
        thumbnails: (N, values) in [0, 1], see `ImageStatistics.thumbnail`.
    """
    found = []
    count, values = thumbnails.shape
    # Centred, so that the differences of squares below are accurate in float32.
    centred = thumbnails - thumbnails.mean(0, keepdims=True)
    squares = np.square(centred).sum(1)
    for start in range(0, count, _BLOCK):
        rows = slice(start, min(start + _BLOCK, count))
        distance = squares[rows, None] + squares[None, : rows.stop] - 2 * centred[rows] @ centred[: rows.stop].T
        near = distance < values * LIMIT**2
        for row in range(rows.stop - start):
            earlier = np.flatnonzero(near[row, : start + row])
            if len(earlier):
                found.append((int(earlier[0]), start + row))
    return found
