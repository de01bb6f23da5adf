"""Whether this process is one of several. Without torch, so that commands answer quickly."""

from __future__ import annotations

import os

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun, or a program that sets the same variables, started this as one of several processes."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def speaks() -> bool:
    """Whether this process shows output: the only one, or the first."""
    return not launched() or os.environ["RANK"] == "0"
