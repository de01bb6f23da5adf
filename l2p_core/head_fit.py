"""The informed start of the Detailer Head: least squares, stage by stage, before the first training step.

A head with random weights is what training spends most of its images on. This one begins with an estimate of its own
target x0 - noise, in closed form, from a thousand noisy images and the features that the untrained backbone makes of
them. Two identities turn SiLU networks into something that least squares can fill:

    silu(a) - silu(-a) = a                        a pair of channels hands a value on unchanged
    silu(g + x) - silu(g - x) = 2 silu'(g) x      a pair multiplies a pixel x by a gain that the features choose
                                + O(x^3)

The head then holds, from coarse to fine,

1. in the bottleneck, the directions of the features that best predict the patch's target (reduced-rank regression);
2. in each decoder stage, the average of the target over that stage's pixels, and the gain, each fitted to everything
   the stage's convolution reads and handed on as a pair; its other channels stay random, as new features for the next;
3. at full resolution, the noisy pixel times its gain, the fitted rest, and the output layer fitted to all of it.

The gain is what the noisy pixel contributes where details are unknown: the regression of the velocity on the noisy
pixel within a patch, at each noise level. Nothing here comes from a trained pixel model. The method is ours and was
measured in the tiny world only, see docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import PixelConfig, Stage
from .detailer import DetailerHead
from .head_windows import AT_ONCE, Windows
from .ops.least_squares import LeastSquares, added

CELLS = 8
"""Side of a window in patches: one of each image, cut at a random place."""
WINDOWS = 1024
"""Images to fit to."""
ROWS = 16
"""Places of all windows at which a stage is fitted, for each value that its convolution reads."""
MEASURED = 128
"""Windows on which the error before and after is measured."""
WARM_UP = 20
"""Least steps of warm-up after a fit: AdamW's first steps change every weight by the learning rate in one direction,
which adds up over the thousands of values that a convolution reads."""

_COLOURS = 3
_GAIN = _COLOURS
"""The channel after an upsampling that holds the gain, behind those of the target's colours."""
_SIGNALS = _COLOURS + 1
_LEVELS = 16
"""Noise levels that have a gain of their own."""
_RIDGE = 1e-2
"""Of the mean variance of a regression's inputs. A thousandth fits a little better, with larger weights, of which
training undoes more at first."""

Working = Callable[[int, int], None]
"""Called with how much is done and the total; may raise to stop."""


@dataclass(frozen=True)
class HeadFit:
    """What a fit did.

    Attributes:
        windows: number of images that it used.
        before: mean squared error of the velocity on them before the fit.
        after: the same afterwards.
    """

    windows: int
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether the fit lowered the error; too few or too small images can raise it."""
        return self.after < self.before

    def summary(self) -> str:
        """A sentence."""
        if not self.better:
            return (
                f"The Detailer Head starts unfitted: a fit to {self.windows} noisy images has a velocity error of "
                f"{self.after:.3f} there, no fit {self.before:.3f}. More or larger images may help."
            )
        return (
            f"The Detailer Head starts fitted to {self.windows} noisy images: velocity error {self.after:.3f} there, "
            f"{self.before:.3f} unfitted."
        )


def can_fit(config: PixelConfig) -> bool:
    """Whether patches are as large as the bottleneck's cells, and every stage has the channels that a fit fills."""
    first, *inner = config.head.stages
    return (
        config.patch_size == 2 ** len(config.head.stages)
        and all(stage.up >= _SIGNALS and stage.dec >= 2 * _SIGNALS for stage in inner)
        and first.up >= _SIGNALS
        and first.enc >= 2 * _COLOURS
        and first.dec >= 4 * _COLOURS
    )


@torch.no_grad()
def fit(head: DetailerHead, windows: Windows, working: Working | None = None) -> HeadFit:
    """Fit a head with random weights, in place.

    Args:
        head: in float32, of a configuration that `can_fit` accepts.
        windows: at least `_LEVELS` of them.
        working: shows the progress.

    Returns:
        How well it predicts before and after.

    Raises:
        ValueError: if the head's weights are not finite.
    """
    fitter = _Fitter(head, windows, working or (lambda done, total: None))
    before = fitter.error()
    if not math.isfinite(before):
        raise ValueError(
            "The Detailer Head cannot be fitted: its first weights or their output are not finite numbers."
        )
    fitter.first_stage()
    fitter.bottleneck()
    for stage in reversed(head.stages):
        fitter.decoder(stage)
    fitter.output()
    return HeadFit(len(windows.sigma), before, fitter.error())


class _Fitter:
    """Fits one layer after the other."""

    def __init__(self, head: DetailerHead, windows: Windows, working: Working):
        self.head, self.windows = head, windows
        self.device = next(head.parameters()).device
        self._working, self._done = working, 0
        self._total = (len(head.stages) + 2) * len(windows.sigma)  # with bottleneck and output
        self._places = torch.Generator().manual_seed(0)
        self.gains = _gains(windows)

    def parts(self) -> Iterator[tuple[Windows, Tensor]]:
        """Some windows with their gains at a time."""
        gains = self.gains.split(AT_ONCE)
        for part, gain in zip(self.windows.parts(self.device), gains, strict=True):
            self._done += len(gain)
            self._working(self._done, self._total)
            yield part, gain.to(self.device)

    def error(self) -> float:
        """The head's mean squared error."""
        errors = []
        for part in self.windows.parts(self.device, MEASURED):
            errors.append((self.head(part.noisy, part.features) - part.target).square().mean((1, 2, 3)))
        return float(torch.cat(errors).mean())

    def first_stage(self) -> None:
        """The first encoder hands the noisy pixels on as pairs, to the full resolution of the decoder."""
        layer = self._layer("enc", self.head.stages[0], 0)
        for colour in range(_COLOURS):
            _set_pair(layer, 2 * colour, _centre(layer, {colour: 1.0}))

    def bottleneck(self) -> None:
        """Pairs of the directions of the features that best predict a patch's target and the gain."""
        layer = self.head.bottleneck[0]
        assert isinstance(layer, nn.Conv2d)
        squares: LeastSquares | None = None
        for part, gain in self.parts():
            cells = part.features.shape[-1]
            patches = rearrange(part.target, "n c (h p) (w q) -> (n h w) (c p q)", h=cells, w=cells)
            # As much of a say for the gain as for all pixels together.
            weighted = gain.repeat_interleave(cells * cells)[:, None] * patches.shape[1] ** 0.5
            squares = added(
                squares, rearrange(part.features, "n d h w -> (n h w) d"), torch.cat([patches, weighted], 1)
            )
        assert squares is not None
        weight, _ = squares.solved(_RIDGE)
        covariance, mean = squares.covariance(), squares.mean()
        variance, axes = torch.linalg.eigh(weight @ covariance @ weight.T)
        count = min(layer.out_channels // 2, len(mean), len(variance))
        directions = axes[:, -count:].T @ weight / variance[-count:].clamp(min=1e-12).sqrt()[:, None]
        inside = layer.in_channels - len(mean)
        for number, direction in enumerate(directions):
            row = torch.zeros(layer.in_channels, dtype=torch.float64)
            row[inside:] = direction
            _set_pair(layer, 2 * number, row[:, None, None], -float(direction @ mean))

    def decoder(self, stage: Stage) -> None:
        """A decoder stage: averages of the target over its pixels, and the gain."""
        up, layer = self._layer("up", stage, 1), self._layer("dec", stage, 0)
        last, deepest = stage is self.head.stages[0], stage is self.head.stages[-1]
        if not deepest:
            _hand_up(up)
        squares: LeastSquares | None = None
        for part, gain in self.parts():
            inputs = self._inputs(part, stage)
            wanted = part.target
            if not deepest:
                finest = F.interpolate(inputs[:, _GAIN, None], size=wanted.shape[-2:])
                wanted = wanted + _amplified(part.noisy, finest)
            wanted = F.avg_pool2d(wanted, wanted.shape[-1] // inputs.shape[-1])
            if not last:
                wanted = torch.cat([wanted, gain[:, None, None, None].expand(-1, 1, *wanted.shape[-2:])], 1)
            squares = added(squares, *self._rows(inputs, wanted, part.margin))
        assert squares is not None
        weight, bias = squares.solved(_RIDGE)
        rows = weight.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        for number, (row, constant) in enumerate(zip(rows, bias.tolist(), strict=True)):
            _set_pair(layer, 2 * number, row, constant)
        if last:
            self._amplify(layer, up.out_channels)

    def output(self) -> None:
        """The last convolution, which sees one pixel of all channels."""
        layer = self.head.out_conv
        assert isinstance(layer, nn.Conv2d)
        squares: LeastSquares | None = None
        for part, _ in self.parts():
            squares = added(squares, *self._rows(self._inputs(part, None), part.target, part.margin, side=1))
        assert squares is not None
        weight, bias = squares.solved(_RIDGE)
        for row, (kernel, constant) in enumerate(zip(weight[:, :, None, None], bias.tolist(), strict=True)):
            _set(layer, row, kernel, constant)

    def _amplify(self, layer: nn.Conv2d, skip: int) -> None:
        """Pairs of the noisy pixels times their gain; the skip connection begins at channel `skip`."""
        for colour in range(_COLOURS):
            for sign in (1, -1):
                row = 2 * (_COLOURS + colour) + (sign < 0)
                pixel = {skip + 2 * colour: sign, skip + 2 * colour + 1: -sign}
                _set(layer, row, _centre(layer, {**pixel, _GAIN: 1.0}))

    def _inputs(self, part: Windows, until: Stage | None) -> Tensor:
        """What the decoder convolution of a stage reads, or for None the output convolution."""
        x, skips = part.noisy, []
        for stage in self.head.stages:
            x = F.silu(self._layer("enc", stage, 0)(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.silu(self.head.bottleneck[0](torch.cat([x, part.features], 1)))
        for stage in reversed(self.head.stages):
            x = torch.cat([self._layer("up", stage, 1)(F.interpolate(x, scale_factor=2.0)), skips.pop()], 1)
            if stage is until:
                return x
            x = F.silu(self._layer("dec", stage, 0)(x))
        return x

    def _rows(self, inputs: Tensor, wanted: Tensor, margin: int, side: int = 3) -> tuple[Tensor, Tensor]:
        """What a convolution of this side reads at random places, (n, side * side * C), and what is wanted there."""
        edge = margin * inputs.shape[-1] // self.windows.features.shape[-1]
        reach = side // 2
        padded = F.pad(inputs, (reach,) * 4)
        height, width = (length - 2 * edge for length in inputs.shape[-2:])
        available = len(inputs) * height * width
        read_values = side * side * inputs.shape[1]
        count = min(available, ROWS * read_values * len(inputs) // len(self.windows.sigma) + 1)
        places = torch.randperm(available, generator=self._places)[:count].to(inputs.device)
        number, row, column = places // (height * width), places // width % height + edge, places % width + edge
        read = [padded[number, :, row + y, column + x] for y in range(side) for x in range(side)]
        return torch.cat(read, 1), wanted[number, :, row, column]

    def _layer(self, part: str, stage: Stage, index: int) -> nn.Conv2d:
        layer = self.head.get_submodule(f"{part}{stage.name}.{index}")
        assert isinstance(layer, nn.Conv2d)
        return layer


def _gains(windows: Windows) -> Tensor:
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
    for group in order.tensor_split(_LEVELS):
        factor[group] = torch.cat(shared)[group].sum() / torch.cat(own)[group].sum()
    # silu' rises from 0 to its maximum of 1.1 between these.
    gain = torch.linspace(-1.278, 2.399, 4096)
    slope = torch.sigmoid(gain) * (1 + gain * torch.sigmoid(-gain))
    return gain[torch.searchsorted(slope, factor / 2).clamp(max=len(gain) - 1)]


def _amplified(noisy: Tensor, gain: Tensor) -> Tensor:
    """The noisy pixels times their gain, as pairs of channels compute it."""
    return F.silu(gain + noisy) - F.silu(gain - noisy)


def _hand_up(up: nn.Conv2d) -> None:
    """A convolution after nearest upsampling that interpolates the signals, which come as pairs, bilinearly."""
    line = torch.tensor([0.25, 0.5, 0.25])
    for signal in range(_SIGNALS):
        kernel = torch.zeros(up.weight.shape[1:])
        kernel[2 * signal], kernel[2 * signal + 1] = torch.outer(line, line), -torch.outer(line, line)
        _set(up, signal, kernel)


def _centre(layer: nn.Conv2d, taps: dict[int, float]) -> Tensor:
    """A kernel (C, k, k) that adds these channels of the same pixel, times their factors."""
    kernel = torch.zeros(layer.weight.shape[1:])
    middle = kernel.shape[-1] // 2
    for channel, factor in taps.items():
        kernel[channel, middle, middle] = factor
    return kernel


def _set_pair(layer: nn.Conv2d, row: int, kernel: Tensor, bias: float = 0.0) -> None:
    """Two outputs that after SiLU differ by kernel * input + bias."""
    _set(layer, row, kernel, bias)
    _set(layer, row + 1, -kernel, -bias)


def _set(layer: nn.Conv2d, row: int, kernel: Tensor, bias: float = 0.0) -> None:
    assert layer.bias is not None
    layer.weight[row], layer.bias[row] = kernel, bias
