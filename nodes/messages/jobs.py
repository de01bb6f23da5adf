"""Work on files with the host's progress bar, which stops where the user interrupts and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils

from ...l2p_core import convert, delta
from ...l2p_core.files.tensor_io import ProgressCallback
from .sentences import by_listed_names


@by_listed_names()
def convert_file(source: str, target: Path, variant: str, seed: int, overwrite: bool) -> str:
    """Write the pixel initialisation of a latent model; the report.

    Raises:
        ValueError: for an unsuitable source, or a target that cannot be written.
    """
    report = convert.convert(source, target, variant=variant, seed=seed, overwrite=overwrite, progress=progress_bar())
    return _by_name(report.summary(), target, Path(source))


@by_listed_names()
def extract_delta(trained: str, base: str, target: Path, overwrite: bool) -> str:
    """Write what training changed of `base`; the report.

    Raises:
        ValueError: for files that do not belong together, or a target that cannot be written.
    """
    report = delta.extract(trained, base, target, overwrite=overwrite, progress=progress_bar())
    return _by_name(report.summary(), target)


@by_listed_names()
def merge_delta(trained: str, base: str, target: Path, overwrite: bool) -> str:
    """Write the whole model of the delta `trained` on its base; the report.

    Raises:
        ValueError: for a delta of another base, or a target that cannot be written.
    """
    report = delta.merge(trained, base, target, overwrite=overwrite, progress=progress_bar())
    return _by_name(report.summary(), target)


def progress_bar() -> ProgressCallback:
    """A callback of bytes done and bytes in all; raises the host's interruption if the user asked for it."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def _by_name(text: str, *paths: Path) -> str:
    """A report with file names in place of paths: it is shown in workflows, which people share."""
    for path in paths:
        text = text.replace(str(path), path.name)
    return text
