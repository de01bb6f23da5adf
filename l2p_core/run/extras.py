"""What a run writes beside its weights: montages, metrics, events, the report, and images that it makes itself.

Sizes are worst cases, such as images that do not compress; a run usually takes less.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from ..config import PIXEL_CHANNELS, PixelConfig
from ..tiny import image_set
from ..tiny.shapes import IMAGE_SIZE
from . import montage, report
from .data import image_side
from .folder import RunFolder
from .recipe import Recipe

MONTAGES = "montages"
_COPIES = 2
"""Number of files of a montage's size beside the montages: the source's images, and the picture of the model card."""
_METRICS_BYTES = 1200
"""Bytes of a step's line of metrics, including all losses by sigma."""
_EVENT_BYTES = 2400
"""Bytes of a step's events: about twenty scalars with their names."""
_SAMPLE_BYTES = 300
"""Bytes of an image's caption and seed in the cache of images."""


def sizes(recipe: Recipe, config: PixelConfig, folder: RunFolder, fresh: bool) -> tuple[dict[str, int], int]:
    """Bytes on disk by purpose, and how many of them exist in the folder already.

    Args:
        recipe: of the run, with absolute paths.
        config: of the L2P model.
        folder: of the run; need not exist.
        fresh: whether the run in it is another one, which is kept.
    """
    steps, prompts = recipe.training.steps, len(recipe.watch.prompts)
    width, height = montage.shape(prompts, recipe.watch.size or image_side(recipe, config)) if prompts else (1, 1)
    pictures, there = _montages(recipe, PIXEL_CHANNELS * width * height, folder, fresh)
    records = (_METRICS_BYTES + _EVENT_BYTES * _has_events()) * steps + report.most_bytes(width, height)
    written = 0 if fresh else _bytes([folder.metrics, folder.report, *folder.events.glob("*")])
    images = _bytes(folder.images.glob("*.safetensors"))
    parts = {
        MONTAGES: pictures,
        "metrics and report": max(records, written),
        "images to train on": max(_images(recipe), images),
    }
    return parts, there + written + images


def _montages(recipe: Recipe, one: int, folder: RunFolder, fresh: bool) -> tuple[int, int]:
    """Bytes of all montages, of at most `one` each and once more among the events, and of those that are there."""
    if not recipe.watch.prompts:
        return 0, 0
    count = -(-recipe.training.steps // recipe.watch.montage_every)
    present = [] if fresh else folder.montages()
    # The source's images are laid out as another montage; another is copied beside the model card.
    extra = [] if fresh else [path for path in (folder.source_images, folder.card_picture) if path.is_file()]
    there = _bytes([*present, *extra])
    missing = max(0, count - len(present)) + _COPIES - len(extra)
    return there + one * (missing + _has_events() * count), there


def _images(recipe: Recipe) -> int:
    """Bytes of the cache of images that a recipe without a data folder makes, in whole parts."""
    if recipe.data.kind == "folder":
        return 0
    parts = -(-recipe.data.images // image_set.PART)
    return parts * image_set.PART * (PIXEL_CHANNELS * IMAGE_SIZE**2 + _SAMPLE_BYTES)


def _has_events() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
