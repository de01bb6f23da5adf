"""The reports of Evaluate L2P in the host's output folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .names import below

EVALUATIONS = "l2p_evaluations"
SUFFIX = ".html"


def page(name: str) -> Path:
    """The file of the report of this name, which need not exist.

    Raises:
        ValueError: for an empty name, one that leads out of the folder of reports, or, on Windows, one that Windows
            refuses.
    """
    root = Path(folder_paths.get_output_directory()).absolute() / EVALUATIONS
    path = below(root, name.strip().removesuffix(SUFFIX))
    if path == root:
        raise ValueError("The report has no name: give it one.")
    if path is None:
        raise ValueError(f"The report's name {name!r} leads out of output/{EVALUATIONS}: give a name inside it.")
    return path.with_name(path.name + SUFFIX)
