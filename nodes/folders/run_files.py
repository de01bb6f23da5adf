"""Where a training run's things are in the host: its folder, what it leaves to load."""

from __future__ import annotations

import filecmp
from pathlib import Path

import folder_paths

from ...l2p_core.files.atomic import atomic_file
from . import files
from .names import below

RUNS = "l2p_runs"
CAPTIONS = "captions"
"""Beside the runs, which share it; so no run can be called that."""

_CHUNK = 1 << 24


def run_folder(name: str) -> Path:
    """The folder of a run in the host's output folder, so that its report and montages are found.

    Raises:
        ValueError: for an empty name, one that leads out of the folder of all runs, or one that Windows refuses, there.
    """
    runs = root()
    path = below(runs, name)
    if path == runs:
        raise ValueError("The run has no name: give it one.")
    if path is None:
        raise ValueError(f"The run's name {name!r} leads out of output/{RUNS}: give a name inside it.")
    if path.relative_to(runs).parts[0].casefold() == CAPTIONS:  # capitals are all the same to Windows
        raise ValueError(f"The folder {CAPTIONS!r} in output/{RUNS} holds caption features: give the run another name.")
    return path


def root() -> Path:
    """The folder of all runs."""
    return _output() / RUNS


def caption_folder() -> Path:
    """Where caption features are kept, for all runs."""
    return root() / CAPTIONS


def served(path: Path) -> dict[str, str]:
    """How the frontend asks the host for a file of the output folder."""
    relative = path.relative_to(_output())
    return {"filename": relative.name, "subfolder": relative.parent.as_posix(), "type": "output"}


def check_target(filename: str, overwrite: bool, delta: Path) -> Path:
    """Where a run's delta is to go in the models folder: asked before training, which may take days.

    Args:
        filename: as the user gave it.
        overwrite: whether another file there may be replaced.
        delta: the run's own, which may be there already, from an earlier end of the same run.

    Raises:
        ValueError: for a name that leads out of the folder, or a file that is there and may not be replaced.
    """
    path = files.target(filename)
    own = path.exists() and delta.exists() and filecmp.cmp(path, delta, shallow=False)
    return files.new_file(filename, overwrite or own)


def publish(delta: Path, target: Path) -> None:
    """Copy a run's delta into the models folder, whole or not at all.

    Raises:
        ValueError: if the disk is full or refuses.
    """
    if target.exists() and filecmp.cmp(delta, target, shallow=False):
        return
    with delta.open("rb") as source, atomic_file(target, delta.stat().st_size, overwrite=True) as copy:
        while chunk := source.read(_CHUNK):
            left = memoryview(chunk)
            while left:
                left = left[copy.write(left) :]


def _output() -> Path:
    """The host's output folder, links in its path as they are: a run's folder is below it by name, wherever it lies."""
    return Path(folder_paths.get_output_directory()).absolute()
