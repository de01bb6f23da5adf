"""Compares the images of a source with those of its pixel model: the work of Evaluate L2P."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..l2p_core.dataset.pictures import picture
from ..l2p_core.evaluate import report
from ..l2p_core.evaluate.compare import compare
from ..l2p_core.evaluate.pairs import Pair, Picture, of_folders


def of_batch(image: Tensor, name: str) -> Picture:
    """An image (H, W, C) of an IMAGE batch, C 3 or more, converted to 8 bits on access; transparency is dropped."""

    @contextmanager
    def opened() -> Iterator[Any]:
        yield picture(image[..., :3].movedim(-1, 0).float() * 2 - 1)

    return Picture(name, (int(image.shape[1]), int(image.shape[0])), opened)


def of_batches(source: Tensor, pixel: Tensor) -> list[Pair]:
    """The pairs of two IMAGE batches, in their order.

    Raises:
        ValueError: if they have different numbers of images.
    """
    if len(source) != len(pixel):
        raise ValueError(
            f"source_images has {len(source)} images and pixel_images {len(pixel)}: connect two batches of the "
            "same prompts and seeds."
        )
    return [
        Pair(
            f"image {number + 1}",
            of_batch(a, f"source image {number + 1}"),
            of_batch(b, f"pixel image {number + 1}"),
        )
        for number, (a, b) in enumerate(zip(source, pixel, strict=True))
    ]


def evaluate(target: Path, patch: int, folders: tuple[Path, Path] | None, batches: tuple[Tensor, Tensor] | None) -> str:
    """Compare two folders or two batches, write the report, and return its table as text.

    Raises:
        ValueError: for images that do not belong together or cannot be read.
        InterruptProcessingException: the host's, when the user stops it.
    """
    if batches is not None:
        pairs, said = of_batches(*batches), ""
    else:
        assert folders is not None
        pairs, said = of_folders(*folders)
    bar = comfy.utils.ProgressBar(2 * len(pairs))

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    found = compare(pairs, patch, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    report.write(target, found, target.stem, [said] if said else [])
    lines = [
        f"{name}: {source} -> {pixel}{f' ({kept})' if kept else ''}"
        for name, source, pixel, kept in report.table_rows(found)
    ]
    return "\n".join([report.summary(found), *filter(None, [said]), "source -> pixel model (kept)", *lines])
