"""The part of each U-Net stage that a piece of the output depends on: the geometry behind exact tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType


@dataclass(frozen=True)
class Region:
    """A rectangle of rows [top, bottom) and columns [left, right) on some stage's grid."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def index(self) -> tuple[EllipsisType, slice, slice]:
        """The region as an index into (..., H, W)."""
        return ..., slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def pixels(self) -> int:
        """Number of cells."""
        return (self.bottom - self.top) * (self.right - self.left)

    def tiles(self, side: int) -> Iterator[Region]:
        """Split into squares of `side`, row by row; the last ones may be smaller."""
        for top in range(self.top, self.bottom, side):
            for left in range(self.left, self.right, side):
                yield Region(top, min(top + side, self.bottom), left, min(left + side, self.right))

    def grown(self, frame: Region) -> Region:
        """The region with one more cell on every side, clipped to `frame`."""
        return Region(
            max(self.top - 1, frame.top),
            min(self.bottom + 1, frame.bottom),
            max(self.left - 1, frame.left),
            min(self.right + 1, frame.right),
        )

    def halved(self) -> Region:
        """The cells of the next coarser grid that this region touches."""
        return Region(self.top // 2, -(-self.bottom // 2), self.left // 2, -(-self.right // 2))

    def doubled(self) -> Region:
        """The same area on the next finer grid."""
        return Region(2 * self.top, 2 * self.bottom, 2 * self.left, 2 * self.right)

    def within(self, outer: Region) -> Region:
        """This region in the coordinates of a tensor that covers `outer`."""
        assert outer.top <= self.top and self.bottom <= outer.bottom, (self, outer)
        assert outer.left <= self.left and self.right <= outer.right, (self, outer)
        return Region(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)


@dataclass(frozen=True)
class StageRegions:
    """The regions that one stage must compute, of its encoder (the skip) and its decoder, and what each reads.

    A 3x3 convolution reads one more cell on every side than it writes, within the stage's `frame`, the image on its
    grid. Outside the frame is zero padding, so reads are clipped to the frame and only there.
    """

    frame: Region
    encoded: Region
    decoded: Region

    @property
    def encoder_reads(self) -> Region:
        return self.encoded.grown(self.frame)

    @property
    def merged(self) -> Region:
        return self.decoded.grown(self.frame)

    @property
    def upsampled(self) -> Region:
        return self.merged.grown(self.frame)

    def image_edges(self) -> Iterator[Region]:
        """The rows and columns of `decoded` that lie on the image's border, one cell wide."""
        inside, frame = self.decoded, self.frame
        if inside.top == frame.top:
            yield dataclasses.replace(inside, bottom=inside.top + 1)
        if inside.bottom == frame.bottom:
            yield dataclasses.replace(inside, top=inside.bottom - 1)
        if inside.left == frame.left:
            yield dataclasses.replace(inside, right=inside.left + 1)
        if inside.right == frame.right:
            yield dataclasses.replace(inside, left=inside.right - 1)


def stage_regions(wanted: Region, image: Region, n_stages: int) -> tuple[list[StageRegions], Region]:
    """Walk the U-Net backwards from the `wanted` output.

    Returns:
        Each stage's regions, full resolution first, and the region of the bottleneck.
    """
    decoders = []
    frame, decoded = image, wanted
    for _ in range(n_stages):
        decoders.append((frame, decoded))
        frame, decoded = frame.halved(), decoded.grown(frame).grown(frame).halved()
    bottleneck = pooled = decoded

    stages: list[StageRegions] = []
    for frame, decoded in reversed(decoders):
        stages.append(StageRegions(frame, pooled.doubled(), decoded))
        pooled = stages[-1].encoder_reads
    return stages[::-1], bottleneck
