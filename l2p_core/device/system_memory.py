"""RAM that is free now: what other programs hold is used, models that a host keeps included."""

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
"""Where Linux keeps what a container may hold, what it holds, and what that is: version 2 and version 1."""


def computer_memory() -> int:
    """Bytes of RAM that this computer has, swap included."""
    return psutil.virtual_memory().total + _swap()[0]


def available_memory() -> int:
    """Bytes of RAM that this process may still take without any being moved to the disk; a container's limit counts."""
    return min([psutil.virtual_memory().available, *_left_of_container()])


def free_memory_and_swap() -> int:
    """Bytes that this process may still take at all: free RAM, and swap that nobody uses."""
    return available_memory() + _swap()[1]


def _swap() -> tuple[int, int]:
    """Bytes of swap, in all and free."""
    try:
        swap = psutil.swap_memory()
    except RuntimeError:  # Windows whose performance counters are disabled or damaged
        return 0, 0
    return swap.total, swap.free


def _left_of_container(groups: tuple[tuple[str, str, str], ...] = _GROUPS) -> list[int]:
    """What a container's limit leaves; nothing where there is none. Files that are only cached make way."""
    for limit, used, stat in groups:
        try:
            texts = [Path(path).read_text(encoding="ascii") for path in (limit, used, stat)]
            cached = dict(line.split(" ", 1) for line in texts[2].splitlines())
            left = int(texts[0]) - int(texts[1]) + int(cached.get("inactive_file", 0))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        return [max(0, left)]
    return []
