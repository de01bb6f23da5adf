"""Reading and writing image files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..l2p_core.dataset import images
from ..l2p_core.dataset.picture_files import PictureWriter
from ..l2p_core.files.atomic import write_bytes


def save_picture(pixels: Tensor, path: Path, writer: PictureWriter, text: Mapping[str, str], overwrite: bool) -> None:
    """Write (3, H, W) in [-1, 1] at a writer's depth, atomically.

    Args:
        pixels: the image, on the CPU.
        path: the file; its folder is created if missing.
        writer: of the format that the path's suffix names.
        text: ASCII texts, each of them JSON, for the file's metadata.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError: if the file exists and must not be replaced.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, writer.encode(pixels, text))


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
        return images.look(path)[:2]


def reading_notes(path: Path) -> list[str]:
    """Sentences on what reading an image ignores: bits, and frames after the first. Errors as for `picture_size`."""
    with _named(path):
        seen = images.look(path)
    notes = []
    if seen.rounded:
        notes.append(
            f"{path} has {seen.rounded} bits per channel, but this format is read with 8: {images.KEEP_DEPTH}."
        )
    if seen.frames > 1:
        notes.append(f"{path} has {seen.frames} frames, and only the first is used.")
    return notes


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """An image file as (1, 3, height, width) in [-1, 1]: rotated upright, cropped to that shape around its centre,
    resized.

    Raises:
        ValueError: if the file is missing, not an image or damaged.
    """
    with _named(path):
        return images.as_pixels(images.load(path, width, height))[None]


def load_mask(path: Path, width: int, height: int) -> Tensor:
    """A mask file of exactly that size as (1, 1, height, width) in [0, 1]; white is 1.

    Raises:
        ValueError: if the file is missing, not an image, of another size, or has no pixel that is not black.
    """
    size = picture_size(path)
    if size != (width, height):
        raise ValueError(
            f"The mask {path} is {size[0]} x {size[1]}, but the image is {width} x {height}: make them the same size."
        )
    mask = (load_picture(path, width, height)[:, :1] + 1) / 2
    if not mask.any():
        raise ValueError(f"The mask {path} is black everywhere: paint white what is to change.")
    return mask


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file's name to errors about an image."""
    try:
        yield
    except images.BrokenImage as error:
        raise ValueError(f"{path} cannot be used as an image: {error}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
