"""The backbone's linear layers in 8 bits, rounded while a model is loaded, on its target device."""

from __future__ import annotations

import json

import comfy.model_management
import torch
from torch import Tensor

from ...l2p_core.device.accelerator import is_out_of_memory
from ...l2p_core.sources import SOURCES
from ..messages.jobs import progress_bar

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

_FORMAT = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
"""Weights are dequantised for the matrix product."""


def quantise_backbone(state: dict[str, Tensor]) -> None:
    """Convert the linear layers of all blocks to the host's scaled fp8 format, in place, with the host's progress bar.

    The head, embedders, norms and modulation keep their precision: 8-bit convolutions cause bands in the image, and the
    rest is small.

    Raises:
        comfy.model_management.InterruptProcessingException: when the user has interrupted.
    """
    device = comfy.model_management.get_torch_device()
    keys = [key for key in state if is_backbone_linear(key) and _is_plain(state, key)]
    report, done, total = progress_bar(), 0, sum(state[key].nbytes for key in keys)
    for key in keys:
        done += state[key].nbytes
        layer = key.removesuffix(".weight")
        state[key], state[f"{layer}.weight_scale"] = quantised(state[key], device)
        state[f"{layer}.comfy_quant"] = torch.tensor(list(_FORMAT), dtype=torch.uint8)
        report(done, total)


def quantised(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its scale, a float32 scalar, both where the weight was.

    Args:
        weight: of any floating dtype; one in 8 bits stays unchanged.
        device: to compute on, if it supports 8 bits and has memory for a copy of this weight.
    """
    if weight.dtype == FP8:
        return weight, torch.ones((), device=weight.device)
    if not _has_room(weight, device):
        return _rounded(weight)
    try:
        rounded, scale = _rounded(weight.to(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _rounded(weight)
    return rounded.to(weight.device), scale.to(weight.device)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    numbers = weight.to(torch.float32, copy=True)
    least, most = numbers.aminmax()
    scale = (torch.maximum(most, -least) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return numbers.div_(scale).to(FP8), scale


def _has_room(weight: Tensor, device: torch.device) -> bool:
    """Whether a device has memory for a weight as it is, in float32 and in 8 bits."""
    if not comfy.model_management.supports_cast(device, FP8):
        return False
    needed = weight.numel() * (weight.element_size() + torch.float32.itemsize + FP8.itemsize)
    return needed <= comfy.model_management.get_free_memory(device)


def _is_plain(state: dict[str, Tensor], key: str) -> bool:
    """Whether a layer is not already quantised in another format."""
    return f"{key.removesuffix('.weight')}.comfy_quant" not in state and state[key].dtype.is_floating_point


def is_backbone_linear(key: str) -> bool:
    """Whether a key is the weight of a linear layer in a block's attention or feed-forward."""
    return any(source.is_block_linear(key) for source in SOURCES.values())
