"""Images from and to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..l2p_core.atomic import write_bytes
from ..l2p_core.pictures import enlarged, picture, png


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
    write_bytes(path, png(enlarged(picture(pixels), scale), text))


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
