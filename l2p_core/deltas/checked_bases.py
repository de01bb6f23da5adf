"""Remembers in a small file which bases passed the check for a delta. The check hashes every tensor that a delta takes
from its base, which for a 12 GB model is nearly all of it. The same files need not be checked twice: a result is stored
under a hash of the request and of the files' paths, sizes and modification times, so that anything written since is
checked again.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from ..files.atomic import make_folder, write_bytes
from .delta_on_base import Merged
from .unchanged_tensors import unchanged_text

LIMIT = 256
"""Number of checks remembered; the oldest are dropped first."""

SETTLED_SECONDS = 3
"""File times may have a resolution of 2 seconds, within which a file could be rewritten unnoticed."""


class Verified:
    """The checks that passed, in a JSON file that may be deleted at any time.

    Args:
        path: of that file; it and its folder are created when needed.
    """

    def __init__(self, path: Path):
        self.path = path

    def __contains__(self, merged: Merged) -> bool:
        return _key(merged) in self._read()

    def add(self, merged: Merged) -> None:
        """Remember that this base passed, unless its files are so new that a later change could go unseen.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        newest = max((path.stat().st_mtime for path in _base_files(merged)), default=0.0)
        if time.time() - newest < SETTLED_SECONDS:
            return
        keys = [key for key in self._read() if key != _key(merged)][1 - LIMIT :]
        make_folder(self.path.parent)
        write_bytes(self.path, json.dumps([*keys, _key(merged)], indent=1).encode())

    def _read(self) -> list[str]:
        """The remembered checks; none if the file is missing or damaged, so that everything is checked again."""
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return []
        return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []


def _key(merged: Merged) -> str:
    """A hash of what the delta asks for and of the base's files as they are now."""
    stats = [(path, path.stat()) for path in _base_files(merged)]
    # On POSIX st_ctime_ns moves whenever a file is written, even by a tool that puts the old times back.
    files = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
    wanted = unchanged_text(dict(sorted(merged.unchanged.items())))
    return hashlib.sha256(json.dumps([files, wanted]).encode()).hexdigest()


def _base_files(merged: Merged) -> list[Path]:
    """The files that hold what the delta takes from its base."""
    return sorted({piece.path for name in merged.unchanged for piece in merged.checkpoint.tensors[name].pieces})
