"""What a Detailer Head is fitted to: windows of noisy images, with the backbone's features of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 16
"""Windows that are computed at a time."""


@dataclass(frozen=True)
class Windows:
    """Parts of noisy images, and what the backbone makes of those images; float32.

    Attributes:
        features: (N, dim, cells, cells), of the backbone.
        noisy: (N, 3, side, side) pixels, side a patch's times cells.
        target: (N, 3, side, side), x0 - noise.
        sigma: (N,) noise levels.
        margin: cells at each border whose surroundings were cut away.
    """

    features: Tensor
    noisy: Tensor
    target: Tensor
    sigma: Tensor
    margin: int = 0

    @classmethod
    def joined(cls, parts: Sequence[Windows]) -> Windows:
        """All windows of several, cut to the cells of the smallest."""
        cells = min(part.features.shape[-1] for part in parts)
        parts = [part._cut(cells) for part in parts]
        tensors = zip(*(part._tensors for part in parts), strict=True)
        features, noisy, target, sigma = (torch.cat(tensor) for tensor in tensors)
        # Without its border, a window of one or two cells would be empty.
        margin = max(part.margin for part in parts) if cells > 2 else 0
        return cls(features, noisy, target, sigma, margin)

    def batches(self, device: torch.device, most: int | None = None) -> Iterator[Windows]:
        """A few windows at a time, on this device; the first `most`, or all."""
        for part in zip(*(tensor[:most].split(AT_ONCE) for tensor in self._tensors), strict=True):
            features, noisy, target, sigma = (tensor.to(device) for tensor in part)
            yield Windows(features, noisy, target, sigma, self.margin)

    def _cut(self, cells: int) -> Windows:
        """Its first rows and columns."""
        own = self.features.shape[-1]
        if cells == own:
            return self
        side = self.noisy.shape[-1] // own * cells
        features, noisy, target = (
            tensor[..., :length, :length].clone()
            for tensor, length in ((self.features, cells), (self.noisy, side), (self.target, side))
        )
        return Windows(features, noisy, target, self.sigma, 1)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.features, self.noisy, self.target, self.sigma
