"""Names that users give to files and folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...l2p_core.files.paths import inside

_LONGEST = 200
"""Maximum bytes of a file's or folder's name: file systems allow 255, and suffixes are added to it."""
_SHOWN = 40  # characters of a longer one
WINDOWS = os.name == "nt"
_CHARACTERS = re.compile(r'[<>:"|?*\x00-\x1f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)


def below(folder: Path, name: str) -> Path | None:
    """The path that a user's name means below a folder, by the rule of `l2p_core.files.paths`; None if it leads
    outside.

    Raises:
        ValueError: for new names that are too long, and on Windows for those it refuses: checked now rather than after
            days of work.
    """
    name = name.strip()
    for part in name.replace("\\", "/").split("/"):
        if len(part.encode(errors="replace")) > _LONGEST and not os.path.exists(folder / name):
            raise ValueError(
                f"The name {part[:_SHOWN]!r}... is too long: shorten it to {_LONGEST} letters, or to {_LONGEST // 3} "
                "of other scripts."
            )
        if WINDOWS and part not in ("", ".", "..") and _is_refused(part):
            raise ValueError(
                f'Windows does not allow the name {part!r}: choose one without < > : " | ? *, without a dot or a space '
                "at an end, that is not the name of a device, such as con."
            )
    return inside(folder, name)


def _is_refused(part: str) -> bool:
    return bool(_CHARACTERS.search(part) or _DEVICE.fullmatch(part)) or part.endswith((".", " "))
