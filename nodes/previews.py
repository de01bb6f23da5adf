"""Previews that a node shows while it generates images. The frontend writes their size below them."""

from __future__ import annotations

from typing import Any

import comfy.utils
import latent_preview
import torch
from comfy_api.latest import ui
from PIL import Image
from torch import Tensor

from ..l2p_core.dataset.pictures import picture

LARGEST = 4096
"""Pixels of a side up to which a finished image is shown as it is; larger ones take seconds to send."""
_REDUCED = 1024
"""Pixels of the longer side of a preview that stands for a file."""

Preview = tuple[str, Image.Image, int]
"""A preview in the host's form: format, image, and the longest side to which it scales the image."""


class Previews:
    """The host's previews of a MODEL's samples, or none if the user has disabled them; no preview is larger than its
    image.

    Args:
        model: the MODEL that samples.
    """

    def __init__(self, model: Any):
        latent_format = model.model.latent_format
        self._previewer = latent_preview.get_previewer(model.load_device, latent_format)
        self._scale = latent_format.spacial_downscale_ratio

    def of_samples(self, x0: Tensor) -> Preview | None:
        """A small preview of the first of the samples of a step."""
        if self._previewer is None:
            return None
        kind, image, limit = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        return kind, image, min(limit, self._scale * max(image.size))

    def of_image(self, image: Image.Image) -> Preview | None:
        """A finished image, in its own size up to LARGEST."""
        longest = max(image.size)
        if self._previewer is None:
            return None
        return "JPEG", image, longest if longest <= LARGEST else latent_preview.MAX_PREVIEW_RESOLUTION


class StepPreviews:
    """Progress and previews of one sampling of pixels, as the host's `latent_preview.prepare_callback`.

    Args:
        model: the L2P MODEL.
        steps: of the sampling.
    """

    def __init__(self, model: Any, steps: int):
        self._previews = Previews(model)
        self._bar = comfy.utils.ProgressBar(steps)
        self._steps = steps

    def __call__(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        self._bar.update_absolute(step + 1, total, self._previews.of_samples(x0))

    def finish(self, pixels: Tensor) -> None:
        """Show the result, (B, 3, H, W) in [-1, 1], in place of the last preview."""
        self._bar.update_absolute(self._steps, self._steps, self._previews.of_image(picture(pixels[0])))


def preview_of(images: Tensor, node: Any) -> dict[str, Any]:
    """The images as the host previews them, clamped, and reduced if they are large."""
    shown = images[..., :3].float().clamp(0, 1)
    scale = _REDUCED / max(shown.shape[1:3])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in shown.shape[1:3]]
        shown = torch.nn.functional.interpolate(shown.movedim(-1, 1), size=size, mode="area").movedim(1, -1)
    if shown.shape[-1] == 1:
        shown = shown.expand(-1, -1, -1, 3)
    return ui.PreviewImage(shown, cls=node).as_dict()
