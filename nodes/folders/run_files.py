"""The locations of a training run in the host: its folder and its results."""

from __future__ import annotations

import filecmp
from pathlib import Path

import folder_paths

from ...l2p_core.files.atomic import atomic_file
from . import files
from .names import below

RUNS = "l2p_runs"
CAPTIONS = "captions"
"""A folder beside the runs, which share it; no run can have this name."""

_CHUNK = 1 << 24


def run_folder(name: str) -> Path:
    """The folder of a run in the host's output folder, where its report and montages can be found.

    Raises:
        ValueError: for an empty name, one that leads out of the folder of all runs, or, on Windows, one that Windows
            refuses.
    """
    runs = root()
    path = below(runs, name)
    if path == runs:
        raise ValueError("The run has no name: give it one.")
    if path is None:
        raise ValueError(f"The run's name {name!r} leads out of output/{RUNS}: give a name inside it.")
    if path.relative_to(runs).parts[0].casefold() == CAPTIONS:  # Windows ignores case
        raise ValueError(f"The folder {CAPTIONS!r} in output/{RUNS} holds caption features: give the run another name.")
    return path


def root() -> Path:
    """The folder of all runs."""
    return _output() / RUNS


def caption_folder() -> Path:
    """The folder of caption features for all runs."""
    return root() / CAPTIONS


def served(path: Path) -> dict[str, str]:
    """The parameters with which the frontend requests a file of the output folder from the host."""
    relative = path.relative_to(_output())
    return {"filename": relative.name, "subfolder": relative.parent.as_posix(), "type": "output"}


def check_target(filename: str, overwrite: bool, delta: Path) -> Path:
    """The path of a run's delta in the models folder, checked before training, which may take days.

    Args:
        filename: as the user entered it.
        overwrite: whether another file there may be replaced.
        delta: the run's own, which may exist already from an earlier end of the same run.

    Raises:
        ValueError: for a name that leads out of the folder, or an existing file that must not be replaced.
    """
    path = files.target(filename)
    own = path.exists() and delta.exists() and filecmp.cmp(path, delta, shallow=False)
    return files.new_file(filename, overwrite or own)


def publish(delta: Path, target: Path) -> None:
    """Copy a run's delta into the models folder, atomically.

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
    """The host's output folder with links in its path unresolved: a run's folder is below it by name."""
    return Path(folder_paths.get_output_directory()).absolute()
