"""A data folder that is being generated: a source model's images of prompts and seeds, with their metadata.csv.

The list of images follows from the prompts alone, and each file name from its prompt and index, so that interrupted
work, or work shared between machines, continues with the missing images. Published L2P trains on such images (arXiv
2605.12013) and draws the noise of each from the seed that the source used.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files.atomic import append, make_folder, write_bytes
from .formats import FROM_MACHINES
from .images import BrokenImage, decoding, opened
from .pictures import png
from .tables import csv_bytes, decoded

TABLE = "metadata.csv"
COLUMNS = ("image", "prompt", "seed")
GENERATES = "generates images"
"""What a process that fills a folder does there, see `files.lock.held`."""
TEXT_KEY = "l2p"
"""The field of a PNG file with the settings of its image, as JSON."""
_SEED_BYTES = 6  # 2**48: exact in programs that store numbers as floats
_SLUG = 40  # letters of the prompt in a file's name
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


FolderSettings = Mapping[str, str | int | float]
"""What generated images or texts depend on besides what is asked for, by name."""


@dataclass(frozen=True)
class PlannedImage:
    """An image to generate.

    Attributes:
        prompt: its caption.
        seed: of its noise, 0 to 2**48 - 1.
        name: of its PNG file.
    """

    prompt: str
    seed: int
    name: str


def items(prompts: Iterable[str], per_prompt: int, first: int = 0) -> list[PlannedImage]:
    """The images to generate for these prompts, those of a prompt in sequence.

    Seeds are derived from the prompt and the image's index, `first` to `first + per_prompt - 1`: images of different
    prompts share no noise, which training would otherwise see repeatedly, and a prompt's images do not depend on the
    other prompts.
    """
    return [_item(prompt, number) for prompt in dict.fromkeys(prompts) for number in range(first, first + per_prompt)]


def _item(prompt: str, number: int) -> PlannedImage:
    seed = hashlib.sha256(f"image {number} of {prompt}".encode()).digest()[:_SEED_BYTES]
    slug = re.sub("[^a-z0-9]+", "-", prompt.lower())[:_SLUG].strip("-")
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    name = "-".join([*filter(None, [slug]), digest, str(number)]) + ".png"
    return PlannedImage(prompt, int.from_bytes(seed, "big"), name)


class SynthesisFolder:
    """A data folder that receives images as they are generated.

    A kill at any moment leaves complete images and a table without missing ones: an image is written atomically, then
    its row is added. An image without a row is recovered at the next start. The caller keeps other processes out, see
    `files.lock.held`: two tables would overwrite each other.

    Args:
        folder: created if missing; images of other prompts with the same settings stay.
        wanted: the images to make, see `items`.
        settings: what else the images depend on, by the names of the table's further columns.

    Raises:
        ValueError: if the folder's table was written by another program or with other settings, or cannot be written.
    """

    def __init__(self, folder: Path, wanted: Sequence[PlannedImage], settings: FolderSettings):
        self.folder, self.wanted = folder, list(wanted)
        self.settings = {name: str(value) for name, value in settings.items()}
        self._table = folder / TABLE
        make_folder(folder)
        self._rows = self._recovered()

    @property
    def todo(self) -> list[PlannedImage]:
        """The images still to be generated, in order."""
        return [item for item in self.wanted if item.name not in self._rows]

    @property
    def done(self) -> list[PlannedImage]:
        """The requested images that exist."""
        return [item for item in self.wanted if item.name in self._rows]

    def path(self, item: PlannedImage) -> Path:
        """The file of an item's image."""
        return self.folder / item.name

    def write(self, item: PlannedImage, image: Image.Image) -> None:
        """Add an image.

        Raises:
            ValueError: if the disk is full or the system refuses to write.
        """
        write_bytes(self.path(item), png(image.convert("RGB"), {TEXT_KEY: self._text(item)}))
        row = self._row(item)
        if self._table.exists():
            append(self._table, csv_bytes([row]))
        else:
            write_bytes(self._table, csv_bytes([self._header, row]))
        self._rows[item.name] = row

    @property
    def _header(self) -> list[str]:
        return [*COLUMNS, *self.settings]

    def _row(self, item: PlannedImage) -> list[str]:
        return [item.name, item.prompt, str(item.seed), *self.settings.values()]

    def _text(self, item: PlannedImage) -> str:
        return json.dumps({"prompt": item.prompt, "seed": item.seed, **self.settings})

    def _recovered(self) -> dict[str, list[str]]:
        """The table's rows whose image is complete, by the image's name, with new rows for images without one."""
        before = self._table.read_bytes() if self._table.exists() else b""
        rows = {row[0]: row for row in self._read() if is_whole(self.folder / row[0])}
        for item in self.wanted:
            if item.name not in rows and self._is_ours(item):
                rows[item.name] = self._row(item)
        content = csv_bytes([self._header, *rows.values()])
        if rows and content != before:
            write_bytes(self._table, content)
        elif not rows:
            self._table.unlink(missing_ok=True)
        return rows

    def _read(self) -> list[list[str]]:
        if not self._table.exists():
            return []
        text = decoded(self._table)
        try:
            header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
        except csv.Error as error:
            raise ValueError(f"{self._table} cannot be read ({error}): choose another name.") from error
        if header != self._header:
            raise ValueError(
                f"{self._table} has the columns {','.join(header)[:200]}, not {','.join(self._header)}: it was made by "
                "something else, so choose another name for this data set."
            )
        # A power failure may have truncated the last row.
        if rows and (len(rows[-1]) != len(header) or not text.endswith("\n")):
            rows.pop()
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                raise ValueError(f"Row {number} of {self._table} is incomplete: repair it, or choose another name.")
            self._check_settings(row)
        return rows

    def _check_settings(self, row: Sequence[str]) -> None:
        for (name, value), there in zip(self.settings.items(), row[len(COLUMNS) :], strict=True):
            if value != there:
                raise ValueError(
                    f"The images in {self.folder} were made with {name} {there or 'empty'}, not {value or 'empty'}: "
                    "use the same settings to resume, or another name for a new data set."
                )

    def _is_ours(self, item: PlannedImage) -> bool:
        """Whether a complete image with exactly this item and these settings exists."""
        path = self.path(item)
        if not is_whole(path):
            return False
        try:
            with opened(path, ("PNG",)) as image:
                return bool(image.info.get(TEXT_KEY) == self._text(item))
        except BrokenImage:
            return False


def read_image(content: bytes) -> Image.Image:
    """Decode an image file that another machine has sent, to RGB; only PNG, JPEG and WebP are accepted.

    Raises:
        BrokenImage: if it is not an image, is damaged, or has more pixels than are safe to decode.
    """
    with opened(io.BytesIO(content), FROM_MACHINES) as image, decoding():
        return image.convert("RGB")


def is_whole(path: Path) -> bool:
    """Whether a PNG file has its beginning and its end."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG_START))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return start == _PNG_START and file.read() == _PNG_END
    except OSError:
        return False
