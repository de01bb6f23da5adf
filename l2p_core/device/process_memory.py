"""What this process has needed of the computer's memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil


def peak_memory() -> int:
    """The most bytes of memory this process has held at once (peak resident set)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # getrusage would report the parent's peak where that was higher: Linux hands it on to a new process.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but on macOS
