"""Pairs of images to compare: a source's and a pixel model's of the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..dataset import formats
from ..dataset.images import BrokenImage, opened
from ..dataset.problems import some
from ..dataset.synthesis import TEXT_KEY
from ..files import paths


@dataclass(frozen=True)
class Picture:
    """An image that is decoded on access.

    Attributes:
        name: for messages.
        size: (width, height) in pixels, as stored.
        opened: returns a context with the image; it raises ValueError, naming the image, if it cannot be read.
        about: prompt, seed and settings that our own files state; empty for others.
    """

    name: str
    size: tuple[int, int]
    opened: Callable[[], AbstractContextManager[Image.Image]]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """An image of the source and one of the pixel model, and their prompt if it is known."""

    name: str
    source: Picture
    pixel: Picture
    prompt: str = ""


def of_folders(source: Path, pixel: Path) -> tuple[list[Pair], str]:
    """The pairs of two folders, and a sentence on how they were paired, empty if by name.

    Images are paired by their path in the folder without suffix. If the folders have no name in common but equally many
    images, they are paired in the order of their names. Only headers are read.

    Raises:
        ValueError: if a folder is missing or empty, an image is missing or unreadable, or a pair differs in size, or in
            the prompt or seed that its files state.
    """
    if source.resolve() == pixel.resolve():
        raise ValueError(f"{source} was given twice: name the folder of the source and that of the pixel model.")
    first, second = _images(source), _images(pixel)
    if not first.keys() & second.keys() and len(first) == len(second):
        said = "The folders have no name in common, so images were paired in the order of their names."
        return [_pair(*both) for both in zip(first, first.values(), second.values(), strict=True)], said
    for here, there, held, missing in ((source, pixel, first, second), (pixel, source, second, first)):
        if gone := [name for name in held if name not in missing]:
            raise ValueError(
                f"{there} lacks {len(gone)} of the {len(held)} images of {here} ({some(gone)}): make both of the same "
                "prompts and seeds, or remove the others."
            )
    return [_pair(name, first[name], second[name]) for name in first], ""


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Refuse a pair whose images differ in size, whose statistics would differ for that reason alone."""
    for pair in pairs:
        if pair.source.size != pair.pixel.size:
            a, b = ("{} x {}".format(*picture.size) for picture in (pair.source, pair.pixel))
            raise ValueError(
                f"{pair.name} is {a} pixels from the source and {b} from the pixel model: make both at the same size."
            )


def _images(folder: Path) -> dict[str, Path]:
    """The image files of a folder and its subfolders by their path without suffix, in order."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: give a folder of images.")
    found: dict[str, Path] = {}
    files = (Path(entry.path) for _, entries in paths.walk(folder) for entry in entries)
    for path in sorted(path for path in files if path.suffix.lower() in formats.SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{folder} holds {found[name].name} and {path.name}: keep one of the two.")
        found[name] = path
    if not found:
        raise ValueError(f"{folder} holds no images: give a folder with the images of one model.")
    return found


def _pair(name: str, source: Path, pixel: Path) -> Pair:
    a, b = _read(source), _read(pixel)
    for what in ("prompt", "seed"):
        if what in a.about and what in b.about and a.about[what] != b.about[what]:
            raise ValueError(
                f"{source} states the {what} {str(a.about[what])[:80]!r} and {pixel} {str(b.about[what])[:80]!r}: "
                "compare images of the same prompts and seeds."
            )
    return Pair(name, a, b, str(a.about.get("prompt", b.about.get("prompt", ""))))


def _read(path: Path) -> Picture:
    with _opened(path) as image:
        return Picture(path.name, image.size, partial(_opened, path), _about(image.info.get(TEXT_KEY)))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file, whose name is in every error about it."""
    try:
        with opened(path) as image:
            yield image
    except BrokenImage as error:
        raise ValueError(f"{path} cannot be compared: {error}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def _about(text: object) -> dict[str, Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
