"""Ctrl-C, and signals that end a process, wait for the end of a step, so that saves are consistent.

Job schedulers send SIGTERM some time before they kill a process, and a closed terminal sends SIGHUP.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from ..l2p_core.distributed.launch import speaks

_NOTE = b"\nStopping after the current step. Press Ctrl-C again to stop at once.\n"
_STDERR = 2
_TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""Signals that otherwise end Python at once: Windows has no SIGHUP, and others have no SIGBREAK."""
_Handler = Callable[[int, FrameType | None], None]


class Interrupt:
    """Whether the user, or the system, has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, a signal that ends a process raises KeyboardInterrupt, as Ctrl-C does.

    Partial files are then removed and child processes ended, which a signal alone would leave.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    with _handled(_TERMINATIONS, stop):
        yield


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within the block, the first signal only sets `requested`, and says so.

    A second Ctrl-C interrupts as usual. Other signals change nothing when they come again, as they do when a scheduler
    sends one to torchrun and its processes alike: who sends them kills a process that takes too long.
    """
    state = Interrupt()
    usual = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        first, state.requested = not state.requested, True
        signal.signal(signal.SIGINT, usual)
        if first and speaks():
            # Not print: the signal may have interrupted one. A closed window takes no notes.
            with suppress(OSError):
                os.write(_STDERR, _NOTE)

    with _handled(_TERMINATIONS, note):
        signal.signal(signal.SIGINT, note)
        try:
            yield state
        finally:
            signal.signal(signal.SIGINT, usual)


@contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: _Handler) -> Iterator[None]:
    """Handle signals, but for those that the process was started to ignore, as nohup does with SIGHUP."""
    before = {number: signal.getsignal(number) for number in numbers}
    changed = {number: usual for number, usual in before.items() if usual is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in changed.items():
            signal.signal(number, usual)
