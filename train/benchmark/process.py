"""Measurements in a separate process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FREED_AT_ONCE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment in which glibc returns freed memory at once, so that the memory held is the memory in use. Slower."""


def forget_peak() -> None:
    """Return freed memory, and restart the count of `peak_memory`; on Linux only."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run_module(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `python -m module arguments` and read the JSON object that it prints last. If interrupted, it has ended.

    `env` is added to this process's environment.

    Raises:
        RuntimeError: with the end of its error output, if it fails.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            # subprocess.run would not wait, and the folder that the process writes into is about to be removed.
            process.kill()
            process.wait()
            raise
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed: {errors[-2000:]}")
    return json.loads(output.splitlines()[-1])


class Stepped:
    """`python -m module arguments`, which performs one step for every line it is sent and answers each with a line of
    JSON. It ends with the block of this context manager."""

    def __init__(self, module: str, *arguments: str):
        self._command = [sys.executable, "-m", module, *arguments]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed on exit)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )

    def step(self) -> dict[str, Any]:
        """Make it perform a step, and read its answer.

        Raises:
            RuntimeError: with the end of its error output, if it has failed.
        """
        assert self._process.stdin and self._process.stdout
        try:
            print(file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:  # a closed pipe, for which Windows does not raise BrokenPipeError
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{' '.join(self._command[2:])} failed: {self._errors.read()[-2000:]}")
        return json.loads(answer)

    def __enter__(self) -> Stepped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
