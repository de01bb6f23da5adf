"""Pixels as pictures: single images, montages, PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .images import to_uint8

GAP = 2  # pixels between the images of a montage


def picture(pixels: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1]."""
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).contiguous().cpu().numpy())


def montage(pixels: Tensor, columns: int) -> Tensor:
    """Images (B, 3, H, W) in rows of `columns` on white, (3, rows * (H + gap), columns * (W + gap)) minus one gap."""
    count, _, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """The image with every pixel repeated `scale` times, for viewing tiny images."""
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """The image as the content of a PNG file, with `text` in the file's text fields."""
    content, fields = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        fields.add_text(key, value)
    image.save(content, format="PNG", pnginfo=fields)
    return content.getvalue()
