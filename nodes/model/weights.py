"""The weights of an L2P file as the host passes them to a model, from its own loaders or from ours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...l2p_core.checkpoint import check_tensors
from ...l2p_core.config import COMFY_PREFIX, ModelConfig, PixelConfig
from ...l2p_core.files.quantised import MARKER, layer_of, leaf_of, unpacked
from ...l2p_core.layouts import comfy_sources
from ...l2p_core.model import key_shapes
from .quantised import check_known, described, is_for_the_host, settings_of


def taken_out(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose keys have the prefix, in ComfyUI layout; they are removed from `state`.

    Raises:
        ValueError: if the keys mix two layouts.
    """
    _join_markers(state, prefix)
    plan = comfy_sources(key.removeprefix(prefix) for key in state if key.startswith(prefix))
    weights: dict[str, Tensor] = {}
    for name, keys in plan.items():
        tensors = [state.pop(prefix + key) for key in keys]
        if is_for_the_host(name):
            weights[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return weights


def _join_markers(state: dict[str, Tensor], prefix: str) -> None:
    """Bring the markers that a header holds to the names of their layers, once each, in place.

    The host adds them by the names in the header, which have the prefix or not; Load Diffusion Model does so twice,
    before it takes the prefix off and after.
    """
    for key in [key for key in state if leaf_of(key) == MARKER]:
        name = prefix + key.removeprefix(COMFY_PREFIX)
        if name == key:
            continue
        if name not in state and f"{layer_of(name)}.weight" in state:
            state[name] = state.pop(key)
        elif name in state and torch.equal(state[name], state[key]):
            del state[key]


def sizes(weights: Mapping[str, Tensor]) -> PixelConfig:
    """The sizes of the model whose complete set of weights this is.

    Raises:
        ValueError: if weights are missing or left over: the host would only log that, and sample noise.
    """
    tensors = described(weights)
    settings = settings_of(weights)
    try:
        config = ModelConfig.from_shapes(unpacked({name: stored.shape for name, stored in tensors.items()}, settings))
    except ValueError as error:
        raise ValueError(_incomplete(str(error))) from error
    if not isinstance(config, PixelConfig):
        raise ValueError(_incomplete("The Detailer Head is missing."))
    expected = key_shapes(config)
    missing = next((name for name in expected if name not in weights), None)
    if missing:
        raise ValueError(_incomplete(f"'{missing}' is missing."))
    check_known(settings)
    check_tensors("This file", tensors, settings, expected)
    return config


def _incomplete(reason: str) -> str:
    return (
        f"This file contains only a part of an L2P model. {reason} If it is a delta, load it with L2P Loader, as the "
        "delta beside the base that it was made for; otherwise download it again."
    )


def disk_speed(patcher: type, state: dict[str, Tensor]) -> dict[str, Any]:
    """The argument with which a newer host tells its patchers whether weights come from a fast disk."""
    if "fast_disk" not in inspect.signature(patcher).parameters:
        return {}
    import comfy.storage

    return {"fast_disk": comfy.storage.state_dict_fast_disk(state)}
