"""A file in memory; what is written there stays out of the file."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


class ModelMMAP:
    """A model's file."""

    def __init__(self, path: str):
        self._file = Path(path).open("rb")  # noqa: SIM115 (open as long as its memory is used)
        self._memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        """Its address."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def get_file_handle(self) -> int:
        """Its file descriptor."""
        return self._file.fileno()

    def bounce(self) -> bool:
        """Give memory that was read back to the system."""
        return True
