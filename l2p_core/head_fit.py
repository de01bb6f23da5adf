"""The informed start of the Detailer Head: least squares, stage by stage, before the first training step.

A head with random weights is what training spends most of its images on. This one begins with an estimate of its own
target x0 - noise, in closed form, from a thousand noisy images and the features that the untrained backbone makes of
them. Two identities turn SiLU networks into something that least squares can fill:

    silu(a) - silu(-a) = a                        a pair of channels hands a value on unchanged
    silu(g + x) - silu(g - x) = 2 silu'(g) x      a pair multiplies a pixel x by a gain that the features choose
                                + O(x^3)

The head then holds, from coarse to fine,

1. in the encoder, the noisy pixels of each stage, and smoothed ones for the next;
2. in the bottleneck, the directions of the features that best predict the patch's target (reduced-rank regression);
3. in each decoder stage, the average of the target over that stage's pixels and the gain, each fitted to everything the
   stage's convolution reads; the noisy pixels times the gain; and with what channels are left, the directions that best
   predict the target's details within a pixel of the stage. All of them are pairs, handed on unchanged;
4. at full resolution, the noisy pixel times its gain, the fitted rest, and the output layer fitted to all of it.

The gain is what the noisy pixel contributes where details are unknown: the regression of the velocity on the noisy
pixel within a patch, at each noise level. Nothing here comes from a trained pixel model. The method is ours and was
measured in the tiny world only, see docs/benchmarks.md.

Its limit is the head's form. Nearest upsampling and 3 x 3 convolutions cannot give the two halves of a cell different
shares of the same feature without giving their neighbours as much; only products of channels can, which no regression
finds. See docs/negative-results.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import HeadStage, PixelConfig
from .detailer import DetailerHead
from .files.tensor_io import ProgressCallback
from .head_pairs import COLOURS, amplified, centre, difference, gains_of, hand_up, kernel_of, set_pair, set_row, smooth
from .head_windows import AT_ONCE, Windows
from .ops.least_squares import LeastSquares

CELLS = 8
"""Side of a window in patches: one of each image, cut at a random place."""
WINDOWS = 1024
"""Images to fit to."""
ROWS = 16
"""Places at which a stage is fitted, over all windows, for each value that its convolution reads."""
MEASURED = 128
"""Windows on which the error before and after is measured."""
WARM_UP = 20
"""Least steps of warm-up after a fit: AdamW's first steps change every weight by the learning rate in one direction,
which adds up over the thousands of values that a convolution reads."""

_GAIN = COLOURS
"""The channel after an upsampling that holds the gain, behind those of the target's colours."""
_SIGNALS = COLOURS + 1
_RIDGE = 2e-2
_SMALLEST = 0.1
"""Share of all variance that a regression predicts: directions that predict less are not scaled to unit variance,
which would amplify rounding errors where features have few dimensions; large weights for small directions do not
train."""


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
                f"The Detailer Head starts unfitted: after a fit to {self.windows} noisy images its velocity error is "
                f"{self.after:.3f}, without one {self.before:.3f}. More or larger images may help."
            )
        return (
            f"The Detailer Head starts fitted to {self.windows} noisy images: its velocity error is {self.after:.3f}, "
            f"without the fit {self.before:.3f}."
        )


def can_fit(config: PixelConfig) -> bool:
    """Whether patches are as large as the bottleneck's cells, and every stage has the channels that a fit fills."""
    first, *inner = config.head.stages
    return (
        config.patch_size == 2 ** len(config.head.stages)
        and all(stage.up >= _SIGNALS and stage.dec >= 2 * _SIGNALS for stage in inner)
        and all(stage.enc >= 4 * COLOURS for stage in config.head.stages)
        and first.up >= _SIGNALS
        and first.dec >= 4 * COLOURS
    )


@torch.no_grad()
def fit(head: DetailerHead, windows: Windows, progress: ProgressCallback | None = None) -> HeadFit:
    """Fit a head with random weights, in place.

    Args:
        head: in float32, of a configuration that `can_fit` accepts.
        windows: at least `head_pairs.LEVELS` of them.
        progress: called with the work done and its total; may raise to stop.

    Returns:
        How well it predicts before and after.

    Raises:
        ValueError: if the head's weights are not finite.
    """
    fitter = _Fitter(head, windows, progress or (lambda done, total: None))
    before = fitter.error()
    if not math.isfinite(before):
        raise ValueError(
            "The Detailer Head cannot be fitted: its first weights or their output are not finite numbers."
        )
    fitter.encoder()
    fitter.bottleneck()
    for stage in reversed(head.stages):
        fitter.decoder(stage)
    fitter.output()
    return HeadFit(len(windows.sigma), before, fitter.error())


class _Pairs(NamedTuple):
    """Pairs of channels of a decoder stage, in this order.

    Attributes:
        fitted: the target's averages, and the gain but for the last stage.
        amplified: noisy pixels times the gain.
        details: directions that predict what the averages leave out.
    """

    fitted: int
    amplified: int
    details: int


class _Fitter:
    """Fits one layer after the other."""

    def __init__(self, head: DetailerHead, windows: Windows, progress: ProgressCallback):
        self.head, self.windows = head, windows
        self.device = next(head.parameters()).device
        self._progress, self._done = progress, 0
        self._total = (len(head.stages) + 2) * len(windows.sigma)  # with bottleneck and output
        self._places = torch.Generator().manual_seed(0)
        self.gains = gains_of(windows)

    def batches(self) -> Iterator[tuple[Windows, Tensor]]:
        """Some windows with their gains at a time."""
        gains = self.gains.split(AT_ONCE)
        for batch, gain in zip(self.windows.batches(self.device), gains, strict=True):
            self._done += len(gain)
            self._progress(self._done, self._total)
            yield batch, gain.to(self.device)

    def error(self) -> float:
        """The head's mean squared error."""
        errors = []
        for batch in self.windows.batches(self.device, MEASURED):
            errors.append((self.head(batch.noisy, batch.features) - batch.target).square().mean((1, 2, 3)))
        return float(torch.cat(errors).mean())

    def encoder(self) -> None:
        """Every stage hands its noisy pixels to the decoder as pairs, and smoothed ones to the next: the difference of
        a pair's maxima over four pixels is close to their mean."""
        for stage in self.head.stages:
            layer = self.head.layer("enc", stage)
            for colour in range(COLOURS):
                taps = {colour: 1.0} if stage is self.head.stages[0] else difference(COLOURS + colour)
                set_pair(layer, 2 * colour, centre(layer, taps))
                set_pair(layer, 2 * (COLOURS + colour), smooth(layer, taps))

    def bottleneck(self) -> None:
        """Pairs of the directions of the features that best predict a patch's target and the gain."""
        layer, squares = self._bottleneck, LeastSquares()
        for batch, gain in self.batches():
            cells = batch.features.shape[-1]
            patches = rearrange(batch.target, "n c (h p) (w q) -> (n h w) (c p q)", h=cells, w=cells)
            # As much of a say for the gain as for all pixels together.
            weighted = gain.repeat_interleave(cells * cells)[:, None] * patches.shape[1] ** 0.5
            squares.add(rearrange(batch.features, "n d h w -> (n h w) d"), torch.cat([patches, weighted], 1))
        count = layer.out_channels // 2
        for number, (direction, constant) in enumerate(_directions(squares, squares.solved(_RIDGE)[0], 0, count)):
            row = torch.zeros(layer.in_channels, dtype=torch.float64)
            row[layer.in_channels - len(direction) :] = direction
            set_pair(layer, 2 * number, row[:, None, None], constant)

    def decoder(self, stage: HeadStage) -> None:
        """A decoder stage, whose pairs are those of `_Pairs`."""
        up, layer, pairs = self.head.layer("up", stage), self.head.layer("dec", stage), self._pairs(stage)
        hand_up(up, self._handed_to(stage))
        squares = LeastSquares()
        for batch, gain in self.batches():
            inputs = self._inputs(batch, stage)
            squares.add(*self._rows(inputs, self._wanted(batch, gain, inputs, stage), batch.margin))
        weight, bias = squares.solved(_RIDGE)
        for number, (row, constant) in enumerate(zip(weight[: pairs.fitted], bias.tolist(), strict=False)):
            set_pair(layer, 2 * number, kernel_of(row), constant)
        if pairs.amplified:
            self._amplify(layer, 2 * pairs.fitted, up.out_channels)
        if pairs.details:
            first = pairs.fitted + pairs.amplified
            directions = _directions(squares, weight, pairs.fitted, pairs.details)
            for number, (row, constant) in enumerate(directions, first):
                set_pair(layer, 2 * number, kernel_of(row), constant)

    def _pairs(self, stage: HeadStage) -> _Pairs:
        """What the channels of a decoder stage hold."""
        if stage is self.head.stages[0]:
            return _Pairs(COLOURS, COLOURS, 0)
        available = stage.dec // 2
        deepest = stage is self.head.stages[-1]  # no gain is known below
        pixels = 0 if deepest or available < _SIGNALS + COLOURS else COLOURS
        return _Pairs(_SIGNALS, pixels, available - _SIGNALS - pixels)

    def _handed_to(self, stage: HeadStage) -> int:
        """The number of pairs that come from below."""
        if stage is self.head.stages[-1]:
            return self._bottleneck.out_channels // 2
        return sum(self._pairs(self.head.stages[self.head.stages.index(stage) + 1]))

    def _wanted(self, batch: Windows, gain: Tensor, inputs: Tensor, stage: HeadStage) -> Tensor:
        """What a stage's convolution should make of its inputs, (N, C, height, width)."""
        target, side = batch.target, batch.target.shape[-1] // inputs.shape[-1]
        known = gain[:, None, None, None]
        if stage is not self.head.stages[-1]:
            known = F.interpolate(inputs[:, _GAIN, None], size=target.shape[-2:])
        clean = target + amplified(batch.noisy, known)
        if stage is self.head.stages[0]:
            return clean
        means = F.avg_pool2d(target, side)
        gains = gain[:, None, None, None].expand(-1, 1, *means.shape[-2:])
        if not self._pairs(stage).details:
            return torch.cat([means, gains], 1)
        details = clean - F.interpolate(F.avg_pool2d(clean, side), scale_factor=side)
        cells = rearrange(details, "n c (h p) (w q) -> n (c p q) h w", p=side, q=side)
        return torch.cat([means, gains, cells], 1)

    def output(self) -> None:
        """The last convolution, which sees one pixel of all channels."""
        layer = self.head.out_conv
        assert isinstance(layer, nn.Conv2d)
        squares = LeastSquares()
        for batch, _ in self.batches():
            squares.add(*self._rows(self._inputs(batch, None), batch.target, batch.margin, side=1))
        weight, bias = squares.solved(_RIDGE)
        for row, (kernel, constant) in enumerate(zip(weight[:, :, None, None], bias.tolist(), strict=True)):
            set_row(layer, row, kernel, constant)

    def _amplify(self, layer: nn.Conv2d, first: int, skip: int) -> None:
        """Pairs, from channel `first` on, of noisy pixels times their gain; those of the skip begin at `skip`."""
        for colour in range(COLOURS):
            for sign in (1, -1):
                pixel = {channel: sign * factor for channel, factor in difference(colour, skip).items()}
                set_row(layer, first + 2 * colour + (sign < 0), centre(layer, {**pixel, _GAIN: 1.0}))

    def _inputs(self, batch: Windows, until: HeadStage | None) -> Tensor:
        """What the decoder convolution of a stage reads, or for None the output convolution."""
        # In this order, CPUs pool several times as fast.
        x, skips = batch.noisy.contiguous(memory_format=torch.channels_last), []
        for stage in self.head.stages:
            x = F.silu(self.head.layer("enc", stage)(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.silu(self.head.bottleneck[0](torch.cat([x, batch.features], 1)))
        for stage in reversed(self.head.stages):
            x = torch.cat([self.head.layer("up", stage)(F.interpolate(x, scale_factor=2.0)), skips.pop()], 1)
            if stage is until:
                return x
            x = F.silu(self.head.layer("dec", stage)(x))
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

    @property
    def _bottleneck(self) -> nn.Conv2d:
        layer = self.head.bottleneck[0]
        assert isinstance(layer, nn.Conv2d)
        return layer


def _directions(squares: LeastSquares, weight: Tensor, skipped: int, count: int) -> Iterator[tuple[Tensor, float]]:
    """The linear functions of the inputs that predict most of some outputs, with zero mean and at most unit variance.

    Args:
        squares: of the regression.
        weight: (O, I), what it found.
        skipped: outputs at the beginning that have functions of their own.
        count: of functions at most.

    Returns:
        Weights (I,) and constants, the most important first.
    """
    covariance, mean = squares.covariance(), squares.mean()
    predicted = (weight @ covariance * weight).sum()
    weight = weight[skipped:]
    variance, axes = torch.linalg.eigh(weight @ covariance @ weight.T)
    count = min(count, len(variance), weight.shape[1])
    deviation = variance[-count:].clamp(min=_SMALLEST * float(predicted) + 1e-12).sqrt()
    for direction in (axes[:, -count:].T @ weight / deviation[:, None]).flip(0):
        yield direction, -float(direction @ mean)
