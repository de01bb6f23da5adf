"""Explains why one of the host's own loaders did not load an L2P file.

Before it asks any row of its list, the host looks for `cap_embedder.1.weight` and `k_norm` of the first noise refiner,
reads all of the file, and puts the layers that a header names into it under the names there. If this fails, no row of
ours is asked, and the host's error is a KeyError, "Could not detect model type" or a reader's. The frontend therefore
asks here after such a loader has failed.
"""

from __future__ import annotations

from pathlib import Path

from ...l2p_core.checkpoint import check_exact, open_checkpoint
from ...l2p_core.config import HEAD
from ...l2p_core.files.recognise import other_kind
from ...l2p_core.files.safetensors_header import CheckpointError, tensor_names
from ...l2p_core.files.shards import files_of
from ...l2p_core.model import key_shapes
from ..folders import files
from .sentences import by_folders

DELTA = (
    "This file contains only the trained part of an L2P model: load it with L2P Loader, as the delta beside the base "
    "that it was made for."
)
OTHERWISE = "This ComfyUI's own loaders do not read this L2P file: load it with L2P Loader."


def refused_because(folder: str, name: str) -> str:
    """One sentence about a file of a models folder; empty for a file that is neither an L2P model nor a part of one."""
    try:
        path = files.existing(name, folder)
        keys = [key for file in files_of(Path(path)) for key in tensor_names(file)]
    except ValueError:
        return ""
    is_ours = any(f"{HEAD}." in key for key in keys) and not other_kind(keys, (), "")
    try:
        checkpoint = open_checkpoint(path)
        if checkpoint.is_delta:
            return DELTA
        if is_ours:
            check_exact(checkpoint, key_shapes(checkpoint.pixel_config(plain=False)))
    except CheckpointError as error:
        return by_folders(str(error)) if is_ours else ""
    return OTHERWISE if is_ours else ""
