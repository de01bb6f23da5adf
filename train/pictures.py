"""Images to PNG files: single ones and montages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .data import to_uint8

GAP = 2  # pixels between the images of a montage


def picture(pixels: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1]."""
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).contiguous().numpy())


def montage(pixels: Tensor, columns: int) -> Tensor:
    """Images (B, 3, H, W) in rows of `columns` on white, (3, rows * (H + gap), columns * (W + gap)) less a gap."""
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def save_png(
    pixels: Tensor, path: Path, text: Mapping[str, str] | None = None, overwrite: bool = False, scale: int = 1
) -> None:
    """Write (3, H, W) in [-1, 1] as PNG, beside the target and renamed over it.

    Args:
        pixels: the image.
        path: the file; its folder is made where it is missing.
        text: kept in the file's text fields.
        overwrite: whether an existing file may be replaced.
        scale: repeats every pixel this many times, to look at tiny images.

    Raises:
        ValueError: if the file exists and may not be replaced.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(pixels)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        image.save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Keep a file from being replaced unasked.

    Raises:
        ValueError: if it exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another name or give --overwrite.")


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """An image file as (1, 3, height, width) in [-1, 1].

    Raises:
        ValueError: if the file is missing or no image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error.strerror or 'its format is unknown'}.") from error
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return (data.permute(2, 0, 1).float() / 127.5 - 1)[None]
