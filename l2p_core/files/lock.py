"""A lock of the operating system that keeps a folder to one process and ends with that process."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import takewhile
from pathlib import Path

from .atomic import make_folder

LOCK = ".lock"
"""The locked file of a folder that is read as data or by other programs: hidden, so that readers skip it."""

_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_ATTEMPTS = 10
_REMOVES_OPEN_FILES = sys.platform != "win32"
_BEYOND = 1 << 30
"""The byte that is locked on Windows, beyond the written text: other processes cannot read a locked byte there."""


class FolderInUse(ValueError):
    """Another process uses the folder; the message names it and says what to do."""


@contextmanager
def held(folder: Path, name: str, does: str, note: Callable[[str], object]) -> Iterator[None]:
    """Hold a folder within the block. On file systems without locks it is not held, and a note says so.

    The file stays: its lock counts, not its existence, so nothing has to be removed after a kill. If the block fails
    before anything else is in the folder, the file and the folders that were created here are removed.

    Args:
        folder: created if missing.
        name: of the file in it that is locked; it names the holder.
        does: what this process does there, as worded in the refusal of others.
        note: called with a sentence for the user if the file system has no locks.

    Raises:
        FolderInUse: if another process holds it.
        ValueError: if the folder cannot be created or written.
    """
    path = folder / name
    created = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))  # the innermost first
    is_new = not path.exists()
    file, is_held = _taken(path)
    is_left = False
    try:
        if is_held:
            _name_holder(file, does)
        else:
            note(f"This disk does not support locks: make sure that no other process {does} in the same folder.")
        yield
    except BaseException:
        is_left = is_held and is_new and _is_alone(path)
        raise
    finally:
        if is_left and _REMOVES_OPEN_FILES:
            # While it is held: afterwards it may be another process's.
            with suppress(OSError):
                path.unlink()
        if is_held:
            _unlock(file)
        file.close()
        if is_left:
            _remove(path, created)


def _is_alone(path: Path) -> bool:
    try:
        return os.listdir(path.parent) == [path.name]
    except OSError:
        return False


def _remove(path: Path, folders: Sequence[Path]) -> None:
    """Remove the file, if it is still there, and the folders, as far as no other process uses them."""
    with suppress(OSError):
        if not _REMOVES_OPEN_FILES:
            path.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()


def _taken(path: Path) -> tuple[FileIO, bool]:
    """The file, open, and whether it is locked."""
    attempts = _ATTEMPTS
    while True:
        file = _opened(path)
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in _HELD:
                return file, False
            with file:
                file.seek(0)
                holder = file.read(256).decode(errors="replace").strip() or "another process works"
                raise FolderInUse(
                    f"{path.parent} is in use: {holder} there. Wait until it ends, or choose another folder; "
                    "nothing was touched."
                ) from error
        attempts -= 1
        # Some network file systems number a file again whenever they are asked.
        if not attempts or _is_at(path, file):
            return file, True
        # Its last holder has removed it meanwhile, and a third process may hold a new one.
        file.close()


def _opened(path: Path, attempts: int = _ATTEMPTS) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created if missing, never truncated: another process may hold it.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        return open(os.open(path, flags, 0o666), "r+b", buffering=0)
    except FileExistsError:
        make_folder(path.parent)  # raises its sentence about a file of the folder's name
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and attempts > 1:
            return _opened(path, attempts - 1)  # another process has just removed the folder that it had created
        raise ValueError(
            f"{path.parent} could not be written ({error.strerror or error}): choose another folder."
        ) from error


def _is_at(path: Path, file: FileIO) -> bool:
    """Whether the open file is still the one at its path."""
    if not _REMOVES_OPEN_FILES:
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _name_holder(file: FileIO, does: str) -> None:
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} {does}\n".encode())
    except OSError:
        # On a full disk the holder cannot be named, but the work can go ahead.
        file.truncate(0)


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
