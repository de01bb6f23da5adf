"""The source's images of a montage's captions, to look at beside it: from the data set, or sampled from the source.

A run's data set is made by its source, so a caption of it has the source's image there. For other captions the source
itself is asked, where that is possible without further files: the bundled one is complete, a large one would need its
VAE.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..dataset.image_folder import ImageFolder
from ..dataset.images import BrokenImage, as_pixels, load
from ..deep_images.dicom import SUFFIXES as SCANS
from ..files.atomic import write_bytes
from ..tiny.bundled import SOURCE, TinySource, resolve
from .data import RunData
from .folder import RunFolder
from .montage import file_content
from .recipe import Recipe

_NONE = (
    "There are no images of the source beside them: the data set holds none that was generated from these captions, "
    "and the latent source cannot be sampled without its VAE. Captions of the data set as montage prompts show both."
)
_FROM_DATA, _SAMPLED = "taken from the data set", "sampled from the source with the montage's seeds"


@dataclass(frozen=True)
class Geometry:
    """Of the file, which is laid out as a montage: the number of images and their side in pixels."""

    count: int
    side: int


def write(folder: RunFolder, recipe: Recipe, data: RunData, side: int) -> None:
    """Write the source's images of the montage's captions into the run folder, once; without any, only say so.

    Args:
        folder: of the run.
        recipe: of it, with absolute paths.
        data: that it trains on.
        side: of the montage's images in pixels.

    Raises:
        ValueError: if the disk is full or refuses.
    """
    prompts = recipe.watch.prompts
    key = {"prompts": prompts, "side": side, "seed": recipe.watch.seed}
    if _read(folder).get("key") == key:
        return
    from_data = [_of_data_set(data, prompt, side) for prompt in prompts]
    missing = [number for number, image in enumerate(from_data) if image is None]
    sampled = _sampled(recipe, missing, side)
    images = [sampled.get(number) if image is None else image for number, image in enumerate(from_data)]
    about = {"key": key, "said": _said(from_data, sampled, len(prompts)), "there": [i is not None for i in images]}
    if any(about["there"]):
        grey = torch.zeros(3, side, side)
        shown = torch.stack([grey if image is None else image for image in images])
        write_bytes(folder.source_images, file_content(shown))
    write_bytes(folder.about_source, json.dumps(about).encode())


def said(folder: RunFolder) -> str:
    """A sentence on where the source's images come from, or why there are none; empty if nothing is known."""
    return str(_read(folder).get("said", ""))


def geometry(folder: RunFolder) -> Geometry | None:
    """How the images lie in the file; None if there are none."""
    found = _read(folder)
    if not any(found.get("there", [])) or not folder.source_images.is_file():
        return None
    return Geometry(len(found["there"]), found["key"]["side"])


def _read(folder: RunFolder) -> dict[str, Any]:
    if not folder.about_source.is_file():
        return {}
    return dict(json.loads(folder.about_source.read_text(encoding="utf-8")))


def _said(from_data: list[Tensor | None], sampled: dict[int, Tensor], count: int) -> str:
    taken = sum(image is not None for image in from_data)
    if not taken and not sampled:
        return _NONE
    parts = [f"{number} {how}" for number, how in ((taken, _FROM_DATA), (len(sampled), _SAMPLED)) if number]
    there = taken + len(sampled)
    grey = "" if there == count else f" Grey: {count - there} captions without an image of the source."
    where = parts[0].partition(" ")[2] if len(parts) == 1 else ", ".join(parts)
    return f"In each pair the source's image is left ({where}) and the model's right.{grey}"


def _of_data_set(data: RunData, prompt: str, side: int) -> Tensor | None:
    """The first image of a caption that was generated, (3, side, side) in [-1, 1]; photographs have no seed.

    DICOM images are of patients, seed or not: no run folder gets a copy.
    """
    if not isinstance(data.images, ImageFolder):
        return None
    for image in data.images.images:
        sample = image.sample
        if sample.caption == prompt and sample.seed is not None and sample.path.suffix.lower() not in SCANS:
            try:
                return as_pixels(load(image.sample.path, side, side))
            except BrokenImage:
                continue  # training skips and names it
    return None


def _sampled(recipe: Recipe, numbers: list[int], side: int) -> dict[int, Tensor]:
    """Images of the bundled source, where it is the run's source, for the captions of these numbers that it knows."""
    if recipe.data.kind != "tiny" and resolve(recipe.model.base) != SOURCE:
        return {}
    source = TinySource()
    known = [number for number in numbers if source.words.knows(recipe.watch.prompts[number])]
    if not known:
        return {}
    images = source.images(
        [recipe.watch.prompts[number] for number in known],
        [recipe.watch.seed + number for number in known],
        recipe.watch.steps or recipe.data.steps,
        recipe.data.cfg,
    )
    if images.shape[-1] != side:
        images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return dict(zip(known, images, strict=True))
