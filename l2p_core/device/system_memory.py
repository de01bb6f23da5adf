"""Free RAM: memory of other programs counts as used, including models that a host keeps."""

from __future__ import annotations

from pathlib import Path

import psutil

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Files in which Linux reports a container's limit, its usage and its statistics: version 2 and version 1."""


def total_memory_and_swap() -> int:
    """Bytes of RAM of this computer, swap included."""
    return psutil.virtual_memory().total + _swap()[0]


def available_memory() -> int:
    """Bytes of RAM that this process can still use without swapping, within a container's limit."""
    return min([psutil.virtual_memory().available, *_left_of_container()])


def free_memory_and_swap() -> int:
    """Bytes that this process can still use in total: free RAM and free swap."""
    return available_memory() + _swap()[1]


def _swap() -> tuple[int, int]:
    """Bytes of swap: total and free."""
    try:
        swap = psutil.swap_memory()
    except RuntimeError:  # Windows whose performance counters are disabled or damaged
        return 0, 0
    return swap.total, swap.free


def _left_of_container(groups: tuple[tuple[str, str, str], ...] = _GROUPS) -> list[int]:
    """The remainder of a container's limit; empty without one. Cached files count as free."""
    for limit, used, stat in groups:
        try:
            texts = [Path(path).read_text(encoding="ascii") for path in (limit, used, stat)]
            cached = dict(line.split(" ", 1) for line in texts[2].splitlines())
            left = int(texts[0]) - int(texts[1]) + int(cached.get("inactive_file", 0))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        return [max(0, left)]
    return []
