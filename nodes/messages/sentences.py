"""The core's sentences as ComfyUI's users know their files: by the names that the host lists.

What a node says is shown in workflows, which people share: no path of a machine is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...l2p_core.files.safetensors_header import CheckpointError
from ..folders import datasets, files, run_files


@contextmanager
def by_listed_names() -> Iterator[None]:
    """Within the block, or the function that it decorates, errors about files name them without the folders' places."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        for folder in _spellings(*files.roots(*files.WHOLE_MODELS)):
            text = text.replace(folder + os.sep, "")
        raise CheckpointError(text) from error


def by_folders(text: str) -> str:
    """A sentence about a run, with the host's folders named as its user knows them: output/l2p_runs, datasets, models.

    The folders' own paths and what links in them lead to are the same places.
    """
    known = {folder: f"output/{run_files.RUNS}" for folder in _spellings(run_files.root())}
    known |= dict.fromkeys(_spellings(datasets.root()), datasets.FOLDER)
    for kind in files.WHOLE_MODELS:
        known |= dict.fromkeys(_spellings(*files.roots(kind)), f"models/{kind}")
    for folder in sorted(known, key=len, reverse=True):
        text = text.replace(folder, known[folder])
    return text


def _spellings(*folders: Path) -> list[str]:
    """Paths of folders as sentences may have them, the longest first."""
    return sorted({str(path) for folder in folders for path in (folder, folder.resolve())}, key=len, reverse=True)
