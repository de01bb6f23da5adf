"""The peak memory of this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil


def peak_memory() -> int:
    """The peak resident set of this process, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # getrusage would report the parent's peak if that was higher: a new process inherits it on Linux.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes except on macOS
