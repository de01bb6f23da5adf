"""`l2p benchmark gpu`: measures the whole model on this device, in one command of a few minutes.

This process requests the rows of `gpu_rows` from a worker (`gpu_worker`), one after the other, and writes the report
after each. A row that fails, crashes or hangs is named in the report, and the next one follows.
"""

from __future__ import annotations

import datetime
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ...l2p_core.checkpoint import check_exact, open_checkpoint
from ...l2p_core.device import accelerator
from ...l2p_core.model import key_shapes
from ...l2p_core.version import __version__
from . import gpu_worker
from .gpu_measure import Figures
from .gpu_report import FOLDER, markdown, with_ratio, write
from .gpu_rows import PARTS, chosen

_STARTS = 180.0
"""Seconds that a worker may take until its first row begins, and between rows."""

UNREACHED = "not run: out of time"


def benchmark_gpu(
    output: Path,
    parts: Sequence[str] | None = None,
    minutes: float = 8.0,
    quick: bool = False,
    model: Path | None = None,
    device: str | None = None,
) -> dict[str, Figures]:
    """Measure, write gpu.md and gpu.json into the folder `output`, and print the table.

    Args:
        output: created if missing; an existing report in it is replaced.
        parts: names of the parts to run; None runs all.
        minutes: time limit, after which the rest is skipped.
        quick: small sizes, to check that it runs.
        model: an L2P file to take weights from; None uses random ones.
        device: to measure, such as "cuda"; None selects a GPU if there is one.

    Returns:
        The results by each row's key.

    Raises:
        ValueError: for an unknown part, a missing device, no GPU where none is named, a file that is not a complete
            L2P model in plain precision, or a folder with a report of something else or in use by another process.
    """
    rows = [row.key for part in chosen(parts) for row in part.measurements]
    if device is not None:
        accelerator.named(device)
    if model is not None:
        checkpoint = open_checkpoint(model)
        check_exact(checkpoint, key_shapes(checkpoint.pixel_config()))
    FOLDER.check(output)
    if device is None and not quick and accelerator.default_device().type == "cpu":
        raise ValueError(
            "There is no GPU here, and the 6B model on a CPU takes hours: check that the benchmark runs with --quick, "
            "or measure the CPU all the same with --device cpu."
        )
    about: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "version": __version__,
        "quick": quick,
        "model": None if model is None else str(model),
        "parts": [part.name for part in chosen(parts)],
    }
    asked = {"quick": quick, "model": str(model.resolve()) if model else None, "device": device}
    with FOLDER.held(output):
        return _measured(output, rows, minutes, about, asked)


def _measured(
    output: Path, rows: Sequence[str], minutes: float, about: dict[str, Any], asked: dict[str, Any]
) -> dict[str, Figures]:
    """The results of the rows, by workers that are sent `asked`, under a report that begins with `about`."""
    results: dict[str, Figures] = {}
    started = time.monotonic()

    def found(key: str, figures: Figures) -> None:
        results[key] = with_ratio(figures)
        in_order = {row: results[row] for row in rows if row in results}
        write(output, about | {"seconds": time.monotonic() - started}, in_order)
        said = figures.get("failed") or (f"{figures['ms']:.1f} ms" if "ms" in figures else figures.get("value", "done"))
        print(f"{key}: {said}", file=sys.stderr, flush=True)

    while left := [row for row in rows if row not in results]:
        seconds = 60 * minutes - (time.monotonic() - started)
        if seconds <= 0:
            for row in left:
                found(row, {"failed": UNREACHED})
            break
        with _Worker(asked | {"rows": left, "seconds": seconds}) as worker:
            worker.run(found, left, about.update)
    results = {row: results[row] for row in rows}
    print(markdown(about | {"seconds": time.monotonic() - started}, results))
    return results


def listed() -> str:
    """The parts, what they measure, and their rows."""
    return "\n".join(
        line
        for part in PARTS
        for line in (f"{part.name}: {part.about}", *(f"  {row.name}" for row in part.measurements))
    )


class _Worker:
    """A process that measures until it ends."""

    def __init__(self, request: dict[str, Any]):
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed on exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", gpu_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        assert self._process.stdin and self._process.stdout
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        with suppress(OSError):  # if it has ended, `run` says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def run(self, found: Any, left: Sequence[str], says: Callable[[dict[str, str]], None]) -> None:
        """Take results of the rows that are `left` until it ends or hangs; at least one of them is done then. `says` is
        called with what it measures on."""
        at, limit, pending, begun = "", _STARTS, list(left), False
        while True:
            try:
                message = self._messages.get(timeout=limit)
            except queue.Empty:
                self._process.kill()
                for row in pending[:1] if not at else [at]:
                    found(row, {"failed": f"stopped after {limit:.0f} s without an answer"})
                return
            if message is None:
                break
            if "about" in message:
                says(message["about"])
                continue
            limit = message.get("limit", _STARTS)
            at = message.get("begins", "")
            begun = True
            if "row" in message:
                found(message["row"], message["figures"])
                pending.remove(message["row"])
        # A worker that has not even begun would not begin the next time either.
        for row in [at] if at else pending if not begun else []:
            code = self._process.wait()
            found(row, {"failed": f"the process ended with code {code}: {self._last_error()}"})

    def _listen(self, lines: IO[str]) -> None:
        for message in gpu_worker.messages(iter(lines)):
            self._messages.put(message)
        self._messages.put(None)

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:300] if lines else "no message"

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
