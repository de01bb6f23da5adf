"""Refuses samplings that cannot succeed, with a sentence, before the system starts to swap or kills the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...l2p_core.config import PIXEL_CHANNELS, ModelConfig
from ...l2p_core.sources import source_of
from ...l2p_core.tiny.bundled import is_tiny
from .host_rows import HOST_ROWS

SAMPLER_COPIES = 5
"""Float32 copies of the images that a sampler holds: noise, start, state, prediction, direction."""

FLOAT32_BYTES = 4
GIB = 1024**3


def check_canvas(batch: int, height: int, width: int) -> None:
    """Refuse images that do not fit into RAM.

    Raises:
        ValueError: naming the size, the memory needed and the memory free.
    """
    needed = image_bytes(batch, height, width)
    there = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > there:
        raise ValueError(
            f"{batch} image(s) of {width}x{height} take {needed / GIB:.0f} GiB of RAM, but "
            f"{there / GIB:.0f} GiB are free: choose a smaller size or batch."
        )


def check_memory(model: Any, batch: int, height: int, width: int, instead: str = "") -> None:
    """Refuse a size at which a sampling step cannot fit into memory.

    Args:
        instead: advice after the usual, such as ", or ...".

    Raises:
        ValueError: naming the size, the memory needed and the memory available.
    """
    device = model.load_device
    step = model.model.memory_required([batch, PIXEL_CHANNELS, height, width])
    needed = step + SAMPLER_COPIES * image_bytes(batch, height, width)
    if comfy.model_management.is_device_cpu(device):
        there = free_memory(model, device)
    else:
        # Weights can leave the GPU to make room, so all of it counts.
        there = comfy.model_management.get_total_memory(device)
    if needed > there:
        raise ValueError(
            f"{batch} image(s) of {width}x{height} need about {needed / GIB:.0f} GiB for one step, but there are "
            f"{there / GIB:.0f} GiB: choose a smaller size or batch, or a smaller head tile in L2P Loader{instead}."
        )


def free_memory(patcher: Any, device: torch.device) -> float:
    """Free bytes on a device: as the patcher counts them if it does (newer hosts), else as the host does."""
    return (patcher if hasattr(patcher, "get_free_memory") else comfy.model_management).get_free_memory(device)


def check_pixels(shape: Sequence[int]) -> None:
    """Refuse the LATENT of a different kind of model.

    Raises:
        ValueError: unless the shape is (B, 3, H, W).
    """
    if len(shape) != 4 or shape[1] != PIXEL_CHANNELS:
        raise ValueError(
            f"This latent has the shape {tuple(shape)}, but an L2P model samples pixels, which have 3 channels: create "
            "it with Empty Pixels or Image to Pixels, not with a VAE."
        )


def check_caption(features: Tensor | None, config: ModelConfig) -> None:
    """Refuse conditioning from a text encoder other than the model's.

    Args:
        features: (B, L, width), or None for none.
        config: of the model, latent or pixel.

    Raises:
        ValueError: naming the encoder to use.
    """
    if features is None or features.shape[-1] == config.caption_dim:
        return
    raise ValueError(
        f"The prompt comes from another text encoder than this model's: it has {features.shape[-1]} values per token, "
        f"and the model takes {config.caption_dim}. Connect the CLIP of {_encoder(config)}."
    )


def _encoder(config: ModelConfig) -> str:
    if is_tiny(config):
        return "L2P Demo"
    if config.caption_dim == source_of(config).config.caption_dim:
        return HOST_ROWS[config.source].clip
    return "the text encoder that the model was made for"


def image_bytes(batch: int, height: int, width: int) -> int:
    """Bytes of images in float32."""
    return FLOAT32_BYTES * PIXEL_CHANNELS * batch * height * width
