"""The core's sentences as ComfyUI's users know their files: by the names that the host lists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..l2p_core.safetensors_header import CheckpointError
from . import files


@contextmanager
def by_listed_names() -> Iterator[None]:
    """Within the block, or the function that it decorates, errors about files name them without the folders' places."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        roots = files.roots(*files.WHOLE_MODELS)
        for folder in sorted({str(path) for root in roots for path in (root, root.resolve())}, key=len, reverse=True):
            text = text.replace(folder + os.sep, "")
        raise CheckpointError(text) from error
