"""What a Detailer Head is fitted to before the first step: windows of the first images of a run, noised as in training.

Each image is computed whole, as its features depend on all of it; of the result one window is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .. import flow, head_fit
from ..files.tensor_io import ProgressCallback
from ..head_windows import Windows
from ..model import L2PModel
from .prepared import Prepared


@torch.no_grad()
def collect(
    model: L2PModel,
    batch: Callable[[int], Prepared],
    autocast: Callable[[], AbstractContextManager[object]],
    device: torch.device,
    progress: ProgressCallback,
) -> Windows:
    """Windows of the images of the first micro-batches.

    Args:
        model: to run, on `device`; its training mode is kept.
        batch: prepares the micro-batch of a number.
        autocast: the precision to run in.
        device: of the model.
        progress: called with how many windows there are and their total.

    Raises:
        ValueError: if an image is smaller than a patch, or the model's features of one are not finite.
    """
    found: list[Windows] = []
    count, patch = 0, model.config.patch_size
    training = model.training
    model.eval()
    try:
        while count < head_fit.WINDOWS:
            prepared = batch(len(found))
            whole = [length // patch for length in prepared.pixels.shape[-2:]]
            cells = min(head_fit.CELLS, *whole)
            if not cells:
                raise ValueError(
                    f"The Detailer Head cannot be fitted to images smaller than a patch of {patch} pixels."
                )
            pixels, noise, sigma, captions = prepared.to(device)
            noisy = flow.add_noise(pixels, noise, sigma)
            with autocast():
                _, features = model.features(noisy, sigma, captions)
            if not features.isfinite().all():
                raise ValueError(
                    "The Detailer Head cannot be fitted: the model's features of an image are not finite numbers. "
                    "The model's file, the text encoder's or the image is damaged."
                )
            margin = 0 if list(features.shape[-2:]) == [cells, cells] else 1
            part = Windows(features, noisy, pixels - noise, sigma, margin)
            found.append(_cut(part, whole, cells, patch, len(found)))
            count += len(sigma)
            progress(min(count, head_fit.WINDOWS), head_fit.WINDOWS)
    finally:
        model.train(training)
    return Windows.joined(found)


def _cut(images: Windows, whole: Sequence[int], cells: int, patch: int, number: int) -> Windows:
    """The same random part of all images of a micro-batch, in system memory.

    Args:
        images: entire.
        whole: rows and columns of the patches that lie in the image entirely.
        cells: of the part's side.
        patch: pixels of a cell's side.
        number: of the micro-batch, from which the place follows.
    """
    generator = torch.Generator().manual_seed(number)
    top, left = (int(torch.randint(length - cells + 1, (), generator=generator)) for length in whole)

    def of(image: Tensor, scale: int) -> Tensor:
        rows, columns = (slice(first * scale, (first + cells) * scale) for first in (top, left))
        # A copy, as on a CPU a view would keep the whole image.
        return image[..., rows, columns].float().cpu().clone()

    return Windows(
        of(images.features, 1), of(images.noisy, patch), of(images.target, patch), images.sigma.cpu(), images.margin
    )
