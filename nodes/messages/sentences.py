"""The core's messages with files named as ComfyUI lists them.

Users share workflows, which show what a node says: it contains no path of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths

from ...l2p_core.files.safetensors_header import CheckpointError
from ..folders import datasets, files, run_files


@contextmanager
def by_listed_names() -> Iterator[None]:
    """Within the block, or the function that it decorates, errors name files without the folders' locations."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        for folder in _spellings(*files.roots(*files.WHOLE_MODELS)):
            text = text.replace(folder + os.sep, "")
        raise CheckpointError(text) from error


def by_folders(text: str) -> str:
    """A sentence about a run, with the host's folders named as users know them: output, input, datasets, models.

    The folders' own paths and the targets of links in them count as the same places.
    """
    known = {folder: f"output/{run_files.RUNS}" for folder in _spellings(run_files.root())}
    known |= dict.fromkeys(_spellings(datasets.root()), datasets.FOLDER)
    known |= dict.fromkeys(_spellings(Path(folder_paths.get_output_directory()).absolute()), "output")
    known |= dict.fromkeys(_spellings(Path(folder_paths.get_input_directory()).absolute()), "input")
    for kind in files.WHOLE_MODELS:
        known |= dict.fromkeys(_spellings(*files.roots(kind)), f"models/{kind}")
    for folder in sorted(known, key=len, reverse=True):
        text = text.replace(folder, known[folder])
    return text


def _spellings(*folders: Path) -> list[str]:
    """Possible spellings of folder paths in sentences, the longest first."""
    return sorted({str(path) for folder in folders for path in (folder, folder.resolve())}, key=len, reverse=True)
