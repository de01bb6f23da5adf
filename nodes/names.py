"""Names that users give to files and folders."""

from __future__ import annotations

import os
import re
from pathlib import PurePath

WINDOWS = os.name == "nt"
_CHARACTERS = re.compile(r'[<>:"|?*\x00-\x1f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)


def as_path(name: str) -> PurePath:
    """A name as a path, with either slash between folders.

    Raises:
        ValueError: for what Windows gives to no file, there: asked now, not when the result of days is to be written.
    """
    path = PurePath(name.strip().replace("\\", "/"))
    if WINDOWS:
        for part in path.parts:
            if part != ".." and not part.endswith("\\") and _is_refused(part):
                raise ValueError(
                    f'Windows lets no file or folder be called {part!r}: give a name without < > : " | ? *, without a '
                    "dot or a space at an end, and not of a device, such as con."
                )
    return path


def _is_refused(part: str) -> bool:
    return bool(_CHARACTERS.search(part) or _DEVICE.fullmatch(part)) or part.endswith((".", " "))
