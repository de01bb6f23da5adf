"""Folders of images in the host's output, input and datasets folders, as nodes offer them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...l2p_core.files import paths
from . import datasets

NO_FOLDER = "none"
_DEPTH = 2  # levels of subfolders that are offered


def choices() -> list[str]:
    """Names of the folders: `output` and `input` themselves, and the folders in them and in `datasets`.

    Called whenever the frontend requests the nodes: folders are listed, images are not opened.
    """
    found = [NO_FOLDER]
    for name, root in _roots().items():
        found += [name, *(f"{name}/{below}" for below in sorted(_folders(root, _DEPTH)))]
    return found


def existing(name: str) -> Path:
    """A folder that `choices` offers.

    Raises:
        ValueError: if it does not exist, or leads out of the host's folders.
    """
    start, _, below = name.replace("\\", "/").partition("/")
    root = _roots().get(start)
    path = paths.inside(root, below) if root else None
    if path is None or not path.is_dir():
        raise ValueError(
            f"There is no folder {name!r} of images: choose one of {', '.join(_roots())} or a folder in them, or press "
            "R to refresh the list."
        )
    return path


def fingerprint(name: str | None) -> str:
    """A fingerprint of a folder: names, sizes and times of all its files; empty for none."""
    return "" if not name or name == NO_FOLDER else paths.state(existing(name))


def _roots() -> dict[str, Path]:
    return {
        "output": Path(folder_paths.get_output_directory()),
        "input": Path(folder_paths.get_input_directory()),
        datasets.FOLDER: datasets.root(),
    }


def _folders(parent: Path, depth: int) -> Iterator[str]:
    for entry in datasets.entries(parent) if depth else ():
        # GenEval's layout has hundreds of folders whose names are numbers, which nobody chooses one by one.
        if not entry.name.startswith(".") and not entry.name.isdigit() and paths.is_folder(entry):
            yield entry.name
            yield from (f"{entry.name}/{inner}" for inner in _folders(parent / entry.name, depth - 1))
