"""A run's montage: its prompts as images, from fixed seeds."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import flow
from ..dataset.pictures import GAP, enlarged, montage, picture, png
from ..distributed.ranks import Ranks
from ..files.tensor_io import ProgressCallback
from ..model import L2PModel
from ..sources import sampling_of
from .data import Features
from .recipe import WatchSection

COLUMNS = 6
_BATCH_PIXELS = 64 * 64 * 64
"""Pixels that are sampled together at most: 64 images of the tiny model, large images one by one."""
_LEAST_SIDE = 128  # pixels of an image in the file


def sample(
    model: L2PModel,
    features: Features,
    watch: WatchSection,
    side: int,
    ranks: Ranks,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """The images of the prompts, (B, 3, side, side) in [-1, 1] on the CPU; independent of the number of processes.

    The processes share batches of prompts. All sample equally often, as a sharded model requires: a process without a
    batch left repeats the last one.

    Args:
        model: in evaluation mode.
        features: of captions.
        watch: prompts, seeds and settings.
        side: pixels.
        ranks: the processes of the run, which all make this call; the model is on this one's device.
        progress: called with (sampling steps done, total steps), each step over all images sampled together; an
            exception from it interrupts all processes at once.

    Returns:
        In the first process; in the others empty, (0, 3, side, side).

    Raises:
        ValueError: if an image is not finite; in the first process.
        SystemExit: in the others in that case.
    """
    row = sampling_of(model.config)
    steps, cfg = watch.steps or row.steps, row.cfg if watch.cfg is None else watch.cfg
    empty = features("").to(ranks.device)
    count, together = len(watch.prompts), max(1, _BATCH_PIXELS // side**2)
    batches = [range(start, min(start + together, count)) for start in range(0, count, together)]
    rounds = -(-len(batches) // ranks.count)
    done = itertools.count(1)

    def step(*_: object) -> None:
        if progress:
            progress(next(done), steps * rounds)

    def images(numbers: range) -> Tensor:
        # On the CPU, so that a seed produces the same image on every machine.
        noise = [
            torch.randn(3, side, side, generator=torch.Generator().manual_seed(watch.seed + number))
            for number in numbers
        ]
        return flow.sample(
            model,
            torch.stack(noise).to(ranks.device),
            [features(watch.prompts[number]).to(ranks.device) for number in numbers],
            sigmas=flow.sigmas(steps, row.shift),
            cfg=cfg,
            negative=[empty] * len(numbers),
            progress=step,
        ).cpu()

    made: dict[int, Tensor] = {}
    wrong: ValueError | None = None
    for batch in range(ranks.rank, rounds * ranks.count, ranks.count):
        try:
            pixels = images(batches[min(batch, len(batches) - 1)])
        except ValueError as error:
            # The others are still sampling and wait for this process in every step.
            wrong = wrong or error
        else:
            if batch < len(batches):
                made[batch] = pixels
    first_wrong = next(filter(None, ranks.gather(wrong)), None)
    if first_wrong is not None:
        raise first_wrong if ranks.first else SystemExit(1)  # the first reports it
    found = {number: pixels for of_one in ranks.gather_on_first(made) for number, pixels in of_one.items()}
    return torch.cat([found[number] for number in sorted(found)]) if found else torch.empty(0, 3, side, side)


def file_content(pixels: Tensor) -> bytes:
    """A montage as a PNG file; tiny images are enlarged by repeating pixels."""
    return png(enlarged(picture(montage(pixels, COLUMNS)), _scale(pixels.shape[-1])))


def shape(count: int, side: int) -> tuple[int, int]:
    """(width, height) of a file with `count` images, 1 or more, of `side` pixels each."""
    shown, corners = places(count, side)
    return max(left for left, _ in corners) + shown, corners[-1][1] + shown


def places(count: int, side: int) -> tuple[int, list[tuple[int, int]]]:
    """The side in pixels of an image in a file with so many, and the left and top of each."""
    scale, columns = _scale(side), min(COLUMNS, count)
    pitch = scale * (side + GAP)
    return scale * side, [(i % columns * pitch, i // columns * pitch) for i in range(count)]


def _scale(side: int) -> int:
    return max(1, _LEAST_SIDE // side)
