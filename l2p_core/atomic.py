"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from .safetensors_header import CheckpointError

_WINDOWS_DISK_FULL = 112


@contextmanager
def atomic_file(target: Path, size: int, overwrite: bool) -> Iterator[FileIO]:
    """An unbuffered file that becomes `target` when the block ends without an exception.

    It is written beside the target and renamed over it, so that a kill, an interrupt or a full disk leaves the old
    file or none. `size` is how many bytes it will have at most, to see beforehand whether they fit.

    Raises:
        CheckpointError: if the target exists and `overwrite` is false, its folder does not exist, the disk is full
            or the system refuses to write.
    """
    _check_target(target, size, overwrite)
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(_sentence(target, error)) from error
        raise
    _sync_folder(target.parent)


def _check_target(target: Path, size: int, overwrite: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: give the name of the file to write.")
    if not target.parent.is_dir():
        raise CheckpointError(f"The folder {target.parent} does not exist: create it or choose another.")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already: choose another name or allow overwriting it.")
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise CheckpointError(
            f"{target} needs {size / 1e9:.2f} GB but its disk has only {free / 1e9:.2f} GB free: make room or "
            "choose another disk."
        )


def _sentence(target: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC or getattr(error, "winerror", None) == _WINDOWS_DISK_FULL:
        return f"The disk of {target} is full: nothing was written there, make room and try again."
    return f"{target} could not be written: {error}."


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
