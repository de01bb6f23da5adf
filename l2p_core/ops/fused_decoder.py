"""A decoder stage of the Detailer Head with its two convolutions fused into one.

No activation lies between a stage's `up` (nearest x2, Conv 3x3) and its `dec` (concat skip, Conv 3x3), so `dec` after
`up` is one linear map. On the coarse grid it is a 3x3 convolution with four outputs per cell, one for each of the four
fine pixels there. This skips the `up` convolution, more than a third of the head's multiplications, and the
concatenation. Only the image's outermost pixels differ, because `dec` pads with zeros where the fused map continues;
the caller computes those with the separate convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Composing weights costs as much as it saves at about 200 x 200 pixels.
MIN_PIXELS = 512 * 512

GPU_PIXELS = 4096 * 4096
"""Pixels of a tile or image, from which fusing is faster on an H100 (docs/benchmarks.md): by 17 to 37%."""

# A fine pixel p = 2i + a reads, by tap t of the 5x5 composition, fine pixel p + t - 2, which lies in the coarse cell
# i + (a + t - 2) // 2. For each a: the coarse tap (0, 1, 2 for cells i-1, i, i+1) of the fine taps 0 to 4.
_COARSE_TAPS = tuple(tuple((a + t - 2) // 2 + 1 for t in range(5)) for a in (0, 1))


@dataclass
class Fusion:
    """State shared by the tiles of one pass.

    Attributes:
        wanted: whether to fuse; None fuses where measurements show a gain.
        at_once: pixels of a tile, or of the whole image.
        weights: the result of `compose` for each stage's `up`; composing again for each tile would cost more than
            fusing saves.
    """

    wanted: bool | None = None
    at_once: int = 0
    weights: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def pays(self, device: torch.device, pixels: int) -> bool:
        """Whether to fuse a stage of a tile, which has so many pixels."""
        if self.wanted is not None:
            return self.wanted
        if device.type == "cuda" and torch.version.hip is None:
            return self.at_once >= GPU_PIXELS
        return device.type == "cpu" and pixels >= MIN_PIXELS


def compose(up: nn.Conv2d, dec: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The coarse convolution that equals nearest x2, `up` and the input channels of `dec` that read its output.

    Returns:
        Weight (4 * out, in, 3, 3), outputs ordered by fine row, fine column and channel, and bias (out,).
    """
    up_weight, dec_weight = up.weight.float(), dec.weight[:, : up.out_channels].float()
    # fine[o, i, s + t] = sum over s, t, c of dec[o, c, s] up[c, i, t]: a full-padded correlation with the flipped
    # kernel, with `up`'s inputs as the batch.
    fine = F.conv2d(up_weight.transpose(0, 1), dec_weight.flip(2, 3), padding=2).transpose(0, 1)
    rows = fine.new_zeros(2, *fine.shape[:2], 3, 5)
    for a, taps in enumerate(_COARSE_TAPS):
        for tap, coarse in enumerate(taps):
            rows[a, :, :, coarse].add_(fine[:, :, tap])
    weight = fine.new_zeros(2, 2, *fine.shape[:2], 3, 3)
    for a, taps in enumerate(_COARSE_TAPS):
        for tap, coarse in enumerate(taps):
            weight[:, a, :, :, :, coarse].add_(rows[..., tap])
    assert up.bias is not None and dec.bias is not None
    bias = dec.bias.float() + dec_weight.sum(dim=(2, 3)) @ up.bias.float()
    return weight.flatten(0, 2).to(up.weight.dtype), bias.to(up.weight.dtype)


def fused_stage(x: Tensor, skip: Tensor, up: nn.Conv2d, dec: nn.Conv2d, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """Both halves of `dec`'s output before its SiLU, to be added where their regions meet.

    Args:
        x: (B, in, h, w), the coarse input.
        skip: (B, skip channels, ...), of any region.
        fusion: of the pass; caches the composed weights.

    Returns:
        (B, out, 2h, 2w), the part that comes through `up`, valid where all neighbours were in `x` or lie outside the
            image by 2 or more pixels; and (B, out, ...) of the skip, with the whole bias.
    """
    if up not in fusion.weights:
        fusion.weights[up] = compose(up, dec)
    weight, bias = fusion.weights[up]
    through = _fine(F.conv2d(x, weight, padding=1), dec.out_channels)
    return through, F.conv2d(skip, dec.weight[:, up.out_channels :], bias, padding=1)


def _fine(coarse: Tensor, channels: int) -> Tensor:
    """(B, 4 * channels, h, w), ordered as `compose` has it -> (B, channels, 2h, 2w), channels last in memory."""
    batch, _, height, width = coarse.shape
    cells = coarse.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
