"""Statistics of one image for judging transfer: grid, spectrum, colour, contrast, sharpness, limits.

An image is read in bands of rows, so that one of 10240 pixels takes little more memory than its 8-bit pixels. Luma is
that of ITU-R BT.601, (0.299, 0.587, 0.114), in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..dataset.images import BrokenImage, decoding

Array = NDArray[np.floating[Any]]

PATCH = 16
"""The side of a patch of the 1k variant, and of what a latent source's VAE and patches span together, in pixels."""
WINDOW = 256
"""The largest side of the windows of a spectrum."""
LEAST_SIDE = 32
"""The smallest side of an image that can be measured."""
THUMBNAIL = 16
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_TINY = 1e-12
_LAPLACIAN_ROWS = 2  # rows of the previous band that the next one needs


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics of an image; values of pixels are in [0, 1].

    Attributes:
        colour: means of red, green and blue.
        spread: standard deviations of red, green and blue.
        brightness: mean luma.
        contrast: standard deviation of luma.
        chroma: mean of the largest minus the smallest of a pixel's three values.
        sharpness: standard deviation of luma's four-neighbour Laplacian.
        black, white: shares of all values that are exactly 0 and 255.
        grid: mean squared luma differences between neighbours, by the position of their border in a patch, (patch,);
            position 0 is the border between two patches.
        spectrum: mean power of luma by radial frequency, see `radial_frequencies`.
        thumbnail: the image averaged to 16 x 16, (768,).
    """

    colour: tuple[float, float, float]
    spread: tuple[float, float, float]
    brightness: float
    contrast: float
    chroma: float
    sharpness: float
    black: float
    white: float
    grid: Array
    spectrum: Array
    thumbnail: Array


def grid_ratio(grid: Array) -> float:
    """The first entry of `ImageStatistics.grid` over the mean of the others; 1 for an image without any difference."""
    inside = float(grid[1:].mean())
    return float(grid[0]) / inside if inside > _TINY else (1.0 if grid[0] <= _TINY else math.inf)


def window_for(sides: Iterator[int] | list[int]) -> int:
    """The side of a spectrum's windows for images of these sides: a power of 2 that fits into each, 32 to 256."""
    return min(WINDOW, 1 << (min(sides).bit_length() - 1))


def radial_frequencies(window: int) -> Array:
    """The middles of a spectrum's rings, in cycles per pixel, 0.5 being the finest; (window / 2,)."""
    return (np.arange(window // 2, dtype=np.float32) + 0.5) / window


def measure(image: Image.Image, patch: int = PATCH, window: int = WINDOW) -> ImageStatistics:
    """The statistics of an image of 8 bits per channel; transparency is dropped.

    Args:
        image: with both sides `LEAST_SIDE` or more.
        patch: side in pixels of the patches whose borders are looked for; they begin at the top left corner.
        window: of the spectrum, see `window_for`.

    Raises:
        BrokenImage: if the image is damaged, too small or has more than 8 bits per channel.
    """
    image = _plain(image)
    width, height = image.size
    least = max(LEAST_SIDE, window, patch + 1)
    if min(width, height) < least:
        raise BrokenImage(f"it is {width} x {height} pixels, and {least} are the least to measure")
    sums = _Sums(patch, window)
    for top in range(0, height, WINDOW):
        sums.add(np.asarray(image.crop((0, top, width, min(top + WINDOW, height)))))
    return sums.result(image)


def _plain(image: Image.Image) -> Image.Image:
    """The decoded image as RGB."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        raise BrokenImage("it has more than 8 bits per channel: save a copy with 8 bits")
    with decoding():
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


class _Sums:
    """Running sums over bands of an image."""

    def __init__(self, patch: int, window: int):
        self.patch, self.window = patch, window
        self.row = self.windows = 0
        self.chroma = 0.0
        self.luma, self.laplacian = np.zeros(2), np.zeros(3)
        self.energy, self.borders, self.power = np.zeros(patch), np.zeros(patch), np.zeros((window, window))
        self.above: Array | None = None  # the last rows of luma of the band before
        edge = np.hanning(window + 2)[1:-1]
        taper = np.outer(edge, edge)
        self.taper = (taper / np.sqrt((taper**2).mean())).astype(np.float32)

    def add(self, band: NDArray[np.uint8]) -> None:
        """Add rows (rows, width, 3) below those added before."""
        self.chroma += float((band.max(2) - band.min(2)).sum(dtype=np.float64)) / 255
        luma = band.astype(np.float32) / 255 @ _LUMA
        self.luma += [luma.sum(dtype=np.float64), np.square(luma).sum(dtype=np.float64)]
        self._add_spectrum(luma)
        self._add_grid(np.square(np.diff(luma, axis=1)).sum(0, dtype=np.float64), 1, len(luma))
        joined = luma if self.above is None else np.concatenate([self.above, luma])
        self._add_laplacian(joined)
        downwards = joined if self.above is None else joined[len(self.above) - 1 :]
        first = 1 if self.above is None else self.row
        self._add_grid(np.square(np.diff(downwards, axis=0)).sum(1, dtype=np.float64), first, luma.shape[1])
        self.above = joined[-_LAPLACIAN_ROWS:]
        self.row += len(luma)

    def _add_grid(self, sums: NDArray[np.float64], first: int, length: int) -> None:
        """Add squared differences summed along each border: the borders from `first` on, each `length` pixels long."""
        places = np.arange(first, first + len(sums)) % self.patch
        np.add.at(self.energy, places, sums)
        np.add.at(self.borders, places, length)

    def _add_laplacian(self, luma: Array) -> None:
        if min(luma.shape) < 3:
            return
        middle = luma[1:-1, 1:-1]
        values = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * middle
        self.laplacian += [values.size, values.sum(dtype=np.float64), np.square(values).sum(dtype=np.float64)]

    def _add_spectrum(self, luma: Array) -> None:
        """Welch's method: tapered windows side by side, their power summed."""
        side = self.window
        rows, columns = luma.shape[0] // side, luma.shape[1] // side
        if not rows or not columns:
            return
        tiles = luma[: rows * side, : columns * side].reshape(rows, side, columns, side).swapaxes(1, 2)
        tiles = tiles.reshape(-1, side, side)
        for tile in tiles:  # one by one: complex numbers of all would take eight times the band
            self.power += np.square(np.abs(np.fft.fft2((tile - tile.mean()) * self.taper))) / side**2
        self.windows += len(tiles)

    def result(self, image: Image.Image) -> ImageStatistics:
        """The statistics of the image whose bands were added."""
        pixels = image.width * image.height
        counts, levels = np.array(image.histogram()).reshape(3, 256), np.arange(256) / 255
        mean = counts @ levels / pixels
        spread = np.sqrt(np.maximum(counts @ levels**2 / pixels - mean**2, 0))
        thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        count, total, squares = self.laplacian
        brightness = float(self.luma[0] / pixels)
        return ImageStatistics(
            colour=tuple(mean.tolist()),
            spread=tuple(spread.tolist()),
            brightness=brightness,
            contrast=math.sqrt(max(float(self.luma[1]) / pixels - brightness**2, 0)),
            chroma=self.chroma / pixels,
            sharpness=math.sqrt(max(squares / count - (total / count) ** 2, 0)),
            black=int(counts[:, 0].sum()) / (3 * pixels),
            white=int(counts[:, -1].sum()) / (3 * pixels),
            grid=(self.energy / np.maximum(self.borders, 1)).astype(np.float32),
            spectrum=_radial(self.power / max(self.windows, 1)),
            thumbnail=np.asarray(thumbnail, dtype=np.float32).reshape(-1) / 255,
        )


def _radial(power: NDArray[np.float64]) -> Array:
    """The mean of a power spectrum (n, n) over rings of one frequency step, up to half a cycle per pixel; (n / 2,)."""
    side = len(power)
    frequency = np.fft.fftfreq(side) * side
    ring = np.hypot(frequency[:, None], frequency[None]).astype(int)
    sums = np.bincount(ring.ravel(), power.ravel(), side)[: side // 2]
    counts = np.bincount(ring.ravel(), minlength=side)[: side // 2]
    return (sums / counts).astype(np.float32)
