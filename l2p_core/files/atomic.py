"""Atomic writing: files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from .safetensors_header import CheckpointError
from .units import bytes_text

_WINDOWS_DISK_FULL = 112
_MOMENT = 60.0  # seconds
_PATIENCE = 5.0  # seconds that a reader on Windows may keep a file from being replaced
_IN_USE = "another program has it open, as ComfyUI has loaded models, or you lack permission to write there"
_PART = re.compile(r"\.[0-9a-f]{8}\.part")


@contextmanager
def atomic_file(target: Path, size: int, overwrite: bool) -> Iterator[FileIO]:
    """An unbuffered file that becomes `target` when the block ends without an exception.

    It is written beside the target and renamed over it, so a kill, an interrupt or a full disk leaves the old file or
    none. `size` is its largest size in bytes, for checking the free space first. Partial files of the same target left
    by killed processes are removed first; one that a running process writes is not touched.

    Raises:
        CheckpointError: if the target exists and `overwrite` is false, its folder does not exist, the disk is full
            or the system refuses to write.
    """
    check_target(target, overwrite)
    remove_leftovers(target)
    _check_room(target, size)
    part: Path | None = None
    try:
        part, file = _open_part(target)
        with file:
            yield file
            os.fsync(file.fileno())
            if os.name == "posix":
                # Before the lock ends: other processes treat an unlocked part as a leftover.
                os.replace(part, target)
        if os.name != "posix":
            _replace(part, target)  # Windows does not rename an open file
    except BaseException as error:
        if part:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(_sentence(target, error)) from error
        raise
    _sync_folder(target.parent)


def write_bytes(target: Path, data: bytes) -> None:
    """Replace a small file's content atomically; errors as for `atomic_file`."""
    with atomic_file(target, len(data), overwrite=True) as file:
        write_all(file, memoryview(data))


def write_all(file: FileIO, data: memoryview) -> None:
    """Write bytes to an unbuffered file, which may take a part of them at a time."""
    while data:
        data = data[file.write(data) :]


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, if it does not exist.

    Raises:
        CheckpointError: if a file has its name, or the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CheckpointError(f"{folder} is a file, or a link that leads nowhere: give the name of a folder.") from None
    except OSError as error:
        raise CheckpointError(f"The folder {folder} could not be created: {error.strerror or error}.") from error


def append(path: Path, data: bytes) -> None:
    """Append to a file, completely or not at all; it is created if it does not exist.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror or error}.") from error


def remove(path: Path) -> None:
    """Delete a file if it exists. Windows refuses while another program reads it; this waits a moment for it.

    Raises:
        CheckpointError: if it stays open or must not be deleted.
    """
    _when_free(lambda: path.unlink(missing_ok=True), f"{path} could not be removed")


def move(path: Path, target: Path) -> None:
    """Rename a file or folder to an unused name on the same disk; waits and raises like `remove`."""
    _when_free(lambda: os.rename(path, target), f"{path} could not be moved to {target}")


def _when_free(change: Callable[[], object], failure: str) -> None:
    try:
        _patiently(change)
    except OSError as error:
        raise CheckpointError(f"{failure}: {_reason(error)}") from error


def _patiently(change: Callable[[], object]) -> None:
    """Make a change of a file that Windows may refuse for a moment."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            change()
            return
        except PermissionError:
            if os.name == "posix" or time.monotonic() >= until:
                raise
        time.sleep(0.05)


def _replace(part: Path, target: Path) -> None:
    """Rename over a target on Windows, which refuses while another program reads it: a virus scanner for a moment, a
    program that has mapped it, as ComfyUI does with models, indefinitely. In that case the old file is renamed like a
    part and removed once it is closed."""
    with suppress(PermissionError):
        _patiently(lambda: os.replace(part, target))
        return
    aside = _part_of(target)
    with suppress(OSError):
        os.utime(target)  # recent parts are not removed
    os.rename(target, aside)
    try:
        os.replace(part, target)
    except OSError:
        os.rename(aside, target)
        raise
    with suppress(OSError):
        aside.unlink()


def remove_leftovers(target: Path) -> None:
    """Delete parts of this target whose processes have ended.

    A process holds a lock on the part it writes, which ends with the process in any case. On file systems without
    locks, parts stay. Windows does not delete open files, but a process closes its part just before it renames it:
    there, recently written parts stay.
    """
    with suppress(OSError):
        for entry in list(os.scandir(target.parent)):
            rest = entry.name.removeprefix(target.name)
            if rest != entry.name and _PART.fullmatch(rest):
                _remove_if_left(Path(entry.path))


def _remove_if_left(part: Path) -> None:
    with suppress(OSError):
        if os.name != "posix":
            if time.time() - part.stat().st_mtime > _MOMENT:
                part.unlink()
            return
        with open(part, "r+b", buffering=0) as file:
            _lock(file)
            part.unlink()


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")


def _open_part(target: Path) -> tuple[Path, FileIO]:
    """A new part, locked if the file system supports locks."""
    while True:
        part = _part_of(target)
        file = open(part, "xb", buffering=0)  # noqa: SIM115 (the caller closes it)
        # Another process may have taken it for a leftover before it was locked, and be about to remove it.
        if _is_ours(file) and part.exists():
            return part, file
        file.close()


def _is_ours(file: FileIO) -> bool:
    """Lock a new part; False if another process has, True also on file systems without locks."""
    try:
        _lock(file)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _lock(file: FileIO) -> None:
    """Lock a file for as long as it is open; raises OSError if another process has, or without locks."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_target(target: Path, overwrite: bool) -> None:
    """Check before long work that a file may be written there; errors as for `atomic_file`."""
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: give the name of the file to write.")
    if not target.parent.is_dir():
        raise CheckpointError(f"The folder {target.parent} does not exist: create it or choose another.")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} already exists: choose another name or allow overwriting it.")


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise CheckpointError(
            f"{target} needs {bytes_text(size)} but its disk has only {bytes_text(free)} free: free some space or "
            "choose another disk."
        )


def _sentence(target: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC or getattr(error, "winerror", None) == _WINDOWS_DISK_FULL:
        return f"The disk of {target} is full, so nothing was written: free some space and try again."
    return f"{target} could not be written: {_reason(error)}"


def _reason(error: OSError) -> str:
    reason = error.strerror or error
    return f"{_IN_USE} ({reason})." if isinstance(error, PermissionError) else f"{reason}."


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no call for this."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
