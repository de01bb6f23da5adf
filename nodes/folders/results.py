"""Whether a node's output files are unchanged since the node wrote them.

The host caches a node's result by its inputs. A node that writes a file must run again if that file has been removed or
changed since, but not merely because the file now exists. Each node therefore remembers what it wrote, for as long as
the host remembers its result: while the server runs.
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
"""What each node left, by its id and its result's name; None is the last one, if the name comes from another node."""


def fingerprint(node: Any, name: str | None) -> int:
    """How often a node's result has been changed by others: a part of its `fingerprint_inputs`.

    Args:
        node: the node's class with its hidden inputs, the id among them.
        name: of the result, as the user entered it; None if it is unknown before the node runs.
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
    """Record the files or folders that a node has just written."""
    for key in ((_id(node), name), (_id(node), None)):
        changes = _left[key].changes if key in _left else 0
        _left[key] = _Left(files, paths.state(*files), changes)


def _id(node: Any) -> str:
    return str(getattr(node.hidden, "unique_id", None))
