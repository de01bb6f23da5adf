"""Measures what transfer keeps: statistics of a source's images beside those of the pixel model, over pairs of
images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dataset.images import BrokenImage
from ..files.tensor_io import ProgressCallback
from .duplicates import LIMIT, near_duplicates
from .measure import PATCH, Array, ImageStatistics, grid_ratio, measure, radial_frequencies, window_for
from .pairs import Pair, Picture, check_sizes

FINE = 0.25
"""Cycles per pixel from which a spectrum's power counts as fine detail: structures of 4 pixels and less."""

_COLOURS = ("Red", "Green", "Blue")
_GRID = "energy of differences across the borders of patches over that inside them; 1 means no grid"
_CHROMA = "mean of a pixel's largest minus its smallest value"
_LIMITS = "share of all values that are {} that are cut off"
_ALIKE = f"images that look like an earlier one of their folder (thumbnails within {LIMIT * 255:.0f} of 255)"


@dataclass(frozen=True)
class ComparedStatistic:
    """A statistic of both sides.

    Attributes:
        name: as shown.
        source, pixel: the means over all images.
        kept: the pixel model's value over the source's; None if that is meaningless (shares near 0, counts).
        meaning: what the number is, and what a large difference looks like.
        form: of the two values, a format specification.
    """

    name: str
    source: float
    pixel: float
    kept: float | None
    meaning: str
    form: str = ".4f"


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        pairs: the images compared.
        patch: side in pixels of the patches whose borders were measured.
        frequencies: of the spectra, in cycles per pixel.
        source, pixel: statistics of each image, in the order of `pairs`.
        repeats: near-duplicates among the source's images, and among the pixel model's: pairs of indices.
        difference: root mean square difference of the thumbnails of each pair, in [0, 1].
    """

    pairs: Sequence[Pair]
    patch: int
    frequencies: Array
    source: Sequence[ImageStatistics]
    pixel: Sequence[ImageStatistics]
    repeats: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    difference: Array

    def means(self, value: Callable[[ImageStatistics], Any]) -> tuple[Any, Any]:
        """A statistic's mean over the images of each side."""
        first, second = (np.mean([value(one) for one in side], 0) for side in (self.source, self.pixel))
        return first, second

    @property
    def rows(self) -> list[ComparedStatistic]:
        """The table of statistics."""
        spectra, grids = self.means(lambda one: one.spectrum), self.means(lambda one: one.grid)
        fine = [float(spectrum[self.frequencies >= FINE].mean()) for spectrum in spectra]
        colours, spreads = self.means(lambda one: one.colour), self.means(lambda one: one.spread)
        return [
            _kept(f"Grid of {self.patch} pixels", [grid_ratio(grid) for grid in grids], _GRID, ".3f"),
            _kept(
                "Fine detail", fine, "mean power of structures of 4 pixels and less; less is blur, more is noise", ".3g"
            ),
            _kept("Sharpness", self.means(lambda one: one.sharpness), "standard deviation of the Laplacian of luma"),
            _kept("Brightness", self.means(lambda one: one.brightness), "mean luma, 0 to 1"),
            _kept("Contrast", self.means(lambda one: one.contrast), "standard deviation of luma"),
            _kept("Colourfulness", self.means(lambda one: one.chroma), _CHROMA),
            *(_kept(name, both, "mean, 0 to 1") for name, *both in zip(_COLOURS, *colours, strict=True)),
            *(
                _kept(f"{name} spread", both, "standard deviation")
                for name, *both in zip(_COLOURS, *spreads, strict=True)
            ),
            ComparedStatistic("At black", *self.means(lambda one: one.black), None, _LIMITS.format("0: shadows")),
            ComparedStatistic("At white", *self.means(lambda one: one.white), None, _LIMITS.format("255: lights")),
            ComparedStatistic("Near-duplicates", len(self.repeats[0]), len(self.repeats[1]), None, _ALIKE, ".0f"),
        ]


def compare(pairs: Sequence[Pair], patch: int = PATCH, progress: ProgressCallback | None = None) -> Comparison:
    """Measure every image of the pairs.

    Args:
        pairs: one or more, see `pairs.of_folders`.
        patch: side in pixels of the pixel model's patches.
        progress: called with (images measured, images in all); an exception from it stops the work.

    Raises:
        ValueError: for pairs of unequal sizes, and for an image that cannot be read or is too small.
    """
    assert pairs
    check_sizes(pairs)
    window = window_for([side for pair in pairs for side in pair.source.size])
    done, total = 0, 2 * len(pairs)
    sides: tuple[list[ImageStatistics], list[ImageStatistics]] = ([], [])
    for pair in pairs:
        for side, picture in zip(sides, (pair.source, pair.pixel), strict=True):
            side.append(_measured(picture, patch, window))
            done += 1
            if progress:
                progress(done, total)
    thumbnails = [np.stack([one.thumbnail for one in side]) for side in sides]
    return Comparison(
        pairs,
        patch,
        radial_frequencies(window),
        *sides,
        repeats=(near_duplicates(thumbnails[0]), near_duplicates(thumbnails[1])),
        difference=np.sqrt(np.square(thumbnails[0] - thumbnails[1]).mean(1)),
    )


def _measured(picture: Picture, patch: int, window: int) -> ImageStatistics:
    with picture.opened() as image:
        try:
            return measure(image, patch, window)
        except BrokenImage as error:
            raise ValueError(f"{picture.name} cannot be compared: {error}.") from error


def _kept(name: str, both: Sequence[float], meaning: str, form: str = ".4f") -> ComparedStatistic:
    """A row of a statistic of which the pixel model keeps a share."""
    source, pixel = map(float, both)
    return ComparedStatistic(name, source, pixel, pixel / source if source > 0 else None, meaning, form)
