"""A lock of the operating system that keeps a run folder to one process and ends with that process."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_BEYOND = 1 << 30
"""The byte that is locked on Windows, beyond the written text: other processes cannot read a locked byte there."""


class FolderInUse(ValueError):
    """Another process uses the folder; the message names it and says what to do."""


@contextmanager
def held(folder: Path, name: str, does: str = "trains") -> Iterator[bool]:
    """Hold a folder within the block; False, and not held, on file systems without locks.

    The file stays: its lock counts, not its existence, so nothing has to be removed after a kill.

    Args:
        folder: created if missing.
        name: of the file in it that is locked; it names the holder.
        does: what a holder does there, as worded in the refusal.

    Raises:
        FolderInUse: if another process holds it.
        ValueError: if the folder cannot be created or written.
    """
    with _opened(folder, name) as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD:
                raise FolderInUse(
                    f"{folder} is in use: {_holder(file)} {does} there. Wait until it ends, or choose another folder; "
                    "nothing was touched."
                ) from error
            yield False
            return
        try:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:
            # On a full disk the holder cannot be named, which is no reason not to train.
            file.truncate(0)
        try:
            yield True
        finally:
            _unlock(file)


def _opened(folder: Path, name: str) -> FileIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Created if missing, never truncated: another process may hold it.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        return open(os.open(folder / name, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise ValueError(
            f"{folder} could not be written ({error.strerror or error}): choose another folder."
        ) from error


def _holder(file: FileIO) -> str:
    said = file.read(256).decode(errors="replace").strip()
    return said or "another process"


if sys.platform == "win32":
    import msvcrt

    def _lock(file: FileIO) -> None:
        position = file.seek(_BEYOND)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(position - _BEYOND)

    def _unlock(file: FileIO) -> None:
        file.seek(_BEYOND)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: FileIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: FileIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
