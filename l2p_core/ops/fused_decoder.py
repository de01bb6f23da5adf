"""A decoder stage of the Detailer Head with its two convolutions fused into one.

No activation lies between a stage's `up` (nearest x2, Conv 3x3) and its `dec` (concat skip, Conv 3x3), so `dec` after
`up` is one linear map. On the coarse grid it is a 3x3 convolution with four outputs per cell, one for each of the four
fine pixels there. This skips the `up` convolution, more than a third of the head's multiplications, and the
concatenation. Only the image's outermost pixels differ, because `dec` pads with zeros where the fused map continues;
the caller computes those with the separate convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Composing weights costs as much as it saves at about 200 x 200 pixels.
MIN_PIXELS = 512 * 512

GPU_PIXELS = 4096 * 4096
"""Pixels of a tile or image, from which fusing was faster in every case on an H100 (docs/benchmarks.md)."""

# A fine pixel p = 2i + a reads, by tap t of the 5x5 composition, fine pixel p + t - 2, which lies in the coarse cell
# i + (a + t - 2) // 2. For each a: the coarse tap (0, 1, 2 for cells i-1, i, i+1) of the fine taps 0 to 4.
_COARSE_TAPS = tuple(tuple((a + t - 2) // 2 + 1 for t in range(5)) for a in (0, 1))


Composed = tuple[Tensor, Tensor]
"""Weight and bias, see `compose`."""


def fused_from(device: torch.device) -> float:
    """Pixels of a tile or image from which all of its decoder stages are fused; on a CPU only large stages are."""
    return GPU_PIXELS if device.type == "cuda" and torch.version.hip is None else math.inf


class ComposedWeights:
    """The composed weights of a head's stages, reused while its layers' weights stay the same. Composing takes 4.5 ms
    on an H100, longer than a small tile or image takes.
    """

    def __init__(self) -> None:
        self._composed: dict[nn.Module, tuple[list[tuple[Tensor, int]], Composed]] = {}

    def of(self, up: nn.Conv2d, dec: nn.Conv2d) -> Composed:
        """What `compose` returns."""
        sources = [*up.parameters(), *dec.parameters()]
        if torch.compiler.is_compiling() or any(source.requires_grad or source.is_inference() for source in sources):
            return compose(up, dec)  # weights that train change, and not always where torch counts it
        if up in self._composed:
            known, composed = self._composed[up]
            if all(map(_unchanged, known, sources)):
                return composed
        # The tensors are kept as well, so that no other weights can take their place in memory.
        composed = compose(up, dec)
        self._composed[up] = [(source.detach(), source._version) for source in sources], composed
        return composed


def _unchanged(known: tuple[Tensor, int], source: Tensor) -> bool:
    tensor, version = known
    return tensor.data_ptr() == source.data_ptr() and tensor.dtype == source.dtype and version == source._version


@dataclass
class Fusion:
    """State shared by the tiles of one pass.

    Attributes:
        wanted: whether to fuse; None fuses where measurements show a gain.
        at_once: pixels of a tile, or of the whole image.
        weights: of the head's stages, kept from pass to pass.
        of_pass: the same by each stage's `up`, even while they train.
    """

    wanted: bool | None = None
    at_once: int = 0
    weights: ComposedWeights = field(default_factory=ComposedWeights)
    of_pass: dict[nn.Module, Composed] = field(default_factory=dict)

    def pays(self, device: torch.device, pixels: int) -> bool:
        """Whether to fuse a stage of a tile, which has so many pixels."""
        if self.wanted is not None:
            return self.wanted
        return self.at_once >= fused_from(device) or (device.type == "cpu" and pixels >= MIN_PIXELS)


def compose(up: nn.Conv2d, dec: nn.Conv2d) -> Composed:
    """The coarse convolution that equals nearest x2, `up`, and the part of `dec` that reads its output.

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
        fusion: of the pass.

    Returns:
        (B, out, 2h, 2w), the part that comes through `up`, valid where all neighbours were in `x` or lie outside the
            image by 2 or more pixels; and (B, out, ...) of the skip, with the whole bias.
    """
    if up not in fusion.of_pass:
        fusion.of_pass[up] = fusion.weights.of(up, dec)
    weight, bias = fusion.of_pass[up]
    # Ordered as `compose` has them, channels last in memory.
    through = rearrange(F.conv2d(x, weight, padding=1), "b (p q c) h w -> b (h p) (w q) c", p=2, q=2)
    return through.permute(0, 3, 1, 2), F.conv2d(skip, dec.weight[:, up.out_channels :], bias, padding=1)
