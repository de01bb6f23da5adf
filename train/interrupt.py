"""Ctrl-C, and signals that end a process, wait for the end of a step, so that saves are consistent.

Job schedulers send SIGTERM some time before they kill a process, and a closed terminal sends SIGHUP. Both come more
than once: torchrun passes on what its processes have received themselves, and so do shells. Only the first one counts;
a second must not interrupt what is cleaned up after the first, and who sends them kills a process that takes too long.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..l2p_core.distributed.launch import speaks

_NOTE = b"\nStopping after the current step. Press Ctrl-C again to stop at once.\n"
_STDERR = 2
_TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""Signals that otherwise end Python at once: Windows has no SIGHUP, and others have no SIGBREAK."""


class Interrupt:
    """Whether the user, or the system, has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, a signal that ends a process raises KeyboardInterrupt, as Ctrl-C does; later ones do nothing,
    also after the block.

    Partial files are then removed and child processes ended, which a signal alone would leave.
    """

    def stop() -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    with _termination_calls(stop):
        yield


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within the block, the first signal only sets `requested`, and says so; a second Ctrl-C interrupts as usual."""
    state = Interrupt()
    usual = signal.getsignal(signal.SIGINT)

    def note() -> None:
        first, state.requested = not state.requested, True
        signal.signal(signal.SIGINT, usual)
        if first and speaks():
            # Not print: the signal may have interrupted one. A closed window takes no notes.
            with suppress(OSError):
                os.write(_STDERR, _NOTE)

    with _termination_calls(note):
        signal.signal(signal.SIGINT, lambda *_: note())
        try:
            yield state
        finally:
            signal.signal(signal.SIGINT, usual)


@contextmanager
def _termination_calls(react: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first termination calls a function; later ones, also after the block, do nothing.

    Signals that the process was started to ignore, as nohup does with SIGHUP, stay ignored.
    """
    before = {number: signal.getsignal(number) for number in _TERMINATIONS}
    handled = {number: usual for number, usual in before.items() if usual is not signal.SIG_IGN}

    def first(_signal: int, _frame: FrameType | None) -> None:
        for number in handled:
            signal.signal(number, signal.SIG_IGN)
        react()

    for number in handled:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, usual in handled.items():
            if signal.getsignal(number) is first:
                signal.signal(number, usual)
