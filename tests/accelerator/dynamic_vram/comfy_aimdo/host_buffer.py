"""Memory of the computer, and reading files into it or into the device's, which lies there too."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def read_file_to_device(
    file: Any, offset: int, size: int, stream: int, target: int, device: int, mark_cold: bool = True
) -> None:
    """Read a piece of a file to an address of the device."""
    with os.fdopen(os.dup(file if isinstance(file, int) else file.fileno()), "rb") as opened:
        opened.seek(offset)
        ctypes.memmove(target, opened.read(size), size)


class HostBuffer:
    """Memory that would be pinned; the host is started so that it pins none."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True):
        self.size = size

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        """Let go of what is beyond."""
        self.size = size
