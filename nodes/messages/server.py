"""The server that the nodes run in."""

from __future__ import annotations

import sys
from typing import Any


def running_server() -> Any:
    """The running server; None where the host's modules are used without one, which may not even import it."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
