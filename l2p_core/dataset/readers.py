"""The content of a data folder: captioned images from tables, JSON lines and text files beside the images.

In every folder below the given one, and in any mix, it reads:

- CSV files with a column for the image and one for the caption: ``image,prompt,seed`` (the published 1k trainer's),
  ``file_name,text`` (the published README's and Hugging Face's);
- ``metadata.jsonl`` and other JSON lines with the same names;
- images with a caption of the same name beside them, ``portrait.png`` and ``portrait.txt``; also ``portrait.png.txt``
  and ``portrait.caption`` of other trainers;
- ``metadata.json`` as kohya's tools write it, for images that have no other caption.

An image in a table needs no text file; other images are read with their own. Files that are not read are reported in
the listing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..patch_pairs import FILE as PAIRS
from . import formats, tables
from .data_files import DataFiles, name_below
from .problems import Problem
from .tables import TableRow

_REPEATS = re.compile(r"\d+_.")


@dataclass(frozen=True)
class Sample:
    """A captioned image.

    Attributes:
        name: the image's path below the data folder, with forward slashes on every system.
        path: the image file.
        caption: its text, stripped, never empty.
        seed: the seed that the source drew the image's noise from, 0 to 2**64 - 1; None where it is not known.
        frame: of a file with several, counted from 0; each is an image with the file's caption.
    """

    name: str
    path: Path
    caption: str
    seed: int | None
    frame: int = 0


@dataclass
class Listing:
    """The samples of a data folder, in the order of their names, then captions.

    Attributes:
        folder: the data folder, absolute.
        samples: what can be trained on, as far as tables and names tell; no image has been opened.
        problems: what was skipped, and why.
        unlisted: images without a text file that a table beside or above them does not list; this is not an error.
        repeats: rows that repeat another row; they are read once.
        skipped: files that are not read, by their suffix; tables of other things by their names, with what is wrong
            with them if it is known.
        unused: text files that no image takes its caption from.
        repeat_folders: folders whose names set repeats in kohya's trainers, such as 10_fox.
    """

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    repeats: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unused: int = 0
    repeat_folders: list[str] = field(default_factory=list)


def read(source: Path | str) -> Listing:
    """List the samples of a data folder, or of one CSV or JSON-lines file with the images below its folder.

    Broken rows, missing images and captions, captioned files that cannot be read, and paths that lead out of the folder
    become problems of the listing.

    Raises:
        ValueError: if the folder does not exist, a file named metadata is not readable as metadata, or no sample is
            found.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"The data folder {source} does not exist: check the name.")
    only = source.absolute() if source.is_file() else None
    # The table itself may be a link, as in a hub's cache: its images lie beside the link.
    folder = only.parent.resolve() if only else source.resolve()
    listing = Listing(folder)
    files = DataFiles(folder, listing.problems)
    reading = _Reading(listing, files)
    for table in [folder / only.name] if only else files.tables:
        reading.add_table(table, required=only is not None or table.stem.lower() == "metadata")
    if not only:
        for table in files.metadata:
            reading.add_metadata(table)
        reading.add_captioned()
    listing.samples = sorted(reading.found, key=lambda s: (s.name, s.caption, -1 if s.seed is None else s.seed))
    listing.problems.sort(key=lambda problem: problem.where)
    listing.repeat_folders = _repeat_folders(listing.samples)
    if not listing.samples:
        raise ValueError(_nothing(source, listing))
    return listing


class _Reading:
    """The samples found so far."""

    def __init__(self, listing: Listing, files: DataFiles):
        self.listing, self.files = listing, files
        self.found: set[Sample] = set()
        self._named: set[str] = set()
        self._covered: set[str] = set()

    def add_table(self, table: Path, required: bool) -> None:
        """Add a table's samples; another kind of table is skipped, unless this one is required."""
        content = tables.read(table, required)
        if not content.known:
            self._skip(table, content, table.name)
            return
        self._covered.add(name_below(self.listing.folder, table.parent))
        self._add_problems(table, content)
        for row in content.rows:
            self._add_row(table, row)

    def add_metadata(self, table: Path) -> None:
        """Add the samples of kohya's metadata, for images that have no other caption, as before it was supported."""
        content = tables.read(table, required=False)
        if not content.known:
            self._skip(table, content, table.suffix.lower())
            return
        self._add_problems(table, content)
        for row in content.rows:
            image = self.files.image(table, row.image)
            if isinstance(image, str) or (image[0] not in self._named and not self._text_beside(image[0])):
                self._add_row(table, row)

    def add_captioned(self) -> None:
        """Add images that no table names, with the text beside them; then unreadable files beside a text."""
        for name, path in self.files.images.items():
            if name not in self._named:
                self._add_captioned(name, path)
        for name, path in self.files.others.items():
            if self.files.is_captioned(name):
                self.listing.problems.append(Problem(name, formats.unreadable(path.suffix) or "it cannot be read"))
            elif path.name != PAIRS:
                self.listing.skipped[path.suffix.lower() or path.name] += 1
        self.listing.unused = self.files.unused

    def _skip(self, table: Path, content: tables.Table, otherwise: str) -> None:
        """Report a table that is not read: by its name and its fault, or as `otherwise` if nothing is wrong with it."""
        self.listing.skipped[f"{table.name} ({content.fault})" if content.fault else otherwise] += 1

    def _add_problems(self, table: Path, content: tables.Table) -> None:
        where = name_below(self.listing.folder, table)
        self.listing.problems += [Problem(f"{where} {p.where}", p.reason, p.count) for p in content.problems]

    def _add_row(self, table: Path, row: TableRow) -> None:
        where = f"{name_below(self.listing.folder, table)} line {row.line}"
        image = self.files.image(table, row.image)
        if isinstance(image, str):
            self.listing.problems.append(Problem(where, image))
            return
        name, path = image
        self._named.add(name)
        caption = row.caption or self._text_beside(name)
        if not caption:
            self.listing.problems.append(Problem(where, f"the image {row.image!r} has no caption"))
            return
        sample = Sample(name, path, caption, row.seed)
        self.listing.repeats += sample in self.found
        self.found.add(sample)

    def _add_captioned(self, name: str, path: Path) -> None:
        try:
            caption = self.files.caption(name)
        except ValueError as error:
            self.listing.problems.append(Problem(name, str(error)))
            return
        if caption:
            self.found.add(Sample(name, path, caption, None))
        elif caption is None and self._covered & set(map(str, PurePosixPath(name).parents)):
            self.listing.unlisted += 1
        else:
            text = PurePosixPath(name).with_suffix(".txt").name
            wrong = f"there is no {text} beside it and no table names it" if caption is None else f"{text} is empty"
            self.listing.problems.append(Problem(name, f"it has no caption: {wrong}"))

    def _text_beside(self, image: str) -> str | None:
        try:
            return self.files.caption(image)
        except ValueError:
            return None


def _repeat_folders(samples: Iterable[Sample]) -> list[str]:
    parents = {parent for sample in samples for parent in PurePosixPath(sample.name).parts[:-1]}
    return sorted(name for name in parents if _REPEATS.match(name))


def _nothing(source: Path, listing: Listing) -> str:
    if listing.problems:
        wrong = [f"{table} is not read" for table in listing.skipped if table.endswith(")")]
        shown = "; ".join([*wrong, *map(str, listing.problems)][:5])
        return f"{source} contains no image that can be trained on: {shown}."
    return (
        f"{source} holds no captioned images: put a metadata.csv with the columns image,prompt,seed there, or a text "
        "file beside each image."
    )
