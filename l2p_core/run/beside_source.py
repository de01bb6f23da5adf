"""A montage's images, each beside the source's image of the same caption, as one picture for a page."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..dataset.images import opened
from . import montage, source_images
from .folder import RunFolder
from .page import WIDEST, picture_url

PAIRS = 3
"""In a row."""
_BETWEEN, _WITHIN = 12, 2  # pixels between pairs, and between the two images of one


def beside_source(folder: RunFolder, path: Path) -> str:
    """The picture as a data URL; empty if the run has no images of the source for this montage."""
    found = source_images.geometry(folder)
    if found is None:
        return ""
    count = found[0]
    side, corners = montage.places(*found)
    columns = min(PAIRS, count)
    shown = min(side, (WIDEST - (columns - 1) * _BETWEEN) // (2 * columns) - _WITHIN)
    across, down = 2 * shown + _WITHIN + _BETWEEN, shown + _BETWEEN
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * across - _BETWEEN, rows * down - _BETWEEN), "white")
    with opened(folder.source_images, ("PNG",)) as source, opened(path, ("PNG",)) as model:
        if source.size != model.size:
            return ""  # of other prompts or another size, before the run was resumed with these
        for number, (left, top) in enumerate(corners):
            x, y = number % columns * across, number // columns * down
            for image, at in ((source, x), (model, x + shown + _WITHIN)):
                cell = image.crop((left, top, left + side, top + side)).convert("RGB")
                sheet.paste(cell if shown == side else cell.resize((shown, shown)), (at, y))
    return picture_url(sheet, exact=shown == side)
