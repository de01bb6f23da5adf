"""Work on files with the host's progress bar, which stops where the user interrupts and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils

from ..l2p_core.tensor_io import ProgressCallback


def progress_bar() -> ProgressCallback:
    """A callback of bytes done and bytes in all; raises the host's interruption if the user asked for it."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def convert_file(source: str, target: Path, variant: str, seed: int) -> str:
    raise ValueError


def extract_delta(trained: str, base: str, target: Path) -> str:
    raise ValueError


def merge_delta(delta: str, base: str, target: Path) -> str:
    raise ValueError
