"""File operations with the host's progress bar; an interruption stops them and leaves no partial file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ...l2p_core import convert, delta, quantise
from ...l2p_core.files.about import stated
from ...l2p_core.files.tensor_io import ProgressCallback
from ...l2p_core.initialise import FITTED
from ...l2p_core.patch_pairs import in_folder
from ...l2p_core.run import card
from .sentences import by_listed_names


@by_listed_names()
def convert_file(
    source: str, target: Path, variant: str, seed: int, overwrite: bool, dataset: Path | None = None
) -> str:
    """Write the pixel initialisation of a latent model, fitted to a data set if there is one; returns the report.

    Raises:
        ValueError: for an unsuitable source, or a target that cannot be written.
    """
    report = convert.convert(
        source,
        target,
        variant=variant,
        seed=seed,
        init="random" if dataset is None else FITTED,
        pairs=None if dataset is None else in_folder(dataset),
        overwrite=overwrite,
        progress=progress_bar(),
    )
    return _by_name(report.summary(), target, Path(source))


@by_listed_names()
def extract_delta(
    trained: str,
    base: str,
    target: Path,
    overwrite: bool,
    dtype: torch.dtype | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """Write the weights of `base` that training changed; returns the report.

    Raises:
        ValueError: for files that do not belong together, or a target that cannot be written.
    """
    report = delta.extract(
        trained, base, target, dtype=dtype, about=stated(**(about or {})), overwrite=overwrite, progress=progress_bar()
    )
    described = card.write(target)
    said = (
        f"{described.name}: the model card"
        if described
        else f"{card.path_of(target).name} is your own model card and was kept"
    )
    return f"{_by_name(report.summary(), target)}\n{said}"


@by_listed_names()
def merge_delta(trained: str, base: str, target: Path, overwrite: bool, unchecked_base: bool = False) -> str:
    """Write the whole model of the delta `trained` on its base; returns the report.

    Raises:
        ValueError: for a delta of another base, or a target that cannot be written.
    """
    report = delta.merge(
        trained, base, target, unchecked_base=unchecked_base, overwrite=overwrite, progress=progress_bar()
    )
    return _by_name(report.summary(), target)


@by_listed_names()
def quantise_file(
    file: str,
    trained: str | None,
    target: Path,
    format: str,
    overwrite: bool,
    unchecked_base: bool,
    about: Mapping[str, str],
) -> str:
    """Write a model, or the delta `trained` on it, in fewer bits; returns the report.

    Raises:
        ValueError: for files that are unsuitable or do not belong together, or a target that cannot be written.
    """
    report = quantise.quantise(
        trained or file,
        target,
        format,
        base=file if trained else None,
        unchecked_base=unchecked_base,
        about=stated(**about),
        overwrite=overwrite,
        progress=progress_bar(),
    )
    return _by_name(report.summary(), target)


def progress_bar() -> ProgressCallback:
    """A callback for (bytes done, total bytes); raises the host's interruption if the user asked for it."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def _by_name(text: str, *paths: Path) -> str:
    """A report with file names in place of paths, because shared workflows show it."""
    for path in paths:
        text = text.replace(str(path), path.name)
    return text
