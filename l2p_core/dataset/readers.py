"""What a data folder holds: images with captions, read from tables, JSON lines and text files beside the images.

Read are, in every folder below the given one and in any mix:

- CSV files with a column for the image and one for the caption: ``image,prompt,seed`` (the published 1k trainer's),
  ``file_name,text`` (the published README's and Hugging Face's);
- ``metadata.jsonl`` and other JSON lines with the same names;
- images with a caption of the same name beside them, ``portrait.png`` and ``portrait.txt``.

An image that a table names needs no text file; one that no table names is read with its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from . import tables
from .problems import Problem
from .tables import Row

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


_LINK_OUT = "the link leads out of the data folder: put the files themselves there"


@dataclass(frozen=True)
class Sample:
    """A captioned image.

    Attributes:
        name: the image's path below the data folder, with forward slashes on every system.
        path: the image file.
        caption: its text, stripped, never empty.
        seed: the seed that the source drew the image's noise from, 0 to 2**64 - 1; None where it is not known.
    """

    name: str
    path: Path
    caption: str
    seed: int | None


@dataclass
class Listing:
    """The samples of a data folder, in the order of their names, then captions.

    Attributes:
        folder: the data folder, absolute.
        samples: what can be trained on, as far as tables and names tell; no image has been opened.
        problems: what was left out, and why.
        unlisted: images without a text file that a table beside or above them leaves out, which is no mistake.
        repeats: rows that say again what another one says, read once.
    """

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    repeats: int = 0


def read(source: Path | str) -> Listing:
    """List the samples of a data folder, or of one CSV or JSON-lines file with the images below its folder.

    Broken rows, missing images and captions, and paths that lead out of the folder become problems of the listing.

    Raises:
        ValueError: if there is no such folder, a file named metadata cannot be read as one, or no sample is found.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"The data folder {source} does not exist: check the name.")
    only = source if source.is_file() else None
    folder = (source.parent if only else source).resolve()
    listing = Listing(folder)
    files = _Files(folder, listing.problems)
    rows = [only.resolve()] if only else files.tables
    found: set[Sample] = set()
    named: set[str] = set()
    covered: list[str] = []
    for table in rows:
        content = tables.read(table, required=only is not None or table.stem.lower() == "metadata")
        if content is None:
            continue
        covered.append(_name(folder, table.parent))
        listing.problems += [Problem(_where(folder, table, p.where), p.reason, p.count) for p in content.problems]
        for row in content.rows:
            _add_row(listing, files, table, row, found, named)
    if not only:
        _add_captioned(listing, files, covered, found, named)
    listing.samples = sorted(found, key=lambda s: (s.name, s.caption, -1 if s.seed is None else s.seed))
    listing.problems.sort(key=lambda problem: problem.where)
    if not listing.samples:
        raise ValueError(_nothing(source, listing))
    return listing


class _Files:
    """The files below a folder, found without following links, which could lead out of it or round in circles."""

    def __init__(self, folder: Path, problems: list[Problem]):
        self.folder = folder
        self.images: dict[str, Path] = {}
        self.texts: dict[str, Path] = {}
        self.tables: list[Path] = []
        for parent, folders, names in os.walk(folder, onerror=lambda error: problems.append(_unreadable(error))):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in list(folders):
                path = Path(parent, name)
                if path.is_symlink():
                    folders.remove(name)
                    if not path.resolve().is_relative_to(folder):
                        problems.append(Problem(_name(folder, path), _LINK_OUT))
            for name in sorted(names):
                self._add(Path(parent, name), problems)

    def _add(self, path: Path, problems: list[Problem]) -> None:
        suffix, name = path.suffix.lower(), _name(self.folder, path)
        if path.name.startswith(".") or suffix not in (*IMAGE_SUFFIXES, ".txt", *tables.SUFFIXES):
            return
        if not tables.is_text(name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            problems.append(Problem(shown, "its name is not UTF-8: rename it"))
        elif path.is_symlink() and not path.resolve().is_relative_to(self.folder):
            problems.append(Problem(name, _LINK_OUT))
        elif suffix in IMAGE_SUFFIXES:
            self.images[name] = path
        elif suffix == ".txt":
            self.texts[name] = path
        else:
            self.tables.append(path)

    def image(self, table: Path, written: str) -> tuple[str, Path] | str:
        """The image that a table means, by its name below the folder and its path; or what is wrong with it."""
        if not written or "\0" in written:
            return "it names no image"
        for text in (written, written.replace("\\", "/")):
            name = _name(self.folder, table.parent / text) if _is_inside(text) else ""
            if name in self.images:
                return name, self.images[name]
        if not _is_inside(written):
            return f"the path {written!r} leads out of the data folder: write it relative to the file that names it"
        # Not among the files found: another suffix, other capitals, or behind a link.
        path = table.parent / written.replace("\\", "/")
        if not path.is_file():
            return f"the image {written!r} does not exist"
        real = path.resolve()
        if not real.is_relative_to(self.folder):
            return f"the path {written!r} leads out of the data folder through a link"
        name, found = _name(self.folder, path), _name(self.folder, real)
        if found in self.images and found.casefold() == name.casefold():
            return found, self.images[found]  # on a system to which capitals are all the same
        return name, path

    def caption(self, image: str) -> str | None:
        """The text beside an image; None if there is none."""
        path = self.texts.get(str(PurePosixPath(image).with_suffix(".txt")))
        return None if path is None else tables.decoded(path).strip()


def _add_row(listing: Listing, files: _Files, table: Path, row: Row, found: set[Sample], named: set[str]) -> None:
    where = _where(listing.folder, table, f"line {row.line}")
    image = files.image(table, row.image)
    if isinstance(image, str):
        listing.problems.append(Problem(where, image))
        return
    name, path = image
    named.add(name)
    caption = row.caption or _text_beside(files, name)
    if not caption:
        listing.problems.append(Problem(where, f"the image {row.image!r} has no caption"))
        return
    sample = Sample(name, path, caption, row.seed)
    listing.repeats += sample in found
    found.add(sample)


def _add_captioned(
    listing: Listing, files: _Files, covered: Iterable[str], found: set[Sample], named: set[str]
) -> None:
    """Images that no table names, with the text beside them."""
    under_tables = set(covered)
    for name, path in files.images.items():
        if name in named:
            continue
        try:
            caption = files.caption(name)
        except ValueError as error:
            listing.problems.append(Problem(name, str(error)))
            continue
        if caption:
            found.add(Sample(name, path, caption, None))
        elif caption is None and under_tables & set(_parents(name)):
            listing.unlisted += 1
        else:
            text = PurePosixPath(name).with_suffix(".txt").name
            reason = (
                f"{text} is empty" if caption is not None else f"there is no {text} beside it and no table names it"
            )
            listing.problems.append(Problem(name, f"it has no caption: {reason}"))


def _text_beside(files: _Files, image: str) -> str | None:
    try:
        return files.caption(image)
    except ValueError:
        return None


def _parents(name: str) -> Iterator[str]:
    return (str(parent) for parent in PurePosixPath(name).parents)


def _is_inside(written: str) -> bool:
    """Whether a path can only mean something below where it is written, on any system."""
    windows, posix = PureWindowsPath(written), PurePosixPath(written)
    absolute = windows.drive or windows.root or posix.is_absolute()
    return not absolute and ".." not in windows.parts and ".." not in posix.parts


def _name(folder: Path, path: Path) -> str:
    return PurePosixPath(os.path.normpath(path.relative_to(folder).as_posix()).replace(os.sep, "/")).as_posix()


def _where(folder: Path, table: Path, line: str) -> str:
    return f"{_name(folder, table)} {line}"


def _unreadable(error: OSError) -> Problem:
    return Problem(str(error.filename), f"the folder cannot be read: {error.strerror}")


def _nothing(source: Path, listing: Listing) -> str:
    if listing.problems:
        shown = "; ".join(str(problem) for problem in listing.problems[:5])
        return f"{source} holds no image that can be trained on: {shown}."
    return (
        f"{source} holds no captioned images: put a metadata.csv with the columns image,prompt,seed there, or a text "
        "file beside each image."
    )
