"""The server that the nodes run in."""

from __future__ import annotations

import sys
from typing import Any


def running_server() -> Any:
    """The running server; None if the host's modules are used without one, which then may not be importable."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
