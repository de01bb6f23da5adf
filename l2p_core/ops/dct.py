"""The orthonormal cosine transform (DCT-II) along one axis, through torch's FFT (Makhoul 1980), in bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 1 << 22
"""Elements of an image that are transformed together; temporaries then stay below 200 MB at any image size."""


def dct(x: Tensor) -> Tensor:
    """The orthonormal DCT-II of (..., N) along its last axis: energy is kept, and white noise stays white."""
    n = x.shape[-1]
    reordered = torch.cat((x[..., 0::2], x[..., 1::2].flip(-1)), -1)
    spectrum = torch.fft.fft(reordered)
    return (spectrum * _twist(n, x.device)).real * _scale(n, x.device)


def idct(coefficients: Tensor) -> Tensor:
    """The inverse of `dct`, for (..., N)."""
    n = coefficients.shape[-1]
    scaled = coefficients / _scale(n, coefficients.device)
    mirrored = torch.cat((torch.zeros_like(scaled[..., :1]), scaled[..., 1:].flip(-1)), -1)
    spectrum = torch.complex(scaled, -mirrored) * _twist(n, coefficients.device).conj()
    reordered = torch.fft.irfft(spectrum[..., : n // 2 + 1], n=n)
    x = torch.empty_like(coefficients)
    x[..., 0::2] = reordered[..., : (n + 1) // 2]
    x[..., 1::2] = reordered[..., (n + 1) // 2 :].flip(-1)
    return x


def resize_band(plane: Tensor, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """Resize a plane (h, w) and keep its low frequencies, orthonormally: higher ones are cut, or zero. Enlarging and
    then reducing restores the plane; reducing keeps white noise white.

    Args:
        out: (height, width), where the result goes; at the plane's own size and without it, the plane is returned.
    """
    return _along_last(_along_last(plane, width).T, height, None if out is None else out.T).T


def _along_last(plane: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    rows, n = plane.shape
    if n == size:
        return plane if out is None else out.copy_(plane)
    if out is None:
        out = plane.new_empty((rows, size))
    at_once = max(1, ELEMENTS_AT_ONCE // max(n, size))
    for start in range(0, rows, at_once):
        kept = dct(plane[start : start + at_once])[:, :size]
        out[start : start + at_once] = idct(torch.nn.functional.pad(kept, (0, size - kept.shape[1])))
    return out


def _twist(n: int, device: torch.device) -> Tensor:
    angle = torch.arange(n, dtype=torch.float64) * (-math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def _scale(n: int, device: torch.device) -> Tensor:
    scale = torch.full((n,), math.sqrt(2 / n), device=device)
    scale[0] = math.sqrt(1 / n)
    return scale
