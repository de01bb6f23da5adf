"""The files of a data folder and their relations: an image, its name in a table, the text beside it.

Names match regardless of case, of composed or decomposed accents (NFC and NFD), and of the direction of slashes, so
that a data set made on one system can be read on every other. If several files differ only in this, only the exact name
counts.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..files import paths
from . import formats, tables
from .problems import Problem

TEXTS = (".txt", ".caption")


def name_below(folder: Path, path: Path) -> str:
    """A path below a folder as text, with forward slashes on every system."""
    return PurePosixPath(os.path.normpath(path.relative_to(folder).as_posix()).replace(os.sep, "/")).as_posix()


class DataFiles:
    """The files below a data folder, sorted by kind.

    Links are followed (`paths`), and no folder is read twice.

    Attributes:
        images, texts, others: paths by their names below the folder. Others may be images of unsupported formats.
        tables: CSV and JSON lines.
        metadata: files that may be kohya's metadata.
    """

    def __init__(self, folder: Path, problems: list[Problem]):
        self.folder = folder
        self.images: dict[str, Path] = {}
        self.texts: dict[str, Path] = {}
        self.others: dict[str, Path] = {}
        self.tables: list[Path] = []
        self.metadata: list[Path] = []
        for here, files in paths.walk(folder, lambda error: problems.append(_unreadable(error))):
            for entry in files:
                self._add(here / entry.name, problems)
        self._images = _by_spelling(self.images)
        self._texts = _by_spelling(self.texts)
        self._stems = _by_spelling(self.images, stems=True)
        self._texts_taken = {text for name in self.images for text in self._texts_of(name)}
        self._texts_read: set[str] = set()

    def _add(self, path: Path, problems: list[Problem]) -> None:
        suffix, name = path.suffix.lower(), name_below(self.folder, path)
        if not tables.is_text(name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            problems.append(Problem(shown, "its name is not UTF-8: rename it"))
        elif suffix in formats.SUFFIXES and formats.unreadable(suffix) is None:
            self.images[name] = path
        elif suffix in TEXTS:
            self.texts[name] = path
        elif suffix in tables.SUFFIXES:
            self.tables.append(path)
        elif suffix == tables.JSON_SUFFIX and path.stem.lower().startswith("meta"):
            self.metadata.append(path)
        else:
            self.others[name] = path

    def image(self, table: Path, written: str) -> tuple[str, Path] | str:
        """The image that a table names, as its name below the folder and its path; or the problem with it."""
        if not written or "\0" in written:
            return "it names no image"
        path = paths.inside(table.parent, written)
        if path is None:
            return f"the path {written!r} leads out of the data folder: write it relative to the file that names it"
        name = name_below(self.folder, path)
        found = _only(name, self.images, self._images) or self._without_suffix(name)
        if isinstance(found, list):
            return f"the image {written!r} may be any of {', '.join(found)}: write it as the file is named"
        if found:
            return found, self.images[found]
        if not path.is_file():
            return f"the image {written!r} does not exist"
        # It has another suffix, or is a link to another file of the folder.
        real = path.resolve()
        below = name_below(self.folder, real) if real.is_relative_to(self.folder) else ""
        return (below, self.images[below]) if below in self.images else (name, path)

    def caption(self, image: str) -> str | None:
        """The first text beside an image that is not empty; None without one."""
        caption = None
        for name in self._texts_of(image):
            self._texts_read.add(name)
            if caption := tables.decoded(self.texts[name]).strip():
                break
        return caption

    def is_captioned(self, other: str) -> bool:
        """Whether a text lies beside a file that is not an image, and belongs to no image."""
        own = set(self._texts_of(other)) - self._texts_taken
        self._texts_read |= own
        return bool(own)

    @property
    def unused(self) -> int:
        """The number of texts that were never requested."""
        return len(self.texts.keys() - self._texts_read)

    def _texts_of(self, image: str) -> list[str]:
        alone = len(self._images.get(_spelling(image), ())) <= 1
        stem = str(PurePosixPath(image).with_suffix(""))
        candidates = [f"{base}{suffix}" for suffix in TEXTS for base in (stem, image)]
        found = (_only(name, self.texts, self._texts if alone else {}) for name in candidates)
        return [name for name in found if isinstance(name, str)]

    def _without_suffix(self, name: str) -> str | list[str] | None:
        """The image that kohya's metadata names without its suffix."""
        if PurePosixPath(name).suffix.lower() in formats.SUFFIXES:
            return None
        return _one_of(self._stems.get(_spelling(name), []))


def _spelling(name: str) -> str:
    """A spelling shared by all names that some system treats as the same file."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).replace("\\", "/")


def _by_spelling(names: Iterable[str], stems: bool = False) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_spelling(str(PurePosixPath(name).with_suffix("")) if stems else name), []).append(name)
    return found


def _only(name: str, exact: dict[str, Path], spellings: dict[str, list[str]]) -> str | list[str] | None:
    """The file with exactly this name; otherwise all files whose names differ from it only in spelling."""
    return name if name in exact else _one_of(spellings.get(_spelling(name), []))


def _one_of(names: list[str]) -> str | list[str] | None:
    if len(names) > 1:
        return names
    return names[0] if names else None


def _unreadable(error: OSError) -> Problem:
    return Problem(str(error.filename), f"the folder cannot be read: {error.strerror}")
