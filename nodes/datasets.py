"""The host's folders for training: data sets that are made and read, and files that a user has put in."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..l2p_core.dataset.synthesis import TABLE
from .names import as_path

FOLDER = "datasets"
_DEPTH = 2  # of folders below it that are offered


def root() -> Path:
    """The host's datasets folder; older versions know none, and get it where later ones have it."""
    if FOLDER in folder_paths.folder_names_and_paths:
        return Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()
    return Path(folder_paths.base_path, FOLDER).resolve()


def folder(name: str) -> Path:
    """The folder of the data set of this name, which need not exist.

    Raises:
        ValueError: for an empty name, one that leads out of the datasets folder, or one that Windows refuses, there.
    """
    path = (root() / as_path(name)).resolve()
    if path == root():
        raise ValueError("The name of the data set is empty: give it one.")
    if not path.is_relative_to(root()):
        raise ValueError(f"The name {name!r} leads out of the {FOLDER} folder: give a name inside it.")
    return path


def choices() -> list[str]:
    """Names of the data sets there are: of the folders in the datasets folder, and of those in them."""
    return sorted(_folders(root(), _DEPTH))


def existing(name: str) -> Path:
    """The folder of a data set.

    Raises:
        ValueError: as `folder`, and if there is none of that name.
    """
    path = folder(name)
    if not path.is_dir():
        raise ValueError(
            f"There is no data set {name!r} in {root()}: put a folder of captioned images there, or make one with "
            "Synthesize L2P Dataset."
        )
    return path


def name_of(path: Path) -> str:
    """The name of a data set's folder, with forward slashes on every system."""
    return path.relative_to(root()).as_posix()


def input_files(suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with these suffixes in the host's input folder."""
    names = sorted(path.name for path in Path(folder_paths.get_input_directory()).iterdir() if path.is_file())
    return [name for name in names if name.lower().endswith(suffixes)]


def input_file(name: str) -> Path:
    """A file in the host's input folder.

    Raises:
        ValueError: if there is none of that name in it.
    """
    inside = Path(folder_paths.get_input_directory()).resolve()
    path = (inside / name).resolve()
    if not path.is_relative_to(inside) or not path.is_file():
        raise ValueError(
            f"There is no file {name!r} in the input folder: put it there, or press R to refresh the list."
        )
    return path


def fingerprint(name: str | None, prompts: str | None) -> list[tuple[str, int, int]]:
    """What tells that a data set or a file of prompts has changed: names, sizes and times of what there is."""
    paths = []
    if name and name.strip():
        paths.append(folder(name) / TABLE)
    if prompts:
        paths.append(input_file(prompts))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


def _folders(parent: Path, depth: int) -> list[str]:
    if not depth or not parent.is_dir():
        return []
    found = []
    for path in parent.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            found += [path.name, *(f"{path.name}/{below}" for below in _folders(path, depth - 1))]
    return found
