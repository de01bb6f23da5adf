"""A run's metrics as TensorBoard events, if that library is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..dataset.pictures import montage
from ..training.step_metrics import SIGMA_RANGES
from .metrics import RunMetrics
from .montage import COLUMNS

_SCALARS = ("loss", "high_sigma_loss", "lr", "grad_norm", "images_per_second", "seconds_left", "memory_bytes")


class Events:
    """Writes event files into a folder, or nothing without TensorBoard.

    Events are for viewing only, so a disk that refuses them ends the events, not the run.

    Args:
        folder: created with the first event.
        step: events after it, of a killed run, are superseded.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        self._writer: Any = None
        self.available = True
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer_class: Any = SummaryWriter
        except ImportError:
            self.available = False

    def add(self, metrics: RunMetrics) -> None:
        """A step's values, including losses by range of sigma."""
        values = {name: getattr(metrics, name) for name in _SCALARS}
        ranges = zip(SIGMA_RANGES, metrics.sigma_loss, metrics.sigma_count, strict=False)
        values |= {f"loss_by_sigma/{name}": loss / count for name, loss, count in ranges if count}
        for name, value in values.items():
            if value is not None:
                self._write("add_scalar", name, value, metrics.step)

    def add_montage(self, step: int, pixels: Tensor) -> None:
        """A montage's images, (B, 3, H, W) in [-1, 1]."""
        self._write("add_image", "montage", (montage(pixels, COLUMNS) + 1) / 2, step)

    def flush(self) -> None:
        """Write pending events to disk."""
        if self._writer is not None:
            self._write("flush")

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._write("close")
            self._writer = None

    def _write(self, what: str, *arguments: object) -> None:
        if not self.available:
            return
        try:
            if self._writer is None:
                self._writer = self._writer_class(str(self._folder), purge_step=self._step + 1)
            getattr(self._writer, what)(*arguments)
        except OSError:
            self.available = False
