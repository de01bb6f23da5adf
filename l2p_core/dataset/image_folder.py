"""A data folder prepared for training: every sample with its size and bucket, and notes on irregularities."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..deep_images.common import ImageInfo
from ..files.tensor_io import ProgressCallback
from ..files.units import counted
from . import buckets, headers, problems
from .buckets import ImageSize
from .problems import Problem, some
from .readers import Listing, Sample, read

MAX_UPSCALE = 1.5
"""Images that are enlarged by more than this are named in the notes."""
_LARGE_CROP = 0.25

_images = partial(counted, noun="image")


@dataclass(frozen=True)
class Image:
    """A sample with the displayed (width, height) of its file and its bucket."""

    sample: Sample
    size: ImageSize
    bucket: ImageSize


@dataclass(frozen=True)
class ImageFolder:
    """The data to train on.

    Attributes:
        folder: the data folder, absolute.
        images: the good samples, in the order of their names; one or more.
        problems: what is skipped, and why.
        total: number of samples if there were no problems.
        notes: sentences on what a user should know before training: images that are skipped, enlarged or cropped
            heavily.
        fingerprint: SHA-256 over names, captions, seeds, sizes and buckets in their order. A run resumes
            only on data with the fingerprint that it began with.
    """

    folder: Path
    images: list[Image]
    problems: list[Problem]
    total: int
    notes: list[str]
    fingerprint: str

    @property
    def captions(self) -> list[str]:
        """The different captions, in the order of their images."""
        return list(dict.fromkeys(image.sample.caption for image in self.images))

    @property
    def sizes(self) -> dict[ImageSize, int]:
        """The number of images in each bucket, largest first."""
        return dict(Counter(image.bucket for image in self.images).most_common())


def open_folder(
    source: Path | str,
    *,
    area: int,
    multiple: int,
    max_bad_share: float = problems.MAX_BAD_SHARE,
    index: Path | None = None,
    progress: ProgressCallback | None = None,
) -> ImageFolder:
    """Read a data folder, read its images' headers and sort them into buckets; nothing is decoded.

    Args:
        source: the folder, or one table in it; see `readers.read`.
        area: maximum pixels of an image in training, such as 1024 * 1024.
        multiple: of both sides; `ModelConfig.size_multiple`.
        max_bad_share: share of bad samples above which this fails.
        index: a file that caches the sizes, so that the next start need not open every image; created if missing, and
            left alone, with a note, if it is something else.
        progress: called with (images looked at, images in all).

    Raises:
        ValueError: if the folder does not exist or contains nothing to train on.
        TooManyProblems: a ValueError with the list, if more than the allowed share of samples is bad.
    """
    listing = read(source)
    found, broken, changed = headers.look(listing.samples, index, progress)
    bad = listing.problems + broken
    wanted = buckets.sizes(area, multiple)
    images = [
        Image(frame, ImageSize(*info[:2]), buckets.nearest(*info[:2], wanted))
        for sample in listing.samples
        if (info := found.get(sample.name)) is not None
        for frame in _frames(sample, info)
    ]
    total = len(images) + problems.count(bad)
    problems.check_share(bad, total, max_bad_share)
    if not images:
        raise ValueError(f"{source} contains no image that can be read: {bad[0]}.")
    notes = [*_notes(listing, bad, total, images), *_of_files(found, changed, index)]
    return ImageFolder(listing.folder, images, bad, total, notes, _fingerprint(images))


def _of_files(found: Mapping[str, ImageInfo], changed: Sequence[str], index: Path | None) -> list[str]:
    """Notes on images that are read with fewer bits, on the file that caches sizes, and on images that changed."""
    notes = []
    rounded = [f"{name} ({info.rounded} bits)" for name, info in found.items() if info.rounded]
    if rounded:
        notes.append(
            f"{_images(len(rounded))} of more than 8 bits per channel in a format that is read with 8: {some(rounded)}"
            ". Train on PNG or TIFF with 16 bits to keep all levels."
        )
    if index and headers.is_foreign(index):
        notes.append(
            f"The file {index.name} beside the run's files was not written by a run and is not touched. Every start "
            "reads all images' headers again until you move it away."
        )
    if changed:
        notes.append(
            f"{_images(len(changed))} changed since this run last read them: {some(changed)}. Its earlier steps were "
            "trained on the old images; begin it anew to train on the new ones only."
        )
    return notes


def _frames(sample: Sample, info: ImageInfo) -> Iterator[Sample]:
    """The sample, or one for each frame of a file with several."""
    if info.frames == 1:
        yield sample
        return
    for frame in range(info.frames):
        yield replace(sample, name=f"{sample.name} frame {frame + 1}", frame=frame)


def _fingerprint(images: Iterable[Image]) -> str:
    digest = hashlib.sha256()
    for image in images:
        sample = image.sample
        line = json.dumps([sample.name, sample.caption, sample.seed, *image.size, *image.bucket])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _notes(listing: Listing, bad: Sequence[Problem], total: int, images: Sequence[Image]) -> list[str]:
    notes = []
    if bad:
        notes.append(f"{problems.count(bad)} of {total} samples are skipped: {some([str(p) for p in bad])}.")
    if listing.unlisted:
        notes.append(f"Skipped {_images(listing.unlisted)} that no table names and no text file describes.")
    notes += _of_other_trainers(listing)
    if listing.repeats:
        notes.append(f"{listing.repeats} repeated rows are read once.")
    enlarged = [f"{name} ({factor:.2g} times)" for name, factor in _above(MAX_UPSCALE, buckets.enlargement, images)]
    if enlarged:
        notes.append(f"{_images(len(enlarged))} must be enlarged by more than {MAX_UPSCALE:g}: {some(enlarged)}.")
    cropped = [f"{name} ({share:.0%})" for name, share in _above(_LARGE_CROP, buckets.cropped_share, images)]
    if cropped:
        notes.append(f"The crop removes more than {_LARGE_CROP:.0%} of {_images(len(cropped))}: {some(cropped)}.")
    return notes


def _above(
    limit: float, measure: Callable[[int, int, ImageSize], float], images: Iterable[Image]
) -> list[tuple[str, float]]:
    """The names of the images whose measure is above the limit, and the measure; the largest first."""
    measured = [(image.sample.name, measure(*image.size, image.bucket)) for image in images]
    return sorted(((name, value) for name, value in measured if value > limit), key=lambda pair: -pair[1])


def _of_other_trainers(listing: Listing) -> list[str]:
    """Notes on files for other tools that are not used here."""
    notes = []
    if listing.skipped:
        kinds = [f"{count} {suffix}" for suffix, count in listing.skipped.most_common()]
        notes.append(f"Files that are not read: {some(kinds)}.")
    if listing.unused:
        notes.append(f"Skipped {counted(listing.unused, 'text file')} without an image.")
    if listing.repeat_folders:
        notes.append(
            f"Folder names such as {some(listing.repeat_folders)} set repeats in other trainers; here every image is "
            "shown equally often."
        )
    return notes
