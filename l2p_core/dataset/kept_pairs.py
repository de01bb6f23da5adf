"""The patch pairs in a data set's folder: added to while its images are made, made up where a run left none."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors_header import CheckpointError
from ..patch_pairs import ENOUGH, FILE, PatchPairs
from .images import BrokenImage, as_pixels, load
from .synthesis import SynthesisFolder

_SECONDS = 60.0
"""Between saves."""


class KeptPairs(AbstractContextManager["KeptPairs"]):
    """The pairs in a data set's folder, added to while its images are made; a context that saves them at its end.

    A kill loses those of the last minute, see `pair_earlier_images`. A damaged file, or one of another latent space, is
    started over.

    Args:
        folder: of the data set, which exists.
        empty: sums to begin with.
    """

    def __init__(self, folder: Path, empty: PatchPairs):
        self._path, self._saved, self._changed = folder / FILE, time.monotonic(), False
        self._pairs = _of_earlier_runs(self._path, empty)

    def __exit__(self, *_: object) -> None:
        if self._changed:
            self._pairs.save(self._path)

    def add(self, pixels: Tensor, latents: Tensor) -> None:
        """Add pairs like `PatchPairs.add`, until there are enough."""
        if self._pairs.count >= ENOUGH:
            return
        self._pairs.add(pixels, latents)
        self._changed = True
        if time.monotonic() - self._saved > _SECONDS:
            self._saved = time.monotonic()
            self._pairs.save(self._path)
            self._changed = False


def pair_earlier_images(
    made: SynthesisFolder,
    pairs: PatchPairs,
    encode: Callable[[Tensor], Tensor],
    batch: int,
    progress: Callable[[int, int], None],
) -> None:
    """Pair the images of earlier runs if a kill or a full disk left some without.

    The sums do not say which images are in them, so all are paired again.

    Args:
        made: the data set, with `width` and `height` among its settings.
        pairs: sums to begin with.
        encode: images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), scaled as the source reads them.
        batch: number of images to encode at once.
        progress: called before each batch and at the end with the number of images that are paired and of all that
            will be. If it raises an exception, nothing is saved and the next run starts over.

    Raises:
        ValueError: if an image is damaged, or the disk is full.
    """
    width, height = int(made.settings["width"]), int(made.settings["height"])
    path, each = made.folder / FILE, (width // pairs.side) * (height // pairs.side)
    if not each or _of_earlier_runs(path, pairs).count >= min(len(made.done) * each, ENOUGH):
        return
    todo = made.done[: -(-ENOUGH // each)]
    for start in range(0, len(todo), batch):
        progress(start, len(todo))
        pixels = torch.stack([_pixels(made.path(item), width, height) for item in todo[start : start + batch]])
        pairs.add(pixels, encode(pixels))
    progress(len(todo), len(todo))
    pairs.save(path)


def _of_earlier_runs(path: Path, empty: PatchPairs) -> PatchPairs:
    """The pairs of a file; `empty` if there is none, or it is damaged or of another latent space."""
    with suppress(CheckpointError):
        found = PatchPairs.load(path)
        if found.space == empty.space:
            return found
    return empty


def _pixels(path: Path, width: int, height: int) -> Tensor:
    try:
        return as_pixels(load(path, width, height))
    except BrokenImage as error:
        raise ValueError(f"{path}: {error}; delete it, and it is made again.") from error
