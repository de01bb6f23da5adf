"""Cropping and resizing in float32, as Pillow does it with 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SUPPORT = 3  # of the Lanczos filter, in pixels of the larger scale


def fitted(pixels: Tensor, width: int, height: int) -> Tensor:
    """(C, H, W) cropped centrally to a shape and resized to it, (C, height, width).

    Each pixel averages over its source area (Lanczos). At scale 1 pixels are copied, not filtered. No value leaves
    [-1, 1] unless the image does.
    """
    scale = min(pixels.shape[2] / width, pixels.shape[1] / height)
    lowest, highest = pixels.aminmax()
    # Rows first: they lie together in memory, and fewer of them are left for the other axis.
    for axis, size in ((1, height), (2, width)):
        pixels = _along(pixels, axis, size, min(pixels.shape[axis], size * scale))
    return pixels.clamp(lowest.clamp(max=-1), highest.clamp(min=1)).contiguous()


def _along(pixels: Tensor, axis: int, size: int, length: float) -> Tensor:
    """The central `length` pixels of an axis resampled to `size`."""
    source = pixels.shape[axis]
    start = (source - length) / 2
    if length == size:
        return pixels.narrow(axis, math.floor(start), size)
    places, weights = _taps(source, start, length, size)
    shape = [1, 1, 1]
    shape[axis] = size
    result = torch.zeros(*pixels.shape[:axis], size, *pixels.shape[axis + 1 :])
    for place, weight in zip(places, weights, strict=True):
        result.addcmul_(pixels.index_select(axis, place), weight.view(shape))
    return result


def _taps(source: int, start: float, length: float, size: int) -> tuple[Tensor, Tensor]:
    """The pixels that contribute to each new one, and their weights: both (taps, size)."""
    scale = length / size
    stretch = max(scale, 1.0)
    centre = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first = (centre - _SUPPORT * stretch + 0.5).floor().clamp(min=0)
    last = (centre + _SUPPORT * stretch + 0.5).floor().clamp(max=source)
    taps = int((last - first).max())
    places = first + torch.arange(taps, dtype=torch.float64)[:, None]
    away = (places - centre + 0.5) / stretch
    weights = torch.sinc(away) * torch.sinc(away / _SUPPORT) * (away.abs() < _SUPPORT) * (places < last)
    return places.clamp(max=source - 1).long(), (weights / weights.sum(0)).float()
