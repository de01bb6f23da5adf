"""Images of numbers: NaN and infinity would be written as black pixels, and called a success."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """An image that is none; the message says what may be done."""


def check_finite(images: Tensor) -> None:
    """Refuse images with NaN or infinity in them, by one look at the finished pixels.

    Raises:
        NotFinite: in a sentence for whoever asked for the images.
    """
    # The extremes take on any NaN, and need no second tensor of the image's size.
    low, high = torch.aminmax(images)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NotFinite(
            "An image came out with values that are not finite numbers, and would be black: the weights of the model "
            "or of a LoRA are broken, or overflow in their number type. Try without LoRAs, with the weights in bf16 "
            "or fp32, or with another file."
        )
