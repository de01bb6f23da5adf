"""The backbone's linear layers in 8 bits, rounded while a model is loaded, on its target device."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ...l2p_core.device.accelerator import is_out_of_memory
from ...l2p_core.files.eight_bit_formats import EIGHT_BITS
from ...l2p_core.files.quantised import MARKER, marker
from ...l2p_core.ops.eight_bit import FLOAT8, ROUNDING_BYTES
from ...l2p_core.ops.eight_bit import quantised as rounded
from ...l2p_core.sources import SOURCES
from ..messages.jobs import progress_bar


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
        state[f"{layer}.{MARKER}"] = marker(EIGHT_BITS["float8_e4m3fn"].settings)
        report(done, total)


def quantised(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its scale, a float32 scalar, both on the weight's device.

    Args:
        weight: of any floating dtype; one in 8 bits stays unchanged.
        device: to compute on, if it supports 8 bits and has memory for a copy of this weight.
    """
    if weight.dtype == FLOAT8:
        return weight, torch.ones((), device=weight.device)
    if not _has_room(weight, device):
        return rounded(weight, by_row=False)
    try:
        elements, scale = rounded(weight.to(device), by_row=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return rounded(weight, by_row=False)
    return elements.to(weight.device), scale.to(weight.device)


def _has_room(weight: Tensor, device: torch.device) -> bool:
    """Whether a device has memory for a weight as it is, in float32 and in 8 bits."""
    if not comfy.model_management.supports_cast(device, FLOAT8):
        return False
    needed = weight.numel() * (weight.element_size() + ROUNDING_BYTES)
    return needed <= comfy.model_management.get_free_memory(device)


def _is_plain(state: dict[str, Tensor], key: str) -> bool:
    """Whether a layer is not already quantised in another format."""
    return f"{key.removesuffix('.weight')}.{MARKER}" not in state and state[key].dtype.is_floating_point


def is_backbone_linear(key: str) -> bool:
    """Whether a key is the weight of a linear layer in a block's attention or feed-forward."""
    return any(source.is_block_linear(key) for source in SOURCES.values())
