"""Quantised files for the host: each layer gets its own marker, the newest of the host's formats."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.ldm.modules.attention
import comfy.quant_ops
import torch
from torch import Tensor

from ...l2p_core.files.quantised import (
    MARKER,
    OLD_MARKER,
    OLD_NAMES,
    LayerSettings,
    formats,
    layer_of,
    leaf_of,
    marker,
    read_marker,
    unmarked_settings,
)
from ...l2p_core.files.recognise import ATTENTION_SETTING, is_of_no_network
from ...l2p_core.files.tensor_io import STORED_DTYPES, Stored

_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def mark_layers(state: dict[str, Tensor], settings: LayerSettings) -> None:
    """Add each layer's marker and rename its scales accordingly, in place."""
    state.pop(OLD_MARKER, None)
    for key in [key for key in state if leaf_of(key) in OLD_NAMES and layer_of(key) in settings]:
        scale = state.pop(key)
        # Like the host: an input scale of 1 has no effect.
        if leaf_of(key) != "scale_input" or scale.item() != 1.0:
            state[f"{layer_of(key)}.{OLD_NAMES[leaf_of(key)]}"] = scale
    for layer, values in settings.items():
        state[f"{layer}.{MARKER}"] = marker(values)


def settings_of(state: Mapping[str, Tensor]) -> LayerSettings:
    """The layers of a state dict that have a marker.

    Raises:
        ValueError: if one is not valid.
    """
    markers = [key for key in state if leaf_of(key) == MARKER]
    return {layer_of(key): read_marker("This file", key, state[key].cpu()) for key in markers}


def mark_unmarked(state: dict[str, Tensor]) -> None:
    """Mark float8 layers that have only a scale, which the host would treat as plain weights, in place.

    The host marks all layers of the older spelling as float8_e4m3fn (comfy/utils.py, convert_old_quants); those of the
    other float8 are marked as what they are.
    """
    settings = settings_of(state)
    mark_layers(state, unmarked_settings(described(state), settings))
    for layer, values in settings.items():
        weight = state.get(f"{layer}.weight")
        if values.get("format") == "float8_e4m3fn" and weight is not None and weight.dtype == torch.float8_e5m2:
            state[f"{layer}.{MARKER}"] = marker(values | {"format": "float8_e5m2"})


def described(state: Mapping[str, Tensor]) -> dict[str, Stored]:
    """A state dict in the form in which the core's checks see a file's tensors."""
    return {
        name: Stored(name, _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), ())
        for name, tensor in state.items()
    }


def check_known(settings: LayerSettings) -> None:
    """Refuse a format that this host does not read.

    Raises:
        ValueError: naming it.
    """
    unknown = sorted(set(formats(settings).values()) - {*comfy.quant_ops.QUANT_ALGOS})
    if unknown:
        raise ValueError(
            f"This file is quantised as {unknown[0]}, which this version of ComfyUI does not read (it reads "
            f"{', '.join(comfy.quant_ops.QUANT_ALGOS)}): update ComfyUI, or use another file of the same model."
        )


def is_for_the_host(key: str) -> bool:
    """Whether the host uses a key: not keys that no network has, nor settings newer than the host."""
    if key.endswith(ATTENTION_SETTING):
        return hasattr(comfy.ldm.modules.attention, "ComfyAttention")
    return not is_of_no_network(key)
