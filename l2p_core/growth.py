"""Growth of a noisy image to a larger size within one space, without training (SPEED, MIT).

Sampling decides an image's low frequencies first, at high noise. It may therefore start small, where a step is cheap,
and grow while the frequencies that only the larger size has are still hidden in noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ops.dct import resize_band

Space = Literal["latent", "pixels"]
Size = tuple[int, int]
"""Height and width in cells of the space: pixels, or cells of latents."""


@dataclass(frozen=True)
class Spectrum:
    """Mean power of natural images' DCT coefficients at `side` cells: P(w) = amplitude w^-exponent, w in cycles."""

    amplitude: float
    exponent: float
    side: int

    def power(self, cycles: float, side: float) -> float:
        """Mean power at w cycles across `side` cells: an orthonormal transform's energy grows with area."""
        return self.amplitude * (side / self.side) ** 2 * cycles**-self.exponent


SPECTRA: dict[Space, Spectrum] = {"pixels": Spectrum(3745, 2.449, 512), "latent": Spectrum(204, 1.915, 128)}
"""Fits published with SPEED (MIT), for pixels in [-1, 1] and for normalised latents of 8 x 8 pixels a cell."""

SAFE, STILL_GOOD = 0.01, 0.05
"""The share of a frequency's information that may be visible before growing: SAFE loses nothing, and images still look
good at STILL_GOOD (SPEED)."""


def grown_sigma(sigma: float, old: Size, new: Size) -> float:
    """The noise level t' = r t / (1 + (r - 1) t) after growing from `old` to `new`, r the ratio of their sides."""
    ratio = _ratio(old, new)
    return ratio * sigma / (1 + (ratio - 1) * sigma)


def safe_sigma(old: Size, new: Size, space: Space = "pixels", delta: float = SAFE) -> float:
    """The lowest noise level before growing at which the new band is still all noise, as the model expects it.

    A frequency of power P is hidden, up to `delta` of its information, above t_w = 1 / (1 + sqrt(delta / (P (1 + P -
    delta)))). Growing adds noise alone above the old size's highest frequency, so t_w there bounds the level that
    growing leads to.

    Args:
        old: cells of the image before growing (pixels, or latent cells), as (height, width).
        new: after growing.
        delta: SAFE to STILL_GOOD; more waits longer, for a lower level.
    """
    ratio = _ratio(old, new)
    power = SPECTRA[space].power(math.sqrt(old[0] * old[1]) / 2, math.sqrt(new[0] * new[1]))
    after = 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))
    return after / (ratio - (ratio - 1) * after)


def grow(x: Tensor, sigma: float, noise: Tensor) -> tuple[Tensor, float]:
    """A noisy image at a larger size and its new noise level, without any training (SPEED).

    x' = kappa (t n + U (x - t U^T n)) with U the zero-padded cosine transform, t the noise level, n the noise and
    kappa = r / (1 + (r - 1) t): the old frequencies hold exactly what they would at the new level t', the new ones hold
    noise alone, which the model turns into detail. At r = 1 nothing changes.

    Args:
        x: (B, C, h, w) at `sigma`: pixels or latents.
        sigma: its noise level, in (0, 1]; below `safe_sigma` the result lacks detail.
        noise: (B, C, H, W) standard normal, of the size to grow to.

    Returns:
        (B, C, H, W) float32 and its noise level. With `x` and `noise`, memory holds less than three images of the new
        size, at 10K.

    Raises:
        ValueError: for a smaller size, another aspect ratio, noise for another number of images or channels, or a noise
            level outside (0, 1].
    """
    if not 0 < sigma <= 1:
        raise ValueError(
            f"An image grows at a noise level above 0 and at most 1, not {sigma}: a finished image is resized instead."
        )
    if x.shape[:2] != noise.shape[:2]:
        raise ValueError(
            f"The noise has the shape {tuple(noise.shape)} and the image {tuple(x.shape)}: only height and width may "
            "differ."
        )
    (height, width), (new_height, new_width) = x.shape[-2:], noise.shape[-2:]
    ratio = _ratio((height, width), (new_height, new_width))
    kappa = ratio / (1 + (ratio - 1) * sigma)
    out = torch.empty(noise.shape, dtype=torch.float32, device=noise.device)
    for result, plane, fresh in zip(*(images.flatten(0, 1) for images in (out, x, noise)), strict=True):
        fresh = fresh.float()
        low = resize_band(fresh, height, width).mul(-sigma).add_(plane)
        resize_band(low, new_height, new_width, out=result).add_(fresh, alpha=sigma).mul_(kappa)
    return out, grown_sigma(sigma, (height, width), (new_height, new_width))


def keeps_aspect(old: Size, new: Size) -> bool:
    """Whether two sizes have the same aspect ratio, to within less than a cell."""
    (height, width), (new_height, new_width) = old, new
    return abs(new_height * width - height * new_width) < new_height + new_width


def _ratio(old: Size, new: Size) -> float:
    (height, width), (new_height, new_width) = old, new
    if not keeps_aspect(old, new):
        raise ValueError(
            f"An image of {width} x {height} cannot grow to {new_width} x {new_height}: growing keeps the aspect ratio;"
            f" {round(width * new_height / height)} x {new_height} has it."
        )
    if new_height < height or new_width < width:
        raise ValueError(f"Growing from {width} x {height} to {new_width} x {new_height} would make the image smaller.")
    return math.sqrt(new_height * new_width / (height * width))
