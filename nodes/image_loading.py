"""Images of the host's input folder, read without rounding to 8 bits."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ..l2p_core.dataset.images import KEEP_DEPTH, BrokenImage, load_whole, look
from ..l2p_core.deep_images.dicom import check_window
from .folders import datasets


def load_image(name: str, window: str, frame: int) -> tuple[Tensor, Tensor]:
    """An image file as IMAGE (1, H, W, 3) and MASK (1, H, W), float32 whatever type the host keeps its images in.

    Args:
        name: in the host's input folder.
        window: how a DICOM file's values become grey, see `check_window`.
        frame: of a DICOM file, counted from 1.

    Returns:
        Colours from black 0 to white 1, those of transparent pixels unchanged; and 1 where the image is transparent.

    Raises:
        ValueError: if there is no such file, it cannot be used as an image, has no such frame, or needs a package that
            is missing.
    """
    check_window(window)
    path = datasets.input_file(name)
    try:
        _, _, frames, bits = look(path)
        if bits:
            raise BrokenImage(f"it has {bits} bits per channel, but this format is read with 8: {KEEP_DEPTH}")
        if not 1 <= frame <= frames:
            count = "1 frame" if frames == 1 else f"{frames} frames"
            raise ValueError(f"{name} has {count}: set frame to {1 if frames == 1 else f'1 to {frames}'}.")
        colours, alpha = load_whole(path, frame - 1, window)
    except BrokenImage as error:
        raise ValueError(f"{name} cannot be used as an image: {error}.") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    device = comfy.model_management.intermediate_device()
    mask = torch.zeros(colours.shape[1:]) if alpha is None else 1 - alpha
    return colours.movedim(0, -1).contiguous()[None].to(device), mask[None].to(device)
