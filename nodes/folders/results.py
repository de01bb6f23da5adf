"""Whether what a node has left on the disk is still as it left it.

The host caches a node's result by its inputs. A node that leaves a file must run again where that file is gone or
changed since, and must not run again only because the file is there now. So each node remembers what it left, for as
long as the host remembers its result: while the server runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...l2p_core.files import paths


class _Left(NamedTuple):
    files: tuple[Path, ...]
    state: str
    changes: int


_left: dict[tuple[str, str | None], _Left] = {}
"""By the node's id and the name of its result; None stands for the last one, where the name comes over a wire."""


def fingerprint(node: Any, name: str | None) -> int:
    """How often a node's result has changed behind its back: a part of its `fingerprint_inputs`.

    Args:
        node: the node's class with its hidden inputs, the id among them.
        name: of the result, as the user gave it; None where it is not known before the node runs.
    """
    key = _id(node), name
    if key not in _left:
        return 0
    files, before, changes = _left[key]
    now = paths.state(*files)
    if now != before:
        _left[key] = _Left(files, now, changes + 1)
    return _left[key].changes


def remember(node: Any, name: str, *files: Path) -> None:
    """Note that a node has just left these files or folders."""
    for key in ((_id(node), name), (_id(node), None)):
        changes = _left[key].changes if key in _left else 0
        _left[key] = _Left(files, paths.state(*files), changes)


def _id(node: Any) -> str:
    return str(getattr(node.hidden, "unique_id", None))
