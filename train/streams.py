"""Standard output and error whose reader may go away: a pipe into `tee` or `head`, or a terminal that was closed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

_UNREAD = (errno.EPIPE, errno.EIO, errno.EINVAL)
"""How writing fails when nobody reads any more: a pipe, a closed terminal, and a pipe on Windows
(python/cpython#79935)."""


@contextmanager
def patient_streams() -> Iterator[PatientStream]:
    """Within the block, writing to standard output and error never fails, not even if they are closed or missing.

    Progress and notes must not end the work that they tell of: with `2>&1 | tee log`, Ctrl-C ends tee while a run still
    has to save. Yields standard output.
    """
    _occupy_numbers()
    usual = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output, errors = (PatientStream(stream or nowhere) for stream in usual)  # None if closed, or under pythonw
        sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = usual


class PatientStream:
    """A stream that is dropped once it cannot be written.

    Attributes:
        lost: the error then, unless nobody reads the stream any more: the disk of its file is full, for example.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """As the stream does; errors are not raised."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """As the stream does; errors are not raised."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in _UNREAD:
            self.lost = error
        # What is written from now on, and what is still in the stream's buffer, goes nowhere.
        with suppress(OSError), open(os.devnull, "wb", buffering=0) as nowhere:  # a stream without a file
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _occupy_numbers() -> None:
    """Give the numbers of closed standard streams to nothing: the next file would have them otherwise, and what writes
    to standard error by its number would write into that file."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
