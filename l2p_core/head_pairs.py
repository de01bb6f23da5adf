"""Pairs of channels, by which a SiLU network computes linearly: silu(a) - silu(-a) = a.

Pair n of a convolution's outputs are its channels 2n and 2n + 1. The functions below write the rows of convolutions
that make pairs and read them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head_windows import AT_ONCE, Windows

COLOURS = 3
LEVELS = 16
"""Noise levels that have a gain of their own."""
_BLUR = (0.25, 0.5, 0.25)


def amplified(noisy: Tensor, gain: Tensor) -> Tensor:
    """The noisy pixels times their gain, as pairs of channels compute it."""
    return F.silu(gain + noisy) - F.silu(gain - noisy)


def gains_of(windows: Windows) -> Tensor:
    """Each window's gain g, (N,): at similar noise levels, 2 silu'(g) is the regression of the velocity on the noisy
    pixel, both without their patch's mean."""
    side = windows.noisy.shape[-1] // windows.features.shape[-1]

    def details(pixels: Tensor) -> Tensor:
        return pixels - F.interpolate(F.avg_pool2d(pixels, side), scale_factor=side)

    shared, own = [], []
    for noisy, target in zip(windows.noisy.split(AT_ONCE), windows.target.split(AT_ONCE), strict=True):
        x = details(noisy)
        shared.append(-(x * details(target)).sum((1, 2, 3)))
        own.append(x.square().sum((1, 2, 3)))
    order, factor = windows.sigma.argsort(), torch.zeros(len(windows.sigma))
    for group in order.tensor_split(LEVELS):
        factor[group] = torch.cat(shared)[group].sum() / torch.cat(own)[group].sum()
    # silu' rises from 0 to its maximum of 1.1 between these.
    gain = torch.linspace(-1.278, 2.399, 4096)
    slope = torch.sigmoid(gain) * (1 + gain * torch.sigmoid(-gain))
    return gain[torch.searchsorted(slope, factor / 2).clamp(max=len(gain) - 1)]


def hand_up(up: nn.Conv2d, pairs: int) -> None:
    """A convolution that hands on the differences of the first pairs, as far as it has channels."""
    for number in range(min(pairs, up.out_channels)):
        set_row(up, number, centre(up, difference(number)))


def difference(pair: int, first: int = 0) -> dict[int, float]:
    """Factors of the channels of a pair, where pairs begin at channel `first`."""
    return {first + 2 * pair: 1.0, first + 2 * pair + 1: -1.0}


def kernel_of(row: Tensor) -> Tensor:
    """(3 * 3 * C,) as `_rows` reads values -> (C, 3, 3)."""
    return row.view(3, 3, -1).permute(2, 0, 1)


def smooth(layer: nn.Conv2d, taps: dict[int, float]) -> Tensor:
    """A kernel (C, 3, 3) that adds these channels, smoothed, times their factors."""
    line = torch.tensor(_BLUR)
    kernel = torch.zeros(layer.weight.shape[1:])
    for channel, factor in taps.items():
        kernel[channel] = factor * torch.outer(line, line)
    return kernel


def centre(layer: nn.Conv2d, taps: dict[int, float]) -> Tensor:
    """A kernel (C, k, k) that adds these channels of the same pixel, times their factors."""
    kernel = torch.zeros(layer.weight.shape[1:])
    middle = kernel.shape[-1] // 2
    for channel, factor in taps.items():
        kernel[channel, middle, middle] = factor
    return kernel


def set_pair(layer: nn.Conv2d, row: int, kernel: Tensor, bias: float = 0.0) -> None:
    """Two outputs that after SiLU differ by kernel * input + bias."""
    set_row(layer, row, kernel, bias)
    set_row(layer, row + 1, -kernel, -bias)


def set_row(layer: nn.Conv2d, row: int, kernel: Tensor, bias: float = 0.0) -> None:
    """One output, kernel * input + bias."""
    assert layer.bias is not None
    layer.weight[row], layer.bias[row] = kernel, bias
