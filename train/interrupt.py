"""Ctrl-C that waits for the end of a step, so that saves are consistent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..l2p_core.distributed.ranks import speaks

_NOTE = b"\nStopping after the current step. Press Ctrl-C again to stop at once.\n"
_STDERR = 2


class Interrupt:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within the block, the first Ctrl-C only sets `requested`, and says so; the second interrupts as usual."""
    state = Interrupt()
    usual = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        state.requested = True
        signal.signal(signal.SIGINT, usual)
        if speaks():
            # Not print: the signal may have interrupted one. A closed window takes no notes.
            with suppress(OSError):
                os.write(_STDERR, _NOTE)

    signal.signal(signal.SIGINT, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, usual)
