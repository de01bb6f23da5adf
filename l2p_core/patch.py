"""Patch geometry: pixels to tokens, and padding to a variant's multiples (arXiv 2605.12013 section 3.1)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch_size: int, order: str = "p q c") -> Tensor:
    """Cut (B, C, H, W) into tokens (B, H/P * W/P, P*P*C).

    Args:
        x: an image whose sides are multiples of the patch size.
        patch_size: P.
        order: of a patch's elements: rows p, columns q and channels c, the fastest last.
    """
    return rearrange(x, f"b c (h p) (w q) -> b (h w) ({order})", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int], order: str = "p q c") -> Tensor:
    """The inverse of `patchify` for a token grid of (rows, columns)."""
    return rearrange(tokens, f"b (h w) ({order}) -> b c (h p) (w q)", p=patch_size, q=patch_size, h=grid[0], w=grid[1])


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend (B, C, H, W) at the bottom and right by mirroring, until both sides are multiples of `multiple`.

    Mirroring preserves the statistics of a noisy image, unlike zeros or a repeated edge. Unlike
    `torch.nn.functional.pad`, it also works for margins wider than the image (a 50-pixel image padded to 320).
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        if size % multiple:
            x = x.index_select(dim, _mirrored(size, padded_size(size, multiple), x.device))
    return x


def _mirrored(size: int, padded: int, device: torch.device) -> Tensor:
    """Indices 0..size-1, size-2..0, 1.. and so on: a triangle wave over the source."""
    if size == 1:
        return torch.zeros(padded, dtype=torch.long, device=device)
    period = 2 * (size - 1)
    index = torch.arange(padded, device=device) % period
    return torch.where(index < size, index, period - index)
