"""The locations of written prompts in the host: the work in the output folder, the list in the input folder, from which
Synthesize L2P Dataset reads it."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .names import below

FOLDER = "l2p_prompts"
_SUFFIX = ".csv"


def root() -> Path:
    """The folder of all work on prompts, in the host's output folder."""
    return Path(folder_paths.get_output_directory()).absolute() / FOLDER


def work_folder(name: str) -> Path:
    """The folder of the work on a list.

    Raises:
        ValueError: for an empty name, one with a folder in it, or, on Windows, one that Windows refuses.
    """
    return root() / list_file(name).stem


def report(name: str) -> Path:
    """The report on a list, which need not exist; raises like `work_folder`."""
    return work_folder(name) / "report.html"


def list_file(name: str) -> Path:
    """The file of a list in the input folder; raises like `work_folder`."""
    inputs = Path(folder_paths.get_input_directory()).absolute()
    name = name.strip().removesuffix(_SUFFIX).strip()
    path = below(inputs, name + _SUFFIX)
    if not name.strip(". "):
        raise ValueError("The name of the list is empty: give it one.")
    if path is None or path.parent != inputs:
        raise ValueError(
            f"The name {name!r} contains a folder, and the list is saved in the input folder itself: "
            "give a name without it."
        )
    return path


def check_list(path: Path, written: set[str]) -> None:
    """Refuse to replace a list that is not, or no longer, the work's own.

    Args:
        path: of `list_file`.
        written: all prompts that the work has written.

    Raises:
        ValueError: if the file has other prompts.
    """
    from ...l2p_core.dataset import prompts

    if not path.exists():
        return
    try:
        own = set(prompts.read(path)) <= written
    except ValueError:
        own = False
    if not own:
        raise ValueError(
            f"The input folder has a file {path.name!r} with prompts that were not written here: choose another name, "
            "or move that file away."
        )
