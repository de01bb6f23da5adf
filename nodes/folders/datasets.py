"""The host's folders for training: data sets, and the user's input files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...l2p_core.files import paths
from .names import below

FOLDER = "datasets"
NONE_YET = "none yet"
"""Offered if there is no data set, so that the list is not empty."""
_DEPTH = 2  # levels of subfolders that are offered


def root() -> Path:
    """The host's datasets folder; older versions have none and get it at the same place."""
    if FOLDER in folder_paths.folder_names_and_paths:
        return Path(folder_paths.get_folder_paths(FOLDER)[0]).absolute()
    return Path(folder_paths.base_path, FOLDER).absolute()


def folder(name: str) -> Path:
    """The folder of the data set of this name, which need not exist.

    Raises:
        ValueError: for an empty name, one that leads out of the datasets folder, or, on Windows, one that Windows
            refuses.
    """
    path = below(root(), name)
    if path == root():
        raise ValueError("The name of the data set is empty: give it one.")
    if path is None:
        raise ValueError(f"The name {name!r} leads out of the {FOLDER} folder: give a name inside it.")
    return path


def choices() -> list[str]:
    """Names of the data sets: of the folders in the datasets folder, and of their subfolders.

    Called whenever the frontend requests the nodes: folders are listed, images are not opened.
    """
    return sorted(_folders(root(), _DEPTH))


def existing(name: str) -> Path:
    """The folder of a data set.

    Raises:
        ValueError: as for `folder`, and if it does not exist.
    """
    path = folder(name)
    if not path.is_dir():
        what = "no data set yet" if name == NONE_YET else f"no data set {name!r}"
        raise ValueError(
            f"There is {what} in the {FOLDER} folder: put a folder of captioned images there, or "
            "make one with Synthesize L2P Dataset."
        )
    return path


def name_of(path: Path) -> str:
    """The name of a data set's folder, with forward slashes on every system."""
    return path.relative_to(root()).as_posix()


def input_files(suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with these suffixes in the host's input folder."""
    found = entries(Path(folder_paths.get_input_directory()))
    return sorted(e.name for e in found if e.name.lower().endswith(suffixes) and not paths.is_folder(e))


def input_file(name: str) -> Path:
    """A file in the host's input folder.

    Raises:
        ValueError: if it does not exist.
    """
    path = paths.inside(Path(folder_paths.get_input_directory()), name)
    if path is None or not path.is_file():
        raise ValueError(
            f"There is no file {name!r} in the input folder: put it there, or press R to refresh the list."
        )
    return path


def fingerprint(name: str | None) -> str:
    """A fingerprint of a data set: names, sizes and times of all its files."""
    return paths.state(folder(name)) if name and name.strip() else ""


def pairs_fingerprint(name: str) -> str:
    """A fingerprint of a data set's patch pairs."""
    from ...l2p_core.patch_pairs import FILE

    return paths.state(folder(name) / FILE)


def input_fingerprint(name: str | None) -> str:
    """A fingerprint of a file in the input folder."""
    return paths.state(input_file(name)) if name else ""


def _folders(parent: Path, depth: int) -> Iterator[str]:
    for entry in entries(parent) if depth else ():
        if not entry.name.startswith(".") and paths.is_folder(entry):
            yield entry.name
            yield from (f"{entry.name}/{inner}" for inner in _folders(parent / entry.name, depth - 1))


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; empty if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
