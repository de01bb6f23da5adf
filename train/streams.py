"""Standard output and error whose reader may go away: a pipe into `tee` or `head`, or a terminal that was closed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast


@contextmanager
def errors_may_be_unread() -> Iterator[None]:
    """Within the block, writing to standard error never fails.

    Progress and notes must not end the work that they tell of: with `2>&1 | tee log`, Ctrl-C ends tee while a run still
    has to save.
    """
    usual = sys.stderr
    if usual is None:  # under pythonw
        yield
        return
    sys.stderr = cast("TextIO", _Unread(usual))
    try:
        yield
    finally:
        sys.stderr = usual


class _Unread:
    """A stream that is dropped once it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_output(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def drop_output(stream: TextIO) -> None:
    """Send what is still written to a stream nowhere; otherwise Python would complain again when it closes it."""
    with suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_of_a_closed_pipe(error: OSError) -> bool:
    """Whether this error is how Windows reports that stdout's reader has closed: python/cpython#79935."""
    if os.name != "nt" or error.errno != errno.EINVAL or error.filename:
        return False
    try:
        print(flush=True)
    except OSError:
        return True
    return False
