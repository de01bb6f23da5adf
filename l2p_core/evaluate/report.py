"""A comparison as one self-contained HTML page, and as a table of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from ..dataset.pictures import enlarged
from ..files.atomic import write_bytes
from ..files.units import counted
from ..run.chart import chart
from ..run.page import jpeg_url, page, spread, table, text
from .compare import ComparedStatistic, Comparison
from .pairs import Pair, Picture

SHOWN = 12
"""Pairs shown of the whole set, evenly spread."""
FARTHEST = 4
"""Pairs shown that differ most."""
_REPEATS = 8
_SIDE = 512  # pixels of a picture's longer side on the page
_SMALLEST = 128  # pixels that smaller images are enlarged to
_SPECTRUM_POINTS = 64


def write(path: Path, found: Comparison, title: str, notes: Sequence[str] = ()) -> None:
    """Write the page, atomically.

    Args:
        path: of the file.
        found: the comparison.
        title: of the page.
        notes: sentences above the table, such as how images were paired.

    Raises:
        ValueError: if it cannot be written, or an image cannot be read any more.
    """
    write_bytes(path, page(title, _parts(found, title, notes)))


def table_rows(found: Comparison) -> list[tuple[str, str, str, str]]:
    """Name, source, pixel model and what is kept of each statistic, as text."""
    return [(row.name, format(row.source, row.form), format(row.pixel, row.form), _kept(row)) for row in found.rows]


def summary(found: Comparison) -> str:
    """What was compared, in a sentence."""
    size = " x ".join(map(str, found.pairs[0].source.size))
    same = len({pair.source.size for pair in found.pairs}) == 1
    sizes = f"of {size} pixels" if same else "of several sizes"
    return f"{counted(len(found.pairs), 'pair')} of images {sizes}, the source's and the pixel model's."


def _kept(row: ComparedStatistic) -> str:
    return "" if row.kept is None else f"{row.kept:.0%}"


def _parts(found: Comparison, title: str, notes: Sequence[str]) -> Iterator[str]:
    yield f"<h1>{text(title)}</h1><p><strong>{text(summary(found))}</strong></p>"
    yield from (f"<p>{text(note)}</p>" for note in notes)
    yield _table(found)
    yield f'<div class="charts">{_spectrum(found)}{_grid(found)}</div>'
    yield "<h2>Pairs</h2><p>The source left, the pixel model right.</p>"
    yield _pairs(found, spread(len(found.pairs), SHOWN))
    if len(found.pairs) > FARTHEST:
        farthest = np.argsort(-found.difference, kind="stable")[:FARTHEST].tolist()
        yield "<h2>Pairs that differ most</h2><p>By their thumbnails; the difference of the two is on the right.</p>"
        yield _pairs(found, farthest, difference=True)
    for which, side in enumerate(("source", "pixel model")):
        if repeats := found.repeats[which]:
            yield f"<h2>Near-duplicates of the {side}</h2><p>Images that look like an earlier one: {len(repeats)}.</p>"
            yield _repeats(found, which, repeats[:_REPEATS])


def _table(found: Comparison) -> str:
    rows = ((*cells, row.meaning) for cells, row in zip(table_rows(found), found.rows, strict=True))
    return table(("", "source", "pixel model", "kept", ""), rows, numbers=(1, 2, 3))


def _spectrum(found: Comparison) -> str:
    """Power over frequency, in per cent of the finest that pixels hold; constant images have none."""
    every = max(1, len(found.frequencies) // _SPECTRUM_POINTS)
    percent = [round(200 * float(f)) for f in found.frequencies[::every]]
    lines = {
        name: [float(value) or float("nan") for value in _means(spectrum, every)]
        for name, spectrum in zip(("source", "pixel model"), found.means(lambda one: one.spectrum), strict=True)
    }
    return chart("Power by frequency, % of the finest", percent, lines, logarithmic=True)


def _means(values: np.ndarray, every: int) -> np.ndarray:
    return values[: len(values) // every * every].reshape(-1, every).mean(1)


def _grid(found: Comparison) -> str:
    """Differences by position in a patch, over their mean: a peak at 0 is a grid."""
    lines = {}
    for name, grid in zip(("source", "pixel model"), found.means(lambda one: one.grid), strict=True):
        mean = float(grid.mean())
        lines[name] = [float(value) / mean if mean > 0 else float("nan") for value in grid]
    return chart(f"Differences by position in {found.patch} pixels", list(range(found.patch)), lines)


def _pairs(found: Comparison, indices: Sequence[int], difference: bool = False) -> str:
    kind = ' class="three"' if difference else ""
    figures = []
    for pair in (found.pairs[index] for index in indices):
        pictures = _image(pair.source, "source") + _image(pair.pixel, "pixel model")
        pictures += _difference(pair) if difference else ""
        figures.append(f"<figure{kind}>{pictures}<figcaption>{text(pair.prompt or pair.name)}</figcaption></figure>")
    return f'<div class="pairs">{"".join(figures)}</div>'


def _repeats(found: Comparison, which: int, repeats: Sequence[tuple[int, int]]) -> str:
    figures = []
    for couple in repeats:
        pairs = [found.pairs[index] for index in couple]
        pictures = "".join(_image(pair.pixel if which else pair.source, pair.name) for pair in pairs)
        names = text(" and ".join(pair.name for pair in pairs))
        figures.append(f"<figure>{pictures}<figcaption>{names}</figcaption></figure>")
    return f'<div class="pairs">{"".join(figures)}</div>'


def _image(picture: Picture, alt: str) -> str:
    return f'<img alt="{text(alt)}" src="{_url(_small(picture))}">'


def _difference(pair: Pair) -> str:
    image = ImageChops.difference(_small(pair.source), _small(pair.pixel))
    return f'<img alt="difference" src="{_url(image)}">'


def _small(picture: Picture) -> Image.Image:
    """An image as the page shows it, RGB; the file's own pixels are let go, for large ones take hundreds of MB."""
    with picture.opened() as image:
        shown = image if image.mode == "RGB" else image.convert("RGB")
        shown.thumbnail((_SIDE, _SIDE))
        return shown.copy()


def _url(image: Image.Image) -> str:
    """Tiny pictures are enlarged by repeating pixels, which browsers would blur."""
    return jpeg_url(enlarged(image, max(1, _SMALLEST // max(image.size))), _SIDE)
