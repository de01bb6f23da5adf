"""A check of finished images: NaN and infinity would otherwise be written as black pixels and reported as success."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(images: Tensor) -> None:
    """Refuse images that contain NaN or infinity, with one pass over the finished pixels.

    Raises:
        ValueError: with a sentence for the user. Not a class of ours, which ComfyUI shows with the pack's path.
    """
    # The extremes propagate NaN and need no second tensor of the image's size.
    low, high = torch.aminmax(images)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(
            "An image contains values that are not finite numbers and would be black: the weights of the model or of a "
            "LoRA are broken, or overflow in their dtype. Try without LoRAs, with the weights in bf16 or fp32, or with "
            "another file."
        )
