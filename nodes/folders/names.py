"""Names that users give to files and folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...l2p_core.files.paths import inside

WINDOWS = os.name == "nt"
_CHARACTERS = re.compile(r'[<>:"|?*\x00-\x1f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)


def below(folder: Path, name: str) -> Path | None:
    """The path that a user's name means below a folder, by the rule of `l2p_core.files.paths`; None if it leads out.

    Raises:
        ValueError: on Windows, for names it refuses: checked now rather than after days of work.
    """
    name = name.strip()
    if WINDOWS:
        for part in name.replace("\\", "/").split("/"):
            if part not in ("", ".", "..") and _is_refused(part):
                raise ValueError(
                    f'Windows lets no file or folder be called {part!r}: give a name without < > : " | ? *, without a '
                    "dot or a space at an end, and not of a device, such as con."
                )
    return inside(folder, name)


def _is_refused(part: str) -> bool:
    return bool(_CHARACTERS.search(part) or _DEVICE.fullmatch(part)) or part.endswith((".", " "))
