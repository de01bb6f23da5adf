"""Reading and writing image files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..l2p_core.dataset import images
from ..l2p_core.dataset.pictures import enlarged, picture, png
from ..l2p_core.files.atomic import write_bytes


def save_png(
    pixels: Tensor, path: Path, text: Mapping[str, str] | None = None, overwrite: bool = False, scale: int = 1
) -> None:
    """Write (3, H, W) in [-1, 1] as PNG, atomically.

    Args:
        pixels: the image.
        path: the file; its folder is created if missing.
        text: stored in the file's text fields.
        overwrite: whether an existing file may be replaced.
        scale: repeats every pixel this many times, for viewing tiny images.

    Raises:
        ValueError: if the file exists and must not be replaced.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png(enlarged(picture(pixels), scale), text))


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file unless requested.

    Raises:
        ValueError: if it exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} already exists: choose another name or give --overwrite.")


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as it is shown, turned upright.

    Raises:
        ValueError: if the file is missing or not an image.
    """
    with _named(path):
        return images.size(path)


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """An image file as (1, 3, height, width) in [-1, 1]: rotated upright, cropped to that shape around its centre,
    resized.

    Raises:
        ValueError: if the file is missing, not an image or damaged.
    """
    with _named(path):
        return images.from_uint8(images.load(path, width, height))[None]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file's name to errors about an image."""
    try:
        yield
    except images.BrokenImage as error:
        raise ValueError(f"{path} cannot be used as an image: {error}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
